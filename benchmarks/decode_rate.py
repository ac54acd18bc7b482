"""Decode and fit PNGs on one core: the fast decoder against Pillow alone, in turns in one process.

    python -m benchmarks.decode_rate DATA

Prints milliseconds of CPU time per image, their ratio, and whether all pixels are equal.
"""

import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np

from bcd.imaging import image

SIZE = (224, 336)
ROUNDS = 5


def fitted(contents: list[bytes]) -> tuple[float, list[np.ndarray]]:
    """CPU seconds, and the images (height, width, 3)."""
    started = time.process_time()
    images = [image.fit(image.decode(content), *SIZE) for content in contents]
    return time.process_time() - started, images


def main() -> None:
    """Compare on the PNGs below a folder."""
    contents = [path.read_bytes() for path in sorted(Path(sys.argv[1]).rglob("*.png"))]
    fast, slow = [], []
    for _ in range(ROUNDS):
        seconds, images = fitted(contents)
        fast.append(seconds)
        with patch.object(image, "_decode_fast", lambda content: None):
            seconds, expected = fitted(contents)
        slow.append(seconds)
    is_equal = all(np.array_equal(*pair) for pair in zip(images, expected, strict=True))
    per_image = [1000 * min(times) / len(contents) for times in (fast, slow)]
    print(f"{len(contents)} images: {per_image[0]:.1f} ms each, by Pillow alone {per_image[1]:.1f} ms,")
    print(f"ratio {per_image[1] / per_image[0]:.2f}, pixels equal: {is_equal}")


if __name__ == "__main__":
    main()
