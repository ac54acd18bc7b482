"""The attention of a slide's tiles over the slide, in the form of the other heat maps."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema, storage
from bcd.errors import ImageError, StorageError
from bcd.reports import heatmap
from bcd.scoring.ledger import PREDICTIONS, SLIDES, slide_folder
from bcd.slides import pixel_size, slide_cache

MAP = "attention.png"
SIDE_PX = 2_048
# Attention relative to uniform, r, is drawn at r / (1 + r): 4 times is as far from the middle as a quarter.
UNIFORM = 0.5
LEGEND = heatmap.Legend(
    "attention relative to uniform", ((0.0, "0"), (0.2, "1/4"), (0.8, "4"), (1.0, "∞")), "1"
)


def draw_attention(scores: str, slide: str, attention: pa.Table, output: str) -> str | None:
    """Draw the attention (`schema.TILE_ATTENTION`) of one slide, and return the URI of the PNG; None for a
    slide made of fields, whose places are not known.

    The tissue beneath is read from the slide; where it cannot be opened, tiles are drawn on white.
    """
    places = [schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX, schema.WIDTH_PX, schema.HEIGHT_PX, schema.MPP]
    where = (pc.field(schema.SLIDE) == slide) & pc.field(schema.ERROR).is_null()
    where &= pc.field(schema.X_LEVEL0_PX).is_valid()
    tiles = storage.dataset(storage.join(scores, PREDICTIONS)).to_table(
        [schema.IMAGE_ID, *places], filter=where
    )
    described = storage.read_table(storage.join(scores, SLIDES))
    rows = described.filter(pc.equal(described[schema.SLIDE], slide)).to_pylist()
    if not len(tiles) or not rows:
        return None
    own = attention.filter(pc.equal(attention[schema.SLIDE], slide))
    shares = dict(zip(own[schema.IMAGE_ID].to_pylist(), own[schema.ATTENTION].to_pylist(), strict=True))
    relative = np.array([shares[name] for name in tiles[schema.IMAGE_ID].to_pylist()]) * len(tiles)
    row, place = rows[0], relative / (1 + relative)
    mpp = row[schema.MPP], row[schema.MPP_Y]
    thumbnail, scale = _thumbnail(row[schema.URI], (row[schema.WIDTH_PX], row[schema.HEIGHT_PX]), mpp)
    coloured = heatmap.draw_tiles(thumbnail, scale, _boxes(tiles, mpp), place, UNIFORM)
    uri = storage.join(output, slide_folder(slide), MAP)
    storage.write_bytes(uri, heatmap.heatmap_png(coloured, scale, mpp[0], UNIFORM, legend=LEGEND))
    return uri


def _boxes(tiles: pa.Table, slide_mpp: tuple[float, float]) -> np.ndarray:
    """float (n, 4): x, y, width and height of tiles with a result in level-0 pixels."""
    columns = (schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX, schema.WIDTH_PX, schema.HEIGHT_PX, schema.MPP)
    x, y, width, height, mpp = (tiles[name].to_numpy().astype(float) for name in columns)
    sizes = ((side * (mpp / level0)).round() for side, level0 in zip((width, height), slide_mpp, strict=True))
    return np.column_stack([x, y, *sizes])


def _thumbnail(uri: str, size: tuple[int, int], mpp: tuple[float, float]) -> tuple[np.ndarray, float]:
    """The slide in small, uint8 (h, w, 3), and its scale; white where the slide cannot be opened."""
    try:
        opened, _ = slide_cache.open_staged(uri, pixel_size.Given(override=mpp))
        return opened.thumbnail(SIDE_PX)
    except (ImageError, StorageError):
        scale = min(1.0, SIDE_PX / max(size))
        width, height = (max(1, round(side * scale)) for side in size)
        return np.full((height, width, 3), 255, np.uint8), scale
