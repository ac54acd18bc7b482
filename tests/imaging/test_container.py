import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from bcd.imaging import container, image
from tests import pictures

PIXELS = pictures.gradient()
PNG, JPEG = pictures.encode(PIXELS), pictures.encode(PIXELS, "JPEG", quality=95)
FROM_JPEG = np.asarray(Image.open(io.BytesIO(JPEG)))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
END = PNG[-12:]


def chunk(name, content, checksum=None):
    right = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum or right)


def with_chunk(*chunks, content=PNG):
    """After the header, which ends at byte 33."""
    return content[:33] + b"".join(chunks) + content[33:]


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def with_segment(*segments, content=JPEG):
    return content[:2] + b"".join(segments) + content[2:]


def refused(content):
    with pytest.raises(image.ImageError) as caught:
        image.decode(content)
    return caught.value.code, caught.value.message


# Data besides the pixels that do not affect them.
BESIDE_PNG = {
    "a text of 2 MiB": chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**21))),
    "texts of 70 MiB": chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 1))) * 70,
    "an international text of 2 MiB": chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(2**21))),
    "a broken text": chunk(b"zTXt", b"k\0\0no zlib"),
    "a note on orientation of 2 MiB": chunk(
        b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(2**21))
    ),
    "a wrong checksum of a note": chunk(b"tIME", bytes(7), checksum=1),
    "broken EXIF": chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
    "significant bits": chunk(b"sBIT", b"\5\6\5"),
    "a profile above 1 MiB": chunk(
        b"iCCP", b"p\0\0" + zlib.compress(struct.pack(">I", len(SRGB) + 2**21) + SRGB[4:] + bytes(2**21))
    ),
    "one frame": chunk(b"acTL", struct.pack(">II", 1, 0)),
    "sRGB by numbers": chunk(b"gAMA", struct.pack(">I", 45455))
    + chunk(b"cHRM", struct.pack(">8I", *container.SRGB_PRIMARIES)),
}


@pytest.mark.parametrize("name", BESIDE_PNG)
def test_a_png_is_complete_with_any_other_chunks(name):
    np.testing.assert_array_equal(image.decode(with_chunk(BESIDE_PNG[name])), PIXELS)


