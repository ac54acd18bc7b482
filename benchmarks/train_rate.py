"""Training rate: the Ray path beside a plain PyTorch DataLoader loop, in one run.

    python -m benchmarks.train_rate --data DATA --weights none

Both train the same network in the same precision on the same rows with the same augmentation, and read the
same files. Each counts several epochs after one that it does not count (start-up). The plain loop runs before
and after the Ray path: a machine whose speed drifts shows as a difference between the two.
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

from bcd import balance, image, model, optimise, schema, storage, transform
from bcd.config import TrainConfig
from bcd.pipelines import cluster, prepare, read, train


class Rows(Dataset):
    """The balanced training rows as a map-style dataset: read, decode, fit."""

    def __init__(self, table: pa.Table, config: TrainConfig) -> None:
        self.uris = table[schema.URI].to_pylist()
        self.targets = [("benign", "malignant").index(name) for name in table[schema.TUMOR_CLASS].to_pylist()]
        self.size = (config.input_height_px, config.input_width_px)

    def __len__(self) -> int:
        return len(self.uris)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        pixels = image.fit(image.decode(storage.read_bytes(self.uris[i])), *self.size)
        return torch.from_numpy(pixels), self.targets[i]


def plain_rates(table: pa.Table, config: TrainConfig, epochs: int) -> list[float]:
    """Images per second of each epoch of a plain loop, the first one left out."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = model.build(2, model.pretrained(config.weights)).to(device, memory_format=torch.channels_last)
    optimizer = optimise.optimizer(network, config.optimizer, config.learning_rate, config.weight_decay)
    preset = transform.augmentation(config.input_height_px, config.input_width_px)
    step = optimise.Step(network.train(), optimizer, device, config.precision, preset)
    workers = max(1, len(os.sched_getaffinity(0)) - 1)
    loader = DataLoader(
        Rows(table, config), config.batch_size, shuffle=True, num_workers=workers, persistent_workers=True
    )
    rates = []
    for epoch in range(epochs + 1):
        started = time.monotonic()
        for images, target in loader:
            step(images, target, config.learning_rate)
        rates.append(len(table) / (time.monotonic() - started))
        print(f"  plain epoch {epoch}: {rates[-1]:.2f} images/s", flush=True)
    return rates[1:]


def ray_rates(table: pa.Table, config: TrainConfig, output: str) -> list[float]:
    """Images per second of each epoch of the Ray path, the first one left out."""
    weights = model.pretrained(config.weights)
    result = train.fit(config, output, table, weights, cluster.scaling(config))
    return [record["images_per_s"] for record in result.return_value][1:]


def _repeated(table: pa.Table, times: int) -> pa.Table:
    """Training rows several times: on a small set, an epoch as long as those of a large one."""
    is_train = pc.equal(table[schema.PART], read.TRAIN)
    train_rows = table.filter(is_train)
    return pa.concat_tables([table.filter(pc.invert(is_train)), *[train_rows] * times])


def main() -> None:
    """Measure and print the ratio."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", default="none")
    parser.add_argument("--epochs", type=int, default=3, help="counted epochs of each")
    parser.add_argument("--repeat", type=int, default=1, help="times each training row stands in an epoch")
    parser.add_argument("--height", type=int, default=224)
    parser.add_argument("--width", type=int, default=336)
    parser.add_argument("--precision", default="auto")
    arguments = parser.parse_args()
    config = TrainConfig(
        data=arguments.data,
        weights=arguments.weights,
        epochs=arguments.epochs + 1,
        input_height_px=arguments.height,
        input_width_px=arguments.width,
        precision=arguments.precision,
        batch_size=16,
    )
    cluster.connect()
    table = _repeated(prepare.prepare(config)[0], arguments.repeat)
    balanced = balance.upsample(prepare.part_of(table, read.TRAIN), config.balance, config.seed)
    print(f"{len(balanced)} training rows, {config.input_height_px}x{config.input_width_px}", flush=True)
    before = plain_rates(balanced, config, arguments.epochs)
    with tempfile.TemporaryDirectory() as output:
        ours = ray_rates(table, config, output)
    after = plain_rates(balanced, config, arguments.epochs)
    plain, path = statistics.median(before + after), statistics.median(ours)
    print(f"plain DataLoader loop: {plain:.2f} images/s (before {statistics.median(before):.2f}, ", end="")
    print(f"after {statistics.median(after):.2f})\nRay path: {path:.2f} images/s\nratio: {path / plain:.3f}")


if __name__ == "__main__":
    main()
