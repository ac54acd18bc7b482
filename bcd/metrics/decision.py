"""From a probability to a decision: the threshold, when to abstain, and sets of classes.

The threshold is chosen on validation, never on the test part, whose numbers would then be too good.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from bcd import schema
from bcd.metrics import aggregate

YOUDEN = "youden"
SENSITIVITY = "sensitivity"
PRIOR = "prior"
# Validation patients of each class from which a threshold and a temperature are chosen: see `is_choosable`.
MIN_CHOOSING = 4
# Share of images of other patients whose set has the true class. The sets of fewer patients have both classes
# always: those of n say nothing beyond n / (n + 1).
SET_LEVEL, MIN_CALIBRATING = 0.9, 9


def is_choosable(patients_by_class: Mapping[str, int] | None) -> bool:
    """Whether there are enough validation patients to choose a threshold and a temperature on.

    In simulated studies (`benchmarks/validation_choice.py`) one or two patients often choose a threshold far
    worse for others than the prior, and a temperature that harms nearly as often as it helps; the gain grows
    slowly, and `MIN_CHOOSING` is a compromise. Unknown patients (`None`) are taken to be enough.
    """
    return patients_by_class is None or min(patients_by_class.values()) >= MIN_CHOOSING


def choose_threshold(
    truth_malignant: np.ndarray,
    probability: np.ndarray,
    target_sensitivity: float | None = None,
    prior: float | None = None,
) -> dict[str, Any]:
    """Choose the operating point: the threshold, its rule, and what it reaches on these images.

    Args:
        truth_malignant: bool (n,), both classes present.
        probability: float (n,) of malignancy.
        target_sensitivity: smallest sensitivity, reached with as few false alarms as possible; by default
            Youden's index (sensitivity + specificity, Youden 1950) is maximised.
        prior: share of malignant images in training, which is then the threshold in place of a choice by
            Youden's index: it is where that index of a calibrated model is greatest.

    Returns:
        `threshold`, `rule`, `target_sensitivity`, `sensitivity`, `specificity`, `n_malignant`, `n_benign`.
        A target is met by the smallest number of malignant images that reaches it. The threshold is float32,
        as are the probabilities of the predictions table, and halfway between two neighbouring ones, so that
        neither rounding nor the precision of a comparison changes a call; it is 0.5 where that gives the same
        calls, and of equally good ones the nearest to 0.5.
    """
    truth, probability = np.asarray(truth_malignant, bool), np.asarray(probability, np.float32)
    left = prior is not None and target_sensitivity is None
    thresholds = np.array([prior], np.float32) if left else _thresholds(probability)
    below_malignant = np.searchsorted(np.sort(probability[truth]), thresholds, "left")
    below_benign = np.searchsorted(np.sort(probability[~truth]), thresholds, "left")
    n_malignant, n_benign = int(truth.sum()), int((~truth).sum())
    sensitivity, specificity = (n_malignant - below_malignant) / n_malignant, below_benign / n_benign
    if target_sensitivity is None:
        good = sensitivity + specificity
    else:
        # Of those that reach it, the highest: it calls the fewest of both classes malignant.
        good = np.where(sensitivity >= target_sensitivity, specificity - sensitivity, -np.inf)
    best = np.flatnonzero(np.isclose(good, good.max(), rtol=0, atol=1e-12))
    at = best[np.abs(thresholds[best] - 0.5).argmin()]
    return {
        "threshold": float(thresholds[at]),
        "rule": SENSITIVITY if target_sensitivity is not None else PRIOR if left else YOUDEN,
        "target_sensitivity": target_sensitivity,
        "sensitivity": float(sensitivity[at]),
        "specificity": float(specificity[at]),
        "n_malignant": n_malignant,
        "n_benign": n_benign,
    }


def _thresholds(probability: np.ndarray) -> np.ndarray:
    """Candidates (float32, rising): midway between neighbouring probabilities, and 0.5 unless it is one.

    The outermost call all images malignant, or, if no probability is 1, none.
    """
    seen = np.unique(probability)
    lower, upper = np.append(np.float32(0), seen), np.append(seen, np.float32(1))
    middle = (lower.astype(float) + upper) / 2
    # Two consecutive float32 numbers have none between them: the upper one separates them as well.
    separating = np.maximum(middle.astype(np.float32), np.nextafter(lower, upper))
    return np.unique(np.append(separating, np.setdiff1d(np.float32(0.5), seen)))


def abstention_curve(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of what the model keeps when it hands the least certain to a pathologist.

    The table has images or groups from `aggregate`; certainty is the distance of the margin from 0. Returns a
    row for each number of rows of known truth kept, the largest first: `handed_over` (share), `n_kept`,
    `accuracy`.
    """
    known = table[table[schema.TUMOR_CLASS].notna()]
    correct = (known[schema.TUMOR_CLASS] == known[schema.PREDICTED_CLASS]).to_numpy()
    surest_first = np.argsort(-known[aggregate.MARGIN].abs().to_numpy(), kind="stable")
    kept = np.arange(1, len(known) + 1)
    curve = pd.DataFrame({"handed_over": 1 - kept / max(1, len(known)), "n_kept": kept})
    curve["accuracy"] = np.cumsum(correct[surest_first]) / kept
    return curve.iloc[::-1].reset_index(drop=True)


