"""Metrics of predictions, with `intervals`.

An undefined value (the AUC of one class, the recall of an absent one) is `None`, never nan.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from bcd import schema
from bcd.metrics import aggregate, bootstrap, calibration, decision, intervals
from bcd.taxonomy import MALIGNANT, SUBTYPES, TUMOR_CLASSES

# Units above the image, the smallest first.
LEVELS = (schema.SLIDE, schema.CASE, schema.PATIENT)


def unit(measured: Mapping[str, Any]) -> str:
    """What is counted in what `measure` found: an image, or one of several judgements of an image."""
    n = measured.get("n_judgements")
    return "image" if n is None or n == measured["n_images"] else "judgement"


def measure(
    images: pd.DataFrame, class_names: Sequence[str] = TUMOR_CLASSES, seed: int = 0
) -> dict[str, Any]:
    """All metrics of an image table, of one model or of several joined; finite and JSON-serialisable.

    Returns:
        `n_images` (distinct), `n_judgements` (more, if several models judged an image), `n_patients`,
        `patients_by_class` (a patient with images of both counts in both; `None` if an image has no patient),
        `interval`; as `with_intervals`: `pooled`, `by_magnification` ("40", ...; empty without
        magnifications), `by_site` and `by_level` ("slide", "case", "patient", if ids are known);
        `calibration` (`after` and `before` the temperature), `class_sets` (from `decision`),
        `recall_by_subtype`, `classification_report`, and `multiclass` for a model of subtypes, whose
        `class_names` are in the order of `probability`.
    """
    report: dict[str, Any] = {
        "n_images": int(images[schema.IMAGE_ID].nunique()),
        "n_judgements": len(images),
        "n_patients": _n_patients(images),
        "patients_by_class": patients_by_class(images),
        "interval": {
            "level": bootstrap.LEVEL,
            "method": intervals.METHOD,
            "n_resamples": bootstrap.N_RESAMPLES,
            "seed": seed,
        },
        "pooled": with_intervals(images, seed),
        "by_magnification": {
            str(int(magnification)): with_intervals(rows, seed)
            for magnification, rows in images.groupby(schema.MAGNIFICATION)
        },
        "by_site": {site: with_intervals(rows, seed) for site, rows in images.groupby(schema.SITE)},
        "by_level": {level: row for level in LEVELS if (row := _level(images, level, seed))},
        "calibration": _calibration(images, seed),
        "class_sets": decision.class_sets(images),
        "recall_by_subtype": _recall_by_subtype(images),
        "classification_report": classification_report(
            _malignant(images, schema.TUMOR_CLASS), _malignant(images, schema.PREDICTED_CLASS), TUMOR_CLASSES
        ),
    }
    if tuple(class_names) == tuple(SUBTYPES):
        report["multiclass"] = _multiclass(images, class_names)
    return report


def with_intervals(images: pd.DataFrame, seed: int = 0) -> dict[str, Any]:
    """`estimates` of an image table, 95 % `intervals`, and the number of patients behind each (`support`).

    Both are `None` if an image has no patient: the dependence between images is then unknown.
    """
    result = estimates(images)
    unknown = dict.fromkeys(bootstrap.INTERVALS)
    if not result["n_patients"]:
        return result | {"intervals": unknown, "support": unknown}
    counted = tally_images(images)
    support = {name: n for name, (n, _) in counted.support().items()}
    return result | {"intervals": intervals.intervals_of(counted, seed=seed), "support": support}


def estimates(images: pd.DataFrame) -> dict[str, Any]:
    """`binary` metrics of an image table, both recognition rates, and the number of patients.

    The numbers of patients are `None` if an image has no patient.
    """
    truth, probability, called = _columns(images)
    result = binary(truth, probability, called)
    result["image_recognition_rate"] = result["accuracy"]
    result["n_patients"] = _n_patients(images)
    result["patient_recognition_rate"] = None
    if result["n_patients"]:
        patient = images[schema.PATIENT].to_numpy(object)
        result["patient_recognition_rate"] = patient_recognition_rate(truth == called, patient)
    return result


def tally_images(images: pd.DataFrame) -> bootstrap.Tally:
    """`bootstrap.tally` of an image table whose patients are all known."""
    return bootstrap.tally(*_columns(images), images[schema.PATIENT].to_numpy(object))


def _level(images: pd.DataFrame, level: str, seed: int) -> dict[str, Any] | None:
    """`with_intervals` of slides, cases or patients; groups of both classes are excluded and counted."""
    groups = aggregate.groups_of_draws(images, level)
    known = groups[groups[schema.TUMOR_CLASS].notna()]
    if known.empty:
        return None
    if _n_patients(images) is not None:
        # A case of several patients is a unit of its own.
        known = known.assign(**{schema.PATIENT: known[schema.PATIENT].fillna(known[level])})
    return with_intervals(known, seed) | {"n_mixed": len(groups) - len(known)}


def _calibration(images: pd.DataFrame, seed: int) -> dict[str, Any]:
    """`_calibrated` after and, where those probabilities are known and others, before the temperature."""
    after, before = images[schema.PROBABILITY_MALIGNANT], images[aggregate.UNCALIBRATED]
    columns = {"after": after}
    if before.notna().all() and not np.allclose(after, before.astype(float), rtol=0, atol=1e-6):
        columns["before"] = before
    return {
        name: _calibrated(images.assign(**{schema.PROBABILITY_MALIGNANT: column}), seed)
        for name, column in columns.items()
    }


def _calibrated(images: pd.DataFrame, seed: int) -> dict[str, Any]:
    """Brier score, calibration error, cross-entropy, and the bins of the reliability diagram."""
    truth, patient = _malignant(images, schema.TUMOR_CLASS), images[schema.PATIENT].to_numpy(object)
    probability = images[schema.PROBABILITY_MALIGNANT].to_numpy(float)
    described = with_intervals(images, seed)
    return {
        "brier": described["brier"],
        "ece": described["ece"],
        "intervals": {name: described["intervals"][name] for name in ("brier", "ece")},
        "cross_entropy": calibration.cross_entropy(truth, aggregate.clipped_log_odds(probability)),
        "reliability": calibration.reliability_table(
            truth, probability, patient if _n_patients(images) else None
        ),
    }


def binary(
    truth_malignant: np.ndarray, probability_malignant: np.ndarray, called: np.ndarray
) -> dict[str, Any]:
    """Metrics of benign against malignant, from truth, probability and call of malignancy, (n,) each.

    Counts, rates, Brier score, expected calibration error (`ece`) and `confusion_matrix` [[tn, fp], [fn,
    tp]]; `balanced_accuracy` is the mean of sensitivity and specificity.
    """
    truth = np.asarray(truth_malignant, bool)
    matrix = _confusion_matrix(truth, called, 2)
    (tn, fp), (fn, tp) = matrix.tolist()
    sensitivity, specificity = _ratio(tp, fn + tp), _ratio(tn, tn + fp)
    # Not at the top: it takes two seconds, and a training worker does without it.
    from sklearn.metrics import roc_auc_score

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
        "brier": calibration.brier(truth, probability_malignant),
        "ece": calibration.expected_error(truth, probability_malignant),
        "confusion_matrix": matrix.tolist(),
    }


def multiclass(truth: np.ndarray, probability: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Metrics of several classes, from positions in `class_names`, int (n,), and probabilities (n, k).

    The most probable class is the prediction. `balanced_accuracy` is the mean recall of the classes that
    occur, as in scikit-learn; `confusion_matrix` has the truth in rows and the prediction in columns.
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
    """Precision, recall, f1 and support of each class, from positions in `class_names`, int or bool (n,)."""
    matrix = _confusion_matrix(truth, predicted, len(class_names))
    counts = (column.tolist() for column in (matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)))
    return {
        name: {
            "precision": _ratio(hits, called),
            "recall": _ratio(hits, support),
            "f1": _ratio(2 * hits, called + support),
            "support": support,
        }
        for name, hits, called, support in zip(class_names, *counts, strict=True)
    }


def patient_recognition_rate(correct: np.ndarray, patient: np.ndarray) -> float | None:
    """Mean over patients of the share of their images called correctly (Spanhol et al. 2016), from (n,)
    each."""
    shares = pd.Series(np.asarray(correct, float)).groupby(np.asarray(patient)).mean()
    return float(shares.mean()) if len(shares) else None


def _confusion_matrix(truth: np.ndarray, predicted: np.ndarray, k: int) -> np.ndarray:
    """Counts (k, k), truth in rows; not scikit-learn's, which rejects an empty input."""
    cells = np.asarray(truth, int) * k + np.asarray(predicted, int)
    return np.bincount(cells, minlength=k * k).reshape(k, k)


