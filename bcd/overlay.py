"""Evidence laid over the picture: colour says which class a place speaks for, strength how much.

The scale is stated and symmetric, never stretched to the picture's own range: an empty map looks empty, and
two pictures on the same scale can be compared.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image, ImageColor

from bcd import image
from bcd.palette import BLUE, VERMILION

# Log-odds per cell at full colour, the same on every page, in the API and in every table: a picture of such
# cells alone would be called with about 98 % certainty.
LIMIT = 4.0
# At full colour the tissue shows through: as 0.2 of itself, and as light and dark of half its contrast in the
# colour, which stays the same over pale and over vivid stains.
OPACITY, CONTRAST = 0.8, 0.5
# Mixing takes some 50 bytes a pixel. A white picture of 64 megapixels is a PNG of 100 kB, so that a few of
# them drawn whole would take all memory of a service.
BLOCK_PX = 2**18


def overlay(
    pixels: np.ndarray,
    evidence: np.ndarray,
    limit: float = LIMIT,
    input_height_px: int | None = None,
    input_width_px: int | None = None,
) -> np.ndarray:
    """Lay a signed evidence map over its picture: blue speaks for benign, vermilion for malignant.

    Args:
        pixels: uint8 (H, W, 3) RGB, the picture as decoded, at any size.
        evidence: float (h, w) in log-odds per cell; covers the network's input, in which `image.fit` put the
            picture whole. What lies beside the picture is cut off.
        limit: log-odds at which the colour is full; 0 is transparent, values beyond saturate.
        input_height_px: of the network's input; by default the map is taken to cover the picture alone.
        input_width_px: likewise.

    Returns:
        uint8 (H, W, 3).
    """
    height, width = pixels.shape[:2]
    enlarged = _enlarge(evidence, height, width, input_height_px or height, input_width_px or width)
    drawn = np.empty_like(pixels)
    for rows, columns in _blocks(height, width):
        values = np.asarray(enlarged.crop((columns.start, rows.start, columns.stop, rows.stop)))
        drawn[rows, columns] = _mix(pixels[rows, columns], np.clip(values / limit, -1, 1)[..., None])
    return drawn


def _blocks(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of blocks that cover a picture, however long and thin it is."""
    step = max(1, BLOCK_PX // width)
    for top in range(0, height, step):
        for left in range(0, width, BLOCK_PX):
            yield slice(top, min(top + step, height)), slice(left, min(left + BLOCK_PX, width))


def _mix(pixels: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """A block (h, w, 3) under the colours of strengths (h, w, 1) in [-1, 1]."""
    blue, vermilion = (np.array(ImageColor.getrgb(name), np.float32) for name in (BLUE, VERMILION))
    light = 1 - CONTRAST * (1 - np.asarray(Image.fromarray(pixels).convert("L"), np.float32)[..., None] / 255)
    colour = light * np.where(strength < 0, blue, vermilion)
    alpha = OPACITY * np.abs(strength)
    return (pixels * (1 - alpha) + colour * alpha).round().astype(np.uint8)


def _enlarge(evidence: np.ndarray, height: int, width: int, into_height: int, into_width: int) -> Image.Image:
    """The part of the map (h, w) that covers the picture, at its size, float32, bilinear."""
    top, left, inner_height, inner_width = image.placement(height, width, into_height, into_width)
    field = Image.fromarray(np.asarray(evidence, np.float32))
    x, y = field.width / into_width, field.height / into_height
    right, bottom = min(field.width, (left + inner_width) * x), min(field.height, (top + inner_height) * y)
    box = (left * x, top * y, right, bottom)
    return field.resize((width, height), Image.Resampling.BILINEAR, box=box)


def scale(maps: Iterable[np.ndarray]) -> float:
    """One limit for several maps whose method has no unit, unlike the closed form, which has `LIMIT`.

    Returns:
        The 99th percentile of the absolute values per cell; 1 without any.
    """
    values = np.abs(np.concatenate([np.zeros(0), *(np.ravel(one) for one in maps)]))
    return float(np.percentile(values, 99)) or 1.0 if values.size else 1.0


def legend(width_px: int = 256, height_px: int = 12) -> np.ndarray:
    """The colours from -limit on the left to +limit on the right over white, uint8 (height, width, 3)."""
    ramp = np.linspace(-1, 1, width_px)[None].repeat(height_px, 0)
    return overlay(np.full((height_px, width_px, 3), 255, np.uint8), ramp, limit=1)
