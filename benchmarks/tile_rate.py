"""Tiles of a slide read and fitted a second on one core: by the reader of JPEG tiles, against OpenSlide.

    python -m benchmarks.tile_rate CMU-1-Small-Region.svs

Both in turns in one process, over all tiles of the slide in the order in which an archive job reads them.
"""

import argparse
import time

import numpy as np
import openslide

from bcd.imaging import image
from bcd.slides import slide, tile
from bcd.slides.parts import tiff_reader

HEIGHT_PX, WIDTH_PX = 460, 700


def seconds(path: str, alone: bool) -> float:
    """CPU seconds of a tile."""
    with slide.open_slide(path) as opened, openslide.OpenSlide(path) as handle:
        mpp = (opened.mpp_x, opened.mpp_y)
        grid = tile.grid(opened.width_px, opened.height_px, mpp, opened.mpp_x, WIDTH_PX, HEIGHT_PX)
        order = grid.near(np.arange(len(grid)))
        assert isinstance(opened.reader, tiff_reader.TiffReader), f"{path} is read by OpenSlide only"

        def read(x: int, y: int) -> np.ndarray:
            if not alone:
                return opened.read(x, y, 0, WIDTH_PX, HEIGHT_PX)
            return np.asarray(handle.read_region((x, y), 0, (WIDTH_PX, HEIGHT_PX)).convert("RGB"))

        started = time.process_time()
        places = zip(grid.x_level0_px[order].tolist(), grid.y_level0_px[order].tolist(), strict=True)
        for place in places:
            image.fit(read(*place), 224, 336)
        return (time.process_time() - started) / len(grid)


def main() -> None:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("slide")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    ratios = []
    for _ in range(given.rounds + 1):
        theirs, ours = (seconds(given.slide, alone) for alone in (True, False))
        ratios.append(theirs / ours)
        print(f"OpenSlide {1 / theirs:.1f}, the reader {1 / ours:.1f} tiles a second: {ratios[-1]:.2f}")
    # The first round warms up.
    print(f"median {np.median(ratios[1:]):.2f}")


if __name__ == "__main__":
    main()
