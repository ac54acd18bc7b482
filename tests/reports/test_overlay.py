"""Colours of the evidence over an image: which, how strong, and in the right place."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageColor

from bcd import schema
from bcd.errors import DataError
from bcd.reports import overlay
from tests import pictures

BLUE, VERMILION = (np.array(ImageColor.getrgb(name)) for name in (overlay.BLUE, overlay.VERMILION))


def white(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 255, np.uint8)


def mixed(colour: np.ndarray, strength: float) -> np.ndarray:
    """White paper under a colour of the given strength."""
    alpha = overlay.OPACITY * strength
    return np.round(255 * (1 - alpha) + colour * alpha)


@pytest.mark.parametrize(
    ("value", "colour", "strength"),
    [(4, VERMILION, 1), (-4, BLUE, 1), (1, VERMILION, 0.25), (-2, BLUE, 0.5), (99, VERMILION, 1)],
)
def test_the_sign_is_the_colour_and_the_size_its_strength(
    value: float, colour: np.ndarray, strength: float
) -> None:
    drawn = overlay.overlay(white(6, 8), np.full((2, 3), value), limit=4)
    np.testing.assert_allclose(drawn, np.broadcast_to(mixed(colour, strength), (6, 8, 3)), atol=1)


def test_the_part_of_a_map_that_covers_an_image_is_where_it_was_fitted() -> None:
    """A field of 200 x 92 in an input of 96 x 64: bars of 10 px above and below."""
    assert overlay.covers(92, 200, 64, 96) == {"top": 10 / 64, "left": 0, "bottom": 54 / 64, "right": 1}


def test_nothing_is_drawn_at_zero() -> None:
    picture = pictures.gradient()
    before = picture.copy()
    drawn = overlay.overlay(picture, np.zeros((7, 11)), 1e-6, 224, 336)
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn, before)
    np.testing.assert_array_equal(picture, before)


def test_a_map_is_enlarged_bilinearly() -> None:
    drawn = overlay.overlay(white(1, 8), np.array([[0.0, 1.0]]), limit=1)
    # Between the centres of the two cells, at 2 and 6 pixels, the strength rises evenly.
    expected = np.clip((np.arange(8) + 0.5 - 2) / 4, 0, 1)
    np.testing.assert_allclose(drawn[0], [mixed(VERMILION, s) for s in expected], atol=1)


def test_a_cell_is_drawn_where_the_network_saw_it() -> None:
    """A field in a square input has bars above and below it: cell rows 0 and 3 of 4 show nothing of it."""
    evidence = np.zeros((4, 4))
    evidence[[0, 3]], evidence[1, 3] = -8, 8
    drawn = overlay.overlay(white(100, 200), evidence, 8, 128, 128).astype(int)
    # The field covers rows 1 and 2 of the map; a cell of it is 50 x 50 px here.
    np.testing.assert_allclose(drawn[25, 175], mixed(VERMILION, 1), atol=3)
    np.testing.assert_array_equal(drawn[60:75, :120], 255)
    # Stretched over the field instead, the cell would be at half this height.
    assert (drawn[:, 175, 0] > drawn[:, 175, 2]).nonzero()[0].mean() == pytest.approx(25, abs=12)


def test_an_input_that_is_no_multiple_of_the_cells() -> None:
    """80 px have 3 cells of 26.7 px, not of 32: the image's last column is the end of the last cell."""
    drawn = overlay.overlay(white(80, 80), np.array([[0.0, 0, 1]] * 3), 1, 80, 80)
    first = int(np.argmax(drawn[40, :, 2] < mixed(VERMILION, 0.5)[2]))
    assert first == pytest.approx(80 * 2 / 3, abs=1)  # half strength at the border of the cells


