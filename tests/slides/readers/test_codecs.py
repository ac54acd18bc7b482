import struct
import zlib

import numpy as np
import pyarrow as pa
import pytest

from bcd.imaging.image import ImageError
from bcd.slides.readers import codecs
from tests.slide_files import blosc

DATA = bytes(np.arange(4_096).astype(np.uint8) // 3)


def v2(name, **changes):
    return {"zarr_format": 2, "compressor": name and {"id": name}, "filters": None, "order": "C"} | changes


def v3(*names):
    return {"zarr_format": 3, "codecs": [{"name": name} for name in names]}


def gzipped(data):
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush()


def lz4(data):
    return len(data).to_bytes(4, "little") + pa.Codec("lz4_raw").compress(data, asbytes=True)


STORED = {
    None: DATA,
    "zlib": zlib.compress(DATA),
    "gzip": gzipped(DATA),
    "zstd": pa.Codec("zstd").compress(DATA, asbytes=True),
    "lz4": lz4(DATA),
    "blosc": blosc(DATA),
}


@pytest.mark.parametrize("name", STORED)
def test_a_chunk_is_decompressed(name):
    names = [name] if name else []
    for array in (v2(name), v3("bytes", *names)):
        assert codecs.find_codec(array)(STORED[name], len(DATA)) == DATA


# What numcodecs 0.16.6 made of 64 times 16 equal values: bits shuffled and Zstandard, bytes shuffled and LZ4.
WRITTEN = [
    "0201940100040000000400003f000000140000002700000028b52ffd600003ed0000200000ffff0880c0e301ed38b50e95ee44f2ccf4"
    "e5dd2b99b27a9f3a12",
    "020121010004000000040000a2000000140000008a0000001b0001001b0101001b0201001b0301001b0401001b0501001b0601001b07"
    "01001b0801001b0901001b0a01001b0b01001b0c01001b0d01001b0e01001b0f01000bff001b00ff001b01ff001b02ff001b03ff001b"
    "04ff001b05ff001b06ff001b07ff001b08ff001b09ff001b0aff001b0bff001b0cff001b0dff001b0eff000f0001ffea500f0f0f0f0f",
]


@pytest.mark.parametrize("written", WRITTEN)
def test_blosc_is_read_as_others_write_it(written):
    found = codecs.find_codec(v2("blosc"))(bytes.fromhex(written), 1_024)
    assert found == bytes(np.arange(1_024).astype(np.uint8) // 16)


@pytest.mark.parametrize("name", [name for name in STORED if name])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: bytes(len(data))])
def test_a_damaged_chunk_is_never_a_whole_one(name, damage):
    """`zarr` compares the length, and converts what decompressors raise."""
    try:
        found = codecs.find_codec(v2(name))(damage(STORED[name]), len(DATA))
    except (ImageError, OSError, zlib.error, struct.error):
        return
    assert len(found) < len(DATA)


@pytest.mark.parametrize("name", [name for name in STORED if name])
def test_no_more_is_decompressed_than_a_chunk_has(name):
    short = len(DATA) - 100
    try:
        found = codecs.find_codec(v2(name))(STORED[name], short)
    except (ImageError, OSError):
        return
    assert len(found) == short


def test_a_chunk_with_less_is_an_error():
    """Arrow leaves the rest of its memory as it was."""
    with pytest.raises(ImageError, match="a chunk has less than 5,000 bytes"):
        codecs.find_codec(v2("lz4"))(STORED["lz4"], 5_000)


@pytest.mark.parametrize(
    "array",
    [
        v2("bz2"),
        v2("zlib", order="F"),
        v2("zlib", filters=[{"id": "delta"}]),
        v3("transpose", "bytes"),
        v3("sharding_indexed"),
    ],
)
def test_what_is_not_read_is_named(array):
    with pytest.raises(ImageError, match="blosc, gzip, lz4, zlib, zstd is read") as caught:
        codecs.find_codec(array)
    assert caught.value.code == "unsupported_format"
