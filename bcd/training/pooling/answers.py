"""From logits of slides to answers, and their metrics by patient, beside those of what needs no training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema
from bcd.metrics import aggregate, calibration, compare, decision, measures
from bcd.taxonomy import MALIGNANT, TEST, TUMOR_CLASSES, VALIDATION
from bcd.training.pooling.bags import ScoredSlides
from bcd.training.pooling.model import PoolCard, identity_of

# What answers for a slide without training, and is compared with attention.
UNTRAINED = (schema.MALIGNANT_TILE_SHARE, schema.TOP_PROBABILITY)
# They are no probabilities of a slide.
OF_PROBABILITIES = frozenset({"brier"})
_LABELS = (schema.PATIENT, schema.CASE, schema.TUMOR_CLASS, schema.SUBTYPE, schema.PART)


def answer_table(
    scored: ScoredSlides, logits: Mapping[str, np.ndarray], card: PoolCard, known: pa.Table | None = None
) -> pa.Table:
    """One row of `schema.POOLED_SLIDES` for each slide, an answer or an error.

    Args:
        scored: the slides.
        logits: (classes,) by slide, before the temperature; of those with a tile.
        card: of the model.
        known: labels, and parts of those in the split; rows of `schema.SPLIT`, by slide.
    """
    labels = {row[schema.SLIDE]: row for row in known.to_pylist()} if known is not None else {}
    rows = scored.table.to_pylist()
    for row in rows:
        name = row[schema.SLIDE]
        row[schema.MODEL_ID] = identity_of(card)
        row |= {column: labels[name].get(column) for column in _LABELS} if name in labels else {}
        if name in logits:
            row |= _answer(np.asarray(logits[name], np.float64)[None] / card.temperature, card)
    return pa.Table.from_pylist(rows, schema=schema.POOLED_SLIDES)


def _answer(logit: np.ndarray, card: PoolCard) -> dict[str, Any]:
    """Columns of one slide, from its calibrated logits (1, classes)."""
    # As in the table: a call must not depend on digits that are not there.
    probability = np.float32(calibration.probability_malignant(logit, card.classes)[0])
    return {
        schema.LOGIT: logit[0].tolist(),
        schema.PROBABILITY_MALIGNANT: float(probability),
        schema.PREDICTED_CLASS: card.classes[int(probability >= np.float32(card.threshold))],
    }


def measure_slides(answers: pa.Table, card: PoolCard, seed: int = 0) -> dict[str, Any]:
    """`measures.measure` of the test slides, whose "image" is a slide, and as `comparison`
    the paired test by patient with each of `UNTRAINED`, whose thresholds are chosen on validation, too.
    `n_errors` counts the labelled slides without an answer."""
    test, labelled = _part(answers, TEST), answers.filter(pc.is_valid(answers[schema.TUMOR_CLASS]))
    images = _images(test, schema.PROBABILITY_MALIGNANT, card.threshold)
    measured = measures.measure(images, TUMOR_CLASSES, seed)
    own = _patients(images)
    compared = {}
    for name in UNTRAINED:
        threshold = _threshold(_part(answers, VALIDATION), name, card)
        other = _patients(_images(test, name, threshold), name, threshold)
        found = compare.paired(own, other, seed)
        values = {metric: row for metric, row in found["metrics"].items() if metric not in OF_PROBABILITIES}
        compared[name] = found | {"metrics": values, "threshold": threshold}
    facts = {"threshold": card.threshold, "temperature": card.temperature}
    return (
        measured
        | facts
        | {"n_errors": len(labelled) - labelled[schema.ERROR].null_count, "comparison": compared}
    )


def _part(answers: pa.Table, part: str) -> pd.DataFrame:
    """The slides of a part, which have an answer."""
    return answers.filter(pc.equal(answers[schema.PART], part)).to_pandas()


def _images(slides: pd.DataFrame, column: str, threshold: float) -> pd.DataFrame:
    """`aggregate.image_table` of slides, with a column in place of the probability."""
    named = slides.assign(
        **{schema.IMAGE_ID: slides[schema.SLIDE], schema.PROBABILITY_MALIGNANT: slides[column]}
    )
    return aggregate.image_table(named, threshold)


def _patients(images: pd.DataFrame, column: str = "", threshold: float = 0.5) -> pd.DataFrame:
    """A row per patient, as of one image: slides add up in log-odds, or as a mean of what is no probability.
    Patients with slides of both classes are left out."""
    groups = aggregate.groups(images, schema.PATIENT)
    if column:
        means = images.groupby(schema.PATIENT)[schema.PROBABILITY_MALIGNANT].mean()
        called = (means >= threshold).to_numpy()
        groups[schema.PROBABILITY_MALIGNANT] = means.to_numpy()
        groups[schema.PREDICTED_CLASS] = np.where(called, TUMOR_CLASSES[1], TUMOR_CLASSES[0])
    known = groups[groups[schema.TUMOR_CLASS].notna()]
    return known.assign(**{schema.IMAGE_ID: known[schema.PATIENT]})


def _threshold(validation: pd.DataFrame, column: str, card: PoolCard) -> float:
    truth = (validation[schema.TUMOR_CLASS] == MALIGNANT).to_numpy()
    target = card.operating_point["target_sensitivity"]
    return float(decision.choose_threshold(truth, validation[column].to_numpy(), target)["threshold"])


def summary_of(measured: Mapping[str, Any]) -> list[str]:
    """Lines of the log: AUC by patient of attention, and the difference to each of `UNTRAINED`."""
    by_patient = measured["by_level"][schema.PATIENT]
    slides = f"{measured['n_images']:,} slides of {by_patient['n_patients']:,} patients"
    lines = [
        f"test part: {slides}; AUC by patient {_value(by_patient['auc'], by_patient['intervals']['auc'])}"
    ]
    for name, found in measured["comparison"].items():
        auc = found["metrics"]["auc"]
        lines.append(
            f"  {name}: {_value(auc['second'])}; attention minus it "
            f"{_value(auc['difference'], auc['interval'])}"
        )
    return lines


def _value(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "not defined"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
