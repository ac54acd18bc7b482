"""How unlike the training pictures a picture is: the distance of its pooled features from theirs.

Each of the network's features is measured in standard deviations over the training set, and the distance is
their root mean square: a Mahalanobis distance (Lee et al. 2018, arXiv 1807.03888) with a diagonal covariance,
which 2,048 features of a few hundred pictures still allow. About 1 for pictures like those of the training;
a picture beyond the 99th percentile of the validation part is warned of.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

CUTOFF_PERCENTILE = 99
# Features that never move in training would make any change infinite: no spread counts as smaller than this
# share of the mean spread.
SMALLEST_SPREAD = 0.01
CODE = "unlike_training_data"


class FeatureStatistics(BaseModel):
    """Of the pooled features over the training pictures, each counted once."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    mean: tuple[float, ...]
    """One for each feature."""
    spread: tuple[Annotated[float, Field(gt=0)], ...]
    """Standard deviation of each feature, never zero."""
    cutoff: float = Field(ge=0)
    """Distance that 99 % of the validation pictures stay within."""
    n_training: int = Field(ge=1)
    n_validation: int = Field(ge=1)


def spread(n: int, total: np.ndarray, squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and spread of each feature from sums over n pictures.

    Args:
        n: pictures.
        total: float64 (features,), the sum of the features.
        squares: float64 (features,), the sum of their squares.
    """
    mean = total / n
    deviation = np.sqrt(np.maximum(squares / n - mean**2, 0))
    return mean, np.maximum(deviation, max(SMALLEST_SPREAD * deviation.mean(), np.finfo(np.float32).eps))


def distance(pooled: np.ndarray, mean: Sequence[float], deviation: Sequence[float]) -> np.ndarray:
    """Distance of each picture.

    Args:
        pooled: (n, features) from `bcd.model.resnet.Output`.
        mean: of each feature.
        deviation: of each feature.

    Returns:
        float32 (n,), in units of the training spread.
    """
    scaled = (pooled - np.asarray(mean)) / np.asarray(deviation)
    return np.sqrt((scaled**2).mean(1)).astype(np.float32)


def cutoff(distances: np.ndarray) -> float:
    """The distance from which a picture is warned of."""
    return float(np.percentile(distances, CUTOFF_PERCENTILE))


def warning_codes(found: float, limit: float | None) -> list[str]:
    """Codes of the warnings about a picture at this distance, none without a cut-off.

    Compared as float32, as both stand in the predictions table: who filters by its columns finds the same.
    """
    return [CODE] if limit is not None and np.float32(found) > np.float32(limit) else []


def warning_text(found: float, limit: float) -> str:
    """The warning for people."""
    return (
        f"This picture does not look like the training data (distance {found:.2f}; {CUTOFF_PERCENTILE} % of "
        f"the validation pictures stay below {limit:.2f}): its result may mean nothing."
    )
