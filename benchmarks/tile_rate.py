"""Tiles of a slide read and fitted a second on one core: plain JPEG tiles copied, against OpenSlide alone.

    python -m benchmarks.tile_rate CMU-1-Small-Region.svs

Both in turns in one process, over all tiles of the slide in the order in which an archive job reads them.
"""

import argparse
import time
from dataclasses import replace

import numpy as np

from bcd.imaging import image
from bcd.slides import slide, tile

HEIGHT_PX, WIDTH_PX = 460, 700


def seconds(path: str, alone: bool) -> float:
    """Seconds of a tile, those of OpenSlide's process included."""
    with slide.open_slide(path) as opened:
        mpp = (opened.mpp_x, opened.mpp_y)
        grid = tile.grid(opened.width_px, opened.height_px, mpp, opened.mpp_x, WIDTH_PX, HEIGHT_PX)
        order = grid.near(np.arange(len(grid)))
        reader = replace(opened, tiles=None) if alone else opened
        started = time.perf_counter()
        for x, y in zip(grid.x_level0_px[order], grid.y_level0_px[order], strict=True):
            image.fit(reader.read(x, y, 0, WIDTH_PX, HEIGHT_PX), 224, 336)
        return (time.perf_counter() - started) / len(grid)


def main() -> None:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("slide")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    ratios = []
    for _ in range(given.rounds + 1):
        openslide, copied = (seconds(given.slide, alone) for alone in (True, False))
        ratios.append(openslide / copied)
        print(f"OpenSlide {openslide * 1e3:.1f} ms, copied {copied * 1e3:.1f} ms a tile: {ratios[-1]:.2f}")
    # The first round warms up.
    print(f"median {np.median(ratios[1:]):.2f}")


if __name__ == "__main__":
    main()
