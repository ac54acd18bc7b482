"""A scored output by hand, as small as the viewer needs it: a slide with a pyramid, a broken one, fields.

Probabilities are those of no network: float32 with all their digits.
"""

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from bcd import schema, storage
from bcd.imaging import image
from bcd.metrics import calibration
from bcd.scoring import ledger
from bcd.slides import tile
from bcd.taxonomy import TUMOR_CLASSES
from tests import pictures

SLIDE, BROKEN = "case 7/a+b #1.tif", "broken.svs"
WIDTH_PX, HEIGHT_PX, MPP, TILE_MPP = 900, 700, 0.25, 0.5
# Of the network's input; half as many pixels as at level 0 of the slide.
TILE_WIDTH_PX, TILE_HEIGHT_PX = 50, 40
THRESHOLD, CUTOFF = 0.4, 2.5
FIELDS = 7
MAP = 2, 3


@dataclass(frozen=True)
class Made:
    """An output, the pixels of its slide at level 0, and its rows by id."""

    uri: str
    pixels: np.ndarray
    rows: dict[str, dict[str, Any]]

    def tiles(self) -> list[dict[str, Any]]:
        return [row for row in self.rows.values() if row[schema.X_LEVEL0_PX] is not None]


def slide_pixels(width: int = WIDTH_PX, height: int = HEIGHT_PX) -> np.ndarray:
    """uint8 (h, w, 3): a stain with fine structure, in which no two places are alike."""
    y, x = np.mgrid[0:height, 0:width]
    base = pictures.stained(height, width).astype(np.int16)
    return np.clip(base + (12 * np.sin(x / 7) + 12 * np.cos(y / 5))[..., None], 0, 255).astype(np.uint8)


def pyramid(pixels: np.ndarray, levels: int = 3) -> bytes:
    """A tiled TIFF, each level of half the size of the one before."""
    pages = []
    for level in range(levels):
        size = pixels.shape[1] >> level, pixels.shape[0] >> level
        smaller = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
        more = {"t254": [1]} if level else {}
        pages.append(pictures.tiled_page(smaller, MPP * 2**level, **more))
    return pictures.tiff(*pages)


def make(folder: str, hidden: bool = False, output: str | None = None) -> Made:
    """Write an output and its inputs below a folder, on disk or in a store; `hidden` as `--pseudonymise`.

    With `output`, write that one, as of a slide that was sent: the broken one is not in it.
    """
    pixels = slide_pixels()
    slide_uri = storage.join(folder, f"in/{SLIDE}")
    storage.write_bytes(slide_uri, pyramid(pixels))
    rows = [*_tile_rows(slide_uri), *_field_rows(folder)]
    if not output:
        rows.append(_row(BROKEN, storage.join(folder, f"in/{BROKEN}"), slide=BROKEN, error="unreadable"))
    if hidden:
        rows = [row | {schema.URI: row[schema.SLIDE] or row[schema.IMAGE_ID]} for row in rows]
    slides = [SLIDE] if output else [SLIDE, BROKEN]
    output = output or storage.join(folder, "out")
    table = pa.Table.from_pylist(rows, schema=schema.predictions(*MAP)).sort_by(schema.IMAGE_ID)
    storage.write_table(storage.join(output, "predictions/part-0.parquet"), table, row_group_size=64)
    _write_slides(output, slide_uri, rows, hidden, slides)
    heat_map = image.encode_png(pictures.gradient(70, 90))
    storage.write_bytes(storage.join(output, ledger.slide_folder(SLIDE), ledger.HEATMAP), heat_map)
    facts = {
        "title": "Scored archive",
        "threshold": THRESHOLD,
        "target": "tumor_class",
        "model_id": "0123abcd",
    }
    facts |= {"synthetic": False, "leaky": False, "n_images": FIELDS, "n_slides": len(slides)}
    facts |= {"errors": {"unreadable": 1, "truncated": 1}} | ({"pseudonyms": "x0"} if hidden else {})
    storage.write_bytes(storage.join(output, ledger.SUMMARY), json.dumps(facts).encode())
    return Made(output, pixels, {row[schema.IMAGE_ID]: row for row in table.to_pylist()})


def _row(name: str, uri: str, slide: str | None = None, **facts: Any) -> dict[str, Any]:
    message = "x: damaged" if facts.get("error") else None
    own = {schema.IMAGE_ID: name, schema.URI: uri, schema.SLIDE: slide, schema.MODEL_ID: "m"}
    return own | {schema.BCD_VERSION: "1", schema.ERROR_MESSAGE: message} | facts


