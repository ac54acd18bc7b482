"""Tiles of TIFF slides that are stored as JPEG, with the pixels of OpenSlide.

OpenSlide composes the decoded tiles with Cairo, which takes longer than decoding them. The levels of plain
TIFF and Aperio slides are grids without overlaps, so that their tiles need only be copied side by side.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import simplejpeg

from bcd.imaging import container, tiff
from bcd.imaging.image import boundary
from bcd.slides.parts.level import DAMAGED, Decode

# The start of an image, and the marker of Adobe that says whether its samples are RGB (0) or YCbCr (1).
START, END = b"\xff\xd8", b"\xff\xd9"
COLOURS = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
# Segments of a stream that libjpeg follows, where OpenSlide follows the tags of the TIFF alone: of JFIF,
# which means YCbCr, and of Adobe.
STATED, NAMES, NAMED_BYTES = (container.JFIF, container.ADOBE), (b"JFIF", b"Adobe"), 1_024
# Starts of scans in a stream. Each takes the time of a pass over the tile, however few bytes it has.
SCAN, MOST_SCANS = b"\xff\xda", 20


def jpeg_decoder(file: tiff.Readable, page: tiff.Page) -> Decode | None:
    """What decodes the tiles of a page, None where their colours are stored apart or are others. Raises
    ImageError for damaged tags."""
    if page.one(tiff.PLANAR, 1) != 1 or page.one(tiff.PHOTOMETRIC) not in (tiff.RGB, tiff.YCBCR):
        return None
    tables = tiff.values(file, page, tiff.JPEG_TABLES).tobytes()
    if tables and not tables.startswith(START):
        return None
    shared = COLOURS + bytes([page.one(tiff.PHOTOMETRIC) == tiff.YCBCR]) + _without_statements(tables)
    return partial(_decode, shared, (page.one(tiff.TILE_HEIGHT), page.one(tiff.TILE_WIDTH)))


def _decode(shared: bytes, size: tuple[int, int], streams: Sequence[bytes]) -> np.ndarray:
    """A tile from its stream, which the marker of its colours and the tables of all tiles precede."""
    (stored,) = streams
    with boundary("unreadable", DAMAGED):
        if any(name in stored[:NAMED_BYTES] for name in NAMES):
            stored = START + _without_statements(stored)
        # libjpeg takes a missing end for damage, which OpenSlide does not.
        stream = START + shared + stored.removeprefix(START) + END
        if (scans := stored.count(SCAN)) > MOST_SCANS:
            raise ValueError(f"a JPEG of {scans} scans; at most {MOST_SCANS} are read")
        # First, because decoding takes as much memory as the header asks for.
        found = simplejpeg.decode_jpeg_header(stream)[:2]
        if found != size or not stored.startswith(START):
            raise ValueError(f"a JPEG of {found[1]} x {found[0]} px")
        return simplejpeg.decode_jpeg(stream, "RGB")


def _without_statements(stream: bytes) -> bytes:
    """The segments of a stream, or of tables, without those of `STATED` and the start."""
    kept = list[bytes]()
    for marker, start, end in container.segments(stream):
        if marker == container.SOS:
            return b"".join([*kept, stream[start:]])
        if marker not in STATED:
            kept.append(stream[start:end])
    return b"".join(kept)
