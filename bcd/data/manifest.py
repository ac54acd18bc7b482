"""Read manifests, tables of images written by users: CSV or TSV, also gzipped, or Parquet.

The format is recognised by content. Every cell is text without surrounding blanks; an empty one is missing. A
uri is relative to the manifest's folder, absolute, `~/...`, `file://`, or has another scheme.
"""

import csv
import gzip
import io
import math
import posixpath
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bcd import schema, storage
from bcd.data import names
from bcd.errors import DataError, StorageError
from bcd.taxonomy import MPP_BY_MAGNIFICATION
from bcd.text import counted

# Columns with a meaning; others are kept as they are.
KNOWN = frozenset({*schema.INDEX.names, schema.PART})
SEPARATORS = (",", ";", "\t", "|")
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
# By byte order mark; that of UTF-32 begins with that of UTF-16.
ENCODINGS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"\xef\xbb\xbf": "utf-8-sig",
}
# Uncompressed; ten million rows have about 1 GiB. A gzip file of a few MB can expand to any size.
MAX_BYTES = 2**32
# Columns of `inputs`, and one of its own.
GIVEN = (schema.IMAGE_ID, schema.URI, schema.PATIENT, schema.CASE, schema.SLIDE, schema.SITE, schema.MPP)
_FILE = "file"
# Python objects at a time. No column of a manifest has the second name: a header has no NUL.
ROWS_AT_A_TIME = 10_000
_WHERE = "\0where"
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
MAGNIFICATION = re.compile(r"([0-9]{1,4})(\.0*)? ?[xX×]?")


@dataclass(frozen=True)
class Row:
    """Non-empty cells by column, and their place: `m.csv, line 3`."""

    where: str
    cells: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """A table as written."""

    uri: str
    columns: tuple[str, ...]
    rows: Sequence[Row]


class _Rows(Sequence[Row]):
    """The rows of a table, kept as columns: a million dictionaries would need half a GB."""

    def __init__(self, rows: Iterator[Row], columns: Sequence[str]) -> None:
        form = pa.schema([(name, pa.string()) for name in (*dict.fromkeys(columns), _WHERE)])
        self._table = _as_columns((row.cells | {_WHERE: row.where} for row in rows), form)

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return next(_written(self._table.slice(range(len(self))[index], 1)))

    def __iter__(self) -> Iterator[Row]:
        for part in self._table.to_batches(max_chunksize=ROWS_AT_A_TIME):
            yield from _written(part)


def _as_columns(rows: Iterator[dict[str, Any]], form: pa.Schema) -> pa.Table:
    """A table of rows, of which few exist at a time."""
    parts = iter(lambda: list(islice(rows, ROWS_AT_A_TIME)), [])
    return pa.concat_tables([form.empty_table(), *(pa.Table.from_pylist(part, form) for part in parts)])


def _written(part: pa.Table | pa.RecordBatch) -> Iterator[Row]:
    for cells in part.to_pylist():
        yield Row(cells.pop(_WHERE), {name: cell for name, cell in cells.items() if cell is not None})


def is_one(uri: str) -> bool:
    """Whether a URI names a manifest: by its suffix, unless it is a folder."""
    return uri.lower().endswith(schema.MANIFEST_SUFFIXES) and not storage.is_folder(uri)


def read_manifest(uri: str) -> Manifest:
    """Read a manifest.

    Raises:
        DataError: it is no table, a row does not match the header, or there are no rows; names the line.
        StorageError: the URI cannot be read.
    """
    content = storage.read_bytes(uri)
    if content.startswith(PARQUET) or uri.lower().endswith(".parquet"):
        found = _parquet(uri, content)
    else:
        found = _text(uri, _decoded(uri, content))
    if not found.rows:
        raise DataError(f"{uri}: the manifest has no rows")
    return found


