import numpy as np
import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.imaging import image
from bcd.slides import slide_cache
from bcd.training.pooling import maps
from tests import pictures
from tests.training.pooling.planted import TILE_PX, tiles_of, write_scores


@pytest.fixture
def scores(tmp_path):
    """A slide of 20 tiles in a row, of which three have four, a quarter, and one of the uniform attention."""
    table = tiles_of("a.tif", np.zeros((20, 4)), np.full(20, 0.5))
    return write_scores(tmp_path / "scores", table), table


def attention_of(table):
    relative = np.array([4, 0.25, 1] + [(20 - 5.25) / 17] * 17, np.float32)
    columns = [table[schema.SLIDE], table[schema.IMAGE_ID], pa.array(relative / 20)]
    return pa.Table.from_arrays(columns, schema=schema.TILE_ATTENTION)


def drawn(uri):
    return image.decode(storage.read_bytes(uri)).astype(int)


def inside(pixels, tile):
    """Colour in the middle of a tile."""
    return pixels[TILE_PX // 2, tile * TILE_PX + TILE_PX // 2]


def test_attention_is_drawn_relative_to_uniform(scores, tmp_path):
    """On white where the slide is not there: red above, blue below, white where it is uniform."""
    uri, table = scores
    found = maps.draw_attention(uri, "a.tif", attention_of(table), str(tmp_path / "out"))
    assert found == str(tmp_path / "out/slides/a.tif/attention.png")
    pixels = drawn(found)
    red, blue, white = (inside(pixels, tile) for tile in range(3))
    assert red[0] > red[2] + 80
    assert blue[2] > blue[0] + 80
    assert (white == 255).all()
    assert pixels.shape[1] == 2_000


def test_the_tissue_is_beneath(scores, tmp_path):
    uri, table = scores
    tissue = np.full((TILE_PX, 2_000, 3), 200, np.uint8)
    path = tmp_path / "a.tif"
    path.write_bytes(pictures.tiled_tiff(tissue, 0.5))
    rows = storage.read_table(f"{uri}/slides.parquet")
    place = rows.set_column(1, schema.URI, pa.array([str(path)]))
    storage.write_table(f"{uri}/slides.parquet", place)
    pixels = drawn(maps.draw_attention(uri, "a.tif", attention_of(table), str(tmp_path / "out")))
    slide_cache.open_staged.cache_clear()
    grey = inside(pixels, 2)
    assert grey.max() - grey.min() <= 1
    assert 200 < grey[0] < 240


def test_a_slide_made_of_fields_has_no_map(tmp_path):
    table = tiles_of("a", np.zeros((3, 4)), np.full(3, 0.5), x_level0_px=pa.nulls(3, pa.int64()))
    uri = write_scores(tmp_path, table)
    assert maps.draw_attention(uri, "a", schema.TILE_ATTENTION.empty_table(), uri) is None
