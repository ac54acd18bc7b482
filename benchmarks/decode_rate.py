"""Decode and fit PNGs: the fast decoder against Pillow alone on one core, and two processes against one.

    python -m benchmarks.decode_rate DATA

Prints milliseconds of CPU time per image, their ratio and whether all pixels are equal; and how many times as
many images two processes read as one, each as the readers of a job do.
"""

import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from bcd import schema
from bcd.data import read
from bcd.imaging import image

SIZE = (224, 336)
ROUNDS = 5
# Times that a process reads all images in a round.
TIMES = 4


def fitted(contents: list[bytes]) -> tuple[float, list[np.ndarray]]:
    """CPU seconds, and the images (height, width, 3)."""
    started = time.process_time()
    images = [image.fit(image.decode(content), *SIZE) for content in contents]
    return time.process_time() - started, images


def compare_decoders(paths: list[Path]) -> None:
    """Print milliseconds per image of the fast decoder and of Pillow, which take turns."""
    contents = [path.read_bytes() for path in paths]
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


def read_all(paths: list[Path]) -> None:
    """Read all images, as a task of a job does."""
    rows = [{schema.IMAGE_ID: path.name, schema.URI: str(path)} for path in paths]
    table = pa.Table.from_pylist(rows, schema.READING)
    for _ in range(TIMES):
        read.pixels(table, *SIZE, keep=[schema.URI])


def compare_processes(paths: list[Path]) -> None:
    """Print how many times as much two processes read as one."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:

        def seconds(n: int) -> float:
            started = time.perf_counter()
            list(pool.map(read_all, [paths] * n))
            return time.perf_counter() - started

        seconds(2)  # both have started
        ratios = [2 * seconds(1) / seconds(2) for _ in range(ROUNDS)]
    print(f"two processes read {statistics.median(ratios):.2f} times as much as one")


def main() -> None:
    """Compare on the PNGs below a folder."""
    paths = sorted(Path(sys.argv[1]).rglob("*.png"))
    compare_decoders(paths)
    compare_processes(paths)


if __name__ == "__main__":
    main()
