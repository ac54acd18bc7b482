"""Rates of scoring and training on two hosts with one core each, beside one such host.

    python -m benchmarks.hosts_rate --model MODEL --images FOLDER --data DATA

Hosts are network namespaces of this machine (needs root): a head without work, one or two workers that are
pinned to a core each, and an S3 server for what is written. Head and server run on the same cores, so on a
machine with two the second host loses to them what on real hosts it would not. One and two hosts take turns.
"""

import argparse
import os
import secrets
import statistics
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

from bcd import archive, schema, storage
from tests.archives import write_manifest
from tests.cluster import read_json

EPOCHS = 3
GOAL = 1.8


def scoring_rate(hosts: object, model: str, images: str) -> float:
    """Rows per second, from the first batch of a model to the last."""
    output = f"{BUCKET}/{uuid.uuid4().hex}"
    Job(hosts, output, ("jobs/score.py", "--model", model, "--input", images, "--output", output)).succeed()
    return read_json(f"{output}/summary.json")["rows_per_s"]


def training_rate(hosts: object, data: str, workers: int) -> float:
    """Images per second of the epochs after the first, the median."""
    name = uuid.uuid4().hex
    flags = ("--weights", "none", "--epochs", str(EPOCHS), "--optimizer", "sgd")
    flags += ("--learning-rate", "0.001", "--num-workers", str(workers), "--output", BUCKET, "--name", name)
    Job(hosts, f"{BUCKET}/{name}", ("jobs/train.py", "--data", data, *flags)).succeed()
    history = read_json(f"{BUCKET}/{name}/history.json")
    assert {record["workers"] for record in history} == {workers}
    return statistics.median(record["images_per_s"] for record in history[1:])


def compare(name: str, hosts: object, rounds: int, rate: Callable[[int], float]) -> None:
    """Measure in turns, and print a line for each round and the median."""
    ratios = []
    for number in range(1, rounds + 1):
        one = rate(1)
        hosts.join(hosts.two, cores="1")
        two = rate(2)
        hosts.leave(hosts.two)
        ratios.append(two / one)
        print(
            f"{name}, round {number}: {one:.2f}/s on one host, {two:.2f}/s on two: {ratios[-1]:.2f}",
            flush=True,
        )
    print(f"{name}: {statistics.median(ratios):.2f} times the rate of one host (goal {GOAL})", flush=True)


def main() -> None:
    """Measure and print both ratios."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", required=True, help="bundle, as a local folder")
    parser.add_argument("--images", required=True, help="local folder of pictures to score")
    parser.add_argument("--data", required=True, help="local training data")
    parser.add_argument("--n", type=int, default=640, help="pictures scored in a run")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with Hosts.up() as hosts, tempfile.TemporaryDirectory() as folder:
        hosts.start_head()
        hosts.join(hosts.one, cores="0")
        model = storage.join(BUCKET, "model")
        storage.upload_folder(Path(arguments.model), model)
        images = Path(folder) / "manifest.csv"
        uris = archive.read(arguments.images).table[schema.URI].to_pylist()
        write_manifest(images, uris, arguments.n)
        compare("scoring", hosts, arguments.rounds, lambda _: scoring_rate(hosts, model, str(images)))
        compare("training", hosts, arguments.rounds, lambda n: training_rate(hosts, arguments.data, n))


if __name__ == "__main__":
    # Ray reads these when it is imported.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    from tests.cluster.hosts import BUCKET, Hosts, Job

    main()
