"""Separation of tissue from glass on the thumbnail of an H&E slide.

Glass is bright, common, and without the colour of a stain. Division by its colour leaves the absorption of
the section, independent of lamp, age and scanner (Beer-Lambert law, as in Ruifrok and Johnston 2001,
"Quantification of histochemical staining by color deconvolution"). Stained tissue then has a saturation above
Otsu's threshold, which is kept within bounds, since Otsu's method finds two classes in any image, even in an
empty slide or one full of tissue.

Haematoxylin and eosin both absorb mostly green. Pen ink absorbs mostly red (blue, green pens), mostly blue
(yellow, brown), or green and blue equally and hardly any red (red).
"""

import numpy as np
from PIL import Image

from bcd.errors import ImageError
from bcd.imaging import container, decoder, image

LEVELS = 256
# Bounds of the threshold on the saturation, 0 to 1. White glass after JPEG has up to 0.03; pale collagen
# begins near 0.15, and Otsu would split it from the nuclei.
MIN_SATURATION, MAX_SATURATION = 0.05, 0.12
# Pen, cover-slip edges and the black margin of a scan; the darkest nuclei have a channel above 60.
MAX_BLACK = 50
# Specks and holes up to this many pixels of the thumbnail, or this share of a small one, are ignored: at 12
# µm/px, a slide of 25 mm, a square of 0.1 mm.
SMALL_PX, SMALL_SHARE = 64, 0.001
# Glass has at least this share of the brightness of the brightest hundredth of what may be glass, and covers
# at least this share of the slide; otherwise white is used.
GLASS_BRIGHT, GLASS_SHARE = 0.8, 0.005
GLASS_SATURATION = 0.5
# Bits of a channel that define the most common colour.
GLASS_BITS = 5
# Optical density of red and of blue over that of green, above which it is ink. On 78 BreaKHis and 38 GlaS
# fields red stays below 1.1 and blue below 0.8 in 99 % of the stained pixels of every field with white glass.
INK_RED, INK_BLUE = 1.25, 1.0
# A stroke of ink has at least this share of the slide; less is dye in the tissue, such as at its margins.
INK_SHARE = 0.001
# Share by which the shape of a given mask may differ from that of its slide. Places of depth and colour type
# in the header of a PNG, and the bit of the latter that means an alpha channel.
MASK_TOLERANCE = 0.01
DEPTH, COLOR_TYPE, HAS_ALPHA = 24, 25, 4
# Red ink: blue over green above, red over green below, and green itself above this. Blood is close to it.
RED_INK_BLUE, RED_INK_RED, RED_INK_GREEN = 0.8, 0.25, 0.5


def mask(thumbnail: np.ndarray) -> np.ndarray:
    """Tissue mask, bool (h, w), of a thumbnail, uint8 (h, w, 3) RGB."""
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
    """Colour of the glass, float64 (3,), 0 to 255, on uint8 (h, w, 3) RGB; white where no glass is found."""
    white = np.full(3, LEVELS - 1.0)
    # White is left out: regions not scanned are filled with it, and overexposed pixels have no colour.
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
    """Mask, bool (h, w), of the transmission, uint8 (h, w, 3): colours of neither haematoxylin nor eosin."""
    red, green, blue = np.moveaxis(_DENSITY[through], -1, 0)
    pen = (red > INK_RED * green) | (blue > INK_BLUE * green)
    return pen | ((blue > RED_INK_BLUE * green) & (red < RED_INK_RED * green) & (green > RED_INK_GREEN))


# Optical density of a level.
_DENSITY = -np.log10((np.arange(LEVELS, dtype=np.float32) + 1) / LEVELS)


