"""Results of each whole slide after its tiles are scored: a row, a heat map, tiles for QuPath."""

import hashlib
import json
import posixpath
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from bcd import schema, storage
from bcd.model import novelty
from bcd.model.card import Card
from bcd.scoring import tiling
from bcd.scoring.ledger import Ledger
from bcd.taxonomy import malignant_mask

TABLE, FOLDER, HEATMAP, GEOJSON = "slides.parquet", "slides", "heatmap.png", "tiles.geojson"
COLUMNS = (
    *(schema.IMAGE_ID, schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX, schema.WIDTH_PX, schema.HEIGHT_PX, schema.MPP),
    *(schema.LOGIT, schema.PROBABILITY_MALIGNANT, schema.PREDICTED_CLASS),
    *(schema.NOVELTY, schema.NOVELTY_CUTOFF, schema.WARNINGS, schema.ERROR),
)


def write_slides(ours: Ledger, plans: Sequence[tiling.Plan], broken: pa.Table, card: Card) -> pa.Table:
    """Write heat maps, GeoJSON and `slides.parquet`; returns its table (`schema.SLIDES`), sorted by slide.

    Args:
        ours: the ledger, merged.
        plans: of the slides scored in this generation; those of earlier ones remain in the table.
        broken: rows of the predictions table of slides that could not be read.
        card: of the model, whose threshold divides the colours of the heat maps.
    """
    task = ray.remote(num_cpus=1, max_retries=-1)(draw_slide)
    rows = ray.get([task.remote(ours, plan, card) for plan in plans])
    uri = storage.join(ours.uri, TABLE)
    tables = [pa.Table.from_pylist(rows, schema=schema.SLIDES), schema.fill(broken, schema.SLIDES)]
    if storage.exists(uri):
        old = schema.fill(storage.read_table(uri), schema.SLIDES)
        new = pa.concat_tables(tables)[schema.SLIDE]
        tables.append(old.filter(pc.invert(pc.is_in(old[schema.SLIDE], new.combine_chunks()))))
    table = pa.concat_tables(tables).sort_by(schema.SLIDE)
    ours.lease.require()
    storage.write_table(uri, table)
    return table


def draw_slide(ours: Ledger, plan: tiling.Plan, card: Card) -> dict[str, Any]:
    """Draw one slide from its rows of the table; returns its row of `schema.SLIDES`."""
    where = (pc.field(schema.SLIDE) == plan.slide) & pc.field(schema.X_LEVEL0_PX).is_valid()
    tiles = storage.dataset(ours.predictions_uri).to_table(list(COLUMNS), where)
    boxes = tile_boxes(tiles, (plan.mpp_x, plan.mpp_y))
    probability = tiles[schema.PROBABILITY_MALIGNANT].to_numpy().astype(float)
    _draw(ours, plan, tiles, boxes, probability, card)
    known = probability[np.isfinite(probability)]
    predicted = tiles[schema.PREDICTED_CLASS].drop_null().to_pylist()
    malignant = sum(malignant_mask(tuple(predicted)))
    quantiles = np.quantile(known, list(schema.QUANTILES.values())) if len(known) else [None] * 5
    return {
        **plan.model_dump(include=set(schema.SLIDES.names)),
        schema.MPP: plan.mpp_x,
        schema.BOUNDS_X_LEVEL0_PX: plan.bounds_x_px,
        schema.BOUNDS_Y_LEVEL0_PX: plan.bounds_y_px,
        schema.ERROR_TILES: plan.tiles - len(known),
        schema.WARNED_TILES: int(warned(tiles).sum()),
        schema.MALIGNANT_TILE_SHARE: malignant / len(known) if len(known) else None,
        **dict(zip(schema.QUANTILES, quantiles, strict=True)),
    }


def tile_boxes(tiles: pa.Table, slide_mpp: tuple[float, float]) -> np.ndarray:
    """float (n, 4): x, y, width and height of the tiles in level-0 pixels."""
    tile_mpp = tiles[schema.MPP].to_numpy().astype(float)
    place = [tiles[name].to_numpy().astype(float) for name in (schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX)]
    # All tiles of a slide have one size, which is null for a tile with an error.
    sizes = [pc.max(tiles[name]).as_py() or 0 for name in (schema.WIDTH_PX, schema.HEIGHT_PX)]
    size = [(size_px * (tile_mpp / mpp)).round() for size_px, mpp in zip(sizes, slide_mpp, strict=True)]
    return np.column_stack([*place, *size])


def warned(tiles: pa.Table) -> np.ndarray:
    """bool (n,): which tiles have a warning."""
    return pc.greater(pc.list_value_length(tiles[schema.WARNINGS]), 0).fill_null(False).to_numpy()


def folder(output: str, slide_id: str) -> str:
    """Folder of the results of a slide."""
    return storage.join(output, slide_folder(slide_id))


def slide_folder(slide_id: str) -> str:
    """`folder` relative to the output: never outside it, and unique per id, which may be any URI."""
    name = posixpath.normpath("/" + slide_id.rpartition("://")[2]).lstrip("/")
    if name != slide_id:
        name += f"-{hashlib.sha256(slide_id.encode()).hexdigest()[:8]}"
    return f"{FOLDER}/{name}"


def _draw(
    ours: Ledger,
    plan: tiling.Plan,
    tiles: pa.Table,
    boxes: np.ndarray,
    probability: np.ndarray,
    card: Card,
) -> None:
    # Not at the top: see `finish`.
    from bcd.metrics import calibration
    from bcd.reports import heatmap

    thumbnail, scale = tiling.read_thumbnail(ours.plans_uri, plan.slide), plan.thumbnail_scale
    unlike = warned(tiles)
    coloured = heatmap.draw_tiles(thumbnail, scale, boxes, probability, card.threshold, unlike)
    drawing = heatmap.heatmap_png(coloured, scale, plan.mpp_x, card.threshold, bool(unlike.any()))
    storage.write_bytes(storage.join(folder(ours.uri, plan.slide), HEATMAP), drawing)
    names = tiles[schema.PREDICTED_CLASS].to_pylist()
    measured = {schema.PROBABILITY_MALIGNANT: probability}
    unknown = [np.nan] * len(card.classes)
    logits = np.array([values or unknown for values in tiles[schema.LOGIT].to_pylist()])
    measured["log_odds"] = calibration.log_odds(logits, card.classes)
    judged = pc.is_valid(tiles[schema.NOVELTY_CUTOFF]).to_numpy()
    for name in (schema.NOVELTY, schema.NOVELTY_CUTOFF):
        measured[name] = tiles[name].to_numpy().astype(float)
    measured[novelty.CODE] = np.where(judged, unlike, np.nan)
    shown = boxes - [plan.bounds_x_px, plan.bounds_y_px, 0, 0]
    content = heatmap.geojson(tiles[schema.IMAGE_ID].to_pylist(), shown, names, measured)
    storage.write_bytes(storage.join(folder(ours.uri, plan.slide), GEOJSON), json.dumps(content).encode())
