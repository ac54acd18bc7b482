"""Results of each whole slide after its tiles are scored: a row, a heat map, tiles for QuPath."""

import gzip
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from bcd import schema, storage
from bcd.metrics import aggregate, top_tiles
from bcd.model import novelty
from bcd.model.card import Card
from bcd.scoring import tiling
from bcd.scoring.ledger import GEOJSON, HEATMAP, SLIDES, Ledger, slide_folder
from bcd.slides import regions
from bcd.taxonomy import malignant_mask

OUTLINES, TISSUE = "tissue.jpg", "tissue.geojson"
# The name of the tiles in outputs of older versions.
OLD_GEOJSON = "tiles.geojson"
# Of gzip, of which higher levels cost more time than they save space.
LEVEL = 6
# How rows are read: few at a time, none in advance, and without threads and the default pool, which keep what
# they once used.
FRUGAL = {"batch_size": 1_024, "batch_readahead": 0, "use_threads": False}
FRUGAL["memory_pool"] = pa.system_memory_pool()
SIZED = (schema.WIDTH_PX, schema.HEIGHT_PX, schema.MPP)
# Measurements in the GeoJSON, of tables that have them, and the other columns that it is made of.
NUMBERS = (schema.PROBABILITY_MALIGNANT, schema.NOVELTY, schema.NOVELTY_CUTOFF, schema.TISSUE_SHARE)
COLUMNS = (
    *(schema.IMAGE_ID, schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX),
    *(schema.LOGIT, schema.PREDICTED_CLASS, schema.WARNINGS, *NUMBERS),
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
    uri = storage.join(ours.uri, SLIDES)
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
    tiles = _tiles(ours, plan)
    _draw(ours, plan, tiles, card)
    _draw_tissue(ours, plan)
    _write_geojson(ours, plan, tiles.size, card)
    known = np.isfinite(tiles.probability)
    probability = tiles.probability[known].astype(float)
    square = top_tiles.squares(_boxes(tiles.place[known], tiles.size), (plan.mpp_x, plan.mpp_y))
    quantiles = np.quantile(probability, list(schema.QUANTILES.values())) if known.any() else [None] * 5
    return {
        **plan.model_dump(include=set(schema.SLIDES.names)),
        schema.MPP: plan.mpp_x,
        schema.BOUNDS_X_LEVEL0_PX: plan.bounds_x_px,
        schema.BOUNDS_Y_LEVEL0_PX: plan.bounds_y_px,
        schema.ERROR_TILES: plan.tiles - len(probability),
        schema.WARNED_TILES: int(tiles.unlike.sum()) if card.feature_statistics else None,
        schema.MALIGNANT_TILE_SHARE: tiles.n_malignant / len(probability) if known.any() else None,
        **dict(zip(schema.QUANTILES, quantiles, strict=True)),
        **top_tiles.top_answers(probability, square),
    }


@dataclass(frozen=True)
class _Tiles:
    """What is known at once of all tiles of a slide, which may be a million: few numbers of each.

    `place` is int32 (n, 2), the upper left, `size` width and height of all, both in level-0 pixels;
    `probability`, float32 (n,), is NaN for a tile with an error; `unlike`, bool (n,), means a warning.
    """

    place: np.ndarray
    size: tuple[int, int]
    probability: np.ndarray
    unlike: np.ndarray
    n_malignant: int


def _tiles(ours: Ledger, plan: tiling.Plan) -> _Tiles:
    columns = [schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX, *SIZED, schema.PREDICTED_CLASS, schema.WARNINGS]
    # They grow in place: arrays of parts would be there twice while they are joined.
    place, probability, unlike = bytearray(), bytearray(), bytearray()
    largest, named = [0.0, 0.0, 0.0], Counter[str]()
    for rows in _rows(ours, plan, [*columns, schema.PROBABILITY_MALIGNANT]):
        place += _place(rows).tobytes()
        probability += rows[schema.PROBABILITY_MALIGNANT].to_numpy().tobytes()
        unlike += warned(rows).tobytes()
        # All tiles have one size, which is null for a tile with an error.
        found = [pc.max(rows[name]).as_py() or 0.0 for name in SIZED]
        largest = list(map(max, largest, found))
        named.update(rows[schema.PREDICTED_CLASS].drop_null().to_pylist())
    width_px, height_px, mpp = largest
    return _Tiles(
        np.frombuffer(place, np.int32).reshape(-1, 2),
        (round(width_px * (mpp / plan.mpp_x)), round(height_px * (mpp / plan.mpp_y))),
        np.frombuffer(probability, np.float32),
        np.frombuffer(unlike, bool),
        sum(named[name] for name in named if malignant_mask((name,))[0]),
    )


def _rows(ours: Ledger, plan: tiling.Plan, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of the rows of a slide's tiles, as far as the table has them, in its order; some at a time."""
    where = (pc.field(schema.SLIDE) == plan.slide) & pc.field(schema.X_LEVEL0_PX).is_valid()
    for file in storage.dataset(ours.predictions_uri).get_fragments():
        there = [name for name in columns if name in file.physical_schema.names]
        for group in file.split_by_row_group(where):
            for batch in group.to_batches(columns=there, filter=where, **FRUGAL):
                yield pa.Table.from_batches([batch])


def _place(tiles: pa.Table) -> np.ndarray:
    """int32 (n, 2): x and y of the tiles in level-0 pixels."""
    columns = [tiles[name].to_numpy() for name in (schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX)]
    return np.column_stack(columns).astype(np.int32)


def _boxes(place: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """int32 (n, 4): x, y, width and height of tiles of one size."""
    return np.column_stack([place, np.broadcast_to(np.array(size, np.int32), place.shape)])


def warned(tiles: pa.Table) -> np.ndarray:
    """bool (n,): which tiles have a warning."""
    return pc.greater(pc.list_value_length(tiles[schema.WARNINGS]), 0).fill_null(False).to_numpy()


def folder(output: str, slide_id: str) -> str:
    """Folder of the results of a slide."""
    return storage.join(output, slide_folder(slide_id))


def _draw_tissue(ours: Ledger, plan: tiling.Plan) -> None:
    from bcd.reports import heatmap

    thumbnail = tiling.read_thumbnail(ours.plans_uri, plan.slide)
    tissue, inside = tiling.read_masks(ours.plans_uri, plan.slide)
    bounds = plan.bounds_x_px, plan.bounds_y_px
    outline = regions.tissue_geojson(plan.slide, tissue, plan.thumbnail_scale, bounds)
    place = folder(ours.uri, plan.slide)
    storage.write_bytes(storage.join(place, TISSUE), outline)
    storage.write_bytes(storage.join(place, OUTLINES), heatmap.outlined_jpeg(thumbnail, tissue, inside))


def _draw(ours: Ledger, plan: tiling.Plan, tiles: _Tiles, card: Card) -> None:
    # Not at the top: see `finish`.
    from bcd.reports import heatmap

    thumbnail, scale = tiling.read_thumbnail(ours.plans_uri, plan.slide), plan.thumbnail_scale
    boxes, probability = _boxes(tiles.place, tiles.size), tiles.probability.astype(float)
    coloured = heatmap.draw_tiles(thumbnail, scale, boxes, probability, card.threshold, tiles.unlike)
    drawing = heatmap.heatmap_png(coloured, scale, plan.mpp_x, card.threshold, bool(tiles.unlike.any()))
    storage.write_bytes(storage.join(folder(ours.uri, plan.slide), HEATMAP), drawing)


def _write_geojson(ours: Ledger, plan: tiling.Plan, size: tuple[int, int], card: Card) -> None:
    """Write the tiles for QuPath, from a temporary file: a store is given the whole, or nothing."""
    from bcd.reports import heatmap

    uri = storage.join(folder(ours.uri, plan.slide), GEOJSON)
    try:
        with tempfile.TemporaryFile() as file:
            _pack(heatmap.geojson(_features(ours, plan, size, card)), file)
            storage.write_bytes(uri, file)
        if storage.exists(old := storage.join(folder(ours.uri, plan.slide), OLD_GEOJSON)):
            storage.delete_file(old)
    except (OSError, pa.ArrowInvalid) as error:
        raise storage.failure(uri, "write it", error) from error


def _pack(pieces: Iterable[bytes], file: BinaryIO) -> None:
    """Compress pieces into an open file, to be read from its start: without a name and the time, so that
    equal tiles give equal bytes."""
    with gzip.GzipFile("", "wb", LEVEL, file, mtime=0) as packed:
        for piece in pieces:
            packed.write(piece)
    file.seek(0)


def _features(ours: Ledger, plan: tiling.Plan, size: tuple[int, int], card: Card) -> Iterator[Sequence[str]]:
    """The tiles of a slide as features of GeoJSON, block by block."""
    from bcd.metrics import calibration
    from bcd.reports import heatmap

    origin = np.array([plan.bounds_x_px, plan.bounds_y_px])
    for tiles in _rows(ours, plan, COLUMNS):
        measured = {
            name: tiles[name].to_numpy().astype(float) for name in NUMBERS if name in tiles.column_names
        }
        judged = np.isfinite(measured[schema.NOVELTY_CUTOFF])
        measured[novelty.CODE] = np.where(judged, warned(tiles), np.nan)
        logits = _logits(tiles, len(card.classes))
        measured[aggregate.LOG_ODDS] = calibration.log_odds(logits, card.classes)
        ids, predicted = (tiles[name].to_pylist() for name in (schema.IMAGE_ID, schema.PREDICTED_CLASS))
        yield heatmap.tile_features(ids, _boxes(_place(tiles) - origin, size), predicted, measured)


def _logits(tiles: pa.Table, n_classes: int) -> np.ndarray:
    """float (n, classes), NaN for a tile with an error."""
    given = tiles[schema.LOGIT].combine_chunks()
    logits = np.full((len(tiles), n_classes), np.nan)
    logits[given.is_valid().to_numpy(False)] = given.flatten().to_numpy().reshape(-1, n_classes)
    return logits
