import numpy as np
import pytest
from PIL import Image

from bcd.serving.viewer.deepzoom import TILE_PX, DeepZoom, read_tile
from bcd.slides import slide
from tests import viewed
from tests.slides.test_slide import fake

LEVELS = DeepZoom(viewed.WIDTH_PX, viewed.HEIGHT_PX)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    path = tmp_path_factory.mktemp("zoom") / "a.tif"
    path.write_bytes(viewed.pyramid(viewed.slide_pixels()))
    with slide.open_slide(path) as found:
        assert found.downsamples == (1, 2, 4)
        yield found


def test_levels_are_those_of_deep_zoom():
    assert (LEVELS.last, LEVELS.size(10), LEVELS.size(9), LEVELS.size(0)) == (
        10,
        (900, 700),
        (450, 350),
        (1, 1),
    )
    assert [LEVELS.downsample(level) for level in (10, 7, 0)] == [1, 8, 1024]
    assert DeepZoom(1, 1).last == 0
    assert DeepZoom(1025, 3).size(10) == (513, 2)


def test_tiles_cover_each_level_and_overlap_by_one_pixel():
    for level in (10, 9, 8, 0):
        width, height = LEVELS.size(level)
        seen = np.zeros((height, width), int)
        for row in range(-(-height // TILE_PX)):
            for column in range(-(-width // TILE_PX)):
                left, top, w, h = LEVELS.box(level, column, row)
                assert max(w, h) <= TILE_PX + 2
                seen[top : top + h, left : left + w] += 1
                inner = seen[row * TILE_PX :, column * TILE_PX :][:TILE_PX, :TILE_PX]
                assert inner.all()
        assert seen.min() == 1
        assert seen.max() <= 4


@pytest.mark.parametrize("place", [(11, 0, 0), (-1, 0, 0), (10, 2, 0), (10, 0, 2), (10, -1, 0), (0, 1, 0)])
def test_there_is_no_tile_elsewhere(place):
    assert LEVELS.box(*place) is None


def test_the_largest_level_has_the_slides_own_pixels(opened):
    for place in ((0, 0), (1, 0), (1, 1)):
        left, top, width, height = box = LEVELS.box(10, *place)
        expected = viewed.slide_pixels()[top : top + height, left : left + width]
        np.testing.assert_array_equal(read_tile(opened, 1, box), expected)


def test_smaller_levels_are_means(opened):
    """Those of the pyramid, and below its last level means of that."""
    pixels = Image.fromarray(viewed.slide_pixels())
    for level in (9, 8, 7):
        factor = LEVELS.downsample(level)
        left, top, width, height = box = LEVELS.box(level, 0, 0)
        found = read_tile(opened, factor, box)
        part = left * factor, top * factor, (left + width - 1) * factor, (top + height - 1) * factor
        expected = np.asarray(pixels.resize((width - 1, height - 1), Image.Resampling.BOX, part), int)
        assert np.abs(found[:-1, :-1].astype(int) - expected).max() <= 2


def test_a_slide_without_a_pyramid_is_read_in_blocks():
    white, sizes = fake(100_000, 60_000)
    levels = DeepZoom(100_000, 60_000)
    box = levels.box(12, 1, 1)
    assert read_tile(white, levels.downsample(12), box).shape == (512, 512, 3)
    assert max(w * h for w, h in sizes) <= 2048**2
    assert sum(w * h for w, h in sizes) < 1.2 * (TILE_PX * 32) ** 2


def test_the_smallest_level_that_suffices_is_read():
    white, sizes = fake(65_536, 65_536, downsamples=(1.0, 4.0003, 16.001))
    read_tile(white, 16, (0, 0, 255, 255))
    read_tile(white, 8, (0, 0, 255, 255))
    assert [max(size) for size in sizes] == [255, 510]


def test_a_real_slide_has_its_own_pixels_and_their_means(real_data):
    with slide.open_slide(real_data / "slides/CMU-1-Small-Region.svs") as found:
        levels = DeepZoom(found.width_px, found.height_px)
        box = levels.box(levels.last, 1, 2)
        np.testing.assert_array_equal(read_tile(found, 1, box), found.read(509, 1019, 0, 512, 512))
        small = read_tile(found, 16, levels.box(levels.last - 4, 0, 0))
        means = found.read(0, 0, 0, 138 * 16, 185 * 16).reshape(185, 16, 138, 16, 3).mean((1, 3))
        assert np.abs(small[:185, :138] - means).max() <= 1
