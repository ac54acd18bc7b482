"""Tissue against background on the thumbnail of an H&E slide.

Stained tissue has colour, glass has none: Otsu's threshold on the saturation, held within bounds, since
Otsu's method finds two classes in everything, in an empty slide as in one full of tissue.
"""

import numpy as np
from scipy import ndimage

LEVELS = 256
# Saturation, 0 to 1. Below the first nothing is stain: white glass after JPEG has up to 0.03. Above the
# second nothing is glass: pale collagen begins near 0.15, and Otsu would split it from the nuclei.
MIN_SATURATION, MAX_SATURATION = 0.05, 0.12
# Pen, cover-slip edges and the black outside of a scan; the darkest nuclei have a channel above 60.
MAX_BLACK = 50
# Specks and holes up to this many pixels of the thumbnail, or this share of a small one, are no tissue and
# no gap: at 12 µm/px, a slide of 25 mm, a square of 0.1 mm.
SMALL_PX, SMALL_SHARE = 64, 0.001


def mask(thumbnail: np.ndarray) -> np.ndarray:
    """Where there is tissue.

    Args:
        thumbnail: uint8 (h, w, 3) RGB.

    Returns:
        bool (h, w).
    """
    brightest = thumbnail.max(-1).astype(np.int32)
    saturation = (LEVELS - 1) * (brightest - thumbnail.min(-1)) // np.maximum(brightest, 1)
    bright = brightest > MAX_BLACK
    bounds = (LEVELS - 1) * MIN_SATURATION, (LEVELS - 1) * MAX_SATURATION
    stained = bright & (saturation > np.clip(otsu(saturation[bright]), *bounds))
    small_px = min(SMALL_PX, int(SMALL_SHARE * stained.size))
    return ~_without_small(~_without_small(stained, small_px), small_px)


def otsu(values: np.ndarray) -> int:
    """Threshold that parts values into two classes with the largest variance between them.

    Otsu 1979, "A Threshold Selection Method from Gray-Level Histograms", equation 18.

    Args:
        values: integers from 0 to 255, any shape; may be empty.

    Returns:
        The largest value of the lower class.
    """
    share = np.bincount(values.ravel(), minlength=LEVELS) / max(1, values.size)
    lower, moment = share.cumsum(), (share * np.arange(LEVELS)).cumsum()
    spread = lower * (1 - lower)
    between = (moment[-1] * lower - moment) ** 2 / np.where(spread > 0, spread, np.inf)
    return int(between.argmax())


def _without_small(region: np.ndarray, small_px: int) -> np.ndarray:
    labels, _ = ndimage.label(region)
    large = np.bincount(labels.ravel()) > small_px
    large[0] = False
    return large[labels]


def fraction(tissue: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Share of tissue in each box, exact for boxes of any size, fractions of a pixel included.

    Args:
        tissue: bool (h, w).
        boxes: float (n, 4): x, y, width and height in pixels of the mask. What lies outside is no tissue.

    Returns:
        float64 (n,), 0 to 1.
    """
    # Between whole pixels the integral of a picture made of squares is bilinear.
    integral = np.pad(tissue.cumsum(0).cumsum(1, dtype=np.float64), ((1, 0), (1, 0)))
    x, y, width, height = np.asarray(boxes, np.float64).reshape(-1, 4).T

    def upto(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return ndimage.map_coordinates(integral, [y, x], order=1, mode="nearest")

    right, bottom = x + width, y + height
    area = upto(right, bottom) - upto(x, bottom) - upto(right, y) + upto(x, y)
    # Rounded, so that an empty box has exactly none.
    return np.clip(area / (width * height), 0, 1).round(9)
