"""What has been scored, kept so that every input is scored exactly once, however often the job is killed.

    config.json                    the settings that decide a row; another model or input is refused. A flag
                                   that an error asked for may be added: such rows are scored again
    inputs.parquet                 what the inputs were: a file that is replaced is scored again (`inputs`)
    work/GENERATION/*.parquet      segments: rows as they were committed, each file whole or not there
    predictions/part-ID-GENERATION-NUMBER.parquet   the table: segments merged, sorted, each row once
    summary.json                   written last: which generation is merged

ID is that of the output folder: no file of another archive's table is taken for one of this.

A segment is named after the rows that it holds: a task that is repeated, after a lost node, writes the same
name again. Rows that stand in two segments all the same (two drivers overlapped) are merged into one. Merging
can be repeated too: it names its files by generation, and the segments stay until the summary stands.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema, storage
from bcd.config.options import changed, changed_flags
from bcd.errors import ConfigError
from bcd.imaging import image
from bcd.runtime import output

CONFIG, SUMMARY, WORK, PREDICTIONS = "config.json", "summary.json", "work", "predictions"
# Parquet likes files of about this size; an evidence map compresses badly, so it is near that on disk.
FILE_BYTES = 128 * 2**20
ROWS_PER_GROUP = 16_384
INPUT = "input"
COUNTED = [schema.IMAGE_ID, schema.SLIDE, schema.Y_LEVEL0_PX, schema.X_LEVEL0_PX]


# Name of a setting -> codes of the errors that it puts right.
Remedies = Mapping[str, frozenset[str]]
NO_REMEDIES: Remedies = {}


@dataclass(frozen=True)
class Segment:
    """One committed file: which inputs it may hold rows of, how many rows and bytes."""

    uri: str
    first: str
    last: str
    n_rows: int
    n_bytes: int


@dataclass
class Done:
    """Rows per input (a field, or all tiles of a slide), and the files that hold them."""

    rows: Counter[str] = field(default_factory=Counter)
    segments: list[Segment] = field(default_factory=list)


@dataclass(frozen=True)
class Ledger:
    """The books of one output folder."""

    uri: str
    generation: int
    owner: str

    @property
    def work_uri(self) -> str:
        """Folder of this generation's segments."""
        return storage.join(self.uri, WORK, f"{self.generation:04d}")

    @property
    def plans_uri(self) -> str:
        """Folder of what was found out about slides before their tiles were scored."""
        return storage.join(self.work_uri, "plans")

    @property
    def predictions_uri(self) -> str:
        """Folder of the table."""
        return storage.join(self.uri, PREDICTIONS)

    def part(self, number: int) -> str:
        """Name of a file of the table; those of earlier generations come before it."""
        return f"part-{self.owner}-{self.generation:04d}-{number:05d}.parquet"


def open_ledger(
    uri: str, settings: dict[str, Any], remedies: Remedies = NO_REMEDIES
) -> tuple[Ledger, dict[str, Any] | None]:
    """Open the books, and the summary of the last finished run into the same folder.

    Args:
        uri: of the output folder.
        settings: all that decides a row, by flag.
        remedies: settings that may be given later, and the errors that are scored again then.

    Raises:
        ConfigError: other settings have been used there, which are named, or it contains anything else.
        StorageError: nothing can be written there.
    """
    owner = output.claim_folder(uri, output.SCORE)
    storage.check_writable(uri)
    old = read_settings(uri)
    given_later = [] if old is None else changed(old, settings)
    if old is None:
        _write_settings(uri, settings)
    elif not all(name in remedies and old.get(name) is None for name in given_later):
        raise ConfigError(
            f"{uri} holds rows that were scored otherwise: {'; '.join(changed_flags(old, settings))}. Repeat "
            "the command of then to go on, or choose another --output"
        )
    summary_uri = storage.join(uri, SUMMARY)
    summary = json.loads(storage.read_bytes(summary_uri)) if storage.exists(summary_uri) else None
    merged = summary["generation"] if summary else 0
    # What a kill between the summary and the cleaning left behind would be counted twice.
    for generation in range(1, merged + 1):
        _delete_work(uri, f"{generation:04d}")
    ours = Ledger(storage.absolute(uri), merged + 1, owner)
    # Of a generation that was not finished, the files may have been cut at other places than now.
    unfinished = rf"part-{owner}-{ours.generation:04d}-\d+\.parquet"
    half_written = rf"part-{owner}-.*{re.escape(storage.ASIDE)}"
    storage.delete_files(ours.predictions_uri, f"{unfinished}|{half_written}")
    if given_later:
        # In this order: a kill between the two leaves a command that forgets the rest.
        _forget(ours, frozenset().union(*(remedies[name] for name in given_later)))
        _write_settings(uri, settings)
    return ours, summary


