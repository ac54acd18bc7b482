import random
import uuid
import weakref
from collections import Counter
from dataclasses import replace

import pyarrow as pa
import pytest

from bcd import disk, schema, storage
from bcd.errors import ConfigError
from bcd.scoring import ledger
from bcd.slides import tile
from tests.archives import claimed

FORM = schema.predictions(2, 3)
SETTINGS = {"model": "abc", "input": "in", "cam": "evidence"}


def row(name, **known):
    """A row of the table, by hand; its numbers follow from its id."""
    number = (sum(name.encode()) % 97) / 97
    facts = {"uri": f"in/{name}", "model_id": "abc", "bcd_version": "1", "probability_malignant": number}
    return {"image_id": name, "logit": [0, number], "evidence": [number] * 6, **facts, **known}


def tile_of(slide, x, y):
    place = {"slide": slide, "x_level0_px": x, "y_level0_px": y, "mpp": 0.5}
    return row(tile.tile_id(slide, x, y, 0.5), **place)


def table(rows):
    return pa.Table.from_pylist(rows, schema=FORM)


def commit(ours, rows):
    return ledger.commit(table(rows), ours.work_uri)


def finish(ours):
    """Merge what is committed, and close the ledger; returns rows per file."""
    written = [ledger.merge(part) for part in ledger.cut_parts(ours, ledger.committed(ours))]
    n_rows = sum(written) + sum(ledger.merged(ours).rows.values())
    ledger.close_ledger(ours, {"rows": sum(written)}, n_rows)
    return written


def files(output):
    """The tables of the files, in order."""
    stored = storage.list_files_if_any(f"{output}/predictions")
    return [storage.read_table(file.uri) for file in stored]


def rows_in(output):
    return sorted((r for t in files(output) for r in t.to_pylist()), key=lambda r: r["image_id"])


def expected(rows):
    return table(sorted({r["image_id"]: r for r in rows}.values(), key=lambda r: r["image_id"])).to_pylist()


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.process)])
def output(request, tmp_path):
    """An empty output folder, here and there."""
    if request.param == "disk":
        return str(tmp_path / "out")
    return f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"


# Many requests, of kinds that other tests make on S3 each time.
seldom_on_s3 = pytest.mark.parametrize(
    "output", ["disk", pytest.param("s3", marks=pytest.mark.trial)], indirect=True
)


@pytest.fixture
def small_files(monkeypatch):
    """As many files as there are inputs."""
    monkeypatch.setattr(ledger, "FILE_BYTES", 1)


ROWS = [row(f"f{i:02}.png") for i in range(9)] + [row("x.png", error="empty", error_message="no bytes")]
ROWS += [tile_of(name, x, y) for name in ("s.svs", "a.svs") for y in (0, 100, 2000) for x in (900, 0, 1000)]


def test_begin_refuses_other_settings_and_names_them(output):
    ours, summary = ledger.open_ledger(claimed(output), SETTINGS)
    assert (ours.uri, ours.generation, summary) == (output, 1, None)
    again, summary = ledger.open_ledger(claimed(output), SETTINGS)
    assert (replace(again, lease=ours.lease), summary) == (ours, None)
    other = {"model": "xyz", "input": "in", "overlays": "png"}
    with pytest.raises(
        ConfigError,
        match=r"other settings: --cam evidence -> None; --model abc -> xyz; --overlays None -> png. Repeat",
    ):
        ledger.open_ledger(claimed(output), other)
    assert ledger.read_settings(output) == SETTINGS
    assert ledger.read_settings(f"{output}/none") is None


def test_the_same_rows_committed_twice_are_one_file(output):
    ours, _ = ledger.open_ledger(claimed(output), SETTINGS)
    for rows in (ROWS[:5], ROWS[4::-1], ROWS[5:7]):
        commit(ours, rows)
    assert len(storage.list_files(ours.work_uri)) == 2
    assert ledger.committed(ours).rows == dict.fromkeys([r["image_id"] for r in ROWS[:7]], 1)


