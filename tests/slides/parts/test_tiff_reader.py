"""Slides in parts: the same pixels from a disk and from a store, of which little is read."""

import math
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import openslide
import pytest
from PIL import Image

from bcd import storage
from bcd.errors import StorageError
from bcd.imaging import image
from bcd.slides import slide
from bcd.slides.parts import jpeg_tiles, source, tiff_reader
from tests import faults, pictures
from tests.imaging.test_image import SWAPPED
from tests.slides.parts.pyramids import SIDE, aperio, page, tissue, write

# 3 and 12 are not reached exactly, as in nearly every slide of a scanner.
SIZES = [(1_201, 901), (400, 300), (100, 75)]


@pytest.fixture(scope="module")
def svs(tmp_path_factory):
    """A pyramid as of Aperio whose levels are no whole factors apart."""
    return write(tmp_path_factory.mktemp("slides") / "s.svs", *aperio(*SIZES[0], *SIZES[1:]))


@pytest.fixture
def store(s3, monkeypatch):
    """The S3 server, behind a store that counts and can refuse."""
    with faults.store(os.environ["AWS_ENDPOINT_URL"]) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.endpoint)
        yield found


def put(s3, path):
    uri = f"{s3}/{uuid.uuid4().hex}/{path.name}"
    storage.write_bytes(uri, path.read_bytes())
    return uri


def test_facts_and_name_of_the_reader(svs):
    opened = tiff_reader.open_reader(str(svs))
    assert (opened.facts.sizes, opened.facts.reader) == (tuple(SIZES), "tiff_tiles")
    assert opened.facts.downsamples[1] == (1_201 / 400 + 901 / 300) / 2
    opened.close()


def test_a_place_between_two_pixels_is_the_nearest(svs):
    """It is at most half a pixel away; a whole place is itself."""
    with slide.open_slide(svs) as opened:
        downsample = opened.downsamples[1]
        whole = opened.read(0, 0, 1, *SIZES[1])
        places = [0, 1, 2, 100, 101, 102, 103, 607]
        for place, found in ((p, opened.read(p, p, 1, 20, 20)) for p in places):
            nearest = math.floor(place / downsample + 0.5)
            assert abs(nearest - place / downsample) <= 0.5
            np.testing.assert_array_equal(found, whole[nearest : nearest + 20, nearest : nearest + 20])
    with openslide.OpenSlide(svs) as handle:
        theirs = np.asarray(handle.read_region((0, 0), 1, SIZES[1]).convert("RGB"))
    np.testing.assert_array_equal(whole, theirs)


def test_a_store_gives_the_pixels_of_the_disk(svs, s3):
    with slide.open_slide(svs) as here, slide.open_parts(put(s3, svs)) as there:
        for level in range(3):
            for place in ((-30, -7), (0, 0), (333, 512), (1_150, 850)):
                found = [opened.read(*place, level, 150, 90) for opened in (here, there)]
                np.testing.assert_array_equal(*found)
        np.testing.assert_array_equal(here.thumbnail(300)[0], there.thumbnail(300)[0])


def test_only_what_is_needed_is_requested_and_once(svs, s3, store):
    """Six rows of seven tiles: each row is one request, and what is read again none."""
    with slide.open_parts(put(s3, svs)) as opened:
        store.asked.clear(), store.sent_bytes.clear()
        level = opened.reader._levels[1]
        opened.read(0, 0, 1, 400, 300)
        assert len(store.asked) == 1  # all tiles are one part of the file
        assert sum(store.sent_bytes) == level.n_bytes.sum()
        opened.read(500, 500, 1, 100, 100)
        assert len(store.asked) == 1
        opened.read(0, 0, 0, SIDE, 2 * SIDE)
        sizes = opened.reader._levels[0].n_bytes
        assert sorted(store.sent_bytes[1:]) == sorted([sizes[0], sizes[19]])


def test_the_thumbnail_reads_a_small_level(svs, s3, store):
    with slide.open_parts(put(s3, svs)) as opened:
        store.sent_bytes.clear()
        assert opened.thumbnail(120)[0].shape == (90, 120, 3)
        assert sum(store.sent_bytes) <= 1.3 * opened.reader._levels[1].n_bytes.sum()


def test_what_is_requested_ahead_is_not_requested_again(svs, s3, store):
    """Rectangles of two rows of tiles, of which one is in both: two requests."""
    with slide.open_parts(put(s3, svs)) as opened:
        store.asked.clear()
        rectangles = [(x, 0, 0, 2 * SIDE, 2 * SIDE) for x in range(0, 6 * SIDE, SIDE)]
        opened.request(rectangles)
        for rectangle in rectangles:
            opened.read(*rectangle)
        assert len(store.asked) == 2


def test_a_store_with_a_bad_day_costs_time_only(svs, s3, store):
    uri = put(s3, svs)
    number = count(1)
    store.fault = lambda method, path: faults.SLOW_DOWN if next(number) % 4 == 0 else None
    store.delay_s = 0.01
    with slide.open_slide(svs) as here, slide.open_parts(uri) as there:
        for y in range(0, 512, 256):
            found = [opened.read(0, y, 0, 300, 200) for opened in (here, there)]
            np.testing.assert_array_equal(*found)
    assert next(number) > 10


