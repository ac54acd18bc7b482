"""Slides in a store from their inputs to pixels, with all that the store is asked for: no Ray."""

import os
import uuid
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from bcd import schema, storage
from bcd.data import archive, read
from bcd.scoring import tiling
from bcd.slides import pixel_size, slide_cache
from tests import faults, slide_files
from tests.slides.parts.pyramids import aperio, tissue, write
from tests.slides.parts.test_packed_tiles import CODINGS, packed

SIDE = 128
# A third, so that the second level has about a tenth of the bytes; 6,401 px are no whole multiple of it.
SIZES = [(6_401, 1_601), (2_133, 533), (533, 133)]
# Of the second level, at 0.75 µm/px.
TILING = tiling.Tiling(tile_mpp=0.7503, tile_width_px=150, tile_height_px=100, mpp=None, min_tissue=0.25)
# Header and tags of six pages: two blocks each at most, in one request or two.
TAG_BYTES, TAG_REQUESTS = 2 * 7 * 2**14, 2 * 7
# Rows of a block of a job.
BLOCK_ROWS = 64


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setattr(slide_cache, "CACHE", tmp_path / "cache")
    yield
    slide_cache.open_staged.cache_clear()


@pytest.fixture(scope="module")
def svs(tmp_path_factory):
    """A slide of 13.6 MB."""
    return write(tmp_path_factory.mktemp("slides") / "s.svs", *aperio(*SIZES[0], *SIZES[1:], side=SIDE))


@pytest.fixture
def store(s3, monkeypatch):
    """The S3 server, behind a store that counts and can refuse."""
    with faults.store(os.environ["AWS_ENDPOINT_URL"]) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.endpoint)
        yield found


def planned(folder, given=TILING):
    inputs = archive.list_inputs(f"{folder}/in").table
    return pa.concat_tables(tiling.expand(inputs, given, f"{folder}/plans", frozenset()))


def pixels_of(rows):
    """Of all rows, in blocks as of a job."""
    blocks = [rows.slice(start, BLOCK_ROWS) for start in range(0, len(rows), BLOCK_ROWS)]
    return [read.pixels(block, 100, 150, [schema.IMAGE_ID]) for block in blocks]


def require_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def level_bytes(path):
    """Bytes of the tiles of each level."""
    opened, _ = slide_cache.open_staged(str(path), pixel_size.UNKNOWN)
    return [int(level.n_bytes.sum()) for level in opened.reader._levels]


def test_little_more_is_read_than_the_tiles_that_are_used(tmp_path, svs, s3, store):
    """Counted at the store: bytes at most 1.3 times those of the tiles, and no more requests than tiles."""
    here, there = tmp_path / "here", f"{s3}/{uuid.uuid4().hex}"
    content = svs.read_bytes()
    for folder in (here, there):
        storage.write_bytes(f"{folder}/in/s.svs", content)
    used = level_bytes(svs)[1]
    assert 0.08 < used / len(content) < 0.12
    expected = pixels_of(planned(here))
    slide_cache.open_staged.cache_clear()
    store.asked.clear(), store.sent_bytes.clear()

    rows = planned(there)
    of_slide = [path for _, path in store.asked if path.endswith("s.svs")]
    # The thumbnail is made of the second level, whole: 17 x 5 tiles.
    assert sum(store.sent_bytes) <= 1.3 * used
    assert len(of_slide) <= 17 * 5 + TAG_REQUESTS

    # Another process begins with nothing.
    slide_cache.open_staged.cache_clear()
    store.asked.clear(), store.sent_bytes.clear()
    found = pixels_of(rows)
    require_equal(found, expected)
    # Of the fifteenth column of tiles less than a quarter is within the slide.
    assert sum(len(block[schema.IMAGE]) for block in found) == len(rows) == 14 * 6
    assert not any(block[schema.ERROR].any() for block in found)
    assert used <= sum(store.sent_bytes) <= 1.3 * used
    assert sum(store.sent_bytes) <= used + TAG_BYTES
    assert len(store.asked) <= 17 * 5 / 3 + TAG_REQUESTS
    assert not slide_cache.CACHE.exists()  # nothing was staged


