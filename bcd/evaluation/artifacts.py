"""From scored test rows to metrics, the table of test images, and the report with its figures."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import ray

from bcd import schema, storage
from bcd.errors import DataError
from bcd.metrics import aggregate, calibration, compare, measures
from bcd.model import novelty
from bcd.model.card import Card
from bcd.reports import model_report, thumbnails
from bcd.runtime import inspection, predict, run_directory
from bcd.runtime.run_directory import IMAGES, METRICS, REPORT

logger = logging.getLogger(__name__)

# A JSON object.
Record = Mapping[str, Any]
TRUTH = (
    *(schema.IMAGE_ID, schema.CASE, schema.SITE),
    *(schema.TUMOR_CLASS, schema.SUBTYPE, schema.MAGNIFICATION),
)


def with_truth(predictions_uri: str, test: pa.Table, card: Card) -> pd.DataFrame:
    """Predictions without maps, joined with the index rows `test` of the same images."""
    columns = [schema.IMAGE_ID, schema.PATIENT, schema.SLIDE, schema.LOGIT, schema.PROBABILITY]
    columns += [schema.PROBABILITY_MALIGNANT, schema.PREDICTED_CLASS, schema.ERROR, schema.MODEL_ID]
    columns += [schema.NOVELTY, schema.NOVELTY_CUTOFF]
    scored = predict.read_back(predictions_uri, columns).to_pandas()
    codes = [None if pd.isna(code) else code for code in scored[schema.ERROR]]
    inspection.require_given(scored[schema.IMAGE_ID].tolist(), codes)
    good = scored[schema.ERROR].isna()
    scored[aggregate.UNCALIBRATED] = np.nan
    if good.any():
        logit = np.stack(scored.loc[good, schema.LOGIT])  # divided by the temperature
        before = calibration.probability_malignant(logit, card.classes, 1 / card.temperature)
        scored.loc[good, aggregate.UNCALIBRATED] = before
    truth = test.select(list(TRUTH)).to_pandas()
    return scored.merge(truth, on=schema.IMAGE_ID, validate="one_to_one")


def images_of(frame: pd.DataFrame, card: Card, predictions_uri: str, draw: int = 1) -> pd.DataFrame:
    """`aggregate.image_table` of one model, with its repeat (`draw`) and the URI of its predictions."""
    images = aggregate.image_table(frame, card.threshold)
    return images.assign(**{aggregate.SOURCE: predictions_uri, aggregate.DRAW: draw})


def compared(images: pd.DataFrame, against: str) -> dict[str, Any]:
    """The paired comparison with another evaluation; raises DataError if it is missing or of other images."""
    require_images(against)
    other = storage.read_table(storage.join(against, IMAGES)).to_pandas()
    return compare.paired(images, other) | {"against": against}


def require_images(against: str) -> None:
    """Raises DataError if there is no evaluation to compare with; called before any work."""
    if not storage.exists(storage.join(against, IMAGES)):
        raise DataError(f"--against {against}: no {IMAGES} there; give the output of a finished evaluation")


def write_artifacts(
    output: str,
    measured: Record,
    history: Sequence[Record],
    images: pd.DataFrame,
    facts: Record,
    unscored: pd.DataFrame,
) -> None:
    """Write the table of test images, the metrics and the report, each atomically."""
    storage.write_table(storage.join(output, IMAGES), pa.Table.from_pandas(images, preserve_index=False))
    run_directory.write_json(output, METRICS, measured)
    # Pixels stay off the driver.
    drawing = ray.remote(num_cpus=1, max_retries=-1)(_draw)
    ray.get(drawing.remote(output, measured, history, images, facts, unscored.to_dict("records")))
    for line in model_report.summary_lines(measured):
        logger.info(line)
    logger.info(f"report: {storage.join(output, REPORT)}")


def _draw(
    output: str,
    measured: Record,
    history: Sequence[Record],
    images: pd.DataFrame,
    facts: Record,
    unscored: Sequence[Mapping[str, str]],
) -> None:
    chosen = model_report.choose_examples(images).all()
    examples = thumbnails.of_images(images.iloc[chosen], measured["classes"])
    shown = dict(zip(chosen, examples, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        model_report.write_report(Path(folder), measured, history, images, facts, shown, unscored)
        storage.upload_folder(Path(folder), output, last=REPORT)


def measure_run(images: pd.DataFrame, unscored: pd.DataFrame, classes: Sequence[str]) -> dict[str, Any]:
    """All metrics, the number of rows not scored, and the rows per warning (None without statistics)."""
    warnings = None
    if images[schema.NOVELTY_CUTOFF].notna().any():
        unlike = images[schema.NOVELTY] > images[schema.NOVELTY_CUTOFF]
        warnings = {novelty.CODE: int(unlike.sum())}
    return measures.measure(images, classes) | {"n_errors": len(unscored), "warnings": warnings}
