"""Out to a person and back: an evaluation's doubtful rows, and the manifest of the person's labels."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.config.evaluation import TriageConfig
from bcd.data import index
from bcd.errors import ConfigError, DataError
from bcd.metrics import aggregate
from bcd.runtime import output
from bcd.scoring.triage import triage

# Image, truth, subtype, probability of malignancy: two are wrong, b the more certain.
IMAGES = [
    *(("=a.png", "benign", "F", 0.1), ("b.png", "malignant", "DC", 0.01), ("c.png", "benign", None, 0.8)),
    *(("d.png", "malignant", "DC", 0.55), ("e.png", "malignant", "LC", 0.99)),
]


def predicted(folder, tile=False):
    rows = []
    for i, (name, _, _, p) in enumerate(IMAGES):
        (folder / name).write_bytes(bytes(i + 1))
        called = "malignant" if p >= 0.5 else "benign"
        rows.append(
            {schema.IMAGE_ID: name, schema.URI: str(folder / name), schema.PATIENT: f"p{i // 2}"}
            | {schema.PROBABILITY_MALIGNANT: p, schema.PREDICTED_CLASS: called, schema.NOVELTY: 1.0}
            | {schema.MPP: 0.49, schema.MODEL_ID: "m", schema.BCD_VERSION: "0"}
        )
    if tile:
        rows.append(rows[0] | {schema.IMAGE_ID: "s.svs#level0 8,4,0.49", schema.X_LEVEL0_PX: 8})
        rows[-1] |= {schema.Y_LEVEL0_PX: 4, schema.SLIDE: "s.svs", schema.PROBABILITY_MALIGNANT: 0.5}
    rows.append(
        {schema.IMAGE_ID: "x.png", schema.URI: "x", schema.ERROR: "empty"}
        | {schema.MODEL_ID: "m", schema.BCD_VERSION: "0"}
    )
    return pa.Table.from_pylist(rows, schema.predictions(1, 1))


@pytest.fixture
def evaluated(tmp_path):
    """The output of an evaluation."""
    uri, folder = str(tmp_path / "evaluation"), tmp_path / "in"
    folder.mkdir()
    output.claim_folder(uri, output.EVALUATE)
    table = predicted(folder)
    storage.write_table(f"{uri}/predictions/part-0.parquet", table)
    truth = pd.DataFrame(IMAGES, columns=[schema.IMAGE_ID, schema.TUMOR_CLASS, schema.SUBTYPE, "p"])
    truth = truth.assign(**{schema.MAGNIFICATION: [40, 100, None, 40, 40], schema.CASE: "14-1"})
    truth[schema.SITE] = "north"
    images = aggregate.image_table(table.to_pandas().merge(truth, on=schema.IMAGE_ID), 0.5)
    storage.write_table(f"{uri}/test_images.parquet", pa.Table.from_pandas(images, preserve_index=False))
    return uri


@pytest.fixture
def archive(tmp_path):
    """The output of a scoring job, with one tile."""
    uri, folder = str(tmp_path / "scores"), tmp_path / "in"
    folder.mkdir(exist_ok=True)
    output.claim_folder(uri, output.SCORE)
    storage.write_table(f"{uri}/predictions/part-0.parquet", predicted(folder, tile=True))
    storage.write_bytes(f"{uri}/summary.json", json.dumps({"threshold": 0.5}).encode())
    return uri


def read_sheet(folder):
    return pd.read_csv(folder / "triage.csv", dtype=str, keep_default_na=False)


def fill_in(folder, labels, name="done.csv"):
    """The sheet with these labels, beside it."""
    table = read_sheet(folder)
    table[schema.REVIEWED_CLASS] = table[schema.IMAGE_ID].map(labels).fillna("")
    table.to_csv(folder / name, index=False)
    return str(folder / name)


def test_wrong_ones_come_first_then_the_least_certain(evaluated, tmp_path):
    triage.run(TriageConfig(scores=evaluated, output=str(tmp_path / "t"), most=2))
    table = read_sheet(tmp_path / "t")
    assert table[schema.IMAGE_ID].tolist() == ["b.png", "c.png", "d.png", "'=a.png"]
    assert table[schema.REASON].tolist() == ["wrong", "wrong", "least_certain", "least_certain"]
    assert table[schema.TUMOR_CLASS].tolist() == ["malignant", "benign", "malignant", "benign"]
    assert table[schema.PATIENT].tolist() == ["p0", "p1", "p1", "p0"]
    assert set(table[schema.REVIEWED_CLASS]) == {""}
    shown = json.loads((tmp_path / "t/fiftyone/data.json").read_text())
    assert list(shown.values()) == [
        str(tmp_path / "in" / name) for name in ("b.png", "c.png", "d.png", "=a.png")
    ]
    assert json.loads((tmp_path / "t/fiftyone/labels.json").read_text())["labels"].keys() == shown.keys()


def test_corrected_labels_are_data_to_train_on(evaluated, tmp_path):
    folder = tmp_path / "t"
    triage.run(TriageConfig(scores=evaluated, output=str(folder)))
    labels = {"'=a.png": "malignant", "b.png": "malignant", "c.png": "exclude", "d.png": "mucinous carcinoma"}
    config = TriageConfig(scores=evaluated, output=str(folder), labels=fill_in(folder, labels))
    triage.run(config)
    table, _ = index.read_index(str(folder / "manifest.parquet"))
    columns = [schema.IMAGE_ID, schema.TUMOR_CLASS, schema.SUBTYPE, schema.PATIENT, schema.CASE]
    found = table.select(columns).to_pylist()
    assert [tuple(row.values()) for row in found] == [
        ("=a.png", "malignant", None, "p0", "14-1"),  # of another class than its subtype
        ("b.png", "malignant", "DC", "p0", "14-1"),  # confirmed
        ("d.png", "malignant", "MC", "p1", "14-1"),
        ("e.png", "malignant", "LC", "p2", "14-1"),  # not in doubt
    ]
    assert table[schema.URI].to_pylist()[0] == str(tmp_path / "in/=a.png")
    assert table[schema.MAGNIFICATION].to_pylist() == [40, 100, 40, 40]
    assert set(table[schema.SITE].to_pylist()) == {"north"}
    np.testing.assert_allclose(table[schema.MPP].to_numpy(), 0.49)


def test_an_evaluation_of_a_version_without_sites_is_read(evaluated, tmp_path):
    images = f"{evaluated}/test_images.parquet"
    storage.write_table(images, storage.read_table(images).drop_columns([schema.SITE]))
    triage.run(TriageConfig(scores=evaluated, output=str(tmp_path / "t")))
    assert set(read_sheet(tmp_path / "t")[schema.SITE]) == {""}


def test_of_an_archive_only_what_a_person_labelled(archive, tmp_path, caplog):
    folder = tmp_path / "t"
    triage.run(TriageConfig(scores=archive, output=str(folder), most=3))
    sheet = read_sheet(folder)
    assert sheet[schema.IMAGE_ID].tolist() == ["s.svs#level0 8,4,0.49", "d.png", "c.png"]
    assert (sheet[schema.X_LEVEL0_PX].tolist(), set(sheet[schema.REASON])) == (
        ["8", "", ""],
        {"least_certain"},
    )
    labels = fill_in(folder, {"s.svs#level0 8,4,0.49": "benign", "c.png": "benign"})
    triage.run(TriageConfig(scores=archive, output=str(folder), labels=labels))
    assert "1 label of tiles of slides left out" in caplog.text
    table, _ = index.read_index(str(folder / "manifest.parquet"))
    found = table.select([schema.IMAGE_ID, schema.TUMOR_CLASS, schema.PATIENT]).to_pylist()
    assert found == [{"image_id": "c.png", "tumor_class": "benign", "patient": "p1"}]
    labels = fill_in(folder, {"s.svs#level0 8,4,0.49": "benign"})
    with pytest.raises(DataError, match="no field of view has a class"):
        triage.run(TriageConfig(scores=archive, output=str(folder), labels=labels))


def test_a_sheet_that_is_filled_in_is_not_replaced(archive, tmp_path):
    config = TriageConfig(scores=archive, output=str(tmp_path / "t"))
    triage.run(config)
    triage.run(config)  # the same once more
    fill_in(tmp_path / "t", {"c.png": "benign"}, "triage.csv")
    before = (tmp_path / "t/triage.csv").read_bytes()
    with pytest.raises(ConfigError, match=r"it is kept, because it may be filled in. Read it with --labels"):
        triage.run(config)
    assert (tmp_path / "t/triage.csv").read_bytes() == before
    triage.run(config.model_copy(update={"labels": str(tmp_path / "t/triage.csv")}))


def test_what_has_no_finished_predictions_is_rejected(archive, tmp_path):
    def reason(uri):
        with pytest.raises(ConfigError) as raised:
            triage.run(TriageConfig(scores=str(uri), output=str(tmp_path / "t")))
        return str(raised.value)

    assert "expected the output of jobs/score.py" in reason(tmp_path / "in")
    storage.write_bytes(f"{archive}/summary.json", json.dumps({"threshold": 0.5, "pseudonyms": "k"}).encode())
    assert "ids replace the names" in reason(archive)
    storage.delete_file(f"{archive}/summary.json")
    assert "no summary.json there, so the job is not finished" in reason(archive)
