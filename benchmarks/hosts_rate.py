"""Rates of scoring and training on two hosts with one core each, beside one such host.

    python -m benchmarks.hosts_rate --model MODEL --images FOLDER
    python -m benchmarks.hosts_rate --data DATA

Hosts are network namespaces of this machine (needs root): a head without work, one or two workers that are
pinned to a core each, and an S3 server for what is written. Head and server run on any core: on a machine
with two, hosts that are held to a share of their core leave room for them, as real hosts would (--share).
One and two hosts take turns. Rates are steady ones: the first third of what is scored, and the first epoch,
are start-up and do not count.
"""

import argparse
import os
import re
import secrets
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bcd import schema, storage
from bcd.data import archive
from benchmarks.quota import quota
from tests.archives import write_manifest
from tests.cluster import read_json

EPOCHS = 3
# A training on one slow core may last.
LONGEST_TRAINING_S = 7200
# What a scoring job says now and then.
PROGRESS = re.compile(r"inputs?, ([\d,]+) rows?, ")
GOAL = 1.8


def scoring_rate(hosts: object, model: str, images: str) -> float:
    """Rows per second, as they are committed."""
    output = f"{BUCKET}/{uuid.uuid4().hex}"
    job = Job(hosts, output, ("jobs/score.py", "--model", model, "--input", images, "--output", output))
    rate = steady(committed(job))
    job.succeed()
    return rate


def committed(job: object) -> Iterator[int]:
    """Numbers of rows, each when the job says so."""
    before = 0
    while not job.ended:
        lines = PROGRESS.findall(job.client.get_job_logs(job.id))
        rows = int(lines[-1].replace(",", "")) if lines else 0
        if rows > before:
            yield rows - before
            before = rows
        time.sleep(1)


def training_rate(hosts: object, data: str, chosen: tuple[str, ...], workers: int) -> float:
    """Images per second of the epochs after the first, the median; with flags of the training as chosen."""
    name = uuid.uuid4().hex
    flags = ("--weights", "none", "--epochs", str(EPOCHS), "--optimizer", "sgd", "--learning-rate", "0.001")
    flags += ("--num-workers", str(workers), "--output", BUCKET, "--name", name, *chosen)
    Job(hosts, f"{BUCKET}/{name}", ("jobs/train.py", "--data", data, *flags)).succeed(LONGEST_TRAINING_S)
    history = read_json(f"{BUCKET}/{name}/history.json")
    assert {record["workers"] for record in history} == {workers}
    return statistics.median(record["images_per_s"] for record in history[1:])


def compare(name: str, hosts: object, second: list[str], rounds: int, rate: Callable[[int], float]) -> None:
    """Measure in turns, the second host started as said, and print a line for each round and the median."""
    ratios = []
    for number in range(1, rounds + 1):
        one = rate(1)
        hosts.join(hosts.two, second)
        two = rate(2)
        hosts.leave(hosts.two)
        ratios.append(two / one)
        print(
            f"{name}, round {number}: {one:.2f}/s on one host, {two:.2f}/s on two: {ratios[-1]:.2f}",
            flush=True,
        )
    print(f"{name}: {statistics.median(ratios):.2f} times the rate of one host (goal {GOAL})", flush=True)


def scoring(hosts: object, model_folder: str, images: str, n: int) -> Callable[[int], float]:
    """Rate of scoring n of the images, over and over, as a function of the hosts."""
    model = storage.join(BUCKET, "model")
    storage.upload_folder(Path(model_folder), model)
    manifest = hosts.head.folder / "manifest.csv"
    write_manifest(manifest, archive.list_inputs(images).table[schema.URI].to_pylist(), n)
    return lambda _: scoring_rate(hosts, model, str(manifest))


@contextmanager
def core(name: str, share: float) -> Iterator[list[str]]:
    """What to put before a command, so that it runs on that core and has that share of it."""
    pinned = ["taskset", "-c", name]
    if share == 1:
        yield pinned
        return
    with quota(f"bcd-{os.getpid()}-core-{name}", share) as limited:
        yield [*limited, *pinned]


def main() -> None:
    """Measure and print what was asked for."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", help="bundle, as a local folder")
    parser.add_argument("--images", help="local folder of images to score")
    parser.add_argument("--data", help="local training data")
    parser.add_argument("--n", type=int, default=3840, help="images scored in a run")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cores", nargs=2, default=("0", "1"), help="core of each host")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a step, over all hosts")
    parser.add_argument("--sync-batchnorm", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--share", type=float, default=1.0, help="of its core that a host may use")
    arguments = parser.parse_args()
    if bool(arguments.model) != bool(arguments.images) or not (arguments.model or arguments.data):
        parser.error("give --model and --images, --data, or all three")
    if not 0 < arguments.share <= 1:
        parser.error("--share is a number above 0, and 1 at most")
    with ExitStack() as stack:
        first, second = (stack.enter_context(core(name, arguments.share)) for name in arguments.cores)
        hosts = stack.enter_context(Hosts.up())
        hosts.start_head()
        hosts.join(hosts.one, first)
        if arguments.model:
            rate = scoring(hosts, arguments.model, arguments.images, arguments.n)
            compare("scoring", hosts, second, arguments.rounds, rate)
        if arguments.data:
            batchnorm = "--sync-batchnorm" if arguments.sync_batchnorm else "--no-sync-batchnorm"
            chosen = ("--batch-size", str(arguments.batch_size), batchnorm)
            rate = partial(training_rate, hosts, arguments.data, chosen)
            compare("training", hosts, second, arguments.rounds, rate)


if __name__ == "__main__":
    # Ray reads these when it is imported.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    from benchmarks.score_rate import steady
    from tests.cluster.hosts import BUCKET, Hosts, Job

    main()