def _scores(rng: np.random.Generator) -> dict[str, Any]:
    evidence = rng.normal(0, 2, MAP[0] * MAP[1]).astype(np.float32)
    logit = [float(np.float32(x)) for x in (0.25, 0.25 + evidence.mean())]
    probability = float(np.float32(calibration.probability_malignant(np.array([logit]), TUMOR_CLASSES)[0]))
    novelty = float(np.float32(rng.gamma(4, 0.4)))
    return {
        schema.LOGIT: logit,
        schema.PROBABILITY_MALIGNANT: probability,
        schema.PREDICTED_CLASS: TUMOR_CLASSES[probability >= THRESHOLD],
        schema.NOVELTY: novelty,
        schema.NOVELTY_CUTOFF: CUTOFF,
        schema.WARNINGS: ["unlike_training_data"] if novelty > CUTOFF else [],
        schema.EVIDENCE: evidence.tolist(),
        schema.EVIDENCE_HEIGHT: MAP[0],
        schema.EVIDENCE_WIDTH: MAP[1],
        schema.EVIDENCE_BIAS: 0.0,
    }


def _tile_rows(uri: str) -> list[dict[str, Any]]:
    grid = tile.grid(WIDTH_PX, HEIGHT_PX, (MPP, MPP), TILE_MPP, TILE_WIDTH_PX, TILE_HEIGHT_PX)
    rng, rows = np.random.default_rng(5), []
    size = {schema.WIDTH_PX: TILE_WIDTH_PX, schema.HEIGHT_PX: TILE_HEIGHT_PX, schema.MPP: TILE_MPP}
    for n, (x, y) in enumerate(zip(grid.x_level0_px.tolist(), grid.y_level0_px.tolist(), strict=True)):
        if n % 9 == 4:
            continue  # glass
        place = {schema.X_LEVEL0_PX: x, schema.Y_LEVEL0_PX: y} | size
        scores = {schema.ERROR: "truncated"} if n == 20 else _scores(rng)
        name = tile.tile_id(SLIDE, x, y, TILE_MPP)
        rows.append(_row(name, uri, SLIDE, patient="p7", **place, **scores))
    return rows


def _field_rows(folder: str) -> list[dict[str, Any]]:
    rng, rows = np.random.default_rng(6), []
    for n in range(FIELDS):
        uri = storage.join(folder, f"in/field {n}.png")
        buffer = io.BytesIO()
        Image.fromarray(pictures.gradient(64, 100 + n)).save(buffer, "PNG")
        storage.write_bytes(uri, buffer.getvalue() if n != 3 else buffer.getvalue()[:99])
        size = {schema.WIDTH_PX: 100 + n, schema.HEIGHT_PX: 64}
        scores = {schema.ERROR: "truncated"} if n == 3 else _scores(rng) | size
        # A field may belong to a slide without being one.
        rows.append(_row(f"field {n}.png", uri, "S1", patient=f"p{n % 3}", **scores))
    return rows


def _write_slides(output: str, uri: str, rows: list[dict[str, Any]], hidden: bool, slides: list[str]) -> None:
    tiles = [row for row in rows if row.get(schema.X_LEVEL0_PX) is not None]
    known = [row[schema.PROBABILITY_MALIGNANT] for row in tiles if not row.get(schema.ERROR)]
    scored = {
        schema.SLIDE: SLIDE,
        schema.URI: SLIDE if hidden else uri,
        schema.PATIENT: "p7",
        schema.WIDTH_PX: WIDTH_PX,
        schema.HEIGHT_PX: HEIGHT_PX,
        schema.MPP: MPP,
        schema.MPP_Y: MPP,
        schema.TILES: len(tiles),
        schema.ERROR_TILES: len(tiles) - len(known),
        schema.WARNED_TILES: sum(bool(row.get(schema.WARNINGS)) for row in tiles),
        schema.TISSUE_AREA_MM2: 0.03,
        schema.MALIGNANT_TILE_SHARE: float(np.mean(np.array(known) >= THRESHOLD)),
        **dict(
            zip(schema.QUANTILES, np.quantile(known, list(schema.QUANTILES.values())).tolist(), strict=True)
        ),
    }
    broken = {
        schema.SLIDE: BROKEN,
        schema.URI: BROKEN,
        schema.ERROR: "unreadable",
        schema.ERROR_MESSAGE: "damaged",
    }
    found = [row for row in (broken, scored) if row[schema.SLIDE] in slides]
    table = pa.Table.from_pylist(found, schema=schema.SLIDES)
    storage.write_table(storage.join(output, ledger.SLIDES), table)
