"""The tile grid of a slide in level-0 pixels, and the identifiers of tiles."""

import math
from dataclasses import dataclass

import numpy as np

from bcd.errors import ImageError

# Of one slide: these take 0.6 GB of memory until they are written, if all of them have tissue.
MAX_TILES = 2_000_000


@dataclass(frozen=True)
class Grid:
    """Tiles of equal size over a whole slide, row by row from the upper left.

    `x_level0_px` and `y_level0_px`, int64 (n,), are their left and upper edges; no two tiles have both equal.
    """

    x_level0_px: np.ndarray
    y_level0_px: np.ndarray
    width_level0_px: int
    height_level0_px: int
    columns: int
    rows: int

    def __len__(self) -> int:
        return len(self.x_level0_px)

    def near(self, chosen: np.ndarray) -> np.ndarray:
        """Indices of tiles, int (n,), in an order in which neighbours follow each other: the Z-order curve.

        In that of rows, what two rows share would be decoded twice, unless a whole row were kept.
        """
        row, column = np.divmod(chosen, self.columns)
        bits = range(max(self.rows, self.columns).bit_length())
        code = sum((row >> i & 1) << 2 * i + 1 | (column >> i & 1) << 2 * i for i in bits)
        return chosen[np.argsort(code)]

    def boxes(self, scale: float = 1.0) -> np.ndarray:
        """float64 (n, 4): x, y, width and height, in level-0 pixels times `scale`."""
        size = np.broadcast_to([self.width_level0_px, self.height_level0_px], (len(self), 2))
        return scale * np.column_stack([self.x_level0_px, self.y_level0_px, size])


def grid(
    width_px: int,
    height_px: int,
    slide_mpp: tuple[float, float],
    tile_mpp: float,
    tile_width_px: int,
    tile_height_px: int,
    overlap: float = 0.0,
) -> Grid:
    """Cover a slide of a size at level 0 with tiles of a size at `tile_mpp`, the µm per pixel of the model.

    Neighbours share `overlap`, 0 to below 1, of a side, as far as whole pixels of level 0 permit. Tiles may
    extend beyond the right and lower edge: no tissue is lost. Raises ImageError `too_many_tiles`.
    """
    mpp_x, mpp_y = slide_mpp
    width, height = tile_width_px * tile_mpp / mpp_x, tile_height_px * tile_mpp / mpp_y
    steps = (1 - overlap) * width, (1 - overlap) * height
    columns, rows = _count(width_px, width, steps[0]), _count(height_px, height, steps[1])
    if columns * rows > MAX_TILES:
        raise ImageError(
            "too_many_tiles",
            f"{columns:,} x {rows:,} tiles; at most {MAX_TILES:,} are planned of a slide: a smaller "
            "--tile-overlap or a larger --tile-mpp gives fewer",
        )
    x, y = _starts(columns, steps[0]), _starts(rows, steps[1])
    return Grid(
        np.tile(x, len(y)), np.repeat(y, len(x)), max(1, round(width)), max(1, round(height)), len(x), len(y)
    )


def _count(side_px: int, tile_px: float, step: float) -> int:
    """Number of tiles along a side, the last of which reaches its end; a remainder of half a pixel is no
    tile."""
    return max(1, math.ceil((side_px - 0.5 - (tile_px - step)) / step))


def _starts(count: int, step: float) -> np.ndarray:
    # Multiples of a fractional step are rounded, so that no error accumulates; of steps below a pixel, some
    # fall on the same one.
    return np.unique((np.arange(count) * step).round().astype(np.int64))


def tile_id(image_id: str, x_level0_px: int, y_level0_px: int, mpp: float) -> str:
    """The `image_id` of a tile: that of its slide, the position at level 0, and µm/px of the tile."""
    return f"{image_id}#{x_level0_px},{y_level0_px},{mpp:g}"
