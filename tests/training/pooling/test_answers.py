import numpy as np
import pyarrow as pa
import pytest

from bcd import schema
from bcd.training.pooling import answers, bags
from bcd.training.pooling.model import identity_of
from tests.training.pooling.planted import MODEL
from tests.training.pooling.test_model import pool_card

FORM = schema.POOLED_SLIDES.append(schema.INDEX.field(schema.SHA256))


def scored(shares, tops=None):
    """Slides s0, s1, ... with these shares of malignant tiles; None for one without a tile."""
    tops = shares if tops is None else tops
    rows = [
        {schema.SLIDE: f"s{i}", schema.URI: "u", schema.TILES: 2, schema.MALIGNANT_TILE_SHARE: share}
        | {schema.TOP_PROBABILITY: top, schema.ERROR: None if share is not None else bags.NO_TILES}
        for i, (share, top) in enumerate(zip(shares, tops, strict=True))
    ]
    return bags.ScoredSlides("scores", MODEL, 8, pa.Table.from_pylist(rows, schema=FORM))


def known(classes, parts, patients=None):
    rows = [
        {schema.IMAGE_ID: f"s{i}", schema.SLIDE: f"s{i}", schema.TUMOR_CLASS: name, schema.PART: part}
        | {schema.PATIENT: patients[i] if patients else f"p{i}"}
        for i, (name, part) in enumerate(zip(classes, parts, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=schema.SPLIT)


def test_every_slide_has_an_answer_or_an_error():
    card = pool_card(temperature=2.0, threshold=0.25)
    odds = {"s0": np.log(1 / 3), "s1": np.log(1 / 3) - 0.01}  # 0.25 is malignant
    logits = {name: np.array([0, 2 * one], np.float32) for name, one in odds.items()}
    table = answers.answer_table(scored([0.5, 0.1, None]), logits, card, known(["benign"], ["test"]))
    assert table.schema.equals(schema.POOLED_SLIDES)
    rows = table.to_pylist()
    assert [row[schema.PREDICTED_CLASS] for row in rows] == ["malignant", "benign", None]
    np.testing.assert_allclose(
        [row[schema.PROBABILITY_MALIGNANT] for row in rows[:2]], [0.25, 0.2481], atol=1e-4
    )
    np.testing.assert_allclose(rows[0][schema.LOGIT], [0, np.log(1 / 3)], rtol=1e-6)
    assert [row[schema.ERROR] for row in rows] == [None, None, bags.NO_TILES]
    assert [row[schema.TUMOR_CLASS] for row in rows] == ["benign", None, None]
    assert [row[schema.PART] for row in rows] == ["test", None, None]
    assert {row[schema.MODEL_ID] for row in rows} == {identity_of(card)}


def studied(shares, odds, parts, patients=None, classes=("benign", "malignant")):
    """Answers of alternating classes with these log-odds."""
    card = pool_card(temperature=1.0, threshold=0.5)
    n = len(shares)
    logits = {f"s{i}": np.array([0, one]) for i, one in enumerate(odds) if shares[i] is not None}
    named = known([classes[i % 2] for i in range(n)], parts, patients)
    return answers.answer_table(scored(shares), logits, card, named), card


def test_attention_is_compared_with_what_needs_no_training():
    """The share is wrong for two of eight patients; its threshold is that of the validation slides."""
    shares = [0.1, 0.3] * 2 + [0.1, 0.3, 0.05, 0.4, 0.35, 0.15, 0.1, 0.5]
    parts = ["validation"] * 4 + ["test"] * 8
    table, card = studied(shares, [-2, 2] * 6, parts)
    measured = answers.measure_slides(table, card)
    assert measured["n_images"] == 8
    assert measured["by_level"][schema.PATIENT]["auc"] == 1
    found = measured["comparison"][schema.MALIGNANT_TILE_SHARE]
    assert found["threshold"] == pytest.approx(0.2)
    assert found["n_patients"] == 8
    metrics = found["metrics"]
    # Of 16 pairs two are in the wrong order: 0.15 and 0.3 of malignant slides with 0.35 of a benign one.
    assert metrics["auc"]["second"] == 14 / 16
    assert metrics["auc"]["difference"] == 2 / 16
    assert metrics["accuracy"]["second"] == 6 / 8
    low, high = metrics["auc"]["interval"]
    assert low < 2 / 16 < high
    assert "brier" not in metrics
    lines = answers.summary_of(measured)
    assert lines[0].startswith("test part: 8 slides of 8 patients; AUC by patient 1.000")
    assert lines[1].startswith("  malignant_tile_share: 0.875; attention minus it 0.125 (")


def test_a_patient_is_the_mean_of_the_slides_shares():
    """A slide without a malignant tile is no infinite evidence."""
    shares = [0.1, 0.3] * 2 + [0.1, 0.0, 0.1, 0.5]
    parts = ["validation"] * 4 + ["test"] * 4
    patients = ["a", "b", "c", "d", "e", "f", "e", "f"]
    table, card = studied(shares, [-2, 2] * 4, parts, patients)
    found = answers.measure_slides(table, card)["comparison"][schema.MALIGNANT_TILE_SHARE]
    assert found["n_patients"] == 2
    assert found["metrics"]["auc"]["second"] == 1
    assert found["metrics"]["accuracy"]["second"] == 1


def test_labelled_slides_without_a_tile_are_counted_and_not_measured():
    shares = [0.1, 0.3] * 2 + [0.1, 0.3, 0.1, 0.3, None]
    table, card = studied(shares, [-2, 2] * 4 + [0], ["validation"] * 4 + ["test"] * 4 + [None])
    measured = answers.measure_slides(table, card)
    assert (measured["n_images"], measured["n_errors"]) == (4, 1)
