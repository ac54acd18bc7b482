"""Style of all figures, and those of a training, a test and an archive; without pyplot's global state."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from bcd.metrics import measures
from bcd.reports import style
from bcd.reports.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PERCENT,
    PURPLE,
    SKY,
    SOFT,
    VERMILION,
    WARN,
)
from bcd.taxonomy import BENIGN, MALIGNANT, SUBTYPES, TUMOR_CLASSES
from bcd.text import counted

BLUES = LinearSegmentedColormap.from_list("blues", ["#f4f8fb", SKY, BLUE])
# On a page, text takes the colours of the page, light or dark.
ON_PAGE = {INK: "currentColor", SOFT: "var(--soft)", WARN: "var(--warn)"}
MIXED = "mixed"
CLASS_COLOR = {BENIGN: BLUE, MALIGNANT: VERMILION, MIXED: PURPLE}
PART_COLOR = {"train": BLUE, "validation": SKY, "test": ORANGE}
UPSAMPLED = "upsampled"
# Bars of each magnification: offset, metric, label, colour.
BARS = ((-0.2, "accuracy", "of images", BLUE), (0.2, "patient_recognition_rate", "of patients", SKY))
WIDTH_IN = 5.4
DASHED = (0, (4, 3))
# Share of the figure's width beside the labels of the vertical axis.
LEGEND_WIDTH = 0.82
PNG_DPI = 200
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # a $ in a patient's id is a $
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # text stays text: searchable, and in the font of the page
    "svg.hashsalt": "bcd",  # the same figure gives the same bytes
}


def mark(figure: Figure, marks: Sequence[str]) -> None:
    """Write warnings such as "synthetic data" over a figure."""
    if marks:
        figure.suptitle(" · ".join(marks).upper(), x=0.99, ha="right", size=8, weight="bold", color=WARN)


def svg(figure: Figure) -> str:
    """A figure as an SVG file; equal figures give equal text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()


def inline(svg: str, name: str) -> Markup:
    """Prepare an SVG file for a page: no declarations, unique ids, the colours of the page."""
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{name.replace("_", " ")}"', 1)
    svg = svg.replace("fill: #ffffff", "fill: none", 1)  # the first white is the paper
    for color, own in ON_PAGE.items():
        svg = svg.replace(color, own)
    return Markup(svg)


