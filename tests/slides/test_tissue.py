import numpy as np
import pytest
from PIL import Image

from bcd.errors import ImageError
from bcd.slides import slide, tissue
from tests import pictures

WHITE, PINK, PURPLE, GREY = (243, 243, 242), (230, 150, 180), (110, 70, 140), (150, 150, 150)


def glass(height=200, width=300, color=WHITE):
    """Empty glass with a scanner's noise, uint8 (height, width, 3)."""
    noise = np.random.default_rng(0).normal(0, 1.5, (height, width, 3))
    return np.clip(color + noise, 0, 255).astype(np.uint8)


def test_tissue_is_found_where_it_is():
    picture = glass()
    picture[50:150, 100:200] = glass(100, 100, PINK)
    picture[80:120, 120:180] = glass(40, 60, PURPLE)
    expected = np.zeros((200, 300), bool)
    expected[50:150, 100:200] = True
    np.testing.assert_array_equal(tissue.mask(picture), expected)


@pytest.mark.parametrize("color", [WHITE, (255, 255, 255), GREY, (0, 0, 0)])
def test_an_empty_slide_has_none(color):
    assert not tissue.mask(glass(color=color)).any()


@pytest.mark.parametrize("color", [PINK, PURPLE, (225, 190, 205)])
def test_a_full_slide_is_all_tissue(color):
    assert tissue.mask(glass(color=color)).all()
    two = glass(color=color)
    two[:, :100] = glass(200, 100, PURPLE)
    assert tissue.mask(two).all()


def test_pale_tissue_counts_beside_strong():
    picture = glass()
    picture[20:90, 20:280] = glass(70, 260, (225, 190, 205))
    picture[100:190, 20:280] = glass(90, 260, (160, 30, 130))
    assert tissue.mask(picture)[20:90, 20:280].all()


def test_yellowed_glass_is_no_tissue():
    picture = glass(color=(240, 238, 220))
    picture[50:150, 100:200] = glass(100, 100, PINK)
    assert tissue.mask(picture).mean() == 100 * 100 / (200 * 300)


def test_black_pen_and_the_outside_of_a_scan_are_none():
    picture = glass()
    picture[:, :40] = glass(200, 40, (12, 8, 20))  # strongly coloured, were it not black
    picture[60:90, 100:250] = (35, 30, 40)
    assert not tissue.mask(picture).any()


def test_specks_go_and_small_holes_are_filled():
    picture = glass(400, 400)
    picture[10:14, 10:14] = PINK  # dust
    picture[100:300, 100:300] = PINK
    picture[200:205, 200:205] = WHITE  # a vessel
    picture[150:180, 150:180] = WHITE  # a gap
    mask = tissue.mask(picture)
    assert not mask[:50, :50].any()
    assert mask[200:205, 200:205].all()
    assert not mask[150:180, 150:180].any()


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 16)])
def test_any_size_goes(size):
    assert tissue.mask(glass(*size, PINK)).all()
    assert not tissue.mask(glass(*size)).any()


def test_otsu_parts_two_classes():
    assert tissue.otsu(np.repeat([10, 20, 100, 110], 50)) in range(20, 100)
    assert tissue.otsu(np.array([], np.int32)) == 0
    assert tissue.otsu(np.full(9, 7)) == 0


def test_the_real_slide(real_data):
    with slide.open_slide(real_data / "slides/CMU-1-Small-Region.svs") as opened:
        thumbnail, _ = opened.thumbnail(600)
    mask = tissue.mask(thumbnail)
    assert 0.28 < mask.mean() < 0.42
    assert not mask[250:, :80].any()
    assert mask[300:580, 180:220].mean() > 0.9


def test_the_share_is_exact_for_any_box():
    mask = np.zeros((10, 20), bool)
    mask[2:6, 4:8] = True
    boxes = [
        (0, 0, 20, 10),
        (4, 2, 4, 4),
        (4, 2, 8, 4),
        (6.5, 2, 1, 1),
        (7.5, 5.5, 1, 1),
        (4.25, 2.25, 0.125, 0.5),
        (16, 0, 8, 20),
        (-4, 2, 16, 4),
        (30, 30, 5, 5),
    ]
    expected = [16 / 200, 1, 0.5, 1, 0.25, 1, 0, 16 / 64, 0]
    np.testing.assert_allclose(tissue.fraction(mask, np.array(boxes)), expected, atol=1e-9)
    assert tissue.fraction(mask, np.empty((0, 4))).shape == (0,)


def test_the_share_agrees_with_counting():
    draw = np.random.default_rng(1)
    mask = draw.random((37, 53)) > 0.5
    corner, size = draw.integers(0, 20, (50, 2)), draw.integers(1, 15, (50, 2))
    shares = tissue.fraction(mask, np.column_stack([corner, size]))
    counted = [mask[y : y + h, x : x + w].mean() for (x, y), (w, h) in zip(corner, size, strict=True)]
    np.testing.assert_allclose(shares, counted, atol=1e-9)


