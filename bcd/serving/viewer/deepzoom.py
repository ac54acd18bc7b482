"""A slide as a deep-zoom image: a pyramid of square tiles, of which each level has half the size of the next.

Levels are those of Deep Zoom: the last is level 0 of the slide, the first one pixel. Tiles overlap by one
pixel, so that a browser that enlarges them shows no seams.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from bcd.slides.slide import LEVEL_TOLERANCE, Slide

# With its overlaps a tile has 512 px: each is a request through Ray Serve, which costs more than the pixels.
TILE_PX, OVERLAP_PX = 510, 1
# Side of a block of the slide that is decoded at once, where no level of it is as small as the image's.
BLOCK_PX = 2048

# Left, top, width and height in pixels of a level.
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class DeepZoom:
    """The levels of a slide of this size at level 0."""

    width_px: int
    height_px: int

    @property
    def last(self) -> int:
        """Number of the largest level."""
        return math.ceil(math.log2(max(self.width_px, self.height_px, 1)))

    def downsample(self, level: int) -> int:
        """Level-0 pixels of the slide per pixel of a level."""
        return int(2 ** (self.last - level))

    def size(self, level: int) -> tuple[int, int]:
        """Width and height of a level in pixels."""
        step = self.downsample(level)
        return -(-self.width_px // step), -(-self.height_px // step)

    def box(self, level: int, column: int, row: int) -> Box | None:
        """The place of a tile with its overlaps; None where there is no such tile."""
        if not 0 <= level <= self.last or min(column, row) < 0:
            return None
        sides = []
        for number, size in zip((column, row), self.size(level), strict=True):
            start = number * TILE_PX
            if start >= size:
                return None
            first = start - (OVERLAP_PX if number else 0)
            sides.append((first, min(start + TILE_PX + OVERLAP_PX, size) - first))
        (left, width), (top, height) = sides
        return left, top, width, height


def read_tile(slide: Slide, downsample: int, box: Box) -> np.ndarray:
    """Pixels of a box of a level, uint8 (height, width, 3) sRGB, from the smallest level of the slide that
    has their detail; raises ImageError `unreadable`."""
    left, top, width, height = box
    level = _level(slide, downsample)
    factor = downsample / slide.downsamples[level]
    step = max(1, int(BLOCK_PX / factor))
    pixels = np.empty((height, width, 3), np.uint8)
    for y in range(0, height, step):
        for x in range(0, width, step):
            part = pixels[y : y + step, x : x + step]
            part[:] = _reduced(slide, level, factor, (left + x, top + y, part.shape[1], part.shape[0]))
    return pixels


def _level(slide: Slide, downsample: int) -> int:
    fitting = [d for d in slide.downsamples if d <= LEVEL_TOLERANCE * downsample]
    return slide.downsamples.index(max(fitting, default=slide.downsamples[0]))


def _reduced(slide: Slide, level: int, factor: float, box: Box) -> np.ndarray:
    """A box whose pixels are means of `factor` x `factor` pixels of a level; it begins and ends within
    pixels, so that blocks join without a seam."""
    left, top, width, height = box
    x, y = math.floor(left * factor), math.floor(top * factor)
    inner = left * factor - x, top * factor - y, (left + width) * factor - x, (top + height) * factor - y
    downsample = slide.downsamples[level]
    place = round(x * downsample), round(y * downsample)
    pixels = slide.read(*place, level, math.ceil(inner[2]), math.ceil(inner[3]))
    if pixels.shape[:2] == (height, width):
        return pixels
    if factor.is_integer():
        # As below, in a quarter of the time.
        return np.asarray(Image.fromarray(pixels).reduce(int(factor)))
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX, inner))
