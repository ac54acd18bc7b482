"""Temperatures against planted ones; scores against scikit-learn and by hand."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.metrics import brier_score_loss, log_loss

from bcd.metrics import aggregate, calibration
from bcd.taxonomy import SUBTYPES, TUMOR_CLASSES


def simulated(
    n_classes: int, temperature: float, n: int = 4000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Logits (n, classes), float32 as models give them, and classes (n,) drawn from what the logits say once
    they are divided by the temperature."""
    generator = np.random.default_rng(seed)
    honest = generator.normal(0, 1.5, (n, n_classes))
    # The class of the greatest sum of logit and Gumbel noise is drawn from the softmax.
    target = (honest + generator.gumbel(size=honest.shape)).argmax(axis=1)
    return (honest * temperature).astype(np.float32), target


def scores(logit: np.ndarray, target: np.ndarray, temperature: float) -> dict[str, float]:
    """Cross-entropy, Brier score and calibration error of the malignant classes."""
    names = TUMOR_CLASSES if logit.shape[1] == 2 else tuple(SUBTYPES)
    truth = target >= len(names) // 2
    probability = calibration.probability_malignant(logit, names, temperature)
    return {
        "cross_entropy": calibration.cross_entropy(truth, aggregate.clipped_log_odds(probability)),
        "brier": calibration.brier(truth, probability),
        "ece": calibration.expected_error(truth, probability),
    }


def test_log_odds_are_those_of_the_probability() -> None:
    rng = np.random.default_rng(0)
    two, eight = rng.normal(0, 3, (5, 2)), rng.normal(0, 3, (5, 8))
    np.testing.assert_array_equal(calibration.log_odds(two, TUMOR_CLASSES), two[:, 1] - two[:, 0])
    p = calibration.probability_malignant(eight, tuple(SUBTYPES))
    np.testing.assert_allclose(calibration.log_odds(eight, tuple(SUBTYPES)), np.log(p / (1 - p)))
    # No probability below 1 is as sure.
    assert calibration.log_odds(np.array([[0.0, 99.0]]), TUMOR_CLASSES) == [99]


@pytest.mark.parametrize("n_classes", [2, 8])
@pytest.mark.parametrize("planted", [0.4, 1.0, 2.5])
def test_the_planted_temperature_is_found(planted: float, n_classes: int) -> None:
    logit, target = simulated(n_classes, planted, n=16_000)
    assert calibration.fit_temperature(logit, target) == pytest.approx(planted, rel=0.05)


@pytest.mark.parametrize("n_classes", [2, 8])
@pytest.mark.parametrize("planted", [0.4, 2.5])
def test_probabilities_are_better_after_it(planted: float, n_classes: int) -> None:
    """On images that it was not fitted on."""
    temperature = calibration.fit_temperature(*simulated(n_classes, planted))
    fresh = simulated(n_classes, planted, seed=1)
    before, after = scores(*fresh, 1.0), scores(*fresh, temperature)
    assert all(after[name] < before[name] for name in before), (before, after)
    assert after["ece"] < 0.025 < 0.05 < before["ece"]


def test_no_other_temperature_is_more_probable() -> None:
    logit, target = simulated(2, 2.5, n=300)

    def loss(temperature: float) -> float:
        logs = log_softmax(logit.astype(float) / temperature, axis=1)[np.arange(300), target]
        return float(np.log(temperature) ** 2 / (2 * calibration.PRIOR**2) - logs.sum())

    found = calibration.fit_temperature(logit, target)
    assert loss(found) <= min(loss(t) for t in np.geomspace(*calibration.BOUNDS, 2000)) + 1e-9


@pytest.mark.parametrize("gap", [0.5, 8.0, 200.0])
def test_a_few_images_without_an_error_change_the_scale_little(gap: float) -> None:
    """Five images of each class, where logits alone would give unbounded certainty."""
    target = np.repeat([0, 1], 5)
    logit = np.where(target[:, None] == [0, 1], gap / 2, -gap / 2)
    temperature = calibration.fit_temperature(logit, target)
    assert np.exp(-3 * calibration.PRIOR) < temperature <= 1.001
    if gap == 200:
        assert temperature == pytest.approx(1, abs=1e-3)


def test_classes_that_never_occur_and_logits_that_know_nothing() -> None:
    logit, target = simulated(8, 1.0)
    rare = target < 3
    assert calibration.fit_temperature(logit[rare], target[rare]) > 0
    noise = np.random.default_rng(0).permutation(target)
    assert calibration.fit_temperature(logit, noise) == pytest.approx(calibration.BOUNDS[1], rel=0.01)


