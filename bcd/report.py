"""What a model reaches, as pictures: one self-contained HTML page, and each figure as PNG and SVG.

A new figure costs two edits: a function here that returns it, named in `_draw`, and its place in the
template. Marks (synthetic, leaky) are put on every figure and every block of the page from one place.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import pandas as pd
import pyarrow as pa
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter
from sklearn.metrics import roc_curve

from bcd import aggregate, schema
from bcd.taxonomy import BENIGN, MALIGNANT, SUBTYPES, TUMOR_CLASSES

# As `metrics.evaluate` gives them, a record per epoch, and what is known about the run: see `write`.
Metrics = Mapping[str, Any]
History = Sequence[Mapping[str, Any]]
Facts = Mapping[str, Any]

# Okabe and Ito 2008, "Color Universal Design": told apart under every common colour blindness.
BLUE, SKY, GREEN = "#0072b2", "#56b4e9", "#009e73"
ORANGE, VERMILION, PURPLE = "#e69f00", "#d55e00", "#cc79a7"
BLUES = LinearSegmentedColormap.from_list("blues", ["#f4f8fb", SKY, BLUE])
INK = "#1f2328"  # inside the page this becomes the colour of the text, light or dark
GREY, PALE = "#8c959f", "#8c959f66"
MIXED = "mixed"
CLASS_COLOR = {BENIGN: BLUE, MALIGNANT: VERMILION, MIXED: PURPLE}
PART_COLOR = {"train": BLUE, "validation": SKY, "test": ORANGE}
UPSAMPLED = "upsampled"
# Bars of each magnification: offset, metric, label, colour, and the colour of the number inside.
BARS = (
    (-0.2, "accuracy", "of images", BLUE, "white"),
    (0.2, "patient_recognition_rate", "of patients", SKY, "black"),
)
PERCENT = "\N{NO-BREAK SPACE}%"
WIDTH_IN = 5.4
PNG_DPI = 200
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a patient's id is a $
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlepad": 9,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",  # text stays text: searchable, and in the font of the page
    "svg.hashsalt": "bcd",  # the same figure gives the same bytes
}

MEASURES = {
    "balanced_accuracy": "balanced accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "auc": "AUC",
    "accuracy": "image recognition rate",
    "patient_recognition_rate": "patient recognition rate",
}


def write(
    directory: Path, metrics: Metrics, history: History, predictions: pd.DataFrame | pa.Table, facts: Facts
) -> Path:
    """Write `report.html` and `figures/*.png`, `*.svg` below a local directory.

    Args:
        directory: is made if it does not exist.
        metrics: from `metrics.evaluate`.
        history: a record per epoch (epoch, train_loss, validation_loss, validation_balanced_accuracy,
            validation_accuracy, learning_rate, seconds, images_per_s, class_counts); may be empty.
        predictions: the rows that `metrics` was made from.
        facts: what is known about the run, all optional: title, model_id, data, protocol, fold, seed,
            weights, synthetic, leaky, warnings, broken, quarantined, best_epoch, command, git_commit,
            versions, data_fingerprint, split_fingerprint, `parts` (images per class in each part) and
            `balanced` (training rows per class after upsampling).

    Returns:
        Path of the page; it refers to nothing outside itself.
    """
    images = aggregate.images(predictions, metrics["threshold"])
    patients = aggregate.groups(images, schema.PATIENT, metrics["threshold"])
    patients = patients.fillna({schema.TUMOR_CLASS: MIXED})
    folder = directory / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        drawn = _draw(metrics, history, images, patients, facts)
        figures = {name: _save(figure, folder / name, _marks(facts)) for name, figure in drawn.items()}
    page = directory / "report.html"
    page.write_text(_page(metrics, history, predictions, patients, facts, figures), encoding="utf-8")
    return page


def summary(metrics: Metrics) -> list[tuple[str, str, str]]:
    """Name, value and 95 % interval of the main metrics, as text; a dash where one is undefined."""
    pooled = metrics["pooled"]
    return [
        (label, _value(pooled[name], name), _interval(pooled["intervals"][name], name))
        for name, label in MEASURES.items()
    ]


def summary_lines(metrics: Metrics) -> list[str]:
    """`summary` as a table for a terminal."""
    patients = "patients unknown" if metrics["n_patients"] is None else f"{metrics['n_patients']:,} patients"
    title = f"test part: {metrics['n_images']:,} images, {patients}, {metrics['n_errors']:,} not scored"
    rows = [("", "value", "95 % interval over patients"), *summary(metrics)]
    return [title, *(f"  {label:26} {value:>8}   {interval}".rstrip() for label, value, interval in rows)]


def _value(value: float | None, name: str = "") -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if name == "auc" else f"{100 * value:.1f}{PERCENT}"


def _interval(interval: Sequence[float] | None, name: str = "") -> str:
    if interval is None:
        return "–"
    low, high = (_value(end, name) for end in interval)
    return f"{low.removesuffix(PERCENT)} to {high}"


def _marks(facts: Facts) -> list[str]:
    """What a reader must know before believing any number here."""
    marks = {"synthetic": "synthetic data", "leaky": "leaky: patients stand on both sides"}
    return [text for name, text in marks.items() if facts.get(name)]


def _page(
    metrics: Metrics,
    history: History,
    predictions: pd.DataFrame | pa.Table,
    patients: pd.DataFrame,
    facts: Facts,
    figures: Mapping[str, Markup],
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bcd"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"value": _value, "interval": _interval}
    pooled = metrics["pooled"]
    return environment.get_template("report.html").render(
        metrics=metrics,
        pooled=pooled,
        measures=MEASURES,
        main="accuracy" if pooled["balanced_accuracy"] is None else "balanced_accuracy",
        history=history,
        best=_best(history, facts),
        patients=patients.sort_values(aggregate.SHARE_CORRECT, kind="stable").to_dict("records"),
        errors=aggregate.unscored(predictions).to_dict("records"),
        subtypes={code: subtype.name.replace("_", " ") for code, subtype in SUBTYPES.items()},
        facts=defaultdict(lambda: None, facts),
        marks=_marks(facts),
        figures=figures,
    )


def _best(history: History, facts: Facts) -> Mapping[str, Any] | None:
    """The record of the epoch that the bundle holds: as told, else the first best on validation."""
    told = [row for row in history if row["epoch"] == facts.get("best_epoch")]
    return max(told or history, key=lambda row: row["validation_balanced_accuracy"], default=None)


def _save(figure: Figure, path: Path, marks: Sequence[str]) -> Markup:
    """Write PNG and SVG files and return the SVG for the inside of a page."""
    if marks:
        figure.suptitle(" · ".join(marks).upper(), x=0.99, ha="right", size=8, weight="bold", color=VERMILION)
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(path.with_suffix(".png"), dpi=PNG_DPI, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata=nothing)
    return _inline(path.with_suffix(".svg").read_text(encoding="utf-8"), path.name)


def _inline(svg: str, name: str) -> Markup:
    """Make a stand-alone SVG fit for a page: no declarations, ids of its own, the colours of the page."""
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{name.replace("_", " ")}"', 1)
    svg = svg.replace("fill: #ffffff", "fill: none", 1)  # the first white is the paper
    return Markup(svg.replace(INK, "currentColor"))


def _draw(
    metrics: Metrics, history: History, images: pd.DataFrame, patients: pd.DataFrame, facts: Facts
) -> dict[str, Figure]:
    """Every figure that there is data for, by the name of its file."""
    figures = {"confusion_matrix": _confusion_matrix(metrics["pooled"]["confusion_matrix"], TUMOR_CLASSES)}
    if best := _best(history, facts):
        figures["history"] = _history(history, best)
    if facts.get("parts"):
        figures["class_distribution"] = _class_distribution(facts["parts"], facts.get("balanced") or {})
    if metrics["pooled"]["auc"] is not None:
        figures["roc"] = _roc(images, metrics)
    if metrics["by_magnification"]:
        figures["by_magnification"] = _magnification(metrics)
    if len(patients):
        figures["patients"] = _patients(patients)
    if many := metrics.get("multiclass"):
        figures["confusion_matrix_subtype"] = _confusion_matrix(many["confusion_matrix"], many["class_names"])
    return figures


def _canvas(height_in: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with `rows` panels, one above the other. No pyplot: nothing global, nothing to close."""
    figure = Figure(figsize=(WIDTH_IN, height_in), layout=ConstrainedLayoutEngine(hspace=0.08))
    return figure, list(figure.subplots(rows, squeeze=False)[:, 0])


