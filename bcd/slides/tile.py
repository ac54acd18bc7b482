"""The tile grid of a slide in level-0 pixels, and the identifiers of tiles."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Grid:
    """Adjacent tiles of equal size over a whole slide, row by row from the upper left.

    `x_level0_px` and `y_level0_px`, int64 (n,), are their left and upper edges.
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
) -> Grid:
    """Cover a slide of a size at level 0 with tiles of a size at `tile_mpp`, the µm per pixel of the model.

    They may extend beyond the right and lower edge: no tissue is lost.
    """
    mpp_x, mpp_y = slide_mpp
    step_x, step_y = tile_width_px * tile_mpp / mpp_x, tile_height_px * tile_mpp / mpp_y
    x, y = _starts(width_px, step_x), _starts(height_px, step_y)
    return Grid(
        np.tile(x, len(y)), np.repeat(y, len(x)), max(1, round(step_x)), max(1, round(step_y)), len(x), len(y)
    )


def _starts(side_px: int, step: float) -> np.ndarray:
    # Multiples of a fractional step are rounded, so that no error accumulates. A remainder of half a pixel is
    # no tile.
    count = max(1, math.ceil((side_px - 0.5) / step))
    return (np.arange(count) * step).round().astype(np.int64)


def tile_id(image_id: str, x_level0_px: int, y_level0_px: int, mpp: float) -> str:
    """The `image_id` of a tile: that of its slide, the position at level 0, and µm/px of the tile."""
    return f"{image_id}#{x_level0_px},{y_level0_px},{mpp:g}"
