"""Planning, resuming and merging an archive of many inputs: seconds and peak memory of each.

    python -m benchmarks.ledger_scale FOLDER --inputs 1000000

Writes a manifest that names the same 1,000 files again and again, and segments as a 32x48 model gives them;
no image is scored. What the driver does before the first row, at the resumption of a half-done archive, and
for one file of the table, runs in a process of its own each, on disk.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bcd import schema, storage
from bcd.config.scoring import ScoreConfig
from bcd.data import archive
from bcd.lease import Lease
from bcd.scoring import finish, ledger, score
from bcd.scoring.progress import Progress

FILES, ROWS_PER_SEGMENT = 1_000, 512


def write_inputs(folder: Path, n: int) -> None:
    """The files, empty, and the manifest."""
    for i in range(FILES):
        (folder / f"{i:04d}.png").touch()
    ids = [f"image {i:07d}" for i in range(n)]
    table = pa.table({"image_id": ids, "uri": [f"{i % FILES:04d}.png" for i in range(n)]})
    pq.write_table(table, folder / "manifest.parquet")


def write_segments(work_uri: str, ids: list[str], uris: list[str]) -> None:
    """Rows of the given inputs."""
    form = schema.predictions(1, 2, False)
    rng = np.random.default_rng(0)
    for at in range(0, len(ids), ROWS_PER_SEGMENT):
        names = ids[at : at + ROWS_PER_SEGMENT]
        p = rng.random(len(names), np.float32)
        columns = {
            schema.IMAGE_ID: names,
            schema.URI: uris[at : at + ROWS_PER_SEGMENT],
            schema.SHA256: [f"{i % FILES:064x}" for i in range(len(names))],
            schema.LOGIT: list(np.stack([-p, p], 1)),
            schema.PROBABILITY: list(np.stack([1 - p, p], 1)),
            schema.PROBABILITY_MALIGNANT: p,
            schema.PREDICTED_CLASS: ["malignant"] * len(names),
            schema.EVIDENCE: list(rng.random((len(names), 2), np.float32)),
            schema.EVIDENCE_BIAS: p,
        }
        constant = {schema.MODEL_ID: "0" * 16, schema.ENGINE: "torch", schema.PRECISION: "float32"}
        constant |= {schema.BCD_VERSION: "0.2.0", schema.EVIDENCE_HEIGHT: 1, schema.EVIDENCE_WIDTH: 2}
        columns |= {name: [value] * len(names) for name, value in constant.items()}
        columns = {name: pa.array(values, form.field(name).type) for name, values in columns.items()}
        ledger.commit(schema.fill(pa.table(columns), form), work_uri)


def _claimed(uri: str) -> Lease:
    lease = Lease(uri)
    lease.claim()
    return lease


def books(folder: Path) -> tuple[ledger.Ledger, archive.Archive, score.Books]:
    """What a job does before its first row."""
    found = archive.list_inputs(str(folder / "manifest.parquet"))
    config = ScoreConfig(model="none", input=str(folder), output=str(folder / "out"))
    ours, _ = ledger.open_ledger(_claimed(config.output), config.model_dump(mode="json"))
    return ours, found, score._settled(ours, found)[0]


def plan(folder: Path) -> str:
    """Plan all, or what remains."""
    ours, _, known = books(folder)
    todo = known.open_inputs()
    Progress(todo, ours.plans_uri, known.done)
    return f"{len(todo):,} to score"


def commit(folder: Path) -> str:
    """Commit the first half, or what remains; not timed."""
    ours, found, known = books(folder)
    todo = known.open_inputs()
    todo = todo if len(todo) < len(found.table) else todo.slice(0, len(todo) // 2)
    write_segments(ours.work_uri, todo[schema.IMAGE_ID].to_pylist(), todo[schema.URI].to_pylist())
    return f"{len(todo):,} committed"


def finish_table(folder: Path) -> str:
    """What the driver does after the last row: see that all are there, and cut the table into files."""
    ours, _, known = books(folder)
    score._require_balance(known)
    return f"{len(ledger.cut_parts(ours, known.done)):,} files"


def merge(folder: Path) -> str:
    """One file of the table, as a worker writes it."""
    ours, _, known = books(folder)
    part = ledger.cut_parts(ours, known.done)[0]
    started = time.monotonic()
    n = ledger.merge(part)
    return f"{n:,} rows of {len(part.segments):,} segments in {time.monotonic() - started:.1f} s"


def count(folder: Path) -> str:
    """What the driver does after merging: read the facts of every row, and see that they add up."""
    ours, found, _ = books(folder)
    # Of the segments, which have the same rows: opening the ledger removed the unfinished table.
    table = storage.dataset(ours.work_uri).to_table(finish.OVERVIEW)
    counts = finish._counts(table, table.slice(0, 0), schema.SLIDES.empty_table(), found.table["image_id"])
    return f"{counts['n_results']:,} results"


STEPS = {"plan": plan, "commit": commit, "finish": finish_table, "merge": merge, "count": count}


def main() -> None:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--step", choices=STEPS)
    given = parser.parse_args()
    if given.step:
        started = time.monotonic()
        said = STEPS[given.step](given.folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{given.step}: {said}; {time.monotonic() - started:.1f} s, {peak:,.0f} MiB", flush=True)
        return
    given.folder.mkdir(parents=True)
    write_inputs(given.folder, given.inputs)
    for step in ("plan", "commit", "plan", "commit", "finish", "merge", "count"):
        command = [sys.executable, "-m", "benchmarks.ledger_scale", str(given.folder), "--step", step]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
