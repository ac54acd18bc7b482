"""Resampling patients: its formulas against plain metrics, and intervals by hand."""

import numpy as np
import pytest

from bcd.metrics import bootstrap, measures
from tests.studies import Arrays, Cohort, arrays, predictions


def plain(study: Arrays, rows: np.ndarray | slice = slice(None)) -> dict[str, float]:
    """The metrics by their own formulas."""
    truth, called = study.truth[rows], study.called[rows]
    return measures.binary(truth, study.probability[rows], called) | {
        "patient_recognition_rate": measures.patient_recognition_rate(truth == called, study.patient[rows])
    }


def test_the_study_itself_is_one_of_its_resamples() -> None:
    """The formulas of the bootstrap, with every patient drawn once, against the plain ones; ties too."""
    frame = predictions()
    frame["probability_malignant"] = frame["probability_malignant"].round(1)
    study = arrays(frame)
    values = study.tally().values()
    assert set(values) == set(bootstrap.INTERVALS)
    assert values == pytest.approx({name: plain(study)[name] for name in bootstrap.INTERVALS})


@pytest.mark.parametrize("mixed", [False, True], ids=["one class each", "patients of both classes"])
def test_a_resample_equals_the_metrics_of_the_repeated_images(mixed: bool) -> None:
    study = arrays(predictions(n_patients=8, n_images=5))
    if mixed:
        truth = np.random.default_rng(0).random(40) < 0.5
        study = Arrays(truth, study.probability, study.called, study.patient)
    drawn = np.array([0, 2, 1, 0, 3, 0, 1, 1])
    rows, patients = [], []
    for i, times in enumerate(drawn):
        for again in range(times):
            own = np.flatnonzero(study.patient == f"p{i}")
            rows += own.tolist()
            # Drawn twice, a patient counts as two.
            patients += [f"p{i} {again}"] * len(own)
    repeated = Arrays(study.truth[rows], study.probability[rows], study.called[rows], np.array(patients))
    resampled = study.tally().metrics(drawn[None])
    assert {name: values[0] for name, values in resampled.items()} == pytest.approx(
        {name: plain(repeated)[name] for name in bootstrap.INTERVALS}
    )


def test_a_resample_without_a_class_is_undefined() -> None:
    study = arrays(predictions(n_patients=8, n_images=5))
    benign_only = study.tally().metrics(np.array([[2, 2, 2, 2, 0, 0, 0, 0]]))
    undefined = {name for name, values in benign_only.items() if np.isnan(values[0])}
    assert undefined == {"sensitivity", "balanced_accuracy", "auc"}


def test_as_many_patients_are_drawn_as_there_are() -> None:
    drawn = bootstrap.draws(7, 50)
    assert drawn.shape == (50, 7)
    assert set(drawn.sum(axis=1)) == {7}
    np.testing.assert_array_equal(drawn, bootstrap.draws(7, 50))
    assert (drawn != bootstrap.draws(7, 50, seed=1)).any()


def test_bins_are_fifteen_of_equal_width() -> None:
    edges = np.array([0, 0.0666, 0.0667, 0.4999, 0.5, 0.9333, 0.9334, 1])
    assert bootstrap.bins(edges).tolist() == [0, 0, 1, 7, 7, 13, 14, 14]


def test_support_by_hand() -> None:
    # Patients a (2 malignant images), b (1 malignant, 1 benign) and c (3 benign).
    truth = np.array([1, 1, 1, 0, 0, 0, 0], bool)
    counted = bootstrap.tally(truth, np.linspace(0, 1, 7), truth, np.array(list("aabbccc")))
    assert counted.support() == {
        "accuracy": (3, 7),
        "balanced_accuracy": (2, 3),
        "sensitivity": (2, 3),
        "specificity": (2, 4),
        "auc": (2, 12),
        "patient_recognition_rate": (3, 7),
        "brier": (3, 7),
        "ece": (3, 7),
    }


def test_students_t_as_printed_in_tables() -> None:
    assert [bootstrap.quantile(n) for n in (1, 23, 81)] == pytest.approx([12.706, 2.069, 1.990], abs=5e-4)


def test_an_interval_by_hand() -> None:
    study = arrays(predictions())
    found = bootstrap.intervals_of_errors(study.tally(), n_resamples=200, seed=3)["brier"]
    squares = (study.probability - study.truth) ** 2
    of_patients = np.array([squares[study.patient == f"p{i}"].mean() for i in range(12)])
    means = bootstrap.draws(12, 200, seed=3) @ of_patients / 12
    reach = 2.2010 * np.log(means / (1 - means)).std()  # twelve patients
    centre = np.log(squares.mean() / (1 - squares.mean()))
    assert found == pytest.approx([1 / (1 + np.exp(reach - centre)), 1 / (1 + np.exp(-reach - centre))], 1e-4)
    assert found == bootstrap.intervals_of_errors(study.tally(), n_resamples=200, seed=3)["brier"]
    assert found != bootstrap.intervals_of_errors(study.tally(), n_resamples=200)["brier"]


def test_two_patients_have_no_interval_of_errors() -> None:
    study = arrays(predictions())
    for n in range(3):
        few = np.isin(study.patient, [f"p{i}" for i in range(n)])
        assert bootstrap.intervals_of_errors(study.tally(few)) == {"brier": None, "ece": None}


def test_resamples_that_differ_by_rounding_only_agree() -> None:
    study = arrays(predictions())
    alike = Arrays(study.truth, np.where(study.truth, 0.7, 0.3), study.truth, study.patient)
    assert alike.tally().values()["brier"] == pytest.approx(0.09)
    assert bootstrap.intervals_of_errors(alike.tally()) == {"brier": None, "ece": None}


def test_a_small_brier_score_has_an_interval_as_wide_as_its_patients_differ() -> None:
    """A mean of squares may be below half an image: the probabilities of a model that is right and sure."""
    generator = np.random.default_rng(0)
    truth, patient = np.arange(200) < 100, np.arange(200) // 10
    off = 0.01 * generator.lognormal(0, 0.5, 20)[patient]
    counted = bootstrap.tally(truth, np.where(truth, 1 - off, off), truth, patient)
    value, spread = counted.values()["brier"], counted.metrics(bootstrap.draws(20))["brier"].std()
    low, high = bootstrap.intervals_of_errors(counted)["brier"] or (1, 0)
    assert value < 0.5 / 200
    assert high - low == pytest.approx(2 * 2.093 * spread, rel=0.2)


def test_a_deviation_needs_patients_and_defined_resamples() -> None:
    values = np.arange(10.0)
    assert bootstrap.deviation(values, 2) == values.std()
    assert bootstrap.deviation(values, 1) is None
    values[:2] = np.nan
    assert bootstrap.deviation(values, 2) == values[2:].std()
    values[2] = np.nan
    assert bootstrap.deviation(values, 2) is None
    assert bootstrap.deviation(np.full(10, 0.1), 2) is None


def test_differences_are_those_on_the_same_drawn_patients() -> None:
    first, second = Cohort(0).arrays(1.7).tally(), Cohort(0).arrays(1.0).tally()
    drawn = bootstrap.draws(82, 50, seed=5)
    found = bootstrap.resampled_differences(first, second, 50, seed=5)
    assert set(found) == set(bootstrap.INTERVALS)
    for name, values in found.items():
        np.testing.assert_array_equal(values, first.metrics(drawn)[name] - second.metrics(drawn)[name])
    assert all((values == 0).all() for values in bootstrap.resampled_differences(first, first, 50).values())
