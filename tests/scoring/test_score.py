import threading
from collections import Counter

import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.audit.pseudonyms import Pseudonyms
from bcd.config.scoring import ScoreConfig
from bcd.errors import ConfigError, IncompleteError
from bcd.model.engines import choice
from bcd.scoring import ledger, score, tiling
from tests.archives import claimed
from tests.model.test_bundle import card

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


def test_the_engine_is_decided_once_for_an_output(tmp_path, monkeypatch):
    """An output of a version without the flag is torch's."""
    monkeypatch.setattr(choice, "find_spec", lambda name: name)
    monkeypatch.setattr(score.cluster, "total_resources", lambda: {"CPU": 2.0, "GPU": 0.0})
    config = ScoreConfig(model="m", input="i", output=f"{tmp_path}/older")
    assert score._engine(config, card()) == "openvino"
    assert score._engine(config.model_copy(update={"compile": "on"}), card()) == "torch"
    assert score._engine(config.model_copy(update={"cam": "gradcam"}), card()) == "torch"
    settings = score.deciding(config.model_copy(update={"engine": "torch"}), "id", False, None)
    older = {name: value for name, value in settings.items() if name != "engine"}
    ledger.open_ledger(claimed(config.output), older)
    assert score._engine(config, card()) == "torch"
    ledger.open_ledger(claimed(config.output), settings, defaults=score.DEFAULTS)
    with pytest.raises(ConfigError, match="other settings: --engine torch -> openvino"):
        ledger.open_ledger(claimed(config.output), settings | {"engine": "openvino"}, defaults=score.DEFAULTS)
    newer = config.model_copy(update={"output": f"{tmp_path}/newer", "engine": "openvino"})
    ledger.open_ledger(claimed(newer.output), score.deciding(newer, "id", False, None))
    resumed = newer.model_copy(update={"engine": "auto"})
    monkeypatch.setattr(score.cluster, "total_resources", lambda: {"CPU": 2.0, "GPU": 1.0})
    assert score._engine(resumed, card()) == "openvino"
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="openvino is missing"):
        score._engine(resumed, card())


def test_openvino_compiles_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(score.shutil, "which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(score.cluster, "total_resources", lambda: {"CPU": 2.0, "GPU": 0.0})
    many = inputs("a.svs", size_bytes=score.COMPILE_FROM_SLIDE_BYTES)
    config = ScoreConfig(model="m", input="i", output=str(tmp_path), precision="bfloat16", engine="torch")
    assert score._compiles(config, many)
    assert not score._compiles(config.model_copy(update={"engine": "openvino"}), many)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(
            ("precision", "bfloat16"),
            ("engine", "openvino"),
            ("min_tissue", 0.5),
            ("input", "j"),
            ("cam", "layercam"),
        ),
        *(("tile_overlap", 0.5), ("regions", "r"), ("masks", "m"), ("min_region", 0.1)),
    ],
)
def test_settings_that_determine_a_row_are_recorded(flag, value, tmp_path):
    config = ScoreConfig(model="m", input="i", output="o")
    other = config.model_copy(update={flag: value, "output": "p", "max_workers": 3})
    one, two = (score.deciding(c, "id", False, None) for c in (config, other))
    assert {key for key in one if one[key] != two[key]} == {flag}


def test_a_setting_that_an_older_version_did_not_have_is_its_default(tmp_path):
    """So that an output can be resumed after an upgrade, with the same meaning only."""
    config = ScoreConfig(model="m", input="i", output=str(tmp_path))
    settings = score.deciding(config, "id", False, None)
    older = {key: value for key, value in settings.items() if key not in ("tile_overlap", "min_region")}
    ledger.open_ledger(claimed(str(tmp_path)), older)
    ledger.open_ledger(claimed(str(tmp_path)), settings, defaults=score.DEFAULTS)
    changed = settings | {"tile_overlap": 0.5}
    with pytest.raises(ConfigError, match=r"other settings: --tile-overlap 0.0 -> 0.5"):
        ledger.open_ledger(claimed(str(tmp_path)), changed, defaults=score.DEFAULTS)


def test_places_are_hidden_with_names(tmp_path):
    config = ScoreConfig(model="m", input="/i/one", output="o", regions="/r/two", pseudonymise="k")
    names = Pseudonyms("k", bytes(range(32)))
    settings = score.deciding(config, "id", False, names)
    assert {key: settings[key] for key in ("input", "regions", "masks", "pseudonymise")} == {
        "input": names.of("/i/one"),
        "regions": names.of("/r/two"),
        "masks": None,
        "pseudonymise": names.fingerprint,
    }


def test_masks_inside_the_input_are_refused(tmp_path):
    config = ScoreConfig(model="m", input=str(tmp_path), output="o", masks=str(tmp_path / "masks"))
    with pytest.raises(ConfigError, match=r"--masks .* is inside --input: its images would be scored too"):
        score.run(config)


def test_slides_are_listed_with_the_files_beside_them(tmp_path):
    """Under ids, too, in whose order they are."""
    names = ("in/a.svs", "in/b.svs", "in/f.png", "regions/a.geojson", "regions/x.geojson", "masks/b.png")
    for name in names:
        storage.write_bytes(str(tmp_path / name), name.encode())
    config = ScoreConfig(
        model="m",
        input=str(tmp_path / "in"),
        output="o",
        regions=str(tmp_path / "regions"),
        masks=str(tmp_path / "masks"),
    )
    found, named = score.listed_inputs(config, None)
    assert found.table is named
    assert named[schema.REGION_FILES].to_pylist() == [[str(tmp_path / "regions/a.geojson")], [], None]
    assert named[schema.MASK_FILES].to_pylist() == [[], [str(tmp_path / "masks/b.png")], None]
    assert found.unclaimed == ("x.geojson",)
    keys = Pseudonyms("k", bytes(range(32)))
    hidden, _ = score.listed_inputs(config, keys)
    both = dict(
        zip(
            hidden.table[schema.IMAGE_ID].to_pylist(),
            hidden.table[schema.REGION_FILES].to_pylist(),
            strict=True,
        )
    )
    assert both == {
        keys.of("a.svs"): [str(tmp_path / "regions/a.geojson")],
        keys.of("b.svs"): [],
        keys.of("f.png"): None,
    }
    assert sorted(hidden.versions.to_pylist()) == sorted(found.versions.to_pylist())


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
    found = score.books_of(ours, inputs(*names)).plans
    assert {name: plan.slide for name, plan in found.items()} == dict(zip(names, names, strict=True))
