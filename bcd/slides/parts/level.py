"""A level of a TIFF slide: where its tiles are in the file, and what decodes them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bcd.errors import ImageError

# A tile may have so many bytes for each pixel, and those of its header.
MOST_BYTES_PX, HEAD_BYTES = 6, 2**16
DAMAGED = "the slide cannot be read: a damaged tile"

# A tile as uint8 (tile_height_px, tile_width_px, 3) RGB from its stored parts: one, or one of each colour.
# Raises ImageError, `unreadable` for a damaged one.
Decode = Callable[[Sequence[bytes]], np.ndarray]


@dataclass(frozen=True)
class Level:
    """A level of a pyramid: its size, that of its tiles, the offset and number of bytes of each, row by row
    (where colours are stored apart, those of red, of green and of blue), what decodes them, and the size of
    the file."""

    width_px: int
    height_px: int
    tile_width_px: int
    tile_height_px: int
    places: np.ndarray
    n_bytes: np.ndarray
    decode: Decode
    file_bytes: int

    @property
    def columns(self) -> int:
        """Tiles in a row."""
        return -(-self.width_px // self.tile_width_px)

    @property
    def n_tiles(self) -> int:
        """Tiles of the level."""
        return self.columns * -(-self.height_px // self.tile_height_px)

    @property
    def tile_px(self) -> int:
        """Pixels of a tile."""
        return self.tile_width_px * self.tile_height_px

    def tiles(self, x_px: int, y_px: int, width_px: int, height_px: int) -> Iterator[tuple[int, int, int]]:
        """Number, left and upper edge of each tile that a rectangle has a part in; all in pixels."""
        across, down = self.tile_width_px, self.tile_height_px
        for top in range(max(y_px, 0) // down * down, min(y_px + height_px, self.height_px), down):
            for left in range(max(x_px, 0) // across * across, min(x_px + width_px, self.width_px), across):
                yield top // down * self.columns + left // across, left, top

    def parts(self, number: int) -> list[tuple[int, int]]:
        """Offset and number of bytes of each part of a tile. Raises ImageError `unreadable` where the file
        does not have them, or they are more than a tile of its pixels can have."""
        found = []
        for index in range(number, len(self.places), self.n_tiles):
            place, n_bytes = int(self.places[index]), int(self.n_bytes[index])
            if place + n_bytes > self.file_bytes or n_bytes > MOST_BYTES_PX * self.tile_px + HEAD_BYTES:
                message = f"{DAMAGED}: {n_bytes:,} bytes at {place:,} of a file of {self.file_bytes:,}"
                raise ImageError("unreadable", message)
            found.append((place, n_bytes))
        return found
