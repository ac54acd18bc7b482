"""Studies with a planted truth: tables of predictions, and simulated patients whose figures are known."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.stats import norm
from threadpoolctl import threadpool_limits

from bcd import schema
from bcd.metrics import aggregate, bootstrap, measures
from bcd.taxonomy import SUBTYPES, TUMOR_CLASSES

# The matrices of a simulated study are small: on a busy machine threads would mostly wait for each other.
one_thread = threadpool_limits.wrap(limits=1)
BENIGN_PATIENTS, MALIGNANT_PATIENTS = 24, 58


def measured(
    predictions: pd.DataFrame,
    threshold: float = 0.5,
    class_names: Sequence[str] = TUMOR_CLASSES,
    seed: int = 0,
) -> dict[str, Any]:
    """All metrics of one model's predictions, as an evaluation puts them together."""
    images = aggregate.image_table(predictions, threshold)
    n_errors = len(predictions) - len(images)
    return measures.measure(images, class_names, seed) | {"threshold": threshold, "n_errors": n_errors}


def predictions(n_patients: int = 12, n_images: int = 20, spread: float = 1.0, seed: int = 0) -> pd.DataFrame:
    """Predictions in which the images of a patient share a shift of `spread` log-odds."""
    generator = np.random.default_rng(seed)
    codes = [list(SUBTYPES)[i % 8] for i in range(n_patients)]
    shift = generator.normal(0, spread, n_patients)
    rows = [
        {
            schema.IMAGE_ID: f"p{patient}/{image}",
            schema.PATIENT: f"p{patient}",
            schema.TUMOR_CLASS: SUBTYPES[code].tumor_class,
            schema.SUBTYPE: code,
            schema.MAGNIFICATION: (40, 100)[image % 2],
            schema.PROBABILITY_MALIGNANT: 1 / (1 + np.exp(-log_odds)),
            schema.ERROR: None,
        }
        for patient, code in enumerate(codes)
        for image in range(n_images)
        for sign in [1 if SUBTYPES[code].tumor_class == "malignant" else -1]
        for log_odds in [sign + shift[patient] + generator.normal()]
    ]
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Arrays:
    """What a table of predictions says, at a threshold: bool, float, bool and str (n,)."""

    truth: np.ndarray
    probability: np.ndarray
    called: np.ndarray
    patient: np.ndarray

    def tally(self, rows: np.ndarray | slice = slice(None)) -> bootstrap.Tally:
        """What a bootstrap needs of some of the rows."""
        return bootstrap.tally(
            self.truth[rows], self.probability[rows], self.called[rows], self.patient[rows]
        )


def arrays(frame: pd.DataFrame, threshold: float = 0.5) -> Arrays:
    """The columns of a table of predictions."""
    probability = frame[schema.PROBABILITY_MALIGNANT].to_numpy()
    truth = (frame[schema.TUMOR_CLASS] == "malignant").to_numpy()
    return Arrays(truth, probability, probability >= threshold, frame[schema.PATIENT].to_numpy())


@dataclass(frozen=True)
class Cohort:
    """One simulated study of 24 benign and 58 malignant patients with some 13 images each.

    The log-odds of an image is ± skill by its class, plus its patient's effect and its own, Gaussian both.
    """

    seed: int
    spread: float = 1.0

    @property
    def generator(self) -> np.random.Generator:
        """The same numbers each time: every model looks at the same patients."""
        return np.random.default_rng(self.seed)

    def truth_and_patient(self) -> tuple[np.ndarray, np.ndarray]:
        """Bool and int (n,)."""
        n = BENIGN_PATIENTS + MALIGNANT_PATIENTS
        patient = np.repeat(np.arange(n), 1 + self.generator.poisson(12, n))
        return patient >= BENIGN_PATIENTS, patient

    def log_odds(self, skill: float, model: int = 0) -> np.ndarray:
        """Of each image (n,); models share what a patient is like, not what they make of an image."""
        truth, patient = self.truth_and_patient()
        effect = np.random.default_rng([self.seed, 1]).normal(0, self.spread, patient.max() + 1)
        own = np.random.default_rng([self.seed, 2, model]).normal(0, 1, len(patient))
        return np.where(truth, skill, -skill) + effect[patient] + own

    def arrays(self, skill: float) -> Arrays:
        """One model's results, at threshold 0.5."""
        truth, patient = self.truth_and_patient()
        log_odds = self.log_odds(skill)
        return Arrays(truth, expit(log_odds), log_odds >= 0, patient)

    def images(self, skill: float, model: int = 0) -> pd.DataFrame:
        """One model's results as an image table."""
        truth, patient = self.truth_and_patient()
        columns = {
            schema.IMAGE_ID: np.arange(len(truth)),
            schema.PATIENT: patient,
            schema.TUMOR_CLASS: np.where(truth, "malignant", "benign"),
            schema.PROBABILITY_MALIGNANT: expit(self.log_odds(skill, model)),
            schema.ERROR: None,
        }
        return aggregate.image_table(pd.DataFrame(columns))


def planted(skill: float, spread: float = 1.0) -> dict[str, float]:
    """What the figures of `Cohort` would be with infinitely many patients."""
    deviation = np.hypot(spread, 1)
    right = float(norm.cdf(skill / deviation))
    # The log-odds of a malignant and a benign image differ by 2 · skill, with twice the variance.
    auc = float(norm.cdf(2 * skill / (np.sqrt(2) * deviation)))
    return {"accuracy": right, "balanced_accuracy": right, "auc": auc}
