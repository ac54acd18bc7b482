"""Memory of the archive job, whole, as the archive grows: it should stay flat.

    python -m benchmarks.score_memory --model MODEL --images FOLDER --n 400 4000

For each n, `jobs/score.py` runs on a manifest of n rows (the same images over and over), on its own Ray.
Every half second the memory of all its processes, Ray's own among them, is taken (`tests.cluster.memory`).
Who else runs on the machine with the same libraries takes over a share of `mapped`, seen: 200 MiB. So the
ratio is given without it also; on a quiet machine the two agree.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

from bcd import schema, storage
from bcd.data import archive
from tests.archives import write_manifest
from tests.cluster import processes
from tests.cluster.memory import Memory, memory

ROOT = Path(__file__).parent.parent
SECONDS_BETWEEN_SAMPLES = 0.5
LARGEST = 4
GOAL = 1.15


def peak(model: str, manifest: Path, output: Path, options: list[str]) -> Memory:
    """Run the job, and return the sample with the largest total."""
    name, value = "BCD_BENCHMARK", uuid.uuid4().hex
    environment = {key: text for key, text in os.environ.items() if key != "RAY_ADDRESS"} | {name: value}
    command = [sys.executable, "jobs/score.py", "--model", model, "--input", str(manifest)]
    command += ["--output", str(output), *options]
    job = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    largest = Memory(0, 0, 0, ())
    while job.poll() is None:
        largest = max(largest, memory(processes(job.pid, f"{name}={value}")), key=lambda found: found.total)
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    if job.returncode:
        sys.exit(f"{' '.join(command)} ended with {job.returncode}")
    return largest


def main() -> None:
    """Measure and print the peaks and their ratio."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", required=True, help="URI of a bundle")
    parser.add_argument("--images", required=True, help="folder of images, repeated as often as needed")
    parser.add_argument("--n", type=int, nargs="+", default=[400, 4000])
    # The same for every n, where `auto` would decide by the length of the archive.
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--compile", choices=("on", "off"), default="off")
    arguments = parser.parse_args()
    options = ["--precision", arguments.precision, "--compile", arguments.compile]
    uris = archive.list_inputs(storage.absolute(arguments.images)).table[schema.URI].to_pylist()
    peaks: list[Memory] = []
    for n in arguments.n:
        with tempfile.TemporaryDirectory() as folder:
            write_manifest(manifest := Path(folder, "manifest.csv"), uris, n)
            largest = peak(storage.absolute(arguments.model), manifest, Path(folder, "scores"), options)
        peaks.append(largest)
        parts = ((part, getattr(largest, part)) for part in ("private", "mapped", "store"))
        print(
            f"n = {n:,}: peak {largest.total / 2**20:,.0f} MiB in {len(largest.processes)} processes ("
            + ", ".join(f"{part} {size / 2**20:,.0f}" for part, size in parts)
            + "); largest: "
            + ", ".join(f"{title[:40]} {size / 2**20:,.0f}" for size, title in largest.processes[:LARGEST]),
            flush=True,
        )
    for n, largest in zip(arguments.n[1:], peaks[1:], strict=True):
        whole, own = largest.total / peaks[0].total, largest.own / peaks[0].own
        print(
            f"peak at n = {n:,} / peak at n = {arguments.n[0]:,}: {whole:.3f} (goal <= {GOAL}); "
            f"without mapped {own:.3f}"
        )


if __name__ == "__main__":
    main()
