"""Known answers: tables worked by hand, and scikit-learn."""

import json
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sklearn_metrics

from bcd import schema
from bcd.metrics import aggregate, bootstrap, calibration, intervals, measures
from bcd.taxonomy import SUBTYPES
from tests import studies
from tests.studies import arrays, predictions


def test_binary_by_hand() -> None:
    truth = np.array([0, 0, 0, 1, 1, 1, 1, 1], bool)
    probability = np.array([0.1, 0.6, 0.2, 0.9, 0.5, 0.4, 0.8, 0.7])
    found = measures.binary(truth, probability, probability >= 0.5)
    assert found.pop("confusion_matrix") == [[2, 1], [1, 4]]
    assert found == pytest.approx(
        {
            "n": 8,
            "n_benign": 3,
            "n_malignant": 5,
            "accuracy": 6 / 8,
            "balanced_accuracy": (4 / 5 + 2 / 3) / 2,
            "sensitivity": 4 / 5,
            "specificity": 2 / 3,
            "auc": 13 / 15,
            "f1": 8 / 10,
            "brier": (0.01 + 0.36 + 0.04 + 0.01 + 0.25 + 0.36 + 0.04 + 0.09) / 8,
            # each image has a bin of its own
            "ece": (0.1 + 0.6 + 0.2 + 0.1 + 0.5 + 0.6 + 0.2 + 0.3) / 8,
        }
    )
    stricter = measures.binary(truth, probability, probability >= 0.65)
    assert stricter["confusion_matrix"] == [[3, 0], [2, 3]]


