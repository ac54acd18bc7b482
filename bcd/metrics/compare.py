"""Paired test between two models on the same images of the same patients.

Overlapping intervals do not show that two models are equal, as both may fail on the same hard patients.
Resampling patients for both models at once cancels what they share. The interval is difference ± t · s on the
plain scale, where s is the standard deviation of the difference over the resamples and t is Student's, with
the degrees of freedom of `bootstrap`.
"""

from typing import Any

import numpy as np
import pandas as pd

from bcd import schema
from bcd.errors import DataError
from bcd.metrics import bootstrap, measures
from bcd.text import counted, some

METHOD = "paired bootstrap over patients, Student's t"
# The calibration error has no test: it is biased upwards, the more the fewer the images.
METRICS = tuple(name for name in bootstrap.INTERVALS if name != "ece")


def paired(
    first: pd.DataFrame, second: pd.DataFrame, seed: int = 0, n_resamples: int = bootstrap.N_RESAMPLES
) -> dict[str, Any]:
    """Two-sided paired test between two models.

    Args:
        first: from `aggregate.image_table`, rows in any order; an image may occur several times (repeated
            cross-validation), then equally often in the second.
        second: the same images by the other model.
        seed: of the bootstrap.
        n_resamples: of the bootstrap.

    Returns:
        `n_images` (distinct), `n_patients` (`None` if an image has no patient), `interval` (`level`,
        `method`, `n_resamples`, `seed`) and `metrics`: for each of `METRICS` the values `first` and `second`,
        their `difference` (first minus second), its `interval` [low, high] within -1 to 1, and `p_value`.
        Values are `None` where undefined; interval and p also where `bootstrap.deviation` is, as between a
        model and itself.

    Raises `DataError` if the images are not the same, or differ in patient or class.
    """
    first, second = _ordered(first), _ordered(second)
    _check(first, second)
    estimates = measures.estimates(first), measures.estimates(second)
    spreads = _spreads(first, second, seed, n_resamples) if estimates[0]["n_patients"] else {}
    return {
        "n_images": int(first[schema.IMAGE_ID].nunique()),
        "n_patients": estimates[0]["n_patients"],
        "interval": {"level": bootstrap.LEVEL, "method": METHOD, "n_resamples": n_resamples, "seed": seed},
        "metrics": {
            name: _compared(estimates[0][name], estimates[1][name], *spreads.get(name, (None, 0)))
            for name in METRICS
        },
    }


def _ordered(images: pd.DataFrame) -> pd.DataFrame:
    """Rows by id and probability, so that sums do not depend on the order given."""
    return images.sort_values([schema.IMAGE_ID, schema.PROBABILITY_MALIGNANT], ignore_index=True)


def _check(first: pd.DataFrame, second: pd.DataFrame) -> None:
    """Raise `DataError` unless both ordered tables have the same images of the same patients and classes."""
    one, other = (table[schema.IMAGE_ID].value_counts() for table in (first, second))
    more = one.sub(other, fill_value=0)
    lacking = {"second": more.index[more > 0], "first": more.index[more < 0]}
    if faults := [
        f"the {name} lacks {len(ids):,} ({some(sorted(set(ids)))})"
        for name, ids in lacking.items()
        if len(ids)
    ]:
        raise DataError(
            f"two models are compared on the same images, each as often by both: {' and '.join(faults)}; "
            "evaluate both models on the same split, or leave out the images that one could not score"
        )
    for column in (schema.TUMOR_CLASS, schema.PATIENT):
        one, other = first[column], second[column]
        differ = (one != other) & ~(one.isna() & other.isna())
        if differ.any():
            n, names = counted(differ.sum(), "image"), some(sorted(set(first.loc[differ, schema.IMAGE_ID])))
            raise DataError(
                f"two models are compared on the same patients: the {column} of {n} differs ({names}); "
                "evaluate both with the same index"
            )


def _spreads(
    first: pd.DataFrame, second: pd.DataFrame, seed: int, n_resamples: int
) -> dict[str, tuple[float | None, int]]:
    """Standard deviation of the difference of each metric, and the degrees of freedom."""
    one, other = measures.tally_images(first), measures.tally_images(second)
    differences = bootstrap.resampled_differences(one, other, n_resamples, seed)
    patients = {name: n for name, (n, _) in one.support().items()}
    return {
        name: (bootstrap.deviation(differences[name], patients[name]), patients[name] - 1) for name in METRICS
    }


def _compared(
    first: float | None, second: float | None, spread: float | None, degrees: int
) -> dict[str, Any]:
    # Not at the top: see `bootstrap`.
    from scipy.stats import t as student

    difference = None if first is None or second is None else first - second
    interval = p_value = None
    if difference is not None and spread is not None:
        reach = bootstrap.quantile(degrees) * spread
        interval = np.clip([difference - reach, difference + reach], -1, 1).tolist()
        p_value = float(2 * student.sf(abs(difference) / spread, degrees))
    compared = {"first": first, "second": second, "difference": difference}
    return compared | {"interval": interval, "p_value": p_value}