def test_a_commit_counts_rows_and_errors_per_input(tmp_path):
    ours, _ = ledger.open_ledger(claimed(str(tmp_path)), SETTINGS)
    broken = tile_of("s.svs", 7, 7) | {"error": "unreadable"}
    counted = commit(ours, [*ROWS[8:], broken])
    assert counted.column_names == ["input", "rows", "errors", "withheld", *schema.TIMES.names, "reason"]
    assert sorted(tuple(r.values()) for r in counted.drop_columns(schema.TIMES.names).to_pylist()) == [
        ("a.svs", 9, 0, 0, None),
        ("f08.png", 1, 0, 0, None),
        ("s.svs", 10, 1, 0, None),
        ("x.png", 1, 1, 0, None),
    ]


def test_the_times_of_rows_are_added_up_and_not_written(tmp_path):
    """Of a slide with two tiles and a field: the file is that of rows without times, to the byte."""
    rows, files = table([*ROWS[:1], tile_of("s.svs", 0, 0), tile_of("s.svs", 7, 0)]), []
    timed = rows.append_column(schema.COMPUTE_S, pa.array([0.5, 0.25, 0.25]))
    timed = timed.append_column(schema.ELAPSED_S, pa.array([1.0, 0.5, 0.5]))
    for name, given in (("plain", rows), ("timed", timed)):
        ours, _ = ledger.open_ledger(claimed(str(tmp_path / name)), SETTINGS)
        counted = ledger.commit(given, ours.work_uri)
        (file,) = storage.list_files(ours.work_uri)
        files.append((file.path, storage.read_bytes(file.uri)))
    assert files[0] == files[1]
    found = {r["input"]: (r["rows"], r["compute_s"], r["elapsed_s"]) for r in counted.to_pylist()}
    assert found == {ROWS[0]["image_id"]: (1, 0.5, 1.0), "s.svs": (2, 0.5, 1.0)}


def test_rows_that_storage_did_not_give_are_left_to_the_next_run(output):
    """An error row counts as done, and would stay for ever."""
    ours, _ = ledger.open_ledger(claimed(output), SETTINGS)
    lost = [r | {"error": "unavailable", "error_message": "denied"} for r in ROWS[7:12]]
    counted = commit(ours, lost)
    told = {"input": "s.svs", "rows": 0, "errors": 0, "withheld": 2, "reason": "denied"}
    assert [r for r in counted.to_pylist() if r["input"] == "s.svs"] == [
        told | dict.fromkeys(schema.TIMES.names)
    ]
    assert ledger.committed(ours) == ledger.Done()
    assert storage.list_files_if_any(ours.work_uri) == []
    assert ledger.is_withheld(counted)
    assert not ledger.is_withheld(commit(ours, []))
    assert not ledger.is_withheld(commit(ours, ROWS[:7] + lost))
    assert ledger.committed(ours).rows == dict.fromkeys([r["image_id"] for r in ROWS[:7]], 1)
    commit(ours, ROWS[7:])
    finish(ours)
    assert rows_in(output) == expected(ROWS)


def test_what_is_committed_counts_each_row_once(output):
    """Tasks of a killed driver continue for a moment: their segments overlap those of the next."""
    ours, _ = ledger.open_ledger(claimed(output), SETTINGS)
    for rows in (ROWS[8:14], ROWS[9:16], [ROWS[9]], ROWS[12:13]):
        commit(ours, rows)
    done = ledger.committed(ours)
    assert done.rows == {"f08.png": 1, "x.png": 1, "s.svs": 6}
    assert ledger.tile_ids(done, {"s.svs"}) == {r["image_id"] for r in ROWS[10:16]}
    assert ledger.tile_ids(done, {"a.svs", "x.png"}) == ledger.tile_ids(done, set()) == frozenset()
    assert ledger.merged(ours).rows == {}


def test_plans_and_half_written_segments_are_no_segments(tmp_path):
    ours, _ = ledger.open_ledger(claimed(str(tmp_path)), SETTINGS)
    commit(ours, ROWS[:1])
    storage.write_bytes(f"{ours.plans_uri}/p.parquet", b"no segment")
    storage.write_bytes(f"{ours.work_uri}/0.parquet.0{disk.ASIDE}", b"half")
    assert ledger.committed(ours).rows == {"f00.png": 1}


