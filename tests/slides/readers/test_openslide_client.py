"""A slide whose reader crashes, hangs or allocates costs itself, and no other slide or process."""

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from bcd.errors import ImageError
from bcd.imaging import child
from bcd.slides import slide
from bcd.slides.readers import openslide_client
from tests import pictures
from tests.injected import ALLOCATE, CRASH, HANG, set_fault

pytestmark = pytest.mark.process
PIXELS = pictures.stained(150, 200)


@pytest.fixture(autouse=True)
def ended():
    """The children of a test end with it."""
    yield
    child.close_all()


def write(folder, name, pixels=PIXELS):
    path = folder / name
    path.write_bytes(pictures.tiled_tiff(pixels, 0.5, **pictures.UNUSUAL))
    return path


def error_of(function):
    with pytest.raises(ImageError) as caught:
        function()
    return caught.value.code, caught.value.message


def require_read(path, pixels=PIXELS):
    with slide.open_slide(path) as opened:
        np.testing.assert_array_equal(opened.read(0, 0, 0, 200, 150), pixels)


@pytest.mark.parametrize(
    ("name", "code", "error"),
    [
        ("layout", CRASH, ("unreadable", "the slide reader crashes: Segmentation fault")),
        ("facts", CRASH, ("unreadable", "the slide reader crashes: Segmentation fault")),
        ("facts", HANG, ("too_slow", "reading the slide takes more than 1 s of CPU time")),
        ("facts", ALLOCATE, ("too_large", "reading the slide needs more than 4 GiB of memory")),
        ("facts", "bytearray(2**33)", ("too_large", "reading the slide needs more than 4 GiB of memory")),
    ],
)
def test_a_slide_that_cannot_be_opened_costs_itself(tmp_path, monkeypatch, name, code, error):
    set_fault(monkeypatch, name, code)
    asked = slide.is_slide if name == "layout" else slide.open_slide
    bad = write(tmp_path, "bad.tif")
    assert error_of(partial(asked, bad, budget=child.QUICK)) == error
    good = write(tmp_path, "good.tif")
    assert slide.is_slide(good)
    require_read(good)


def test_one_that_waits_at_open_is_too_slow(tmp_path, monkeypatch):
    set_fault(monkeypatch, "facts", "signal.pause()")
    monkeypatch.setattr(child, "MAX_WALL_S", 0.1)
    bad = write(tmp_path, "bad.tif")
    assert error_of(lambda: slide.open_slide(bad)) == ("too_slow", "reading the slide takes more than 0.1 s")


@pytest.mark.parametrize(("code", "error"), [(CRASH, "unreadable"), (ALLOCATE, "too_large")])
def test_a_tile_costs_itself_and_the_thumbnail(tmp_path, monkeypatch, code, error):
    set_fault(monkeypatch, "read", f"given['x'] == 0 and ({code})")
    with slide.open_slide(write(tmp_path, "bad.tif")) as opened:
        for _ in range(2):
            assert error_of(lambda: opened.read(0, 0, 0, 64, 64))[0] == error
            np.testing.assert_array_equal(opened.read(64, 0, 0, 64, 64), PIXELS[:64, 64:128])
        assert error_of(opened.thumbnail)[0] == error


def test_a_child_that_cannot_start_is_no_fault_of_the_slide(tmp_path, monkeypatch):
    broken = replace(openslide_client.PROGRAM, code="raise OSError('no libopenslide')")
    monkeypatch.setattr(openslide_client, "PROGRAM", broken)
    path = write(tmp_path, "good.tif")
    for asked in (slide.is_slide, slide.open_slide):
        with pytest.raises(RuntimeError, match="the slide reader ended with exit code 1"):
            asked(path)


def test_a_slide_is_closed_however_it_ends(tmp_path, monkeypatch):
    posted = []
    monkeypatch.setattr(child, "post", lambda *given: posted.append(given[1:]))
    path = write(tmp_path, "s.svs")
    with slide.open_slide(path) as opened:
        key = opened.reader._slide["key"]
        assert posted == []
    closing = ({"call": "close", "key": key}, child.ARCHIVE, key)
    assert posted == [closing]
    opened = slide.open_slide(path)
    del opened
    gc.collect()
    assert len(posted) == 2
    assert posted[1][2] != key


def test_a_file_that_was_replaced_is_read_as_it_is_now(tmp_path):
    path, other = write(tmp_path, "s.tif"), pictures.stained(150, 200)[::-1].copy()
    with slide.open_slide(path) as before:
        os.replace(write(tmp_path, "new.tif", other), path)
        require_read(path, other)
        assert before.reader._slide["path"] == str(path)


def test_threads_read_one_slide(tmp_path):
    places = [(x, y) for x in range(0, 150, 10) for y in range(0, 100, 20)]
    with slide.open_slide(write(tmp_path, "s.tif")) as opened, ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda place: opened.read(*place, 0, 50, 50), places)
        for (x, y), pixels in zip(places, found, strict=True):
            np.testing.assert_array_equal(pixels, PIXELS[y : y + 50, x : x + 50])


def test_facts_come_with_the_name_of_the_reader(tmp_path):
    reader = openslide_client.OpenSlideReader(write(tmp_path, "s.tif"))
    assert reader.facts.sizes == ((200, 150),)
    assert reader.facts.downsamples == (1.0,)
    assert reader.facts.properties["openslide.vendor"] == "generic-tiff"
    assert reader.facts.profile is None
    assert reader.facts.reader.startswith("openslide 4.")
    reader.close()
