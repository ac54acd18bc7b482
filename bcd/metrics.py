"""How good predictions are, and how sure one may be of it.

A value that is undefined (the AUC of one class, the recall of an absent one) is `None`: never nan, never a
guess. Intervals resample patients, not images: fields of one patient resemble each other, so a thousand
images of ten patients know little more than ten patients do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from sklearn.metrics import roc_auc_score

from bcd import aggregate, schema
from bcd.taxonomy import MALIGNANT, SUBTYPES, TUMOR_CLASSES

INTERVAL_LEVEL = 0.95
N_RESAMPLES = 1000
# The metrics that get one.
INTERVALS = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "auc", "patient_recognition_rate")
# A resample without patients of one class has no AUC. Two patients of a class are missing from at most
# 14 % of the resamples, a single one from at least 25 %: beyond this there is no interval.
MAX_UNDEFINED = 0.2


def evaluate(
    predictions: pd.DataFrame | pa.Table,
    threshold: float = 0.5,
    class_names: Sequence[str] = TUMOR_CLASSES,
    protocol: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that `metrics.json` holds; finite and JSON-serialisable.

    Args:
        predictions: rows of the predictions table with the truth columns of the index.
        threshold: an image is called malignant from this probability on.
        class_names: the model's classes in the order of `probability`.
        protocol: facts about the split and the run, passed through.
        seed: of the bootstrap.

    Returns:
        `pooled` and `by_magnification` ("40", ...; empty without magnifications) as `describe` gives
        them, `recall_by_subtype`, `classification_report`, `multiclass` (for a model of subtypes),
        and the counts, where `n_images` leaves out the `n_errors` rows that could not be scored.

    Raises:
        DataError: a row has neither an error nor a probability, or no truth.
    """
    images = aggregate.images(predictions, threshold)
    report: dict[str, Any] = {
        "n_images": len(images),
        "n_patients": _n_patients(images),
        "n_errors": len(predictions) - len(images),
        "threshold": threshold,
        "interval": {
            "level": INTERVAL_LEVEL,
            "method": "percentile bootstrap over patients",
            "n_resamples": N_RESAMPLES,
            "seed": seed,
        },
        "protocol": dict(protocol or {}),
        "pooled": describe(images, threshold, seed),
        "by_magnification": {
            str(int(magnification)): describe(rows, threshold, seed)
            for magnification, rows in images.groupby(schema.MAGNIFICATION)
        },
        "recall_by_subtype": _recall_by_subtype(images),
        "classification_report": classification_report(
            _malignant(images, schema.TUMOR_CLASS), _malignant(images, schema.PREDICTED_CLASS), TUMOR_CLASSES
        ),
    }
    if tuple(class_names) != TUMOR_CLASSES:
        report["multiclass"] = _multiclass(images, class_names)
    return report


def describe(images: pd.DataFrame, threshold: float = 0.5, seed: int = 0) -> dict[str, Any]:
    """`binary` metrics of an image table, the two recognition rates, and 95 % intervals.

    Patient figures are `None` where an image has no patient: nobody knows how the images depend on each
    other then.

    Args:
        images: from `aggregate.images`.
        threshold: as given to it.
        seed: of the bootstrap.
    """
    truth = _malignant(images, schema.TUMOR_CLASS)
    probability = images[schema.PROBABILITY_MALIGNANT].to_numpy()
    result = binary(truth, probability, threshold)
    result["image_recognition_rate"] = result["accuracy"]
    result["n_patients"] = _n_patients(images)
    result["patient_recognition_rate"] = None
    result["intervals"] = dict.fromkeys(INTERVALS)
    if result["n_patients"]:
        patient = images[schema.PATIENT].to_numpy(object)
        correct = images[aggregate.CORRECT].to_numpy(bool)
        result["patient_recognition_rate"] = patient_recognition_rate(correct, patient)
        result["intervals"] = intervals(truth, probability, patient, threshold, seed=seed)
    return result


