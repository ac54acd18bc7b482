import numpy as np
import pyarrow as pa
import pytest

from bcd import schema
from bcd.errors import IncompleteError
from bcd.metrics.drift import stain
from bcd.model import novelty
from bcd.scoring import finish
from bcd.scoring.finish import OVERVIEW
from tests.model.test_bundle import card

FORM = pa.schema([schema.predictions(1, 1).field(name) for name in OVERVIEW])


def overview(*rows):
    """Rows as (image_id, slide, x, error)."""
    names = (schema.IMAGE_ID, schema.SLIDE, schema.X_LEVEL0_PX, schema.ERROR)
    full = [dict(zip(names, row, strict=True)) | {schema.URI: row[0]} for row in rows]
    table = pa.Table.from_pylist(full, schema=FORM)
    return table.append_column("n", pa.array(range(len(table))))


TABLE = overview(
    ("a.png", None, None, None),
    ("b.png", None, None, "truncated"),
    ("s.svs#0,0,1", "s.svs", 0, None),
    ("s.svs#9,0,1", "s.svs", 9, "unreadable"),
    ("t.svs", "t.svs", None, "missing_mpp"),
)
DESCRIBED = pa.Table.from_pylist(
    [{schema.SLIDE: s, schema.URI: s} for s in ("s.svs", "t.svs")], schema.SLIDES
)
FAILED_INPUTS = TABLE.filter(pa.array([False, True, False, False, True]))


def counts(names):
    inputs = pa.chunked_array([names], pa.string())
    return finish._counts(TABLE, FAILED_INPUTS, DESCRIBED, inputs)


def test_counts_add_up():
    found = counts(["a.png", "b.png", "s.svs", "t.svs"])
    assert found == {
        "n_inputs": 4,
        "n_results": 2,
        "n_errors": 2,
        "n_rows": 5,
        "n_slides": 2,
        "n_images": 2,
        "n_tiles": 2,
    }


def test_an_input_without_a_row_is_found():
    with pytest.raises(IncompleteError, match="5 inputs, but 2 results and 2 errors"):
        counts(["a.png", "b.png", "s.svs", "t.svs", "lost.png"])


def test_closing_lines():
    found = counts(["a.png"])
    told = {"errors": {"truncated": 1, "missing_mpp": 1}, "warnings": {"unlike_training_data": 12}}
    lines = finish.closing_lines("/out", found | told)
    assert lines[0] == "4 inputs = 2 results + 2 errors; 5 rows, 2 of them tiles"
    assert lines[1:3] == ["  missing_mpp: 1", "  truncated: 1"]
    assert lines[3] == "  warned of unlike_training_data: 12 rows"
    assert lines[-1].endswith("/out/summary.json")
    timed = finish.closing_lines("/out", found | told | {"first_row_s": 18.8, "seconds": 5_000.0})
    assert timed[1] == "first rows after 19 s, all after 83 min"
    rate = {"rows_per_s": 27.31, "headspace": 0.978, "images_from": "files and slides"}
    rated = finish.closing_lines("/out", found | told | rate)
    assert rated[1] == "27.3 rows/s (headspace 0.98, images from files and slides)"
    rated = finish.closing_lines("/out", found | told | rate | {"headspace": None, "images_from": None})
    assert rated[1] == "27.3 rows/s (headspace not measured)"
    blind = finish.closing_lines("/out", found | told | {"warnings": None})
    assert blind[3] == "  the model has no statistics to identify images unlike its training data"


def judged(*rows):
    """Rows as (image_id, probability, warnings, cut-off)."""
    names = (schema.IMAGE_ID, schema.PROBABILITY_MALIGNANT, schema.WARNINGS, schema.NOVELTY_CUTOFF)
    full = [dict(zip(names, row, strict=True)) | {schema.URI: f"/in/{row[0]}"} for row in rows]
    return pa.Table.from_pylist(full, schema=FORM)


def test_warnings_by_code_need_statistics_of_the_model():
    table = judged(
        ("a", 0.9, ["unlike_training_data"], 1.2),
        ("b", 0.1, [], 1.2),
        ("c", 0.2, ["unlike_training_data"], 1.2),
    )
    assert finish._by_warning(table) == {"unlike_training_data": 2}
    assert finish._by_warning(table.slice(1, 1)) == {}
    assert finish._by_warning(judged(("a", 0.9, [], None), ("b", None, None, None))) is None


def stained(n_patients, shift, statistics):
    """What `finish` finds for an archive of so many patients with two images each."""
    rng = np.random.default_rng(n_patients)
    stains = np.repeat(0.3 + shift + 0.05 * rng.normal(size=(n_patients, 4)), 2, axis=0)
    rows = [
        {schema.IMAGE_ID: f"{i}", schema.URI: "u", schema.PATIENT: f"{i // 2}"}
        | dict(zip(schema.STAIN, row, strict=True))
        for i, row in enumerate(stains.tolist())
    ]
    rows.append({schema.IMAGE_ID: "glass", schema.URI: "u", schema.PATIENT: "glass"})
    table = pa.Table.from_pylist(rows, schema=FORM)
    return finish._stain_drift(table, card().model_copy(update={"feature_statistics": statistics}))


def test_an_archive_of_another_stain_is_warned_of():
    rng = np.random.default_rng(0)
    names = [f"patient {i}" for i in range(40)]
    known = stain.statistics_of(names, 0.3 + 0.05 * rng.normal(size=(40, 4)))
    facts = {"mean": [0.0], "spread": [1.0], "cutoff": 1, "n_training": 1, "n_validation": 1}
    statistics = novelty.FeatureStatistics(**facts, stain=known)
    moved, same = (stained(20, shift, statistics) for shift in (0.1, 0))
    assert (moved["is_found"], same["is_found"]) == (True, False)
    assert moved["observed"] == {"patient": 20}
    assert moved["p_value"] < 1e-6 < 0.01 < same["p_value"]
    base = counts(["a.png"]) | {"errors": {}, "warnings": {}}
    lines = finish.closing_lines("/out", base | {"stain_drift": moved})
    assert lines[1].startswith("  warning: this archive is stained unlike the training data (p < 0.0001; ")
    lines = finish.closing_lines("/out", base | {"stain_drift": same})
    assert lines[1].startswith("  no drift of the stain was found (p = 0.")


def test_drift_is_not_known_without_statistics_or_stain():
    for found in (stained(20, 0, None), finish._stain_drift(TABLE.select([schema.IMAGE_ID]), card())):
        assert found["p_value"] is None
        assert "not known" in found["sentence"]
