"""Training rate: the Ray path beside a plain PyTorch DataLoader loop, in one run.

    python -m benchmarks.train_rate --data DATA --weights none

Both train the same network in the same precision on the same rows with the same augmentation, and read the
same files. They take turns, plain, Ray, plain, Ray, ..., because the speed of a machine drifts: the ratio of
a round is the Ray path's rate to the mean of the plain ones right before and after it, the result is the
median over the rounds. The first epoch of each turn (start-up) does not count; the second one of the Ray path
counts whole, its validation included, of which the plain loop has none; that its stream began during the
validation before is not counted.
"""

import argparse
import os
import statistics
import tempfile
import time

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.utils.data import DataLoader, Dataset

from bcd import schema, storage
from bcd.config.training import TrainConfig
from bcd.imaging import image
from bcd.model import train_step, weights
from bcd.runtime import cluster, prepare
from bcd.split import balance
from bcd.taxonomy import TRAIN
from bcd.training import feed, train


class Rows(Dataset):
    """The balanced training rows as a map-style dataset: read, decode, fit."""

    def __init__(self, table: pa.Table, config: TrainConfig) -> None:
        self.uris = table[schema.URI].to_pylist()
        self.targets = [("benign", "malignant").index(name) for name in table[schema.TUMOR_CLASS].to_pylist()]
        self.size = config.input_size_px

    def __len__(self) -> int:
        return len(self.uris)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        pixels = image.fit(image.decode(storage.read_bytes(self.uris[i])), *self.size)
        return torch.from_numpy(pixels), self.targets[i]


class PlainLoop:
    """What people write without Ray: a DataLoader whose workers stay, and the same step."""

    def __init__(self, table: pa.Table, config: TrainConfig) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = weights.build(2, weights.pretrained(config.weights)).to(
            device, memory_format=torch.channels_last
        )
        optimizer = train_step.optimizer(network, config)
        self.rate = config.learning_rate
        self.step = train_step.Step(network.train(), optimizer, device, config)
        self.loader = DataLoader(
            Rows(table, config),
            config.batch_size,
            shuffle=True,
            num_workers=max(1, len(os.sched_getaffinity(0)) - 1),
            persistent_workers=True,
            pin_memory=device.type == "cuda",
        )

    def epoch(self) -> float:
        """Images per second of one epoch."""
        started, n = time.monotonic(), 0
        for images, target in self.loader:
            self.step(images, target, self.rate)
            n += len(images)
        return n / (time.monotonic() - started)


def ray_rate(table: pa.Table, config: TrainConfig) -> float:
    """Training images per second of the second epoch of a training run, validation included."""
    given = weights.pretrained(config.weights)
    with tempfile.TemporaryDirectory() as output:
        fed = feed.feed_of(config, table)
        result = train.train_model(config, output, fed, given, cluster.scaling(config))
    record = result.return_value[1]
    return sum(record["class_counts"].values()) / record["seconds"]


def _repeated(table: pa.Table, times: int) -> pa.Table:
    """Training rows several times: on a small set, an epoch as long as those of a large one."""
    is_train = pc.equal(table[schema.PART], TRAIN)
    train_rows = table.filter(is_train)
    return pa.concat_tables([table.filter(pc.invert(is_train)), *[train_rows] * times])


def main() -> None:
    """Measure and print the ratio."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", default="none")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=1, help="times each training row occurs in an epoch")
    parser.add_argument("--height", type=int, default=224)
    parser.add_argument("--width", type=int, default=336)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--precision", default="auto")
    arguments = parser.parse_args()
    config = TrainConfig(
        data=arguments.data,
        weights=arguments.weights,
        epochs=2,
        input_height_px=arguments.height,
        input_width_px=arguments.width,
        precision=arguments.precision,
        batch_size=arguments.batch_size,
    )
    cluster.connect(several_trainings=True)
    table = _repeated(prepare.prepare(config)[0], arguments.repeat)
    balanced = balance.upsample(prepare.part_of(table, TRAIN), config.balance, config.seed)
    print(f"{len(balanced)} training rows, {config.input_height_px}x{config.input_width_px}", flush=True)
    plain = PlainLoop(balanced, config)
    plain.epoch()
    before, ratios = plain.epoch(), []
    for number in range(1, arguments.rounds + 1):
        ours, after = ray_rate(table, config), plain.epoch()
        ratios.append(ours / statistics.mean([before, after]))
        print(
            f"round {number}: plain {before:.2f} before and {after:.2f} after, Ray path {ours:.2f} images/s: "
            f"ratio {ratios[-1]:.3f}",
            flush=True,
        )
        before = after
    print(f"ratio, median of {arguments.rounds} rounds: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
