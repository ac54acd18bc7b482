"""Slides of each format, and slides that are given: what reads them, their pixels, and the time of a tile.

    python -m benchmarks.slide_formats [SLIDE ...]

Each format is written as in the tests, with known pixels; a given slide is compared with OpenSlide. All tiles
of level 0 are read, row by row. The rows are those of a table in Markdown.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from bcd.slides import pixel_size, slide
from tests import pictures
from tests.slide_files import FORMATS, Format

SIDE_PX, HEIGHT_PX, WIDTH_PX = 256, 1_024, 1_536
# Of a slide that does not state it.
GIVEN = pixel_size.Given(fallback=0.25)


def row(name: str, opened: slide.Slide, truth: Callable[[int, int], np.ndarray]) -> str:
    """The row of a slide; `truth` gives the tile at a place."""
    n_tiles, worst, seconds = 0, 0, 0.0
    for y in range(0, opened.height_px, SIDE_PX):
        for x in range(0, opened.width_px, SIDE_PX):
            started = time.perf_counter()
            found = opened.read(x, y, 0, SIDE_PX, SIDE_PX)
            seconds += time.perf_counter() - started
            worst = max(worst, int(np.abs(found.astype(int) - truth(x, y)).max()))
            n_tiles += 1
    cells = name, opened.reader.facts.reader, f"{opened.mpp_x:.4g}", n_tiles, worst
    return f"| {' | '.join(map(str, cells))} | {1_000 * seconds / n_tiles:.2f} |"


def made(name: str, kind: Format, pixels: np.ndarray, folder: Path) -> str:
    """The row of a format."""
    margin = kind.corner_px
    sides = [-(-(side + 2 * margin) // SIDE_PX) * SIDE_PX for side in pixels.shape[:2]]
    canvas = np.full((*sides, 3), 255, np.uint8)
    canvas[margin:, margin:][: pixels.shape[0], : pixels.shape[1]] = pixels
    with slide.open_slide(kind.write(folder, pixels)) as opened:
        return row(name, opened, lambda x, y: canvas[y : y + SIDE_PX, x : x + SIDE_PX])


def given(path: str) -> str:
    """The row of a slide."""
    with slide.open_slide(path, GIVEN) as opened, openslide.OpenSlide(path) as handle:
        white = Image.new("RGBA", (SIDE_PX, SIDE_PX), "white")

        def truth(x: int, y: int) -> np.ndarray:
            region = handle.read_region((x, y), 0, (SIDE_PX, SIDE_PX))
            return np.asarray(Image.alpha_composite(white, region).convert("RGB"))

        return row(path, opened, truth)


def main() -> None:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("slides", nargs="*")
    slides = parser.parse_args().slides
    print(f"| slide | read by | µm/px | tiles of {SIDE_PX} px | largest difference, of 255 | ms a tile |")
    print("|---|---|---|---|---|---|")
    pixels = pictures.stained(HEIGHT_PX, WIDTH_PX)
    for name, kind in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            print(made(name, kind, pixels, Path(folder)), flush=True)
    for path in slides:
        print(given(path), flush=True)


if __name__ == "__main__":
    main()