def _multiclass(images: pd.DataFrame, class_names: Sequence[str]) -> dict[str, Any]:
    """`multiclass` of the images whose subtype is known."""
    known = images[images[schema.SUBTYPE].notna()]
    truth = pd.Categorical(known[schema.SUBTYPE], categories=list(class_names)).codes
    return multiclass(truth, np.array(known[schema.PROBABILITY].tolist()), class_names)


def _recall_by_subtype(images: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Share of each subtype's images whose tumour class was called correctly."""
    by_code = {code: images[images[schema.SUBTYPE] == code] for code in SUBTYPES}
    return {
        code: {
            "n": len(rows),
            "n_patients": _n_patients(rows),
            "recall": float(rows[aggregate.CORRECT].mean()),
            "interval": _recall_interval(rows),
        }
        for code, rows in by_code.items()
        if len(rows)
    }


def _recall_interval(images: pd.DataFrame) -> list[float] | None:
    """`intervals.interval_of_rate` of the images that were called correctly."""
    by_patient = images.groupby(schema.PATIENT)[aggregate.CORRECT].agg(["sum", "size"])
    if not _n_patients(images):
        return None
    return intervals.interval_of_rate(by_patient["sum"].to_numpy(int), by_patient["size"].to_numpy(int))


def _columns(images: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Truth, probability and call of malignancy, (n,) each."""
    truth, called = _malignant(images, schema.TUMOR_CLASS), _malignant(images, schema.PREDICTED_CLASS)
    return truth, images[schema.PROBABILITY_MALIGNANT].to_numpy(float), called


def _malignant(images: pd.DataFrame, column: str) -> np.ndarray:
    return (images[column] == MALIGNANT).to_numpy(bool)


def patients_by_class(images: pd.DataFrame) -> dict[str, int] | None:
    """Number of patients with images of each class; `None` if an image has no patient."""
    if _n_patients(images) is None:
        return None
    counts = images.groupby(schema.TUMOR_CLASS)[schema.PATIENT].nunique()
    return {name: int(counts.get(name, 0)) for name in TUMOR_CLASSES}


def _n_patients(images: pd.DataFrame) -> int | None:
    patients = images[schema.PATIENT]
    return None if patients.isna().any() else int(patients.nunique())


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator else None
