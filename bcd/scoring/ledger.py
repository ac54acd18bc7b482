"""Record of what has been scored: every input is scored exactly once, however often the job is killed.

    config.json                    the settings that determine a row; another model or input is rejected. A
                                   flag that an error requires may be added: such rows are scored again
    inputs.parquet                 the inputs: a file that is replaced is scored again (`inputs`)
    work/GENERATION/*.parquet      segments: committed rows, each file written atomically
    predictions/part-ID-GENERATION-LEASE-NUMBER.parquet   the table: segments merged, sorted, each row once
    summary.json                   written last: which generations are merged, under which lease

ID is that of the output folder, so that files of another archive's table are not read. One job at a time
holds the lease of the folder (`bcd.lease`); the files of a merge that was not finished, even by a job that
lost its lease without noticing, are known by their names, and removed.

A segment is named after its rows: a task that is repeated after a lost node writes the same file again. Rows
in two segments are merged into one. Merging can be repeated, too: the segments remain until the summary is
written, and that after the rows of the table are counted.
"""

import hashlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema, storage
from bcd.config.options import differences
from bcd.errors import BusyError, ConfigError, IncompleteError
from bcd.imaging import image
from bcd.lease import Lease
from bcd.runtime import output

CONFIG, SUMMARY, GALLERY = "config.json", "summary.json", "gallery.html"
SLIDES, FOLDER, HEATMAP, GEOJSON = "slides.parquet", "slides", "heatmap.png", "tiles.geojson.gz"
WORK, PREDICTIONS = "work", "predictions"
# Recommended for Parquet; evidence maps compress badly, so files on disk are nearly as large.
FILE_BYTES = 128 * 2**20
ROWS_PER_GROUP = 16_384
INPUT = "input"
# Codes of errors whose messages name files, and what a row has for them where names are hidden.
NAMING = ("unreadable", "too_large", "bad_mask", "bad_regions", image.UNAVAILABLE)
HIDDEN_MESSAGE = "not shown, because it may name the file"
COUNTED = [schema.IMAGE_ID, schema.SLIDE, schema.Y_LEVEL0_PX, schema.X_LEVEL0_PX]
# Name of a setting -> codes of the errors that it resolves.
Remedies = Mapping[str, frozenset[str]]
NO_REMEDIES: Remedies = {}


@dataclass(frozen=True)
class Segment:
    """One committed file, with rows of inputs from `first` to `last`."""

    uri: str
    first: str
    last: str
    n_rows: int
    n_bytes: int


@dataclass
class Done:
    """Rows per input (a field, or all tiles of a slide), and the files that contain them."""

    rows: Counter[str] = field(default_factory=Counter)
    segments: list[Segment] = field(default_factory=list)


@dataclass(frozen=True)
class Ledger:
    """Places of the ledger of one output folder."""

    lease: Lease
    owner: str
    # Of each merged generation, the lease under which it was merged; "" for tables of older versions.
    merges: tuple[str, ...]

    @property
    def uri(self) -> str:
        """The output folder."""
        return storage.absolute(self.lease.uri)

    @property
    def generation(self) -> int:
        """Number of this run: one more than those that are finished."""
        return len(self.merges) + 1

    @property
    def work_uri(self) -> str:
        """Folder of this generation's segments."""
        return storage.join(self.uri, WORK, f"{self.generation:04d}")

    @property
    def plans_uri(self) -> str:
        """Folder of the plans of slides."""
        return storage.join(self.work_uri, "plans")

    @property
    def predictions_uri(self) -> str:
        """Folder of the table."""
        return storage.join(self.uri, PREDICTIONS)

    def part(self, number: int) -> str:
        """Name of a file of the table."""
        return f"part-{self.owner}-{_mark(self.generation, self.lease.id)}{number:05d}.parquet"

    @property
    def finished(self) -> str:
        """Pattern of the names of the files that earlier generations merged."""
        marks = [_mark(generation, lease) for generation, lease in enumerate(self.merges, 1)]
        return rf"part-{self.owner}-({'|'.join(marks) or '(?!)'})\d+\.parquet"


