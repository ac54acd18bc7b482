"""Faults that a change could bring into the real code or its world, each by name."""

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from bcd import disk, lease, schema, storage
from bcd.scoring import inputs, ledger, score
from tests.simulation.world import World

Plant = Callable[[pytest.MonkeyPatch, World], None]
PLANTED: dict[str, Plant] = {}


def planted(plant: Plant) -> Plant:
    """Register a fault; its docstring says what it is."""
    PLANTED[plant.__name__] = plant
    return plant


def _nothing(*arguments: Any, **options: Any) -> None:
    return None


@planted
def content_is_not_synchronised(patch, world):
    """No fsync of a file before it is renamed."""
    patch.setattr(world.disk, "synchronise", lambda path: os.path.isdir(path) and real(path))
    real = type(world.disk).synchronise.__get__(world.disk)


@planted
def names_are_not_synchronised(patch, world):
    """No fsync of the folder after a rename or a deletion."""
    patch.setattr(disk, "sync_folder", _nothing)


@planted
def files_are_written_in_place(patch, world):
    """Neither aside nor renamed."""
    patch.setattr(disk, "write_aside", disk.write_in_place)


@planted
def what_was_written_aside_stays(patch, world):
    """Nobody deletes what a killed process left."""
    patch.setattr(disk, "HALF_WRITTEN", re.compile("$nothing"))


@planted
def what_is_found_is_not_synchronised(patch, world):
    """A job deletes segments for a summary whose name the killed job before it had not synchronised."""
    patch.setattr(disk, "finish_writes", lambda root: [os.remove(path) for path in _half_written(root)])


def _half_written(root):
    return [path for path in map(str, Path(root).rglob("*")) if disk.HALF_WRITTEN.search(path)]


