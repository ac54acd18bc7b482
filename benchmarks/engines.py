"""OpenVINO beside torch on CPUs, in turns in one process: rate of a batch, time of a single image, numbers.

    python -m benchmarks.engines --model MODEL --images FOLDER [--threads 2] [--rounds 9]

Each round computes one batch, then single images, by every engine in every precision, each time in another
order. What is timed is `Predictor.predict`: network, map and probabilities, without decoding. Prints medians
over rounds; ratios are medians of the ratios within a round. `log-odds` is the largest difference from torch
in float32. CPUs without AVX512-BF16 and AMX have no bfloat16.
"""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch

from bcd import storage
from bcd.imaging import image
from bcd.model import predictor
from bcd.model.predictor import Predictor
from benchmarks import score_rate

SIDES = [(engine, precision) for precision in ("float32", "bfloat16") for engine in ("torch", "openvino")]
PLAIN = SIDES[0]
Side = tuple[str, str]


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(
    loaded: dict[Side, Predictor], images: np.ndarray, rounds: int, singles: int
) -> tuple[dict[Side, list[float]], dict[Side, list[float]]]:
    """Seconds for an image in a batch, and for a single one, in each round."""
    batch, single = defaultdict(list), defaultdict(list)
    for turn in range(rounds):
        order = SIDES[turn % len(SIDES) :] + SIDES[: turn % len(SIDES)]
        for side in order:
            batch[side].append(seconds(lambda side=side: loaded[side].predict(images)) / len(images))
        for side in order:
            times = [
                seconds(lambda side=side, i=i: loaded[side].predict(images[i : i + 1]))
                for i in range(singles)
            ]
            single[side].append(statistics.median(times))
    return batch, single


def ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times as long the first takes, in the same round."""
    return statistics.median(one / other for one, other in zip(ours, theirs, strict=True))


def log_odds(loaded: Predictor, images: np.ndarray) -> np.ndarray:
    """Of two classes."""
    logit = loaded.predict(images).logit
    return logit[:, 1] - logit[:, 0]


def main() -> None:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", required=True, help="URI of a bundle with two classes")
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--singles", type=int, default=8, help="images of each round that are timed alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    uri = storage.absolute(arguments.model)
    loaded = {side: predictor.load(uri, "cpu", side[1], engine=side[0]) for side in SIDES}
    uris = score_rate.repeated(arguments.images, arguments.batch_size)["uri"].to_pylist()
    plain = loaded[PLAIN]
    images = np.stack([plain.fit(image.decode(storage.read_bytes(one))) for one in uris])
    differences = {
        side: np.abs(log_odds(one, images) - log_odds(plain, images)).max() for side, one in loaded.items()
    }
    singles = min(arguments.singles, len(images))
    measure(loaded, images, 1, singles)  # compiles
    batch, single = measure(loaded, images, arguments.rounds, singles)
    size = f"{plain.card.input_height_px}x{plain.card.input_width_px}"
    print(f"{plain.card.architecture}, {size}, {arguments.threads} threads, batches of {len(images)}")
    heads = ("images/s", "x torch", "single ms", "/ torch", "/ float32", "log-odds")
    print(f"{'engine':<20}" + "".join(f"{head:>12}" for head in heads))
    for side in SIDES:
        torchs = ("torch", side[1])
        numbers = [1 / statistics.median(batch[side]), ratio(batch[torchs], batch[side])]
        numbers += [1_000 * statistics.median(single[side]), ratio(single[side], single[torchs])]
        numbers += [ratio(single[side], single[PLAIN])]
        cells = "".join(f"{number:12.2f}" for number in numbers)
        print(f"{' '.join(side):<20}{cells}{differences[side]:12.1e}", flush=True)


if __name__ == "__main__":
    main()
