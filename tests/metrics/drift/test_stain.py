"""Drift of the stain: the numbers of T², whose observation an image is, and how often it is right."""

import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from bcd.metrics.drift import stain
from benchmarks import stain_drift


def images(n_patients, n_images, shift=0.0, within=0.5, seed=0, share=0.5):
    """Owners and stains of patients with a random effect; a share of the images is shifted."""
    rng = np.random.default_rng(seed)
    effect = np.repeat(rng.normal(size=(n_patients, 4)), n_images, axis=0)
    owners = np.repeat([f"patient {i}" for i in range(n_patients)], n_images).tolist()
    moved = (rng.random(len(owners)) < share)[:, None] * shift * np.array([1, 1, -1, -1])
    own = rng.normal(size=effect.shape)
    return owners, 0.3 + 0.05 * (np.sqrt(within) * effect + np.sqrt(1 - within) * own + moved)


def found(n_training, n_archive, n_images, shift, seed):
    training = stain.statistics_of(*images(n_training, n_images, seed=2 * seed))
    return stain.measure_drift(*images(n_archive, n_images, shift, seed=2 * seed + 1), training)["is_found"]


def test_statistics_are_those_of_the_means_of_patients():
    stains = np.array([[1, 0, 0, 0], [3, 0, 0, 0], [0, 4, 0, 0], [np.nan] * 4, [0, 0, 0, 2]], float)
    known = stain.statistics_of(["patient a", "patient a", "patient b", "patient c", "patient d"], stains)
    assert known.n_patients == 3  # c has no tissue
    np.testing.assert_allclose(known.mean, [2 / 3, 4 / 3, 0, 2 / 3])
    np.testing.assert_allclose(
        known.covariance, np.cov(np.array([[2, 0, 0, 0], [0, 4, 0, 0], [0, 0, 0, 2]]).T)
    )
    assert stain.statistics_of(["a", "a"], stains[:2]) is None


def test_the_statistic_is_hotellings_and_no_turn_of_the_numbers_changes_it():
    rng = np.random.default_rng(0)
    one, other = rng.normal(0, 1, 20), rng.normal(0.8, 1, 30)
    first, second = (np.stack([values, *rng.normal(0, 1, (3, len(values)))], 1) for values in (one, other))
    # A rotation changes nothing.
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    names = [[f"patient {i}" for i in range(n)] for n in (30, 20)]
    results = [
        stain.measure_drift(names[1], a, stain.statistics_of(names[0], b))
        for a, b in ((first, second), (first @ turn, second @ turn))
    ]
    assert results[0]["statistic"] == pytest.approx(results[1]["statistic"], rel=1e-5)
    assert results[0]["degrees"] == (4, 45)
    pooled = ((len(one) - 1) * np.cov(first.T) + (len(other) - 1) * np.cov(second.T)) / 48
    shift = first.mean(0) - second.mean(0)
    squared = 12 * shift @ np.linalg.inv(pooled) @ shift
    assert results[0]["statistic"] == pytest.approx(squared * 45 / (48 * 4), rel=1e-5)
    assert results[0]["p_value"] == pytest.approx(stats.f.sf(squared * 45 / (48 * 4), 4, 45), rel=1e-5)


def test_an_image_is_its_patients_else_its_slides_else_its_own():
    assert stain.observation_of("p", "s", "i") == "patient p"
    assert stain.observation_of(None, "s", "i") == "slide s"
    assert stain.observation_of(np.nan, None, "i") == "file i"


def test_what_is_not_known_is_said():
    owners, stains = images(5, 3)
    unknown = stain.measure_drift(owners, stains, None)
    assert unknown["p_value"] is None
    assert "not known" in unknown["sentence"]
    few = stain.measure_drift(owners, stains, stain.statistics_of(*images(6, 3, seed=1)))
    assert (few["p_value"], few["is_found"]) == (None, False)
    assert (
        few["sentence"] == "drift of the stain: 5 patients, beside 6 patients of the training: too few to say"
    )
    empty = stain.measure_drift([], np.zeros((0, 4)), stain.statistics_of(*images(20, 3)))
    assert "nothing with tissue" in empty["sentence"]


def test_the_sentence_has_the_numbers():
    training = stain.statistics_of(*images(30, 3))
    owners, stains = images(20, 3, shift=3, seed=1, share=1)
    files = [f"file {i}" for i in range(len(owners))]
    result = stain.measure_drift(files, stains, training)
    assert result["is_found"]
    assert result["observed"] == {"file": 60}
    assert result["density"][0] == pytest.approx(0.45, abs=0.03)
    assert result["training_density"][1] == pytest.approx(0.3, abs=0.03)
    assert "unlike the training data (p < 0.0001; " in result["sentence"]
    assert "60 files, beside 30 patients" in result["sentence"]
    assert "files count as of different patients" in result["sentence"]
    same = stain.measure_drift(*images(20, 3, seed=5), training)
    assert same["sentence"].startswith("no drift of the stain was found (p = 0.")
    assert "20 patients, beside 30" in same["sentence"]


@pytest.mark.parametrize(("shift", "low", "high"), [(0, 0, 0.05), (2, 0.95, 1)])
def test_a_shift_of_half_of_the_images_is_found_and_none_where_there_is_none(shift, low, high):
    share = np.mean([found(30, 20, 10, shift, seed) for seed in range(60)])
    assert low <= share <= high


def test_images_of_a_patient_are_no_observations_of_their_own():
    """As files they would be 200 independent images: drift is found where there is none."""
    wrong = right = 0
    for seed in range(40):
        training = stain.statistics_of(*images(12, 10, within=0.8, seed=2 * seed))
        owners, stains = images(8, 25, within=0.8, seed=2 * seed + 1)
        right += stain.measure_drift(owners, stains, training)["is_found"]
        files = [f"file {i}" for i in range(len(owners))]
        own = stain.statistics_of(
            [f"file {i}" for i in range(120)], images(12, 10, within=0.8, seed=2 * seed)[1]
        )
        wrong += stain.measure_drift(files, stains, own)["is_found"]
    assert right <= 2
    assert wrong >= 20


@pytest.mark.real
@pytest.mark.trial
def test_real_fields_that_are_stained_otherwise():
    """112 fields are enough to see that half of them are; 21 cases, that all of them are, and strongly."""
    if "BCD_REAL_DATA" not in os.environ:
        pytest.skip("BCD_REAL_DATA names no folder")
    rng = np.random.default_rng(0)
    real = stain_drift.sets(Path(os.environ["BCD_REAL_DATA"]))

    def share(name, which, of):
        return np.mean([stain_drift.is_found(*real[name], which, of, rng) for _ in range(100)])

    assert max(share(name, 0, "half") for name in real) <= 0.05
    assert share("GlaS by field", 1 + stain_drift.FACTORS.index((1.5, 0.5)), "half") >= 0.95
    assert share("BreaKHis by field", 1 + stain_drift.FACTORS.index((1.5, 0.5)), "all") >= 0.95
    assert share("BreaKHis by case", 1 + stain_drift.FACTORS.index((2.0, 0.4)), "all") >= 0.95
