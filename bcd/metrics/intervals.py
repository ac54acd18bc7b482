"""95 % intervals over patients, useful from a few patients up: of rates and of the AUC, in closed form.

Images of one patient resemble each other, so they count for less than images of others: n images of a patient
for n / (1 + (n - 1) · r) independent ones, where r is the correlation within patients. r is not known. Each
value of it is as probable as the beta-binomial model says from the counts of the patients (of the AUC: a
Gaussian model of their placements); before the data its distribution is Beta(2/3, 1), of mean 0.4.

An interval is that of so many independent images (Clopper and Pearson 1934), averaged over r. It has a bound
at 0 and 100 % too, contains the value, and needs no resampling. Decision 11 says how often it contains the
truth, beside others.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import betainc, betaln

from bcd.metrics import bootstrap
from bcd.metrics.bootstrap import INTERVALS, LEVEL, N_RESAMPLES, Intervals, Tally

METHOD = (
    "by patients, whose images count as the correlation within patients says; "
    "of Brier score and calibration error, bootstrap over patients with Student's t"
)
# For an interval. One patient says nothing about how much patients differ.
MIN_PATIENTS = 2
# Values of the correlation within patients, of equal probability before the data.
CORRELATIONS = ((np.arange(20) + 0.5) / 20) ** 1.5
# A rate is integrated over so many standard deviations around its estimate, at these points.
_REACH, _POINTS = 4, ((np.arange(15) + 0.5) / 15)[:, None]
_BISECTIONS = 40
_MOST = 10
_TINY = 1e-12


def intervals_of(counted: Tally, n_resamples: int = N_RESAMPLES, seed: int = 0) -> Intervals:
    """95 % interval [low, high] of each of `INTERVALS`; resamples and seed are for `bootstrap.ERRORS`.

    `None` with fewer than `MIN_PATIENTS` patients (of a class, where the metric is about one).
    """
    images, right = counted.malignant + counted.benign, counted.true_positive + counted.true_negative
    found = bootstrap.intervals_of_errors(counted, n_resamples, seed) | {
        "accuracy": interval_of_rate(right, images),
        "patient_recognition_rate": interval_of_rate(right, images, np.ones(len(images))),
        "sensitivity": interval_of_rate(counted.true_positive, counted.malignant),
        "specificity": interval_of_rate(counted.true_negative, counted.benign),
        "auc": interval_of_auc(counted),
    }
    rates = [ends for name in ("sensitivity", "specificity") if (ends := found[name])]
    found["balanced_accuracy"] = _of_their_mean(counted, rates) if len(rates) == 2 else None
    return {name: found[name] for name in INTERVALS}


def interval_of_rate(
    right: np.ndarray, images: np.ndarray, weight: np.ndarray | None = None
) -> list[float] | None:
    """Interval [low, high] of a rate over patients; `None` with fewer than `MIN_PATIENTS` of them.

    Args:
        right: images of each patient that count, int (p,).
        images: all images of each patient, int (p,).
        weight: of each patient in the rate, (p,); by default the number of images.
    """
    seen = images > 0
    if seen.sum() < MIN_PATIENTS:
        return None
    right, images = right[seen], images[seen]
    weight = images if weight is None else weight[seen]
    rate = float(right / images @ weight / weight.sum())
    return _of_beta(rate, independent_images(images, weight), _of_counts(right, images))


def independent_images(images: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """How many independent images have the variance of a mean over patients, weighted and of so many images
    (p,) each, for each of `CORRELATIONS`."""
    share, r = weight / weight.sum(), CORRELATIONS[:, None]
    return 1 / (share**2 * (r + (1 - r) / images)).sum(axis=1)


def _of_counts(right: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Probability of each of `CORRELATIONS` after the counts of patients (p,): beta-binomial, with the rate
    integrated out (Jeffreys' prior: uniform in the angle of which the rate is the squared sine)."""
    centre = np.arcsin(np.sqrt(right.sum() / images.sum()))
    reach = _REACH / (2 * np.sqrt(independent_images(images, images)))
    low, high = np.maximum(centre - reach, 0), np.minimum(centre + reach, np.pi / 2)
    rate = np.sin(low + (high - low) * _POINTS) ** 2
    alpha, beta = (part * (1 / CORRELATIONS - 1) for part in (rate, 1 - rate))
    pairs, times = np.unique(np.stack([right, images], axis=1), axis=0, return_counts=True)
    log = np.log(high - low) + sum(
        n * (betaln(alpha + k, beta + total - k) - betaln(alpha, beta))
        for (k, total), n in zip(pairs, times, strict=True)
    )
    return _probabilities(log).sum(axis=0)


