"""Tiles at the nearest pixel of a level, against OpenSlide, which interpolates between pixels (decision 10).

    python -m benchmarks.nearest_pixel CMU-1-Small-Region.svs --model runs/a/model

Of a pyramid made of the slide, whose second level is a quarter of the first, but for a pixel, as scanners
round it. With a model, also how much the probabilities of its tiles differ.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

import bcd
from bcd.imaging import image
from bcd.slides import slide
from tests.slides.parts.pyramids import page, write

FACTOR, MPP = 4, 0.5
HEIGHT_PX, WIDTH_PX = 200, 240


def pyramid(path: str, folder: str) -> Path:
    """The slide with a second level of a quarter, rounded up."""
    with slide.open_slide(path) as opened:
        whole = opened.read(0, 0, 0, opened.width_px, opened.height_px)
    size = tuple(-(-side // FACTOR) for side in whole.shape[1::-1])
    small = np.asarray(Image.fromarray(whole).resize(size, Image.Resampling.BOX))
    return write(Path(folder) / "s.tif", page(whole, side=240), page(small, side=240, t254=[1]))


def pairs(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tiles of the second level, by the reader and by OpenSlide, at places that are no whole ones."""
    found = []
    with slide.open_slide(path) as opened, openslide.OpenSlide(path) as handle:
        print(f"downsample {opened.downsamples[1]:.6f}")
        step_x, step_y = round(WIDTH_PX * opened.downsamples[1]), round(HEIGHT_PX * opened.downsamples[1])
        for y in range(2, opened.height_px - step_y, step_y // 2 + 1):
            for x in range(2, opened.width_px - step_x, step_x // 2 + 1):
                ours = opened.read(x, y, 1, WIDTH_PX, HEIGHT_PX)
                theirs = handle.read_region((x, y), 1, (WIDTH_PX, HEIGHT_PX)).convert("RGB")
                found.append((ours, np.asarray(theirs)))
    return found


def contrast(pixels: np.ndarray) -> float:
    """Mean difference of neighbours across and down: less where an image is blurred."""
    values = pixels.astype(float)
    return float(np.abs(np.diff(values, axis=0)).mean() + np.abs(np.diff(values, axis=1)).mean())


def main() -> None:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("slide")
    parser.add_argument("--model", default="")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tiles = pairs(pyramid(given.slide, folder))
    apart = [np.abs(ours.astype(int) - theirs) for ours, theirs in tiles]
    contrasts = [contrast(ours) / contrast(theirs) for ours, theirs in tiles]
    print(f"{len(tiles)} tiles: difference {np.mean(apart):.2f} of 255, largest {np.max(apart)}")
    print(f"contrast of neighbours {np.mean(contrasts):.3f} times that of OpenSlide")
    if given.model:
        model = bcd.load(given.model)
        height, width = model.card.input_size_px
        both = [np.stack([image.fit(one[i], height, width) for one in tiles]) for i in (0, 1)]
        ours, theirs = (model.predict(images).probability_malignant for images in both)
        by = np.abs(ours - theirs)
        print(f"probability: difference {by.mean():.4f}, largest {by.max():.4f}")


if __name__ == "__main__":
    main()