@pytest.mark.parametrize(("height", "width"), [(46, 70), (1, 1), (1, 90), (90, 1), (33, 33)])
@pytest.mark.parametrize("block_px", [1, 7, 70, 1_000])
def test_block_by_block_gives_the_bytes_of_the_whole(
    height: int, width: int, block_px: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    evidence = rng.normal(0, 3, (7, 11))
    monkeypatch.setattr(overlay, "BLOCK_PX", height * width)
    whole = overlay.overlay(pixels, evidence, 4, 224, 336)
    monkeypatch.setattr(overlay, "BLOCK_PX", block_px)
    np.testing.assert_array_equal(overlay.overlay(pixels, evidence, 4, 224, 336), whole)


WITHIN = """
import resource, sys
import numpy as np
import psutil
from bcd import schema
from bcd.errors import DataError
from bcd.reports import overlay
height, width, bytes_per_pixel = map(int, sys.argv[1:])
pixels = np.full((height, width, 3), 255, np.uint8)
most = psutil.Process().memory_info().vms + bytes_per_pixel * height * width
resource.setrlimit(resource.RLIMIT_AS, (most, most))
overlay.overlay(pixels, np.ones((7, 11)), 4, 224, 336)
"""


@pytest.mark.process
@pytest.mark.parametrize(("height", "width"), [(2_000, 4_000), (8_000, 1_000)])
@pytest.mark.parametrize(("bytes_per_pixel", "enough"), [(16, True), (4, False)])
def test_a_large_image_needs_little_more_memory_than_itself(
    height: int, width: int, bytes_per_pixel: int, enough: bool
) -> None:
    """3 bytes a pixel for the result and 4 for the enlarged map; drawn whole it would be some 50."""
    command = [sys.executable, "-c", WITHIN, *map(str, (height, width, bytes_per_pixel))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode == 0) == enough, done.stderr
    assert enough or "MemoryError" in done.stderr


def test_the_shared_scale() -> None:
    assert overlay.scale([np.linspace(-1, 1, 201), -np.linspace(0, 10, 2001)]) == pytest.approx(9.9, abs=0.1)
    assert overlay.scale([]) == 1
    assert overlay.scale([np.zeros((2, 3))]) == 1


def test_the_legend_runs_from_full_blue_over_nothing_to_full_vermilion() -> None:
    strip = overlay.legend(101, 5)
    assert strip.shape == (5, 101, 3)
    for column, expected in ((0, mixed(BLUE, 1)), (50, [255] * 3), (100, mixed(VERMILION, 1))):
        np.testing.assert_allclose(strip[:, column], np.broadcast_to(expected, (5, 3)), atol=1)


def row(path):
    """A row of the predictions table, with a map of 3 x 5 cells: an input of 96 x 160 px."""
    evidence = np.linspace(-6, 6, 15, dtype=np.float32)
    return {
        schema.IMAGE_ID: "a.png",
        schema.URI: str(path),
        schema.X_LEVEL0_PX: None,
        schema.HEIGHT_PX: 46,
        schema.WIDTH_PX: 70,
        schema.EVIDENCE: evidence.tolist(),
        schema.EVIDENCE_HEIGHT: 3,
        schema.EVIDENCE_WIDTH: 5,
        schema.ERROR: None,
    }


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(pictures.encode(pictures.gradient()))
    return path


def test_a_row_is_drawn_over_the_image_it_names(picture):
    evidence = np.reshape(row(picture)[schema.EVIDENCE], (3, 5))
    expected = overlay.overlay(pictures.gradient(), evidence, 4, 96, 160)
    np.testing.assert_array_equal(overlay.overlay_of_row(row(picture)), expected)
    expected = overlay.overlay(pictures.gradient(), evidence, 9, 90, 150)
    np.testing.assert_array_equal(overlay.overlay_of_row(row(picture), None, 9, 90, 150), expected)
    # As pandas gives it, where a missing number is NaN.
    missing = row(picture) | {schema.X_LEVEL0_PX: float("nan"), schema.ERROR: float("nan")}
    np.testing.assert_array_equal(overlay.overlay_of_row(missing), overlay.overlay_of_row(row(picture)))


def test_a_tile_is_drawn_over_the_pixels_given(picture):
    tile = row(picture) | {schema.X_LEVEL0_PX: 0}
    with pytest.raises(DataError, match="give its pixels"):
        overlay.overlay_of_row(tile)
    np.testing.assert_array_equal(
        overlay.overlay_of_row(tile, pictures.gradient()), overlay.overlay_of_row(row(picture))
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [({schema.ERROR: "truncated"}, r"not scored \(truncated\)"), ({schema.WIDTH_PX: 71}, "71 x 46 px were")],
)
def test_a_row_without_its_map_or_image_is_named(change, reason, picture):
    with pytest.raises(DataError, match=f"a.png: .*{reason}"):
        overlay.overlay_of_row(row(picture) | change)


def test_a_map_without_a_bias_has_a_limit_of_its_own():
    values = np.array([[0.0, 0.01], [-0.02, 0.02]])
    assert overlay.limit_of(values, 0.3) == overlay.LIMIT
    for bias in (None, float("nan")):
        assert overlay.limit_of(values, bias) == overlay.scale([values]) == pytest.approx(0.02)
