import numpy as np
import pytest

from bcd.errors import ImageError
from bcd.slides import tile


def test_the_grid_of_the_small_slide_by_hand():
    # 700 px at 0.49 are 343 µm, at 0.499 µm/px 687.375 px; 460 px are 451.703 px
    grid = tile.grid(2220, 2967, (0.499, 0.499), 0.49, 700, 460)
    assert (grid.columns, grid.rows, len(grid)) == (4, 7, 28)
    assert (grid.width_level0_px, grid.height_level0_px) == (687, 452)
    assert grid.x_level0_px[:5].tolist() == [0, 687, 1375, 2062, 0]
    assert grid.y_level0_px[::4].tolist() == [0, 452, 903, 1355, 1807, 2259, 2710]
    assert grid.x_level0_px.dtype == grid.y_level0_px.dtype == np.int64


@pytest.mark.parametrize("side", [1, 699, 700, 701, 1400, 2103, 99_999])
@pytest.mark.parametrize("slide_mpp", [0.49, 0.2528, 0.499])
def test_the_grid_covers_the_slide_and_no_more(side, slide_mpp):
    grid = tile.grid(side, side, (slide_mpp, slide_mpp), 0.49, 700, 700)
    step = 700 * 0.49 / slide_mpp
    assert (grid.columns - 1) * step < side <= grid.columns * step + 0.5
    assert grid.x_level0_px.max() < side
    # rounded each for itself: no error adds up, and neighbours leave at most a pixel
    edges = np.unique(grid.x_level0_px)
    np.testing.assert_allclose(edges, np.arange(grid.columns) * step, atol=0.5)
    assert (np.abs(np.diff(edges) - grid.width_level0_px) <= 1).all()


def test_a_slide_that_divides_evenly_has_no_sliver():
    assert (tile.grid(1400, 920, (0.49, 0.49), 0.49, 700, 460).columns) == 2
    assert (tile.grid(2800, 920, (0.245, 0.245), 0.49, 700, 460).columns) == 2


def test_axes_of_their_own_give_steps_of_their_own():
    grid = tile.grid(2800, 2800, (0.5, 0.25), 0.5, 700, 460)
    assert (grid.width_level0_px, grid.height_level0_px) == (700, 920)
    assert (grid.columns, grid.rows) == (4, 4)
    assert np.unique(grid.y_level0_px).tolist() == [0, 920, 1840, 2760]


def test_overlapping_tiles_reach_the_end_and_no_further():
    """Of 100 x 80 px, at steps of 50 and 20 px for half and three quarters of a side."""
    grid = tile.grid(430, 200, (0.5, 0.5), 0.5, 100, 80, 0.5)
    assert np.unique(grid.x_level0_px).tolist() == [0, 50, 100, 150, 200, 250, 300, 350]
    assert np.unique(grid.y_level0_px).tolist() == [0, 40, 80, 120]
    assert (grid.width_level0_px, grid.height_level0_px, grid.columns, grid.rows) == (100, 80, 8, 4)
    finer = tile.grid(100, 200, (0.5, 0.5), 0.5, 100, 80, 0.75)
    assert finer.x_level0_px.tolist() == [0] * 7
    assert finer.y_level0_px.tolist() == [0, 20, 40, 60, 80, 100, 120]


@pytest.mark.parametrize("side", [1, 699, 701, 2103, 9_999])
def test_without_overlap_the_grid_is_that_of_adjacent_tiles(side):
    step = 700 * 0.49 / 0.2528
    grid = tile.grid(side, side, (0.2528, 0.2528), 0.49, 700, 700, 0.0)
    assert np.unique(grid.x_level0_px).tolist() == [
        round(i * step) for i in range(max(1, int(np.ceil((side - 0.5) / step))))
    ]


def test_no_two_tiles_have_one_place():
    grid = tile.grid(40, 1, (0.5, 0.5), 0.5, 30, 30, 0.99)
    assert grid.x_level0_px.tolist() == list(range(11))
    assert len(grid) == grid.columns * grid.rows == 11


def test_the_number_of_tiles_is_bounded():
    with pytest.raises(ImageError, match="a smaller --tile-overlap") as found:
        tile.grid(100_000, 100_000, (0.25, 0.25), 0.49, 700, 460, 0.97)
    assert found.value.code == "too_many_tiles"
    with pytest.raises(ImageError):
        tile.grid(100_000, 100_000, (0.25, 0.25), 0.49, 700, 460, 1 - 2**-53)
    assert len(tile.grid(100_000, 100_000, (0.25, 0.25), 0.49, 700, 460, 0.9)) < 10**6


def test_boxes_scale_to_the_thumbnail():
    grid = tile.grid(2220, 2967, (0.499, 0.499), 0.49, 700, 460)
    assert grid.boxes().shape == (28, 4)
    np.testing.assert_allclose(grid.boxes(0.5)[5], [343.5, 226, 343.5, 226])


def test_neighbours_follow_each_other():
    grid = tile.grid(4 * 700, 3 * 460, (0.5, 0.5), 0.5, 700, 460)
    assert grid.near(np.arange(12)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]
    assert grid.near(np.array([2, 5, 8])).tolist() == [5, 2, 8]


def test_a_tile_is_named_after_its_slide_place_and_scale():
    assert tile.tile_id("a/b.svs", 687, 452, 0.49) == "a/b.svs#687,452,0.49"
    assert tile.tile_id("a.svs", *np.array([0, 9]), np.float64(0.2)) == "a.svs#0,9,0.2"