def test_a_store_that_denies_in_the_middle_is_no_fault_of_the_tile(svs, s3, store):
    with slide.open_parts(put(s3, svs)) as opened:
        opened.read(0, 0, 0, 10, 10)
        store.fault = lambda method, path: faults.EXPIRED
        with pytest.raises(StorageError) as caught:
            opened.read(600, 600, 0, 10, 10)
        assert not caught.value.lasting
        opened.read(0, 0, 0, 10, 10)
        store.fault = lambda method, path: None
        assert opened.read(600, 600, 0, 10, 10).shape == (10, 10, 3)


def test_a_slide_that_was_replaced_is_not_mixed(svs, tmp_path, s3, monkeypatch):
    """The other one has its tiles in other places."""
    uri = put(s3, svs)
    monkeypatch.setattr(source, "CHECK_S", 0)
    opened = slide.open_parts(uri)
    opened.read(0, 0, 0, 10, 10)
    storage.write_bytes(uri, write(tmp_path / "o.svs", *aperio(640, 512)).read_bytes())
    with pytest.raises(StorageError, match="it was replaced"):
        opened.read(600, 600, 0, 10, 10)
    assert slide.open_parts(uri).width_px == 640


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_slide_that_is_cut_short_is_left_to_openslide(svs, s3, share, tmp_path):
    """Its tags are missing."""
    content = svs.read_bytes()
    (tmp_path / "s.svs").write_bytes(content[: int(share * len(content))])
    assert slide.open_parts(put(s3, tmp_path / "s.svs")) is None


def test_what_is_no_such_slide_is_found_by_its_first_bytes(s3, store):
    uri = f"{s3}/{uuid.uuid4().hex}.png"
    storage.write_bytes(
        uri, pictures.encode(np.random.default_rng(1).integers(0, 256, (200, 200, 3), np.uint8))
    )
    store.sent_bytes.clear()
    assert slide.open_parts(uri) is None
    assert store.sent_bytes == [source.BLOCK_BYTES]


def test_a_profile_is_applied_to_what_is_stored_and_not_to_the_paper(tmp_path):
    """Red and blue exchanged, as in the tests of `image`."""
    pixels = pictures.stained(100, 90)
    tags, tiles = page(pixels)
    path = write(tmp_path / "s.tif", (tags | {34675: (1, SWAPPED)}, tiles))
    with slide.open_slide(path) as opened:
        found = opened.read(0, 0, 0, 120, 110)
    plain = Image.fromarray(jpeg_tiles_of(write(tmp_path / "p.tif", (tags, tiles)), (120, 110)))
    expected = np.asarray(image.to_srgb(plain, SWAPPED))
    np.testing.assert_array_equal(found[:100, :90], expected[:100, :90])
    assert np.abs(found[:100, :90, ::-1].astype(int) - pixels).mean() < 3
    assert (found[100:] == 255).all()
    assert (found[:, 90:] == 255).all()


def jpeg_tiles_of(path, size):
    with slide.open_slide(path) as opened:
        return opened.read(0, 0, 0, *size)


def test_neighbours_are_decoded_once_and_memory_is_bounded(tmp_path, monkeypatch):
    decoded = []
    once = jpeg_tiles.simplejpeg.decode_jpeg
    monkeypatch.setattr(
        jpeg_tiles.simplejpeg, "decode_jpeg", lambda *given: decoded.append(1) or once(*given)
    )
    monkeypatch.setattr(tiff_reader, "DECODED_BYTES", 6 * SIDE * SIDE * 3)
    path = write(tmp_path / "s.tif", page(pictures.stained(4 * SIDE, 4 * SIDE)))
    with slide.open_slide(path) as opened:
        for x in range(0, 2 * SIDE, 16):
            opened.read(x, 0, 0, SIDE, 2 * SIDE)
        assert len(decoded) == 6
        opened.read(0, 0, 0, 4 * SIDE, 4 * SIDE)
        assert opened.reader._decoded.cache_info().currsize == 6


def test_threads_share_a_slide(svs, s3):
    whole = tissue_of(svs)
    places = [(x, y) for y in range(0, 800, 90) for x in range(0, 1_100, 110)]
    with slide.open_parts(put(s3, svs)) as opened, ThreadPoolExecutor(8) as pool:
        for (x, y), found in zip(
            places, pool.map(lambda p: opened.read(*p, 0, 100, 80), places), strict=True
        ):
            np.testing.assert_array_equal(found, whole[y : y + 80, x : x + 100])


def tissue_of(path):
    with slide.open_slide(path) as opened:
        return opened.read(0, 0, 0, *SIZES[0])


def test_the_made_slide_is_the_tissue_that_was_drawn(svs):
    """The tests above compare with what is read, this one with what was written."""
    assert np.abs(tissue_of(svs).astype(int) - tissue(SIZES[0][1], SIZES[0][0])).mean() < 6
