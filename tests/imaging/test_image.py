import io
import struct
import zlib

import kornia_rs
import numpy as np
import pytest
from PIL import Image, ImageCms

from bcd.errors import StorageError
from bcd.imaging import container, image
from tests import pictures

PIXELS = pictures.gradient()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_lossless_images_are_decoded_exactly(kind):
    np.testing.assert_array_equal(image.decode(pictures.encode(PIXELS, kind)), PIXELS)


def test_the_content_decides_the_format_and_not_a_name():
    decoded = image.decode(pictures.encode(PIXELS, "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - PIXELS).mean() < 3


def test_grey_becomes_three_equal_channels():
    decoded = image.decode(pictures.encode(PIXELS[..., 0]))
    np.testing.assert_array_equal(decoded, np.repeat(PIXELS[..., :1], 3, -1))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(kind):
    decoded = image.decode(pictures.encode(PIXELS[..., 0].astype(np.uint16) * 257, kind))
    np.testing.assert_array_equal(decoded[..., 1], PIXELS[..., 0])


def png_of(*parts):
    """The file of these chunks, with right checksums."""
    return container.PNG + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )


def deep_png(samples, *chunks):
    """A PNG of 16-bit samples, uint16 (h, w) or (h, w, 3), with more chunks before the pixels."""
    height, width = samples.shape[:2]
    rows = samples.astype(">u2").reshape(height, -1).tobytes()
    stride = len(rows) // height
    lines = b"".join(b"\0" + rows[i : i + stride] for i in range(0, len(rows), stride))
    head = struct.pack(">IIBBBBB", width, height, 16, 2 if samples.ndim == 3 else 0, 0, 0, 0)
    return png_of((b"IHDR", head), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b""))


def test_sixteen_bit_colors_are_rounded_and_not_cut_off():
    samples = np.array([[[128, 129, 65_535], [385, 386, 0]]], np.uint16)
    assert image.decode(deep_png(samples)).tolist() == [[[0, 1, 255], [1, 2, 0]]]


@pytest.mark.parametrize("samples", [PIXELS.astype(np.uint16) << 4, PIXELS[..., 0].astype(np.uint16) << 2])
def test_few_bits_in_sixteen_are_no_black_image(samples):
    """Significant bits (sBIT) say how deep the original was; the samples of a PNG are scaled all the same."""
    with pytest.raises(
        image.ImageError, match=r"brightest sample is .* fewer than 16 bits are in use"
    ) as caught:
        image.decode(deep_png(samples, (b"sBIT", bytes([12] * (3 if samples.ndim == 3 else 1)))))
    assert caught.value.code == "unsupported_format"


def test_the_deep_color_that_is_transparent_becomes_white():
    grey = np.array([[0, 1, 65_535]], np.uint16)
    assert image.decode(deep_png(grey, (b"tRNS", b"\0\1")))[0, :, 0].tolist() == [0, 255, 255]
    colors = np.array([[[0, 0, 0], [1, 2, 3], [9, 9, 65_535]]], np.uint16)
    found = image.decode(deep_png(colors, (b"tRNS", struct.pack(">HHH", 1, 2, 3))))
    assert found.tolist() == [[[0, 0, 0], [255, 255, 255], [0, 0, 255]]]


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# The same with red and blue exchanged: what it calls red is blue.
SWAPPED = SRGB.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_colors_are_converted_from_the_profile_of_the_file(kind):
    plain = image.decode(pictures.encode(PIXELS, kind))
    converted = image.decode(pictures.encode(PIXELS, kind, icc_profile=SWAPPED))
    assert np.abs(converted[..., ::-1].astype(int) - plain).max() <= 1
    np.testing.assert_array_equal(image.decode(pictures.encode(PIXELS, kind, icc_profile=SRGB)), plain)


def test_profiles_of_transparent_grey_and_palette_images():
    see_through = Image.fromarray(PIXELS).convert("RGBA")
    see_through.putalpha(255)
    for picture, expected in [
        (see_through, PIXELS[..., ::-1]),
        (Image.fromarray(PIXELS[..., 0]), np.repeat(PIXELS[..., :1], 3, -1)),
        (Image.new("P", (4, 3), 1), None),
    ]:
        if expected is None:
            picture.putpalette([0, 0, 0, 250, 100, 10])
            expected = np.full((3, 4, 3), (10, 100, 250))
        found = image.decode(pictures.encode(picture, icc_profile=SWAPPED))
        assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("mode", "profile", "message"),
    [
        ("RGB", b"no profile", "cannot be used"),
        ("RGB", SRGB[:200], "cannot be used"),
        ("CMYK", SRGB, "its colour profile is of RGB, its pixels are CMYK"),
        ("RGB", SRGB.replace(b"RGB XYZ", b"5CLRXYZ"), "5CLR"),
    ],
)
def test_a_profile_that_says_nothing_is_named(mode, profile, message):
    content = pictures.encode(Image.new(mode, (4, 4)), "TIFF", icc_profile=profile)
    with pytest.raises(image.ImageError, match=message) as caught:
        image.decode(content)
    assert caught.value.code == "unsupported_format"


