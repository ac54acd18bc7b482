"""Temperature and threshold: from validation logits whose truth is planted."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.config.training import TrainConfig
from bcd.errors import BundleError
from bcd.model import weights
from bcd.runtime.prepare import DatasetFacts
from bcd.training import checkpoint, export, train

FACTS = DatasetFacts(
    data_fingerprint="a" * 64,
    split_fingerprint="b" * 64,
    synthetic=False,
    warnings=[],
    broken=[],
    quarantined=[],
    field_height_px=460,
    field_width_px=700,
)


def validation(n=400, seed=0, n_patients=30):
    """Logits that are twice too sure, and rows with their classes, drawn from the honest probability."""
    generator = np.random.default_rng(seed)
    honest = generator.normal(0, 1.5, n)
    malignant = generator.random(n) < 1 / (1 + np.exp(-honest))
    rows = [
        {
            schema.IMAGE_ID: str(i),
            schema.URI: "",
            schema.PATIENT: f"p{i % n_patients}",
            schema.TUMOR_CLASS: "malignant" if truth else "benign",
        }
        for i, truth in enumerate(malignant)
    ]
    logit = np.stack([-honest, honest], 1).astype(np.float32)
    return logit, schema.fill(pa.Table.from_pylist(rows), schema.INDEX), malignant


class Kept:
    """A checkpoint whose content is given, or damaged."""

    def __init__(self, content):
        self.content = content

    def as_directory(self):
        return contextlib.nullcontext(self.content)


def result(monkeypatch, *pairs):
    """A training with checkpoints of (content, score) from epoch 1 on."""

    def read(folder):
        if str(folder) == "damaged":
            raise BundleError("model.safetensors is not as it was written")
        return str(folder), {}

    monkeypatch.setattr(checkpoint, "read_checkpoint", read)
    monkeypatch.setattr(weights, "assembled", lambda n_classes, tensors, *shape: tensors)
    kept = [
        (Kept(content), {schema.EPOCH: epoch, export.SELECTION: score})
        for epoch, (content, score) in enumerate(pairs, 1)
    ]
    return SimpleNamespace(best_checkpoints=kept)


@pytest.mark.parametrize(
    ("pairs", "expected", "n_told"),
    [
        ([("a", 0.5), ("b", 0.9), ("c", 0.7)], ("b", 2), 0),
        ([("a", 0.5), ("damaged", 0.9), ("c", 0.7)], ("c", 3), 1),
        ([("a", 0.5), ("damaged", 0.9), ("damaged", 0.7)], ("a", 1), 2),
    ],
)
def test_the_best_epoch_is_the_best_intact_one(monkeypatch, capsys, pairs, expected, n_told):
    network, measured = export._best(result(monkeypatch, *pairs), TrainConfig(data="d"))
    assert (network, measured[schema.EPOCH]) == expected
    assert capsys.readouterr().out.count("is damaged: model.safetensors is not as it was written") == n_told


def test_without_an_intact_checkpoint_there_is_no_bundle(monkeypatch):
    with pytest.raises(BundleError, match="no checkpoint of this run is intact; choose another --name"):
        export._best(result(monkeypatch, ("damaged", 0.9)), TrainConfig(data="d"))


def test_a_card_that_could_not_be_written_is_found_before_the_training():
    rows = validation(4)[1]
    table = rows.append_column(schema.SPLIT.field(schema.PART), pa.array(["train"] * 4))
    export.require_valid_card(TrainConfig(data="d"), table, FACTS)
    fine = table.set_column(
        table.schema.get_field_index(schema.MPP), schema.MPP, pa.array([0.01] * 4, pa.float32())
    )
    with pytest.raises(BundleError, match=r"mpp.0: Input should be greater than or equal to 0.05"):
        export.require_valid_card(TrainConfig(data="d"), fine, FACTS)


def test_a_finished_run_whose_bundle_is_of_another_format_says_why(tmp_path):
    assert "no model bundle there" in export.fault(str(tmp_path))
    storage.write_bytes(f"{tmp_path}/model/card.json", b'{"format_version": 1}')
    assert "format 1, this version reads 2" in export.fault(str(tmp_path))


def test_calibration_is_measured_before_and_after():
    decided = export.decided(*validation(4000)[:2], 0.5)
    assert decided["temperature"] == pytest.approx(2, rel=0.05)
    told = decided["calibration"]
    for name in ("cross_entropy", "brier", "ece"):
        assert told[f"{name}_after"] < told[f"{name}_before"]


@pytest.mark.parametrize("target", [0.8, 0.95])
def test_the_threshold_reaches_the_sensitivity_that_was_asked_for(target):
    logit, rows, malignant = validation()
    decided = export.decided(logit, rows, 0.5, target_sensitivity=target)
    probability = 1 / (1 + np.exp(-(logit[:, 1] - logit[:, 0]) / decided["temperature"]))
    called = probability >= decided["threshold"]
    n = int(np.ceil(target * malignant.sum()))
    assert called[malignant].sum() == n
    point = decided["operating_point"]
    assert point["sensitivity"] == called[malignant].mean() >= target
    assert point["specificity"] == pytest.approx((~called[~malignant]).mean())
    assert (point["rule"], point["n_patients"]) == ("sensitivity", 30)


def test_few_validation_patients_choose_neither_temperature_nor_threshold(capsys):
    logit, rows, malignant = validation(n_patients=3)
    decided = export.decided(logit, rows, 0.7)
    assert decided["temperature"] == 1
    assert decided["threshold"] == pytest.approx(0.7)
    point = decided["operating_point"]
    assert (point["rule"], point["n_patients"]) == ("prior", 3)
    called = 1 / (1 + np.exp(-(logit[:, 1] - logit[:, 0]))) >= decided["threshold"]
    assert point["sensitivity"] == called[malignant].mean()
    said = capsys.readouterr().out
    assert "validation has 3 benign patients and 3 malignant patients, and choosing requires" in said
    assert "the temperature is 1, the threshold 0.7 (rule: prior)" in said
    asked = export.decided(logit, rows, 0.7, target_sensitivity=0.9)
    assert asked["operating_point"]["rule"] == "sensitivity"
    unknown = rows.set_column(rows.schema.get_field_index(schema.PATIENT), schema.PATIENT, pa.nulls(400))
    assert export.decided(logit, unknown, 0.7)["operating_point"]["rule"] == "youden"


@pytest.mark.parametrize(("balance", "prior"), [("tumor_class", 0.5), ("none", 0.25)])
def test_the_prior_is_the_share_of_malignant_rows_in_an_epoch(balance, prior):
    classes = ["benign"] * 6 + ["malignant"] * 2
    train = schema.fill(pa.table({schema.TUMOR_CLASS: classes, schema.PART: ["train"] * 8}), schema.SPLIT)
    assert export.prior_of(TrainConfig(data="d", balance=balance), train) == prior


def test_what_timm_states_is_in_settings_and_card_and_flags_win():
    pytest.importorskip("timm", reason="needs the extra `timm`")
    config = TrainConfig(data="d", architecture="timm:test_vit", weights="imagenet", input_width_px=320)
    found = train.resolved(config)
    assert found.input_size_px == (160, 320)
    assert (found.mean, found.std) == ((0.5,) * 3, (0.5,) * 3)
    assert train.resolved(found) == found
    plain = TrainConfig(data="d")
    assert train.resolved(plain) is plain
    measured = {schema.EPOCH: 1, export.SCORE: 0.5, "n_validation": 1}
    known = export._card(found, validation(4)[1], FACTS, measured)
    assert (known.input_width_px, known.mean, known.weights_license) == (320, (0.5,) * 3, "apache-2.0")
    assert TrainConfig(**known.training) == found