def class_sets(images: pd.DataFrame) -> dict[str, Any] | None:
    """Sets of classes that have the true one of an image of a new patient with a probability of `SET_LEVEL`.

    A set has the predicted class, and both classes up to a cut-off from the threshold: the hierarchical
    conformal quantile over patients (Lee, Barber and Willett 2023), each of whom weighs as much as any other.
    It is valid for patients who chose nothing about the model, which validation patients did (decision 13).

    Returns:
        `level`, `n_patients`; `cutoff` in log-odds, for other patients; and of these images, each by the
        cut-off of all other patients: `both`, the share with both classes, and `coverage`, the mean over
        patients of the share whose set has the truth, also for the images of each class
        (`coverage_by_class`). All but the first two are `None` with at most `MIN_CALIBRATING` patients.
        `None` if an image has no patient.
    """
    if images[schema.PATIENT].isna().any():
        return None
    names, patient = np.unique(images[schema.PATIENT].to_numpy(str), return_inverse=True)
    found: dict[str, Any] = {"level": SET_LEVEL, "n_patients": len(names)}
    if len(names) <= MIN_CALIBRATING:
        return found | dict.fromkeys(("cutoff", "both", "coverage", "coverage_by_class"))
    distance = images[aggregate.MARGIN].abs().to_numpy()
    # How far the cut-off must reach for the set to have the truth.
    needed = np.where(images[aggregate.CORRECT].to_numpy(bool), 0.0, distance)
    weight = 1 / np.bincount(patient)[patient]
    others = [_cutoff(needed[kept], weight[kept]) for one in range(len(names)) for kept in [patient != one]]
    of_others = np.array(others)[patient]
    covered = pd.Series(needed <= of_others, dtype=float)
    by_class = covered.groupby([images[schema.TUMOR_CLASS].to_numpy(object), patient]).mean()
    return found | {
        "cutoff": _cutoff(needed, weight),
        "both": float((distance <= of_others).mean()),
        "coverage": float(covered.groupby(patient).mean().mean()),
        "coverage_by_class": {str(name): float(rows.mean()) for name, rows in by_class.groupby(level=0)},
    }


def _cutoff(needed: np.ndarray, weight: np.ndarray) -> float:
    """Smallest distance that suffices for a share `SET_LEVEL` by weight, of which each patient has 1, if one
    more patient had images for whom none does."""
    order = np.argsort(needed, kind="stable")
    reached = np.cumsum(weight[order]) >= SET_LEVEL * (weight.sum() + 1) - 1e-9
    return float(needed[order][reached.argmax()])
