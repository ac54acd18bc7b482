"""From how many validation patients a threshold and a temperature are better chosen than left as they are.

    python -m benchmarks.validation_choice [--studies 40]

A network's log-odds are the honest ones of a Gaussian model (a random effect of each patient, of ten images)
times a temperature, exp(N(0.3, 0.5)), plus a bias of a given standard deviation, which the patients have in
common. On simulated validation patients a threshold is chosen by Youden's index, and a temperature is fitted.
Prints the balanced accuracy of both thresholds and the cross-entropy of both temperatures for other patients
of the same model, and in how many studies the choice is clearly worse or better: by 5 points, by 0.01.
"""

import argparse
import itertools
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from bcd.metrics import calibration, decision

PATIENTS, WITHIN, SKILLS, BIASES = (1, 2, 3, 4, 6, 10, 20), (0.2, 0.5), (1.0, 1.7), (0.0, 0.5, 0.7, 1.0, 2.0)
N_IMAGES, N_OTHERS = 10, 5000
# The bias that temperatures are fitted with, and the smallest distance of a threshold from 0 and 1.
FITTED_WITH, EDGE = 0.5, 1e-6


def validation(
    n_patients: int, skill: float, within: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Truth and score of each image of so many patients of each class."""
    truth = np.repeat(np.arange(2 * n_patients) >= n_patients, N_IMAGES)
    effect = np.repeat(generator.normal(0, np.sqrt(within), 2 * n_patients), N_IMAGES)
    own = generator.normal(0, np.sqrt(1 - within), len(truth))
    return truth, np.where(truth, skill, -skill) + effect + own


def study(
    n_patients: int, skill: float, others: tuple[np.ndarray, np.ndarray], within: float, generator: Any
) -> list[dict[str, Any]]:
    """A choice for each bias, and what it is worth."""
    temperature, standard = np.exp(generator.normal(0.3, 0.5)), generator.normal()
    truth, score = validation(n_patients, skill, within, generator)
    rows = []
    for bias in BIASES:

        def log_odds(values: np.ndarray, shift: float = bias * standard) -> np.ndarray:
            return np.clip(temperature * (2 * skill * values + shift), -30, 30)

        def balanced_accuracy(threshold: float, shift: float = bias * standard) -> float:
            inside = np.clip(threshold, EDGE, 1 - EDGE)
            at = (np.log(inside / (1 - inside)) / temperature - shift) / (2 * skill)
            return float(norm.cdf(skill - at) + norm.cdf(skill + at)) / 2

        chosen = decision.choose_threshold(truth, 1 / (1 + np.exp(-log_odds(score))))["threshold"]
        row = {"within": within, "patients": n_patients, "bias": bias}
        row |= {"chosen": balanced_accuracy(chosen), "prior": balanced_accuracy(0.5)}
        if bias == FITTED_WITH:
            odds = log_odds(others[1])
            logit = np.stack([-log_odds(score) / 2, log_odds(score) / 2], 1)
            fitted = calibration.fit_temperature(logit, truth.astype(int))
            row["fitted"] = calibration.cross_entropy(others[0], odds / fitted)
            row["as it is"] = calibration.cross_entropy(others[0], odds)
        rows.append(row)
    return rows


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=40)
    n_studies = parser.parse_args().studies
    generator, rows = np.random.Generator(np.random.PCG64(0)), []
    for within, skill in itertools.product(WITHIN, SKILLS):
        others = validation(N_OTHERS, skill, within, generator)
        for n_patients, _ in itertools.product(PATIENTS, range(n_studies)):
            rows += study(n_patients, skill, others, within, generator)
    found = pd.DataFrame(rows)
    for key, first, second, sign, clearly in (
        ("bias", "chosen", "prior", 1, 0.05),
        ("within", "fitted", "as it is", -1, 0.01),
    ):
        known = found.dropna(subset=[first])
        gain = sign * (known[first] - known[second])
        known = known.assign(worse=gain < -clearly, better=gain > clearly)
        print(
            known.groupby([key, "patients"])[[first, second, "worse", "better"]].mean().round(3).to_string()
        )


if __name__ == "__main__":
    main()
