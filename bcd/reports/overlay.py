"""Evidence maps over their images: the colour is the class, its strength the evidence for it.

The scale is stated and symmetric, never stretched to the range of an image: an empty map looks empty, and two
images on the same scale can be compared.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageColor

from bcd import schema, storage
from bcd.errors import DataError
from bcd.imaging import decoder, image
from bcd.model import card
from bcd.reports.style import BLUE, VERMILION

# Log-odds per cell at full colour, the same on every page, in the API and in every table: an image with this
# evidence everywhere has a probability of about 98 %.
LIMIT = 4.0
# At full colour the tissue stays visible: 0.2 of its own colour, and half its contrast as light and dark of
# the overlay's colour, which is the same over pale and over vivid stains.
OPACITY, CONTRAST = 0.8, 0.5
# Mixing uses some 50 bytes a pixel. A white image of 64 megapixels is a PNG of 100 kB, so a few of them drawn
# whole would use all memory of a service.
BLOCK_PX = 2**18


def overlay(
    pixels: np.ndarray,
    evidence: np.ndarray,
    limit: float = LIMIT,
    input_height_px: int | None = None,
    input_width_px: int | None = None,
) -> np.ndarray:
    """Draw a signed evidence map over its image, blue benign and vermilion malignant: uint8 (H, W, 3).

    Args:
        pixels: uint8 (H, W, 3) RGB, the decoded image at any size.
        evidence: float (h, w) in log-odds per cell over the network's input, into which `image.fit` placed
            the whole image; what it covers beside the image is cut off.
        limit: log-odds at full colour; 0 is transparent, values beyond the limit saturate.
        input_height_px: of the network's input; by default the map covers the image alone.
        input_width_px: likewise.
    """
    height, width = pixels.shape[:2]
    enlarged = _enlarge(evidence, height, width, input_height_px or height, input_width_px or width)
    drawn = np.empty_like(pixels)
    for rows, columns in _blocks(height, width):
        values = np.asarray(enlarged.crop((columns.start, rows.start, columns.stop, rows.stop)))
        drawn[rows, columns] = _mix(pixels[rows, columns], np.clip(values / limit, -1, 1)[..., None])
    return drawn


def overlay_of_row(
    row: Mapping[str, Any],
    pixels: np.ndarray | None = None,
    limit: float = LIMIT,
    input_height_px: int | None = None,
    input_width_px: int | None = None,
) -> np.ndarray:
    """Draw the evidence of one row of the predictions table over its image: uint8 (H, W, 3).

    Args:
        row: of the table, as from `to_pylist` or pandas.
        pixels: uint8 (H, W, 3) RGB; by default read from the row's URI. Tiles of slides require them.
        limit: log-odds per cell at full colour; state it beside the image.
        input_height_px: of the network's input, from the model's card; by default 32 per cell, which fits a
            map of the last layer where the input is a multiple of 32.
        input_width_px: likewise.

    Raises:
        DataError: the row is an error, or a tile without `pixels`, or the image has changed size.
        ImageError: the image cannot be decoded.
        StorageError: the image cannot be read.
    """
    if not pd.isna(row[schema.ERROR]):
        raise DataError(f"{row[schema.IMAGE_ID]}: was not scored ({row[schema.ERROR]}), so has no evidence")
    height, width = int(row[schema.EVIDENCE_HEIGHT]), int(row[schema.EVIDENCE_WIDTH])
    return overlay(
        _read(row) if pixels is None else pixels,
        np.reshape(row[schema.EVIDENCE], (height, width)),
        limit,
        input_height_px or height * card.STRIDE_PX,
        input_width_px or width * card.STRIDE_PX,
    )


def _read(row: Mapping[str, Any]) -> np.ndarray:
    if not pd.isna(row[schema.X_LEVEL0_PX]):
        raise DataError(f"{row[schema.IMAGE_ID]}: is a tile of a slide; give its pixels")
    pixels = decoder.decode_safely(storage.read_bytes(row[schema.URI]))
    if pixels.shape[:2] != (row[schema.HEIGHT_PX], row[schema.WIDTH_PX]):
        raise DataError(
            f"{row[schema.IMAGE_ID]}: is {pixels.shape[1]} x {pixels.shape[0]} px, but "
            f"{row[schema.WIDTH_PX]} x {row[schema.HEIGHT_PX]} px were scored"
        )
    return pixels


def _blocks(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of blocks of at most `BLOCK_PX` that cover an image."""
    step = max(1, BLOCK_PX // width)
    for top in range(0, height, step):
        for left in range(0, width, BLOCK_PX):
            yield slice(top, min(top + step, height)), slice(left, min(left + BLOCK_PX, width))


def _mix(pixels: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Colour a block (h, w, 3) by strengths (h, w, 1) in [-1, 1]."""
    blue, vermilion = (np.array(ImageColor.getrgb(name), np.float32) for name in (BLUE, VERMILION))
    light = 1 - CONTRAST * (1 - np.asarray(Image.fromarray(pixels).convert("L"), np.float32)[..., None] / 255)
    colour = light * np.where(strength < 0, blue, vermilion)
    alpha = OPACITY * np.abs(strength)
    return (pixels * (1 - alpha) + colour * alpha).round().astype(np.uint8)


def _enlarge(evidence: np.ndarray, height: int, width: int, into_height: int, into_width: int) -> Image.Image:
    """The part of the map over the image, enlarged bilinearly to the image's size, float32."""
    top, left, inner_height, inner_width = image.placement(height, width, into_height, into_width)
    field = Image.fromarray(np.asarray(evidence, np.float32))
    x, y = field.width / into_width, field.height / into_height
    right, bottom = min(field.width, (left + inner_width) * x), min(field.height, (top + inner_height) * y)
    box = (left * x, top * y, right, bottom)
    return field.resize((width, height), Image.Resampling.BILINEAR, box=box)


def covers(height: int, width: int, into_height: int, into_width: int) -> dict[str, float]:
    """The part of a map over the network's input that covers an image of a size, as fractions: top, left,
    bottom, right."""
    top, left, inner_height, inner_width = image.placement(height, width, into_height, into_width)
    return {
        "top": top / into_height,
        "left": left / into_width,
        "bottom": (top + inner_height) / into_height,
        "right": (left + inner_width) / into_width,
    }


def scale(maps: Iterable[np.ndarray]) -> float:
    """A common limit for maps whose method has no unit: the 99th percentile of the absolute values, or 1."""
    values = np.abs(np.concatenate([np.zeros(0), *(np.ravel(one) for one in maps)]))
    return float(np.percentile(values, 99)) or 1.0 if values.size else 1.0


def limit_of(evidence: np.ndarray, bias: float | None) -> float:
    """The value of one map at full colour: `LIMIT`, or of a map that has no unit, and so no bias, its own."""
    return LIMIT if bias is not None and np.isfinite(bias) else scale([evidence])


def legend(width_px: int = 256, height_px: int = 12) -> np.ndarray:
    """Colours from -limit on the left to +limit on the right over white, uint8 (height, width, 3)."""
    ramp = np.linspace(-1, 1, width_px)[None].repeat(height_px, 0)
    return overlay(np.full((height_px, width_px, 3), 255, np.uint8), ramp, limit=1)
