"""Aggregate predictions of images over slides, cases and patients.

The probability of a group is the logistic of the mean log-odds of its images: evidence adds up in log-odds,
and an undecided field (0.5) then pulls a group towards neither class.
"""

import numpy as np
import pandas as pd
import pyarrow as pa

from bcd import schema
from bcd.errors import DataError
from bcd.taxonomy import BENIGN, MALIGNANT

# Columns of the tables made here, beside those of `schema`.
N_IMAGES, CORRECT, SHARE_CORRECT = "n_images", "correct", "share_correct"
LOG_ODDS, MARGIN, UNCALIBRATED = "log_odds", "margin", "probability_uncalibrated"
# Origin of a row of a joined table: the repeat of the cross-validation (each tests an image at most once),
# and the URI of its predictions table.
DRAW, SOURCE = "draw", "source"

# What metrics and report need of a prediction and its truth, without the evidence maps.
COLUMNS = (
    *(schema.IMAGE_ID, schema.SLIDE, schema.CASE, schema.PATIENT),
    *(schema.TUMOR_CLASS, schema.SUBTYPE, schema.MAGNIFICATION, schema.SITE),
    *(schema.PROBABILITY, schema.PROBABILITY_MALIGNANT, UNCALIBRATED),
    *(schema.NOVELTY, schema.NOVELTY_CUTOFF),
)
# A probability of exactly 0 or 1 is as certain as float32 can be, not infinitely certain.
CERTAINTY = float(np.finfo(np.float32).eps)


def image_table(predictions: pd.DataFrame | pa.Table, threshold: float = 0.5) -> pd.DataFrame:
    """One row per scored image, in the order given; rows with an `error` are dropped.

    Args:
        predictions: rows of the predictions table with the truth columns of the index.
        threshold: smallest probability that is called malignant.

    Returns:
        `COLUMNS` (null where the input has none), `log_odds`, `margin` (log-odds above the threshold,
        negative for every benign call), `predicted_class` (benign or malignant, for any target) and
        `correct`. Tables of models with different thresholds may be joined: groups are called by the margin.

    Raises `DataError` if a row has neither an error nor a probability, or no truth.
    """
    frame = _frame(predictions)
    frame = frame[frame[schema.ERROR].isna()].drop(columns=schema.ERROR).reset_index(drop=True)
    for column in (schema.TUMOR_CLASS, schema.PROBABILITY_MALIGNANT):
        if frame[column].isna().any():
            image = frame.loc[frame[column].isna(), schema.IMAGE_ID].iloc[0]
            raise DataError(f"image {image!r} has no {column} and no error; it cannot be measured")
    probability = frame[schema.PROBABILITY_MALIGNANT].to_numpy(np.float64)
    called, log_odds = probability >= threshold, clipped_log_odds(probability)
    predicted = _tumor_class(called)
    # Where both are clipped the log-odds are equal; a group of one image must still be called as the image
    # is.
    margin = log_odds - clipped_log_odds(np.array(threshold))
    return frame.assign(
        **{
            schema.PROBABILITY_MALIGNANT: probability,
            LOG_ODDS: log_odds,
            MARGIN: np.where(called, margin, np.minimum(margin, -CERTAINTY)),
            schema.PREDICTED_CLASS: predicted,
            CORRECT: predicted == frame[schema.TUMOR_CLASS].to_numpy(object),
        }
    )


def unscored(predictions: pd.DataFrame | pa.Table) -> pd.DataFrame:
    """The rows that `image_table` drops: `image_id` and `error`."""
    frame = _frame(predictions)[[schema.IMAGE_ID, schema.ERROR]]
    return frame[frame[schema.ERROR].notna()].reset_index(drop=True)


def groups(images: pd.DataFrame, level: str) -> pd.DataFrame:
    """One row per slide, case or patient (`level`); images without an id at this level are in no group.

    Returns:
        Sorted by id: the id, `patient` and `tumor_class` (null where a group's images differ in it),
        `n_images`, `probability_malignant` (logistic of the mean log-odds), `margin` (mean over its images),
        `share_correct` and `predicted_class` (malignant from a margin of 0).
    """
    columns = {
        schema.PATIENT: (schema.PATIENT, _unanimous),
        schema.TUMOR_CLASS: (schema.TUMOR_CLASS, _unanimous),
        N_IMAGES: (schema.IMAGE_ID, "size"),
        schema.PROBABILITY_MALIGNANT: (LOG_ODDS, "mean"),
        MARGIN: (MARGIN, "mean"),
        SHARE_CORRECT: (CORRECT, "mean"),
    }
    columns.pop(level, None)
    table = images.groupby(level).agg(**columns).reset_index()
    log_odds = table[schema.PROBABILITY_MALIGNANT].to_numpy(np.float64)
    table[schema.PROBABILITY_MALIGNANT] = 1 / (1 + np.exp(-log_odds))
    table[schema.PREDICTED_CLASS] = _tumor_class(table[MARGIN].to_numpy() >= 0)
    return table


def groups_of_draws(images: pd.DataFrame, level: str) -> pd.DataFrame:
    """`groups` of each repeat of a cross-validation, concatenated.

    A mean over the models of several repeats would be that of an ensemble that does not exist.
    """
    if DRAW not in images:
        return groups(images, level)
    return pd.concat([groups(rows, level) for _, rows in images.groupby(DRAW)], ignore_index=True)


def clipped_log_odds(probability: np.ndarray) -> np.ndarray:
    """Log-odds of probabilities, clipped to the certainty of float32."""
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
