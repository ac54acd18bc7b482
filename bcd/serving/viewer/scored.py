"""A scored output as the viewer reads it: its summary, its slides, and rows of its table, found by their ids.

Nothing is found by a path or a URI from a caller.
"""

import json
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from bcd import schema, storage
from bcd.errors import DataError, MissingError, StorageError
from bcd.scoring import ledger
from bcd.serving.receive import RefusedError
from bcd.serving.slide_jobs import SlideJobs, no_result
from bcd.serving.viewer.pixels import BoundedThreads

# Seconds in which an output is taken to be as it was; outputs that stay open, and threads that look at them.
LOOK_S, MOST_OPEN, LOOKERS = 2.0, 16, 2
# Of a tile, for the map; and of a field, for its page.
TILE = (
    *(schema.IMAGE_ID, schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX, schema.WIDTH_PX, schema.HEIGHT_PX, schema.MPP),
    *(schema.LOGIT, schema.PROBABILITY_MALIGNANT, schema.PREDICTED_CLASS),
    *(schema.NOVELTY, schema.NOVELTY_CUTOFF, schema.WARNINGS, schema.ERROR),
)
FIELD = (
    *(*TILE, schema.URI, schema.SLIDE, schema.PATIENT, schema.ERROR_MESSAGE),
    *(schema.EVIDENCE, schema.EVIDENCE_HEIGHT, schema.EVIDENCE_WIDTH, schema.EVIDENCE_BIAS),
)


@dataclass(frozen=True, eq=False)
class Scored:
    """An output whose job has finished. `slides` is its table of them (`schema.SLIDES`), and `version`
    changes with each job that writes into it."""

    uri: str
    version: str
    summary: Mapping[str, Any]
    slides: pa.Table

    @property
    def has_pixels(self) -> bool:
        """Whether rows name their files: those of a pseudonymised archive do not."""
        return not self.summary.get("pseudonyms")

    @cached_property
    def predictions(self) -> pads.Dataset:
        """The table, read lazily."""
        return storage.dataset(storage.join(self.uri, ledger.PREDICTIONS))

    def scanner(self, **options: Any) -> pads.Scanner:
        """Reads the table in batches, in one thread and little ahead: callers share the machine."""
        # From a disk a row group at a time; from a store, which takes long for each request, whole files.
        ahead = pads.ParquetFragmentScanOptions(pre_buffer=storage.is_remote(self.uri))
        return self.predictions.scanner(
            use_threads=False,
            batch_readahead=1,  # with 0, pyarrow 26 waits for ever
            fragment_readahead=1,
            fragment_scan_options=ahead,
            **options,
        )

    def slide(self, name: str) -> dict[str, Any] | None:
        """The row of a slide, None where the output has no such slide."""
        rows = self.slides.filter(pc.equal(self.slides[schema.SLIDE], name)).to_pylist()
        return rows[0] if rows else None

    def tiles(self, name: str) -> pa.Table:
        """The tiles of a slide, columns `TILE`, in the order of the table."""
        where = (pc.field(schema.SLIDE) == name) & pc.field(schema.X_LEVEL0_PX).is_valid()
        return self._read(TILE, where)

    def field(self, name: str) -> dict[str, Any] | None:
        """The row of a field of view, columns `FIELD`, None where the output has no such field."""
        where = (pc.field(schema.IMAGE_ID) == name) & pc.field(schema.X_LEVEL0_PX).is_null()
        rows = self._read(FIELD, where).to_pylist()
        return rows[0] if rows else None

    def heat_map(self, name: str) -> bytes:
        """The heat map of a slide of the output as PNG; raises StorageError where there is none."""
        return storage.read_bytes(storage.join(self.uri, ledger.slide_folder(name), ledger.HEATMAP))

    def _read(self, columns: Sequence[str], where: pc.Expression) -> pa.Table:
        try:
            return self.scanner(columns=list(columns), filter=where).to_table()
        except (OSError, pa.ArrowInvalid) as error:
            raise storage.failure(self.uri, "read its table", error) from error


def open_scored(uri: str) -> Scored:
    """Open the output of a scoring job.

    Raises:
        DataError: there is no output of a finished job.
        StorageError: it cannot be read.
    """
    summary_uri = storage.join(uri, ledger.SUMMARY)
    try:
        version = storage.version(summary_uri)
        summary = json.loads(storage.read_bytes(summary_uri))
    except MissingError:
        raise DataError(
            f"{uri}: no {ledger.SUMMARY} there; expected the --output of a scoring job that has ended"
        ) from None
    if "threshold" not in summary:
        raise DataError(f"{summary_uri}: states no threshold; expected the --output of a scoring job")
    slides_uri = storage.join(uri, ledger.SLIDES)
    found = storage.read_table(slides_uri) if storage.exists(slides_uri) else schema.SLIDES.empty_table()
    return Scored(storage.absolute(uri), version, summary, schema.fill(found, schema.SLIDES))


def renewed(scored: Scored) -> Scored:
    """The output as it is now: the same object unless a job has written into it since."""
    if storage.version(storage.join(scored.uri, ledger.SUMMARY)) == scored.version:
        return scored
    return open_scored(scored.uri)


class Outputs:
    """Outputs that are opened when they are asked for, and read again where a job has written into them. One
    event loop calls it.

    Args:
        uri: of the output that callers name by no id; None where there is none.
        jobs: slides that callers have sent, whose outputs they name by the ids of these.
    """

    def __init__(self, uri: str | None, jobs: SlideJobs | None = None) -> None:
        self._uri, self._jobs = uri, jobs
        self._open = OrderedDict[str | None, tuple[float, Scored]]()
        self._lookers = BoundedThreads("look", LOOKERS)

    async def find(self, job_id: str | None) -> Scored:
        """The output of a slide, or the one without an id.

        Raises:
            RefusedError: there is none.
            StorageError: it cannot be read.
        """
        looked, known = self._open.get(job_id, (0.0, None))
        if known:
            if time.monotonic() < looked + LOOK_S:
                return known
            # While this caller looks, others do without.
            self._open[job_id] = time.monotonic(), known
        try:
            found = await self._lookers.run(self._look, job_id, known)
        except (RefusedError, StorageError):
            self._open.pop(job_id, None)
            raise
        self._open[job_id] = time.monotonic(), found
        self._open.move_to_end(job_id)
        while len(self._open) > MOST_OPEN:
            self._open.popitem(last=False)
        return found

    async def find_again(self, job_id: str | None) -> Scored:
        """The output as it is now, not as it was some seconds ago; raises as `find`."""
        self._open.pop(job_id, None)
        return await self.find(job_id)

    def _look(self, job_id: str | None, known: Scored | None) -> Scored:
        uri = self._place(job_id)
        try:
            return renewed(known) if known else open_scored(uri)
        except DataError:  # deleted while it was read
            raise no_result() from None

    def _place(self, job_id: str | None) -> str:
        if job_id is not None and self._jobs:
            return self._jobs.output(job_id)
        if job_id is not None:
            raise RefusedError(404, "no_slide", "no slides are sent to this viewer")
        if self._uri is None:
            why = "this service shows the slides that were sent, from its page, and no archive (--scores)"
            raise RefusedError(404, "no_scores", why)
        return self._uri


def require(row: dict[str, Any] | None) -> dict[str, Any]:
    """The row of an input; raises RefusedError where there is none."""
    if row is None:
        raise RefusedError(404, "not_found", "the output has no input of this name")
    return row
