"""A file replaced under its name: its rows go, all others stay, and each input has its rows once."""

import contextlib
import hashlib
import json

import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.data import read
from bcd.data.archive import Archive
from bcd.errors import IncompleteError
from bcd.runtime import inspection
from bcd.scoring import inputs, ledger, tiling
from tests.archives import claimed
from tests.scoring.test_ledger import (
    ROWS,
    SETTINGS,
    commit,
    expected,
    finish,
    input_of,
    row,
    rows_in,
    tile_of,
)

NAMES = sorted({input_of(known) for known in ROWS})


def content(name):
    return f"the bytes of {name}".encode()


def archive(changes=None, versions=None):
    """The inputs of `ROWS`, some with another fact or version."""
    facts = {
        name: {schema.IMAGE_ID: name, schema.URI: f"in/{name}"} | (changes or {}).get(name, {})
        for name in NAMES
    }
    table = pa.Table.from_pylist(list(facts.values()), schema=schema.INDEX)
    return Archive(table, pa.array([(versions or {}).get(name, "1-1") for name in NAMES], pa.string()))


def with_hash(known):
    """A row of a file that was read has the hash of its bytes; one of a tile or of no file has none."""
    is_file = known.get("x_level0_px") is None and known["image_id"] != "x.png"
    return known | ({"sha256": hashlib.sha256(content(known["image_id"])).hexdigest()} if is_file else {})


@pytest.fixture(autouse=True)
def hashes_without_ray(monkeypatch):
    """`read.checked` in this process."""
    monkeypatch.setattr(inspection, "checked", lambda table, check: check(table))
    monkeypatch.setattr(read, "contents", lambda uris: (content(uri.removeprefix("in/")) for uri in uris))


def settle(output, found):
    """What a job does first; returns the ledger and what is to be scored again."""
    ours, _ = ledger.open_ledger(claimed(str(output)), SETTINGS)
    changed = inputs.settle(ours, ledger.merged(ours), ledger.committed(ours), found)
    return ours, changed


def scored(output, rows, merged):
    """An output that holds these rows, in its table or only in segments."""
    ours, changed = settle(output, archive())
    assert changed == []
    commit(ours, [with_hash(known) for known in rows])
    if merged:
        finish(ours)


OTHER = {"f03.png": "2-1", "x.png": "1-2", "s.svs": "9-9"}


@pytest.mark.parametrize("merged", [True, False], ids=["table", "segments"])
def test_changed_inputs_lose_their_rows_and_only_they(tmp_path, monkeypatch, merged):
    """A field of other bytes, a file that failed then, and a slide; whether their rows are merged or not."""
    scored(tmp_path, ROWS, merged)
    monkeypatch.setattr(read, "contents", lambda uris: (b"other bytes" for _ in uris))
    ours, changed = settle(tmp_path, archive(versions=OTHER))
    assert changed == sorted(OTHER)
    left = [with_hash(known) for known in ROWS if input_of(known) not in OTHER]
    older, done = ledger.merged(ours), ledger.committed(ours)
    assert older.rows + done.rows == ledger.Counter(map(input_of, left))
    new = [known | {"probability_malignant": 0.5} for known in ROWS if input_of(known) in OTHER]
    commit(ours, new)
    finish(ours)
    assert rows_in(tmp_path) == expected(left + new)
    assert settle(tmp_path, archive(versions=OTHER))[1] == []


def test_the_same_bytes_under_another_time_are_the_same_file(tmp_path, capsys):
    scored(tmp_path, ROWS, merged=True)
    before = rows_in(tmp_path)
    assert settle(tmp_path, archive(versions={"f03.png": "1-2", "f04.png": "1-3"}))[1] == []
    assert "2 files have another size or time of change; comparing their bytes" in capsys.readouterr().out
    assert rows_in(tmp_path) == before
    # Noted: they are not compared again.
    assert settle(tmp_path, archive(versions={"f03.png": "1-2", "f04.png": "1-3"}))[1] == []
    assert "comparing" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "fact",
    [{schema.URI: "in/other.png"}, {schema.PATIENT: "p2"}, {schema.MPP: 0.25}, {schema.SLIDE: "s2"}],
    ids=lambda fact: next(iter(fact)),
)
def test_a_manifest_that_says_something_else_of_an_input_changes_it(tmp_path, fact):
    scored(tmp_path, ROWS, merged=True)
    assert settle(tmp_path, archive({"f05.png": fact}))[1] == ["f05.png"]
    assert "f05.png" not in [known["image_id"] for known in rows_in(tmp_path)]


def test_a_file_that_was_not_there_and_came_is_scored(tmp_path):
    ours, _ = settle(tmp_path, archive(versions={"f00.png": None}))
    commit(ours, [row("f00.png", error="unreadable", error_message="no such file")])
    finish(ours)
    assert settle(tmp_path, archive(versions={"f00.png": None}))[1] == []
    assert settle(tmp_path, archive())[1] == ["f00.png"]


