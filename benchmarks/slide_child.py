"""Seconds of a rectangle of a slide that OpenSlide reads in a child process, over those in the same process.

    python -m benchmarks.slide_child CMU-1-Small-Region.svs

Both in turns, over places on a grid in the order in which an archive job reads them; the pixels are equal.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bcd.slides import tile
from bcd.slides.readers import openslide_client, openslide_server

Read = Callable[[int, int], np.ndarray]


def seconds(read: Read, places: list[tuple[int, int]]) -> float:
    """Of one rectangle."""
    started = time.perf_counter()
    for x, y in places:
        read(x, y)
    return (time.perf_counter() - started) / len(places)


def main() -> None:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("slide", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=int, default=336)
    parser.add_argument("--height", type=int, default=224)
    given = parser.parse_args()
    width, height = given.width, given.height
    reader = openslide_client.OpenSlideReader(given.slide)
    grid = tile.grid(*reader.facts.sizes[0], (1.0, 1.0), 1.0, width, height)
    order = grid.near(np.arange(len(grid)))
    places = list(zip(grid.x_level0_px[order].tolist(), grid.y_level0_px[order].tolist(), strict=True))

    def here(x: int, y: int) -> np.ndarray:
        call = {"call": "read", "path": str(given.slide), "key": "a", "x": x, "y": y, "level": 0}
        answered = openslide_server.answer_call(call | {"width": width, "height": height})
        assert answered
        return np.frombuffer(answered[1], np.uint8).reshape(height, width, 3)

    def apart(x: int, y: int) -> np.ndarray:
        return reader.read(x, y, 0, width, height)

    assert all((here(*place) == apart(*place)).all() for place in places)
    ratios = []
    for _ in range(given.rounds):
        alone, in_child = seconds(here, places), seconds(apart, places)
        ratios.append(in_child / alone)
        print(f"here {alone * 1e3:.2f} ms, in a child {in_child * 1e3:.2f} ms: {ratios[-1]:.3f}")
    print(f"median of {given.rounds}: {np.median(ratios):.3f}")


if __name__ == "__main__":
    main()