# What decoders were seen to raise, and what nobody has seen yet.
RAISED = [OverflowError, MemoryError, RecursionError, SyntaxError, KeyError, AssertionError, struct.error]
RAISED += [zlib.error, UserWarning, NotImplementedError, UnicodeDecodeError]


@pytest.mark.parametrize("kind", RAISED)
def test_whatever_a_decoder_raises_is_an_error_of_that_image(monkeypatch, kind):
    def fails(*_, **__):
        raise kind("utf-8", b"x", 0, 1, "why") if kind is UnicodeDecodeError else kind("why")

    monkeypatch.setattr(Image, "open", fails)
    monkeypatch.setattr(kornia_rs.io, "decode_image_png_u8", fails)
    with pytest.raises(image.ImageError, match=r"the image cannot be decoded: .*why") as caught:
        image.decode(pictures.encode(PIXELS))
    lacks = kind in (MemoryError, RecursionError)
    assert caught.value.code == ("unreadable" if lacks else "truncated")


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_who_ends_the_process_ends_it(monkeypatch, kind):
    def fails(*_, **__):
        raise kind

    monkeypatch.setattr(Image, "open", fails)
    monkeypatch.setattr(kornia_rs.io, "decode_image_png_u8", fails)
    with pytest.raises(kind):
        image.decode(pictures.encode(PIXELS))


def test_storage_is_no_decoder():
    with pytest.raises(StorageError, match="gone"), image.boundary("truncated", "x"):
        raise StorageError("gone")


def test_a_palette_that_overflows_is_damage():
    """One byte of the tag table changed: its numbers have 32 bits."""
    tags, strips = pictures.tiff_page(PIXELS[..., 0], 3)
    content = pictures.tiff((tags | {320: (4, [2**31] * 768)}, strips))
    with pytest.raises(image.ImageError, match="the image cannot be decoded") as caught:
        image.decode(content)
    assert caught.value.code == "truncated"


def test_bytes_are_counted_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(image, "MAX_FILE_BYTES", 100)
    with pytest.raises(image.ImageError, match="at most 100 are read") as caught:
        image.decode(pictures.encode(PIXELS))
    assert caught.value.code == "too_large"


def test_transparency_is_blended_over_white():
    picture = Image.fromarray(PIXELS).convert("RGBA")
    picture.putalpha(0)
    assert (image.decode(pictures.encode(picture)) == 255).all()
    palette = Image.fromarray(PIXELS).quantize(8)
    assert image.decode(pictures.encode(palette, transparency=0)).max() == 255


def test_cmyk_is_converted():
    decoded = image.decode(pictures.encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))
    np.testing.assert_array_equal(decoded[0, 0], [255, 0, 0])


@pytest.mark.parametrize("name", pictures.broken())
def test_every_kind_of_damage_has_its_code(name):
    content, code = pictures.broken()[name]
    with pytest.raises(image.ImageError) as caught:
        image.decode(content)
    assert caught.value.code == code


def test_random_damage_never_raises_anything_else():
    content = bytearray(pictures.encode(pictures.gradient(60, 90)))
    draw = np.random.default_rng(0)
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(content)
        for place in draw.integers(8, len(damaged), 8):
            damaged[place] = draw.integers(256)
        try:
            outcomes.add(image.decode(bytes(damaged)).shape[-1])
        except image.ImageError as error:
            outcomes.add(error.code)
    assert outcomes <= {3, "truncated", "unsupported_format", "too_many_pixels"}
    assert "truncated" in outcomes


def test_fit_keeps_the_whole_field_and_its_aspect_ratio():
    fitted = image.fit(pictures.gradient(460, 700), 224, 336)
    assert fitted.shape == (224, 336, 3)
    top, left, height, width = image.placement(460, 700, 224, 336)
    assert (top, left, height, width) == (1, 0, 221, 336)
    assert (fitted[0] == image.FILL).all()
    inner = fitted[top : top + height, left : left + width]
    # corners of the field are still corners: nothing was cropped
    np.testing.assert_allclose(
        inner[[0, 0, -1, -1], [0, -1, 0, -1], :2], [[0, 0], [255, 0], [0, 255], [255, 255]], atol=2
    )


def test_fit_does_not_change_an_image_of_the_right_size():
    np.testing.assert_array_equal(image.fit(PIXELS, *PIXELS.shape[:2]), PIXELS)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2000, 10)])
def test_fit_takes_any_shape(size):
    assert image.fit(np.zeros((*size, 3), np.uint8), 96, 144).shape == (96, 144, 3)


