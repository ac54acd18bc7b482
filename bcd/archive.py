"""What an archive holds: a row per field of view and per whole slide, without opening a single one."""

from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pandas as pd
import pyarrow as pa

from bcd import index, schema, slide, storage
from bcd.errors import DataError

SUFFIXES = tuple(dict.fromkeys(index.IMAGE_SUFFIXES + slide.SLIDE_SUFFIXES))


@dataclass(frozen=True)
class Archive:
    """The inputs, one row each (schema `schema.INDEX`, sorted by id), and how many files are none."""

    table: pa.Table
    ignored: int


def read(uri: str) -> Archive:
    """List the inputs below a folder, or of a manifest.

    A file counts by its suffix; what it really holds is found out when it is read. Several DICOM files of
    one folder are one slide. A manifest needs a column `uri`; `image_id`, `patient`, `case`, `slide` and
    `mpp` are carried along.

    Raises:
        DataError: nothing is there to score.
        StorageError: the URI cannot be read.
    """
    if uri.lower().endswith(index.MANIFEST_SUFFIXES):
        return Archive(_from_manifest(uri), 0)
    files = storage.list_files(uri)
    kept = set(slide.primary([f.path for f in files if f.path.lower().endswith(SUFFIXES)]))
    if not kept:
        raise DataError(f"{uri}: no image or slide below it; expected {', '.join(SUFFIXES)} files")
    rows = [
        {schema.IMAGE_ID: f.path, schema.URI: f.uri, schema.SIZE_BYTES: f.size_bytes}
        for f in files
        if f.path in kept
    ]
    mirax = {PurePosixPath(path).with_suffix("") for path in kept if path.lower().endswith(slide.MRXS)}
    others = [PurePosixPath(f.path) for f in files if not f.path.lower().endswith(SUFFIXES)]
    ignored = sum(mirax.isdisjoint(other.parents) for other in others)
    return Archive(pa.Table.from_pylist(rows, schema=schema.INDEX), ignored)


def _from_manifest(uri: str) -> pa.Table:
    frame = index.read_frame(uri)
    if schema.URI not in frame:
        raise DataError(f"{uri}: no column {schema.URI!r}; it has {', '.join(frame.columns)}")
    if frame.empty:
        raise DataError(f"{uri}: the manifest has no rows")
    root = storage.parent(uri)
    rows = [_row(uri, line, row, root) for line, row in enumerate(frame.to_dict("records"), 2)]
    rows.sort(key=lambda row: row[schema.IMAGE_ID])
    ids = Counter(row[schema.IMAGE_ID] for row in rows)
    if doubled := [name for name, n in ids.items() if n > 1]:
        raise DataError(f"{uri}: {doubled[0]!r} stands {ids[doubled[0]]} times; each input is scored once")
    return pa.Table.from_pylist(rows, schema=schema.INDEX)


def _row(manifest: str, line: int, row: dict[Any, Any], root: str) -> dict[str, Any]:
    known = {str(k): v for k, v in row.items() if k in schema.INDEX.names and not pd.isna(v)}
    where = f"{manifest}, row {line}"
    if not (uri := known.get(schema.URI)):
        raise DataError(f"{where}: the {schema.URI} is empty")
    names = (schema.PATIENT, schema.CASE, schema.SLIDE)
    return {
        **{name: str(known[name]) for name in names if name in known},
        # Scoring needs no magnification, so that any is welcome.
        **index.scale({name: value for name, value in known.items() if name != schema.MAGNIFICATION}, where),
        schema.IMAGE_ID: str(known.get(schema.IMAGE_ID, uri)),
        schema.URI: index.absolute(uri, root),
    }
