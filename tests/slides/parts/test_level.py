"""Which tiles a rectangle needs, and where they are in the file."""

import numpy as np
import pytest

from bcd.errors import ImageError
from bcd.slides.parts.level import Level


def made(n_parts: int, **changes: int) -> Level:
    """5 x 3 tiles of 64 x 32 px, each part of 10 bytes."""
    values = {"width_px": 300, "height_px": 70, "tile_width_px": 64, "tile_height_px": 32}
    places, n_bytes = np.arange(15 * n_parts, dtype=np.uint64) * 10, np.full(15 * n_parts, 10)
    return Level(**values, places=places, n_bytes=n_bytes, decode=None, file_bytes=1_000, **changes)


@pytest.mark.parametrize(
    ("rectangle", "tiles"),
    [
        ((0, 0, 64, 32), [(0, 0, 0)]),
        ((63, 31, 2, 2), [(0, 0, 0), (1, 64, 0), (5, 0, 32), (6, 64, 32)]),
        ((-50, -50, 51, 51), [(0, 0, 0)]),
        ((260, 65, 500, 500), [(14, 256, 64)]),
        ((-9, 0, 9, 10), []),
    ],
)
def test_a_rectangle_needs_the_tiles_that_it_touches(rectangle, tiles):
    assert list(made(1).tiles(*rectangle)) == tiles


def test_a_tile_has_a_part_or_one_of_each_colour():
    assert made(1).parts(14) == [(140, 10)]
    assert made(3).parts(14) == [(140, 10), (290, 10), (440, 10)]


@pytest.mark.parametrize(("place", "n_bytes"), [(995, 10), (0, 6 * 64 * 32 + 2**16 + 1), (2**63, 10)])
def test_a_part_outside_the_file_or_too_large_is_damage(place, n_bytes):
    level = made(1)
    level.places[3], level.n_bytes[3] = place, n_bytes
    with pytest.raises(ImageError, match=r"a damaged tile: [\d,]+ bytes") as caught:
        level.parts(3)
    assert caught.value.code == "unreadable"
