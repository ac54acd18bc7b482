"""Inputs that changed under their name since they were scored: their rows go, and they are scored again.

An input is compared with `inputs.parquet`, written before it is scored. A file with another size or time of
change has changed unless its bytes still have the sha256 in its row; a slide, which is never read whole, has
changed. So has an input whose manifest now gives it another file, patient, slide or µm/px.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema, storage, text
from bcd.data import read
from bcd.data.archive import Archive
from bcd.errors import IncompleteError
from bcd.runtime import inspection
from bcd.scoring import ledger, tiling
from bcd.scoring.ledger import Done, Ledger
from bcd.scoring.slides import TABLE

FILE = "inputs.parquet"
FACTS = [name for name in schema.SEEN_INPUTS.names if name not in (schema.IMAGE_ID, schema.VERSION)]
NAMED = 3


def settle(ours: Ledger, older: Done, done: Done, found: Archive) -> list[str]:
    """Make the books those of the inputs as they are now; returns the ids of those to be scored again.

    Args:
        ours: the books.
        older: what the table holds.
        done: what the segments hold.
        found: the archive as it is now.

    Raises:
        StorageError: storage did not give a file that may have changed, and may give it later.
    """
    now = _table(found)
    uri = storage.join(ours.uri, FILE)
    before = storage.read_table(uri) if storage.exists(uri) else schema.SEEN_INPUTS.empty_table()
    changed = sorted(_changed(before, now, older, done))
    if changed:
        ledger.reopen(ours, changed_text(changed, "since the last run"))
        for held in (older, done):
            ledger.remove(held, set(changed))
        _forget_slides(ours, changed)
    left = pc.invert(pc.is_in(before[schema.IMAGE_ID], now[schema.IMAGE_ID].combine_chunks()))
    if not (after := pa.concat_tables([now, before.filter(left)])).equals(before):
        storage.write_table(uri, after)
    return changed


def _table(found: Archive) -> pa.Table:
    names = found.table[schema.IMAGE_ID].to_pylist()
    versions = pa.array([found.versions.get(name) for name in names], pa.string())
    return schema.fill(found.table.append_column(schema.VERSION, versions), schema.SEEN_INPUTS)


def _changed(before: pa.Table, now: pa.Table, older: Done, done: Done) -> set[str]:
    """Ids of the inputs that have rows of something else than what is there now."""
    known = {row[schema.IMAGE_ID]: row for row in before.to_pylist()}
    changed, suspects = set[str](), list[dict[str, Any]]()
    for row in now.to_pylist():
        name = row[schema.IMAGE_ID]
        old = known.get(name)
        if old is None or old == row or not (older.rows[name] or done.rows[name]):
            continue
        if any(old[fact] != row[fact] for fact in FACTS):
            changed.add(name)
        else:
            suspects.append(row)
    rows_of = ledger.hashes(older, names := {row[schema.IMAGE_ID] for row in suspects})
    rows_of |= ledger.hashes(done, names)
    changed |= names - rows_of.keys()
    return changed | _other_bytes([row for row in suspects if row[schema.IMAGE_ID] in rows_of], rows_of)


def _other_bytes(suspects: list[dict[str, Any]], rows_of: dict[str, str]) -> set[str]:
    """Ids of the files whose sha256 is not that of their row."""
    if not suspects:
        return set()
    print(f"{len(suspects):,} files have another size or time of change; comparing their bytes", flush=True)
    table = inspection.checked(schema.fill(pa.Table.from_pylist(suspects), schema.INDEX), _hashed)
    pairs = zip(table[schema.IMAGE_ID].to_pylist(), table[schema.SHA256].to_pylist(), strict=True)
    return {name for name, digest in pairs if digest != rows_of[name]}


def _hashed(batch: pa.Table) -> pa.Table:
    found: list[dict[str, str]] = []
    for name, content in zip(
        batch[schema.IMAGE_ID].to_pylist(), read.contents(batch[schema.URI].to_pylist()), strict=True
    ):
        if isinstance(content, bytes):
            told = {schema.SHA256: hashlib.sha256(content).hexdigest()}
        else:
            told = {schema.ERROR: content.code}
        found.append({schema.IMAGE_ID: name, **told})
    names = (schema.IMAGE_ID, schema.SHA256, schema.ERROR)
    return pa.Table.from_pylist(found, schema=pa.schema([(name, pa.string()) for name in names]))


def _forget_slides(ours: Ledger, names: list[str]) -> None:
    for name in names:
        tiling.forget(ours.plans_uri, name)
    uri = storage.join(ours.uri, TABLE)
    if storage.exists(uri):
        table = storage.read_table(uri)
        gone = pc.is_in(table[schema.SLIDE], pa.array(names, pa.string()))
        if pc.any(gone).as_py():
            storage.write_table(uri, table.filter(pc.invert(gone)))


def require_same_slides(before: Archive, after: Archive, slides: Iterable[str]) -> None:
    """Raises IncompleteError where a slide was replaced while its tiles were read: they may be of two."""
    names = [name for name in slides if before.versions.get(name) != after.versions.get(name)]
    if names:
        raise IncompleteError(f"{changed_text(names, 'during this run')}: the same command scores them again")


def changed_text(names: list[str], when: str) -> str:
    """How many inputs have changed, and the first of them."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    verb = "has" if len(names) == 1 else "have"
    return f"{text.counted(len(names), 'input')} {verb} changed {when} ({', '.join(names[:NAMED])}{more})"
