"""The service under load, beside the archive job and a bare forward pass, in one run.

    python -m benchmarks.serve_load --model MODEL --images FOLDER [--precision float32] [--seconds 40]

Prints for 1, 4, 16 and 64 clients (locust, a process of its own on the same machine) throughput, latency and
errors, then what was asked for as ratios: saturation against the archive job's rate, a single client's median
against decode plus a bare forward pass, the accepted requests' p95 under overload against saturation, and the
memory of the service's processes after many requests against that after all these clients. The bare pass is
timed twice: where nothing else runs, and beside the idle service, in turns with the client; the difference is
what Ray itself takes of a machine.
"""

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import ray
import torch

from bcd import storage
from bcd.imaging import image
from bcd.model import predictor
from bcd.runtime import cluster
from benchmarks import score_rate

CLIENTS = (1, 4, 16, 64)
SATURATION, OVERLOAD = 16, 64
BARE_REPEATS, WARM_UP = 60, 5
# Threads of the one that has ended spin for a while before they sleep.
PAUSE_S = 0.02
START_S = 300


@dataclass(frozen=True)
class Outcome:
    """One number of clients: requests per second, latencies in ms, counts."""

    rate: float
    p50: float
    p95: float
    p99: float
    accepted: int
    refused: int
    failed: int


class Bare:
    """Decoding and the network alone, as a plain program has them."""

    def __init__(self, model_uri: str, precision: str) -> None:
        self._loaded = predictor.load(model_uri, precision=precision)
        torch.set_num_threads(min(cluster.CPUS_PER_MODEL, cluster.cores()))

    def ms(self, content: bytes) -> float:
        """Time of one image."""
        return _ms(lambda: self._loaded.predict(self._loaded.fit(image.decode(content))[None]))

    def quiet_ms(self, contents: list[bytes]) -> float:
        """Median of many, where nothing else runs."""
        return statistics.median([self.ms(content) for content in contents][WARM_UP:])

    def in_turns(self, url: str, contents: list[bytes]) -> tuple[float, float]:
        """Medians of a single client's request and of the bare pass, a image of each after the other."""
        times = []
        with httpx.Client(timeout=60) as client:
            for content in contents:
                asked = _ms(lambda content=content: client.post(f"{url}/v1/predict", content=content))
                time.sleep(PAUSE_S)
                times.append((asked, self.ms(content)))
                time.sleep(PAUSE_S)
        asked, bare = zip(*times[WARM_UP:], strict=True)
        return statistics.median(asked), statistics.median(bare)


def _ms(function: Callable[[], object]) -> float:
    started = time.monotonic()
    function()
    return 1_000 * (time.monotonic() - started)


def archive_rate(model_uri: str, images: str, precision: str, n: int) -> float:
    """Rows per second of the archive job, on a cluster that is gone afterwards."""
    cluster.connect()
    rate = score_rate.pipeline_rate(model_uri, score_rate.repeated(images, n), False, precision)
    ray.shutdown()
    return rate


@contextlib.contextmanager
def service(model_uri: str, *flags: str) -> Iterator[tuple[str, psutil.Process]]:
    """`jobs/serve.py` as a process, with these flags; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "jobs/serve.py", "--model", model_uri, "--port", str(port), *flags]
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while not _is_ready(url):
            if job.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the service did not start")
            time.sleep(0.5)
        yield url, psutil.Process(job.pid)
    finally:
        job.terminate()
        job.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=30).status_code == 200
    except httpx.TransportError:
        return False


def memory_mib(job: psutil.Process) -> float:
    """Resident memory of the replicas and proxies."""
    found = 0.0
    for process in job.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if {"ServeReplica", "ProxyActor"} & set(" ".join(process.cmdline()).replace(":", " ").split()):
                found += process.memory_info().rss / 2**20
    return found


def load(url: str, images: str, clients: int, seconds: float) -> Outcome:
    """So many clients for so long, once all of them have begun."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stats.json"
        command = [sys.executable, "-m", "locust", "-f", str(Path(__file__).with_name("locustfile.py"))]
        command += ["--headless", "--host", url, "--users", str(clients), "--spawn-rate", str(clients)]
        command += ["--run-time", f"{seconds:.0f}s", "--stop-timeout", "120", "--reset-stats"]
        command += ["--only-summary", "--json-file", str(path.with_suffix("")), "--exit-code-on-error", "0"]
        environment = os.environ | {"BCD_IMAGES": images, "PYTHONPATH": os.getcwd()}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        entries = {entry["name"]: entry for entry in json.loads(path.read_text())}
    return _outcome(entries)


