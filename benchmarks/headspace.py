"""Headspace of training: the rate of an epoch over that of the same worker fed with one batch over and over.

    python -m benchmarks.headspace --data DATA --weights none --height 32 --width 48

Trains from files (`--prepared off`), from prepared images as Ray Data streams them, and from memory. Before
and after each, because the speed of a machine drifts, a process of its own repeats the training step on one
batch, with the threads and memory settings of a worker. The first epoch (start-up) does not count.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from unittest.mock import patch

from bcd.config.training import TrainConfig
from bcd.model import weights
from bcd.runtime import cluster, prepare
from bcd.training import feed, train

# Run in a process of its own: prints images per second.
FED = """
import sys, time, torch
from bcd.config.training import TrainConfig
from bcd.model import resnet, train_step, weights
from bcd.runtime import cluster
config = TrainConfig.model_validate_json(sys.argv[1])
cluster.share_cores(1)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
resnet.set_precision(config.precision)
size = config.input_height_px, config.input_width_px
network = weights.build(2, None, 0, config.architecture).to(device).to(memory_format=torch.channels_last)
optimizer = train_step.optimizer(network, config.optimizer, config.learning_rate, config.weight_decay)
step = train_step.Step(network.train(), optimizer, device, config.precision, config.augment)
images = torch.randint(0, 256, (config.batch_size, *size, 3), dtype=torch.uint8)
target = torch.arange(config.batch_size) % 2
for n_steps in (2, 12):
    started = time.perf_counter()
    for _ in range(n_steps):
        loss = step(images, target, config.learning_rate)
    float(loss)
    rate = n_steps * config.batch_size / (time.perf_counter() - started)
print(rate)
"""


def fed_rate(config: TrainConfig) -> float:
    """Images per second of training steps on one batch."""
    environment = os.environ | cluster.MODEL_VARIABLES
    command = [sys.executable, "-c", FED, config.model_dump_json()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def trained(config: TrainConfig, in_memory: bool) -> tuple[float, float, str]:
    """Images per second of the later epochs, their recorded headspace, and where the images came from."""
    table, _ = prepare.prepare(config)
    table = prepare.located(table, prepare.store_of(config))
    with tempfile.TemporaryDirectory() as folder, patch.object(feed, "_fits", lambda n_bytes: in_memory):
        fed = feed.feed_of(config, table)
        given = weights.pretrained(config.weights, config.architecture)
        result = train.train_model(config, folder, fed, given, cluster.scaling(config))
    later = result.return_value[1:]
    rate, headspace = (
        sum(record[name] for record in later) / len(later) for name in ("images_per_s", "headspace")
    )
    return rate, headspace, later[0]["images_from"]


def main() -> None:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", default="none")
    parser.add_argument("--architecture", default="resnet50")
    parser.add_argument("--protocol", default="case")
    parser.add_argument("--height", type=int, default=224)
    parser.add_argument("--width", type=int, default=336)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    given = vars(parser.parse_args())
    size = {"input_height_px": given.pop("height"), "input_width_px": given.pop("width")}
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(**given, **size, prepared=folder, num_workers="1")
        off = config.model_copy(update={"prepared": "off"})
        print(f"{size['input_height_px']}x{size['input_width_px']}, {config.architecture}", flush=True)
        before = fed_rate(config)
        cluster.connect(trains=True)
        for name, settings, in_memory in (
            ("files", off, False),
            ("prepared", config, False),
            ("memory", config, True),
        ):
            rate, recorded, source = trained(settings, in_memory)
            after = fed_rate(config)
            alone = (before + after) / 2
            print(
                f"{name} ({source}): {rate:.1f} images/s; one batch over and over {before:.1f} before and "
                f"{after:.1f} after; headspace {rate / alone:.2f}, recorded {recorded:.2f}",
                flush=True,
            )
            before = after


if __name__ == "__main__":
    main()