def test_an_empty_box_has_exactly_none():
    mask = np.zeros((300, 300), bool)
    mask[:150] = True
    y = np.random.default_rng(2).uniform(150, 280, 1000)
    boxes = np.column_stack([y / 3, y, np.full(1000, 27.3), np.full(1000, 17.9)])
    assert (tissue.fraction(mask, boxes) == 0).all()


def on_glass(colour, ink=None):
    """Glass of a colour, a round piece of stained tissue on it, and a stroke of a pen."""
    y, x = np.mgrid[:200, :300]
    through = np.ones((200, 300, 3))
    piece = (y - 100) ** 2 + (x - 90) ** 2 < 40**2
    through[piece] = (0.8, 0.55, 0.75)
    if ink is not None:
        through[20:180, 240:256] = ink
    noise = np.random.default_rng(0).normal(0, 1, through.shape)
    return (through * colour + noise).clip(0, 255).astype(np.uint8), piece


@pytest.mark.parametrize("colour", [(248, 248, 248), (240, 225, 200), (215, 215, 215), (225, 235, 240)])
@pytest.mark.parametrize("ink", [None, (0.1, 0.2, 0.7), (0.15, 0.6, 0.3), (0.05, 0.05, 0.05)])
def test_tissue_is_what_differs_from_the_glass_whatever_its_colour(colour, ink):
    picture, piece = on_glass(colour, ink)
    np.testing.assert_allclose(tissue.mask(picture).sum(), piece.sum(), rtol=0.02)
    assert (tissue.mask(picture) & ~piece).sum() < 0.02 * piece.sum()


def test_the_glass_is_found_by_its_colour():
    np.testing.assert_allclose(tissue.glass(on_glass((240, 225, 200))[0]), (240, 225, 200), atol=1)


@pytest.mark.parametrize("kind", ["1", "L", "P", "RGB"])
@pytest.mark.parametrize("factor", [1, 2, 10])
def test_a_given_mask_is_tissue_where_it_is_not_black(kind, factor):
    """Of any scale; a label of 1 in 255 counts."""
    labels = np.zeros((60 // factor, 80 // factor), np.uint8)
    labels[: 30 // factor, : 20 // factor] = 255 if kind == "1" else 1
    picture = Image.fromarray(labels)
    if kind == "P":
        picture.putpalette([0, 0, 0, 0, 0, 255])
    elif kind != "L":
        picture = picture.convert(kind)
    found = tissue.given_mask(pictures.encode(picture), (8000, 6000), (0, 0), (30, 40))
    expected = np.zeros((30, 40))
    expected[:15, :10] = 1
    np.testing.assert_array_equal(found, expected)


def test_a_finer_mask_gives_shares_of_pixels():
    labels = np.zeros((60, 80), np.uint8)
    labels[:, :1] = 7
    found = tissue.given_mask(pictures.encode(labels), (8000, 6000), (0, 0), (30, 40))
    np.testing.assert_allclose(found[:, :2], np.tile([0.5, 0.0], (30, 1)))


ALPHA = Image.new("RGBA", (80, 60))
SEE_THROUGH = pictures.encode(Image.new("P", (80, 60)), transparency=0)


@pytest.mark.parametrize(
    ("content", "bounds", "message"),
    [
        (pictures.encode(np.zeros((80, 60), np.uint8)), (0, 0), "it has 60 x 80 px, and the slide 8,000"),
        (pictures.encode(np.zeros((60, 84), np.uint8)), (0, 0), "another shape"),
        (pictures.encode(np.zeros((60, 80), np.uint16)), (0, 0), "expected a PNG with 1 to 8 bits"),
        (pictures.encode(ALPHA), (0, 0), "no transparency"),
        (SEE_THROUGH, (0, 0), "no transparency"),
        (pictures.encode(np.zeros((60, 80), np.uint8), "JPEG"), (0, 0), "expected a PNG"),
        (b"", (0, 0), "expected a PNG"),
        (pictures.encode(np.zeros((60, 80), np.uint8))[:50], (0, 0), "ends or is damaged"),
        (pictures.encode(np.zeros((60, 80), np.uint8)), (5, 0), "the slide has bounds"),
    ],
)
def test_a_mask_that_may_mean_something_else_is_refused(content, bounds, message):
    with pytest.raises(ImageError, match=message) as found:
        tissue.given_mask(content, (8000, 6000), bounds, (30, 40))
    assert found.value.code == "bad_mask"


@pytest.mark.parametrize("size", [(81, 60), (79, 60), (161, 120), (8, 6), (3, 2), (800, 600)])
def test_rounded_sides_of_a_mask_are_no_other_shape(size):
    tissue.given_mask(pictures.encode(Image.new("1", size)), (8000, 6000), (0, 0), (30, 40))
