"""Calibration: temperature scaling, Brier score, calibration error and reliability diagram.

A temperature T divides the logits: T > 1 corrects overconfidence and never changes which class is likelier
(Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599). It is fitted on validation
only.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import log_softmax, logsumexp, softmax

from bcd.metrics import bootstrap
from bcd.taxonomy import malignant_mask

# Far beyond what networks need; a fit that ends here found no information in the logits.
BOUNDS = (0.05, 20.0)
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
    `reliability_table`, weighted by their numbers of images; `None` without images."""
    rows = reliability_table(truth_malignant, probability)
    gaps = sum(row["n"] * abs(row["stated"] - row["share_malignant"]) for row in rows)
    return gaps / len(truth_malignant) if rows else None


def reliability_table(truth_malignant: np.ndarray, probability: np.ndarray) -> list[dict[str, Any]]:
    """`n`, `stated` (mean probability) and `share_malignant` of each bin in use, from (n,) each."""
    place = bootstrap.bins(probability)
    return [
        {
            "n": int(rows.sum()),
            "stated": float(np.asarray(probability)[rows].mean()),
            "share_malignant": float(np.asarray(truth_malignant)[rows].mean()),
        }
        for rows in (place == number for number in np.unique(place))
    ]