def _write_settings(uri: str, settings: dict[str, Any]) -> None:
    storage.write_bytes(storage.join(uri, CONFIG), json.dumps(settings, indent=2).encode())


def _forget(ledger: Ledger, codes: frozenset[str]) -> None:
    """Take out the inputs with these errors, as if they had never been read."""
    wanted = pa.array(sorted(codes), pa.string())

    def gone(rows: pa.Table) -> pa.ChunkedArray:
        # A tile's error is no want of a flag: its slide was read with what it had.
        whole_input = pc.is_null(rows[schema.X_LEVEL0_PX])
        return pc.and_(pc.is_in(rows[schema.ERROR], wanted).fill_null(False), whole_input)

    _take_out(merged(ledger).segments + committed(ledger).segments, gone)


def remove(done: Done, names: set[str]) -> None:
    """Take out the rows of these inputs, as if they had never been read."""
    wanted = pa.array(sorted(names), pa.string())
    _take_out(_holding(done, names), lambda rows: pc.is_in(_with_input(rows)[INPUT], wanted))


def _take_out(segments: Iterable[Segment], gone: Callable[[pa.Table], pa.ChunkedArray]) -> None:
    """File by file, each at once: a kill leaves no row lost or doubled that was to stay."""
    for segment in segments:
        lost = gone(storage.read_table(segment.uri, [*COUNTED, schema.ERROR]))
        if pc.all(lost).as_py():
            storage.delete_file(segment.uri)
        elif pc.any(lost).as_py():
            _write(segment.uri, storage.read_table(segment.uri).filter(pc.invert(lost)))


def _holding(done: Done, names: set[str]) -> list[Segment]:
    """The files that may hold rows of these inputs."""
    if not names:
        return []
    return [s for s in done.segments if s.first <= max(names) and s.last >= min(names)]


def hashes(done: Done, names: set[str]) -> dict[str, str]:
    """`sha256` by input, of the rows of these inputs that have one."""
    found: dict[str, str] = {}
    for segment in _holding(done, names):
        table = storage.read_table(segment.uri, [*COUNTED, schema.SHA256])
        table = table.filter(pc.is_valid(table[schema.SHA256]))
        pairs = zip(_with_input(table)[INPUT].to_pylist(), table[schema.SHA256].to_pylist(), strict=True)
        found |= {name: digest for name, digest in pairs if name in names}
    return found


def _delete_work(uri: str, generation: str = r"\d{4}") -> None:
    """Remove segments and plans; what else may lie among them stays."""
    pattern = rf"{generation}/(plans/)?[0-9a-f]{{24}}\.(parquet|json|png)(\..*{re.escape(storage.ASIDE)})?"
    storage.delete_files(storage.join(uri, WORK), pattern)


def read_settings(uri: str) -> dict[str, Any] | None:
    """The settings that the rows of an output folder were scored with; None for a new one."""
    config_uri = storage.join(uri, CONFIG)
    return json.loads(storage.read_bytes(config_uri)) if storage.exists(config_uri) else None


