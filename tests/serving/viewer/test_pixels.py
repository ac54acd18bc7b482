import asyncio
import os
import threading

import numpy as np
import pytest
import simplejpeg

from bcd.imaging.image import ImageError
from bcd.serving.receive import RefusedError
from bcd.serving.viewer import pixels, scored
from bcd.serving.viewer.pixels import BoundedThreads, PixelReader
from tests import viewed


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return scored.open_scored(viewed.make(str(tmp_path_factory.mktemp("pixels"))).uri)


@pytest.fixture
def row(output):
    return output.slide(viewed.SLIDE)


def test_a_tile_is_a_jpeg_of_the_slides_pixels(row):
    content = asyncio.run(PixelReader().tile(row, "1", 10, 1, 1))
    found = simplejpeg.decode_jpeg(content, "RGB").astype(int)
    assert np.abs(found - viewed.slide_pixels()[509:, 509:]).mean() < 3


def test_tiles_are_read_once_for_all_who_look_at_them(row, monkeypatch):
    reads = []
    read = pixels.deepzoom.read_tile
    monkeypatch.setattr(pixels.deepzoom, "read_tile", lambda *given: reads.append(given) or read(*given))

    async def several(found):
        first = await asyncio.gather(*(found.tile(row, "1", 10, 0, 0) for _ in range(5)))
        return {*first, await found.tile(row, "1", 10, 0, 0)}

    found = PixelReader()
    assert len(asyncio.run(several(found))) == 1
    assert len(reads) == 1
    # The cache is bounded: what was used longest ago is read again.
    monkeypatch.setattr(pixels, "CACHE_BYTES", 1)
    asyncio.run(several(PixelReader()))
    assert len(reads) == 3


def test_after_another_job_tiles_are_read_again(row):
    found = PixelReader()

    async def both():
        await found.tile(row, "1", 0, 0, 0)
        await found.tile(row, "2", 0, 0, 0)
        return len(found._encoded)

    assert asyncio.run(both()) == 2


def test_a_slide_that_failed_is_opened_again(row, monkeypatch):
    """It may have been replaced."""
    opened, read = [], pixels.deepzoom.read_tile
    open_at = pixels.slide_cache.open_at
    monkeypatch.setattr(pixels.slide_cache, "open_at", lambda *given: opened.append(given) or open_at(*given))

    def fails_once(slide, *given):
        if len(opened) == 1:
            raise ImageError("unreadable", "damaged")
        return read(slide, *given)

    monkeypatch.setattr(pixels.deepzoom, "read_tile", fails_once)
    assert asyncio.run(PixelReader().tile(row, "1", 10, 0, 0)).startswith(b"\xff\xd8")
    assert len(opened) == 2


def test_a_slide_that_is_gone_is_an_error_each_time(row, tmp_path):
    gone = row | {"uri": str(tmp_path / "gone.tif")}
    found = PixelReader()

    async def twice():
        return await asyncio.gather(
            *(found.tile(gone, "1", 10, n, 0) for n in (0, 1)), return_exceptions=True
        )

    assert [error.code for error in asyncio.run(twice())] == ["unreadable"] * 2
    assert not found._slides


def test_few_slides_stay_open(row, tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "OPEN_SLIDES", 2)
    content = viewed.pyramid(viewed.slide_pixels())
    rows = []
    for n in range(3):
        (tmp_path / f"{n}.tif").write_bytes(content)
        rows.append(row | {"uri": str(tmp_path / f"{n}.tif"), "slide": f"{n}.tif"})
    found = PixelReader()

    async def each():
        for one in (*rows, rows[0]):
            await found.tile(one, "1", 10, 0, 0)
        return [uri.rpartition("/")[2] for uri, _ in found._slides]

    assert asyncio.run(each()) == ["1.tif", "2.tif"]


def test_more_requests_than_fit_are_refused():
    go = threading.Event()

    async def three():
        pool = BoundedThreads("test", 1, most=2)
        waiting = [asyncio.create_task(pool.run(go.wait)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(RefusedError) as caught:
            await pool.run(go.wait)
        go.set()
        assert await asyncio.gather(*waiting) == [True, True]
        assert await pool.run(go.wait)
        return caught.value

    error = asyncio.run(three())
    assert (error.status, error.code, error.headers["Retry-After"]) == (503, "overloaded", "1")


def test_threads_and_what_they_start_may_be_nicer_than_the_process():
    before = os.nice(0)
    pool = BoundedThreads("test", 1, niceness=3)
    assert asyncio.run(pool.run(os.nice, 0)) == min(before + 3, 19)
    assert os.nice(0) == before


def test_where_nobody_looks_nothing_is_kept(row, monkeypatch):
    """A slide that was deleted would take room as long as it is open."""

    async def story():
        found = PixelReader()
        await found.tile(row, "1", 10, 0, 0)
        assert (len(found._slides), len(found._encoded)) == (1, 1)
        monkeypatch.setattr(pixels, "IDLE_S", 0)
        await found.tile(row, "1", 10, 0, 0)
        while found._slides:
            await asyncio.sleep(0)
        return len(found._encoded), found._encoded_bytes

    assert asyncio.run(asyncio.wait_for(story(), 60)) == (0, 0)


def test_a_field_is_a_jpeg_and_not_too_large(output, monkeypatch):
    monkeypatch.setattr(pixels, "FIELD_PX", 50)
    content = asyncio.run(PixelReader().field(output.field("field 1.png")))
    assert simplejpeg.decode_jpeg(content, "RGB").shape == (32, 50, 3)


def test_a_slide_in_a_store(s3, monkeypatch, tmp_path):
    monkeypatch.setattr(pixels.slide_cache, "CACHE", tmp_path / "cache")
    output = scored.open_scored(viewed.make(f"{s3}/pixels").uri)
    content = asyncio.run(PixelReader().tile(output.slide(viewed.SLIDE), "1", 10, 1, 1))
    found = simplejpeg.decode_jpeg(content, "RGB").astype(int)
    assert np.abs(found - viewed.slide_pixels()[509:, 509:]).mean() < 3
