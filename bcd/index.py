"""A data URI becomes a table of image rows, without opening a single picture.

Three forms are understood: a BreaKHis tree as published, a folder per class (`benign/`, `malignant/`, or
subtype codes or names; a further folder below it names the patient), and a CSV or Parquet manifest with
`uri`, `tumor_class` or `subtype`, and `patient`.
"""

import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd
import pyarrow as pa

from bcd import breakhis, schema, storage
from bcd.errors import DataError
from bcd.taxonomy import MPP_BY_MAGNIFICATION, SUBTYPES, TUMOR_CLASSES

MANIFEST_SUFFIXES = (".csv", ".parquet")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
# A folder of this name holds images of this class: tumour classes, subtype codes, subtype names.
CLASS_FOLDERS: dict[str, tuple[str, str | None]] = {
    **{name: (name, None) for name in TUMOR_CLASSES},
    **{s.code: (s.tumor_class, s.code) for s in SUBTYPES.values()},
    **{s.name: (s.tumor_class, s.code) for s in SUBTYPES.values()},
}


def read(data: str) -> tuple[pa.Table, list[str]]:
    """Index of a training data set.

    Returns:
        A table with schema `schema.INDEX`, sorted by `image_id`, and warnings for people.

    Raises:
        DataError: nothing usable is there; the sentence names the offender.
        StorageError: the URI cannot be read.
    """
    if data.lower().endswith(MANIFEST_SUFFIXES):
        return _from_manifest(data), []
    files = [f for f in storage.list_files(data) if f.path.lower().endswith(IMAGE_SUFFIXES)]
    if not files:
        raise DataError(f"{data}: no image below it; expected {', '.join(IMAGE_SUFFIXES)} files")
    if any(f.path.rpartition("/")[2].startswith(breakhis.PREFIX) for f in files):
        table = breakhis.index(files)
        return _table(table.to_pylist()), breakhis.count_warnings(table)
    return _table([_row_from_folders(data, file) for file in files]), []


def select_magnifications(table: pa.Table, magnifications: Sequence[int]) -> pa.Table:
    """Rows at the given magnifications, and rows without one."""
    chosen = [m is None or m in magnifications for m in table[schema.MAGNIFICATION].to_pylist()]
    if not any(chosen):
        raise DataError(f"no image has a magnification of {list(magnifications)}; see --magnifications")
    return table.filter(pa.array(chosen))


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    rows = sorted(rows, key=lambda row: row[schema.IMAGE_ID])
    ids = Counter(row[schema.IMAGE_ID] for row in rows)
    if doubled := [name for name, n in ids.items() if n > 1]:
        raise DataError(f"image id {doubled[0]!r} stands {ids[doubled[0]]} times; ids must be unique")
    return pa.Table.from_pylist(rows, schema=schema.INDEX)


def _row_from_folders(data: str, file: storage.File) -> dict[str, Any]:
    folders = file.path.split("/")[:-1]
    level = next((i for i, name in enumerate(folders) if name in CLASS_FOLDERS), None)
    if level is None:
        raise DataError(
            f"{data}: {file.path} lies in no class folder; expected benign/ and malignant/ (or subtypes), "
            "BreaKHis names, or a CSV manifest with uri, tumor_class and patient"
        )
    tumor_class, subtype = CLASS_FOLDERS[folders[level]]
    below = folders[level + 1 :]
    if below and subtype is None and below[0] in CLASS_FOLDERS:
        subtype = CLASS_FOLDERS[below[0]][1]
        below = below[1:]
    return {
        schema.IMAGE_ID: file.path,
        schema.URI: file.uri,
        schema.PATIENT: below[0] if below else None,
        schema.TUMOR_CLASS: tumor_class,
        schema.SUBTYPE: subtype,
        schema.SIZE_BYTES: file.size_bytes,
    }


