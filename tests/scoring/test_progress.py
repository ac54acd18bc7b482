from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from bcd import schema
from bcd.scoring import ledger, progress, tiling


class Clock:
    """Time that a test moves."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def inputs(**sizes):
    rows = [
        {schema.IMAGE_ID: name.replace("__", "."), schema.URI: f"/in/{name.replace('__', '.')}"}
        | {schema.SIZE_BYTES: size}
        for name, size in sizes.items()
    ]
    return pa.Table.from_pylist(rows, schema=schema.INDEX)


def counted(*rows, times=(None, None)):
    names = ("input", "rows", "errors", *schema.TIMES.names)
    facts = [dict(zip(names, (*row, *times), strict=True)) for row in rows]
    form = pa.schema([("input", pa.string()), ("rows", pa.int64()), ("errors", pa.int64()), *schema.TIMES])
    table = pa.Table.from_pylist(facts, schema=form)
    return table.append_column("reason", pa.nulls(len(table), pa.string()))


def plan(folder, name, tiles):
    facts = {"slide": name, "uri": name, "patient": None, "width_px": 9, "height_px": 9}
    facts |= {
        "mpp_x": 0.5,
        "mpp_y": 0.5,
        "background_tiles": 1,
        "tissue_area_mm2": 1.0,
        "thumbnail_scale": 1.0,
    }
    seen = tiling._Seen(np.zeros((2, 2, 3), np.uint8), 1.0, np.zeros((2, 2), bool), None)
    tiling._keep(str(folder), tiling.Plan(tiles=tiles, **facts), seen, schema.READING.empty_table())


def test_a_line_now_and_then(tmp_path, clock, capsys):
    shown = progress.Progress(inputs(a__png=10, b__png=10, c__png=20), str(tmp_path), ledger.Done())
    clock.now += 9
    shown.add(counted(("a.png", 1, 0)))
    assert capsys.readouterr().out == ""
    clock.now += 1
    shown.add(counted(("b.png", 1, 1)))
    assert capsys.readouterr().out == "2 of 3 inputs, 2 rows, 1 error; 0.2 rows/s; about 10 s left\n"
    clock.now += 6
    shown.add(counted(("c.png", 1, 0)))
    assert shown.end() == round(3 / 16, 2)
    assert capsys.readouterr().out == "3 of 3 inputs, 3 rows, 1 error; 0.2 rows/s\n"


def test_time_left_goes_by_bytes_and_within_a_slide_by_tiles(tmp_path, clock, capsys):
    """990 of 1,000 bytes are the slide, half of it done: 505 in 50 s, 495 left."""
    shown = progress.Progress(inputs(f__png=10, s__svs=990), str(tmp_path), ledger.Done())
    plan(tmp_path, "s.svs", 40)
    clock.now += 50
    shown.add(counted(("f.png", 1, 0), ("s.svs", 20, 2)))
    assert capsys.readouterr().out == "1 of 2 inputs, 21 rows, 2 errors; 0.4 rows/s; about 49 s left\n"
    shown.add(counted(("s.svs", 20, 0)))
    shown.end()
    assert capsys.readouterr().out == "2 of 2 inputs, 41 rows, 2 errors; 0.8 rows/s\n"


def test_a_manifest_without_sizes_weights_inputs_equally(tmp_path, clock, capsys):
    shown = progress.Progress(inputs(a__png=None, b__png=None, c__svs=None), str(tmp_path), ledger.Done())
    clock.now += 50
    shown.add(counted(("a.png", 1, 0), ("c.svs", 1, 1)))
    assert capsys.readouterr().out == "2 of 3 inputs, 2 rows, 1 error; 0.0 rows/s; about 25 s left\n"


def test_a_resumed_slide_is_done_with_its_last_tile(tmp_path, clock, capsys):
    plan(tmp_path, "s.svs", 10)
    before = ledger.Done(rows=Counter({"s.svs": 6, "gone.png": 1}))
    shown = progress.Progress(inputs(s__svs=70, t__tif=30), str(tmp_path), before)
    clock.now += 10
    shown.add(counted(("s.svs", 3, 0)))
    assert capsys.readouterr().out.startswith("0 of 2 inputs, 3 rows, ")
    clock.now += 10
    shown.add(counted(("s.svs", 1, 0)))
    assert capsys.readouterr().out == "1 of 2 inputs, 4 rows, 0 errors; 0.2 rows/s; about 9 s left\n"
    shown.add(counted(("t.tif", 1, 0)))
    assert shown.end() == 0.25


def test_headspace_is_the_share_of_computing_in_all_time_of_workers(tmp_path, clock):
    shown = progress.Progress(inputs(a__png=1, b__png=1, c__png=1), str(tmp_path), ledger.Done())
    shown.add(counted(("a.png", 1, 0), times=(0.0, 0.0)))
    assert shown.headspace is None
    shown.add(counted(("b.png", 1, 0), times=(3.0, 4.0)))
    shown.add(counted(("c.png", 1, 0), times=(4.0, 16.0)))
    assert shown.headspace == 7 / 20


def test_where_images_came_from(tmp_path, clock):
    """An input without a result came from nowhere."""
    plan(tmp_path, "s.svs", 2)
    sizes = {"a__png": 1, "s__svs": 1, "t__tif": 1}
    shown = progress.Progress(inputs(**sizes), str(tmp_path), ledger.Done())
    shown.add(counted(("a.png", 1, 1)))
    assert shown.images_from is None
    shown.add(counted(("s.svs", 2, 1)))
    assert shown.images_from == "slides"
    shown.add(counted(("t.tif", 1, 0)))
    assert shown.images_from == "files and slides"


def test_nothing_to_do_is_no_line(tmp_path, clock, capsys):
    assert progress.Progress(inputs().slice(0, 0), str(tmp_path), ledger.Done()).end() == 0
    assert capsys.readouterr().out == ""
