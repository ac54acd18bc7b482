"""Memory of the archive job, whole, as the archive grows: it should stay flat.

    python -m benchmarks.score_memory --model MODEL --images FOLDER --n 400 4000

For each n, `jobs/score.py` runs on a manifest of n rows (the same pictures over and over), on its own Ray.
Every half second the memory of all its processes, Ray's own among them, is taken:

    private   sum of Pss_Anon: heap and stacks
    mapped    sum of Pss_File: libraries, each page shared out among all who map it
    store     pages behind open files in /dev/shm, each file once: Ray's object store, with the pages that no
              process maps just now

Shared memory within PSS (Pss_Shmem) is that same store and left out. Page cache that nobody maps, such as
that of the pictures read and the table written, is no process's and does not count. Who else
runs on the machine with the same libraries takes over a share of `mapped`, seen: 200 MiB. So the ratio is
given without it also; on a quiet machine the two agree.
"""

import argparse
import contextlib
import csv
import os
import re
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from bcd import archive, schema, storage
from tests.cluster import processes

ROOT = Path(__file__).parent.parent
SECONDS_BETWEEN_SAMPLES = 0.5
SHARED_MEMORY = "/dev/shm/"
PSS = re.compile(r"^Pss_(Anon|File): +(\d+) kB$", re.MULTILINE)
LARGEST = 4
GOAL = 1.15


@dataclass(frozen=True)
class Sample:
    """Memory at one moment, in bytes; `processes` are (private, title), largest first."""

    private: int
    mapped: int
    store: int
    processes: tuple[tuple[int, str], ...]

    @property
    def own(self) -> int:
        """What does not depend on who else runs."""
        return self.private + self.store

    @property
    def total(self) -> int:
        """All three."""
        return self.own + self.mapped


def sample(session: int, marker: str) -> Sample:
    """Memory of the job whose processes have this session id or environment marker, now."""
    private: list[tuple[int, str]] = []
    mapped = 0
    store: dict[tuple[int, int], int] = {}
    for pid, command in processes(session, marker):
        with contextlib.suppress(OSError):  # it may end meanwhile
            pss = dict(PSS.findall(Path(f"/proc/{pid}/smaps_rollup").read_text()))
            private.append((int(pss["Anon"]) * 1024, command.strip()))
            mapped += int(pss["File"]) * 1024
            store |= _shared_files(pid)
    private.sort(reverse=True)
    return Sample(sum(size for size, _ in private), mapped, sum(store.values()), tuple(private))


def _shared_files(pid: int) -> dict[tuple[int, int], int]:
    """Bytes allocated behind each file in shared memory that a process holds open, deleted ones too."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it may be closed meanwhile
            if os.readlink(link).startswith(SHARED_MEMORY):
                facts = link.stat()
                found[facts.st_dev, facts.st_ino] = facts.st_blocks * 512
    return found


def peak(model: str, manifest: Path, output: Path, options: list[str]) -> Sample:
    """Run the job, and return the sample with the largest total."""
    name, value = "BCD_BENCHMARK", uuid.uuid4().hex
    environment = {key: text for key, text in os.environ.items() if key != "RAY_ADDRESS"} | {name: value}
    command = [sys.executable, "jobs/score.py", "--model", model, "--input", str(manifest)]
    command += ["--output", str(output), *options]
    job = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    largest = Sample(0, 0, 0, ())
    while job.poll() is None:
        largest = max(largest, sample(job.pid, f"{name}={value}"), key=lambda found: found.total)
        time.sleep(SECONDS_BETWEEN_SAMPLES)
    if job.returncode:
        sys.exit(f"{' '.join(command)} ended with {job.returncode}")
    return largest


def write_manifest(path: Path, uris: list[str], n: int) -> None:
    """A manifest of n rows: the pictures over and over, each row with its own id."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([schema.IMAGE_ID, schema.URI])
        writer.writerows((f"{i:08d}", uris[i % len(uris)]) for i in range(n))


def main() -> None:
    """Measure and print the peaks and their ratio."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", required=True, help="URI of a bundle")
    parser.add_argument("--images", required=True, help="folder of pictures, repeated as often as needed")
    parser.add_argument("--n", type=int, nargs="+", default=[400, 4000])
    # The same for every n, where `auto` would decide by the length of the archive.
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--compile", choices=("on", "off"), default="off")
    arguments = parser.parse_args()
    options = ["--precision", arguments.precision, "--compile", arguments.compile]
    uris = archive.read(storage.absolute(arguments.images)).table[schema.URI].to_pylist()
    peaks: list[Sample] = []
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