def _percent_axis(axes: Axes, label: str) -> None:
    axes.set(ylim=(0, 1.02), ylabel=label, yticks=np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=PERCENT))
    axes.grid(axis="y")


def _legend_above(axes: Axes) -> None:
    axes.legend(loc="lower right", bbox_to_anchor=(1.01, 1), ncols=4, borderaxespad=0.3)


def _history(history: History, best: Mapping[str, Any]) -> Figure:
    figure, (loss, rate) = _canvas(4.8, rows=2)
    epochs = [row["epoch"] for row in history]
    for axes, key, label, color in (
        (loss, "train_loss", "training", ORANGE),
        (loss, "validation_loss", "validation", BLUE),
        (rate, "validation_balanced_accuracy", "validation", BLUE),
    ):
        axes.plot(epochs, [row[key] for row in history], color=color, label=label, marker="o", ms=3.5)
    for axes in (loss, rate):
        axes.axvline(best["epoch"], color=GREEN, ls=(0, (4, 3)), lw=1.2, label="best epoch", zorder=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    loss.set(title="Loss", ylabel="cross-entropy per image", ylim=(0, None))
    loss.grid(axis="y")
    _legend_above(loss)
    reached = _value(best["validation_balanced_accuracy"])
    rate.set(title=f"Balanced accuracy, best {reached} at epoch {best['epoch']}", xlabel="epoch")
    _percent_axis(rate, "on validation")
    return figure


def _confusion_matrix(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    counts = np.array(matrix)
    rows = counts.sum(axis=1)
    shares = counts / np.maximum(rows, 1)[:, None]
    k = len(names)
    height_in, size = (4.2, 13) if k == 2 else (5.0, 7.5)
    figure, (axes,) = _canvas(height_in)
    axes.pcolormesh(shares, cmap=BLUES, vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    for (row, column), share in np.ndenumerate(shares):
        ink = "white" if share > 0.6 else "black"
        count = f"{counts[row, column]:,}"
        text = f"{count}\n{100 * share:.0f}{PERCENT}" if rows[row] else count
        axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, size=size)
    axes.set(title=f"Confusion matrix, n = {counts.sum():,} images", xlabel="predicted", ylabel="truth")
    axes.set_xticks(np.arange(k) + 0.5, names)
    axes.set_yticks(np.arange(k) + 0.5, [f"{name}\nn = {n:,}" for name, n in zip(names, rows, strict=True)])
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _class_distribution(parts: Mapping[str, Mapping[str, int]], balanced: Mapping[str, int]) -> Figure:
    found = {name for counts in (*parts.values(), balanced) for name in counts}
    names = [name for name in (*TUMOR_CLASSES, *SUBTYPES) if name in found]
    figure, panels = _canvas(max(3.8, 2.0 + 0.4 * len(names)), rows=2)
    total = _stack(panels[0], names, parts)
    panels[0].set(title=f"As collected, n = {total:,}", xlabel="images")
    train = parts.get("train", {})
    extra = {name: max(0, balanced.get(name, 0) - train.get(name, 0)) for name in names}
    total = _stack(panels[1], names, {"train": train, UPSAMPLED: extra})
    panels[1].set(title=f"After balancing, n = {total:,}", xlabel="training rows per epoch")
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
    _legend_above(axes)
    return int(left.sum())


def _roc(images: pd.DataFrame, metrics: Metrics) -> Figure:
    pooled = metrics["pooled"]
    truth = images[schema.TUMOR_CLASS] == MALIGNANT
    false_positive, true_positive, _ = roc_curve(truth, images[schema.PROBABILITY_MALIGNANT])
    figure, (axes,) = _canvas(4.2)
    axes.plot([0, 1], [0, 1], color=GREY, ls=(0, (4, 3)), lw=1.2, label="chance")
    axes.plot(false_positive, true_positive, color=BLUE, label=f"AUC {pooled['auc']:.3f}")
    used = f"threshold {metrics['threshold']:.2g}"
    point = 1 - pooled["specificity"], pooled["sensitivity"]
    axes.scatter(*point, s=50, color=VERMILION, clip_on=False, zorder=3, label=used)
    axes.set(title=f"ROC, n = {pooled['n']:,} images", xlim=(0, 1), xlabel="1 − specificity")
    _percent_axis(axes, "sensitivity")
    axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=PERCENT))
    axes.set_aspect("equal")
    axes.legend(loc="lower right")
    return figure


