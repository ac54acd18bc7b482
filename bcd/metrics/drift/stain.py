"""Drift of the stain: whether the patients of an archive are stained unlike those of the training, in a test.

Hotelling's T² on the means of patients: four numbers each, of optical densities (`schema.STAIN`). Images of a
patient resemble each other, so a patient is one observation, however many images there are; where no patient
is known it is a slide, and where that is not known a file. It is Student's t test in four dimensions at once,
so that it also sees what is usual in each, and unusual together: more haematoxylin and less eosin.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field
from scipy.special import fdtrc

from bcd import schema
from bcd.text import counted, listed

# A test that finds drift in an archive without any is wrong in one of so many.
LEVEL = 0.01
# Fewer patients, together and of the archive, are too few to say. One or two are not Gaussian: of those that
# are unusual, up to one in 12 were taken for drift in the simulation.
FEWEST, FEWEST_OBSERVED = 12, 3
# Optical densities of patients differ by more than this where they are not copies of each other.
LEAST_SPREAD = 1e-4
# Kinds of observations, as their names begin.
PATIENT, SLIDE, FILE = "patient", "slide", "file"
Numbers = tuple[float, float, float, float]


class StainStatistics(BaseModel):
    """The stain of the training and validation images, by patient: the four numbers of `schema.STAIN`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    n_patients: int = Field(ge=2)
    """Patients; slides or files where these are not known."""
    mean: Numbers
    """Mean over the patients' means."""
    covariance: tuple[Numbers, Numbers, Numbers, Numbers]
    """Of the patients' means."""


def observation_of(patient: Any, slide: Any, image_id: str) -> str:
    """Whose observation an image is part of: its patient's, else its slide's, else its own."""
    named = {PATIENT: patient, SLIDE: slide, FILE: image_id}
    kind = next(kind for kind, name in named.items() if not pd.isna(name))
    return f"{kind} {named[kind]}"


def means(owners: Sequence[str], stains: np.ndarray) -> pd.DataFrame:
    """Mean of each owner, float64 (owners, 4), of images (n, 4); NaN, of images without tissue, left out."""
    frame = pd.DataFrame(np.asarray(stains, np.float64), columns=list(schema.STAIN))
    return frame.groupby(np.asarray(owners, object)).mean().dropna()


def statistics_of(owners: Sequence[str], stains: np.ndarray) -> StainStatistics | None:
    """Of the images (n, 4) of a training; None where fewer than two patients have tissue."""
    observed = means(owners, stains)
    if len(observed) < 2:
        return None
    facts = {"mean": observed.mean().tolist(), "covariance": np.cov(observed.to_numpy().T).tolist()}
    return StainStatistics.model_validate(facts | {"n_patients": len(observed)})


def measure_drift(
    owners: Sequence[str], stains: np.ndarray, training: StainStatistics | None
) -> dict[str, Any]:
    """Compare the images (n, 4) of an archive with those of the training.

    Returns:
        `p_value` and `statistic` (F, of `degrees`), None where they are not known; `is_found`, whether p is
        below `LEVEL`; `observed`, how many patients, slides and files; `n_training_patients`; `density` and
        `training_density`, means by stain, in the same order; and `sentence`.
    """
    observed = means(owners, stains)
    kinds = Counter(name.partition(" ")[0] for name in observed.index)
    found: dict[str, Any] = dict.fromkeys(("p_value", "statistic", "degrees", "density", "training_density"))
    found |= {"is_found": False, "observed": dict(kinds), "n_training_patients": None}
    if training is None:
        return found | {"sentence": "drift of the stain: not known, because the card has no stain statistics"}
    found["n_training_patients"] = training.n_patients
    seen = listed([counted(n, kind) for kind, n in kinds.items()]) or "nothing with tissue"
    beside = f"{seen}, beside {counted(training.n_patients, 'patient')} of the training"
    if len(observed) < FEWEST_OBSERVED or len(observed) + training.n_patients < FEWEST:
        return found | {"sentence": f"drift of the stain: {beside}: too few to say"}
    statistic, degrees = _hotelling(observed.to_numpy(), training)
    p_value = float(fdtrc(*degrees, statistic))
    found |= {"p_value": p_value, "statistic": statistic, "degrees": degrees, "is_found": p_value < LEVEL}
    found |= {"density": _densities(observed.mean()), "training_density": _densities(training.mean)}
    return found | {"sentence": _sentence(found, beside)}


def _hotelling(observed: np.ndarray, training: StainStatistics) -> tuple[float, tuple[int, int]]:
    """F and its degrees of freedom, for patients (n, 4) beside those of the training."""
    n, m, k = len(observed), training.n_patients, len(schema.STAIN)
    apart = observed - observed.mean(0)
    pooled = (apart.T @ apart + (m - 1) * np.array(training.covariance)) / (n + m - 2)
    pooled += LEAST_SPREAD**2 * np.eye(k)
    shift = observed.mean(0) - np.array(training.mean)
    squared = n * m / (n + m) * shift @ np.linalg.solve(pooled, shift)
    degrees = k, n + m - k - 1
    return float(squared * degrees[1] / ((n + m - 2) * k)), degrees


def _densities(values: Iterable[float]) -> list[float]:
    """Mean optical density of haematoxylin and of eosin."""
    hematoxylin, _, eosin, _ = map(float, values)
    return [hematoxylin, eosin]


def _sentence(found: dict[str, Any], beside: str) -> str:
    p_value = found["p_value"]
    tested = f"p {f'= {p_value:.2g}' if p_value >= 1e-4 else '< 0.0001'}; {beside}"
    if found["observed"].get(FILE):
        tested += "; files count as of different patients"
    if not found["is_found"]:
        return f"no drift of the stain was found ({tested})"
    pairs = zip(("haematoxylin", "eosin"), found["density"], found["training_density"], strict=True)
    densities = [f"{stain} {here:.3f} ({there:.3f})" for stain, here, there in pairs]
    return (
        f"this archive is stained unlike the training data ({tested}): mean optical density of "
        f"{' and of '.join(densities)}, the training's in brackets; results may be worse than the card states"
    )
