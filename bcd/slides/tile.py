"""The tile grid of a slide, in level-0 pixels, and what a tile is called."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Grid:
    """Tiles side by side over a whole slide, row by row from the upper left.

    Attributes:
        x_level0_px: int64 (n,), left edges.
        y_level0_px: int64 (n,), upper edges.
        width_level0_px: of every tile.
        height_level0_px: of every tile.
        columns: tiles in a row.
        rows: tiles in a column.
    """

    x_level0_px: np.ndarray
    y_level0_px: np.ndarray
    width_level0_px: int
    height_level0_px: int
    columns: int
    rows: int

    def __len__(self) -> int:
        return len(self.x_level0_px)

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
    """Cover a slide with tiles. Those at the right and lower edges may stick out: no tissue falls away.

    Args:
        width_px: of the slide at level 0.
        height_px: of the slide at level 0.
        slide_mpp: µm per pixel of level 0, across and down.
        tile_mpp: µm per pixel of a tile as the model sees it.
        tile_width_px: of a tile at `tile_mpp`.
        tile_height_px: of a tile at `tile_mpp`.
    """
    mpp_x, mpp_y = slide_mpp
    step_x, step_y = tile_width_px * tile_mpp / mpp_x, tile_height_px * tile_mpp / mpp_y
    x, y = _starts(width_px, step_x), _starts(height_px, step_y)
    return Grid(
        np.tile(x, len(y)), np.repeat(y, len(x)), max(1, round(step_x)), max(1, round(step_y)), len(x), len(y)
    )


def _starts(side_px: int, step: float) -> np.ndarray:
    # The step is no whole number: it is summed before rounding, so that the last tile is not pixels off.
    # Half a pixel left over is no tile of its own.
    count = max(1, math.ceil((side_px - 0.5) / step))
    return (np.arange(count) * step).round().astype(np.int64)


def tile_id(image_id: str, x_level0_px: int, y_level0_px: int, mpp: float) -> str:
    """The `image_id` of a tile: that of its slide, then place at level 0 and µm/px of the tile."""
    return f"{image_id}#{x_level0_px},{y_level0_px},{mpp:g}"