@planted
def objects_are_torn(patch, world):
    """A store that shows half of an object that is being written."""

    def put(filesystem, path, data):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        for end in (len(data) // 2, len(data)):
            with open(path, "wb") as file:
                file.write(data[:end])
            world.step()

    patch.setattr(storage, "_write_to_store", put)


@planted
def lists_lag(patch, world):
    """A store that lists what was there some seconds ago."""
    known, real = {}, storage.list_folder

    def lagging(uri):
        at, found = known.get(uri, (-100.0, None))
        if world.now - at > 20:
            found = real(uri)
            known[uri] = (world.now, found)
        return found

    patch.setattr(storage, "list_folder", lagging)


@planted
def there_is_no_lease(patch, world):
    """Everybody holds it at once."""
    patch.setattr(lease, "_acquired", lambda uri, wait: lease.Lease(uri))
    patch.setattr(lease.Lease, "claim_uri", property(lambda ours: ours.uri))
    for name in ("claim", "require", "release"):
        patch.setattr(lease.Lease, name, _nothing)


@planted
def a_claim_is_not_looked_at_again(patch, world):
    """Two jobs that come at once see nobody, and then both write their claims."""
    real = lease._acquired

    def acquired(uri, wait):
        if storage.list_files_if_any(storage.join(uri, lease.FOLDER)):
            return real(uri, wait)
        ours = lease.Lease(uri)
        ours.claim()
        return ours

    patch.setattr(lease, "_acquired", acquired)


@planted
def claims_expire_at_once(patch, world):
    """A living job is taken for dead."""
    patch.setattr(lease, "EXPIRES_S", 2.0)
    patch.setattr(lease.Lease, "require", _nothing)


@planted
def nobody_asks_for_the_lease(patch, world):
    """A job that slept long publishes and deletes nevertheless."""
    patch.setattr(lease.Lease, "require", _nothing)


@planted
def merges_are_not_recorded(patch, world):
    """The summary does not say which files belong to the table."""
    real = ledger._read_json

    def read(uri, name):
        known = real(uri, name)
        return known and {key: value for key, value in known.items() if key != "merges"}

    patch.setattr(ledger, "_read_json", read)


@planted
def unfinished_merges_stay(patch, world):
    """Files of a merge that was killed remain in the table."""
    real = storage.delete_files
    patch.setattr(storage, "delete_files", lambda uri, *form: uri.endswith("predictions") or real(uri, *form))


@planted
def segments_go_before_the_summary(patch, world):
    """A job that is killed between the two has nothing to merge again."""
    real = ledger.close_ledger

    def close(ours, summary, n_rows):
        ledger._delete_work(replace(ours, merges=(*ours.merges, ours.lease.id)))
        real(ours, summary, n_rows)

    patch.setattr(ledger, "close_ledger", close)


@planted
def the_summary_comes_before_the_table(patch, world):
    """A kill between them leaves a summary of what is not there."""
    real = score._merge

    def merge(ours, done):
        known = {"generation": ours.generation, "merges": [*ours.merges, ours.lease.id]}
        known["n_rows"] = sum(done.rows.values())
        text = ledger.json.dumps(known).encode()
        storage.write_bytes(storage.join(ours.uri, ledger.SUMMARY), text)
        return real(ours, done)

    patch.setattr(score, "_merge", merge)


@planted
def rows_are_merged_twice(patch, world):
    """A row that two segments have is in the table twice."""
    patch.setattr(ledger, "_once", lambda rows: rows.sort_by("image_id"))


@planted
def replaced_files_are_not_noticed(patch, world):
    """What was scored once is not looked at again."""
    patch.setattr(inputs, "_changed", lambda *known: (set(), set()))


@planted
def versions_are_recorded_too_early(patch, world):
    """The new versions of files are written before the rows of the old ones are deleted."""

    def settle(ours, older, done, found, names):
        now = schema.fill(found.table.append_column(schema.VERSION, found.versions), schema.SEEN_INPUTS)
        uri = storage.join(ours.uri, inputs.FILE)
        before = storage.read_table(uri) if storage.exists(uri) else now.slice(0, 0)
        storage.write_table(uri, now)
        changed, _ = inputs._changed(before, now, older, done, found.table)
        for rows in (older, done):
            ledger.remove(ours, rows, changed)
        return sorted(changed)

    patch.setattr(inputs, "settle", settle)


@planted
def deletions_are_not_synchronised(patch, world):
    """After a power cut, what was deleted is there again."""
    real, sync = storage.delete_file, disk.sync_folder

    def delete(uri):
        disk.sync_folder = _nothing
        try:
            real(uri)
        finally:
            disk.sync_folder = sync

    patch.setattr(storage, "delete_file", delete)


@planted
def lists_are_cut(patch, world):
    """A list ends after its first page."""
    real = storage.list_folder
    patch.setattr(storage, "list_folder", lambda uri: replace(real(uri), files=real(uri).files[:4]))


@planted
def a_table_that_is_changed_is_not_marked(patch, world):
    """Rows are deleted from the table while its summary says that it is complete."""
    patch.setattr(ledger, "reopen", _nothing)


@planted
def rows_are_removed_in_two_steps(patch, world):
    """A file of the table is deleted, and then written without the rows that go."""
    real = ledger._write

    def write(uri, rows):
        if storage.exists(uri):
            storage.delete_file(uri)
        real(uri, rows)

    patch.setattr(ledger, "_write", write)


@planted
def segments_of_one_worker_replace_each_other(patch, world):
    """Segments are named by their number of rows."""

    def commit(batch, uri):
        ledger._write(storage.join(uri, f"{len(batch):024x}.parquet"), batch)
        return pa.table({"input": [], "rows": [], "errors": [], "reason": []})

    patch.setattr(ledger, "commit", commit)


@planted
def older_generations_are_forgotten(patch, world):
    """A second run takes the table for unscored."""
    patch.setattr(ledger.Ledger, "finished", property(lambda ours: rf"part-{ours.owner}-(?!)"))


@planted
def a_finished_job_leaves_its_claim(patch, world):
    """The next one waits for nobody."""
    patch.setattr(lease.Lease, "release", _nothing)