def slide_folder(slide_id: str) -> str:
    """Folder of the results of a slide, relative to the output: never outside it, and unique per id, which
    may be any URI."""
    name = posixpath.normpath("/" + slide_id.rpartition("://")[2]).lstrip("/")
    if name != slide_id:
        name += f"-{hashlib.sha256(slide_id.encode()).hexdigest()[:8]}"
    return f"{FOLDER}/{name}"


def _mark(generation: int, lease: str) -> str:
    return f"{generation:04d}-{lease}-" if lease else f"{generation:04d}-"


def open_ledger(
    lease: Lease,
    settings: dict[str, Any],
    remedies: Remedies = NO_REMEDIES,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Ledger, dict[str, Any] | None]:
    """Open the ledger of an output folder; returns it with the summary of the last finished run.

    Args:
        lease: of the output folder.
        settings: all that determines a row, by flag.
        remedies: settings that may be added later; their errors are then scored again.
        defaults: what settings were before there was a flag for them.

    Raises:
        ConfigError: the folder was written with other settings, or contains foreign files.
        StorageError: nothing can be written there.
    """
    owner = output.claim_folder(lease.uri, output.SCORE, lease.require)
    added = added_settings(lease.uri, settings, remedies, defaults)
    if added is None:
        _write_settings(lease, settings)
    ours, summary = as_left(lease, owner)
    # Segments left by a kill between summary and cleaning would be counted twice.
    _delete_work(ours)
    # An unfinished merge may have cut the files at other places.
    _delete(ours, PREDICTIONS, rf"(?!{ours.finished}$)part-{owner}-.*")
    if added:
        # In this order: after a kill between the two, the same command forgets the rest.
        _forget(ours, frozenset().union(*(remedies[name] for name in added)))
        _write_settings(lease, settings)
    return ours, summary


def added_settings(
    uri: str, settings: dict[str, Any], remedies: Remedies, defaults: Mapping[str, Any]
) -> list[str] | None:
    """The settings that are added to those of an output folder (see `open_ledger`); None for a new one.
    Raises ConfigError for other differences."""
    if (old := read_settings(uri)) is None:
        return None
    old = {**defaults, **old}
    added = differences(old, settings)
    if not all(name in remedies and old.get(name) is None for name in added):
        raise ConfigError(
            f"{uri} contains rows scored with other settings: {'; '.join(added.values())}. "
            "Repeat the earlier command to resume, or choose another --output"
        )
    return list(added)


def as_left(lease: Lease, owner: str) -> tuple[Ledger, dict[str, Any] | None]:
    """The ledger of an output folder as the last job left it, and the summary of the last finished run."""
    summary = _read_json(lease.uri, SUMMARY)
    merges = summary.get("merges", [""] * summary["generation"]) if summary else []
    return Ledger(lease, owner, tuple(merges)), summary


def _write_settings(lease: Lease, settings: dict[str, Any]) -> None:
    uri = lease.uri
    lease.require()
    storage.write_bytes(storage.join(uri, CONFIG), json.dumps(settings, indent=2).encode())


def _forget(ledger: Ledger, codes: frozenset[str]) -> None:
    """Remove the rows of inputs with these errors."""
    wanted = pa.array(sorted(codes), pa.string())

    def select(rows: pa.Table) -> pa.ChunkedArray:
        # No flag resolves the error of a tile, whose slide was read.
        whole_input = pc.is_null(rows[schema.X_LEVEL0_PX])
        return pc.and_(pc.is_in(rows[schema.ERROR], wanted).fill_null(False), whole_input)

    _remove(ledger, merged(ledger).segments + committed(ledger).segments, select)


def remove(ledger: Ledger, done: Done, names: set[str]) -> None:
    """Remove the rows of these inputs."""
    wanted = pa.array(sorted(names), pa.string())
    _remove(ledger, _with_rows_of(done, names), lambda rows: pc.is_in(_with_input(rows)[INPUT], wanted))


