import numpy as np
import pytest
from PIL import Image

from bcd import image
from tests import pictures

PIXELS = pictures.gradient()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_lossless_pictures_are_decoded_exactly(kind):
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


def test_whiter_than_white_is_white():
    """A TIFF of 32-bit whole numbers: 70000 / 257 is more than a byte holds."""
    deep = np.array([[0, 257, 65535], [70000, 2**30, -5]], np.int32)
    decoded = image.decode(pictures.encode(Image.fromarray(deep), "TIFF"))
    assert decoded[..., 0].tolist() == [[0, 1, 255], [255, 255, 0]]


def test_transparency_lies_over_white():
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


def test_fit_leaves_a_picture_of_the_right_size_alone():
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