def _from_manifest(data: str) -> pa.Table:
    frame = read_frame(data)
    if schema.URI not in frame:
        raise DataError(f"{data}: no column {schema.URI!r}; it has {', '.join(frame.columns)}")
    if schema.TUMOR_CLASS not in frame and schema.SUBTYPE not in frame:
        raise DataError(f"{data}: needs a column {schema.TUMOR_CLASS!r} or {schema.SUBTYPE!r} to train on")
    if frame.empty:
        raise DataError(f"{data}: the manifest has no rows")
    root = storage.parent(data)
    rows = [_row_from_manifest(data, line, row, root) for line, row in enumerate(frame.to_dict("records"), 2)]
    for row, size in zip(rows, storage.sizes([row[schema.URI] for row in rows]), strict=True):
        if size is None:
            raise DataError(f"{data}: {row[schema.URI]} does not exist; uris are relative to the manifest")
        row[schema.SIZE_BYTES] = size
    return _table(rows)


def read_frame(data: str) -> pd.DataFrame:
    """A CSV or Parquet manifest; an empty cell is missing, everything else in a CSV is text."""
    content = io.BytesIO(storage.read_bytes(data))
    try:
        if data.lower().endswith(".parquet"):
            return pd.read_parquet(content)
        # Ids such as 007 are text; nothing but an empty cell means "unknown".
        return pd.read_csv(content, dtype=str, keep_default_na=False, na_values=[""])
    except (ValueError, pa.ArrowInvalid) as error:
        raise DataError(f"{data}: not a readable manifest: {error}") from error


def _row_from_manifest(data: str, line: int, row: dict[Any, Any], root: str) -> dict[str, Any]:
    known = {str(k): v for k, v in row.items() if k in schema.INDEX.names and not pd.isna(v)}
    where = f"{data}, row {line}"
    if not (uri := known.get(schema.URI)):
        raise DataError(f"{where}: the {schema.URI} is empty")
    subtype, tumor_class = known.get(schema.SUBTYPE), known.get(schema.TUMOR_CLASS)
    if subtype is not None and subtype not in SUBTYPES:
        raise DataError(f"{where}: unknown subtype {subtype!r}; expected one of {', '.join(SUBTYPES)}")
    tumor_class = tumor_class or (SUBTYPES[subtype].tumor_class if subtype else None)
    if tumor_class not in TUMOR_CLASSES:
        raise DataError(f"{where}: unknown tumor_class {tumor_class!r}; expected benign or malignant")
    if subtype and SUBTYPES[subtype].tumor_class != tumor_class:
        raise DataError(f"{where}: subtype {subtype} is {SUBTYPES[subtype].tumor_class}, not {tumor_class}")
    return {
        **{name: str(known[name]) for name in (schema.PATIENT, schema.CASE, schema.SLIDE) if name in known},
        **scale(known, where),
        schema.IMAGE_ID: str(known.get(schema.IMAGE_ID, uri)),
        schema.URI: absolute(uri, root),
        schema.TUMOR_CLASS: tumor_class,
        schema.SUBTYPE: subtype,
    }


def absolute(uri: str, root: str) -> str:
    """The URI of a manifest row: relative ones are below the manifest's own folder."""
    return uri if storage.is_remote(uri) or uri.startswith("/") else storage.join(root, uri)


def scale(known: dict[str, Any], where: str) -> dict[str, Any]:
    """Magnification and µm/px of a manifest row.

    Raises:
        DataError: one of them is no number, or a magnification that BreaKHis does not have.
    """
    try:
        magnification = int(known[schema.MAGNIFICATION]) if schema.MAGNIFICATION in known else None
        mpp = float(known[schema.MPP]) if schema.MPP in known else None
    except ValueError as error:
        raise DataError(f"{where}: magnification and mpp must be numbers: {error}") from error
    # The scale of a magnification is known for BreaKHis cameras only, so a manifest gives its own.
    if magnification is not None and magnification not in MPP_BY_MAGNIFICATION:
        raise DataError(f"{where}: magnification {magnification}; expected {list(MPP_BY_MAGNIFICATION)}")
    return {schema.MAGNIFICATION: magnification, schema.MPP: mpp}
