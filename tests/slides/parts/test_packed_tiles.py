"""In every compression the pixels are those of OpenSlide, to the bit, and a bad tile costs what it covers."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from bcd.errors import ImageError
from bcd.imaging.image import UNAVAILABLE
from bcd.slides import slide
from bcd.slides.parts import tiff_reader
from tests import pictures
from tests.injected import CRASH, set_fault
from tests.slide_files import deflated, jpeg2000, lzw
from tests.slides.parts.pyramids import SIDE, YCBCR, aperio, tissue, write
from tests.slides.parts.test_jpeg_tiles import require_equal

NONE, LZW, DEFLATE, OLD_DEFLATE, YCBCR_2000, RGB_2000 = 1, 5, 8, 32946, 33003, 33005
WIDTH, HEIGHT = 200, 144


def differences(pixels):
    """Of each sample from that of the pixel to the left."""
    return np.diff(pixels, axis=1, prepend=np.zeros_like(pixels[:, :1]))


def lossy(pixels):
    """Of 0.8 bits a sample; in floating point, as most scanners write."""
    out = io.BytesIO()
    options = {"irreversible": True, "quality_mode": "rates", "quality_layers": [10]}
    Image.fromarray(pixels).save(out, "JPEG2000", no_jp2=True, **options)
    return out.getvalue()


def apart(pixels):
    """A codestream whose three components are not those of RGB."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG2000", no_jp2=True, irreversible=False, mct=0)
    return out.getvalue()


def plain_lzw(pixels):
    """Without differences: those that the encoder takes are undone before."""
    return lzw(np.cumsum(pixels, axis=1, dtype=np.uint8))


# Compression, encoder, predictor, and whether colours are stored apart.
CODINGS = {
    "uncompressed": (NONE, np.ndarray.tobytes, 1, False),
    "uncompressed, planes": (NONE, np.ndarray.tobytes, 1, True),
    "deflate": (DEFLATE, deflated, 1, False),
    "deflate, differences": (DEFLATE, lambda p: deflated(differences(p)), 2, False),
    "deflate of old, planes, differences": (OLD_DEFLATE, lambda p: deflated(differences(p)), 2, True),
    "LZW": (LZW, plain_lzw, 1, False),
    "LZW, differences": (LZW, lzw, 2, False),
    "LZW, planes, differences": (LZW, lambda p: lzw(p[..., 0]), 2, True),
    "JPEG 2000, lossless": (RGB_2000, jpeg2000, 1, False),
    "JPEG 2000, lossy": (RGB_2000, lossy, 1, False),
    "JPEG 2000, YCbCr": (YCBCR_2000, apart, 1, False),
}


def packed(pixels, compression, encode, predictor=1, planes=False, side=SIDE, **changes):
    """A level in tiles of a compression."""
    numbers = {"t259": [compression]} | ({"t317": [predictor]} if predictor > 1 else {})
    tags, tiles = pictures.tiled_page(pixels, 0.5, side, **numbers, **changes)
    tiles = [np.frombuffer(tile, np.uint8).reshape(side, side, 3) for tile in tiles]
    if not planes:
        return tags, [encode(tile.copy()) for tile in tiles]
    parts = [encode(tile[..., i : i + 1].copy()) for i in range(3) for tile in tiles]
    return tags | {284: (3, [2])}, parts


def slide_in(path, coding, text=None):
    """Two levels; in JPEG 2000 only Aperio has them."""
    pixels = tissue(HEIGHT, WIDTH)
    text = text if text is not None else b"Aperio|MPP = 0.5\0" if coding[0] > YCBCR_2000 - 1 else b"plain\0"
    levels = [packed(pixels, *coding, t270=text), packed(pixels[::2, ::2].copy(), *coding, t254=[1])]
    return write(path, *levels)


@pytest.mark.parametrize("name", CODINGS)
def test_a_pyramid_has_openslides_pixels(tmp_path, name):
    path = slide_in(tmp_path / "s.tif", CODINGS[name])
    with slide.open_slide(path) as opened:
        assert isinstance(opened.reader, tiff_reader.TiffReader)
        assert (opened.downsamples, opened.mpp_x) == ((1.0, 2.0), 0.5)
        require_equal(path, opened)
        if name not in ("JPEG 2000, lossy", "JPEG 2000, YCbCr"):
            np.testing.assert_array_equal(opened.read(0, 0, 0, WIDTH, HEIGHT), tissue(HEIGHT, WIDTH))


def test_levels_may_differ_in_their_compression(tmp_path):
    pixels = tissue(HEIGHT, WIDTH)
    pages = aperio(WIDTH, HEIGHT)
    codings = [CODINGS["JPEG 2000, lossy"], CODINGS["LZW, differences"], CODINGS["uncompressed"]]
    smaller = [packed(pixels[:: 2**n, :: 2**n].copy(), *one) for n, one in enumerate(codings, 1)]
    path = write(tmp_path / "s.svs", pages[0], *smaller)
    with slide.open_slide(path) as opened:
        assert isinstance(opened.reader, tiff_reader.TiffReader)
        assert opened.downsamples == pytest.approx((1, 2, 4, 8), rel=0.02)
        require_equal(path, opened)


