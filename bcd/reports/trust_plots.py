"""Figures of how far a model can be trusted; `figures` says how all of them look."""

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
from bcd.reports.plots import CLASS_COLOR, PERCENT, canvas, legend_above, percent_axis
from bcd.reports.style import BLUE, GREY, INK, ORANGE, PALE, VERMILION
from bcd.taxonomy import MALIGNANT
from bcd.text import counted

DASHED = (0, (4, 3))
# With more patients than this their names are left out.
MAX_NAMES = 36


def plot_roc(images: pd.DataFrame, pooled: Mapping[str, Any]) -> Figure:
    """Sensitivity against false alarms, with the operating point in use."""
    truth = images[schema.TUMOR_CLASS] == MALIGNANT
    false_positive, true_positive, _ = roc_curve(truth, images[schema.PROBABILITY_MALIGNANT])
    figure, (axes,) = canvas(4.2)
    axes.plot([0, 1], [0, 1], color=GREY, ls=DASHED, lw=1.2, label="chance")
    axes.plot(false_positive, true_positive, color=BLUE, label=f"AUC {pooled['auc']:.3f}")
    _point(axes, 1 - pooled["specificity"], pooled["sensitivity"])
    axes.set(title=f"ROC, n = {counted(pooled['n'], 'image')}", xlim=(0, 1), xlabel="1 − specificity")
    _square(axes, "sensitivity")
    return figure


def plot_precision_recall(images: pd.DataFrame, pooled: Mapping[str, Any]) -> Figure:
    """Precision against sensitivity, with the operating point in use."""
    truth = (images[schema.TUMOR_CLASS] == MALIGNANT).to_numpy()
    probability = images[schema.PROBABILITY_MALIGNANT]
    precision, recall, _ = precision_recall_curve(truth, probability)
    figure, (axes,) = canvas(4.2)
    share = truth.mean()
    axes.plot(
        [0, 1], [share, share], color=GREY, ls=DASHED, lw=1.2, label=f"chance, {100 * share:.0f}{PERCENT}"
    )
    axes.plot(recall, precision, color=BLUE, label=f"mean {average_precision_score(truth, probability):.3f}")
    (_, false_positive), (_, true_positive) = pooled["confusion_matrix"]
    if called := false_positive + true_positive:
        _point(axes, pooled["sensitivity"], true_positive / called)
    axes.set(
        title=f"Precision and recall, n = {counted(pooled['n'], 'image')}",
        xlim=(0, 1),
        xlabel="sensitivity (recall)",
    )
    _square(axes, "precision")
    return figure


def _square(axes: Axes, label: str) -> None:
    """0 to 100 % both ways, below title and legend."""
    percent_axis(axes, label)
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=PERCENT))
    axes.set_aspect("equal")
    legend_above(axes)


def _point(axes: Axes, x: float, y: float) -> None:
    axes.scatter(x, y, s=50, color=VERMILION, clip_on=False, zorder=3, label="in use")


def plot_reliability(calibration: Mapping[str, Any], n: int) -> Figure:
    """Share of malignant images against the probability stated, before and after the temperature."""
    figure, (axes,) = canvas(4.2)
    axes.plot([0, 1], [0, 1], color=GREY, ls=DASHED, lw=1.2, label="as stated")
    looks = {"before": (GREY, "s", "before"), "after": (BLUE, "o", "after the temperature")}
    if "before" not in calibration:
        looks["after"] = (BLUE, "o", "the model")
    for name, (color, marker, label) in looks.items():
        if name not in calibration:
            continue
        rows = calibration[name]["reliability"]
        x, y = ([row[key] for row in rows] for key in ("stated", "share_malignant"))
        axes.plot(x, y, color=color, lw=1, alpha=0.6)
        areas = [12 + 160 * row["n"] / max(1, n) for row in rows]
        said = f"{label}, error {100 * calibration[name]['ece']:.1f}{PERCENT}"
        axes.scatter(x, y, areas, color=color, marker=marker, label=said, clip_on=False, zorder=3)
    axes.set(title=f"Reliability, n = {counted(n, 'image')}", xlim=(0, 1))
    axes.set_xlabel("stated probability of malignancy")
    _square(axes, "malignant images")
    return figure


def plot_abstention(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """Accuracy of what the model keeps against the share referred: `decision.abstention_curve`."""
    figure, (axes,) = canvas(3.6)
    lowest = 1.0
    for (name, curve), color in zip(curves.items(), (BLUE, VERMILION), strict=False):
        # The last few kept tell little and jump: the curve ends at one in twenty.
        shown = curve[curve["handed_over"] <= 0.95]
        label = f"{name} (n = {len(curve):,})"
        axes.plot(shown["handed_over"], shown["accuracy"], color=color, label=label, drawstyle="steps-post")
        lowest = min(lowest, shown["accuracy"].min())
    axes.set(title="Abstention", xlim=(0, 1), xlabel="handed to a person, least certain first")
    percent_axis(axes, "of those kept, correct")
    axes.set_ylim(max(0, np.floor(10 * lowest - 0.5) / 10), 1.01)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=PERCENT))
    legend_above(axes)
    return figure