def _outcome(entries: dict[str, dict]) -> Outcome:
    """From locust's statistics by status code; a lost connection has status 0."""
    if "200" not in entries:
        raise SystemExit(f"no request was answered: {list(entries)}")
    accepted, refused = entries["200"], entries.get("503")
    times = sorted(float(ms) for ms, n in accepted["response_times"].items() for _ in range(n))
    spent = accepted["last_request_timestamp"] - accepted["start_time"]
    p50, p95, p99 = (times[min(len(times) - 1, int(q * len(times)))] for q in (0.50, 0.95, 0.99))
    n, n_refused = accepted["num_requests"], refused["num_requests"] if refused else 0
    failed = sum(entry["num_failures"] for entry in entries.values())
    return Outcome(n / spent, p50, p95, p99, n, n_refused, failed)


def print_outcome(clients: int, found: Outcome) -> None:
    """A line of the table."""
    numbers = f"{found.rate:10.2f}{found.p50:10.0f}{found.p95:10.0f}{found.p99:10.0f}"
    print(f"{clients:>8}{numbers}{found.accepted:10}{found.refused:10}{found.failed:10}", flush=True)


def print_ratios(
    found: dict[int, Outcome], archive: float, turns: tuple[float, float], quiet: float, memory: list[float]
) -> None:
    """What was asked for."""
    busy, over = found[SATURATION], found[OVERLOAD]
    lines = [
        ("throughput at saturation / archive job", busy.rate / archive, ">= 0.8"),
        ("p50 of one client / decode + bare, in turns", turns[0] / turns[1], "<= 1.3"),
        ("p50 of one client / decode + bare, no Ray", turns[0] / quiet, ""),
        (f"p95 of accepted, {OVERLOAD} clients / {SATURATION}", over.p95 / busy.p95, "<= 3"),
        (f"memory, last / after {OVERLOAD} clients", memory[2] / memory[1], "about 1"),
    ]
    print(f"\n{'ratio':<48}{'measured':>10}  goal")
    for name, ratio, goal in lines:
        print(f"{name:<48}{ratio:10.3f}  {goal}")
    print(f"failed requests: {sum(one.failed for one in found.values())}")


def main() -> None:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", required=True, help="URI of a bundle")
    parser.add_argument("--images", required=True, help="folder of images")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--flags", default="", help="more flags of jobs/serve.py, in quotes")
    parser.add_argument("--seconds", type=float, default=40, help="for each number of clients")
    parser.add_argument("--n", type=int, default=320, help="images of the archive job's turns")
    parser.add_argument("--requests", type=int, default=5_000, help="after which memory is looked at again")
    arguments = parser.parse_args()
    uri, images, precision = storage.absolute(arguments.model), arguments.images, arguments.precision
    uris = score_rate.repeated(images, BARE_REPEATS)["uri"].to_pylist()
    contents = [storage.read_bytes(path) for path in uris]
    before = archive_rate(uri, images, precision, arguments.n)
    bare = Bare(uri, precision)
    quiet = [bare.quiet_ms(contents)]
    print(f"{cluster.cores()} cores, {precision}; decode + bare forward {quiet[0]:.1f} ms", flush=True)
    heads = ("rate/s", "p50 ms", "p95 ms", "p99 ms", "accepted", "refused", "failed")
    print(f"{'clients':>8}" + "".join(f"{head:>10}" for head in heads))
    found = {}
    with service(uri, "--precision", precision, *arguments.flags.split()) as (url, job):
        load(url, images, SATURATION, 10)
        memory = [memory_mib(job)]
        turns = bare.in_turns(url, contents)
        for clients in CLIENTS:
            print_outcome(clients, outcome := load(url, images, clients, arguments.seconds))
            found[clients] = outcome
        memory.append(memory_mib(job))
        left = arguments.requests - sum(one.accepted for one in found.values())
        while left > 0:
            left -= load(url, images, SATURATION, max(20.0, left / found[SATURATION].rate)).accepted
        memory.append(memory_mib(job))
    quiet.append(bare.quiet_ms(contents))
    after = archive_rate(uri, images, precision, arguments.n)
    print(
        f"archive job {before:.2f} before, {after:.2f} after, images/s; "
        f"decode + bare forward {quiet[0]:.1f} ms before, {quiet[1]:.1f} after, and {turns[1]:.1f} in turns "
        f"with a client that waits {turns[0]:.1f}; "
        f"memory {memory[0]:.0f} MiB, {memory[1]:.0f} after {OVERLOAD} clients, {memory[2]:.0f} after "
        f"{arguments.requests:,} requests"
    )
    print_ratios(found, statistics.mean([before, after]), turns, statistics.mean(quiet), memory)


if __name__ == "__main__":
    main()
