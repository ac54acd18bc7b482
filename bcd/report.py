"""What a model reaches, as pictures: one self-contained HTML page, and each figure as PNG and SVG.

A new figure costs two edits: a function in `figures` that is called in `_draw`, and its place in the
template. Marks (synthetic, leaky) are put on every figure and every block of the page from one place.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import pandas as pd
import pyarrow as pa
from markupsafe import Markup
from matplotlib.figure import Figure

from bcd import aggregate, figures, schema
from bcd.figures import PERCENT
from bcd.taxonomy import SUBTYPES, TUMOR_CLASSES

# As `metrics.evaluate` gives them, a record per epoch, and what is known about the run: see `write`.
Metrics = Mapping[str, Any]
History = Sequence[Mapping[str, Any]]
Facts = Mapping[str, Any]

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
    patients = patients.fillna({schema.TUMOR_CLASS: figures.MIXED})
    folder = directory / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(figures.STYLE):
        drawn = _draw(metrics, history, images, patients, facts)
        plates = {name: _save(figure, folder / name, _marks(facts)) for name, figure in drawn.items()}
    page = directory / "report.html"
    page.write_text(_page(metrics, history, predictions, patients, facts, plates), encoding="utf-8")
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
    plates: Mapping[str, Markup],
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
        figures=plates,
    )


def _best(history: History, facts: Facts) -> Mapping[str, Any] | None:
    """The record of the epoch that the bundle holds: as told, else the first best on validation."""
    told = [row for row in history if row["epoch"] == facts.get("best_epoch")]
    return max(told or history, key=lambda row: row["validation_balanced_accuracy"], default=None)


def _save(figure: Figure, path: Path, marks: Sequence[str]) -> Markup:
    """Write PNG and SVG files and return the SVG for the inside of a page."""
    figures.mark(figure, marks)
    figure.savefig(path.with_suffix(".png"), dpi=figures.PNG_DPI, metadata={"Software": None})
    path.with_suffix(".svg").write_text(svg := figures.svg(figure), encoding="utf-8")
    return figures.inline(svg, path.name)


def _draw(
    metrics: Metrics, history: History, images: pd.DataFrame, patients: pd.DataFrame, facts: Facts
) -> dict[str, Figure]:
    """Every figure that there is data for, by the name of its file."""
    pooled = metrics["pooled"]
    drawn = {"confusion_matrix": figures.confusion_matrix(pooled["confusion_matrix"], TUMOR_CLASSES)}
    if best := _best(history, facts):
        drawn["history"] = figures.history(history, best)
    if facts.get("parts"):
        drawn["class_distribution"] = figures.class_distribution(facts["parts"], facts.get("balanced") or {})
    if pooled["auc"] is not None:
        drawn["roc"] = figures.roc(images, metrics)
    if metrics["by_magnification"]:
        drawn["by_magnification"] = figures.by_magnification(metrics)
    if len(patients):
        drawn["patients"] = figures.patients(patients)
    if many := metrics.get("multiclass"):
        matrix = many["confusion_matrix"]
        drawn["confusion_matrix_subtype"] = figures.confusion_matrix(matrix, many["class_names"])
    return drawn