def binary(
    truth_malignant: np.ndarray, probability_malignant: np.ndarray, threshold: float = 0.5
) -> dict[str, Any]:
    """Benign or malignant.

    Args:
        truth_malignant: bool (n,).
        probability_malignant: float (n,).
        threshold: malignant from this probability on.

    Returns:
        Counts, rates and `confusion_matrix` [[tn, fp], [fn, tp]]: rows are the truth, columns the
        prediction, both benign then malignant. `balanced_accuracy` is the mean of sensitivity and
        specificity.
    """
    truth = np.asarray(truth_malignant, bool)
    matrix = _confusion_matrix(truth, np.asarray(probability_malignant) >= threshold, 2)
    (tn, fp), (fn, tp) = matrix.tolist()
    sensitivity, specificity = _ratio(tp, fn + tp), _ratio(tn, tn + fp)
    balanced_accuracy = auc = None
    if sensitivity is not None and specificity is not None:
        balanced_accuracy = (sensitivity + specificity) / 2
        auc = float(roc_auc_score(truth, probability_malignant))
    return {
        "n": len(truth),
        "n_benign": tn + fp,
        "n_malignant": fn + tp,
        "accuracy": _ratio(tn + tp, len(truth)),
        "balanced_accuracy": balanced_accuracy,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "auc": auc,
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "confusion_matrix": matrix.tolist(),
    }