@pytest.mark.parametrize(
    ("size", "within", "expected"),
    [((100, 300), (50, 60), (20, 60)), ((100, 300), (10, 300), (10, 30)), ((10, 20), (50, 60), (10, 20))],
)
def test_shrink_keeps_the_aspect_ratio_and_never_enlarges(size, within, expected):
    found = image.shrink(pictures.gradient(*size), *within)
    assert found.shape == (*expected, 3)
    if size == expected:
        np.testing.assert_array_equal(found, pictures.gradient(*size))


ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


def filtered_rows(pixels, rng):
    """Lines of PNG: each with a filter drawn at random."""
    before = np.zeros(3 * pixels.shape[1] + 3, np.uint8)
    for row in pixels:
        line = np.concatenate([np.zeros(3, np.uint8), row.ravel()])
        x, a, b, c = (part.astype(int) for part in (line[3:], line[:-3], before[3:], before[:-3]))
        p = a + b - c
        nearest = np.argsort([abs(p - a), abs(p - b), abs(p - c)], axis=0, kind="stable")[0]
        paeth = np.choose(nearest, [a, b, c])
        kind = int(rng.integers(5))
        guess = (0, a, b, (a + b) // 2, paeth)[kind]
        yield bytes([kind]) + ((x - guess) % 256).astype(np.uint8).tobytes()
        before = line


def any_png(rng):
    """A PNG of 8-bit RGB: any size, filters, interlace, compression and chunks; and its parts."""
    height, width = rng.integers(1, 40, 2)
    pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    interlaced = bool(rng.integers(2))
    passes = [pixels[y::dy, x::dx] for y, x, dy, dx in ADAM7] if interlaced else [pixels]
    lines = b"".join(line for one in passes if one.size for line in filtered_rows(one, rng))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced)
    return pixels, head, lines, int(rng.integers(10))


def assembled(head, stream, rng):
    cut = int(rng.integers(1, len(stream) + 1)) if stream else 0
    return png_of((b"IHDR", head), (b"IDAT", stream[:cut]), (b"IDAT", stream[cut:]), (b"IEND", b""))


@pytest.mark.parametrize("seed", range(150))
def test_plain_pngs_are_decoded_fast_to_the_same_pixels(seed):
    rng = np.random.default_rng(seed)
    pixels, head, lines, level = any_png(rng)
    data = assembled(head, zlib.compress(lines, level), rng)
    fast = image._decode_fast(container.png_content(data))
    np.testing.assert_array_equal(fast, pixels)
    np.testing.assert_array_equal(image.decode(data), pixels)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)


def spoiled(data, rng):
    """Bytes changed, cut off or added."""
    place, kind = int(rng.integers(len(data))), rng.integers(3)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes([data[place] ^ int(rng.integers(1, 256))]) + data[place + 1 :]
    return data + rng.bytes(int(rng.integers(1, 2_000)))


def outcome(data):
    try:
        return image.decode(data).tolist()
    except image.ImageError as error:
        return error.code, error.message


@pytest.mark.parametrize("seed", range(100))
def test_damage_with_right_checksums_has_the_outcome_of_pillow(seed, monkeypatch):
    """In the lines, or in their compressed stream. A stream whose Adler-32 alone is wrong is accepted:
    decision page 7 says why."""
    rng = np.random.default_rng(seed)
    _, head, lines, level = any_png(rng)
    in_lines = bool(rng.integers(2))
    stream = (
        zlib.compress(spoiled(lines, rng), level) if in_lines else spoiled(zlib.compress(lines, level), rng)
    )
    data = assembled(head, stream, rng)
    found = outcome(data)
    monkeypatch.setattr(image, "_decode_fast", lambda content: None)
    if found != (expected := outcome(data)):
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stream[2:])
        assert (len(inflated), in_lines) == (len(lines), False)
        with pytest.raises(zlib.error, match="incorrect data check"):
            zlib.decompress(stream)
        assert expected[0] == "truncated"


@pytest.mark.parametrize("seed", range(100))
def test_a_flipped_bit_of_a_file_is_found_by_its_checksums(seed, monkeypatch):
    """Also in the last of its chunks of pixels, which may be empty, and in the checksums themselves."""
    rng = np.random.default_rng(seed)
    _, head, lines, level = any_png(rng)
    data = bytearray(assembled(head, zlib.compress(lines, level), rng))
    data[int(rng.integers(8, len(data)))] ^= 1 << int(rng.integers(8))
    found = outcome(bytes(data))
    monkeypatch.setattr(image, "_decode_fast", lambda content: None)
    assert found == outcome(bytes(data))
    assert found[0] in ("truncated", "too_many_pixels", "unsupported_format")


@pytest.mark.parametrize(
    "data",
    [
        pictures.encode(PIXELS[..., 0]),
        pictures.encode(Image.fromarray(PIXELS).convert("RGBA")),
        pictures.encode(Image.fromarray(PIXELS).convert("P")),
        pictures.encode(PIXELS, transparency=(230, 150, 190)),
        pictures.encode(PIXELS[..., 0].astype(np.uint16) * 257),
    ],
)
def test_other_pngs_are_pillows(data):
    assert container.png_content(data).rgb8_size is None
