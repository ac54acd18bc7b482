"""The list of an output's slides and fields: filtered, sorted, a page at a time.

The table is read in batches, and only the first rows in the order are kept: memory is bounded by a batch and
the last row of the page, and does not grow with the table.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from pydantic import BaseModel, ConfigDict, Field, model_validator

from bcd import schema, storage
from bcd.serving.viewer.scored import Scored

# Rows that are read at a time, and the last row that a page may show: later ones are found by a filter.
BATCH_ROWS, LAST_ROW = 2**16, 10_000
NAME, PATIENT, PROBABILITY, NOVELTY, ERROR = "name", "patient", "probability", "novelty", "error"
ANY, NONE = "any", "none"

# Keys of the rows of a page -> columns. The probability of a slide is its 95 % quantile, its novelty the
# number of tiles that are unlike the training data.
FIELDS: Mapping[str, str] = {
    NAME: schema.IMAGE_ID,
    PATIENT: schema.PATIENT,
    PROBABILITY: schema.PROBABILITY_MALIGNANT,
    NOVELTY: schema.NOVELTY,
    ERROR: schema.ERROR,
    "predicted": schema.PREDICTED_CLASS,
    schema.WARNINGS: schema.WARNINGS,
}
SLIDES: Mapping[str, str] = {
    NAME: schema.SLIDE,
    PATIENT: schema.PATIENT,
    PROBABILITY: [*schema.QUANTILES][-1],
    NOVELTY: schema.WARNED_TILES,
    ERROR: schema.ERROR,
    "share": schema.MALIGNANT_TILE_SHARE,
    "tiles": schema.TILES,
}
COLUMNS: Mapping[str, Mapping[str, str]] = {"slides": SLIDES, "fields": FIELDS}


class Query(BaseModel):
    """What a caller asks the list for: options of the address.

    `text` is a part of a name or patient in any case, `error` a code, `any` or `none`, `least` and `most`
    bound the probability, `unlike` keeps what is unlike the training data.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Literal["slides", "fields"] = "slides"
    sort: Literal["name", "patient", "probability", "novelty", "error", "share", "tiles"] = "name"
    descending: bool = False
    text: str = Field(default="", max_length=200)
    error: str = Field(default="", max_length=60)
    least: float | None = Field(default=None, ge=0, le=1)
    most: float | None = Field(default=None, ge=0, le=1)
    unlike: bool = False
    offset: int = Field(default=0, ge=0)
    limit: int = Field(default=50, ge=1, le=200)

    @model_validator(mode="after")
    def _is_possible(self) -> "Query":
        if self.sort not in COLUMNS[self.kind]:
            raise ValueError(f"{self.kind} cannot be sorted by {self.sort}")
        if self.offset + self.limit > LAST_ROW:
            raise ValueError(f"only the first {LAST_ROW:,} rows are listed; filter them")
        return self


@dataclass(frozen=True)
class Found:
    """Rows of the list, and how many match in all."""

    total: int
    rows: list[dict[str, Any]]


def page(scored: Scored, query: Query) -> Found:
    """One page of the list; raises StorageError where the table cannot be read."""
    columns = COLUMNS[query.kind]
    options = {
        "columns": {key: pc.field(name) for key, name in columns.items()},
        "filter": _filter(query, columns),
        "batch_size": BATCH_ROWS,
    }
    scan = scored.scanner if query.kind == "fields" else pads.dataset(scored.slides).scanner
    try:
        total, first = _first(scan(**options).to_batches(), query)
    except (OSError, pa.ArrowInvalid) as error:
        raise storage.failure(scored.uri, "read its table", error) from error
    return Found(total, first.slice(query.offset).to_pylist())


def _filter(query: Query, columns: Mapping[str, str]) -> pc.Expression:
    field = {key: pc.field(name) for key, name in columns.items()}
    where = pc.scalar(True)
    if query.kind == "fields":
        # A slide that could not be opened has one row, which is that of its name.
        is_slide = pc.coalesce(pc.field(schema.SLIDE) == pc.field(schema.IMAGE_ID), pc.scalar(False))
        where = pc.field(schema.X_LEVEL0_PX).is_null() & ~is_slide
    if query.least is not None:
        where &= field[PROBABILITY] >= query.least
    if query.most is not None:
        where &= field[PROBABILITY] <= query.most
    if query.unlike:
        found = pc.list_value_length(field[schema.WARNINGS]) if query.kind == "fields" else field[NOVELTY]
        where &= found > 0
    if query.error in (ANY, NONE):
        where &= field[ERROR].is_valid() if query.error == ANY else field[ERROR].is_null()
    elif query.error:
        where &= field[ERROR] == query.error
    if query.text:
        parts = [pc.match_substring(field[key], query.text, ignore_case=True) for key in (NAME, PATIENT)]
        where &= pc.coalesce(parts[0], pc.scalar(False)) | pc.coalesce(parts[1], pc.scalar(False))
    return where


def _first(batches: Iterable[pa.RecordBatch], query: Query) -> tuple[int, pa.Table]:
    """Number of rows, and the first of them in the order, up to the end of the page."""
    count, total, best = query.offset + query.limit, 0, None
    order: list[tuple[str, str]] = [(query.sort, "descending" if query.descending else "ascending")]
    order += [(NAME, "ascending")] if query.sort != NAME else []
    for batch in batches:
        total += len(batch)
        rows = pa.Table.from_batches([batch])
        if best is not None:
            rows = pa.concat_tables([best, _may_be_first(rows, best, query) if len(best) == count else rows])
        best = rows.take(pc.sort_indices(rows, order)[:count])
    return total, best if best is not None else pa.table({})


def _may_be_first(rows: pa.Table, best: pa.Table, query: Query) -> pa.Table:
    """Rows that are not behind the last of the best: sorting all of them would take most of the time."""
    last = best[query.sort][-1]
    if not last.is_valid:
        return rows
    before = pc.greater_equal if query.descending else pc.less_equal
    return rows.filter(before(rows[query.sort], last))
