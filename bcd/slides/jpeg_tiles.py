"""Slides stored in JPEG tiles: the pixels that OpenSlide gives, in a fraction of its time.

OpenSlide composes the decoded tiles with Cairo, which takes longer than decoding them. The levels of plain
TIFF and Aperio slides are grids without overlaps, so that their tiles need only be copied side by side.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg

from bcd.errors import ImageError
from bcd.imaging import tiff
from bcd.imaging.image import boundary

# OpenSlide's names of the layouts that are plain grids.
LAYOUTS = ("aperio", "generic-tiff")
# Decoded tiles of one open slide: neighbours of a tile to read, which come next.
CACHE_BYTES = 2**25
# The start of an image, and the marker of Adobe that says whether its samples are RGB (0) or YCbCr (1).
START, END = b"\xff\xd8", b"\xff\xd9"
# The start of a scan. Tiles of scanners have one; time grows with the number, and this process has no limit.
SCAN = b"\xff\xda"
COLOURS = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
# Statements of a stream that libjpeg follows, where OpenSlide follows the tags of the TIFF alone: its own
# marker of Adobe, and for RGB that of JFIF, which means YCbCr.
STATED = {tiff.RGB: (b"JFIF", b"Adobe"), tiff.YCBCR: (b"Adobe",)}


@dataclass(frozen=True)
class Level:
    """A level of a pyramid: its size, that of its tiles, where they are, the TIFF's number for RGB or YCbCr,
    and the tables of each stream."""

    width_px: int
    height_px: int
    tile_width_px: int
    tile_height_px: int
    places: np.ndarray
    n_bytes: np.ndarray
    meaning: int
    tables: bytes

    @property
    def columns(self) -> int:
        """Tiles in a row."""
        return -(-self.width_px // self.tile_width_px)

    def stream(self, stored: bytes) -> bytes | None:
        """A tile's JPEG stream; None where libjpeg would take its colours for others than OpenSlide does, or
        might need long."""
        if not stored.startswith(START) or stored.count(SCAN) != 1:
            return None
        if any(name in stored[:1_024] for name in STATED[self.meaning]):
            return None
        colours = COLOURS + bytes([self.meaning == tiff.YCBCR])
        return START + colours + self.tables + stored.removeprefix(START)


@dataclass(frozen=True)
class JpegTiles:
    """An open file and those of its levels that are in JPEG tiles; None for others."""

    file: BinaryIO
    levels: Sequence[Level | None]
    decoded: Callable[[int, int], np.ndarray | None]

    def read(self, x_px: int, y_px: int, level: int, width_px: int, height_px: int) -> np.ndarray | None:
        """Read a rectangle, all in pixels of `level`, as uint8 (height_px, width_px, 3) RGB, white outside.

        None where only OpenSlide knows the pixels: of another compression, or of a missing or damaged tile.
        """
        if (grid := self.levels[level]) is None:
            return None
        pixels = np.full((height_px, width_px, 3), 255, np.uint8)
        right, lower = min(x_px + width_px, grid.width_px), min(y_px + height_px, grid.height_px)
        across, down = grid.tile_width_px, grid.tile_height_px
        for top in range(max(y_px, 0) // down * down, lower, down):
            for left in range(max(x_px, 0) // across * across, right, across):
                tile = self.decoded(level, top // down * grid.columns + left // across)
                if tile is None:
                    return None
                x, y = max(left, x_px), max(top, y_px)
                part = tile[y - top : lower - top, x - left : right - left]
                pixels[y - y_px :, x - x_px :][: part.shape[0], : part.shape[1]] = part
        return pixels

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def open_tiles(path: Path, sizes: Sequence[tuple[int, int]]) -> JpegTiles | None:
    """Open the levels of a slide, of these widths and heights; None where none of them is in JPEG tiles, or
    its tags are damaged."""
    file, levels = path.open("rb"), list[Level | None]()
    with suppress(ImageError), boundary("unreadable", "its tags"):
        pages = [page for page in tiff.iterate_pages(file, path.stat().st_size) if _is_read(page)]
        levels = [_level(file, [page for page in pages if page.size == size]) for size in sizes]
    if not any(levels):
        file.close()
        return None
    largest = max(level.tile_width_px * level.tile_height_px * 3 for level in levels if level)
    decoded = lru_cache(max(4, CACHE_BYTES // largest))(partial(_decode, file, levels))
    return JpegTiles(file, levels, decoded)


def _is_read(page: tiff.Page) -> bool:
    return (
        page.one(tiff.COMPRESSION) == tiff.JPEG
        and page.one(tiff.TILE_WIDTH) * page.one(tiff.TILE_HEIGHT) > 0
        and page.tags.get(tiff.BITS) == (8, 8, 8)
        and page.one(tiff.SAMPLES) == 3
        and page.one(tiff.PLANAR, 1) == 1
        and page.one(tiff.PHOTOMETRIC) in (tiff.RGB, tiff.YCBCR)
    )


def _level(file: BinaryIO, pages: Sequence[tiff.Page]) -> Level | None:
    """The level that has the only page of its size."""
    if len(pages) != 1:
        return None
    page = pages[0]
    places, n_bytes = (tiff.values(file, page, tag) for tag in (tiff.TILE_PLACES, tiff.TILE_BYTES))
    tables = tiff.values(file, page, tiff.JPEG_TABLES).tobytes()
    across, down = page.one(tiff.TILE_WIDTH), page.one(tiff.TILE_HEIGHT)
    width, height = page.size
    n_tiles = -(-width // across) * -(-height // down)
    if len(places) != n_tiles or len(n_bytes) != n_tiles:
        return None
    shared = tables.removeprefix(START).removesuffix(END)
    return Level(width, height, across, down, places, n_bytes, page.one(tiff.PHOTOMETRIC), shared)


def _decode(file: BinaryIO, levels: Sequence[Level | None], level: int, number: int) -> np.ndarray | None:
    grid = levels[level]
    assert grid
    size = grid.tile_height_px, grid.tile_width_px
    with suppress(ImageError), boundary("unreadable", "a stored tile"):
        stored = os.pread(file.fileno(), int(grid.n_bytes[number]), int(grid.places[number]))
        stream = grid.stream(stored)
        # First, because decoding takes as much memory as the header asks for.
        if stream and simplejpeg.decode_jpeg_header(stream)[:2] == size:
            return simplejpeg.decode_jpeg(stream, "RGB")
    return None
