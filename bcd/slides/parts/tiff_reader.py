"""Slides in tiles of a TIFF, on the local disk or in a store: read by the parts that are needed.

The content of a file alone chooses the reader, so that a slide has the same pixels in all places. These are
OpenSlide's, but for places between two pixels of a level, where OpenSlide interpolates (decision 10).
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import lru_cache, partial

import numpy as np
from PIL import Image

from bcd import storage
from bcd.errors import ImageError
from bcd.imaging.image import boundary, to_srgb
from bcd.slides.parts import source
from bcd.slides.parts.pyramid import Pyramid, read_pyramid
from bcd.slides.readers.interface import Facts

# Decoded tiles of one slide: neighbours of a rectangle to read, which come next.
DECODED_BYTES = 2**25
READER = "tiff_tiles"

# Left and upper edge in pixels of level 0, the level, width and height in pixels of the level.
Rectangle = tuple[int, int, int, int, int]


class TiffReader:
    """An open slide; see `interface.Reader`. Threads may share it.

    In memory are its tags, `DECODED_BYTES` of decoded tiles, and of a slide in a store `source.CACHE_BYTES`
    of stored ones.
    """

    def __init__(self, opened: source.Source, pyramid: Pyramid) -> None:
        self._source, self._levels = opened, pyramid.levels
        self.facts = Facts(
            sizes=tuple((level.width_px, level.height_px) for level in pyramid.levels),
            downsamples=pyramid.downsamples,
            properties=pyramid.properties,
            profile=pyramid.profile,
            reader=READER,
        )
        self._parts = source.Parts(opened) if storage.is_remote(opened.uri) else None
        largest = max(3 * level.tile_px for level in pyramid.levels)
        decode = partial(_decode, opened, self._parts or opened, pyramid)
        self._decoded = lru_cache(max(4, DECODED_BYTES // largest))(decode)

    def read(
        self, x_level0_px: int, y_level0_px: int, level: int, width_px: int, height_px: int
    ) -> np.ndarray:
        """Read a rectangle as uint8 (height_px, width_px, 3) sRGB, white where the slide has no pixels.

        A place between two pixels of `level` counts as the nearest. Raises ImageError `unreadable` where a
        tile in the rectangle is damaged, and StorageError.
        """
        self.request([(x_level0_px, y_level0_px, level, width_px, height_px)])
        grid = self._levels[level]
        x_px, y_px = self._nearest(x_level0_px, level), self._nearest(y_level0_px, level)
        pixels = np.full((height_px, width_px, 3), 255, np.uint8)
        right, lower = min(x_px + width_px, grid.width_px), min(y_px + height_px, grid.height_px)
        for number, left, top in grid.tiles(x_px, y_px, width_px, height_px):
            x, y = max(left, x_px), max(top, y_px)
            part = self._decoded(level, number)[y - top : lower - top, x - left : right - left]
            pixels[y - y_px :, x - x_px :][: part.shape[0], : part.shape[1]] = part
        return pixels

    def request(self, rectangles: Iterable[Rectangle]) -> None:
        """Request from a store what `read` will need for these rectangles, in as few requests as their tiles
        are apart, as far as half of the memory for it suffices; returns at once."""
        if self._parts:
            parts = (part for rectangle in rectangles for part in self._stored(rectangle))
            self._parts.request(source.within(parts, source.CACHE_BYTES // 2))

    def close(self) -> None:
        """Close the file."""
        if self._parts:
            self._parts.close()
        self._source.close()

    def _nearest(self, edge_level0_px: int, level: int) -> int:
        return math.floor(edge_level0_px / self.facts.downsamples[level] + 0.5)

    def _stored(self, rectangle: Rectangle) -> Iterator[source.Part]:
        """Parts of the file with the tiles of a rectangle, but for those that `read` will find damaged."""
        x_level0_px, y_level0_px, level, width_px, height_px = rectangle
        place = self._nearest(x_level0_px, level), self._nearest(y_level0_px, level)
        for number, _, _ in self._levels[level].tiles(*place, width_px, height_px):
            with suppress(ImageError):
                yield from self._levels[level].parts(number)


# No method, so that a reader that nobody uses is gone at once, with its file and its memory.
def _decode(
    opened: source.Source, stored: source.Source | source.Parts, pyramid: Pyramid, level: int, number: int
) -> np.ndarray:
    grid = pyramid.levels[level]
    content = [stored.read(part) for part in grid.parts(number)]
    try:
        pixels = grid.decode(content)
    except ImageError:
        opened.require_same(within_s=0)
        raise
    if pyramid.profile is None:
        return pixels
    return np.asarray(to_srgb(Image.fromarray(pixels), pyramid.profile))


def open_reader(uri: str) -> TiffReader | None:
    """Open a slide at any URI by its tags; None for a file that is left to OpenSlide. Raises StorageError
    where it cannot be read."""
    with ExitStack() as stack:
        opened = source.Source(uri)
        stack.callback(opened.close)
        with suppress(ImageError), boundary("unreadable", "its tags"):
            pyramid = read_pyramid(source.Blocks(opened), opened.size_bytes)
            if pyramid is not None:
                stack.pop_all()
                return TiffReader(opened, pyramid)
    return None
