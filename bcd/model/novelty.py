"""Novelty: the distance of an image's pooled features from those of the training images.

Root mean square of the features, each in standard deviations over the training set: a Mahalanobis distance
(Lee et al. 2018, arXiv 1807.03888) with a diagonal covariance, which a few hundred images suffice to estimate
for 2,048 features. About 1 for images like those of the training; beyond the 99th percentile of the
validation part there is a warning.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from bcd.metrics.drift.stain import StainStatistics

CUTOFF_PERCENTILE = 99
# A feature that is constant in training would make any change infinite: the smallest spread is this share of
# the mean spread.
SMALLEST_SPREAD = 0.01
CODE = "unlike_training_data"


class FeatureStatistics(BaseModel):
    """Statistics of the pooled features over the training images, each counted once."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    mean: tuple[float, ...]
    """One for each feature."""
    spread: tuple[Annotated[float, Field(gt=0)], ...]
    """Standard deviation of each feature, never zero."""
    cutoff: float = Field(ge=0)
    """Distance that 99 % of the validation images do not exceed."""
    n_training: int = Field(ge=1)
    n_validation: int = Field(ge=1)
    stain: StainStatistics | None = None
    """The stain of both, by patient, to find drift of an archive; None in bundles of older versions."""


def spread(n: int, total: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread of each feature, from the sums of features and squares, float64 (features,), of n
    images."""
    mean = total / n
    deviation = np.sqrt(np.maximum(squares / n - mean**2, 0))
    return mean, np.maximum(deviation, max(SMALLEST_SPREAD * deviation.mean(), np.finfo(np.float32).eps))


def distance(
    pooled: np.ndarray, mean: Sequence[float] | np.ndarray, deviation: Sequence[float] | np.ndarray
) -> np.ndarray:
    """Novelty, float32 (n,), of images with the pooled features (n, features)."""
    scaled = (pooled - np.asarray(mean)) / np.asarray(deviation)
    return np.sqrt((scaled**2).mean(1)).astype(np.float32)


def cutoff(distances: np.ndarray) -> float:
    """The distance beyond which there is a warning."""
    return float(np.percentile(distances, CUTOFF_PERCENTILE))


def warning_codes(found: float, limit: float | None) -> list[str]:
    """Codes of the warnings about an image at this distance, none without a cut-off.

    Both are compared as float32, as in the predictions table, so that a filter on its columns agrees.
    """
    return [CODE] if limit is not None and np.float32(found) > np.float32(limit) else []


def warning_text(found: float, limit: float) -> str:
    """The warning as a sentence."""
    return (
        f"This image does not resemble the training data (distance {found:.2f}; {CUTOFF_PERCENTILE} % of the "
        f"validation images are below {limit:.2f}): its result may be meaningless."
    )