@pytest.mark.parametrize(
    "change",
    [
        *({"t274": [2]}, {"t266": [2]}, {"t339": [2, 2, 2]}, {"t338": [0]}, {"t262": [YCBCR]}),
        *({"t317": [3]}, {"t317": [2, 1]}, {"t284": [3]}),
    ],
)
def test_what_is_unusual_is_left_to_openslide(tmp_path, change):
    """Turned, of reversed bits, signed, with another sample, of other colours, with other predictors."""
    pixels = tissue(SIDE, SIDE)
    for coding in (CODINGS["deflate"], CODINGS["LZW"]):
        compression, encode, *_ = coding
        assert tiff_reader.open_reader(str(write(tmp_path / "s.tif", packed(pixels, compression, encode))))
        path = write(tmp_path / "s.tif", packed(pixels, compression, encode, **change))
        assert tiff_reader.open_reader(str(path)) is None


def test_tags_that_say_what_is_usual_change_nothing(tmp_path):
    usual = {"t274": [1], "t266": [1], "t339": [1, 1, 1], "t317": [1], "t284": [1]}
    path = write(tmp_path / "s.tif", packed(tissue(SIDE, SIDE), *CODINGS["uncompressed"][:2], **usual))
    with slide.open_slide(path) as opened:
        assert isinstance(opened.reader, tiff_reader.TiffReader)
        require_equal(path, opened)


def test_jpeg_2000_is_of_aperio_alone(tmp_path):
    """OpenSlide reads it in no other TIFF."""
    path = slide_in(tmp_path / "s.tif", CODINGS["JPEG 2000, lossless"], text=b"plain\0")
    assert tiff_reader.open_reader(str(path)) is None


def damaged(name, stored):
    """Stored tiles with one that is damaged, the second."""
    bad = {
        "cut": stored[1][: len(stored[1]) // 2],
        "zeros": bytes(len(stored[1])),
        "long": stored[1] + bytes(6 * SIDE**2 + 2**16),
        "checksum": stored[1][:-1] + bytes([stored[1][-1] ^ 1]),
        "of another size": CODINGS["JPEG 2000, lossy"][1](tissue(2 * SIDE, SIDE)),
        "bomb": zlib.compress(bytes(2**26)),
        "no stream": b"\x89PNG" + stored[1],
    }[name]
    return [stored[0], bad, *stored[2:]]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("uncompressed", kind) for kind in ("cut", "long")),
        *(("deflate", kind) for kind in ("cut", "zeros", "long", "checksum", "no stream")),
        *(("LZW, differences", kind) for kind in ("cut", "zeros", "long")),
        *(("JPEG 2000, lossy", kind) for kind in ("cut", "zeros", "long", "of another size", "no stream")),
    ],
)
def test_a_damaged_tile_costs_what_it_covers(tmp_path, name, kind):
    pixels = tissue(SIDE, 3 * SIDE)
    text = b"Aperio|MPP = 0.5\0" if "2000" in name else b"plain\0"
    tags, stored = packed(pixels, *CODINGS[name], t270=text)
    good, bad = (
        write(tmp_path / f"{i}.tif", (tags, s)) for i, s in enumerate((stored, damaged(kind, stored)))
    )
    with slide.open_slide(bad) as opened, slide.open_slide(good) as whole:
        assert isinstance(opened.reader, tiff_reader.TiffReader)
        for _ in range(2):
            with pytest.raises(ImageError) as caught:
                opened.read(0, 0, 0, SIDE + 1, SIDE)
            assert caught.value.code == "unreadable"
            for x in (0, 2 * SIDE):
                part = whole.read(x, 0, 0, SIDE, SIDE)
                np.testing.assert_array_equal(opened.read(x, 0, 0, SIDE, SIDE), part)


def test_deflate_gives_the_bytes_of_a_tile_and_no_more(tmp_path):
    """What follows them is not decompressed, so that 64 kB cannot fill memory."""
    tags, stored = packed(tissue(SIDE, 3 * SIDE), *CODINGS["deflate"])
    path = write(tmp_path / "s.tif", (tags, damaged("bomb", stored)))
    with slide.open_slide(path) as opened:
        assert not opened.read(SIDE, 0, 0, SIDE, SIDE).any()
        require_equal(path, opened)


def test_a_tile_that_crashes_its_decoder_costs_itself(tmp_path, monkeypatch):
    """And leaves no file behind, of what belongs to a patient."""
    set_fault(monkeypatch, "facts", f"open(given['path'], 'rb').read().count(b'BAD') and {CRASH}")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "bad"))
    (tmp_path / "bad").mkdir()
    tags, stored = packed(tissue(SIDE, 3 * SIDE), *CODINGS["LZW"])
    path = write(tmp_path / "s.tif", (tags, [stored[0], stored[1] + b"BAD", stored[2]]))
    with slide.open_slide(path) as opened:
        with pytest.raises(ImageError, match="the slide reader crashes: Segmentation fault") as caught:
            opened.read(SIDE, 0, 0, SIDE, SIDE)
        assert caught.value.code == "unreadable"
        for x in (0, 2 * SIDE):
            expected = tissue(SIDE, 3 * SIDE)[:, x : x + SIDE]
            np.testing.assert_array_equal(opened.read(x, 0, 0, SIDE, SIDE), expected)
    assert not list((tmp_path / "bad").iterdir())


def test_a_full_disk_is_no_fault_of_the_tile(tmp_path, monkeypatch):
    path = write(tmp_path / "s.tif", packed(tissue(SIDE, SIDE), *CODINGS["LZW"]))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    with slide.open_slide(path) as opened, pytest.raises(ImageError, match="no temporary file") as caught:
        opened.read(0, 0, 0, SIDE, SIDE)
    assert caught.value.code == UNAVAILABLE