@pytest.mark.parametrize(
    "name",
    [
        *("uncompressed", "deflate, differences", "LZW, differences", "JPEG 2000, lossless"),
        "deflate of old, planes, differences",
    ],
)
def test_so_it_is_in_every_compression(tmp_path, s3, store, name):
    """Of a level of 17 x 3 tiles, in planes below the first page as of OME-TIFF, below one that is empty."""
    text = b"Aperio\0" if "JPEG" in name else b"plain\0"
    empty = packed(np.zeros((801, 6_401, 3), np.uint8), *CODINGS["deflate"], side=SIDE, t270=text)
    level = packed(tissue(265, 2_133), *CODINGS[name], side=SIDE, t254=[1])
    content = slide_files.tiff([empty, level], nested="planes" in name)
    here, there = tmp_path / "here", f"{s3}/{uuid.uuid4().hex}"
    for folder in (here, there):
        storage.write_bytes(f"{folder}/in/s.tif", content)
    given, used, n_parts = replace(TILING, tile_mpp=1.5006, mpp=0.5), sum(map(len, level[1])), len(level[1])
    expected = pixels_of(planned(here, given))
    slide_cache.open_staged.cache_clear()
    store.asked.clear(), store.sent_bytes.clear()
    rows = planned(there, given)
    assert sum(store.sent_bytes) <= 1.3 * used
    assert len([path for _, path in store.asked if path.endswith("s.tif")]) <= n_parts + TAG_REQUESTS
    slide_cache.open_staged.cache_clear()
    store.asked.clear(), store.sent_bytes.clear()
    found = pixels_of(rows)
    require_equal(found, expected)
    assert sum(len(block[schema.IMAGE]) for block in found) == len(rows) == 14 * 3
    assert not any(block[schema.ERROR].any() for block in found)
    assert used <= sum(store.sent_bytes) <= 1.3 * used
    assert len(store.asked) <= n_parts + TAG_REQUESTS
    assert not slide_cache.CACHE.exists()  # nothing was staged


def test_a_part_of_the_tiles_needs_a_part_of_the_level(svs, s3, store):
    folder = f"{s3}/{uuid.uuid4().hex}"
    storage.write_bytes(f"{folder}/in/s.svs", svs.read_bytes())
    rows = planned(folder)
    few = rows.filter(pc.less(rows[schema.X_LEVEL0_PX], 900))
    slide_cache.open_staged.cache_clear()
    store.sent_bytes.clear()
    pixels_of(few)
    # Tiles of 150 px up to 300 px of the level: three of its seventeen columns.
    assert len(few) == 2 * 6
    used = level_bytes(svs)[1] * 3 / 17
    assert used * 0.95 <= sum(store.sent_bytes) <= 1.05 * used + TAG_BYTES


def test_a_store_with_a_bad_day_gives_the_same_rows(tmp_path, svs, s3, store):
    there = f"{s3}/{uuid.uuid4().hex}"
    storage.write_bytes(f"{there}/in/s.svs", svs.read_bytes())
    storage.write_bytes(f"{tmp_path}/in/s.svs", svs.read_bytes())
    expected = pixels_of(planned(tmp_path))
    slide_cache.open_staged.cache_clear()
    store.fault = faults.bad_day()
    store.delay_s = 0.005
    require_equal(pixels_of(planned(there)), expected)


def test_tiles_of_a_store_that_refuses_are_left_to_a_rerun(svs, s3, store):
    folder = f"{s3}/{uuid.uuid4().hex}"
    storage.write_bytes(f"{folder}/in/s.svs", svs.read_bytes())
    rows = planned(folder).slice(0, 4)
    slide_cache.open_staged.cache_clear()
    store.fault = lambda method, path: faults.EXPIRED if method == "GET" else None
    assert {*pixels_of(rows)[0][schema.ERROR]} == {"unavailable"}
    store.fault = lambda method, path: None
    assert {*pixels_of(rows)[0][schema.ERROR]} == {""}