def plot_strip(images: pd.DataFrame, column: str, title: str, threshold: float | None) -> Figure:
    """The probability of every image as a dot, a column per patient or magnification.

    Args:
        images: from `aggregate.image_table`; rows without a value in the column are left out.
        column: `schema.PATIENT` or `schema.MAGNIFICATION`.
        title: of the figure.
        threshold: drawn as a line, where all images share it.
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
        # Golden-ratio steps spread the dots of a column evenly, and alike every time.
        spread = (np.arange(len(rows)) * 0.618 % 1 - 0.5) * 0.3
        side = (0.2 if number else -0.2) if column == schema.MAGNIFICATION else 0
        x = rows[column].map(place).to_numpy(float) + side + spread
        axes.scatter(x, rows[schema.PROBABILITY_MALIGNANT], 9, color=color, alpha=0.65, lw=0, label=name)
    if threshold is not None:
        axes.axhline(threshold, color=INK, ls=DASHED, lw=1, label=f"threshold {threshold:.2g}")
    unit = "X" if column == schema.MAGNIFICATION else ""
    names = [f"{name:.0f}{unit}" if unit else str(name)[:16] for name in place]
    axes.set_xticks(range(len(names)), names, rotation=0 if unit else 90, size=8 if unit else 7)
    axes.tick_params(axis="x", length=0, labelbottom=len(names) <= MAX_NAMES)
    axes.set(title=f"{title}, n = {counted(len(known), 'image')}", xlim=(-0.7, max(len(names), 3) - 0.3))
    percent_axis(axes, "probability of malignancy")
    legend_above(axes)
    return figure


def plot_patients(table: pd.DataFrame) -> Figure:
    """Share of images classified correctly, a column per patient, from `aggregate.groups`."""
    kind = table[schema.TUMOR_CLASS]
    figure, (axes,) = canvas(3.9)
    start, ticks = 0, dict[int, str]()
    for name, color in CLASS_COLOR.items():
        group = table[kind == name].sort_values(aggregate.SHARE_CORRECT, kind="stable")
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
    figure, (loss, rate) = canvas(4.8, rows=2)
    for number, rows in enumerate(records):
        epochs = [row["epoch"] for row in rows]
        for axes, key, label, color in (
            (loss, "train_loss", "training", ORANGE),
            (loss, "validation_loss", "validation", BLUE),
            (rate, "validation_balanced_accuracy", "validation", BLUE),
        ):
            values = [row[key] for row in rows]
            axes.plot(epochs, values, color=color, lw=1, alpha=0.7, label=None if number else label)
    for axes in (loss, rate):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    loss.set(title=f"Loss, {counted(len(records), 'fold')}", ylabel="cross-entropy per image", ylim=(0, None))
    loss.grid(axis="y")
    legend_above(loss)
    rate.set(title="Balanced accuracy", xlabel="epoch")
    percent_axis(rate, "on validation")
    return figure


def plot_folds(rows: Sequence[Mapping[str, Any]], measures: Mapping[str, str]) -> Figure:
    """Every fold as a dot, a line of dots per metric, with the mean as a bar.

    Args:
        rows: one for each fold: its `pooled` metrics.
        measures: name and label of each metric, from the top.
    """
    figure, (axes,) = canvas(1.2 + 0.45 * len(measures))
    for y, name in enumerate(measures):
        values = np.array([row["pooled"][name] for row in rows if row["pooled"][name] is not None], float)
        if len(values):
            axes.vlines(values.mean(), y - 0.28, y + 0.28, color=INK, lw=2.2)
        axes.scatter(values, np.full(len(values), y), 42, color=BLUE, alpha=0.55, lw=0, clip_on=False)
    axes.set_yticks(range(len(measures)), list(measures.values()))
    axes.set(title=f"Folds, n = {len(rows):,}", xlim=(0, 1), ylim=(len(measures) - 0.5, -0.5))
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=PERCENT))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    return figure


def plot_leak(
    comparisons: Mapping[str, Mapping[str, Any]], measures: Mapping[str, str], names: tuple[str, str]
) -> Figure:
    """What the same model reaches under a leaky and an honest protocol (their names, in this order)."""
    figure, (axes,) = canvas(1.2 + 0.5 * len(measures))
    shown = [name for name in measures if comparisons[name]["difference"] is not None]
    for y, name in enumerate(shown):
        leaky, honest = comparisons[name]["first"], comparisons[name]["second"]
        axes.plot([honest, leaky], [y, y], color=PALE, lw=5, solid_capstyle="round", zorder=1)
        for x, color, label in ((honest, BLUE, names[1]), (leaky, VERMILION, names[0])):
            axes.scatter(x, y, 52, color=color, clip_on=False, zorder=2, label=None if y else label)
    axes.set_yticks(range(len(shown)), [measures[name] for name in shown])
    axes.set(title="What leaks", xlim=(0, 1.01), ylim=(len(shown) - 0.5, -0.5))
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=PERCENT))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    legend_above(axes)
    return figure