def test_binary_agrees_with_scikit_learn() -> None:
    study = arrays(predictions(), 0.4)
    truth, probability, called = study.truth, study.probability, study.called
    ours = measures.binary(truth, probability, called)
    assert ours["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(truth, called))
    assert ours["balanced_accuracy"] == pytest.approx(sklearn_metrics.balanced_accuracy_score(truth, called))
    assert ours["sensitivity"] == pytest.approx(sklearn_metrics.recall_score(truth, called))
    assert ours["specificity"] == pytest.approx(sklearn_metrics.recall_score(~truth, ~called))
    assert ours["auc"] == pytest.approx(sklearn_metrics.roc_auc_score(truth, probability))
    assert ours["f1"] == pytest.approx(sklearn_metrics.f1_score(truth, called))
    assert ours["brier"] == pytest.approx(sklearn_metrics.brier_score_loss(truth, probability))
    assert ours["confusion_matrix"] == sklearn_metrics.confusion_matrix(truth, called).tolist()


@pytest.mark.parametrize(
    ("truth", "undefined"),
    [
        ([], {"accuracy", "balanced_accuracy", "sensitivity", "specificity", "auc", "f1", "brier", "ece"}),
        ([True, True], {"balanced_accuracy", "specificity", "auc"}),
        ([False, False], {"balanced_accuracy", "sensitivity", "auc"}),
    ],
)
def test_the_undefined_is_none_without_a_warning(truth: list[bool], undefined: set[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probability = np.linspace(0, 1, len(truth))
        result = measures.binary(np.array(truth, bool), probability, probability >= 0.5)
    assert {name for name, value in result.items() if value is None} == undefined


def test_multiclass_agrees_with_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    truth = generator.integers(0, 3, 60)  # the fourth class never occurs, but is predicted
    probability = generator.dirichlet(np.ones(4), 60)
    predicted = probability.argmax(axis=1)
    result = measures.multiclass(truth, probability, ["A", "B", "C", "D"])
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
    result = measures.multiclass(np.zeros(0, int), np.zeros((0, 2)), ["A", "B"])
    assert result["accuracy"] is None
    assert result["balanced_accuracy"] is None
    assert result["confusion_matrix"] == [[0, 0], [0, 0]]


def test_patient_recognition_rate_by_hand() -> None:
    # p: 3 of 4 right, q: 0 of 1. Images say 3/5, patients (0.75 + 0) / 2.
    correct = np.array([1, 1, 1, 0, 0], bool)
    patient = np.array(["p", "p", "p", "p", "q"])
    assert measures.patient_recognition_rate(correct, patient) == 0.375
    assert measures.patient_recognition_rate(correct[:0], patient[:0]) is None


def finite(value: Any) -> bool:
    json.dumps(value, allow_nan=False)
    return True


def test_evaluate() -> None:
    frame = predictions()
    frame.loc[[0, 25], [schema.ERROR, schema.PROBABILITY_MALIGNANT]] = ["truncated", np.nan]
    result = studies.measured(frame, threshold=0.4, seed=7)
    assert finite(result)
    assert json.loads(json.dumps(result)) == result
    assert (result["n_images"], result["n_patients"], result["n_errors"]) == (238, 12, 2)
    assert result["threshold"] == 0.4
    assert result["interval"] == {
        "level": 0.95,
        "method": intervals.METHOD,
        "n_resamples": bootstrap.N_RESAMPLES,
        "seed": 7,
    }
    good = frame[frame[schema.ERROR].isna()]
    study, pooled = arrays(good, 0.4), result["pooled"]
    binary = measures.binary(study.truth, study.probability, study.called)
    assert {name: pooled[name] for name in binary} == binary
    assert pooled["image_recognition_rate"] == pooled["accuracy"]
    assert pooled["intervals"] == intervals.intervals_of(study.tally(), seed=7)
    assert list(result["by_magnification"]) == ["40", "100"]
    assert sum(part["n"] for part in result["by_magnification"].values()) == 238
    assert list(result["recall_by_subtype"]) == list(SUBTYPES)
    right = (study.called == study.truth)[good[schema.SUBTYPE] == "DC"]
    # The eight subtypes of twelve patients: one of ductal carcinoma, two of adenosis.
    one = {"n": 20, "n_patients": 1, "recall": right.mean(), "interval": None}
    assert result["recall_by_subtype"]["DC"] == one
    of_two = result["recall_by_subtype"]["A"]
    low, high = of_two["interval"]
    assert 0 < low < of_two["recall"] < high < 1
    assert result["classification_report"]["malignant"]["recall"] == pooled["sensitivity"]
    assert "multiclass" not in result


def test_the_classification_report_agrees_with_scikit_learn() -> None:
    study = arrays(predictions())
    found = studies.measured(predictions())["classification_report"]
    theirs = sklearn_metrics.classification_report(
        study.truth, study.called, target_names=["benign", "malignant"], output_dict=True
    )
    for name, row in found.items():
        assert row == pytest.approx(
            {
                "f1": theirs[name]["f1-score"],
                **{k: theirs[name][k] for k in ("precision", "recall", "support")},
            }
        )


def levels() -> pd.DataFrame:
    """Six patients in five cases: a case of two patients, one of both classes, an image of no slide."""
    rows = [
        ("a", "s1", "p1", "c1", "malignant", 0.9),
        ("b", "s1", "p1", "c1", "malignant", 0.4),
        ("c", "s2", "p1", "c1", "malignant", 0.8),
        ("d", "s3", "p2", "c2", "benign", 0.5),
        ("e", "s4", "p3", "c2", "benign", 0.1),
        ("f", "s4", "p3", "c2", "benign", 0.2),
        ("g", "s5", "p4", "c3", "benign", 0.6),
        ("h", "s5", "p4", "c3", "malignant", 0.6),
        ("i", None, "p5", "c4", "malignant", 0.3),
        ("j", "s6", "p6", "c5", "benign", 0.2),
    ]
    columns = [schema.IMAGE_ID, schema.SLIDE, schema.PATIENT, schema.CASE, schema.TUMOR_CLASS]
    return pd.DataFrame(rows, columns=[*columns, schema.PROBABILITY_MALIGNANT]).assign(**{schema.ERROR: None})


def test_slides_cases_and_patients_by_hand() -> None:
    by_level = studies.measured(levels())["by_level"]
    slide, case, patient = (by_level[name] for name in ("slide", "case", "patient"))
    # Odds of s1: the root of 9 · 2/3, of s2: 4, of s3: 1, wrongly called malignant, of s4: the root of
    # 1/9 · 1/4, of s6: 1/4; s5 is of both classes.
    assert (slide["n"], slide["n_mixed"], slide["n_patients"]) == (5, 1, 4)
    assert slide["confusion_matrix"] == [[2, 1], [0, 2]]
    assert slide["auc"] == 1
    assert slide["patient_recognition_rate"] == 3 / 4
    # Odds of c1: the cube root of 24, of c2: that of 1 · 1/9 · 1/4, rightly called benign.
    assert (case["n"], case["n_mixed"], case["n_patients"]) == (4, 1, 4)
    assert case["confusion_matrix"] == [[2, 0], [1, 1]]
    assert case["auc"] == 1
    odds = np.array([24 ** (1 / 3), (1 / 36) ** (1 / 3), 3 / 7, 1 / 4])
    error = odds / (1 + odds) - [1, 0, 1, 0]
    assert case["brier"] == pytest.approx((error**2).mean())
    # p1 and p5 are malignant, p2, p3 and p6 benign; p2 is wrong, and p5.
    assert (patient["n"], patient["n_mixed"], patient["n_patients"]) == (5, 1, 5)
    assert patient["confusion_matrix"] == [[2, 1], [1, 1]]
    assert patient["auc"] == 5 / 6
    assert patient["accuracy"] == patient["patient_recognition_rate"] == 3 / 5
    # all images: of p1 two of three, p2 none, p3 all, p4 one of two, p5 none, p6 all
    pooled = studies.measured(levels())["pooled"]
    assert pooled["patient_recognition_rate"] == pytest.approx((2 / 3 + 0 + 1 + 1 / 2 + 0 + 1) / 6)


def test_groups_are_called_by_the_threshold_too() -> None:
    """The mean log-odds of a group against those of the threshold."""
    verdicts = [
        studies.measured(levels(), threshold)["by_level"]["case"]["confusion_matrix"]
        for threshold in (0.25, 0.5, 0.75)
    ]
    # odds against 1/3, 1 and 3: c1 has 2.9, c2 0.30, c4 0.43, c5 0.25
    assert verdicts == [[[2, 0], [0, 2]], [[2, 0], [1, 1]], [[2, 0], [2, 0]]]


def test_models_with_other_thresholds_are_measured_together() -> None:
    """Cross-validation: each fold's images are judged at the threshold of the model that never saw them."""
    frame = predictions()
    fold = frame[schema.PATIENT].isin([f"p{i}" for i in range(6)])
    joined = pd.concat([aggregate.image_table(frame[fold], 0.3), aggregate.image_table(frame[~fold], 0.7)])
    found = measures.measure(joined)
    called = frame[schema.PROBABILITY_MALIGNANT] >= np.where(fold, 0.3, 0.7)
    right = called == (frame[schema.TUMOR_CLASS] == "malignant")
    assert found["pooled"]["accuracy"] == right.mean()
    patients = found["by_level"]["patient"]
    apart = [
        studies.measured(frame[rows], t)["by_level"]["patient"] for rows, t in ((fold, 0.3), (~fold, 0.7))
    ]
    assert patients["accuracy"] == pytest.approx((apart[0]["accuracy"] + apart[1]["accuracy"]) / 2)
    assert finite(found)


def test_calibration_before_and_after_the_temperature() -> None:
    frame = predictions()
    before = studies.measured(frame)["calibration"]
    assert list(before) == ["after"]
    same = frame.assign(**{aggregate.UNCALIBRATED: frame[schema.PROBABILITY_MALIGNANT].astype(np.float32)})
    assert list(studies.measured(same)["calibration"]) == ["after"]  # a temperature of 1
    sharper = 1 / (1 + ((1 / frame[schema.PROBABILITY_MALIGNANT]) - 1) ** 3)
    found = studies.measured(frame.assign(**{aggregate.UNCALIBRATED: sharper}))
    after, before = found["calibration"]["after"], found["calibration"]["before"]
    truth = (frame[schema.TUMOR_CLASS] == "malignant").to_numpy()
    for row, probability in ((after, frame[schema.PROBABILITY_MALIGNANT]), (before, sharper)):
        assert row["brier"] == pytest.approx(sklearn_metrics.brier_score_loss(truth, probability))
        assert row["cross_entropy"] == pytest.approx(sklearn_metrics.log_loss(truth, probability))
        assert row["ece"] == calibration.expected_error(truth, probability)
        assert sum(bin_["n"] for bin_ in row["reliability"]) == 240
        low, high = row["intervals"]["brier"]
        assert low < row["brier"] < high
    assert after["brier"] == found["pooled"]["brier"]
    assert after["intervals"]["ece"] == found["pooled"]["intervals"]["ece"]
    assert finite(found)


def test_describe_adds_intervals_to_estimates() -> None:
    images = aggregate.image_table(predictions())
    described = measures.with_intervals(images)
    counted = measures.tally_images(images)
    assert described.pop("intervals") == intervals.intervals_of(counted)
    assert described.pop("support") == {name: n for name, (n, _) in counted.support().items()}
    assert described == measures.estimates(images)
    unknown = images.assign(**{schema.PATIENT: images[schema.PATIENT].where(images.index > 0)})
    estimates = measures.estimates(unknown)
    assert (estimates["n_patients"], estimates["patient_recognition_rate"]) == (None, None)
    assert estimates["accuracy"] == described["accuracy"]


def test_models_of_several_draws_are_not_averaged() -> None:
    """Ten models hardly better than chance: their mean would be right on every patient."""
    draws = [predictions(spread=3.0, seed=seed) for seed in range(10)]
    tables = [aggregate.image_table(frame).assign(**{aggregate.DRAW: n}) for n, frame in enumerate(draws)]
    joined = pd.concat(tables, ignore_index=True)
    found, apart = measures.measure(joined), [measures.measure(table) for table in tables]
    assert (found["n_images"], found["n_judgements"], found["n_patients"]) == (240, 2400, 12)
    patient = found["by_level"]["patient"]
    alone = [one["by_level"]["patient"]["accuracy"] for one in apart]
    assert (patient["n"], patient["n_patients"]) == (120, 12)
    assert patient["accuracy"] == pytest.approx(np.mean(alone))
    ensemble = aggregate.groups(joined, schema.PATIENT)
    averaged = (ensemble[schema.TUMOR_CLASS] == ensemble[schema.PREDICTED_CLASS]).mean()
    assert averaged > patient["accuracy"] + 0.1


def test_slides_of_unknown_patients_have_no_interval() -> None:
    """Their dependence is unknown."""
    frame = predictions()
    known = frame.assign(**{schema.SLIDE: frame[schema.PATIENT]})
    assert studies.measured(known)["by_level"]["slide"]["intervals"]["brier"]
    unknown = known.assign(**{schema.PATIENT: None})
    slide = studies.measured(unknown)["by_level"]["slide"]
    assert (slide["n"], slide["n_patients"]) == (12, None)
    assert set(slide["intervals"].values()) == {None}


def test_evaluate_without_magnification_subtype_or_patient() -> None:
    bare = predictions().drop(columns=[schema.MAGNIFICATION, schema.SUBTYPE, schema.PATIENT])
    result = studies.measured(bare)
    assert finite(result)
    assert result["by_magnification"] == {}
    assert result["by_level"] == {}
    assert result["recall_by_subtype"] == {}
    assert result["n_patients"] is None
    assert result["pooled"]["patient_recognition_rate"] is None
    assert set(result["pooled"]["intervals"].values()) == {None}


def test_evaluate_when_nothing_was_scored() -> None:
    frame = predictions(n_patients=1, n_images=2).assign(**{schema.ERROR: "truncated"})
    result = studies.measured(frame)
    assert finite(result)
    assert (result["n_images"], result["n_errors"], result["pooled"]["accuracy"]) == (0, 2, None)


def test_evaluate_a_model_of_subtypes() -> None:
    frame, names = predictions(), list(SUBTYPES)
    generator = np.random.default_rng(0)
    probability = generator.dirichlet(np.ones(8), len(frame))
    frame[schema.PROBABILITY] = list(probability)
    frame[schema.PROBABILITY_MALIGNANT] = probability[:, 4:].sum(axis=1)
    frame.loc[:4, schema.SUBTYPE] = None
    result = studies.measured(frame, class_names=names)
    assert finite(result)
    known = frame[schema.SUBTYPE].notna()
    truth = np.array([names.index(code) for code in frame.loc[known, schema.SUBTYPE]])
    assert result["multiclass"] == measures.multiclass(truth, probability[known], names)


def test_groups_of_images_are_measured_as_tables_of_their_own() -> None:
    frame = predictions()
    frame[schema.SITE] = np.where(frame[schema.PATIENT] == "p1", "B", "A")
    found = studies.measured(frame)
    for name, column in (("by_site", schema.SITE), ("by_magnification", schema.MAGNIFICATION)):
        assert found[name].keys() == {str(value) for value in frame[column].unique()}
        for value, rows in frame.groupby(column):
            alone = studies.measured(rows.reset_index(drop=True))
            assert found[name][str(value)] == alone["pooled"]
            called = rows[schema.PROBABILITY_MALIGNANT] >= 0.5
            right = called == (rows[schema.TUMOR_CLASS] == "malignant")
            assert found[name][str(value)]["accuracy"] == pytest.approx(right.mean())
            by_patient = right.groupby(rows[schema.PATIENT])
            interval = intervals.interval_of_rate(by_patient.sum().to_numpy(), by_patient.size().to_numpy())
            assert found[name][str(value)]["intervals"]["accuracy"] == interval
    assert found["by_site"]["B"]["intervals"]["accuracy"] is None  # of one patient
    assert studies.measured(predictions())["by_site"] == {}
