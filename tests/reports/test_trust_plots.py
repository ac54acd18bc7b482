"""What the figures of trust show, as numbers; their look is checked with the pages that hold them."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection, PathCollection
from sklearn import metrics as sklearn_metrics

from bcd import schema
from bcd.metrics import aggregate, decision, measures
from bcd.reports import plots, trust_plots
from tests.reports.test_model_report import history, predictions


@pytest.fixture(scope="module")
def images() -> pd.DataFrame:
    return aggregate.image_table(predictions())


@pytest.fixture(scope="module")
def pooled(images: pd.DataFrame) -> dict:
    return measures.measure(images)["pooled"]


def test_roc_and_precision_recall_are_those_of_scikit_learn(images, pooled):
    truth = images[schema.TUMOR_CLASS] == "malignant"
    probability = images[schema.PROBABILITY_MALIGNANT]
    axes = trust_plots.plot_roc(images, pooled).axes[0]
    expected = sklearn_metrics.roc_curve(truth, probability)[:2]
    np.testing.assert_allclose(axes.lines[1].get_data(), expected)
    np.testing.assert_allclose(
        axes.collections[0].get_offsets(), [[1 - pooled["specificity"], pooled["sensitivity"]]]
    )
    axes = trust_plots.plot_precision_recall(images, pooled).axes[0]
    precision, recall, _ = sklearn_metrics.precision_recall_curve(truth, probability)
    np.testing.assert_allclose(axes.lines[1].get_data(), (recall, precision))
    assert axes.lines[0].get_ydata()[0] == truth.mean()


def test_the_dots_of_reliability_are_its_table(images):
    calibration = measures.measure(images.assign(**{aggregate.UNCALIBRATED: 0.5}))["calibration"]
    axes = trust_plots.plot_reliability(calibration, "24 images").axes[0]
    for line, when in zip(axes.lines[1:], ("before", "after"), strict=True):
        rows = calibration[when]["reliability"]
        assert line.get_xdata().tolist() == [row["stated"] for row in rows]
        assert line.get_ydata().tolist() == [row["share_malignant"] for row in rows]
    (bars,) = [part for part in axes.collections if isinstance(part, LineCollection)]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [row["interval"] for row in rows]
    unknown = measures.measure(images.assign(**{schema.PATIENT: None}))["calibration"]
    trust_plots.plot_reliability(unknown, "24 images")  # no bars, and no error
    with matplotlib.rc_context(plots.STYLE):
        axes = trust_plots.plot_reliability(calibration, "24 images of 8 patients").axes[0]
    assert axes.get_title(loc="left") == "Reliability, n = 24 images of 8 patients"


def test_abstention_ends_before_the_last_few(images):
    curve = decision.abstention_curve(images)
    axes = trust_plots.plot_abstention({"images": curve}).axes[0]
    x, y = axes.lines[0].get_data()
    assert max(x) <= 0.95
    assert y[0] == curve["accuracy"].iloc[0]


@pytest.mark.parametrize("column", [schema.PATIENT, schema.MAGNIFICATION])
def test_every_image_is_a_dot_of_its_class(images, column):
    axes = trust_plots.plot_strip(images, column, "Title", 0.5).axes[0]
    dots = {dots.get_label(): dots.get_offsets() for dots in axes.collections}
    for name in ("benign", "malignant"):
        rows = images[images[schema.TUMOR_CLASS] == name]
        np.testing.assert_allclose(dots[name][:, 1], rows[schema.PROBABILITY_MALIGNANT])
    n_columns = images[column].nunique()
    assert len(axes.get_xticklabels()) == n_columns
    x = np.concatenate(list(dots.values()))[:, 0]
    assert ((x > -0.5) & (x < n_columns - 0.5)).all()


def test_a_column_per_patient_worst_first(images):
    table = aggregate.groups(images, schema.PATIENT)
    axes = trust_plots.plot_patients(table).axes[0]
    heights = [bar.get_height() for bar in axes.containers[0]]
    assert (
        heights
        == sorted(heights)
        == sorted(table.loc[table[schema.TUMOR_CLASS] == "benign", aggregate.SHARE_CORRECT].tolist())
    )


def test_folds_are_dots_and_their_mean_a_bar():
    rows = [{"pooled": {"auc": 0.8, "accuracy": None}}, {"pooled": {"auc": 0.9, "accuracy": 0.7}}]
    axes = trust_plots.plot_folds(rows, {"auc": "AUC", "accuracy": "accuracy"}).axes[0]
    dots = [part.get_offsets() for part in axes.collections if isinstance(part, PathCollection)]
    assert [points[:, 0].tolist() for points in dots] == [[0.8, 0.9], [0.7]]
    bars = [part.get_segments()[0][:, 0] for part in axes.collections if isinstance(part, LineCollection)]
    np.testing.assert_allclose(bars, [[0.85, 0.85], [0.7, 0.7]])


def test_histories_have_a_line_per_fold():
    loss, rate = trust_plots.plot_histories([history(3), history(2)]).axes
    assert [len(line.get_xdata()) for line in loss.lines] == [3, 3, 2, 2]
    assert [len(line.get_xdata()) for line in rate.lines] == [3, 2]


def test_the_leak_joins_the_honest_and_the_leaky_number():
    row = {"first": 0.99, "second": 0.6, "difference": 0.39}
    axes = trust_plots.plot_leak({"auc": row}, {"auc": "AUC"}, ("leaky", "honest")).axes[0]
    assert axes.lines[0].get_xdata().tolist() == [0.6, 0.99]
    assert [dots.get_label() for dots in axes.collections] == ["honest", "leaky"]