def _remove(
    ledger: Ledger, segments: Iterable[Segment], select: Callable[[pa.Table], pa.ChunkedArray]
) -> None:
    """Remove rows file by file, each atomically: a kill neither loses nor doubles another row."""
    for segment in segments:
        selected = select(storage.read_table(segment.uri, [*COUNTED, schema.ERROR]))
        if not pc.any(selected).as_py():
            continue
        kept = storage.read_table(segment.uri).filter(pc.invert(selected))
        ledger.lease.require()
        if len(kept):
            _write(segment.uri, kept)
        else:
            storage.delete_file(segment.uri)


def _with_rows_of(done: Done, names: set[str]) -> list[Segment]:
    """The files that may contain rows of these inputs."""
    return [s for s in done.segments if names and s.first <= max(names) and s.last >= min(names)]


def hashes(done: Done, names: set[str]) -> dict[str, str]:
    """`sha256` of these inputs, of those whose rows have one."""
    digests: dict[str, str] = {}
    for segment in _with_rows_of(done, names):
        table = storage.read_table(segment.uri, [*COUNTED, schema.SHA256])
        table = table.filter(pc.is_valid(table[schema.SHA256]))
        pairs = zip(_with_input(table)[INPUT].to_pylist(), table[schema.SHA256].to_pylist(), strict=True)
        digests |= {name: digest for name, digest in pairs if name in names}
    return digests


def _delete_work(ledger: Ledger) -> None:
    """Remove segments and plans of finished generations; foreign files remain."""
    finished = "|".join(f"{generation:04d}" for generation in range(1, ledger.generation)) or "(?!)"
    name = r"[0-9a-f]{24}\.(parquet|json|png|mask\.png)"
    _delete(ledger, WORK, rf"({finished})/(plans/)?{name}")


def _delete(ledger: Ledger, folder: str, pattern: str) -> None:
    """Delete files below a folder of the output, as far as they are there now."""
    storage.delete_files(storage.join(ledger.uri, folder), pattern, ledger.lease.require)


def read_settings(uri: str) -> dict[str, Any] | None:
    """The settings with which the rows of an output folder were scored; None for a new one."""
    return _read_json(uri, CONFIG)


def _read_json(uri: str, name: str) -> dict[str, Any] | None:
    file_uri = storage.join(uri, name)
    return json.loads(storage.read_bytes(file_uri)) if storage.exists(file_uri) else None


def commit(batch: pa.Table, work_uri: str, hides_uris: bool = False) -> pa.Table:
    """Write rows as one segment, atomically, except those with a transient error, which are deferred.

    With `hides_uris` a row has the id of its input for its URI, and no message that may name a file.

    Returns:
        Per input: rows and errors written, rows deferred (`withheld`), one of their reasons, and the sums of
        `schema.TIMES`, which are not written; null where the rows have none.
    """
    times = schema.fill(batch, schema.TIMES)
    batch = batch.select([name for name in batch.column_names if name not in times.column_names])
    batch = _without_uris(batch) if hides_uris else batch
    withheld = pc.equal(batch[schema.ERROR], image.UNAVAILABLE).fill_null(False)
    kept = batch.filter(pc.invert(withheld))
    if len(kept):
        ids = sorted(kept[schema.IMAGE_ID].to_pylist())
        name = hashlib.sha256("\n".join(ids).encode()).hexdigest()[:24]
        _write(storage.join(work_uri, f"{name}.parquet"), kept)
    failed = pc.and_(pc.is_valid(batch[schema.ERROR]), pc.invert(withheld))
    marks = {"rows": pc.invert(withheld), "errors": failed, "withheld": withheld}
    facts = {INPUT: _with_input(batch)[INPUT]} | {key: mark.cast("int64") for key, mark in marks.items()}
    facts["reason"] = pc.if_else(withheld, batch[schema.ERROR_MESSAGE], pa.scalar(None, pa.string()))
    facts |= {name: times[name] for name in times.column_names}
    sums = [(key, "sum") for key in (*marks, *times.column_names)]
    counted = pa.table(facts).group_by(INPUT).aggregate([*sums, ("reason", "min")])
    return counted.rename_columns([INPUT, *marks, *times.column_names, "reason"])


