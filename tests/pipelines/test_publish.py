"""Temperature and threshold: from validation logits whose truth is planted."""

import numpy as np
import pyarrow as pa
import pytest

from bcd import schema
from bcd.config import TrainConfig
from bcd.pipelines import publish


def validation(n=400, seed=0):
    """Logits that are twice too sure, and rows with their classes, drawn from the honest probability."""
    generator = np.random.default_rng(seed)
    honest = generator.normal(0, 1.5, n)
    malignant = generator.random(n) < 1 / (1 + np.exp(-honest))
    rows = [
        {
            schema.IMAGE_ID: str(i),
            schema.URI: "",
            schema.PATIENT: f"p{i % 7}",
            schema.TUMOR_CLASS: "malignant" if truth else "benign",
        }
        for i, truth in enumerate(malignant)
    ]
    logit = np.stack([-honest, honest], 1).astype(np.float32)
    return logit, schema.fill(pa.Table.from_pylist(rows), schema.INDEX), malignant


def test_the_temperature_is_found_and_told_before_and_after():
    decided = publish._decided(TrainConfig(data="d"), *validation(4000)[:2])
    assert decided["temperature"] == pytest.approx(2, rel=0.05)
    told = decided["calibration"]
    for name in ("cross_entropy", "brier", "ece"):
        assert told[f"{name}_after"] < told[f"{name}_before"]


@pytest.mark.parametrize("target", [0.8, 0.95])
def test_the_threshold_reaches_the_sensitivity_that_was_asked_for(target):
    logit, rows, malignant = validation()
    decided = publish._decided(TrainConfig(data="d", target_sensitivity=target), logit, rows)
    probability = 1 / (1 + np.exp(-(logit[:, 1] - logit[:, 0]) / decided["temperature"]))
    called = probability >= decided["threshold"]
    n = int(np.ceil(target * malignant.sum()))
    assert called[malignant].sum() == n
    point = decided["operating_point"]
    assert point["sensitivity"] == called[malignant].mean() >= target
    assert point["specificity"] == pytest.approx((~called[~malignant]).mean())
    assert (point["rule"], point["n_patients"]) == ("sensitivity", 7)