def _decoded(uri: str, content: bytes) -> str:
    if content.startswith(GZIP):
        content = _unpacked(uri, content)
    encoding = next((name for mark, name in ENCODINGS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].decode(encoding, "replace").count("\n") + 1
        raise DataError(f"{uri}, line {line}: not a text in {encoding.upper()}; save it as UTF-8") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise DataError(f"{uri}, line {line}: contains a NUL byte; save it as text in UTF-8")
    return text


def _unpacked(uri: str, content: bytes) -> bytes:
    try:
        with gzip.open(io.BytesIO(content)) as file:
            unpacked = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{uri}: not a readable gzip file: {error}") from error
    if len(unpacked) > MAX_BYTES:
        raise DataError(f"{uri}: unpacks to more than {MAX_BYTES:,} bytes; divide it")
    return unpacked


def _text(uri: str, text: str) -> Manifest:
    separator, skipped = _separator(uri, text)
    records = _records(uri, text, separator)
    for _ in range(skipped):
        next(records)
    header = _header(uri, next(records, (1, []))[1])
    rows = (_row(f"{uri}, line {line}", header, cells, separator) for line, cells in records)
    columns = tuple(filter(None, header))
    return Manifest(uri, columns, _Rows(rows, columns))


def _separator(uri: str, text: str) -> tuple[str, int]:
    """Separator of the cells, and number of lines to skip: spreadsheets may begin with `sep=;`."""
    if stated := re.match(r'"?sep=([;,|\t])"?\r?\n', text, re.IGNORECASE):
        return stated[1], 1
    first = "\t" if uri.lower().endswith((".tsv", ".tsv.gz")) else ","

    def fitness(separator: str) -> tuple[bool, int, bool]:
        try:
            columns = next(_records(uri, text, separator), (1, []))[1]
        except DataError:
            return False, 0, False
        ours = {names.column(name, KNOWN) for name in columns} & KNOWN
        return bool(ours), len(columns), separator == first

    return max(SEPARATORS, key=fitness), 0


def _records(uri: str, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Cells of every record, and its first line as an editor counts.

    Blank lines are skipped, and those of separators only, which spreadsheets add.
    """
    lines = io.StringIO(text, newline="")
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    line = 1
    try:
        for cells in reader:
            if any(stripped := [cell.strip() for cell in cells]):
                yield line, stripped
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{uri}, line {line}: {error}; is every quote closed?") from error


def _header(uri: str, written: Sequence[str]) -> list[str]:
    """Names of the columns, known ones normalised; separators at the end of the line add none."""
    header = [names.column(name.strip(), KNOWN) for name in written]
    while header and not header[-1]:
        header.pop()
    if not header:
        raise DataError(f"{uri}: not a readable manifest: it is empty")
    if doubled := [name for name, n in Counter(header).items() if n > 1 and name in KNOWN]:
        raise DataError(f"{uri}: {header.count(doubled[0])} columns are called {doubled[0]!r}; expected one")
    return header


def _row(where: str, header: Sequence[str], cells: Sequence[str], separator: str) -> Row:
    surplus = cells[len(header) :]
    if len(cells) < len(header) or any(surplus):
        raise DataError(
            f"{where}: {counted(len(cells), 'cell')} for {counted(len(header), 'column')}; quote a cell that "
            f"contains {separator!r}"
        )
    return Row(where, {name: cell for name, cell in zip(header, cells, strict=False) if name and cell})


def _parquet(uri: str, content: bytes) -> Manifest:
    try:
        table = pq.ParquetFile(io.BytesIO(content)).read()
        header = _header(uri, table.column_names)
        columns = {name: _cells(name, table.column(i)) for i, name in enumerate(header) if name in KNOWN}
    # Arrow reports damage in all of these ways.
    except (OSError, ValueError, TypeError, OverflowError, MemoryError, pa.ArrowException) as error:
        raise DataError(f"{uri}: not a readable manifest: {error}") from error
    for name, cells in columns.items():
        if nul := next((i for i, cell in enumerate(cells, 1) if "\0" in cell), 0):
            raise DataError(f"{uri}, row {nul}: the {name} contains a NUL byte; expected text")
    rows = (
        Row(f"{uri}, row {i + 1}", {name: cells[i] for name, cells in columns.items() if cells[i]})
        for i in range(len(table))
    )
    return Manifest(uri, tuple(header), _Rows(rows, tuple(columns)))


def _cells(name: str, column: pa.ChunkedArray) -> list[str]:
    """A column as text, "" for null."""
    if pa.types.is_nested(column.type):
        raise TypeError(f"column {name!r} has type {column.type}; expected text or numbers")
    values = ("" if value is None else value for value in column.to_pylist())
    return [(value.decode() if isinstance(value, bytes) else str(value)).strip() for value in values]


def inputs(manifest: Manifest, copies: bool) -> pa.Table:
    """A row per image with columns of `schema.INDEX`, in the manifest's order, without labels.

    Requires a column `uri`; `image_id` (by default the uri as written), `patient`, `case`, `slide`, `site`
    and `mpp` are optional. With `copies`, rows with an `image_id` each may name the same file.

    Raises `DataError`, with the line, if an id or a file occurs twice or a cell is invalid.
    """
    if schema.URI not in manifest.columns:
        raise DataError(f"{manifest.uri}: no column {schema.URI!r}; {names.instead(manifest.columns)}")
    root = storage.parent(manifest.uri)
    # As precise as written: users see these numbers in errors.
    kinds = {schema.MPP: pa.float64()}
    form = pa.schema([(name, kinds.get(name, pa.string())) for name in (*GIVEN, _FILE)])
    table = _as_columns((_input(row, root, copies) for row in manifest.rows), form)
    for name, kind in ((schema.IMAGE_ID, "image id"), (_FILE, "file")):
        _require_once(table[name], manifest, kind)
    return table.drop_columns(_FILE)


def _require_once(values: pa.ChunkedArray, manifest: Manifest, kind: str) -> None:
    """Of the values that are not null."""
    values = values.combine_chunks()
    if len(values) - values.null_count == pc.count_distinct(values).as_py():
        return
    first: dict[str, int] = {}
    for i, value in enumerate(values.to_pylist()):
        if value is not None and (before := first.setdefault(value, i)) != i:
            line = manifest.rows[before].where.rpartition(", ")[2]
            raise DataError(
                f"{manifest.rows[i].where}: {kind} {value!r} is in {line} already; each may occur once"
            )


def _input(row: Row, root: str, copies: bool) -> dict[str, Any]:
    """The columns GIVEN, and the file that no other row may name."""
    if not (uri := row.cells.get(schema.URI)):
        raise DataError(f"{row.where}: the {schema.URI} is empty")
    ids = (schema.PATIENT, schema.CASE, schema.SLIDE, schema.SITE)
    try:
        placed = storage.absolute_uri(uri, root)
    except StorageError as error:
        raise DataError(f"{row.where}: {error}") from error
    return {
        **{name: names.identity(row.cells[name]) for name in ids if name in row.cells},
        schema.MPP: _mpp(row),
        schema.IMAGE_ID: row.cells.get(schema.IMAGE_ID, uri),
        schema.URI: placed,
        _FILE: None if copies and schema.IMAGE_ID in row.cells else posixpath.normpath(placed),
    }


def _mpp(row: Row) -> float | None:
    if (text := row.cells.get(schema.MPP)) is None:
        return None
    value = float(text) if NUMBER.fullmatch(text) else math.nan
    if not 0 < value < math.inf:
        raise DataError(
            f"{row.where}: the {schema.MPP} is {text!r}; expected µm per pixel, a number above 0 such as 0.49"
        )
    return value


def magnification(row: Row) -> int | None:
    """The magnification of a row, such as 40, `40x` or `400.0`.

    Raises `DataError` if BreaKHis has no such magnification, so that its scale is unknown.
    """
    if (text := row.cells.get(schema.MAGNIFICATION)) is None:
        return None
    match = MAGNIFICATION.fullmatch(text)
    if not match or int(match[1]) not in MPP_BY_MAGNIFICATION:
        known = ", ".join(map(str, MPP_BY_MAGNIFICATION))
        raise DataError(f"{row.where}: magnification {text!r}; expected one of {known}, or none and an mpp")
    return int(match[1])
