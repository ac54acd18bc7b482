"""Progress of a scoring job, printed as lines."""

import logging
import time

import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema
from bcd.scoring import tiling
from bcd.scoring.ledger import INPUT, Done
from bcd.text import counted, duration, listed

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10


class Progress:
    """Counts committed rows of the inputs `todo` (`schema.INDEX`), besides those of an interrupted run
    (`before`), and prints a line at intervals."""

    def __init__(self, todo: pa.Table, plans_uri: str, before: Done) -> None:
        names, sizes = todo[schema.IMAGE_ID].to_pylist(), todo[schema.SIZE_BYTES].to_pylist()
        # The time for a slide is proportional to its size. A manifest states none: inputs count equally.
        self._weights = {name: size or 1 for name, size in zip(names, sizes, strict=True)}
        self._before = before.rows
        self._expected: dict[str, int] = {}
        self._missing: dict[str, int] = {}
        self._planned: set[str] = set()
        uris = todo[schema.URI].to_pylist()
        self._slides = {name for name, uri in zip(names, uris, strict=True) if tiling.may_be_slide(uri)}
        self._plans_uri = plans_uri
        self._started = self._printed = time.monotonic()
        self._done = self._rows = self._errors = 0
        self.first: float | None = None
        """When the first rows were committed, by the monotonic clock."""
        self.withheld: str | None = None
        self._weight = self._computed = self._elapsed = 0.0
        self._from: set[str] = set()

    def add(self, counted: pa.Table) -> None:
        """Count the rows of one commit; `withheld` keeps the last reason for which a row was deferred."""
        self.first = self.first or time.monotonic()
        columns = (counted[name].to_pylist() for name in (INPUT, "rows", "errors"))
        for name, rows, errors in zip(*columns, strict=True):
            self._rows += rows
            self._errors += errors
            if name not in self._expected:
                plan = tiling.read_plan(self._plans_uri, name) if name in self._slides else None
                self._planned |= {name} if plan else set()
                self._expected[name] = (plan.tiles if plan else 1) - self._before[name]
                self._missing[name] = self._expected[name]
            self._missing[name] -= rows
            self._done += not self._missing[name]
            self._weight += self._weights[name] * rows / max(1, self._expected[name])
            if rows > errors:
                self._from.add("slides" if name in self._planned else "files")
        self._computed += pc.sum(counted[schema.COMPUTE_S]).as_py() or 0.0
        self._elapsed += pc.sum(counted[schema.ELAPSED_S]).as_py() or 0.0
        self.withheld = pc.max(counted["reason"]).as_py() or self.withheld
        running = self._done < len(self._weights)
        if running and time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print()

    @property
    def headspace(self) -> float | None:
        """Fraction of the workers' time, from the first batch of each to its last, in which their models
        compute; None where no worker had a second batch."""
        return min(1.0, self._computed / self._elapsed) if self._elapsed else None

    @property
    def images_from(self) -> str | None:
        """Where the images came from."""
        return listed(sorted(self._from)) or None

    def _print(self) -> None:
        self._printed = time.monotonic()
        seconds = max(self._printed - self._started, 1e-3)
        share = self._weight / sum(self._weights.values())
        unfinished = self._done < len(self._weights) and 0 < share < 1
        left = f"; about {duration(seconds * (1 - share) / share)} left" if unfinished else ""
        logger.info(
            f"{self._done:,} of {counted(len(self._weights), 'input')}, {counted(self._rows, 'row')}, "
            f"{counted(self._errors, 'error')}; {self._rows / seconds:.1f} rows/s{left}",
            extra={"rows": self._rows, "share": round(share, 3)},
        )

    def end(self) -> float:
        """Print the last line; returns rows per second."""
        if self._weights:
            self._print()
        return round(self._rows / max(time.monotonic() - self._started, 1e-3), 2)
