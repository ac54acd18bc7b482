"""Decompression of chunks of Zarr, to exactly the bytes of a chunk and no more.

By zlib and by Arrow's LZ4 and Zstandard. The container of Blosc, in which most writers of OME-Zarr put these,
is taken apart here. https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst
"""

import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from bcd.imaging.image import ImageError

Decompress = Callable[[bytes, int], bytes]
# Flags of Blosc, and the codes of its compressors from the sixth bit on.
COPIED, BIT_SHUFFLED, CODE_BIT = 0x2, 0x4, 5
# Bytes before the places of its blocks, the version that leaves some blocks as they are, and most blocks.
HEADER_BYTES, OLD_FORMAT, MOST_BLOCKS = 16, 2, 2**16


def find_codec(array: Mapping[str, Any]) -> Decompress:
    """What decompresses a chunk of an array, by its metadata of Zarr v2 or v3.

    Raises:
        ImageError: `unsupported_format` for other compressors, several of them, and for what is none:
            filters, orders, shards.
    """
    if array["zarr_format"] == 2:
        names = [one["id"] for one in (*(array.get("filters") or ()), array["compressor"]) if one]
        names += [] if array["order"] == "C" else ["order F"]
    else:
        names = [codec["name"] for codec in array["codecs"] if codec["name"] != "bytes"]
    if len(names) > 1 or not _CODECS.keys() >= set(names):
        known = ", ".join(sorted(_CODECS))
        raise ImageError("unsupported_format", f"an OME-Zarr with {', '.join(names)}; one of {known} is read")
    return _CODECS[names[0]] if names else lambda data, n_bytes: data


def _inflate(wbits: int) -> Decompress:
    return lambda data, n_bytes: zlib.decompressobj(wbits).decompress(data, n_bytes)


def _zstd(data: bytes, n_bytes: int) -> bytes:
    return pa.Codec("zstd").decompress(data, n_bytes, asbytes=True)


def _lz4(data: bytes, n_bytes: int) -> bytes:
    found = pa.Codec("lz4_raw").decompress(data, n_bytes, asbytes=True)
    try:
        pa.Codec("lz4_raw").decompress(data, n_bytes - 1)
    except OSError:
        return found
    # Arrow leaves the rest of the memory as it was.
    raise ImageError("unreadable", f"a chunk has less than {n_bytes:,} bytes")


def _blosc(data: bytes, n_bytes: int) -> bytes:
    version, _, flags, item, size, block, _ = struct.unpack_from("<BBBBIII", data)
    if (size, item) != (n_bytes, 1) or n_bytes > block * MOST_BLOCKS:
        raise ImageError("unreadable", f"a chunk of {size:,} bytes, items of {item}; expected {n_bytes:,}, 1")
    if flags & COPIED:
        return data[HEADER_BYTES : HEADER_BYTES + n_bytes]
    decompress = _BLOSC_CODECS.get(flags >> CODE_BIT)
    if decompress is None:
        raise ImageError("unsupported_format", "an OME-Zarr compressed by blosclz or snappy")
    pieces = []
    for number, start in enumerate(range(0, n_bytes, block)):
        length = min(block, n_bytes - start)
        (place,) = struct.unpack_from("<i", data, HEADER_BYTES + 4 * number)
        (stored,) = struct.unpack_from("<i", data, place)
        piece = data[place + 4 : place + 4 + stored]
        piece = piece if stored == length else decompress(piece, length)
        # Items of one byte have no bytes to shuffle.
        pieces.append(_in_order(piece, version) if flags & BIT_SHUFFLED else piece)
    return b"".join(pieces)


def _in_order(data: bytes, version: int) -> bytes:
    """Undo the order in which the first bits of all items precede the second ones."""
    whole = len(data) // 8 * 8
    if version <= OLD_FORMAT and whole < len(data):
        return data
    bits = np.unpackbits(np.frombuffer(data, np.uint8, whole), bitorder="little").reshape(8, whole)
    return np.packbits(bits.T, axis=1, bitorder="little").tobytes() + data[whole:]


_CODECS: Mapping[str, Decompress] = {
    "blosc": _blosc,
    "gzip": _inflate(31),
    "lz4": lambda data, n_bytes: _lz4(data[4:], n_bytes),  # after its size
    "zlib": _inflate(15),
    "zstd": _zstd,
}
_BLOSC_CODECS: Mapping[int, Decompress] = {1: _lz4, 3: _inflate(15), 4: _zstd}
