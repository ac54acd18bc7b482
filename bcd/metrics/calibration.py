"""Calibration: temperature scaling, Brier score, calibration error and reliability diagram.

A temperature T divides the logits: T > 1 corrects overconfidence and never changes which class is likelier
(Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599). It is fitted on validation
only.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import log_softmax, logsumexp, softmax

from bcd.metrics import bootstrap, intervals
from bcd.taxonomy import malignant_mask

# Far beyond what networks need; a fit that ends here found no information in the logits.
BOUNDS = (0.05, 20.0)
# Bins of the reliability diagram.
BIN_IMAGES, BIN_PATIENTS, MAX_BINS = 10, 2, 10
# Standard deviation of the normal prior on the logarithm of the temperature: 95 % within 0.37 to 2.7.
PRIOR = 0.5


def fit_temperature(logit: np.ndarray, target: np.ndarray) -> float:
    """Maximum a posteriori temperature: least cross-entropy, with a normal prior on its logarithm.

    Without the prior a few images without an error would give unbounded certainty, and one error among them
    almost none. The more images, the less the prior counts.

    Args:
        logit: float (n, classes), before any temperature.
        target: int (n,), positions of the true classes.
    """
    # Not at the top: of those who import this module only the training fits a temperature.
    from scipy.optimize import minimize_scalar

    scores, rows = np.asarray(logit, np.float64), np.arange(len(target))

    def negative_log_posterior(log_temperature: float) -> float:
        log_probability = log_softmax(scores / np.exp(log_temperature), axis=1)
        return float((log_temperature / PRIOR) ** 2 / 2 - log_probability[rows, target].sum())

    options = {"xatol": 1e-6}
    best = minimize_scalar(negative_log_posterior, bounds=np.log(BOUNDS), method="bounded", options=options)
    return float(np.exp(best.x))


def probability_malignant(
    logit: np.ndarray, class_names: Sequence[str], temperature: float = 1.0
) -> np.ndarray:
    """Probability of malignancy (n,) from logits (n, classes): the sum over the malignant classes."""
    malignant = np.array(malignant_mask(tuple(class_names)))
    return softmax(np.asarray(logit, np.float64) / temperature, axis=1)[:, malignant].sum(axis=1)


def log_odds(logit: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Log-odds of malignancy (n,) from logits (n, classes).

    With two classes: the difference of their logits, and the mean of the evidence map plus its bias.
    """
    malignant = np.array(malignant_mask(tuple(class_names)))
    scores = np.asarray(logit, np.float64)
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        benign_sum, malignant_sum = (
            np.logaddexp.reduce(scores[:, part], 1) for part in (~malignant, malignant)
        )
        return malignant_sum - benign_sum


def cross_entropy(truth_malignant: np.ndarray, log_odds: np.ndarray) -> float | None:
    """Mean negative log-likelihood of benign or malignant (natural logarithm); `None` without images."""
    signed = np.where(truth_malignant, -1.0, 1.0) * log_odds
    losses = logsumexp([np.zeros(len(signed)), signed], axis=0)
    return float(losses.mean()) if len(losses) else None


def brier(truth_malignant: np.ndarray, probability: np.ndarray) -> float | None:
    """Mean squared difference of probability and truth, 0 to 1 (Brier 1950); `None` without images."""
    squares = (np.asarray(probability) - np.asarray(truth_malignant, float)) ** 2
    return float(squares.mean()) if len(squares) else None


def expected_error(truth_malignant: np.ndarray, probability: np.ndarray) -> float | None:
    """Expected calibration error: mean gap between probability and share of malignant images over the bins of
    `bootstrap.bins`, weighted by their numbers of images; `None` without images."""
    gaps = np.bincount(bootstrap.bins(probability), np.asarray(probability) - np.asarray(truth_malignant))
    return float(np.abs(gaps).sum() / len(truth_malignant)) if len(truth_malignant) else None


def reliability_table(
    truth_malignant: np.ndarray, probability: np.ndarray, patient: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Bins of equally many images, in the order of their probabilities; equal ones are in one bin.

    Args:
        truth_malignant: bool (n,).
        probability: float (n,).
        patient: id of each image's patient (n,), if all are known.

    Returns:
        Of each bin `n`, `n_patients`, `stated` (mean probability), `share_malignant` and its `interval` (see
        `intervals.interval_of_rate`). There are as many bins as leave 10 images and 2 patients for each, at
        most 10.
    """
    truth, probability = np.asarray(truth_malignant, bool), np.asarray(probability, float)
    owner, ids = pd.factorize(np.zeros(0) if patient is None else patient)
    room = (
        len(truth) // BIN_IMAGES
        if patient is None
        else min(len(truth) // BIN_IMAGES, len(ids) // BIN_PATIENTS)
    )
    levels = np.arange(1, n_bins := min(max(1, room), MAX_BINS)) / n_bins
    place = np.searchsorted(np.quantile(probability, levels), probability, "right") if len(truth) else owner
    return [
        {
            "n": int(rows.sum()),
            "stated": float(probability[rows].mean()),
            "share_malignant": float(truth[rows].mean()),
        }
        | _by_patient(truth[rows], None if patient is None else owner[rows])
        for rows in (place == number for number in np.unique(place))
    ]


def _by_patient(truth: np.ndarray, owner: np.ndarray | None) -> dict[str, Any]:
    """Number of patients behind a share of malignant images, and its interval."""
    if owner is None:
        return {"n_patients": None, "interval": None}
    images, malignant = np.bincount(owner), np.bincount(owner, truth).astype(int)
    interval = intervals.interval_of_rate(malignant, images)
    return {"n_patients": int((images > 0).sum()), "interval": interval}
