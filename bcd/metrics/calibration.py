"""Whether a probability means what it says, and the temperature that makes it so.

A temperature T divides the logits: T > 1 makes an overconfident model modest and never changes which class is
likelier (Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv 1706.04599). It is fitted on
validation only.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp, softmax

from bcd.metrics import bootstrap
from bcd.taxonomy import malignant_mask

# Far beyond what networks need; a fit that ends here has found nothing to fit.
BOUNDS = (0.05, 20.0)
# Standard deviation of the logarithm of the temperature before anything is seen: nineteen in twenty are taken
# to lie between 0.37 and 2.7.
PRIOR = 0.5


def fit_temperature(logit: np.ndarray, target: np.ndarray) -> float:
    """The most probable temperature: least cross-entropy, unless there is too little to tell.

    A few images that are told apart without an error would ask for certainty beyond measure, and one error
    among them for hardly any. So a temperature near 1 is taken as likelier beforehand, by a normal prior on
    its logarithm, which counts less the more images there are.

    Args:
        logit: float (n, classes), before any temperature.
        target: int (n,), positions of the true classes.
    """
    scores, rows = np.asarray(logit, np.float64), np.arange(len(target))

    def surprise(log_temperature: float) -> float:
        log_probability = log_softmax(scores / np.exp(log_temperature), axis=1)
        return float((log_temperature / PRIOR) ** 2 / 2 - log_probability[rows, target].sum())

    found = minimize_scalar(surprise, bounds=np.log(BOUNDS), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def probability_malignant(
    logit: np.ndarray, class_names: Sequence[str], temperature: float = 1.0
) -> np.ndarray:
    """Probability of malignancy (n,) from logits (n, classes); of subtypes the malignant ones are summed."""
    malignant = np.array(malignant_mask(tuple(class_names)))
    return softmax(np.asarray(logit, np.float64) / temperature, axis=1)[:, malignant].sum(axis=1)


def log_odds(logit: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    """Log-odds of malignancy (n,) from logits (n, classes).

    Of two classes it is the difference of their logits, and the evidence map's mean plus bias.
    """
    malignant = np.array(malignant_mask(tuple(class_names)))
    scores = np.asarray(logit, np.float64)
    benign_sum, malignant_sum = (np.logaddexp.reduce(scores[:, part], 1) for part in (~malignant, malignant))
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
    """Expected calibration error: the mean gap between probability and share of malignant images over the
    bins of `reliability_table`, weighted by their images; `None` without images."""
    rows = reliability_table(truth_malignant, probability)
    n = sum(row["n"] for row in rows)
    gaps = sum(row["n"] * abs(row["stated"] - row["share_malignant"]) for row in rows)
    return gaps / n if n else None


def reliability_table(truth_malignant: np.ndarray, probability: np.ndarray) -> list[dict[str, Any]]:
    """The reliability diagram as a table: `n`, `stated` (mean) and `share_malignant` of each bin in use.

    Args:
        truth_malignant: bool (n,).
        probability: float (n,) of malignancy.
    """
    place = bootstrap.bins(probability)
    inside = [place == number for number in np.unique(place)]
    return [
        {
            "n": int(rows.sum()),
            "stated": float(np.asarray(probability)[rows].mean()),
            "share_malignant": float(np.asarray(truth_malignant)[rows].mean()),
        }
        for rows in inside
    ]
