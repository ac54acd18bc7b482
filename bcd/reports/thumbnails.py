"""Example images for the pages: pixels and evidence maps of a few rows of a predictions table."""

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from PIL import Image

from bcd import schema, storage
from bcd.data import read
from bcd.imaging import image
from bcd.metrics import aggregate, calibration
from bcd.reports import overlay

MAX_WIDTH_PX = 420
JPEG_QUALITY = 82
# Why an image is not shown.
GONE = "The image can no longer be read."
CHANGED = "The file has changed since it was scored: its new image does not belong to this result."


@dataclass(frozen=True)
class Example:
    """One image: pixels uint8 (H, W, 3), evidence float (h, w) over the network's input.

    Where the image cannot be shown, `missing` is the reason: the pixels are grey, and no map is drawn.
    `warnings` are codes, and `link` is a link to the file.
    """

    image_id: str
    probability_malignant: float
    predicted_class: str
    log_odds: float
    pixels: np.ndarray
    evidence: np.ndarray
    missing: str | None = None
    novelty: float | None = None
    novelty_cutoff: float | None = None
    warnings: Sequence[str] = ()
    link: str | None = None


def draw_example(
    example: Example, limit: float, input_size_px: tuple[int, int] | None, max_width_px: int = MAX_WIDTH_PX
) -> dict[str, Any]:
    """The example with image and overlay as data URIs, at most `max_width_px` wide.

    `limit` is in log-odds per cell at full colour; the evidence covers the network's input of `input_size_px`
    (height and width), by default the image alone.
    """
    pixels = image.shrink(example.pixels, 2 * max_width_px, max_width_px)
    drawn = overlay.overlay(pixels, example.evidence, limit, *(input_size_px or (None, None)))
    return {"example": example, "picture": data_uri(pixels), "overlay": data_uri(drawn), "limit": limit}


def data_uri(pixels: np.ndarray, kind: str = "JPEG") -> str:
    """An image, uint8 (H, W, 3), to embed in a page."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=JPEG_QUALITY)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def of_images(images: pd.DataFrame, class_names: Sequence[str]) -> list[Example]:
    """The examples of images, each with `image_id` and in `source` the URI of its predictions table."""
    found: dict[tuple[str, str], Example] = {}
    for source, rows in images.groupby(aggregate.SOURCE):
        wanted = pc.field(schema.IMAGE_ID).isin(rows[schema.IMAGE_ID].tolist())
        for row in storage.dataset(str(source)).to_table(filter=wanted).to_pylist():
            found[str(source), row[schema.IMAGE_ID]] = example_of_row(row, class_names)
    return [found[key] for key in zip(images[aggregate.SOURCE], images[schema.IMAGE_ID], strict=True)]


def example_of_row(
    row: dict[str, Any], class_names: Sequence[str], slide_mpp: tuple[float, float] | None = None
) -> Example:
    """The example of one row of the predictions table without an error.

    `slide_mpp` is the horizontal and vertical µm per level-0 pixel with which its slide was tiled.
    """
    pixels, missing = _pixels(row, slide_mpp)
    maps = np.reshape(row[schema.EVIDENCE], (row[schema.EVIDENCE_HEIGHT], row[schema.EVIDENCE_WIDTH]))
    return Example(
        image_id=row[schema.IMAGE_ID],
        probability_malignant=row[schema.PROBABILITY_MALIGNANT],
        predicted_class=row[schema.PREDICTED_CLASS],
        log_odds=float(calibration.log_odds(np.array([row[schema.LOGIT]]), class_names)[0]),
        pixels=pixels,
        evidence=np.zeros_like(maps) if missing else maps,
        missing=missing,
        novelty=row[schema.NOVELTY],
        novelty_cutoff=row[schema.NOVELTY_CUTOFF],
        warnings=tuple(row[schema.WARNINGS] or ()),
    )


def _pixels(row: dict[str, Any], slide_mpp: tuple[float, float] | None) -> tuple[np.ndarray, str | None]:
    """The image of a row; grey pixels and the reason where it is missing or has changed."""
    scale = dict(zip((schema.SLIDE_MPP_X, schema.SLIDE_MPP_Y), slide_mpp or (), strict=False))
    try:
        content = next(read.contents([row[schema.URI]])) if row[schema.X_LEVEL0_PX] is None else None
        if not isinstance(content, bytes) or hashlib.sha256(content).hexdigest() == row[schema.SHA256]:
            return read.picture(row | scale, content=content), None
        missing = CHANGED
    except image.ImageError:
        missing = GONE
    return np.full((row[schema.HEIGHT_PX], row[schema.WIDTH_PX], 3), 128, np.uint8), missing
