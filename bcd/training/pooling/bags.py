"""The tiles of each slide of a scored archive: a bag for each slide.

A bag has every row of the predictions table that names the slide and has a result: tiles of a whole slide, or
fields whose manifest names their slide. Rows with an error are counted, and in no bag.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from bcd import schema, storage
from bcd.errors import DataError
from bcd.metrics.top_tiles import TOP
from bcd.scoring.ledger import PREDICTIONS, SUMMARY
from bcd.taxonomy import malignant_mask
from bcd.text import some

# Error of a slide of which no tile has a result.
NO_TILES = "no_tiles"
# Rows of embeddings in memory at a time; 4 MB of a ResNet50's.
ROWS_AT_A_TIME = 1_024
_FIRST = "first_logit"
_COLUMNS = {
    name: pc.field(name)
    for name in (
        *(schema.SLIDE, schema.IMAGE_ID, schema.URI, schema.PATIENT, schema.Y_LEVEL0_PX, schema.X_LEVEL0_PX),
        *(schema.PROBABILITY_MALIGNANT, schema.PREDICTED_CLASS, schema.ERROR, schema.ERROR_MESSAGE),
        schema.MODEL_ID,
    )
} | {_FIRST: pc.list_element(pc.field(schema.LOGIT), 0)}


@dataclass(frozen=True)
class ScoredSlides:
    """The slides of a scored archive, without embeddings.

    `scores` is the absolute URI of the output of the job. `table` has a row for each, sorted by `slide`:
    columns of `schema.POOLED_SLIDES`, and as `sha256` a hash over places and logits of its tiles, because a
    slide is never read whole. `embedding` is the length of one, `model_id` that of the model that made them.
    """

    scores: str
    model_id: str
    embedding: int
    table: pa.Table


@dataclass(frozen=True, eq=False)
class Bags(Mapping[str, np.ndarray]):
    """Embeddings of each slide's tiles, float16 (n, length), by slide; `tiles` names them, row by row."""

    tiles: pa.Table
    embeddings: np.ndarray

    def __getitem__(self, slide: str) -> np.ndarray:
        return self.embeddings[self._rows[slide]]

    def __iter__(self) -> Any:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    @cached_property
    def _rows(self) -> dict[str, slice]:
        # Sorted by slide: a slide's rows follow each other.
        counts = pc.value_counts(self.tiles[schema.SLIDE]).to_pylist()
        ends = np.cumsum([row["counts"] for row in counts]).tolist()
        return {row["values"]: slice(end - row["counts"], end) for row, end in zip(counts, ends, strict=True)}


def read_slides(scores: str) -> ScoredSlides:
    """The slides of the output of a scoring job.

    Raises:
        DataError: it is not finished, has no embeddings or no slide, or rows of several models.
    """
    data = _finished(scores)
    if schema.EMBEDDING not in data.schema.names:
        raise DataError(
            f"{scores} has no embeddings: score the archive with --embeddings, into another --output"
        )
    rows = data.to_table(_COLUMNS)
    models = sorted(rows[schema.MODEL_ID].unique().to_pylist())
    if len(models) > 1:
        raise DataError(
            f"{scores} has rows of several models ({some(models)}), whose embeddings cannot be compared: "
            "score all with one"
        )
    frame = rows.filter(pc.is_valid(rows[schema.SLIDE])).to_pandas()
    slides = [_slide(str(name), group) for name, group in frame.groupby(schema.SLIDE)]
    if not slides:
        raise DataError(
            f"{scores} has no slide: expected whole slides, or a manifest with the column {schema.SLIDE}"
        )
    form = schema.POOLED_SLIDES.append(schema.INDEX.field(schema.SHA256))
    length = data.schema.field(schema.EMBEDDING).type.list_size
    return ScoredSlides(
        storage.absolute(scores), models[0], length, pa.Table.from_pylist(slides, schema=form)
    )


def _finished(scores: str) -> pads.Dataset:
    """The predictions table of a finished scoring job."""
    summary_uri = storage.join(scores, SUMMARY)
    if not storage.exists(summary_uri) or "incomplete" in json.loads(storage.read_bytes(summary_uri)):
        raise DataError(
            f"{scores} is not the output of a finished jobs/score.py: run its command (again) to the end"
        )
    return storage.dataset(storage.join(scores, PREDICTIONS))


def _slide(name: str, rows: pd.DataFrame) -> dict[str, Any]:
    """The row of a slide."""
    patients = sorted(rows[schema.PATIENT].dropna().unique())
    if len(patients) > 1:
        raise DataError(f"slide {name} is of several patients ({some(patients)}); expected one")
    good, failed = rows[rows[schema.ERROR].isna()], rows[rows[schema.ERROR].notna()]
    # The error of a slide that could not be read is that of no tile.
    whole = failed[failed[schema.IMAGE_ID] == name] if good.empty else failed[:0]
    facts: dict[str, Any] = {
        schema.SLIDE: name,
        schema.URI: rows[schema.URI].iloc[0],
        schema.PATIENT: patients[0] if patients else None,
        schema.TILES: len(good),
        schema.ERROR_TILES: len(failed) - len(whole),
    }
    if len(whole):
        return facts | whole.iloc[0][[schema.ERROR, schema.ERROR_MESSAGE]].to_dict()
    if good.empty:
        return facts | {schema.ERROR: NO_TILES, schema.ERROR_MESSAGE: "none of its tiles has a result"}
    probability = np.sort(good[schema.PROBABILITY_MALIGNANT].to_numpy(float))
    numbers = [schema.Y_LEVEL0_PX, schema.X_LEVEL0_PX, _FIRST, schema.PROBABILITY_MALIGNANT]
    content = good[numbers].astype(float).sort_values(numbers).to_numpy().tobytes()
    return facts | {
        schema.MALIGNANT_TILE_SHARE: float(np.mean(malignant_mask(tuple(good[schema.PREDICTED_CLASS])))),
        schema.TOP_PROBABILITY: float(probability[-TOP:].mean()),
        schema.SHA256: hashlib.sha256(content).hexdigest(),
    }


def load_bags(scores: str, slides: Sequence[str], folder: Path) -> Bags:
    """The bags of these slides. The embeddings are in a file in the folder, on this machine: those of a large
    archive exceed its memory.

    Raises:
        DataError: a row has neither an error nor an embedding, or the table changed meanwhile.
    """
    data = storage.dataset(storage.join(scores, PREDICTIONS))
    length = data.schema.field(schema.EMBEDDING).type.list_size
    where = pc.field(schema.ERROR).is_null() & pc.field(schema.SLIDE).isin(list(slides))
    tiles = data.to_table([schema.SLIDE, schema.IMAGE_ID], filter=where)
    order = pc.sort_indices(tiles, [(schema.SLIDE, "ascending"), (schema.IMAGE_ID, "ascending")])
    place = np.empty(len(tiles), np.int64)
    place[order.to_numpy()] = np.arange(len(tiles))
    embeddings = np.memmap(folder / "embeddings", np.float16, "w+", shape=(len(tiles), length))
    at = 0
    options = {"batch_size": ROWS_AT_A_TIME, "batch_readahead": 4, "fragment_readahead": 1}
    for batch in data.to_batches([schema.EMBEDDING], filter=where, **options):
        column = batch.column(0)
        if column.null_count or at + len(batch) > len(tiles):
            raise DataError(
                f"{scores}: rows without an embedding, or another job wrote there: score the archive with "
                "--embeddings, into another --output"
            )
        embeddings[place[at : at + len(batch)]] = column.flatten().to_numpy().reshape(-1, length)
        at += len(batch)
    return Bags(tiles.take(order), embeddings)
