"""What reads a slide: its facts, and rectangles of its levels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

# Code and action of what a damaged slide raises.
UNREADABLE = "unreadable", "the slide cannot be read"
# Properties with µm per pixel across and down at level 0.
MPP_X, MPP_Y = "openslide.mpp-x", "openslide.mpp-y"


@dataclass(frozen=True)
class Facts:
    """Width and height of each level in pixels, level-0 pixels per pixel of each level, OpenSlide's
    properties (of another format, those that it states), the ICC profile (None for sRGB), and name and
    version of the reader."""

    sizes: tuple[tuple[int, int], ...]
    downsamples: tuple[float, ...]
    properties: Mapping[str, str]
    profile: bytes | None
    reader: str


class Reader(Protocol):
    """Reads one slide, of which level 0 is the largest image. Threads may share it."""

    @property
    def facts(self) -> Facts:
        """What is known without reading pixels."""

    def read(
        self, x_level0_px: int, y_level0_px: int, level: int, width_px: int, height_px: int
    ) -> np.ndarray:
        """Read a rectangle as uint8 (height_px, width_px, 3) sRGB, white where the slide has no pixels.

        Left and upper edge are in pixels of level 0 at every level, width and height in pixels of `level`.
        Raises ImageError for this rectangle; others may be readable.
        """

    def close(self) -> None:
        """Close its files."""
