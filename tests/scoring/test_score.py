import threading
from collections import Counter

import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.config.scoring import ScoreConfig
from bcd.errors import ConfigError, IncompleteError
from bcd.scoring import ledger, score, tiling
from tests.archives import claimed

PLAN = tiling.Plan(
    slide="s.svs",
    uri="/s.svs",
    patient=None,
    width_px=100,
    height_px=100,
    mpp_x=0.5,
    mpp_y=0.5,
    tiles=3,
    background_tiles=1,
    tissue_area_mm2=0.1,
    thumbnail_scale=1.0,
)


def inputs(*names, size_bytes=10):
    rows = [{schema.IMAGE_ID: name, schema.URI: f"/{name}", schema.SIZE_BYTES: size_bytes} for name in names]
    return pa.Table.from_pylist(rows, schema=schema.INDEX)


def books(rows, older=(), names=("a.png", "b.png", "s.svs")):
    done, before = ledger.Done(rows=Counter(rows)), ledger.Done(rows=Counter(dict.fromkeys(older, 1)))
    return score.Books(inputs(*names), before, done, {"s.svs": PLAN})


def open_names(found):
    return found.open_inputs()[schema.IMAGE_ID].to_pylist()


def test_an_input_is_complete_with_all_its_rows():
    assert open_names(books({})) == ["a.png", "b.png", "s.svs"]
    assert open_names(books({"a.png": 1, "s.svs": 2})) == ["b.png", "s.svs"]
    assert open_names(books({"a.png": 1, "s.svs": 3}, older=["b.png"])) == []


def test_compiling_is_decided_once_for_an_output(tmp_path, monkeypatch):
    monkeypatch.setattr(score.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(score.cluster, "total_resources", lambda: {"CPU": 2.0, "GPU": 0.0})
    config = ScoreConfig(model="m", input="i", output=str(tmp_path), precision="bfloat16")
    few, many = inputs("a.png"), inputs(*(f"{i}.png" for i in range(score.COMPILE_FROM_FILES)))
    assert not score._compiles(config, few)
    assert score._compiles(config, many)
    assert score._compiles(config, inputs("a.svs", size_bytes=score.COMPILE_FROM_SLIDE_BYTES))
    assert score._compiles(config.model_copy(update={"compile": "on"}), few)
    assert not score._compiles(config.model_copy(update={"compile": "off"}), many)
    ledger.open_ledger(claimed(str(tmp_path)), {"compile": False})
    assert not score._compiles(config, many)


@pytest.mark.parametrize(
    ("n_gpus", "precision", "compiler", "expected"),
    [
        (0, "float32", "/usr/bin/g++", False),
        (0, "auto", "/usr/bin/g++", False),
        (0, "bfloat16", "/usr/bin/g++", True),
        (0, "bfloat16", None, False),
        (1, "float32", None, True),
        (1, "bfloat16", None, True),
    ],
)
def test_auto_compiles_by_device_and_precision(n_gpus, precision, compiler, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(score.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(score.cluster, "total_resources", lambda: {"CPU": 2.0, "GPU": float(n_gpus)})
    config = ScoreConfig(model="m", input="i", output=str(tmp_path), precision=precision)
    slides = inputs("a.svs", size_bytes=score.COMPILE_FROM_SLIDE_BYTES)
    assert score._compiles(config, slides) == expected
    assert not score._compiles(config, inputs("a.svs"))


@pytest.mark.parametrize(
    ("flag", "value"), [("precision", "bfloat16"), ("min_tissue", 0.5), ("input", "j"), ("cam", "layercam")]
)
def test_settings_that_determine_a_row_are_recorded(flag, value, tmp_path):
    config = ScoreConfig(model="m", input="i", output="o")
    other = config.model_copy(update={flag: value, "output": "p", "max_workers": 3})
    one, two = (score._deciding(c, "id", False, None) for c in (config, other))
    assert {key for key in one if one[key] != two[key]} == {flag}


@pytest.mark.parametrize("output", ["archive/scores", "archive"])
def test_an_output_inside_the_input_is_refused(output, tmp_path):
    config = ScoreConfig(model="m", input=str(tmp_path / "archive"), output=str(tmp_path / output))
    with pytest.raises(ConfigError, match="is inside --input"):
        score.run(config)


def test_an_incomplete_job_says_how_to_resume():
    score._require_balance(books({"a.png": 1, "s.svs": 3}, older=["b.png"]), "b.png: denied")
    with pytest.raises(
        IncompleteError, match=r"2 of 3 inputs have neither .* Run the same command again to resume\.$"
    ):
        score._require_balance(books({"a.png": 1}))
    with pytest.raises(IncompleteError, match=r"to resume\. Storage failed to deliver some .*b.png: denied"):
        score._require_balance(books({"a.png": 1}), "b.png: denied")


def test_plans_are_read_side_by_side(tmp_path, monkeypatch):
    """One after the other, each is a round trip to the object store."""
    ours, names = (
        ledger.Ledger(claimed(str(tmp_path)), "0", ()),
        [f"{i}.svs" for i in range(storage.READ_THREADS)],
    )
    together = threading.Barrier(len(names), timeout=60)
    monkeypatch.setattr(ledger, "committed", lambda ours: ledger.Done(rows=Counter(names)))

    def read_plan(plans_uri, name):
        together.wait()
        return PLAN.model_copy(update={"slide": name})

    monkeypatch.setattr(tiling, "read_plan", read_plan)
    found = score._books(ours, inputs(*names)).plans
    assert {name: plan.slide for name, plan in found.items()} == dict(zip(names, names, strict=True))