def interval_of_auc(counted: Tally) -> list[float] | None:
    """Interval of the AUC, whose variance is that of Hanley and McNeil (1982) for as many independent images
    of both classes as those of the patients count for."""
    sizes = [part[part > 0] for part in (counted.benign, counted.malignant)]
    if min(map(len, sizes)) < MIN_PATIENTS:
        return None
    auc = counted.values()["auc"]
    # Of AUC · (1 - AUC), the share that images of one class vary by; their model has one for each class, and
    # which is which depends on the sign of the scores: the mean of the two.
    share = (auc / (1 + auc) + (1 - auc) / (2 - auc)) / 2
    benign, malignant = (independent_images(n, n) for n in sizes)
    counting = 1 / (share / benign + share / malignant + (1 - 2 * share) / (benign * malignant))
    likely = [
        _of_places(*own) for own in zip((counted.benign, counted.malignant), counted.places, strict=True)
    ]
    return _of_beta(auc, counting, _probabilities(np.sum(likely, axis=0)))


def _of_places(images: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Logarithm of the likelihood of each of `CORRELATIONS` for the placements of a class, which are taken as
    Gaussian; from numbers of images (p,), sums of placements and of their squares (2, p).

    Placements near 1 are not Gaussian, so patients count for `_MOST` images at most, on average.
    """
    n, (total, squares) = images[images > 0], places[:, images > 0]
    within = max(0.0, float((squares - total**2 / n).sum()))
    r = CORRELATIONS[:, None]
    weight = n / (1 - r + n * r)
    centre = (weight * total / n).sum(axis=1) / weight.sum(axis=1)
    between = (weight * (total / n - centre[:, None]) ** 2).sum(axis=1)
    spread = within / (1 - CORRELATIONS) + between
    if spread.max() < _TINY:  # all are placed alike, which says nothing about the correlation
        return np.zeros(len(CORRELATIONS))
    log = (n.sum() - 1) * np.log(spread) + (n.sum() - len(n)) * np.log(1 - CORRELATIONS)
    log += np.log(1 - r + n * r).sum(axis=1) + np.log(weight.sum(axis=1))
    return -log / 2 * min(1, _MOST * len(n) / n.sum())


def _of_their_mean(counted: Tally, rates: Sequence[list[float]]) -> list[float]:
    """Interval of the balanced accuracy from those of sensitivity and specificity (Newcombe 1998: distances
    from the value add up as standard deviations do)."""
    values, r = counted.values(), _shared(counted)
    pairs = list(zip((values["sensitivity"], values["specificity"]), rates, strict=True))
    low, high = ([abs(rate - ends[side]) / 2 for rate, ends in pairs] for side in (0, 1))
    mean = values["balanced_accuracy"]
    down, up = (np.sqrt(a**2 + b**2 + 2 * r * a * b) for a, b in (low, high))
    return [max(0.0, float(mean - down)), min(1.0, float(mean + up))]


def _shared(counted: Tally) -> float:
    """Correlation of sensitivity and specificity by patients of both classes, 0 to 1; without errors, which
    would show it, the share of such patients."""
    both = (counted.malignant > 0) & (counted.benign > 0)
    values = counted.values()
    one = counted.true_positive - values["sensitivity"] * counted.malignant
    other = counted.true_negative - values["specificity"] * counted.benign
    if (scale := np.sqrt((one**2).sum() * (other**2).sum())) < _TINY:
        return float(both.mean())
    return max(0.0, float(one @ other / scale))


def _of_beta(rate: float, counting: np.ndarray, probable: np.ndarray) -> list[float]:
    """Interval of a rate of as many independent images as `counting` says, each number with its probability
    (r,)."""
    rate = round(rate, 12)
    right, wrong, tail = rate * counting, (1 - rate) * counting, (1 - LEVEL) / 2

    def at(level: float, alpha: np.ndarray, beta: np.ndarray) -> float:
        return _solved(lambda value: float(probable @ betainc(alpha, beta, value)), level)

    low = at(tail, right, wrong + 1) if rate > 0 else 0.0
    high = at(1 - tail, right + 1, wrong) if rate < 1 else 1.0
    return [low, high]


def _solved(rising: Callable[[float], float], level: float) -> float:
    """Where a function that rises from 0 to 1 reaches a level."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < level else (low, middle)
    return (low + high) / 2


def _probabilities(log: np.ndarray) -> np.ndarray:
    """Probabilities whose logarithms are known up to a constant."""
    weight = np.exp(log - log.max())
    return weight / weight.sum()