def canvas(height_in: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with `rows` panels, one above the other."""
    figure = Figure(figsize=(WIDTH_IN, height_in), layout=ConstrainedLayoutEngine(hspace=0.08))
    return figure, list(figure.subplots(rows, squeeze=False)[:, 0])


def percent_axis(axes: Axes, label: str) -> None:
    """Set the vertical axis to 0 to 100 %."""
    axes.set(ylim=(0, 1.02), ylabel=label, yticks=np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=PERCENT))
    axes.grid(axis="y")


def legend_above(axes: Axes) -> None:
    """Place the legend between the data and the title, which must be set before; it overlaps neither."""
    n = len(axes.get_legend_handles_labels()[0])
    for columns in range(n, 0, -1):
        legend = axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=columns, borderaxespad=0.3)
        size = legend.get_window_extent()
        if size.width < LEGEND_WIDTH * axes.figure.bbox.width or columns == 1:
            pad_pt = 72 / axes.figure.dpi * size.height + 5
            axes.set_title(axes.get_title(loc="left"), pad=pad_pt)
            break


def history_panels(
    histories: Sequence[Sequence[Mapping[str, Any]]], **look: Any
) -> tuple[Figure, Axes, Axes]:
    """Two panels over the epochs, loss and validation balanced accuracy, with a line for each history."""
    figure, (loss, rate) = canvas(4.8, rows=2)
    for number, records in enumerate(histories):
        epochs = [row["epoch"] for row in records]
        for axes, key, label, color in (
            (loss, "train_loss", "training", ORANGE),
            (loss, "validation_loss", "validation", BLUE),
            (rate, "validation_balanced_accuracy", "validation", BLUE),
        ):
            values = [row[key] for row in records]
            axes.plot(epochs, values, color=color, label=None if number else label, **look)
    for axes in (loss, rate):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    loss.set_ylabel("cross-entropy per image")
    loss.grid(axis="y")
    rate.set_xlabel("epoch")
    percent_axis(rate, "on validation")
    return figure, loss, rate


def plot_history(records: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> Figure:
    """Loss and balanced accuracy over the epochs, with the best epoch marked."""
    figure, loss, rate = history_panels([records], marker="o", ms=3.5)
    epochs = [row["epoch"] for row in records]
    for axes in (loss, rate):
        axes.axvline(best["epoch"], color=GREEN, ls=DASHED, lw=1.2, label="best epoch", zorder=0)
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    # Leaves room for half a dot above the highest.
    highest = max(max(row["train_loss"], row["validation_loss"]) for row in records)
    loss.set(title="Loss", ylim=(0, 1.06 * highest))
    legend_above(loss)
    reached = style.format_metric(best["validation_balanced_accuracy"])
    rate.set_title(f"Balanced accuracy, best {reached} at epoch {best['epoch']}")
    return figure


def plot_confusion_matrix(
    matrix: Sequence[Sequence[int]], names: Sequence[str], unit: str = "image"
) -> Figure:
    """Counts and shares of the row; rows are the truth, columns the prediction."""
    counts = np.array(matrix)
    rows = counts.sum(axis=1)
    shares = counts / np.maximum(rows, 1)[:, None]
    k = len(names)
    height_in, size = (4.2, 13) if k == 2 else (5.0, 7.5)
    figure, (axes,) = canvas(height_in)
    axes.pcolormesh(shares, cmap=BLUES, vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    for (row, column), share in np.ndenumerate(shares):
        ink = style.ink_on(to_hex(BLUES(float(share))))
        count = f"{counts[row, column]:,}"
        text = f"{count}\n{100 * share:.0f}{PERCENT}" if rows[row] else count
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, size=size)
    title = f"Confusion matrix, n = {counted(counts.sum(), unit)}"
    axes.set(title=title, xlabel="predicted", ylabel="truth")
    axes.set_xticks(np.arange(k) + 0.5, names)
    axes.set_yticks(np.arange(k) + 0.5, [f"{name}\nn = {n:,}" for name, n in zip(names, rows, strict=True)])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def plot_class_distribution(parts: Mapping[str, Mapping[str, int]], balanced: Mapping[str, int]) -> Figure:
    """Images per class in each part as collected, and training rows per class after balancing."""
    found = {name for counts in (*parts.values(), balanced) for name in counts}
    names = [name for name in (*TUMOR_CLASSES, *SUBTYPES) if name in found]
    figure, panels = canvas(max(3.8, 2.0 + 0.4 * len(names)), rows=2)
    total = _stack(panels[0], names, parts)
    panels[0].set(title=f"As collected, n = {total:,}", xlabel="images")
    train = parts.get("train", {})
    extra = {name: max(0, balanced.get(name, 0) - train.get(name, 0)) for name in names}
    total = _stack(panels[1], names, {"train": train, UPSAMPLED: extra})
    panels[1].set(title=f"After balancing, n = {total:,}", xlabel="training rows per epoch")
    for axes in panels:
        legend_above(axes)
    return figure


def _stack(axes: Axes, names: Sequence[str], layers: Mapping[str, Mapping[str, int]]) -> int:
    """Draw stacked horizontal bars, one per class, and return their sum."""
    left = np.zeros(len(names), int)
    for label, counts in layers.items():
        width = np.array([counts.get(name, 0) for name in names])
        bars = axes.barh(names, width, 0.72, left, label=label, color=PART_COLOR.get(label, GREY))
        if label == UPSAMPLED:
            for bar in bars:
                bar.set(facecolor="none", edgecolor=BLUE, hatch="////")
        left += width
    for y, end in enumerate(left):
        axes.annotate(f"{end:,}", (end, y), (4, 0), textcoords="offset points", va="center", size=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(1, *left))
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return int(left.sum())


def plot_by_magnification(metrics: Mapping[str, Any]) -> Figure:
    """Recognition rates with intervals, per magnification and pooled."""
    groups = {f"{name}X": values for name, values in metrics["by_magnification"].items()}
    groups["pooled"], unit = metrics["pooled"], measures.unit(metrics)
    figure, (axes,) = canvas(3.9)
    for offset, name, label, color in BARS:
        known = {x + offset: row for x, row in enumerate(groups.values()) if row[name] is not None}
        for x, row in known.items():
            axes.bar(x, row[name], width=0.38, color=color)
            axes.text(x, 0.02, f"{100 * row[name]:.0f}", ha="center", size=7.5, color=style.ink_on(color))
            if row["intervals"][name]:
                axes.vlines(x, *row["intervals"][name], color=INK, lw=1.4)
        axes.bar(0, 0, color=color, label=label)
    axes.set_xticks(range(len(groups)), [_sizes(name, row, unit) for name, row in groups.items()])
    axes.tick_params(axis="x", length=0, labelsize=8)
    axes.set_title("By magnification")
    percent_axis(axes, "recognition rate")
    legend_above(axes)
    return figure


def _sizes(name: str, row: Mapping[str, Any], unit: str) -> str:
    patients = "" if row["n_patients"] is None else f"\n{counted(row['n_patients'], 'patient')}"
    return f"{name}\n{counted(row['n'], unit)}{patients}"


def plot_probabilities(values: np.ndarray, threshold: float) -> Figure:
    """Histogram of probabilities of malignancy (n,), in the colour of the class that each is called."""
    edges = np.linspace(0, 1, 51)
    called = values >= threshold
    counts = [np.histogram(values[mask], edges)[0] for mask in (~called, called)]
    figure, (axes,) = canvas(3.1)
    below = np.zeros(50, int)
    for name, count in zip(TUMOR_CLASSES, counts, strict=True):
        label, color = f"called {name}", CLASS_COLOR[name]
        axes.bar(edges[:-1], count, 0.0184, below, align="edge", color=color, label=label)
        below = below + count
    axes.axvline(threshold, color=INK, ls=DASHED, lw=1, label=f"threshold {threshold:.2g}")
    axes.set(xlim=(0, 1), ylim=(0, 1.04 * max(1, *below)))
    axes.set(xlabel="probability of malignancy", ylabel=f"images (n = {len(values):,})")
    axes.grid(axis="y")
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    legend_above(axes)
    return figure