def _without_uris(batch: pa.Table) -> pa.Table:
    pairs = zip(
        *(batch[name].to_pylist() for name in (schema.URI, schema.ERROR, schema.ERROR_MESSAGE)), strict=True
    )
    messages = pa.array([discreet(*pair) for pair in pairs], pa.string())
    for name, values in ((schema.URI, _with_input(batch)[INPUT]), (schema.ERROR_MESSAGE, messages)):
        place = batch.column_names.index(name)
        batch = batch.set_column(place, batch.schema.field(name), values)
    return batch


def discreet(uri: str, code: str | None, message: str | None) -> str | None:
    """The message of an error, unless it may name a file: readers of storage and slides name theirs."""
    if message is None or code is None:
        return message
    parts = {part for piece in uri.split("/") for part in (piece, piece.rpartition(".")[0]) if len(part) > 2}
    named = any(part.casefold() in message.casefold() for part in parts)
    return HIDDEN_MESSAGE if named or code in NAMING else message


def is_withheld(counted: pa.Table) -> bool:
    """Whether `commit` deferred all rows."""
    return len(counted) > 0 and pc.sum(counted["rows"]).as_py() == 0


def _write(uri: str, table: pa.Table) -> None:
    storage.write_table(uri, table, row_group_size=ROWS_PER_GROUP)


def _with_input(table: pa.Table) -> pa.Table:
    """With the id of each row's input: the slide of a tile, else its own."""
    tile = pc.is_valid(table[schema.X_LEVEL0_PX])
    return table.append_column(INPUT, pc.if_else(tile, table[schema.SLIDE], table[schema.IMAGE_ID]))


def merged(ledger: Ledger) -> Done:
    """Content of the table from earlier generations, without files of an unfinished merge."""
    files = storage.list_files_if_any(ledger.predictions_uri)
    return _scan(file for file in files if re.fullmatch(ledger.finished, file.path))


def committed(ledger: Ledger) -> Done:
    """Content of the segments of this generation."""
    files = storage.list_files_if_any(ledger.work_uri)
    return _scan(file for file in files if "/" not in file.path)


def _scan(files: Iterable[storage.File]) -> Done:
    done = Done()
    files = [file for file in files if file.path.endswith(".parquet")]
    with ThreadPoolExecutor(storage.READ_THREADS) as pool:
        tables = list(pool.map(lambda file: _with_input(storage.read_table(file.uri, COUNTED)), files))
    for file, table in zip(files, tables, strict=True):
        if len(table):
            bounds = pc.min_max(table[INPUT]).as_py()
            done.segments.append(Segment(file.uri, bounds["min"], bounds["max"], len(table), file.size_bytes))
    if tables:
        done.rows.update(_once(pa.concat_tables(tables))[INPUT].to_pylist())
    return done


def _once(table: pa.Table) -> pa.Table:
    """Sorted by input, then place; each row once. The error of a slide that was readable later is dropped:
    without a place, its row comes after those of the tiles."""
    keys = (INPUT, schema.Y_LEVEL0_PX, schema.X_LEVEL0_PX, schema.IMAGE_ID)
    table = table.take(pc.sort_indices(table, [(key, "ascending") for key in keys]))
    if len(table) < 2:
        return table
    row, before = table.slice(1), table.slice(0, len(table) - 1)
    beside_tiles = pc.and_(pc.is_null(row[schema.X_LEVEL0_PX]), pc.equal(row[INPUT], before[INPUT]))
    again = pc.or_(pc.equal(row[schema.IMAGE_ID], before[schema.IMAGE_ID]), beside_tiles)
    return table.filter(pa.concat_arrays([pa.array([True]), pc.invert(again).combine_chunks()]))