def test_what_has_left_the_archive_keeps_its_rows_until_another_file_comes(tmp_path, monkeypatch):
    scored(tmp_path, ROWS, merged=True)
    found = archive()
    others = pa.array([name != "f02.png" for name in NAMES])
    without = Archive(found.table.filter(others), found.versions.filter(others))
    assert settle(tmp_path, without)[1] == []
    assert "f02.png" in [known["image_id"] for known in rows_in(tmp_path)]
    monkeypatch.setattr(read, "contents", lambda uris: (b"other bytes" for _ in uris))
    assert settle(tmp_path, archive(versions={"f02.png": "2-1"}))[1] == ["f02.png"]


@pytest.mark.parametrize("kill_after", range(1, 7))
def test_a_kill_while_rows_are_removed_loses_and_doubles_none(tmp_path, monkeypatch, kill_after):
    """At each write and deletion in turn; in between the old file comes back, or does not."""
    scored(tmp_path, ROWS[:7] + ROWS[10:19], merged=True)
    ours, _ = settle(tmp_path, archive())
    commit(ours, [with_hash(known) for known in ROWS[7:10] + ROWS[19:]])
    steps = {"left": kill_after}

    def counting(real):
        def step(*arguments, **options):
            steps["left"] -= 1
            if steps["left"] < 0:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        for name in ("write_bytes", "delete_file"):
            patch.setattr(storage, name, counting(getattr(storage, name)))
        patch.setattr(read, "contents", lambda uris: (b"other bytes" for _ in uris))
        with contextlib.suppress(KeyboardInterrupt):
            settle(tmp_path, archive(versions={"f03.png": "2-1", "f08.png": "2-1"}))
    ours, _ = settle(tmp_path, archive())
    older, done = ledger.merged(ours), ledger.committed(ours)
    assert not older.rows.keys() & done.rows.keys()
    held = older.rows + done.rows
    commit(ours, [with_hash(known) for known in ROWS if input_of(known) not in held])
    finish(ours)
    assert rows_in(tmp_path) == expected([with_hash(known) for known in ROWS])


def test_the_plan_and_the_row_of_a_changed_slide_go(tmp_path):
    scored(tmp_path, ROWS, merged=True)
    ours, _ = settle(tmp_path, archive())
    known = [{schema.SLIDE: name, schema.URI: name} for name in ("a.svs", "s.svs")]
    storage.write_table(f"{tmp_path}/slides.parquet", pa.Table.from_pylist(known, schema=schema.SLIDES))
    for name in ("a.svs", "s.svs"):
        for suffix in ("json", "png", "parquet"):
            storage.write_bytes(f"{ours.plans_uri}/{tiling._key(name)}.{suffix}", b"x")
    assert settle(tmp_path, archive(versions={"s.svs": "2-2"}))[1] == ["s.svs"]
    assert {file.path[:24] for file in storage.list_files(ours.plans_uri)} == {tiling._key("a.svs")}
    assert storage.read_table(f"{tmp_path}/slides.parquet")[schema.SLIDE].to_pylist() == ["a.svs"]


def test_the_plan_of_a_changed_slide_goes_before_it_has_a_row(tmp_path):
    """Killed after planning; then the slide, or the regions beside it, are replaced."""
    ours, _ = settle(tmp_path, archive())
    for name in ("a.svs", "s.svs"):
        storage.write_bytes(f"{ours.plans_uri}/{tiling._key(name)}.parquet", b"x")
    assert settle(tmp_path, archive(versions={"s.svs": "1-1 2-2", "f00.png": "2-2"}))[1] == []
    assert [file.path[:24] for file in storage.list_files(ours.plans_uri)] == [tiling._key("a.svs")]


def test_the_summary_says_that_the_table_is_incomplete_until_it_is_not(tmp_path):
    scored(tmp_path, ROWS, merged=True)
    ours, _ = settle(tmp_path, archive(versions={"s.svs": "2-2"}))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["incomplete"] == "1 input has changed since the last run (s.svs)"
    commit(ours, [tile_of("s.svs", 0, 0)])
    finish(ours)
    assert "incomplete" not in json.loads((tmp_path / "summary.json").read_text())


def test_a_slide_that_is_replaced_while_its_tiles_are_read_is_not_merged():
    inputs.require_same_slides(archive(), archive(versions={"f00.png": "2-1"}), ["s.svs", "a.svs"])
    with pytest.raises(
        IncompleteError, match=r"1 input has changed during this run \(s.svs\): run the same command"
    ):
        inputs.require_same_slides(archive(), archive(versions={"s.svs": "2-1"}), ["s.svs", "a.svs"])


def test_changed_inputs_are_counted_and_the_first_named():
    found = inputs.changed_text(["a", "b", "c", "d", "e"], "since")
    assert found == "5 inputs have changed since (a, b, c, and 2 more)"