def _magnification(metrics: Metrics) -> Figure:
    groups = {f"{name}X": values for name, values in metrics["by_magnification"].items()}
    groups["pooled"] = metrics["pooled"]
    figure, (axes,) = _canvas(3.9)
    for offset, name, label, color, ink in BARS:
        for x, values in enumerate(groups.values()):
            _bar(axes, x + offset, values[name], values["intervals"][name], color, ink)
        axes.bar(0, 0, color=color, label=label)
    axes.set_xticks(range(len(groups)), [_sizes(label, values) for label, values in groups.items()])
    axes.tick_params(axis="x", length=0, labelsize=8)
    axes.set_title("By magnification")
    _percent_axis(axes, "recognition rate")
    _legend_above(axes)
    return figure


def _sizes(label: str, values: Mapping[str, Any]) -> str:
    patients = "" if values["n_patients"] is None else f"\n{values['n_patients']:,} patients"
    return f"{label}\n{values['n']:,} images{patients}"


def _bar(
    axes: Axes, x: float, value: float | None, interval: Sequence[float] | None, color: str, ink: str
) -> None:
    if value is None:
        return
    axes.bar(x, value, width=0.38, color=color)
    axes.text(x, 0.02, f"{100 * value:.0f}", ha="center", size=7.5, color=ink)
    if interval:
        axes.vlines(x, interval[0], interval[1], color=INK, lw=1.4)


def _patients(patients: pd.DataFrame) -> Figure:
    kind = patients[schema.TUMOR_CLASS]
    figure, (axes,) = _canvas(3.9)
    start, ticks = 0, dict[int, str]()
    for name, color in CLASS_COLOR.items():
        group = patients[kind == name].sort_values(aggregate.SHARE_CORRECT, kind="stable")
        if group.empty:
            continue
        x, share = np.arange(len(group)) + start, group[aggregate.SHARE_CORRECT].to_numpy()
        axes.bar(x, share, color=color, label=f"{name} (n = {len(group):,})")
        axes.bar(x, 1 - share, bottom=share, color=PALE)
        ticks |= dict(zip(x.tolist(), group[schema.PATIENT].str.slice(0, 16), strict=True))
        start = int(x[-1]) + 2
    axes.set_xlim(-1, max(start - 1, 9))
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=90, size=7)
    axes.tick_params(axis="x", length=0, labelbottom=len(ticks) <= 36)
    axes.set_title(f"Patients, n = {len(patients):,}")
    _percent_axis(axes, "images classified correctly")
    _legend_above(axes)
    return figure
