import io
import struct

import numpy as np
import pytest

from bcd.imaging import image, tiff
from tests import pictures
from tests.pictures import tiff_page

PIXELS = pictures.gradient()
GREY = PIXELS[..., 0]
AS_GREY = np.repeat(GREY[..., None], 3, -1)
DEEP = PIXELS.astype(np.uint16) * 257
ALPHA = np.full(GREY.shape, 128, np.uint8)
IMAGEJ = b"ImageJ=1.54\nimages=3\nchannels=3\nhyperstack=true\nmode=%s\n"
OME = (
    b'<?xml version="1.0"?><OME><Image><Pixels SizeC="%d" SizeT="1" SizeZ="1" SignificantBits="%d"></Pixels>'
)


def decoded(*pages, order="<"):
    return image.decode(pictures.tiff(*pages, order=order))


def on_white(pixels):
    return np.round(pixels * (128 / 255) + 255 * (127 / 255))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("samples", "meaning", "expected"),
    [(PIXELS, 2, PIXELS), (DEEP, 2, PIXELS), (GREY, 1, AS_GREY), (DEEP[..., 0], 1, AS_GREY)],
    ids=["rgb", "rgb16", "grey", "grey16"],
)
def test_both_byte_orders_give_the_same_pixels(order, samples, meaning, expected):
    page = tiff_page(samples.astype(samples.dtype.newbyteorder(order)), meaning)
    np.testing.assert_array_equal(decoded(page, order=order), expected)


def test_sixteen_bits_are_rounded_and_not_cut_off():
    deep = np.array([[[128, 129, 65_535], [385, 386, 0]]], np.uint16)
    assert decoded(tiff_page(deep)).tolist() == [[[0, 1, 255], [1, 2, 0]]]


@pytest.mark.parametrize("deep", [False, True], ids=["8", "16"])
def test_white_is_zero_is_inverted(deep):
    samples = 65_535 - DEEP[..., 0] if deep else 255 - GREY
    np.testing.assert_array_equal(decoded(tiff_page(samples, 0)), AS_GREY)


def test_separate_planes_are_one_image():
    tags, _ = tiff_page(PIXELS, t284=[2])
    planes = [PIXELS[..., i].tobytes() for i in range(3)]
    np.testing.assert_array_equal(image.decode(pictures.tiff((tags, planes))), PIXELS)


@pytest.mark.parametrize(
    ("samples", "extra"),
    [
        (np.dstack([PIXELS, ALPHA]), 2),
        (np.dstack([(PIXELS * (128 / 255)).round().astype(np.uint8), ALPHA]), 1),
        (np.dstack([DEEP, ALPHA.astype(np.uint16) * 257]), 2),
    ],
    ids=["beside", "multiplied in", "16 bits"],
)
def test_alpha_is_blended_over_white(samples, extra):
    found = decoded(tiff_page(samples, t338=[extra]))
    assert np.abs(found - on_white(PIXELS)).max() <= 2


def test_samples_that_are_no_alpha_are_passed_over():
    np.testing.assert_array_equal(decoded(tiff_page(np.dstack([PIXELS, ALPHA]), t338=[0])), PIXELS)


def test_lab_and_cmyk_are_converted():
    lab = np.dstack([np.full(GREY.shape, 128, np.uint8), np.zeros((*GREY.shape, 2), np.uint8)])
    assert (decoded(tiff_page(lab, 8)) == 119).all()  # L* of 50 in sRGB
    cmyk = np.dstack([255 - PIXELS, np.zeros_like(GREY)])
    np.testing.assert_array_equal(decoded(tiff_page(cmyk, 5)), PIXELS)


# Bits in use, by what a file says: OME, or a largest sample of a whole number of bits.
@pytest.mark.parametrize(
    "changes", [{"t270": OME % (1, 12)}, {"t281": [4095] * 3}], ids=["ome", "largest sample"]
)
def test_twelve_bits_are_scaled_where_the_file_says_so(changes):
    np.testing.assert_array_equal(decoded(tiff_page(DEEP >> 4, **changes)), PIXELS)


@pytest.mark.parametrize(
    ("samples", "changes", "message"),
    [
        (DEEP >> 4, {}, "brightest sample is 4,095 of 65,535"),
        (DEEP[..., 0] >> 6, {"meaning": 1}, "brightest sample is 1,023"),
        (DEEP >> 4, {"t281": [4080] * 3}, "brightest sample is 4,095"),  # a statistic
        (DEEP, {"t270": OME % (1, 12)}, "claims 12 bits and has the value 65,535"),
        (DEEP.astype(np.float32), {"t339": [3] * 3}, "floating-point samples"),
        (DEEP[..., 0], {"meaning": 1, "t339": [2]}, "signed samples"),
        (GREY, {"meaning": 1, "t339": [2]}, "signed samples"),
        (DEEP.astype(np.uint32), {}, "32"),
        (PIXELS, {"t259": [50001]}, r"compression 50001 \(WebP\) is not read"),
        (PIXELS, {"t259": [34712]}, r"compression 34712 \(JPEG 2000\)"),
        (GREY, {"meaning": 1, "t259": [4]}, r"compression 4 \(CCITT fax\)"),
        (PIXELS, {"t259": [777]}, r"compression 777 \(unknown\)"),
        (GREY, {"meaning": 32803}, "photometric interpretation 32803 is not read"),
        (np.dstack([PIXELS, ALPHA]), {}, "4 samples a pixel, and it does not say what the last 1"),
        (DEEP, {"t284": [2]}, "16-bit samples in separate planes"),
        (PIXELS, {"meaning": 6}, "YCbCr with subsampling"),
        (GREY, {"meaning": 3, "t320": [*range(256)] * 3}, "palette has 8 bits where TIFF has 16"),
        (GREY, {"meaning": 1, "t270": IMAGEJ % b"grayscale"}, "states 3 planes and has 1"),
        (GREY, {"meaning": 1, "t270": OME % (3, 8)}, "states 3 planes and has 1"),
        (PIXELS, {"t254": [1]}, "thumbnails or masks only"),
    ],
)
def test_what_would_be_read_wrongly_is_named(samples, changes, message):
    with pytest.raises(image.ImageError, match=message) as caught:
        decoded(tiff_page(samples, **changes))
    assert caught.value.code == "unsupported_format"