def test_merging_sorts_and_keeps_a_slide_in_one_file(output, small_files):
    ours, _ = ledger.open_ledger(claimed(output), SETTINGS)
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    for at in range(0, len(ROWS), 5):
        commit(ours, shuffled[at : at + 8])
    assert finish(ours) == [9] + 9 * [1] + [9, 1]
    tables = files(output)
    assert all(t.schema.equals(FORM) for t in tables)
    assert [t["image_id"][0].as_py().partition("#")[0] for t in tables] == [
        "a.svs",
        *[f"f{i:02}.png" for i in range(9)],
        "s.svs",
        "x.png",
    ]
    places = [(x, y) for y in (0, 100, 2000) for x in (0, 900, 1000)]
    assert [(r["x_level0_px"], r["y_level0_px"]) for r in tables[0].to_pylist()] == places
    assert rows_in(output) == expected(ROWS)


def test_a_file_has_about_the_bytes_it_should(tmp_path, monkeypatch):
    ours, _ = ledger.open_ledger(claimed(str(tmp_path)), SETTINGS)
    commit(ours, ROWS[:9])
    monkeypatch.setattr(ledger, "FILE_BYTES", storage.list_files(ours.work_uri)[0].size_bytes // 2)
    assert finish(ours) == [4, 4, 1]
    assert [file.path for file in storage.list_files(ours.predictions_uri)] == [
        f"part-{ours.owner}-0001-{ours.lease.id}-0000{i}.parquet" for i in range(3)
    ]


def test_merging_holds_one_segment_at_a_time(tmp_path, monkeypatch, small_files):
    """Every segment may hold rows of every file: together they are the whole archive."""
    ours, _ = ledger.open_ledger(claimed(str(tmp_path)), SETTINGS)
    for i in range(9):
        commit(ours, [ROWS[i], row("a.png"), row("z.png")])
    real, held, most = storage.read_table, [], []

    def read(uri, columns=None):
        most.append(sum(table() is not None for table in held))
        held.append(weakref.ref(found := real(uri, columns)))
        return found

    parts = ledger.cut_parts(ours, ledger.committed(ours))
    assert {len(part.segments) for part in parts[1:-1]} == {9}
    monkeypatch.setattr(storage, "read_table", read)
    assert ledger.merge(parts[4]) == 1
    assert most == [0] * 9


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(n, marks=pytest.mark.trial) for n in range(4, 20))]
)
def test_any_rows_in_any_overlapping_segments_give_each_row_once(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    rows = [row(f"{draw.random():.4f}.png") for _ in range(draw.randrange(40))]
    rows += [
        tile_of(f"{i}.svs", x, draw.randrange(3)) for i in range(3) for x in range(draw.randrange(1, 30))
    ]
    monkeypatch.setattr(ledger, "FILE_BYTES", draw.choice([1, 3_000, 2**27]))
    ours, _ = ledger.open_ledger(claimed(str(tmp_path)), SETTINGS)
    cuts = [rows[at : at + 7] for at in range(0, len(rows), 7)]
    for segment in cuts + [draw.sample(rows, draw.randrange(1, len(rows))) for _ in range(5)]:
        commit(ours, segment)
    done = ledger.committed(ours)
    assert sum(done.rows.values()) == sum(finish(ours)) == len(rows)
    assert rows_in(str(tmp_path)) == expected(rows)
    tables = files(str(tmp_path))
    inputs = [t["image_id"].to_pandas().str.partition("#")[0].unique().tolist() for t in tables]
    assert [name for names in inputs for name in names] == sorted(done.rows)


def attempt(output, rows):
    """What the pipeline does, step by step; a test kills it by taking no further step."""
    ours, _ = ledger.open_ledger(claimed(output), SETTINGS)
    older, done = ledger.merged(ours), ledger.committed(ours)
    wanted = Counter(map(input_of, rows))
    missing = {name for name in wanted - done.rows if name not in older.rows}
    tiles = ledger.tile_ids(done, missing)
    todo = [r for r in rows if input_of(r) in missing and r["image_id"] not in tiles]
    for at in range(0, len(todo), 6):
        yield commit(ours, todo[at : at + 6])
    for part in ledger.cut_parts(ours, ledger.committed(ours)):
        yield ledger.merge(part)
    ledger.close_ledger(ours, {}, len(rows))


def input_of(known):
    return known.get("slide") or known["image_id"]


@pytest.mark.parametrize("step", range(1, 12))
def test_killed_anywhere_the_next_run_has_each_row_once(tmp_path, small_files, step):
    """12 files: 5 commits, then merging; first of generation 1, then of generation 2."""
    output, first, added = str(tmp_path), ROWS[:7] + ROWS[10:19], ROWS[7:10] + ROWS[19:]
    for rows in (first, first + added):
        killed = attempt(output, rows)
        for _ in range(step):
            next(killed, None)
        killed.close()
        list(attempt(output, rows))
        assert rows_in(output) == expected(rows)
        assert list(attempt(output, rows)) == []
        assert rows_in(output) == expected(rows)


@seldom_on_s3
def test_killed_in_the_middle_of_merging_while_files_were_added(output, small_files):
    """Files of another division of the table are removed."""
    list(attempt(output, ROWS[:2]))
    killed = attempt(output, ROWS[:9])
    for _ in range(6):
        next(killed)
    assert len(files(output)) == 2 + 4
    ledger.FILE_BYTES = 2**27
    list(attempt(output, ROWS))
    assert len(files(output)) == 3
    assert rows_in(output) == expected(ROWS)


def test_killed_between_merging_and_summary(output):
    ours, _ = ledger.open_ledger(claimed(output), SETTINGS)
    commit(ours, ROWS)
    written = [ledger.merge(part) for part in ledger.cut_parts(ours, ledger.committed(ours))]
    again, summary = ledger.open_ledger(claimed(output), SETTINGS)
    assert (again.generation, summary) == (1, None)
    assert ledger.merged(again).rows == {}
    assert sum(ledger.committed(again).rows.values()) == len(ROWS)
    assert finish(again) == written
    assert rows_in(output) == expected(ROWS)


def test_killed_between_summary_and_cleaning(output, monkeypatch):
    ours, _ = ledger.open_ledger(claimed(output), SETTINGS)
    commit(ours, ROWS[:8])
    with monkeypatch.context() as patch:
        patch.setattr(storage, "delete_files", killed)
        with pytest.raises(KeyboardInterrupt):
            finish(ours)
    assert len(ledger.committed(ours).segments) == 1
    again, summary = ledger.open_ledger(claimed(output), SETTINGS)
    assert (again.generation, summary) == (2, {"rows": 8, "generation": 1, "merges": [ours.lease.id]})
    assert storage.list_files_if_any(f"{output}/work") == []
    assert ledger.merged(again).rows == dict.fromkeys([r["image_id"] for r in ROWS[:8]], 1)
    list(attempt(output, ROWS))
    assert rows_in(output) == expected(ROWS)


def killed(*arguments):
    raise KeyboardInterrupt


def test_half_written_files_of_the_table_are_removed(tmp_path):
    list(attempt(str(tmp_path), ROWS[:3]))
    (part,) = (tmp_path / "predictions").iterdir()
    part.with_name(f"{part.name}.0{disk.ASIDE}").write_bytes(b"half")
    ledger.open_ledger(claimed(str(tmp_path)), SETTINGS)
    assert list((tmp_path / "predictions").iterdir()) == [part]


def test_a_slide_that_could_be_read_after_all_has_no_error_beside_its_tiles(tmp_path):
    ours, _ = ledger.open_ledger(claimed(str(tmp_path)), SETTINGS)
    commit(ours, ROWS[10:17])
    commit(ours, [row("s.svs", slide="s.svs", error="unreadable"), row("t.svs", slide="t.svs", error="x")])
    done = ledger.committed(ours)
    assert (done.rows["s.svs"], done.rows["t.svs"]) == (7, 1)
    commit(ours, ROWS[17:19])
    finish(ours)
    assert rows_in(str(tmp_path))[:9] == expected(ROWS[10:19])
    assert [r["image_id"] for r in rows_in(str(tmp_path))[9:]] == ["t.svs"]


def test_a_finished_output_has_no_segments_and_an_older_table(output):
    list(attempt(output, ROWS))
    assert storage.list_files_if_any(f"{output}/work") == []
    ours, summary = ledger.open_ledger(claimed(output), SETTINGS)
    assert (ours.generation, summary) == (2, {"generation": 1, "merges": list(ours.merges)})
    older = ledger.merged(ours)
    assert older.rows == Counter(map(input_of, ROWS))
    assert ledger.committed(ours) == ledger.Done()


MPP_ERROR = frozenset({"missing_mpp", "bad_mpp"})
REMEDIES = {"mpp": MPP_ERROR, "mpp_override": MPP_ERROR | {"too_coarse"}}


def failed(name, code):
    return row(name, slide=name, error=code, error_message="no", probability_malignant=None)


def begun(output, **flags):
    return ledger.open_ledger(claimed(output), SETTINGS | {"mpp": None} | flags, REMEDIES)[0]


@seldom_on_s3
@pytest.mark.parametrize("merged", [True, False])
def test_a_flag_that_an_error_asked_for_scores_its_rows_again_and_no_other(output, small_files, merged):
    """Of the table or of the segments: each input has one row in the end, good ones are untouched."""
    errors = [failed("m.svs", "missing_mpp"), failed("n.svs", "bad_mpp"), failed("o.svs", "too_coarse")]
    ours = begun(output)
    for part in (ROWS[:4], [*ROWS[4:], errors[0]], errors[1:]):
        commit(ours, part)
    if merged:
        finish(ours)
    ours = begun(output, mpp=0.5)
    names = ledger.merged(ours).rows + ledger.committed(ours).rows
    assert {"m.svs", "n.svs"}.isdisjoint(names)
    assert names["o.svs"] == 1
    assert sum(names.values()) == len(ROWS) + 1
    again = [tile_of("m.svs", 0, 0), tile_of("m.svs", 9, 0), failed("n.svs", "unreadable")]
    commit(ours, again)
    finish(ours)
    assert rows_in(output) == expected([*ROWS, errors[2], *again])
    assert ledger.read_settings(output)["mpp"] == 0.5
    # The same flag again is no change; another value, or none, is one that results have used.
    begun(output, mpp=0.5)
    for other in (0.25, None):
        with pytest.raises(ConfigError, match=rf"--mpp 0\.5 -> {other}"):
            begun(output, mpp=other)
    begun(output, mpp=0.5, mpp_override=0.3)
    assert "o.svs" not in ledger.merged(begun(output, mpp=0.5, mpp_override=0.3)).rows


def test_a_kill_while_rows_are_forgotten_loses_none(output, small_files, monkeypatch):
    """The rest is forgotten by the same command; the command of before scores them as before."""
    errors = [failed("m.svs", "missing_mpp"), failed("n.svs", "missing_mpp")]
    ours = begun(output)
    commit(ours, [*ROWS, *errors])
    finish(ours)
    with monkeypatch.context() as patched:
        patched.setattr(ledger, "_write_settings", lambda *settings: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            begun(output, mpp=0.5)
    assert set(ledger.merged(begun(output)).rows) == {r.get("slide") or r["image_id"] for r in ROWS}
    ours = begun(output, mpp=0.5)
    commit(ours, errors)
    finish(ours)
    assert rows_in(output) == expected([*ROWS, *errors])


def test_a_flag_beside_another_setting_is_refused(output):
    begun(output)
    with pytest.raises(ConfigError, match=r"--cam evidence -> layercam; --mpp None -> 0\.5"):
        begun(output, mpp=0.5, cam="layercam")
    assert ledger.read_settings(output)["mpp"] is None


@pytest.mark.parametrize(
    ("code", "message", "shown"),
    [
        (None, None, True),
        ("truncated", "the file ends or is damaged after 90 bytes", True),
        ("missing_mpp", "the slide has no µm/px; --mpp gives it", True),
        ("unsupported_format", "what is in Doe_1950 is not read", False),
        ("truncated", "CUT is damaged", False),
        ("unreadable", "a link to /gone/smith: no such file", False),
        ("unavailable", "no answer", False),
    ],
)
def test_a_message_that_may_name_a_file_is_hidden(code, message, shown):
    found = ledger.discreet("s3://bucket/Doe_1950/cut.png", code, message)
    assert found == (message if shown else ledger.HIDDEN_MESSAGE)