BESIDE_JPEG = {
    "bytes after the end": JPEG + b"\0" * 5_000,
    "half an image after the end": JPEG + JPEG[: len(JPEG) // 2],
    "a marker of a scan after the end": JPEG + b"\xff\xda\0\3x",
    "broken EXIF": with_segment(segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff")),
    "a thumbnail within": with_segment(segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0" + JPEG[:3_000])),
    "a broken list of images": with_segment(segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff")),
    "a broken note of Photoshop": with_segment(segment(0xED, b"Photoshop 3.0\x008BIM\4\4")),
    "fill bytes": JPEG[:2] + b"\xff" * 9 + JPEG[2:],
}


@pytest.mark.parametrize("name", BESIDE_JPEG)
def test_a_jpeg_is_complete_with_any_other_segments(name):
    np.testing.assert_array_equal(image.decode(BESIDE_JPEG[name]), FROM_JPEG)


def test_of_several_images_in_a_jpeg_the_first_counts():
    first, other = Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1].copy())
    content = pictures.encode(first, "MPO", save_all=True, append_images=[other], quality=95)
    np.testing.assert_array_equal(image.decode(content), FROM_JPEG)


def test_many_scans_of_a_large_image_are_refused(monkeypatch):
    """Each costs a pass over all pixels: 95 bytes, 0.06 s."""
    progressive = pictures.encode(PIXELS, "JPEG", progressive=True)
    pixels = PIXELS.shape[0] * PIXELS.shape[1]
    monkeypatch.setattr(container, "MAX_SCANNED_PIXELS", 10 * pixels)
    assert container.jpeg(progressive)  # Pillow writes ten
    monkeypatch.setattr(container, "MAX_SCANNED_PIXELS", 10 * pixels - 1)
    assert refused(progressive) == ("unsupported_format", "a JPEG of more than 9 scans")


def test_progressive_scans_belong_together():
    content = pictures.encode(PIXELS, "JPEG", progressive=True, quality=95)
    assert content.count(b"\xff\xda") > 3
    np.testing.assert_array_equal(image.decode(content), FROM_JPEG)


def start_of_frame(marker=0xC0, bits=8, layers=3, height=46):
    place = JPEG.index(b"\xff\xc0")
    length = struct.unpack(">H", JPEG[place + 2 : place + 4])[0]
    body = struct.pack(">BHHB", bits, height, 70, layers) + JPEG[place + 10 : place + 2 + length]
    return JPEG[:place] + segment(marker, body) + JPEG[place + 2 + length :]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (start_of_frame(0xC1, bits=12), "a JPEG of 3 components of 12 bits, coded as SOF1"),
        (start_of_frame(0xC5), "coded as SOF5"),
        (start_of_frame(0xCB), "coded as SOF11"),
        (start_of_frame(layers=2), "a JPEG of 2 components"),
        (start_of_frame(height=0), "a JPEG of 3 components of 8 bits"),
        (start_of_frame(layers=4), "CMYK without Adobe's marker"),
        (with_chunk(chunk(b"acTL", struct.pack(">II", 3, 0))), "an animation of 3 images"),
        (with_chunk(chunk(b"CgBI", bytes(4))), "chunk CgBI"),
        (with_chunk(chunk(b"gAMA", struct.pack(">I", 100_000))), "its gamma is 1, that of sRGB"),
        (with_chunk(chunk(b"cHRM", struct.pack(">8I", *range(8)))), "primaries"),
        (with_chunk(chunk(b"cICP", b"\x09\x10\0\1")), "its colours"),
        (with_chunk(chunk(b"iCCP", b"p\0\0no zlib")), "its colour profile cannot be read"),
        (
            with_chunk(chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(container.MAX_PROFILE_BYTES + 1)))),
            "its colour profile cannot be read",
        ),
    ],
)
def test_what_is_whole_and_not_read_is_named(content, message):
    code, found = refused(content)
    assert code == "unsupported_format"
    assert message in found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PNG[:-12], "the file ends or is damaged"),
        (PNG[:-1], "the file ends or is damaged"),
        (PNG.replace(b"IDAT", b"I\0AT"), "the file ends or is damaged"),
        (PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:], "the checksum of chunk IDAT is wrong"),
        (with_chunk(chunk(b"tRNS", bytes(6), checksum=1)), "the checksum of chunk tRNS is wrong"),
        (PNG[:8] + PNG[33:], "does not begin with a header"),
        (JPEG[:-2], "the file has no end"),
        (JPEG[:-2] + b"\xff\x13" + JPEG[-2:], "the file is damaged after"),
        (JPEG[:100], "ends within its header"),
        (JPEG[:2] + b"\xff\xd9", "ends within its header"),
        (with_segment(segment(0xE2, b"ICC_PROFILE\0\1\2" + SRGB)), "a part of its colour profile is missing"),
    ],
)
def test_damage_is_named(content, message):
    code, found = refused(content)
    assert code == "truncated"
    assert message in found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_chunk(*[chunk(b"tEXt", b"")] * 4), "more than 3 chunks"),
        (pictures.encode(PIXELS, "JPEG", progressive=True), "more than 3 scans"),
    ],
)
def test_headers_cannot_cost_time_without_end(monkeypatch, content, message):
    monkeypatch.setattr(container, "MAX_CHUNKS", 3 if content[0] != 0xFF else 100)
    monkeypatch.setattr(container, "MAX_SCANS", 3)
    assert refused(content) == (
        "unsupported_format",
        f"a {'PNG' if content[0] != 0xFF else 'JPEG'} of {message}",
    )


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_damage(width, height):
    assert refused(pictures.png_header(width, height))[0] == "truncated"


def exif(orientation):
    found = Image.Exif()
    found[0x0112] = orientation
    return found


BLOCKS = pictures.encode(pictures.gradient(48, 64), "JPEG")
IN_HEX = b"\nexif\n%8d\n%s\n" % (len(exif(3).tobytes()), exif(3).tobytes().hex().encode())
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="3"/></x:xmpmeta>'


@pytest.mark.parametrize(
    "content",
    [
        pictures.encode(PIXELS, exif=exif(3)),
        with_chunk(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)),
        with_chunk(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP))),
        with_chunk(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(IN_HEX))),
        with_segment(segment(0xE1, b"Exif\0\0" + exif(3).tobytes()[6:]), content=BLOCKS),
        with_segment(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP), content=BLOCKS),
        pictures.encode(Image.fromarray(PIXELS), "TIFF", tiffinfo={274: 3}),
    ],
    ids=["exif", "xmp", "xmp, packed", "imagemagick", "jpeg exif", "jpeg xmp", "tiff"],
)
def test_notes_on_orientation_are_followed(content):
    expected = PIXELS if content[0] != 0xFF else np.asarray(Image.open(io.BytesIO(BLOCKS)))
    np.testing.assert_array_equal(image.decode(content), expected[::-1, ::-1])


def test_text_that_pillow_reads_is_no_pixel():
    """The limit of Pillow that whole files broke: it still exists."""
    notes = PngImagePlugin.PngInfo()
    notes.add_text("k", "x" * 2**21, zip=True)
    content = pictures.encode(Image.fromarray(PIXELS), pnginfo=notes)
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(content)).load()
    np.testing.assert_array_equal(image.decode(content), PIXELS)
