"""Inputs that changed since they were scored: remove their rows, so that they are scored again.

An input is compared with `inputs.parquet`, written before it is scored. A file with another size or time of
change has changed unless its bytes have the sha256 in its row; a slide, which has none, has changed. So has
an input whose manifest now states another file, patient, slide or µm/px.
"""

import functools
import hashlib
import logging
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema, storage, text
from bcd.audit.pseudonyms import Pseudonyms
from bcd.data import read
from bcd.data.archive import Archive
from bcd.errors import IncompleteError
from bcd.runtime import inspection
from bcd.scoring import ledger, tiling
from bcd.scoring.ledger import SLIDES, Done, Ledger

logger = logging.getLogger(__name__)

FILE = "inputs.parquet"
FACTS = [name for name in schema.SEEN_INPUTS.names if name not in (schema.IMAGE_ID, schema.VERSION)]


def settle(
    ours: Ledger, older: Done, done: Done, found: Archive, names: Pseudonyms | None = None
) -> list[str]:
    """Remove the rows of changed inputs from table (`older`) and segments (`done`); returns their ids.

    With `names`, the URIs and versions of inputs are kept as ids, which show that they changed.

    Raises:
        StorageError: a transient error for a file that may have changed.
    """
    now = schema.fill(found.table.append_column(schema.VERSION, found.versions), schema.SEEN_INPUTS)
    now = names.table(now, (schema.URI, schema.VERSION)) if names else now
    uri = storage.join(ours.uri, FILE)
    before = storage.read_table(uri) if storage.exists(uri) else schema.SEEN_INPUTS.empty_table()
    scored, planned = _changed(before, now, older, done, found.table)
    for name in planned:
        tiling.forget(ours.plans_uri, name)
    changed = sorted(scored)
    if changed:
        ledger.reopen(ours, changed_text(changed, "since the last run"))
        for held in (older, done):
            ledger.remove(ours, held, set(changed))
        _forget_slides(ours, changed)
    absent = pc.invert(pc.is_in(before[schema.IMAGE_ID], now[schema.IMAGE_ID].combine_chunks()))
    if not (after := pa.concat_tables([now, before.filter(absent)])).equals(before):
        ours.lease.require()
        storage.write_table(uri, after)
    return changed


def _changed(
    before: pa.Table, now: pa.Table, older: Done, done: Done, listed: pa.Table
) -> tuple[set[str], set[str]]:
    """Ids of the inputs that are not what they were: of those with rows, and of slides that may have a plan
    and no row yet. `listed` has their URIs."""
    place = pc.index_in(now[schema.IMAGE_ID], before[schema.IMAGE_ID].combine_chunks())
    now, old = now.filter(pc.is_valid(place)), before.take(place.drop_null())
    differs = [_differ(now[name], old[name]) for name in (*FACTS, schema.VERSION)]
    anything = functools.reduce(pc.or_, differs)
    changed, planned, suspects = set[str](), set[str](), set[str]()
    for row, was in zip(now.filter(anything).to_pylist(), old.filter(anything).to_pylist(), strict=True):
        name = row[schema.IMAGE_ID]
        if not (older.rows[name] or done.rows[name]):
            planned |= {name} if tiling.may_be_slide(row[schema.URI]) else set()
        elif any(was[fact] != row[fact] for fact in FACTS):
            changed.add(name)
        else:
            suspects.add(name)
    rows_of = ledger.hashes(older, suspects) | ledger.hashes(done, suspects)
    changed |= suspects - rows_of.keys()
    files = listed.filter(pc.is_in(listed[schema.IMAGE_ID], pa.array(rows_of, pa.string())))
    return changed | _other_bytes(files, rows_of), planned


def _differ(one: pa.ChunkedArray, other: pa.ChunkedArray) -> pa.ChunkedArray:
    """Where two columns differ; null equals null."""
    one_is_null = pc.xor(pc.is_null(one), pc.is_null(other))
    return pc.or_(pc.not_equal(one, other).fill_null(False), one_is_null)


def _other_bytes(suspects: pa.Table, rows_of: dict[str, str]) -> set[str]:
    """Ids of the files whose sha256 is not that of their row."""
    if not len(suspects):
        return set()
    logger.info(f"{len(suspects):,} files have another size or time of change; comparing their bytes")
    table = inspection.checked(schema.fill(suspects, schema.INDEX), _hashed)
    pairs = zip(table[schema.IMAGE_ID].to_pylist(), table[schema.SHA256].to_pylist(), strict=True)
    return {name for name, digest in pairs if digest != rows_of[name]}


def _hashed(batch: pa.Table) -> pa.Table:
    rows: list[dict[str, str]] = []
    for content in read.contents(batch[schema.URI].to_pylist()):
        if isinstance(content, bytes):
            rows.append({schema.SHA256: hashlib.sha256(content).hexdigest()})
        else:
            rows.append({schema.ERROR: content.code})
    form = pa.schema([(schema.SHA256, pa.string()), (schema.ERROR, pa.string())])
    return pa.Table.from_pylist(rows, form).append_column(schema.IMAGE_ID, batch[schema.IMAGE_ID])


def _forget_slides(ours: Ledger, names: list[str]) -> None:
    for name in names:
        tiling.forget(ours.plans_uri, name)
    uri = storage.join(ours.uri, SLIDES)
    if storage.exists(uri):
        table = storage.read_table(uri)
        changed = pc.is_in(table[schema.SLIDE], pa.array(names, pa.string()))
        if pc.any(changed).as_py():
            ours.lease.require()
            storage.write_table(uri, table.filter(pc.invert(changed)))


def require_same_slides(before: Archive, after: Archive, slides: Iterable[str]) -> None:
    """Raises IncompleteError if a slide was replaced while its tiles were read: they may be of both files."""
    names = sorted(slides)
    first, second = (_versions(archive, names) for archive in (before, after))
    names = [name for name in names if first.get(name) != second.get(name)]
    if names:
        raise IncompleteError(
            f"{changed_text(names, 'during this run')}: run the same command again to score them"
        )


def _versions(archive: Archive, names: list[str]) -> dict[str, str | None]:
    chosen = pc.is_in(archive.table[schema.IMAGE_ID], pa.array(names, pa.string()))
    ids = archive.table[schema.IMAGE_ID].filter(chosen).to_pylist()
    return dict(zip(ids, archive.versions.filter(chosen.combine_chunks()).to_pylist(), strict=True))


def changed_text(names: list[str], when: str) -> str:
    """How many inputs have changed, and the first of them."""
    verb = "has" if len(names) == 1 else "have"
    return f"{text.counted(len(names), 'input')} {verb} changed {when} ({text.some(names)})"
