"""Known answers: tables worked by hand, scikit-learn, and studies whose truth is planted."""

import json
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sklearn_metrics

from bcd import metrics, schema
from bcd.taxonomy import SUBTYPES


def study(n_patients: int = 12, n_images: int = 20, spread: float = 1.0, seed: int = 0) -> pd.DataFrame:
    """Predictions in which the images of a patient share a shift of `spread` log-odds."""
    generator = np.random.default_rng(seed)
    codes = [list(SUBTYPES)[i % 8] for i in range(n_patients)]
    shift = generator.normal(0, spread, n_patients)
    rows = [
        {
            schema.IMAGE_ID: f"p{patient}/{image}",
            schema.PATIENT: f"p{patient}",
            schema.TUMOR_CLASS: SUBTYPES[code].tumor_class,
            schema.SUBTYPE: code,
            schema.MAGNIFICATION: (40, 100)[image % 2],
            schema.PROBABILITY_MALIGNANT: 1 / (1 + np.exp(-log_odds)),
            schema.ERROR: None,
        }
        for patient, code in enumerate(codes)
        for image in range(n_images)
        for sign in [1 if SUBTYPES[code].tumor_class == "malignant" else -1]
        for log_odds in [sign + shift[patient] + generator.normal()]
    ]
    return pd.DataFrame(rows)