def multiclass(truth: np.ndarray, probability: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """One of several classes; the most probable one is the prediction.

    Args:
        truth: int (n,), positions in `class_names`.
        probability: float (n, k).
        class_names: k names.

    Returns:
        `balanced_accuracy` is the mean recall of the classes that occur, as in scikit-learn;
        `confusion_matrix` has the truth in rows and the prediction in columns, in the order given.
    """
    predicted = np.asarray(probability).reshape(-1, len(class_names)).argmax(axis=1)
    matrix = _confusion_matrix(truth, predicted, len(class_names))
    per_class = classification_report(truth, predicted, class_names)
    recalls = [row["recall"] for row in per_class.values() if row["support"]]
    return {
        "n": len(predicted),
        "class_names": list(class_names),
        "accuracy": _ratio(int(matrix.trace()), len(predicted)),
        "balanced_accuracy": _ratio(sum(recalls), len(recalls)),
        "per_class": per_class,
        "confusion_matrix": matrix.tolist(),
    }


def classification_report(
    truth: np.ndarray, predicted: np.ndarray, class_names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Precision, recall, f1 and support of each class.

    Args:
        truth: int or bool (n,), positions in `class_names`.
        predicted: the same.
        class_names: k names.
    """
    matrix = _confusion_matrix(truth, predicted, len(class_names))
    rows = zip(
        class_names, matrix.diagonal().tolist(), matrix.sum(0).tolist(), matrix.sum(1).tolist(), strict=True
    )
    return {
        name: {
            "precision": _ratio(hits, called),
            "recall": _ratio(hits, support),
            "f1": _ratio(2 * hits, called + support),
            "support": support,
        }
        for name, hits, called, support in rows
    }


def patient_recognition_rate(correct: np.ndarray, patient: np.ndarray) -> float | None:
    """Mean over patients of the share of their images classified correctly (Spanhol et al. 2016).

    Args:
        correct: bool (n,).
        patient: id of each image's patient (n,).
    """
    shares = pd.Series(np.asarray(correct, float)).groupby(np.asarray(patient)).mean()
    return float(shares.mean()) if len(shares) else None


def intervals(
    truth_malignant: np.ndarray,
    probability_malignant: np.ndarray,
    patient: np.ndarray,
    threshold: float = 0.5,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> dict[str, list[float] | None]:
    """95 % percentile intervals by a bootstrap over patients.

    Args:
        truth_malignant: bool (n,).
        probability_malignant: float (n,).
        patient: id of each image's patient (n,).
        threshold: malignant from this probability on.
        n_resamples: how often patients are drawn with replacement.
        seed: of numpy's PCG64.

    Returns:
        For each of `INTERVALS` [low, high], or `None` with fewer than two patients (of a class, where
        the metric is about one), and where all resamples agree: a sample without a single error does not
        tell how rare errors are, and [1, 1] would claim to know.
    """
    tally = _tally(truth_malignant, probability_malignant, patient, threshold)
    n_patients = len(tally.malignant)
    if n_patients < 2:
        return dict.fromkeys(INTERVALS)
    generator = np.random.Generator(np.random.PCG64(seed))
    drawn = generator.multinomial(n_patients, np.full(n_patients, 1 / n_patients), size=n_resamples)
    return {name: _interval(values) for name, values in tally.metrics(drawn).items()}


@dataclass(frozen=True)
class _Tally:
    """What a bootstrap over p patients needs of their images: counts (p,), and `wins` (p, p).

    `wins[i, j]` counts the pairs of a malignant image of patient i and a benign one of patient j that are
    ranked rightly, a tie as one half; its sum over all pairs is the AUC.
    """

    malignant: np.ndarray
    benign: np.ndarray
    true_positive: np.ndarray
    true_negative: np.ndarray
    wins: np.ndarray

    def metrics(self, drawn: np.ndarray) -> dict[str, np.ndarray]:
        """Each metric (r,) when patients count as often as they were `drawn` (r, p); nan if undefined."""
        malignant, benign = drawn @ self.malignant, drawn @ self.benign
        correct, images = self.true_positive + self.true_negative, self.malignant + self.benign
        sensitivity = _ratios(drawn @ self.true_positive, malignant)
        specificity = _ratios(drawn @ self.true_negative, benign)
        return {
            "accuracy": _ratios(drawn @ correct, drawn @ images),
            "balanced_accuracy": (sensitivity + specificity) / 2,
            "sensitivity": sensitivity,
            "specificity": specificity,
            "auc": _ratios(((drawn @ self.wins) * drawn).sum(axis=1), malignant * benign),
            "patient_recognition_rate": _ratios(drawn @ (correct / images), drawn.sum(axis=1)),
        }


def _tally(
    truth_malignant: np.ndarray, probability_malignant: np.ndarray, patient: np.ndarray, threshold: float
) -> _Tally:
    truth, probability = np.asarray(truth_malignant, bool), np.asarray(probability_malignant, float)
    owner, ids = pd.factorize(np.asarray(patient, object))

    def count(rows: np.ndarray) -> np.ndarray:
        return np.bincount(owner[rows], minlength=len(ids))

    called = probability >= threshold
    wins = [
        np.bincount(owner[truth], _ranks(probability[truth], probability[~truth & (owner == j)]), len(ids))
        for j in range(len(ids))
    ]
    return _Tally(
        malignant=count(truth),
        benign=count(~truth),
        true_positive=count(truth & called),
        true_negative=count(~truth & ~called),
        wins=np.stack(wins, axis=1) if wins else np.zeros((0, 0)),
    )


def _ranks(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How many of `others` each value exceeds, a tie as one half."""
    others = np.sort(others)
    return (np.searchsorted(others, values, "left") + np.searchsorted(others, values, "right")) / 2


def _interval(values: np.ndarray) -> list[float] | None:
    defined = values[~np.isnan(values)]
    if len(defined) < (1 - MAX_UNDEFINED) * len(values):
        return None
    tail = 50 * (1 - INTERVAL_LEVEL)
    low, high = np.percentile(defined, [tail, 100 - tail]).tolist()
    return [low, high] if low < high else None


def _confusion_matrix(truth: np.ndarray, predicted: np.ndarray, k: int) -> np.ndarray:
    """Counts (k, k), truth in rows; own code, as scikit-learn refuses no images at all."""
    cells = np.asarray(truth, int) * k + np.asarray(predicted, int)
    return np.bincount(cells, minlength=k * k).reshape(k, k)


def _multiclass(images: pd.DataFrame, class_names: Sequence[str]) -> dict[str, Any]:
    """`multiclass` over the images whose subtype is known."""
    known = images[images[schema.SUBTYPE].notna()]
    truth = pd.Categorical(known[schema.SUBTYPE], categories=list(class_names)).codes
    return multiclass(truth, np.array(known[schema.PROBABILITY].tolist()), class_names)


def _recall_by_subtype(images: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Share of each subtype's images whose tumour class was recognised."""
    rows = {code: images[images[schema.SUBTYPE] == code] for code in SUBTYPES}
    return {
        code: {"n": len(of), "n_patients": _n_patients(of), "recall": float(of[aggregate.CORRECT].mean())}
        for code, of in rows.items()
        if len(of)
    }


def _malignant(images: pd.DataFrame, column: str) -> np.ndarray:
    return (images[column] == MALIGNANT).to_numpy(bool)


def _n_patients(images: pd.DataFrame) -> int | None:
    patients = images[schema.PATIENT]
    return None if patients.isna().any() else int(patients.nunique())


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None


def _ratios(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    undefined = np.full(len(numerator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=denominator > 0)
