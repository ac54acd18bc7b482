"""A sheet that people fill in, safe to open in a spreadsheet; and the same rows for FiftyOne.

A cell that begins with one of `FORMULA` would be computed by a spreadsheet, and names of files may begin so
(OWASP, "CSV Injection"). It gets an apostrophe, which is removed when the sheet is read.
"""

import csv
import io
import json
from collections.abc import Iterable
from typing import Any

import pandas as pd

from bcd import schema
from bcd.data import manifest, names
from bcd.errors import DataError
from bcd.taxonomy import MALIGNANT, SUBTYPES, TUMOR_CLASSES, tumor_class_of
from bcd.text import folded

FORMULA, APOSTROPHE = ("=", "+", "-", "@", "\t", "\r", "\n"), "'"
# A label that leaves an image out.
EXCLUDE = "exclude"


def as_csv(rows: pd.DataFrame) -> bytes:
    """The columns `schema.TRIAGE` as CSV in UTF-8, with the mark by which Excel knows it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(schema.TRIAGE)
    for row in rows.reindex(columns=list(schema.TRIAGE)).astype(object).itertuples(index=False):
        writer.writerow([_cell(value) for value in row])
    return text.getvalue().encode("utf-8-sig")


def _cell(value: Any) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else harmless(str(value))


def harmless(text: str) -> str:
    """A text that no spreadsheet computes."""
    return APOSTROPHE + text if text.startswith((*FORMULA, APOSTROPHE)) else text


def as_fiftyone(rows: pd.DataFrame) -> dict[str, bytes]:
    """Local files and their predictions as a `FiftyOneImageClassificationDataset`: `labels.json` and, with
    the place of each file, `data.json`."""
    labels: dict[str, Any] = {}
    places: dict[str, str] = {}
    for row in rows.astype(object).where(rows.notna(), None).to_dict("records"):
        predicted, p = row[schema.PREDICTED_CLASS], float(row[schema.PROBABILITY_MALIGNANT])
        shown = (schema.IMAGE_ID, schema.REASON, schema.TUMOR_CLASS, schema.PATIENT)
        key = f"{len(labels):06}"
        places[key] = row[schema.URI]
        labels[key] = {
            "label": predicted,
            "confidence": p if tumor_class_of(predicted) == MALIGNANT else 1 - p,
            "attributes": {name: row[name] for name in shown if row[name] is not None},
        }
    files = {"labels.json": {"classes": None, "labels": labels}, "data.json": places}
    return {name: json.dumps(content, indent=1).encode() for name, content in files.items()}


def read_sheet(uri: str, image_ids: Iterable[str]) -> dict[str, tuple[str | None, str | None]]:
    """Class and subtype by image, of the rows of a sheet in which a person wrote one; both None for those to
    leave out. Raises DataError, with the line."""
    found = manifest.read_manifest(uri)
    for column in (schema.IMAGE_ID, schema.REVIEWED_CLASS):
        if column not in found.columns:
            raise DataError(f"{uri}: no column {column!r}; expected a sheet of this job, filled in")
    # As the sheet has them, whose cells are read without surrounding blanks.
    known = {harmless(name).strip(): name for name in image_ids}
    labels: dict[str, tuple[str | None, str | None]] = {}
    for row in found.rows:
        if (written := names.identity(row.cells.get(schema.REVIEWED_CLASS, ""))) is None:
            continue
        name = known.get(row.cells.get(schema.IMAGE_ID, ""))
        if name is None:
            raise DataError(
                f"{row.where}: no result for image {row.cells.get(schema.IMAGE_ID)!r} in --scores"
            )
        label = _label(row.where, written)
        if labels.setdefault(name, label) != label:
            raise DataError(f"{row.where}: image {name!r} has another {schema.REVIEWED_CLASS} above")
    return labels


def _label(where: str, written: str) -> tuple[str | None, str | None]:
    if (word := folded(written)) == EXCLUDE:
        return None, None
    for subtype in SUBTYPES.values():
        if word in (folded(subtype.code), folded(subtype.name)):
            return subtype.tumor_class, subtype.code
    if word in TUMOR_CLASSES:
        return word, None
    raise DataError(
        f"{where}: {schema.REVIEWED_CLASS} {written!r}; expected {', '.join((*TUMOR_CLASSES, *SUBTYPES))}, "
        f"{EXCLUDE} to leave the image out, or nothing"
    )