def test_probability_malignant_by_hand() -> None:
    odds = np.log([[1.0, 3.0], [4.0, 1.0]])
    two = calibration.probability_malignant(odds, TUMOR_CLASSES)
    assert two == pytest.approx([3 / 4, 1 / 5])
    # halved log-odds are the square roots of the odds
    halved = calibration.probability_malignant(2 * odds, TUMOR_CLASSES, temperature=4.0)
    assert halved == pytest.approx([3**0.5 / (1 + 3**0.5), 1 / 3])
    # the last four of eight subtypes are malignant
    eight = calibration.probability_malignant(np.log([[1.0, 1, 1, 1, 2, 2, 3, 9]]), tuple(SUBTYPES))
    assert eight == pytest.approx([16 / 20])


def test_scores_agree_with_scikit_learn() -> None:
    logit, target = simulated(2, 1.0, n=500)
    probability = calibration.probability_malignant(logit, TUMOR_CLASSES)
    assert calibration.brier(target == 1, probability) == pytest.approx(brier_score_loss(target, probability))
    log_odds = aggregate.clipped_log_odds(probability)
    assert calibration.cross_entropy(target == 1, log_odds) == pytest.approx(log_loss(target, probability))
    assert calibration.cross_entropy(target == 1, log_odds) == pytest.approx(
        log_loss(target, softmax(logit, 1))
    )


def test_the_calibration_error_by_hand() -> None:
    # Bins of 1/15. First: 0.02, 0.04 (none malignant). Eighth: 0.5, 0.48, 0.52 (two of three). Last: 1 (yes).
    probability = np.array([0.5, 0.02, 1.0, 0.48, 0.04, 0.52])
    truth = np.array([1, 0, 1, 0, 0, 1], bool)
    expected = (2 * 0.03 + 3 * (2 / 3 - 0.5)) / 6
    assert calibration.expected_error(truth, probability) == pytest.approx(expected)


def test_bins_of_the_reliability_diagram_have_equally_many_images() -> None:
    generator = np.random.default_rng(0)
    probability, patient = generator.random(95), np.arange(95) % 30
    truth = generator.random(95) < probability
    rows = calibration.reliability_table(truth, probability, patient)
    assert [row["n"] for row in rows] == [11, 10, 11, 10, 11, 10, 11, 10, 11]
    order = np.argsort(probability)
    for row, chosen in zip(rows, np.split(order, np.cumsum([row["n"] for row in rows])[:-1]), strict=True):
        assert row["stated"] == pytest.approx(probability[chosen].mean())
        assert row["share_malignant"] == pytest.approx(truth[chosen].mean())
        assert row["n_patients"] == len(set(patient[chosen]))
        low, high = row["interval"]
        assert 0 <= low <= row["share_malignant"] <= high <= 1
    alone = calibration.reliability_table(truth, probability)
    assert {(row["n_patients"], row["interval"]) for row in alone} == {(None, None)}


@pytest.mark.parametrize(("n_patients", "n_bins"), [(1, 1), (3, 1), (5, 2), (11, 5), (24, 10), (60, 10)])
def test_there_are_two_patients_for_each_bin(n_patients: int, n_bins: int) -> None:
    probability = np.random.default_rng(0).random(120)
    patient = np.arange(120) % n_patients
    assert len(calibration.reliability_table(probability > 0.5, probability, patient)) == n_bins


def test_equal_probabilities_are_in_one_bin() -> None:
    probability = np.repeat([0.1, 0.1, 0.1, 0.9], 30)
    rows = calibration.reliability_table(probability > 0.5, probability, np.arange(120))
    assert [(row["n"], row["stated"]) for row in rows] == [(90, pytest.approx(0.1)), (30, pytest.approx(0.9))]


def test_images_of_one_patient_in_a_bin_count_as_one() -> None:
    """All of a patient are benign or malignant: 40 images of 4 patients are hardly more than 4."""
    truth, patient = np.repeat([True, False, True, False], 10), np.repeat(np.arange(4), 10)
    (bin_,) = calibration.reliability_table(truth, np.full(40, 0.5), patient)
    (own,) = calibration.reliability_table(truth, np.full(40, 0.5), np.arange(40))
    assert np.ptp(bin_["interval"]) > 2 * np.ptp(own["interval"])


def test_nothing_has_no_score() -> None:
    none, nothing = np.zeros(0, bool), np.zeros(0)
    assert calibration.cross_entropy(none, nothing) is None
    assert calibration.brier(none, nothing) is None
    assert calibration.expected_error(none, nothing) is None
    assert calibration.reliability_table(none, nothing) == []


def test_a_wrong_certainty_costs_a_finite_sum() -> None:
    worst = calibration.cross_entropy(np.array([True]), aggregate.clipped_log_odds(np.array([0.0])))
    assert worst == pytest.approx(-np.log(aggregate.CERTAINTY), rel=1e-3)
