"""From images to slides, cases and patients: what the model says about each of them as a whole.

The probability of a group is the logistic of the mean log-odds of its images: evidence adds up in log-odds,
and one undecided field (0.5) then pulls a group towards neither class.
"""

import numpy as np
import pandas as pd
import pyarrow as pa

from bcd import schema
from bcd.errors import DataError
from bcd.taxonomy import BENIGN, MALIGNANT

# Columns of the tables made here, beside those of `schema`.
N_IMAGES = "n_images"
CORRECT = "correct"
LOG_ODDS = "log_odds"
MARGIN = "margin"
UNCALIBRATED = "probability_uncalibrated"
# Where a row of a joined table comes from: which of several divisions into folds (each tests an image once at
# most), and the URI of its predictions table.
DRAW = "draw"
SOURCE = "source"
SHARE_CORRECT = "share_correct"

# What metrics and report need of a prediction and its truth; evidence maps stay behind.
COLUMNS = (
    schema.IMAGE_ID,
    schema.SLIDE,
    schema.CASE,
    schema.PATIENT,
    schema.TUMOR_CLASS,
    schema.SUBTYPE,
    schema.MAGNIFICATION,
    schema.PROBABILITY,
    schema.PROBABILITY_MALIGNANT,
    UNCALIBRATED,
    schema.NOVELTY,
    schema.NOVELTY_CUTOFF,
)
# A probability of exactly 0 or 1 is as sure as float32 can be, not infinitely sure.
CERTAINTY = float(np.finfo(np.float32).eps)


def image_table(predictions: pd.DataFrame | pa.Table, threshold: float = 0.5) -> pd.DataFrame:
    """The image level: one row per image that was scored, in the order given.

    Args:
        predictions: rows of the predictions table with the truth columns of the index.
        threshold: an image is called malignant from this probability on.

    Returns:
        `COLUMNS` (null where the input has no such column), `clipped_log_odds`, `margin` (log-odds above the
        threshold, below 0 for all that is called benign), `predicted_class` (benign or malignant, whatever
        the model's target) and `correct`. Rows with an `error` are left out. Tables of models with other
        thresholds may be joined: what follows goes by the margin.

    Raises:
        DataError: a row has neither an error nor a probability, or no truth.
    """
    frame = _frame(predictions)
    frame = frame[frame[schema.ERROR].isna()].drop(columns=schema.ERROR).reset_index(drop=True)
    for column in (schema.TUMOR_CLASS, schema.PROBABILITY_MALIGNANT):
        if frame[column].isna().any():
            image = frame.loc[frame[column].isna(), schema.IMAGE_ID].iloc[0]
            raise DataError(f"image {image!r} has no {column} and no error; it cannot be measured")
    probability = frame[schema.PROBABILITY_MALIGNANT].to_numpy(np.float64)
    called = probability >= threshold
    predicted = _tumor_class(called)
    # Beyond certainty both log-odds are the same, and a group of one image is still called as the image is.
    margin = clipped_log_odds(probability) - clipped_log_odds(np.array(threshold))
    margin = np.where(called, margin, np.minimum(margin, -CERTAINTY))
    return frame.assign(
        **{
            schema.PROBABILITY_MALIGNANT: probability,
            LOG_ODDS: clipped_log_odds(probability),
            MARGIN: margin,
            schema.PREDICTED_CLASS: predicted,
            CORRECT: predicted == frame[schema.TUMOR_CLASS].to_numpy(object),
        }
    )


def unscored(predictions: pd.DataFrame | pa.Table) -> pd.DataFrame:
    """The rows that `image_table` leaves out: `image_id` and `error`."""
    frame = _frame(predictions)[[schema.IMAGE_ID, schema.ERROR]]
    return frame[frame[schema.ERROR].notna()].reset_index(drop=True)


def groups(images: pd.DataFrame, level: str) -> pd.DataFrame:
    """One row per slide, case or patient.

    Args:
        images: from `image_table`. Images without an id at this level belong to no group.
        level: `schema.SLIDE`, `schema.CASE` or `schema.PATIENT`.

    Returns:
        Sorted by id: the id, `patient` and `tumor_class` (null where a group's images differ in it),
        `n_images`, `probability_malignant` (logistic of the mean log-odds), `margin` (mean of its images'),
        `share_correct` and `predicted_class` (malignant from a margin of 0 on).
    """
    owner = {} if level == schema.PATIENT else {schema.PATIENT: (schema.PATIENT, _unanimous)}
    grouped = images.groupby(level)
    table = grouped.agg(
        **owner,
        **{
            schema.TUMOR_CLASS: (schema.TUMOR_CLASS, _unanimous),
            N_IMAGES: (schema.IMAGE_ID, "size"),
            schema.PROBABILITY_MALIGNANT: (LOG_ODDS, "mean"),
            MARGIN: (MARGIN, "mean"),
            SHARE_CORRECT: (CORRECT, "mean"),
        },
    ).reset_index()
    probability = 1 / (1 + np.exp(-table[schema.PROBABILITY_MALIGNANT].to_numpy(np.float64)))
    return table.assign(
        **{
            schema.PROBABILITY_MALIGNANT: probability,
            schema.PREDICTED_CLASS: _tumor_class(table[MARGIN].to_numpy() >= 0),
        }
    )


def groups_of_draws(images: pd.DataFrame, level: str) -> pd.DataFrame:
    """`groups` of each draw of the folds for itself, one after the other: the mean over the models of several
    draws would be that of an ensemble which nobody has."""
    if DRAW not in images:
        return groups(images, level)
    return pd.concat([groups(rows, level) for _, rows in images.groupby(DRAW)], ignore_index=True)


def clipped_log_odds(probability: np.ndarray) -> np.ndarray:
    """Log-odds of probabilities, as sure as float32 can be at most."""
    inside = np.clip(probability, CERTAINTY, 1 - CERTAINTY)
    return np.log(inside / (1 - inside))


def _frame(predictions: pd.DataFrame | pa.Table) -> pd.DataFrame:
    wanted = [*COLUMNS, schema.ERROR]
    if isinstance(predictions, pa.Table):
        present = [name for name in wanted if name in predictions.column_names]
        predictions = predictions.select(present).to_pandas()
    return predictions.reindex(columns=wanted)


def _tumor_class(called: np.ndarray) -> np.ndarray:
    return np.where(called, MALIGNANT, BENIGN).astype(object)


def _unanimous(values: pd.Series) -> object:
    first = values.iloc[0]
    return first if (values == first).all() else None
