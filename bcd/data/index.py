"""From the URI of a data set to a table of image rows, without opening an image.

Accepts a BreaKHis tree as published, a folder per class (see `bcd.data.folders`), and a CSV, TSV or Parquet
manifest with `uri`, `tumor_class` or `subtype`, and `patient`. A given division into parts, as folders
(train, val, test) or as the column `part`, is kept.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from bcd import disk, schema, storage
from bcd.data import breakhis, folders, manifest, names, synthetic
from bcd.errors import DataError
from bcd.taxonomy import MAX_MPP, MIN_MPP, PARTS, SUBTYPES, TUMOR_CLASSES, given_names, part_named
from bcd.text import counted, folded

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
# Unsupported formats, which a user may expect to be trained on.
UNREAD_SUFFIXES = (
    *(".bmp", ".gif", ".webp", ".jp2", ".j2k", ".jxl", ".jfif", ".heic", ".avif", ".czi", ".vsi", ".qptiff"),
    *(".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".dcm"),
)


def read_index(data: str, classes: Sequence[str] = ()) -> tuple[pa.Table, list[str]]:
    """Index of a training data set, sorted by `image_id`, and warnings.

    The schema is `schema.INDEX`, or `schema.SPLIT` if the data have parts; `classes` are other names of the
    classes, such as `benign=0` and `malignant=1`.

    Raises:
        DataError: a row, a name or a folder cannot be used; the message names it.
        StorageError: the URI cannot be read.
    """
    rows, warnings = _rows(data, given_names(classes))
    warnings += check_parts(data, rows)
    rows.sort(key=lambda row: row[schema.IMAGE_ID])
    table = pa.Table.from_pylist(rows, schema=schema.SPLIT if schema.PART in rows[0] else schema.INDEX)
    for column in (schema.PATIENT, schema.CASE, schema.SLIDE):
        warnings += names.doubtful_ids(table[column].to_pylist(), column)
    warnings += names.shared_ids(table[schema.PATIENT].to_pylist(), table[schema.SITE].to_pylist())
    return table, warnings


def _rows(data: str, given: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[str]]:
    if manifest.is_one(data):
        return _from_manifest(data, given)
    if storage.is_file(data):
        suffixes = ", ".join(schema.MANIFEST_SUFFIXES)
        raise DataError(f"{data} is a file; expected a folder or a manifest ({suffixes})")
    listing = storage.list_folder(data)
    files = [f for f in listing.files if f.path.lower().endswith(IMAGE_SUFFIXES)]
    if not files:
        raise DataError(f"{data}: no image below it; expected {', '.join(IMAGE_SUFFIXES)} files")
    rows, warnings = _rows_of_files(data, files, given)
    return rows, warnings + _skipped(listing)


def _skipped(listing: storage.Listing) -> list[str]:
    """Warnings of skipped entries that may be images."""
    found = [f"skipped {path}: {fault}" for path, fault in listing.faults.items()]
    suffixes = Counter(file.path.lower().rpartition(".")[2] for file in listing.files)
    for suffix in UNREAD_SUFFIXES:
        if n := suffixes[suffix[1:]]:
            found.append(f"skipped {counted(n, f'{suffix} file')}; expected {', '.join(IMAGE_SUFFIXES)}")
    if n := listing.passed[disk.AGAIN]:
        found.append(f"skipped {counted(n, 'link')} to folders that are already listed")
    return found


def _rows_of_files(
    data: str, files: Sequence[storage.File], given: Mapping[str, str]
) -> tuple[list[dict[str, Any]], list[str]]:
    if not any(f.path.rpartition("/")[2].startswith(breakhis.PREFIX) for f in files):
        return folders.rows_of_tree(data, files, given)
    table = breakhis.index(files)
    parts = folders.parts_of(data, [(file.path, file.path.split("/")[:-1]) for file in files])
    rows = [row | {schema.PART: part} for row, part in zip(table.to_pylist(), parts, strict=True)]
    # Of synthetic images none was published, so none is missing.
    is_drawn = storage.exists(storage.join(data, synthetic.MARKER))
    return rows, [] if is_drawn else breakhis.count_warnings(table)


def check_parts(data: str, rows: list[dict[str, Any]]) -> list[str]:
    """Remove the part from the rows unless all have one and there are several; a warning if removed. Raises
    DataError if some have none."""
    named = {row.get(schema.PART) for row in rows}
    if None in named and len(named) > 1:
        row = next(row for row in rows if row.get(schema.PART) is None)
        raise DataError(
            f"{data}: {row[schema.IMAGE_ID]} is in no {schema.PART}, others are; expected "
            f"{', '.join(PARTS)} for every image, or for none"
        )
    if len(named) > 1:
        return []
    for row in rows:
        row.pop(schema.PART, None)
    return [f"all images are in the {schema.PART} {part}: this is no split" for part in named - {None}]


def select_magnifications(table: pa.Table, magnifications: Sequence[int]) -> pa.Table:
    """Rows at the given magnifications, and rows without one."""
    chosen = [m is None or m in magnifications for m in table[schema.MAGNIFICATION].to_pylist()]
    if not any(chosen):
        raise DataError(f"no image has a magnification of {list(magnifications)}; see --magnifications")
    return table.filter(pa.array(chosen))


def _from_manifest(data: str, given: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[str]]:
    found = manifest.read_manifest(data)
    if schema.TUMOR_CLASS not in found.columns and schema.SUBTYPE not in found.columns:
        needed = f"a column {schema.TUMOR_CLASS!r} or {schema.SUBTYPE!r} to train on"
        raise DataError(f"{data}: needs {needed}; {names.instead(found.columns)}")
    rows = manifest.inputs(found, copies=False).to_pylist()
    for row, written in zip(rows, found.rows, strict=True):
        row |= labels_of_row(written, given) | {schema.MAGNIFICATION: manifest.magnification(written)}
        row[schema.PART] = part_of_row(written)
        mpp = row[schema.MPP]
        if mpp is not None and not MIN_MPP <= mpp <= MAX_MPP:
            possible = f"between {MIN_MPP:g} and {MAX_MPP:g} µm/px are possible"
            raise DataError(f"{written.where}: the {schema.MPP} is {mpp:g}; {possible}")
    sizes = storage.sizes([row[schema.URI] for row in rows])
    for row, size, written in zip(rows, sizes, found.rows, strict=True):
        if size is None:
            raise DataError(f"{written.where}: {_why_missing(row[schema.URI])}")
        row[schema.SIZE_BYTES] = size
    return rows, names.unused_columns(found.columns)


def _why_missing(uri: str) -> str:
    if storage.is_folder(uri):
        return f"{uri} is a folder; expected an image"
    hint = "write / between folders, not \\" if "\\" in uri else "uris are relative to the manifest"
    return f"{uri} does not exist; {hint}"


def labels_of_row(row: manifest.Row, given: Mapping[str, str]) -> dict[str, str | None]:
    """Class and subtype of a manifest row; `given` as from `taxonomy.given_names`. Raises DataError."""
    # `identity`, because a spreadsheet or Parquet may turn the class 0 into 0.0.
    written = names.identity(row.cells.get(schema.TUMOR_CLASS))
    named = names.identity(row.cells.get(schema.SUBTYPE))
    codes = {folded(name): s.code for s in SUBTYPES.values() for name in (s.code, s.name)}
    subtype = codes.get(folded(named)) if named else None
    if named and not subtype:
        raise DataError(f"{row.where}: unknown subtype {named!r}; expected one of {', '.join(SUBTYPES)}")
    expected = "expected benign or malignant, or --classes benign=NAME malignant=NAME"
    if written is None and subtype is None:
        raise DataError(f"{row.where}: the {schema.TUMOR_CLASS} is empty; {expected}")
    of_subtype = SUBTYPES[subtype].tumor_class if subtype else ""
    tumor_class = given.get(folded(written), folded(written)) if written is not None else of_subtype
    if tumor_class not in TUMOR_CLASSES:
        raise DataError(f"{row.where}: unknown tumor_class {written!r}; {expected}")
    if subtype and of_subtype != tumor_class:
        raise DataError(f"{row.where}: subtype {subtype} is {of_subtype}, not {tumor_class}")
    return {schema.TUMOR_CLASS: tumor_class, schema.SUBTYPE: subtype}


def part_of_row(row: manifest.Row) -> str | None:
    """Part of a manifest row; None if the cell is empty. Raises DataError for another word."""
    written = names.identity(row.cells.get(schema.PART))
    part = part_named(written) if written else None
    if written and not part:
        raise DataError(f"{row.where}: unknown {schema.PART} {written!r}; expected {', '.join(PARTS)}")
    return part
