"""The viewer's list over a large table: seconds and memory of a page of 50 rows.

    python -m benchmarks.view_list [--rows 1000000]

Makes a table of fields with evidence maps in a temporary folder, in another process, then sorts and filters.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa

from bcd import schema, storage
from bcd.serving.viewer import listing, scored

FILES, CELLS = 4, (7, 11)
QUERIES: list[dict[str, Any]] = [
    {"sort": "probability", "descending": True},
    {"sort": "novelty", "descending": True, "least": 0.9},
    {"sort": "name", "offset": listing.LAST_ROW - 50},
    {"sort": "patient"},
    {"text": "case_001234"},
]


def make(folder: str, n_rows: int) -> None:
    """Write an output with so many fields, and no images."""
    rng, n = np.random.default_rng(0), n_rows // FILES
    for file in range(FILES):
        ids = [f"site{file}/case_{i // 10:06}/field_{i:07}.png" for i in range(n)]
        maps = pa.array(rng.normal(size=n * CELLS[0] * CELLS[1]).astype(np.float32))
        columns = {
            **dict.fromkeys((schema.IMAGE_ID, schema.URI), ids),
            **{name: ["0"] * n for name in (schema.MODEL_ID, schema.BCD_VERSION)},
            schema.PATIENT: [f"p{i // 100}" for i in range(n)],
            schema.PROBABILITY_MALIGNANT: rng.random(n).astype(np.float32),
            schema.NOVELTY: rng.gamma(4, 0.4, n).astype(np.float32),
            schema.EVIDENCE: pa.FixedSizeListArray.from_arrays(maps, CELLS[0] * CELLS[1]),
        }
        table = schema.fill(pa.table(columns), schema.predictions(*CELLS))
        storage.write_table(f"{folder}/predictions/{file}.parquet", table, row_group_size=16_384)
    storage.write_bytes(f"{folder}/summary.json", json.dumps({"threshold": 0.5}).encode())


def peak_mb() -> int:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1_024


def main() -> None:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rows", type=int, default=1_000_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        making = multiprocessing.get_context("spawn").Process(target=make, args=(folder, given.rows))
        making.start()
        making.join()
        output = scored.open_scored(folder)
        print(f"before: {peak_mb()} MB")
        for options in QUERIES:
            wall, cpu = time.perf_counter(), time.process_time()
            found = listing.page(output, listing.Query(kind="fields", **options))
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            print(f"{options}: {found.total:,} rows, {wall:.2f} s, {cpu:.2f} s of CPU, {peak_mb()} MB")


if __name__ == "__main__":
    main()