def commit(batch: pa.Table, work_uri: str) -> pa.Table:
    """Write rows as one segment, whole or not at all. Rows that storage did not give are left to a rerun.

    Returns:
        For the progress, of each input: rows and errors written, rows withheld, and why (one of them).
    """
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
    counted = pa.table(facts).group_by(INPUT).aggregate([*((key, "sum") for key in marks), ("reason", "min")])
    return counted.rename_columns([INPUT, *marks, "reason"])


def is_withheld(counted: pa.Table) -> bool:
    """Whether storage gave no row at all of what `commit` was to write."""
    return len(counted) > 0 and pc.sum(counted["rows"]).as_py() == 0


def _write(uri: str, table: pa.Table) -> None:
    storage.write_table(uri, table, row_group_size=ROWS_PER_GROUP)


def _with_input(table: pa.Table) -> pa.Table:
    """With the id of the input that a row belongs to: of the slide for a tile, else its own."""
    tile = pc.is_valid(table[schema.X_LEVEL0_PX])
    return table.append_column(INPUT, pc.if_else(tile, table[schema.SLIDE], table[schema.IMAGE_ID]))


def merged(ledger: Ledger) -> Done:
    """What the table holds from earlier generations. Files of this one, half merged, do not count."""
    files = storage.list_files_if_any(ledger.predictions_uri)
    older = [file for file in files if file.path < ledger.part(0)]
    return _scan(older)


def committed(ledger: Ledger) -> Done:
    """What the segments of this generation hold."""
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
        rows = _once(pa.concat_tables(tables))
        done.rows.update(rows[INPUT].to_pylist())
    return done


def _once(table: pa.Table) -> pa.Table:
    """Sorted by input, then place; each row once. A slide that could be read after all keeps no error of its
    own beside its tiles: having no place, that row is the last."""
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
    for segment in done.segments if slides else []:
        table = storage.read_table(segment.uri, COUNTED)
        tiles = pc.and_(pc.is_valid(table[schema.X_LEVEL0_PX]), pc.is_in(table[schema.SLIDE], wanted))
        ids += table.filter(tiles)[schema.IMAGE_ID].to_pylist()
    return frozenset(ids)


@dataclass(frozen=True)
class Part:
    """One file of the table: the inputs from `first` to `last`, and the segments that may hold their rows."""

    uri: str
    first: str
    last: str
    segments: tuple[str, ...]


def cut_parts(ledger: Ledger, done: Done) -> list[Part]:
    """Cut the segments' rows into files of about `FILE_BYTES`, in the order of the inputs.

    The rows of one input stay together: a slide is in one file, which may be larger.
    """
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
            names[0],
            names[-1],
            tuple(s.uri for s in done.segments if s.first <= names[-1] and s.last >= names[0]),
        )
        for i, names in enumerate(bounds)
    ]


def merge(part: Part) -> int:
    """Write one file of the table: sorted by input, then place; a row that was committed twice once.

    Returns:
        Its number of rows.
    """
    inside = (pc.field(INPUT) >= part.first) & (pc.field(INPUT) <= part.last)
    # Fields and tiles mix in a segment, so that most segments may hold a row of this file: one at a time.
    table = _once(
        pa.concat_tables([_with_input(storage.read_table(uri)).filter(inside) for uri in part.segments])
    )
    _write(part.uri, table.drop_columns(INPUT))
    return len(table)


def reopen(ours: Ledger, why: str) -> None:
    """Say in the summary of the last finished run that the table is incomplete until the next one ends."""
    uri = storage.join(ours.uri, SUMMARY)
    if storage.exists(uri):
        summary = json.loads(storage.read_bytes(uri)) | {"incomplete": why}
        storage.write_bytes(uri, json.dumps(summary, indent=2).encode())


def close_ledger(ledger: Ledger, summary: dict[str, Any]) -> None:
    """Close the books: from here on the table is whole, and the segments are no longer needed."""
    content = json.dumps(summary | {"generation": ledger.generation}, indent=2, allow_nan=False)
    storage.write_bytes(storage.join(ledger.uri, SUMMARY), content.encode())
    _delete_work(ledger.uri)
