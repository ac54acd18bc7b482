"""Resampling patients: what a study is made of, differences between models, intervals of mean errors.

Images of one patient are correlated, so patients are resampled, each with all its images.

The interval of a Brier score or calibration error is value ± t · s on the log-odds scale, where s is the
standard deviation over the resamples and t is Student's, with one degree of freedom less than there are
patients: percentiles are too narrow with the few patients of such studies (Hesterberg 2015, "What Teachers
Should Know About the Bootstrap"). Rates and the AUC have intervals in closed form: see `intervals`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import expit, logit, stdtrit

LEVEL = 0.95
N_RESAMPLES = 1000
# The metrics that get an interval, those of the probabilities last.
ERRORS = ("brier", "ece")
INTERVALS = (
    *("accuracy", "balanced_accuracy", "sensitivity", "specificity"),
    *("auc", "patient_recognition_rate", *ERRORS),
)
# For an interval of an error. Student's t of two patients reaches over everything.
MIN_RESAMPLED = 3
# A resample without patients of one class has no AUC. Two patients of a class are missing from at most
# 14 % of the resamples, a single one from at least 25 %: beyond this there is no interval.
MAX_UNDEFINED = 0.2
# Resamples that agree up to this differ only by the order of summation.
ROUNDING = 1e-9
# Bins of the expected calibration error, of equal width (Guo et al. 2017, arXiv 1706.04599).
N_BINS = 15

Intervals = dict[str, list[float] | None]


def draws(n_patients: int, n_resamples: int = N_RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each patient is drawn in each resample: int (n_resamples, n_patients), rows sum to
    n_patients.

    The seed is that of NumPy's PCG64.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.multinomial(n_patients, np.full(n_patients, 1 / max(1, n_patients)), size=n_resamples)


@dataclass(frozen=True)
class Tally:
    """Sufficient statistics of a study of p patients: counts and sums (p,), of bins (p, N_BINS).

    `wins[i, j]` counts the correctly ranked pairs of a malignant image of patient i and a benign one of
    patient j, a tie as one half; its sum over the number of pairs is the AUC. `gaps` is the sum of
    probability minus truth in each bin of the calibration error. `places` are, of the benign and of the
    malignant images of each patient, the sums of placements and of their squares (2, 2, p); the placement of
    an image is the share of the images of the other class that it is ranked correctly with.
    """

    malignant: np.ndarray
    benign: np.ndarray
    true_positive: np.ndarray
    true_negative: np.ndarray
    squares: np.ndarray
    gaps: np.ndarray
    wins: np.ndarray
    places: np.ndarray

    def metrics(self, drawn: np.ndarray) -> dict[str, np.ndarray]:
        """Each of `INTERVALS` (r,) if patients count as often as `drawn` (r, p); nan if undefined."""
        malignant, benign = drawn @ self.malignant, drawn @ self.benign
        correct, images = self.true_positive + self.true_negative, self.malignant + self.benign
        sensitivity = _ratios(drawn @ self.true_positive, malignant)
        specificity = _ratios(drawn @ self.true_negative, benign)
        total = drawn @ images
        return {
            "accuracy": _ratios(drawn @ correct, total),
            "balanced_accuracy": (sensitivity + specificity) / 2,
            "sensitivity": sensitivity,
            "specificity": specificity,
            "auc": _ratios(((drawn @ self.wins) * drawn).sum(axis=1), malignant * benign),
            "patient_recognition_rate": _ratios(drawn @ (correct / images), drawn.sum(axis=1)),
            "brier": _ratios(drawn @ self.squares, total),
            "ece": _ratios(np.abs(drawn @ self.gaps).sum(axis=1), total),
        }

    def values(self) -> dict[str, float]:
        """Each of `INTERVALS` of the study itself; nan if undefined."""
        once = self.metrics(np.ones((1, len(self.malignant)), int))
        return {name: float(values[0]) for name, values in once.items()}

    def support(self) -> dict[str, tuple[int, int]]:
        """Numbers of patients and images (for the AUC: pairs of images) behind each of `INTERVALS`."""
        malignant, benign = int(self.malignant.sum()), int(self.benign.sum())
        with_malignant, with_benign = int((self.malignant > 0).sum()), int((self.benign > 0).sum())
        of_class = {
            "sensitivity": (with_malignant, malignant),
            "specificity": (with_benign, benign),
            "balanced_accuracy": (min(with_malignant, with_benign), min(malignant, benign)),
            "auc": (min(with_malignant, with_benign), malignant * benign),
        }
        return {name: of_class.get(name, (len(self.malignant), malignant + benign)) for name in INTERVALS}


def tally(
    truth_malignant: np.ndarray, probability_malignant: np.ndarray, called: np.ndarray, patient: np.ndarray
) -> Tally:
    """Count what intervals need, from truth, probability, call and patient of every image, (n,) each.

    Patients are numbered in order of appearance.
    """
    truth, called = np.asarray(truth_malignant, bool), np.asarray(called, bool)
    probability = np.asarray(probability_malignant, float)
    owner, ids = pd.factorize(np.asarray(patient, object))
    n = len(ids)
    wins = [
        np.bincount(owner[truth], _ranks(probability[truth], probability[~truth & (owner == j)]), n)
        for j in range(n)
    ]
    place = owner * N_BINS + bins(probability)
    places = [
        [np.bincount(owner[part], placed**power, n) for power in (1, 2)]
        for part, sign in ((~truth, -1), (truth, 1))
        for placed in [_ranks(sign * probability[part], sign * probability[~part]) / max(1, (~part).sum())]
    ]
    return Tally(
        malignant=np.bincount(owner[truth], minlength=n),
        benign=np.bincount(owner[~truth], minlength=n),
        true_positive=np.bincount(owner[truth & called], minlength=n),
        true_negative=np.bincount(owner[~truth & ~called], minlength=n),
        squares=np.bincount(owner, (probability - truth) ** 2, n),
        gaps=np.bincount(place, probability - truth, n * N_BINS).reshape(n, N_BINS),
        wins=np.stack(wins, axis=1) if wins else np.zeros((0, 0)),
        places=np.array(places),
    )


def bins(probability: np.ndarray) -> np.ndarray:
    """Bin (n,), 0 to `N_BINS` - 1, of each probability (n,)."""
    return np.minimum((np.asarray(probability) * N_BINS).astype(int), N_BINS - 1)


def intervals_of_errors(counted: Tally, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Intervals:
    """95 % interval [low, high] of each of `ERRORS`.

    `None` with fewer than `MIN_RESAMPLED` patients, where `deviation` is, and where the value is 0 or 1.
    """
    n_patients = len(counted.malignant)
    if n_patients < MIN_RESAMPLED:
        return dict.fromkeys(ERRORS)
    resampled = counted.metrics(draws(n_patients, n_resamples, seed))
    values, support = counted.values(), counted.support()
    return {name: _interval(values[name], resampled[name], *support[name]) for name in ERRORS}


def _interval(value: float, resampled: np.ndarray, n_patients: int, n_images: int) -> list[float] | None:
    if not 0 < value < 1:
        return None
    # A resample without an error means an error rate below half an image, not none; below half the observed
    # rate, where a mean of squares or of two classes is smaller than an image's share.
    edge = min(0.5 / n_images, value / 2, (1 - value) / 2)
    spread = deviation(logit(np.clip(resampled, edge, 1 - edge)), n_patients)
    if spread is None:
        return None
    reach = quantile(n_patients - 1) * spread
    return [float(expit(logit(value) + sign * reach)) for sign in (-1, 1)]


def deviation(resampled: np.ndarray, n_patients: int) -> float | None:
    """Standard deviation over resamples (r,), nan where undefined.

    `None` where it says nothing: with fewer than two patients (see `Tally.support`), if more than
    `MAX_UNDEFINED` of the resamples are undefined, or if all agree.
    """
    defined = resampled[~np.isnan(resampled)]
    if n_patients < 2 or len(defined) < (1 - MAX_UNDEFINED) * len(resampled):
        return None
    spread = float(np.std(defined))
    return spread if spread > ROUNDING else None


def quantile(degrees: int) -> float:
    """Student's t that has `LEVEL` of the distribution between its negative and itself."""
    return float(stdtrit(degrees, (1 + LEVEL) / 2))


def resampled_differences(
    first: Tally, second: Tally, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Mapping[str, np.ndarray]:
    """First minus second of each of `INTERVALS` (r,), both over the same resamples of the same patients."""
    drawn = draws(len(first.malignant), n_resamples, seed)
    one, other = first.metrics(drawn), second.metrics(drawn)
    return {name: one[name] - other[name] for name in INTERVALS}


def _ranks(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How many of `others` each value exceeds, a tie as one half."""
    others = np.sort(others)
    return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")) / 2


def _ratios(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    undefined = np.full(len(numerator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)