def tile_ids(done: Done, slides: set[str]) -> frozenset[str]:
    """Ids of the committed tiles of these slides."""
    wanted = pa.array(sorted(slides), pa.string())
    ids: list[str] = []
    for segment in _with_rows_of(done, slides):
        table = storage.read_table(segment.uri, COUNTED)
        tiles = pc.and_(pc.is_valid(table[schema.X_LEVEL0_PX]), pc.is_in(table[schema.SLIDE], wanted))
        ids += table.filter(tiles)[schema.IMAGE_ID].to_pylist()
    return frozenset(ids)


@dataclass(frozen=True)
class Part:
    """One file of the table: inputs from `first` to `last`, and the segments that may contain their rows;
    written only while the lease is held, whose claim is at `claim_uri`."""

    uri: str
    claim_uri: str
    first: str
    last: str
    segments: tuple[str, ...]


def cut_parts(ledger: Ledger, done: Done) -> list[Part]:
    """Divide the segments' rows into files of about `FILE_BYTES`, in order; a slide is in one file."""
    n_rows, n_bytes = (sum(getattr(s, name) for s in done.segments) for name in ("n_rows", "n_bytes"))
    per_file = max(1, FILE_BYTES * n_rows // max(1, n_bytes))
    bounds: list[list[str]] = []
    filled = per_file
    for name in sorted(done.rows):
        if filled >= per_file:
            bounds.append([])
            filled = 0
        bounds[-1].append(name)
        filled += done.rows[name]
    return [
        Part(
            storage.join(ledger.predictions_uri, ledger.part(i)),
            ledger.lease.claim_uri,
            names[0],
            names[-1],
            tuple(s.uri for s in done.segments if s.first <= names[-1] and s.last >= names[0]),
        )
        for i, names in enumerate(bounds)
    ]


def merge(part: Part) -> int:
    """Write one file of the table, each row once (see `_once`); returns its number of rows.

    Raises:
        BusyError: the lease is lost.
    """
    inside = (pc.field(INPUT) >= part.first) & (pc.field(INPUT) <= part.last)
    # Fields and tiles mix in a segment, so that most segments may contain a row of this file: one at a time.
    rows = [_with_input(storage.read_table(uri)).filter(inside) for uri in part.segments]
    table = _once(pa.concat_tables(rows, promote_options="default"))  # those of older versions lack columns
    if not storage.exists(part.claim_uri):
        raise BusyError(f"{part.uri} is not written, because another job took over the folder")
    _write(part.uri, table.drop_columns(INPUT))
    return len(table)


def reopen(ours: Ledger, why: str) -> None:
    """Mark the table as incomplete in the summary of the last finished run, until the next one ends."""
    if summary := _read_json(ours.uri, SUMMARY):
        content = json.dumps(summary | {"incomplete": why}, indent=2)
        ours.lease.require()
        storage.write_bytes(storage.join(ours.uri, SUMMARY), content.encode())


def close_ledger(ledger: Ledger, summary: dict[str, Any], n_rows: int) -> None:
    """Count the rows of the table, write the summary, and delete the segments.

    Raises:
        IncompleteError: the table does not have `n_rows` rows.
    """
    found = storage.dataset(ledger.predictions_uri).count_rows()
    if found != n_rows:
        raise IncompleteError(
            f"{ledger.predictions_uri} has {found:,} rows where {n_rows:,} are due: another program wrote "
            "there. Run the same command again to resume"
        )
    merges = [*ledger.merges, ledger.lease.id]
    facts = summary | {"generation": len(merges), "merges": merges}
    content = json.dumps(facts, indent=2, allow_nan=False)
    ledger.lease.require()
    storage.write_bytes(storage.join(ledger.uri, SUMMARY), content.encode())
    _delete_work(replace(ledger, merges=tuple(merges)))
