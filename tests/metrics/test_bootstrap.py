"""Resampling patients: its formulas against plain metrics, and its intervals against planted truths."""

from collections.abc import Callable

import numpy as np
import pytest

from bcd.metrics import bootstrap, measures
from tests.studies import Arrays, Cohort, arrays, one_thread, planted, predictions

N_STUDIES, N_RESAMPLES = 500, 300


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
    found = bootstrap.intervals(study.tally(), n_resamples=200, seed=3)["sensitivity"]
    drawn = bootstrap.draws(12, 200, seed=3)
    patients = [f"p{i}" for i in range(12)]
    right = np.array([(study.truth & study.called)[study.patient == p].sum() for p in patients])
    malignant = np.array([study.truth[study.patient == p].sum() for p in patients])
    drawn = drawn[drawn @ malignant > 0]
    shares = (drawn @ right) / (drawn @ malignant)
    reach = 3.1824 * np.log(shares / (1 - shares)).std()  # four malignant patients
    centre = np.log(right.sum() / (malignant.sum() - right.sum()))
    assert found == pytest.approx([1 / (1 + np.exp(reach - centre)), 1 / (1 + np.exp(-reach - centre))], 1e-4)


def test_intervals_hold_the_estimate_and_are_reproducible() -> None:
    study = arrays(predictions())
    found = bootstrap.intervals(study.tally())
    assert found == bootstrap.intervals(study.tally())
    assert found != bootstrap.intervals(study.tally(), seed=1)
    for name in bootstrap.INTERVALS:
        low, high = found[name] or (1, 0)
        assert 0 < low < plain(study)[name] < high < 1


def test_patients_who_differ_widen_the_interval() -> None:
    study = arrays(predictions(spread=2.0))
    clustered = bootstrap.intervals(study.tally())["accuracy"]
    own = Arrays(study.truth, study.probability, study.called, np.arange(len(study.truth)))
    naive = bootstrap.intervals(own.tally())["accuracy"]
    assert clustered is not None
    assert naive is not None
    assert np.ptp(clustered) > 2 * np.ptp(naive)


def test_no_interval_where_there_is_nothing_to_resample() -> None:
    study = arrays(predictions())
    one = study.patient == "p0"
    assert set(bootstrap.intervals(study.tally(one)).values()) == {None}
    assert set(bootstrap.intervals(study.tally(slice(0))).values()) == {None}
    # one benign patient beside six malignant ones: nothing about the benign
    found = bootstrap.intervals(study.tally(study.truth | one))
    undefined = {"specificity", "balanced_accuracy", "auc"}
    assert {name for name, interval in found.items() if interval is None} == undefined
    # no error seen: how rare errors are stays unknown
    flawless = Arrays(study.truth, study.truth.astype(float), study.truth, study.patient)
    assert set(bootstrap.intervals(flawless.tally()).values()) == {None}


def test_resamples_that_differ_by_rounding_only_agree() -> None:
    study = arrays(predictions())
    alike = Arrays(study.truth, np.where(study.truth, 0.7, 0.3), study.truth, study.patient)
    assert alike.tally().values()["brier"] == pytest.approx(0.09)
    found = bootstrap.intervals(alike.tally())
    assert (found["brier"], found["ece"]) == (None, None)


def test_rare_errors_of_the_larger_class_have_an_interval() -> None:
    """Below half an image of the rarer class: 5 errors in 1,000 malignant images beside 40 benign ones."""
    truth = np.repeat([True, False], [1000, 40])
    called = truth.copy()
    called[[0, 110, 220, 330, 440]] = False
    counted = bootstrap.tally(truth, called.astype(float), called, np.arange(1040) // 10)
    low, high = bootstrap.intervals(counted)["balanced_accuracy"] or (1, 0)
    assert low < 1 - 0.0025 < high
    assert high - low > 0.001


def test_a_small_brier_score_has_an_interval_as_wide_as_its_patients_differ() -> None:
    """A mean of squares may be below half an image: the probabilities of a model that is right and sure."""
    generator = np.random.default_rng(0)
    truth, patient = np.arange(200) < 100, np.arange(200) // 10
    off = 0.01 * generator.lognormal(0, 0.5, 20)[patient]
    counted = bootstrap.tally(truth, np.where(truth, 1 - off, off), truth, patient)
    value, spread = counted.values()["brier"], counted.metrics(bootstrap.draws(20))["brier"].std()
    low, high = bootstrap.intervals(counted)["brier"] or (1, 0)
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


@one_thread
def coverage(n_studies: int, tally: Callable[[Arrays], bootstrap.Tally]) -> dict[str, float]:
    """Share of simulated studies whose interval contains the planted value."""
    truth = planted(1.7)
    held = dict.fromkeys(truth, 0)
    for seed in range(n_studies):
        found = bootstrap.intervals(tally(Cohort(seed).arrays(1.7)), N_RESAMPLES, seed)
        for name, value in truth.items():
            low, high = found[name] or (1, 0)
            held[name] += low <= value <= high
    return {name: n / n_studies for name, n in held.items()}


def test_intervals_cover_the_planted_truth() -> None:
    """95 % intervals contain the truth in 93 to 97 % of 500 studies, the sampling error of 500."""
    covered = coverage(N_STUDIES, Arrays.tally)
    assert set(covered) == {"accuracy", "balanced_accuracy", "auc"}
    assert all(0.93 <= share <= 0.97 for share in covered.values()), covered


@pytest.mark.trial
def test_a_bootstrap_over_images_does_not_cover_it() -> None:
    """Why patients are resampled: with each image its own patient, intervals rarely contain the truth."""

    def naive(study: Arrays) -> bootstrap.Tally:
        own = np.arange(len(study.truth))
        return bootstrap.tally(study.truth, study.probability, study.called, own)

    covered = coverage(100, naive)
    assert all(share < 0.75 for share in covered.values()), covered
