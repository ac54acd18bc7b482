"""Tissue against the glass of the same slide, on the thumbnail of an H&E slide.

Glass is what is bright and common and has not the colour of a stain. Divided by its colour the thumbnail
shows what was absorbed on the way through the section, whatever lamp, age and scanner gave the glass (Beer
and Lambert's law, as in Ruifrok and Johnston 2001, "Quantification of histochemical staining by color
deconvolution"). There stained tissue has colour and glass has none: Otsu's threshold on the saturation, held
within bounds, since Otsu's method finds two classes in everything, in an empty slide as in one full of
tissue.

Haematoxylin and eosin both absorb green most, the ink of pens absorbs red most (blue, green), blue most
(yellow, brown), or green and blue alike and hardly any red (red).
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
# Glass is at least so bright, as a share of the brightest hundredth of what may be glass, and covers at least
# this share of the slide; where none is seen, white stands for it.
GLASS_BRIGHT, GLASS_SHARE = 0.8, 0.005
GLASS_SATURATION = 0.5
# Bits of a channel that count for which colour is the most common.
GLASS_BITS = 5
# Optical density of red and of blue over that of green, above which it is ink. On 78 BreaKHis and 38 GlaS
# fields red stays below 1.1 and blue below 0.8 in 99 % of the stained pixels of every field with white glass.
INK_RED, INK_BLUE = 1.25, 1.0
# Ink is a stroke of at least this share of the slide; smaller is dye in the tissue, such as that of its
# margins.
INK_SHARE = 0.001
# Red ink: blue over green above, red over green below, and green itself above this. Blood comes near it.
RED_INK_BLUE, RED_INK_RED, RED_INK_GREEN = 0.8, 0.25, 0.5


def mask(thumbnail: np.ndarray) -> np.ndarray:
    """Where there is tissue.

    Args:
        thumbnail: uint8 (h, w, 3) RGB.

    Returns:
        bool (h, w).
    """
    seen = thumbnail.max(-1) > MAX_BLACK
    through = np.minimum(thumbnail * ((LEVELS - 1) / glass(thumbnail)), LEVELS - 1).round().astype(np.uint8)
    saturation = _saturation(through)
    bounds = (LEVELS - 1) * MIN_SATURATION, (LEVELS - 1) * MAX_SATURATION
    small_px = min(SMALL_PX, int(SMALL_SHARE * seen.size))
    stained = seen & (saturation > np.clip(otsu(saturation[seen]), *bounds))
    drawn = (thumbnail.min(-1) == 0) & (thumbnail.max(-1) == LEVELS - 1)
    stained &= ~_without_small(stained & _ink(through) & ~drawn, int(INK_SHARE * seen.size))
    return ~_without_small(~_without_small(stained, small_px), small_px)


def glass(thumbnail: np.ndarray) -> np.ndarray:
    """Colour of the glass, float64 (3,) RGB, 0 to 255; white where no glass is seen.

    Args:
        thumbnail: uint8 (h, w, 3) RGB.
    """
    white = np.full(3, LEVELS - 1.0)
    # White itself says nothing: what was not scanned is filled with it, an overexposed pixel has no colour.
    pixels = thumbnail[(thumbnail.max(-1) > MAX_BLACK) & (thumbnail.min(-1) < LEVELS - 1)]
    no_stain = pixels[:, 1] > np.minimum(pixels[:, 0], pixels[:, 2])
    limits = np.where(no_stain, GLASS_SATURATION, MAX_SATURATION)
    pixels = pixels[_saturation(pixels) <= (LEVELS - 1) * limits]
    if not len(pixels):
        return white
    bright = pixels[pixels[:, 1] >= GLASS_BRIGHT * np.percentile(pixels[:, 1], 99)]
    if len(bright) < GLASS_SHARE * thumbnail[..., 0].size:
        return white
    cell = bright >> (8 - GLASS_BITS)
    number = cell @ (1 << GLASS_BITS * np.arange(3))
    common = cell[number == np.bincount(number).argmax()][0]
    return bright[(np.abs(cell.astype(int) - common) <= 1).all(-1)].mean(0)


def _saturation(pixels: np.ndarray) -> np.ndarray:
    """0 to 255, of uint8 (..., 3) RGB."""
    brightest = pixels.max(-1).astype(np.int32)
    return (LEVELS - 1) * (brightest - pixels.min(-1)) // np.maximum(brightest, 1)


def _ink(through: np.ndarray) -> np.ndarray:
    """Where a colour is none of haematoxylin and eosin: bool (h, w) of what came through, uint8 (h, w, 3)."""
    red, green, blue = np.moveaxis(_DENSITY[through], -1, 0)
    pen = (red > INK_RED * green) | (blue > INK_BLUE * green)
    return pen | ((blue > RED_INK_BLUE * green) & (red < RED_INK_RED * green) & (green > RED_INK_GREEN))


# Optical density of a level.
_DENSITY = -np.log10((np.arange(LEVELS, dtype=np.float32) + 1) / LEVELS)


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
