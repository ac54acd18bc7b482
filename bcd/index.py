"""A data URI becomes a table of image rows, without opening a single picture.

Three forms are understood: a BreaKHis tree as published, a folder per class (`benign/`, `malignant/`, or
subtype codes or names; a further folder below it names the patient), and a CSV, TSV or Parquet manifest with
`uri`, `tumor_class` or `subtype`, and `patient`.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from bcd import breakhis, manifest, schema, storage
from bcd.errors import DataError
from bcd.taxonomy import SUBTYPES, TUMOR_CLASSES

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
    if manifest.is_one(data):
        return _from_manifest(data), []
    if storage.is_file(data):
        raise DataError(f"{data} is a file; expected a folder or a manifest ({', '.join(manifest.SUFFIXES)})")
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
    found = manifest.read(data)
    if schema.TUMOR_CLASS not in found.columns and schema.SUBTYPE not in found.columns:
        raise DataError(f"{data}: needs a column {schema.TUMOR_CLASS!r} or {schema.SUBTYPE!r} to train on")
    rows = manifest.inputs(found, copies=False)
    for row, written in zip(rows, found.rows, strict=True):
        row |= _labels(written) | {schema.MAGNIFICATION: manifest.magnification(written)}
    sizes = storage.sizes([row[schema.URI] for row in rows])
    for row, size, written in zip(rows, sizes, found.rows, strict=True):
        if size is None:
            raise DataError(f"{written.where}: {_why_missing(row[schema.URI])}")
        row[schema.SIZE_BYTES] = size
    return _table(rows)


def _why_missing(uri: str) -> str:
    if storage.is_folder(uri):
        return f"{uri} is a folder; expected an image"
    hint = "write / between folders, not \\" if "\\" in uri else "uris are relative to the manifest"
    return f"{uri} does not exist; {hint}"


def _labels(row: manifest.Row) -> dict[str, str | None]:
    """Class and subtype of a manifest row."""
    subtype, tumor_class = row.cells.get(schema.SUBTYPE), row.cells.get(schema.TUMOR_CLASS)
    if subtype is not None and subtype not in SUBTYPES:
        raise DataError(f"{row.where}: unknown subtype {subtype!r}; expected one of {', '.join(SUBTYPES)}")
    tumor_class = tumor_class or (SUBTYPES[subtype].tumor_class if subtype else None)
    if tumor_class not in TUMOR_CLASSES:
        raise DataError(f"{row.where}: unknown tumor_class {tumor_class!r}; expected benign or malignant")
    if subtype and SUBTYPES[subtype].tumor_class != tumor_class:
        raise DataError(
            f"{row.where}: subtype {subtype} is {SUBTYPES[subtype].tumor_class}, not {tumor_class}"
        )
    return {schema.TUMOR_CLASS: tumor_class, schema.SUBTYPE: subtype}