def otsu(values: np.ndarray) -> int:
    """Threshold between two classes of integers from 0 to 255: the largest value of the lower class.

    Maximises the variance between the classes: Otsu 1979, "A Threshold Selection Method from Gray-Level
    Histograms", equation 18. `values` may be empty.
    """
    share = np.bincount(values.ravel(), minlength=LEVELS) / max(1, values.size)
    lower, moment = share.cumsum(), (share * np.arange(LEVELS)).cumsum()
    spread = lower * (1 - lower)
    between = (moment[-1] * lower - moment) ** 2 / np.where(spread > 0, spread, np.inf)
    return int(between.argmax())


def _without_small(region: np.ndarray, small_px: int) -> np.ndarray:
    from scipy import ndimage  # takes half a second, and drivers need none of it

    labels, _ = ndimage.label(region)
    large = np.bincount(labels.ravel()) > small_px
    large[0] = False
    return large[labels]


def given_mask(
    content: bytes, size_px: tuple[int, int], bounds_px: tuple[int, int], shape: tuple[int, int]
) -> np.ndarray:
    """The mask of a slide from a PNG at any scale: the share of each pixel of the thumbnail, float64 (h, w),
    that is not 0.

    `size_px` are width and height of level 0, `bounds_px` the corner of what QuPath shows of it, and `shape`
    the height and width of the thumbnail. Raises ImageError `bad_mask`, or `unavailable` where the decoder
    was killed.
    """
    if bounds_px != (0, 0):
        raise ImageError(
            "bad_mask",
            "the slide has bounds, and an image does not say whether it shows all of level 0 or what is "
            "within them; use --regions, whose files do",
        )
    try:
        pixels = decoder.decode_safely(_plain(content))
    except ImageError as error:
        code = error.code if error.code == image.UNAVAILABLE else "bad_mask"
        raise ImageError(code, error.message) from None
    (height, width), (full_width, full_height) = pixels.shape[:2], size_px
    # Width and height were rounded to whole pixels.
    rounding = 0.5 * (1 + full_height / full_width)
    if abs(height - width * full_height / full_width) > max(MASK_TOLERANCE * height, rounding):
        raise ImageError(
            "bad_mask",
            f"it has {width:,} x {height:,} px, and the slide {full_width:,} x {full_height:,}: another "
            "shape; expected a mask of the whole slide",
        )
    there = Image.fromarray(pixels.any(-1).astype(np.float32))
    return np.asarray(there.resize(shape[::-1], Image.Resampling.BOX), np.float64)


def _plain(content: bytes) -> bytes:
    """A PNG without profiles, which could change a 0; raises ImageError where 0 may not mean what it says."""
    with image.boundary("bad_mask", "it cannot be read"):
        data = container.png_content(content).data if content.startswith(container.PNG) else b""
    header = data[: data.find(b"IDAT")]
    if not data or header[DEPTH] > 8 or header[COLOR_TYPE] & HAS_ALPHA or b"tRNS" in header:
        expected = "expected a PNG with 1 to 8 bits in grey, palette or RGB, and no transparency"
        raise ImageError("bad_mask", f"{expected}; 0 is glass, all else tissue")
    return data


def fraction(tissue: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Fraction of tissue, float64 (n,), in boxes of the mask; exact, fractions of a pixel included.

    `tissue` is bool, or the share of each pixel; `boxes`, float (n, 4), are x, y, width and height in pixels;
    outside the mask there is no tissue.
    """
    from scipy import ndimage

    # Between whole pixels the integral of an image of squares is bilinear.
    integral = np.pad(tissue.cumsum(0, dtype=np.float64).cumsum(1), ((1, 0), (1, 0)))
    x, y, width, height = np.asarray(boxes, np.float64).reshape(-1, 4).T

    def upto(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return ndimage.map_coordinates(integral, [y, x], order=1, mode="nearest")

    right, bottom = x + width, y + height
    area = upto(right, bottom) - upto(x, bottom) - upto(right, y) + upto(x, y)
    # Rounded, so that an empty box has exactly 0.
    return np.clip(area / (width * height), 0, 1).round(9)
