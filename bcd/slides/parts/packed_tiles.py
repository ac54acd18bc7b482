"""Tiles of TIFF slides in other compressions than JPEG, with the pixels of OpenSlide.

Deflate loses nothing and is unpacked here. Tiles in LZW and JPEG 2000 are decoded by OpenSlide, in its child
process and each as a small slide of its own: whatever their colours, the pixels are those of OpenSlide, and
a bad one costs itself.
"""

import math
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from bcd.errors import ImageError
from bcd.imaging import tiff
from bcd.imaging.image import UNAVAILABLE, boundary
from bcd.slides.parts.level import DAMAGED, Decode
from bcd.slides.readers.openslide_client import OpenSlideReader

# Of each sample the difference from that of the pixel to the left, in LZW and deflate.
DIFFERENCES = 2
# What the tags of plain RGB are, or lack: upright, the first bit the highest, unsigned.
PLAIN = {tiff.ORIENTATION: 1, tiff.FILL_ORDER: 1, tiff.FORMAT: tiff.UNSIGNED}


def packed_decoder(page: tiff.Page) -> Decode | None:
    """What decodes the tiles of a page of RGB in 8 bits, None where anything of them is unusual."""
    compression, planar = page.one(tiff.COMPRESSION), page.one(tiff.PLANAR, 1)
    predictor = page.tags.get(tiff.PREDICTOR, (1,))
    size = page.one(tiff.TILE_HEIGHT), page.one(tiff.TILE_WIDTH)
    if compression in tiff.APERIO_JPEG_2000:
        return partial(_by_openslide, size, {tiff.COMPRESSION: compression}) if planar == 1 else None
    possible = ((1,),) if compression == tiff.UNCOMPRESSED else ((1,), (DIFFERENCES,))
    if not _is_plain(page) or planar not in (1, 2) or predictor not in possible:
        return None
    if compression == tiff.LZW:
        stated = {tiff.COMPRESSION: compression, tiff.PLANAR: planar, tiff.PREDICTOR: predictor[0]}
        return partial(_by_openslide, size, stated)
    if compression in (tiff.UNCOMPRESSED, *tiff.DEFLATE):
        shape = (*size, 3 if planar == 1 else 1)
        return partial(_unpack, shape, compression in tiff.DEFLATE, predictor == (DIFFERENCES,))
    return None


def _is_plain(page: tiff.Page) -> bool:
    is_rgb = page.one(tiff.PHOTOMETRIC) == tiff.RGB and tiff.EXTRA not in page.present
    return is_rgb and all(set(page.tags.get(tag, (value,))) == {value} for tag, value in PLAIN.items())


def _unpack(
    shape: tuple[int, ...], is_deflated: bool, has_differences: bool, streams: Sequence[bytes]
) -> np.ndarray:
    """A tile of one part, or of three, each of a shape (h, w, samples)."""
    with boundary("unreadable", DAMAGED):
        parts = [_samples(shape, is_deflated, has_differences, stored) for stored in streams]
    return np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def _samples(shape: tuple[int, ...], is_deflated: bool, has_differences: bool, stored: bytes) -> np.ndarray:
    n_bytes = math.prod(shape)
    # With room for one byte more, zlib reads on to the checksum, and compares it.
    found = zlib.decompressobj().decompress(stored, n_bytes + 1) if is_deflated else stored
    if len(found) < n_bytes:
        raise ValueError(f"it has {len(found):,} bytes; expected {n_bytes:,}")
    samples = np.frombuffer(found, np.uint8, n_bytes).reshape(shape)
    return np.cumsum(samples, axis=1, dtype=np.uint8) if has_differences else samples


def _by_openslide(size: tuple[int, int], stated: Mapping[int, int], streams: Sequence[bytes]) -> np.ndarray:
    """A tile of a height and width as OpenSlide decodes it. Raises ImageError as `OpenSlideReader`, and
    `unavailable` where a disk is full."""
    height, width = size
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tile.svs"
            path.write_bytes(_slide(height, width, stated, streams))
            with closing(OpenSlideReader(path)) as reader:
                return reader.read(width, 0, 0, width, height)
    except OSError as error:
        raise ImageError(UNAVAILABLE, f"no temporary file for a tile: {error}") from error


def _slide(height: int, width: int, stated: Mapping[int, int], streams: Sequence[bytes]) -> bytes:
    """An Aperio slide of two tiles, of which the first is missing: OpenSlide decodes that on opening."""
    places, sizes, content = list[int](), list[int](), bytearray(8)
    for stream in streams:
        places += [0, len(content)]
        sizes += [0, len(stream)]
        content += stream
    content += bytes(len(content) % 2)
    directory = ImageFileDirectory_v2()
    tags = {tiff.WIDTH: 2 * width, tiff.HEIGHT: height, tiff.TILE_WIDTH: width, tiff.TILE_HEIGHT: height}
    tags |= {tiff.SAMPLES: 3, tiff.PHOTOMETRIC: tiff.RGB, **stated}
    several = {tiff.BITS: (8, 8, 8), tiff.TILE_PLACES: tuple(places), tiff.TILE_BYTES: tuple(sizes)}
    for tag, value in {**tags, **several, tiff.DESCRIPTION: "Aperio"}.items():
        directory[tag] = value
    struct.pack_into("<2sHI", content, 0, b"II", 42, len(content))
    return bytes(content) + directory.tobytes(len(content))