def arrays(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    truth = (frame[schema.TUMOR_CLASS] == "malignant").to_numpy()
    return truth, frame[schema.PROBABILITY_MALIGNANT].to_numpy(), frame[schema.PATIENT].to_numpy()


def test_binary_by_hand() -> None:
    truth = np.array([0, 0, 0, 1, 1, 1, 1, 1], bool)
    probability = np.array([0.1, 0.6, 0.2, 0.9, 0.5, 0.4, 0.8, 0.7])
    assert metrics.binary(truth, probability) == {
        "n": 8,
        "n_benign": 3,
        "n_malignant": 5,
        "accuracy": 6 / 8,
        "balanced_accuracy": (4 / 5 + 2 / 3) / 2,
        "sensitivity": 4 / 5,
        "specificity": 2 / 3,
        "auc": 13 / 15,
        "f1": 8 / 10,
        "confusion_matrix": [[2, 1], [1, 4]],
    }
    assert metrics.binary(truth, probability, 0.65)["confusion_matrix"] == [[3, 0], [2, 3]]


def test_binary_agrees_with_scikit_learn() -> None:
    truth, probability, _ = arrays(study())
    ours, called = metrics.binary(truth, probability, 0.4), probability >= 0.4
    assert ours["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, called))
    assert ours["balanced_accuracy"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(truth, called))
    assert ours["sensitivity"] == pytest.approx(sklearn_metrics.recall_score(truth, called))
    assert ours["specificity"] == pytest.approx(sklearn_metrics.recall_score(~truth, ~called))
    assert ours["f1"] == pytest.approx(sklearn_metrics.f1_score(truth, called))
    assert ours["confusion_matrix"] == sklearn_metrics.confusion_matrix(truth, called).tolist()


@pytest.mark.parametrize(
    ("truth", "undefined"),
    [
        ([], {"accuracy", "balanced_accuracy", "sensitivity", "specificity", "auc", "f1"}),
        ([True, True], {"balanced_accuracy", "specificity", "auc"}),
        ([False, False], {"balanced_accuracy", "sensitivity", "auc"}),
    ],
)
def test_the_undefined_is_none_without_a_warning(truth: list[bool], undefined: set[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = metrics.binary(np.array(truth, bool), np.linspace(0, 1, len(truth)))
    assert {name for name, value in result.items() if value is None} == undefined


def test_multiclass_agrees_with_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 3, 60)  # the fourth class never occurs, but is predicted
    probability = generator.dirichlet(np.ones(4), 60)
    predicted = probability.argmax(axis=1)
    result = metrics.multiclass(truth, probability, ["A", "B", "C", "D"])
    precision, recall, f1, support = sklearn_metrics.precision_recall_fscore_support(
        truth, predicted, labels=range(4), zero_division=np.nan
    )
    rows = result["per_class"]
    assert [rows[name]["precision"] for name in "ABCD"] == pytest.approx(precision.tolist())
    assert [rows[name]["recall"] for name in "ABC"] == pytest.approx(recall[:3].tolist())
    assert [rows[name]["f1"] for name in "ABCD"] == pytest.approx(f1.tolist())
    assert [rows[name]["support"] for name in "ABCD"] == support.tolist()
    assert rows["D"]["recall"] is None
    assert result["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, predicted))
    assert result["balanced_accuracy"] == pytest.approx(recall[:3].mean())
    matrix = sklearn_metrics.confusion_matrix(truth, predicted, labels=range(4))
    assert result["confusion_matrix"] == matrix.tolist()


def test_multiclass_of_nothing() -> None:
    result = metrics.multiclass(np.zeros(0, int), np.zeros((0, 2)), ["A", "B"])
    assert result["accuracy"] is None
    assert result["balanced_accuracy"] is None
    assert result["confusion_matrix"] == [[0, 0], [0, 0]]


def test_patient_recognition_rate_by_hand() -> None:
    # p: 3 of 4 right, q: 0 of 1. Images say 3/5, patients (0.75 + 0) / 2.
    correct = np.array([1, 1, 1, 0, 0], bool)
    patient = np.array(["p", "p", "p", "p", "q"])
    assert metrics.patient_recognition_rate(correct, patient) == 0.375
    assert metrics.patient_recognition_rate(correct[:0], patient[:0]) is None


def test_a_resample_of_everybody_is_the_estimate() -> None:
    """The formulas of the bootstrap, with every patient drawn once, against the plain ones; ties too."""
    frame = study()
    frame[schema.PROBABILITY_MALIGNANT] = frame[schema.PROBABILITY_MALIGNANT].round(1)
    truth, probability, patient = arrays(frame)
    tally = metrics._tally(truth, probability, patient, 0.5)
    once = tally.metrics(np.ones((1, 12), int))
    plain = metrics.binary(truth, probability)
    plain["patient_recognition_rate"] = metrics.patient_recognition_rate(
        truth == (probability >= 0.5), patient
    )
    assert set(once) == set(metrics.INTERVALS)
    assert {name: values[0] for name, values in once.items()} == pytest.approx(
        {name: plain[name] for name in metrics.INTERVALS}
    )


def test_a_resample_equals_the_metrics_of_the_repeated_images() -> None:
    truth, probability, patient = arrays(study(n_patients=8, n_images=5))
    drawn = np.array([0, 2, 1, 0, 3, 0, 1, 1])
    rows = np.concatenate(
        [np.flatnonzero(patient == f"p{i}") for i, times in enumerate(drawn) for _ in range(times)]
    )
    bootstrapped = metrics._tally(truth, probability, patient, 0.5).metrics(drawn[None])
    repeated = metrics.binary(truth[rows], probability[rows])
    for name in ("accuracy", "balanced_accuracy", "auc"):
        assert bootstrapped[name][0] == pytest.approx(repeated[name])


def test_intervals_hold_the_estimate_and_are_reproducible() -> None:
    truth, probability, patient = arrays(study())
    estimate = metrics.binary(truth, probability)
    found = metrics.intervals(truth, probability, patient)
    assert found == metrics.intervals(truth, probability, patient)
    assert found != metrics.intervals(truth, probability, patient, seed=1)
    for name in ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "auc"):
        low, high = found[name] or (1, 0)
        assert 0 <= low <= estimate[name] <= high <= 1


def test_patients_who_differ_widen_the_interval() -> None:
    truth, probability, patient = arrays(study(spread=2.0))
    clustered = metrics.intervals(truth, probability, patient)["accuracy"]
    naive = metrics.intervals(truth, probability, np.arange(len(truth)))["accuracy"]
    assert clustered is not None
    assert naive is not None
    assert np.ptp(clustered) > 2 * np.ptp(naive)


def test_no_interval_where_there_is_nothing_to_resample() -> None:
    truth, probability, patient = arrays(study())
    one = patient == "p0"
    assert set(metrics.intervals(truth[one], probability[one], patient[one]).values()) == {None}
    # one benign patient beside six malignant ones: nothing about the benign
    few = truth | one
    found = metrics.intervals(truth[few], probability[few], patient[few])
    undefined = {"specificity", "balanced_accuracy", "auc"}
    assert {name for name, interval in found.items() if interval is None} == undefined
    # no error seen: how rare errors are stays unknown
    flawless = metrics.intervals(truth, truth.astype(float), patient)
    assert set(flawless.values()) == {None}


def finite(value: Any) -> bool:
    json.dumps(value, allow_nan=False)
    return True


def test_evaluate() -> None:
    frame = study()
    frame.loc[[0, 25], [schema.ERROR, schema.PROBABILITY_MALIGNANT]] = ["truncated", np.nan]
    result = metrics.evaluate(frame, threshold=0.4, protocol={"name": "case", "leaky": False})
    assert finite(result)
    assert json.loads(json.dumps(result)) == result
    assert (result["n_images"], result["n_patients"], result["n_errors"]) == (238, 12, 2)
    assert result["protocol"] == {"name": "case", "leaky": False}
    good = frame[frame[schema.ERROR].isna()]
    truth, probability, patient = arrays(good)
    pooled = result["pooled"]
    assert pooled.items() >= metrics.binary(truth, probability, 0.4).items()
    assert pooled["image_recognition_rate"] == pooled["accuracy"]
    assert pooled["intervals"] == metrics.intervals(truth, probability, patient, 0.4)
    assert list(result["by_magnification"]) == ["40", "100"]
    assert sum(part["n"] for part in result["by_magnification"].values()) == 238
    assert list(result["recall_by_subtype"]) == list(SUBTYPES)
    right = ((probability >= 0.4) == truth)[good[schema.SUBTYPE] == "DC"]
    assert result["recall_by_subtype"]["DC"] == {"n": 20, "n_patients": 1, "recall": right.mean()}
    assert result["classification_report"]["malignant"]["recall"] == pooled["sensitivity"]
    assert "multiclass" not in result


def test_evaluate_without_magnification_subtype_or_patient() -> None:
    bare = study().drop(columns=[schema.MAGNIFICATION, schema.SUBTYPE, schema.PATIENT])
    result = metrics.evaluate(bare)
    assert finite(result)
    assert result["by_magnification"] == {}
    assert result["recall_by_subtype"] == {}
    assert result["n_patients"] is None
    assert result["pooled"]["patient_recognition_rate"] is None
    assert set(result["pooled"]["intervals"].values()) == {None}


def test_evaluate_when_nothing_was_scored() -> None:
    frame = study(n_patients=1, n_images=2).assign(**{schema.ERROR: "truncated"})
    result = metrics.evaluate(frame)
    assert finite(result)
    assert (result["n_images"], result["n_errors"], result["pooled"]["accuracy"]) == (0, 2, None)


def test_evaluate_a_model_of_subtypes() -> None:
    frame, names = study(), list(SUBTYPES)
    generator = np.random.default_rng(0)
    probability = generator.dirichlet(np.ones(8), len(frame))
    frame[schema.PROBABILITY] = list(probability)
    frame[schema.PROBABILITY_MALIGNANT] = probability[:, 4:].sum(axis=1)
    frame.loc[:4, schema.SUBTYPE] = None
    result = metrics.evaluate(frame, class_names=names)
    assert finite(result)
    known = frame[schema.SUBTYPE].notna()
    truth = np.array([names.index(code) for code in frame.loc[known, schema.SUBTYPE]])
    assert result["multiclass"] == metrics.multiclass(truth, probability[known], names)