def test_a_missing_interpretation_is_no_guess():
    tags, strips = tiff_page(GREY, 1)
    del tags[262]
    with pytest.raises(image.ImageError, match="photometric interpretation is missing"):
        decoded((tags, strips))


SMALL = PIXELS[::2, ::2].copy()


@pytest.mark.parametrize(
    "others",
    [
        [tiff_page(SMALL, t254=[1])],
        [tiff_page(SMALL, t255=[2])],
        [tiff_page(GREY, 1, t254=[4])],
        [tiff_page(SMALL), tiff_page(PIXELS[::4, ::4].copy())],
    ],
    ids=["thumbnail", "old thumbnail", "mask", "pyramid that marks nothing"],
)
def test_the_page_that_is_the_image_is_found(others):
    """At any place."""
    np.testing.assert_array_equal(decoded(tiff_page(PIXELS), *others), PIXELS)
    np.testing.assert_array_equal(decoded(*others, tiff_page(PIXELS)), PIXELS)


@pytest.mark.parametrize(
    "pages",
    [
        [tiff_page(PIXELS), tiff_page(PIXELS[::-1].copy())],
        [tiff_page(PIXELS), tiff_page(PIXELS[:20].copy())],
        [tiff_page(PIXELS[..., i].copy(), 1) for i in range(3)],
        [tiff_page(PIXELS[..., i].copy(), 1, t270=IMAGEJ % b"grayscale") for i in range(3)],
        [tiff_page(PIXELS[..., i].copy(), 1, t270=OME % (3, 8)) for i in range(3)],
    ],
    ids=["two", "another shape", "channels of nobody", "imagej, one at a time", "ome"],
)
def test_of_several_pages_none_is_scored_alone(pages):
    with pytest.raises(image.ImageError, match="does not say which one is the image") as caught:
        decoded(*pages)
    assert caught.value.code == "unsupported_format"


@pytest.mark.parametrize("deep", [False, True], ids=["8", "16"])
def test_a_composite_of_imagej_is_one_image(deep):
    channels = [(DEEP if deep else PIXELS)[..., i].copy() for i in range(3)]
    pages = [tiff_page(channel, 1, t270=IMAGEJ % b"composite") for channel in channels]
    np.testing.assert_array_equal(decoded(*pages), PIXELS)


def test_a_composite_with_colors_of_its_own_is_refused():
    pages = [tiff_page(GREY, 1, t270=IMAGEJ % b"composite", t50839=b"luts") for _ in range(3)]
    with pytest.raises(image.ImageError, match="does not say which"):
        decoded(*pages)


def test_tags_cannot_fill_memory():
    """Each of 3,000 claims half of the file: 100 MB from 70 KB, and the square with a larger file."""
    tags, strips = tiff_page(GREY, 1)
    content = pictures.tiff((tags | {40_000 + i: (2, b"long text") for i in range(3_000)}, strips))
    overlapping = content.replace(b"\2\0\x09\0\0\0", b"\2\0\0\x80\0\0")
    assert overlapping.count(b"\2\0\0\x80\0\0") == 3_000
    with pytest.raises(image.ImageError, match="its tags claim more bytes than the file has"):
        image.decode(overlapping)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:4] + b"\xff\xff\xff\x7f" + c[8:], "lie outside the file"),
        (lambda c: c[:-4] + c[4:8], "form a circle"),
        (lambda c: c[: len(c) - 40], "ends within its table of tags"),
    ],
    ids=["outside", "circle", "cut"],
)
def test_broken_directories_are_damage(change, message):
    content = pictures.tiff(tiff_page(GREY, 1))
    with pytest.raises(image.ImageError, match=message) as caught:
        image.decode(change(content))
    assert caught.value.code == "truncated"


def test_bigtiff_is_read_too():
    """Header, directory of 9 tags, one strip."""
    tags, strips = tiff_page(GREY, 1)
    rows = {**tags, 273: (4, [16]), 279: (4, [len(strips[0])])}
    start = 16 + len(strips[0])
    table = struct.pack("<Q", len(rows))
    for tag, (kind, values) in sorted(rows.items()):
        letter = "H" if kind == 3 else "I"
        table += struct.pack("<HHQ", tag, kind, len(values)) + struct.pack(f"<{letter}", *values).ljust(
            8, b"\0"
        )
    content = struct.pack("<2sHHHQ", b"II", 43, 8, 0, start) + strips[0] + table + bytes(8)
    np.testing.assert_array_equal(image.decode(content), AS_GREY)
    (page,) = tiff.pages(io.BytesIO(content), len(content))
    assert (page.size, page.bits, page.one(tiff.COMPRESSION)) == ((70, 46), 8, 1)


@pytest.mark.parametrize("marker", [b"\xff\xd9", b"\xff\xf0", b"\xff\xc8"])
def test_a_jpeg_stream_that_ends_early_is_truncated(marker):
    """libjpeg fills the rest with grey."""
    good = pictures.encode(pictures.stained(256, 256), "TIFF", compression="jpeg")
    for place in (1_000, 2_000, 3_000):
        with pytest.raises(image.ImageError) as caught:
            image.decode(good[:place] + marker + good[place + 2 :])
        assert caught.value.code == "truncated"
