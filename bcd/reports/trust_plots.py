"""Figures of how far a model can be trusted."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from bcd import schema
from bcd.metrics import aggregate
from bcd.reports.plots import CLASS_COLOR, DASHED, canvas, history_panels, legend_above, percent_axis
from bcd.reports.style import BLUE, GREY, INK, PALE, PERCENT, VERMILION
from bcd.taxonomy import MALIGNANT
from bcd.text import counted

# With more patients, their names are left out.
MAX_NAMES = 36


def plot_roc(images: pd.DataFrame, pooled: Mapping[str, Any], unit: str = "image") -> Figure:
    """ROC curve with the operating point in use; `unit` is that of `measures.unit`."""
    truth = images[schema.TUMOR_CLASS] == MALIGNANT
    false_positive, true_positive, _ = roc_curve(truth, images[schema.PROBABILITY_MALIGNANT])
    figure, (axes,) = canvas(4.2)
    _diagonal(axes, (0, 1), "chance")
    axes.plot(false_positive, true_positive, color=BLUE, label=f"AUC {pooled['auc']:.3f}")
    _point(axes, 1 - pooled["specificity"], pooled["sensitivity"])
    _square(axes, "ROC", counted(pooled["n"], unit), "1 − specificity", "sensitivity")
    return figure


def plot_precision_recall(images: pd.DataFrame, pooled: Mapping[str, Any], unit: str = "image") -> Figure:
    """Precision against sensitivity, with the operating point in use."""
    truth = (images[schema.TUMOR_CLASS] == MALIGNANT).to_numpy()
    probability = images[schema.PROBABILITY_MALIGNANT]
    precision, recall, _ = precision_recall_curve(truth, probability)
    figure, (axes,) = canvas(4.2)
    share = truth.mean()
    _diagonal(axes, (share, share), f"chance, {100 * share:.0f}{PERCENT}")
    axes.plot(recall, precision, color=BLUE, label=f"mean {average_precision_score(truth, probability):.3f}")
    (_, false_positive), (_, true_positive) = pooled["confusion_matrix"]
    if called := false_positive + true_positive:
        _point(axes, pooled["sensitivity"], true_positive / called)
    _square(axes, "Precision and recall", counted(pooled["n"], unit), "sensitivity (recall)", "precision")
    return figure


def plot_reliability(calibration: Mapping[str, Any], of: str) -> Figure:
    """Share of malignant images against the stated probability, before and after the temperature; `of`
    says of what, such as "20 images of 3 patients".

    A dot has about as many images as any other; a bar is the 95 % interval of a share, by patients.
    """
    figure, (axes,) = canvas(4.2)
    _diagonal(axes, (0, 1), "as stated")
    after = "after the temperature" if "before" in calibration else "the model"
    for name, color, marker, label in (("before", GREY, "s", "before"), ("after", BLUE, "o", after)):
        if name not in calibration:
            continue
        rows = calibration[name]["reliability"]
        x, y = ([row[key] for row in rows] for key in ("stated", "share_malignant"))
        axes.plot(x, y, color=color, lw=1, alpha=0.6)
        if name == "after":
            ends = [(row["stated"], *row["interval"]) for row in rows if row["interval"]]
            axes.vlines(*(np.array(ends).reshape(-1, 3).T), color=color, lw=1.4, alpha=0.6, clip_on=False)
        label = f"{label}, error {100 * calibration[name]['ece']:.1f}{PERCENT}"
        size = 30 if name == "after" else 14
        axes.scatter(x, y, size, color=color, marker=marker, label=label, clip_on=False, zorder=3)
    _square(axes, "Reliability", of, "stated probability of malignancy", "malignant images")
    return figure


def _diagonal(axes: Axes, ends: tuple[float, float], label: str) -> None:
    axes.plot([0, 1], ends, color=GREY, ls=DASHED, lw=1.2, label=label)


def _point(axes: Axes, x: float, y: float) -> None:
    axes.scatter(x, y, s=50, color=VERMILION, clip_on=False, zorder=3, label="in use")


def _square(axes: Axes, title: str, of: str, xlabel: str, ylabel: str) -> None:
    """Both axes from 0 to 100 %, below title and legend."""
    axes.set(title=f"{title}, n = {of}", xlim=(0, 1), xlabel=xlabel)
    percent_axis(axes, ylabel)
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=PERCENT))
    axes.set_aspect("equal")
    legend_above(axes)


def plot_abstention(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """Accuracy of the decided cases against the share referred, from `decision.abstention_curve`."""
    figure, (axes,) = canvas(3.6)
    lowest = 1.0
    for (name, curve), color in zip(curves.items(), (BLUE, VERMILION), strict=False):
        # Accuracy over very few cases jumps: the curve ends where one in twenty is decided.
        shown = curve[curve["handed_over"] <= 0.95]
        label = f"{name} (n = {len(curve):,})"
        axes.plot(shown["handed_over"], shown["accuracy"], color=color, label=label, drawstyle="steps-post")
        lowest = min(lowest, shown["accuracy"].min())
    axes.set(title="Abstention", xlim=(0, 1), xlabel="referred to a person, least certain first")
    percent_axis(axes, "correct among the decided")
    axes.set_ylim(max(0, np.floor(10 * lowest - 0.5) / 10), 1.01)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=PERCENT))
    legend_above(axes)
    return figure


def plot_strip(
    images: pd.DataFrame, column: str, title: str, threshold: float | None, unit: str = "image"
) -> Figure:
    """The probability of every image or judgement as a dot, in a column per patient or magnification.

    Images without a value in `column` are left out; `threshold` is None where the images have several.
    """
    known = images[images[column].notna()]
    order = known.groupby(column)[schema.TUMOR_CLASS].first().reset_index()
    by = [column] if column == schema.MAGNIFICATION else [schema.TUMOR_CLASS, column]
    place = {name: x for x, name in enumerate(order.sort_values(by)[column])}
    figure, (axes,) = canvas(3.9)
    for number, (name, color) in enumerate(CLASS_COLOR.items()):
        rows = known[known[schema.TUMOR_CLASS] == name]
        if rows.empty:
            continue
        # Golden-ratio steps spread the dots of a column evenly and reproducibly.
        spread = (np.arange(len(rows)) * 0.618 % 1 - 0.5) * 0.3
        side = (0.2 if number else -0.2) if column == schema.MAGNIFICATION else 0
        x = rows[column].map(place).to_numpy(float) + side + spread
        axes.scatter(x, rows[schema.PROBABILITY_MALIGNANT], 9, color=color, alpha=0.65, lw=0, label=name)
    if threshold is not None:
        axes.axhline(threshold, color=INK, ls=DASHED, lw=1, label=f"threshold {threshold:.2g}")
    is_scale = column == schema.MAGNIFICATION
    names = [f"{name:.0f}X" if is_scale else str(name)[:16] for name in place]
    axes.set_xticks(range(len(names)), names, rotation=0 if is_scale else 90, size=8 if is_scale else 7)
    axes.tick_params(axis="x", length=0, labelbottom=len(names) <= MAX_NAMES)
    axes.set(title=f"{title}, n = {counted(len(known), unit)}", xlim=(-0.7, max(len(names), 3) - 0.3))
    percent_axis(axes, "probability of malignancy")
    legend_above(axes)
    return figure


def plot_patients(table: pd.DataFrame) -> Figure:
    """Share of images classified correctly, a bar per patient, from `aggregate.groups`."""
    figure, (axes,) = canvas(3.9)
    start, ticks = 0, dict[int, str]()
    for name, color in CLASS_COLOR.items():
        group = table[table[schema.TUMOR_CLASS] == name].sort_values(aggregate.SHARE_CORRECT, kind="stable")
        if group.empty:
            continue
        x, share = np.arange(len(group)) + start, group[aggregate.SHARE_CORRECT].to_numpy()
        axes.bar(x, share, color=color, label=f"{name} {len(group):,}")
        axes.bar(x, 1 - share, bottom=share, color=PALE)
        ticks |= dict(zip(x.tolist(), group[schema.PATIENT].str.slice(0, 16), strict=True))
        start = int(x[-1]) + 2
    axes.set_xlim(-1, max(start - 1, 9))
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=90, size=7)
    axes.tick_params(axis="x", length=0, labelbottom=len(ticks) <= MAX_NAMES)
    axes.set_title(f"Patients, n = {len(table):,}")
    percent_axis(axes, "images classified correctly")
    legend_above(axes)
    return figure


def plot_histories(records: Sequence[Sequence[Mapping[str, Any]]]) -> Figure:
    """Loss and validation balanced accuracy over the epochs, a thin line for each fold."""
    figure, loss, rate = history_panels(records, lw=1, alpha=0.7)
    loss.set(title=f"Loss, {counted(len(records), 'fold')}", ylim=(0, None))
    legend_above(loss)
    rate.set_title("Balanced accuracy")
    return figure


def plot_folds(rows: Sequence[Mapping[str, Any]], measures: Mapping[str, str]) -> Figure:
    """The `pooled` metrics of each fold as dots, a row per metric (name to label), with the mean as a bar."""
    figure, (axes,) = canvas(1.2 + 0.45 * len(measures))
    for y, name in enumerate(measures):
        values = np.array([row["pooled"][name] for row in rows if row["pooled"][name] is not None], float)
        if len(values):
            axes.vlines(values.mean(), y - 0.28, y + 0.28, color=INK, lw=2.2)
        axes.scatter(values, np.full(len(values), y), 42, color=BLUE, alpha=0.55, lw=0, clip_on=False)
    axes.set(title=f"Folds, n = {len(rows):,}", xlim=(0, 1))
    _rows(axes, list(measures.values()))
    return figure


def plot_leak(
    comparisons: Mapping[str, Mapping[str, Any]], measures: Mapping[str, str], names: tuple[str, str]
) -> Figure:
    """Metrics of the same model under a leaky and an honest protocol (their names, in this order)."""
    figure, (axes,) = canvas(1.2 + 0.5 * len(measures))
    shown = [name for name in measures if comparisons[name]["difference"] is not None]
    for y, name in enumerate(shown):
        leaky, honest = comparisons[name]["first"], comparisons[name]["second"]
        axes.plot([honest, leaky], [y, y], color=PALE, lw=5, solid_capstyle="round", zorder=1)
        for x, color, label in ((honest, BLUE, names[1]), (leaky, VERMILION, names[0])):
            axes.scatter(x, y, 52, color=color, clip_on=False, zorder=2, label=None if y else label)
    axes.set(title="Effect of the leak", xlim=(0, 1.01))
    _rows(axes, [measures[name] for name in shown])
    legend_above(axes)
    return figure


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    """A row per metric from the top, with values from 0 to 100 %."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=PERCENT))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
