"""Levels of TIFF slides that are stored in JPEG tiles: where these are, and the pixels that OpenSlide gives.

OpenSlide composes the decoded tiles with Cairo, which takes longer than decoding them. The levels of plain
TIFF and Aperio slides are grids without overlaps, so that their tiles need only be copied side by side.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simplejpeg

from bcd.errors import ImageError
from bcd.imaging import container, tiff
from bcd.imaging.image import boundary

# Of one decoded tile: 48 MiB. Those of scanners have 240 to 1,024 px.
MAX_TILE_PIXELS = 2**24
# The start of an image, and the marker of Adobe that says whether its samples are RGB (0) or YCbCr (1).
START, END = b"\xff\xd8", b"\xff\xd9"
COLOURS = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
# Segments of a stream that libjpeg follows, where OpenSlide follows the tags of the TIFF alone: of JFIF,
# which means YCbCr, and of Adobe.
STATED, NAMES, NAMED_BYTES = (container.JFIF, container.ADOBE), (b"JFIF", b"Adobe"), 1_024
# The header of a stream may have so many bytes, and its data for each pixel.
HEAD_BYTES, MOST_BYTES_PX = 2**16, 6
# Starts of scans in a stream. Each takes the time of a pass over the tile, however few bytes it has.
SCAN, MOST_SCANS = b"\xff\xda", 20
DAMAGED = "the slide cannot be read: a damaged tile"


@dataclass(frozen=True)
class Level:
    """A level of a pyramid: its size, that of its tiles, the offset and number of bytes of each, row by row,
    what precedes each stream (the marker of its colours, the tables that all share), and the size of the
    file."""

    width_px: int
    height_px: int
    tile_width_px: int
    tile_height_px: int
    places: np.ndarray
    n_bytes: np.ndarray
    shared: bytes
    file_bytes: int

    @property
    def columns(self) -> int:
        """Tiles in a row."""
        return -(-self.width_px // self.tile_width_px)

    def tiles(self, x_px: int, y_px: int, width_px: int, height_px: int) -> Iterator[tuple[int, int, int]]:
        """Number, left and upper edge of each tile that a rectangle has a part in; all in pixels."""
        across, down = self.tile_width_px, self.tile_height_px
        for top in range(max(y_px, 0) // down * down, min(y_px + height_px, self.height_px), down):
            for left in range(max(x_px, 0) // across * across, min(x_px + width_px, self.width_px), across):
                yield top // down * self.columns + left // across, left, top

    def part(self, number: int) -> tuple[int, int]:
        """Offset and number of bytes of a tile. Raises ImageError `unreadable` where the file does not have
        them, or they are more than a JPEG of its pixels can have."""
        place, n_bytes = int(self.places[number]), int(self.n_bytes[number])
        if place + n_bytes > self.file_bytes or n_bytes > MOST_BYTES_PX * self.tile_px + HEAD_BYTES:
            message = f"{DAMAGED}: {n_bytes:,} bytes at {place:,} of a file of {self.file_bytes:,}"
            raise ImageError("unreadable", message)
        return place, n_bytes

    @property
    def tile_px(self) -> int:
        """Pixels of a tile."""
        return self.tile_width_px * self.tile_height_px

    def decode(self, stored: bytes) -> np.ndarray:
        """A tile as uint8 (tile_height_px, tile_width_px, 3) RGB. Raises ImageError `unreadable` for a
        damaged one."""
        with boundary("unreadable", DAMAGED):
            if any(name in stored[:NAMED_BYTES] for name in NAMES):
                stored = START + _without_statements(stored)
            # libjpeg takes a missing end for damage, which OpenSlide does not.
            stream = START + self.shared + stored.removeprefix(START) + END
            if (scans := stored.count(SCAN)) > MOST_SCANS:
                raise ValueError(f"a JPEG of {scans} scans; at most {MOST_SCANS} are read")
            # First, because decoding takes as much memory as the header asks for.
            size = simplejpeg.decode_jpeg_header(stream)[:2]
            if size != (self.tile_height_px, self.tile_width_px) or not stored.startswith(START):
                raise ValueError(f"a JPEG of {size[1]} x {size[0]} px")
            return simplejpeg.decode_jpeg(stream, "RGB")


def read_level(file: tiff.Readable, page: tiff.Page, file_bytes: int) -> Level | None:
    """The level in a page, None where it is stored in another form or some of its tiles are missing. Raises
    ImageError for damaged tags."""
    across, down = page.one(tiff.TILE_WIDTH), page.one(tiff.TILE_HEIGHT)
    width, height = page.size
    if not _is_read(page) or not 0 < across * down <= MAX_TILE_PIXELS or not width * height > 0:
        return None
    places, n_bytes = (tiff.values(file, page, tag) for tag in (tiff.TILE_PLACES, tiff.TILE_BYTES))
    n_tiles = -(-width // across) * -(-height // down)
    if len(places) != n_tiles or len(n_bytes) != n_tiles or not n_bytes.all():
        return None
    tables = tiff.values(file, page, tiff.JPEG_TABLES).tobytes()
    if tables and not tables.startswith(START):
        return None
    shared = COLOURS + bytes([page.one(tiff.PHOTOMETRIC) == tiff.YCBCR]) + _without_statements(tables)
    return Level(width, height, across, down, places, n_bytes, shared, file_bytes)


def _is_read(page: tiff.Page) -> bool:
    return (
        page.one(tiff.COMPRESSION) == tiff.JPEG
        and page.tags.get(tiff.BITS) == (8, 8, 8)
        and page.one(tiff.SAMPLES) == 3
        and page.one(tiff.PLANAR, 1) == 1
        and page.one(tiff.PHOTOMETRIC) in (tiff.RGB, tiff.YCBCR)
    )


def _without_statements(stream: bytes) -> bytes:
    """The segments of a stream, or of tables, without those of `STATED` and the start."""
    kept = list[bytes]()
    for marker, start, end in container.segments(stream):
        if marker == container.SOS:
            return b"".join([*kept, stream[start:]])
        if marker not in STATED:
            kept.append(stream[start:end])
    return b"".join(kept)
