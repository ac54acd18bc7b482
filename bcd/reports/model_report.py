"""The report of an evaluation: one self-contained HTML page, and each figure as PNG and SVG.

A new figure requires two edits: a function in `plots` or `trust_plots` that `_draw` calls, and its place in
the template. Marks (synthetic, leaky) are put on every figure and every block of the page from one place.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from bcd import schema
from bcd.config.options import CLOSED_FORM
from bcd.metrics import aggregate, decision, measures
from bcd.model import novelty
from bcd.reports import overlay, style, thumbnails
from bcd.reports.style import PERCENT, format_certainty, format_difference, format_metric, too_few_to_say
from bcd.reports.thumbnails import Example
from bcd.taxonomy import BENIGN, MALIGNANT, SUBTYPES, TUMOR_CLASSES
from bcd.text import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# See `write_report`.
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
# Warnings on every number of the report, by fact.
MARKS = {
    "synthetic": "synthetic data",
    "leaky": "leaky: patients in several parts",
    "forced": "forced: may have been trained on",
}
# More wrong predictions would make the page too large for a browser; the table has all.
MAX_WRONG = 200
N_CLEAREST, N_CORRECT = 3, 12
# Of a class, for a headline: the intervals of fewer say little.
MIN_PATIENTS = 3
# Of a class, at 90 %: an interval of 10 points to each side if one patient counts for one image.
ENOUGH_PATIENTS = 35
PICTURE_WIDTH_PX = 300


def write_report(
    directory: Path,
    measured: Metrics,
    history: History,
    images: pd.DataFrame,
    facts: Facts,
    examples: Mapping[int, Example] = MappingProxyType({}),
    unscored: Sequence[Mapping[str, str]] = (),
) -> Path:
    """Write `report.html` and `figures/*.png`, `*.svg` into a local directory; returns the path of the page.

    Args:
        directory: created if it does not exist.
        measured: from `metrics.measure`; with `n_errors`, and optionally `threshold`, `temperature` and
            `operating_point` as on the card, `folds`, `spread` and `leak` of a cross-validation, and
            `comparison` with another model.
        history: a record per epoch (epoch, train_loss, validation_loss, validation_balanced_accuracy,
            validation_accuracy, learning_rate, seconds, images_per_s, class_counts); may be empty.
        images: from `aggregate.image_table`.
        facts: about the run, all optional: title, model_id, data, protocol, held_out, left_out, fold, seed,
            target, weights, synthetic, leaky, forced, external, published, warnings, broken, quarantined,
            best_epoch, command, git_commit, versions, data_fingerprint, split_fingerprint, input_size_px
            (height and width, which the evidence covers), `parts` (images per class in each part) and
            `balanced` (training rows per class after upsampling).
        examples: by position in `images`, for the positions of `choose_examples`.
        unscored: `image_id` and `error` of what could not be scored.
    """
    import matplotlib  # takes seconds with all figures; a job that only needs the sentences does without

    from bcd.reports import plots

    patients = aggregate.groups(images, schema.PATIENT).fillna({schema.TUMOR_CLASS: plots.MIXED})
    folder = directory / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(plots.STYLE):
        drawn = _draw(measured, history, images, patients, facts)
        plates = {name: _save(figure, folder / name, _marks(facts)) for name, figure in drawn.items()}
    page = directory / "report.html"
    shown = _pictures(images, choose_examples(images), examples, facts)
    page.write_text(_page(measured, history, patients, unscored, facts, plates, shown), encoding="utf-8")
    return page


@dataclass(frozen=True)
class Choice:
    """The images to show, as positions in the table."""

    wrong: list[int]
    clearest: list[int]
    correct: list[int]

    def all(self) -> list[int]:
        """Every position once."""
        return sorted({*self.wrong, *self.clearest, *self.correct})


def choose_examples(images: pd.DataFrame) -> Choice:
    """Choose the images that the report shows, from `aggregate.image_table`.

    Returns:
        `wrong`: all wrong predictions, at most `MAX_WRONG`, patients with most of them first, within a
        patient the most certain first; `clearest`: the `N_CLEAREST` most certain correct ones of each class;
        `correct`: a random sample of the other correct ones, at most `N_CORRECT`.
    """
    correct = images[aggregate.CORRECT].to_numpy(bool)
    sure = images[aggregate.MARGIN].abs().to_numpy()
    patient = images[schema.PATIENT].astype(object).fillna("").to_numpy(str)
    n_wrong = pd.Series(~correct).groupby(patient).transform("sum").to_numpy()
    order = np.lexsort((-sure, patient, -n_wrong))
    clearest: list[int] = []
    for name in TUMOR_CLASSES:
        rows = np.flatnonzero(correct & (images[schema.TUMOR_CLASS] == name).to_numpy())
        clearest += rows[np.argsort(-sure[rows], kind="stable")][:N_CLEAREST].tolist()
    rest = np.setdiff1d(np.flatnonzero(correct), clearest)
    sample = np.random.Generator(np.random.PCG64(0)).permutation(rest)[:N_CORRECT]
    return Choice(order[~correct[order]][:MAX_WRONG].tolist(), clearest, sorted(sample.tolist()))


def _pictures(
    images: pd.DataFrame, choice: Choice, examples: Mapping[int, Example], facts: Facts
) -> dict[str, Any]:
    """The chosen images for which there is an example, drawn on the scale of all pages; on their own where
    the values have no unit."""
    closed = facts.get("evidence") in (None, CLOSED_FORM)
    limit = overlay.LIMIT if closed else overlay.scale(one.evidence for one in examples.values())
    look = limit, facts.get("input_size_px"), PICTURE_WIDTH_PX
    drawn = {
        place: thumbnails.draw_example(examples[place], *look) | {"row": images.iloc[place].to_dict()}
        for place in choice.all()
        if place in examples
    }
    patient = images[schema.PATIENT].astype(object).fillna("").to_numpy(str)
    wrong: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for place in choice.wrong:
        if place in drawn:
            wrong[patient[place]].append(drawn[place])
    return {
        "n_wrong": int((~images[aggregate.CORRECT]).sum()),
        "wrong": wrong,
        "clearest": [drawn[place] for place in choice.clearest if place in drawn],
        "correct": [drawn[place] for place in choice.correct if place in drawn],
        "closed": closed,
        "limit": limit,
        "legend": thumbnails.data_uri(overlay.legend(), "PNG"),
    }


def summary(measured: Metrics) -> list[tuple[str, str, str]]:
    """Name, value and 95 % interval of the main metrics, as text; a dash where one is undefined, and
    "2 patients: too few to say" in place of an interval of so few."""
    pooled = measured["pooled"]
    return [
        (label, format_metric(pooled[name], name), format_certainty(pooled, name))
        for name, label in MEASURES.items()
    ]


def too_few_patients(measured: Metrics) -> str | None:
    """A sentence where there are too few patients for a headline; None otherwise, or without patient ids."""
    by_class = measured["patients_by_class"]
    if by_class is None or min(by_class.values()) >= MIN_PATIENTS:
        return None
    last = counted(by_class[MALIGNANT], f"{MALIGNANT} patient")
    return (
        f"{by_class[BENIGN]:,} {BENIGN} and {last} are too few to say how often the model is right on "
        f"others: a headline requires {MIN_PATIENTS} of each class, and an interval of 10 points to each "
        f"side some {ENOUGH_PATIENTS}"
    )


def summary_lines(measured: Metrics) -> list[str]:
    """`summary` as a table for a terminal, with the spread over folds where there are any."""
    n_patients = measured["n_patients"]
    patients = "patients unknown" if n_patients is None else counted(n_patients, "patient")
    images = counted(measured["n_images"], "image")
    if measures.unit(measured) != "image":
        patients += f", {counted(measured['n_judgements'], measures.unit(measured))}"
    title = f"test part: {images}, {patients}, {measured['n_errors']:,} not scored"
    if unlike := (measured.get("warnings") or {}).get(novelty.CODE):
        title += f", {unlike:,} unlike the training data"
    title += "".join(f" [{mark}]" for mark in _marks(measured))
    rows = [("", "value", "95 % interval over patients"), *summary(measured)]
    last = [""] * len(rows)
    if measured.get("spread"):
        last = ["mean ± SD of folds", *(_spread(measured, name) for name in MEASURES)]
    lines = [f"  {a:26} {b:>8}   {c:28} {d}".rstrip() for (a, b, c), d in zip(rows, last, strict=True)]
    few = too_few_patients(measured)
    return [title, *([f"  {_headline(measured)}: {few}"] if few else []), *lines]


def _headline(measured: Metrics) -> str:
    """What replaces the main number where there are too few patients."""
    return too_few_to_say(min(measured["patients_by_class"].values()))


def leak_sentence(leak: Mapping[str, Any]) -> str:
    """What the same model appears to gain when patients are in several parts, in words.

    It states the AUC too, which does not depend on thresholds: these are chosen on few validation images and
    vary more than a leak adds.
    """
    rows = {name: leak["metrics"][name] for name in ("balanced_accuracy", "auc")}
    known = {name: row for name, row in rows.items() if row["difference"] is not None}
    if not known:
        return "The effect of a leak is undefined: a class is missing."
    seen = [name for name, row in known.items() if row["interval"] and row["interval"][0] > 0]
    added = " and ".join(f"{_gain(known[name]['difference'], name)} of {MEASURES[name]}" for name in seen)
    reached = " and ".join(_reached(row, name) for name, row in known.items())
    start = f"The leak adds {added}" if seen else "No effect of a leak is seen"
    how = f"split by {leak['leaky']}, with patients in several parts"
    return f"{start}: {how}, the same model appears to reach {reached}."


def _reached(row: Mapping[str, Any], name: str) -> str:
    first, second = format_metric(row["first"], name), format_metric(row["second"], name)
    if not row["interval"]:
        return f"{first} {MEASURES[name]} instead of {second}"
    low, high = format_difference(row["interval"][0], name), _gain(row["interval"][1], name)
    interval = f"95{PERCENT} interval of the difference {low} to {high}"
    return f"{first} {MEASURES[name]} instead of {second} ({interval})"


def _gain(difference: float, name: str) -> str:
    return format_difference(difference, name) + ("" if name == "auc" else " points")


def _spread(measured: Metrics, name: str) -> str:
    """Mean and standard deviation of a metric over the folds."""
    row = measured["spread"][name]
    if row["mean"] is None:
        return "–"
    deviation = "" if row["sd"] is None else f" ± {format_metric(row['sd'], name)}"
    # A fold of one class has no balanced accuracy.
    n_folds = len(measured["folds"])
    some = "" if row["n"] == n_folds else f" ({row['n']} of {n_folds} folds)"
    return f"{format_metric(row['mean'], name).removesuffix(PERCENT)}{deviation}{some}"


def _marks(facts: Facts) -> list[str]:
    return [text for name, text in MARKS.items() if facts.get(name)]


def _page(
    measured: Metrics,
    history: History,
    patients: pd.DataFrame,
    unscored: Sequence[Mapping[str, str]],
    facts: Facts,
    plates: Mapping[str, Markup],
    pictures: Mapping[str, Any],
) -> str:
    pooled = measured["pooled"]
    return style.render(
        "report.html",
        metrics=defaultdict(lambda: None, measured),
        pooled=pooled,
        unit=measures.unit(measured),
        measures=MEASURES,
        too_few=(few := too_few_patients(measured)),
        headline=_headline(measured) if few else None,
        main="accuracy" if pooled["balanced_accuracy"] is None else "balanced_accuracy",
        spread={name: _spread(measured, name) for name in MEASURES} if measured.get("spread") else {},
        history=history,
        best=_best(history, facts),
        patients=patients.sort_values(aggregate.SHARE_CORRECT, kind="stable").to_dict("records"),
        errors=[f"{row[schema.IMAGE_ID]}: {row[schema.ERROR]}" for row in unscored],
        subtypes={code: subtype.name.replace("_", " ") for code, subtype in SUBTYPES.items()},
        facts=defaultdict(lambda: None, facts),
        marks=_marks(facts),
        figures=plates,
        pictures=pictures,
        leak_sentence=leak_sentence(measured["leak"]) if measured.get("leak") else None,
    )


def _best(history: History, facts: Facts) -> Mapping[str, Any] | None:
    """The record of the bundle's epoch: the `best_epoch` of the facts, else the first best on validation."""
    stated = [row for row in history if row["epoch"] == facts.get("best_epoch")]
    return max(stated or history, key=lambda row: row["validation_balanced_accuracy"], default=None)


def _save(figure: "Figure", path: Path, marks: Sequence[str]) -> Markup:
    """Write PNG and SVG files, and return the SVG to embed in the page."""
    from bcd.reports import plots

    plots.mark(figure, marks)
    figure.savefig(path.with_suffix(".png"), dpi=plots.PNG_DPI, metadata={"Software": None})
    figure.set_layout_engine("none")  # the layout that was just made is kept
    path.with_suffix(".svg").write_text(svg := plots.svg(figure), encoding="utf-8")
    return plots.inline(svg, path.name)


def _draw(
    measured: Metrics, history: History, images: pd.DataFrame, patients: pd.DataFrame, facts: Facts
) -> dict[str, "Figure"]:
    """Every figure for which there are data, by file name."""
    from bcd.reports import plots, trust_plots

    pooled, threshold, unit = measured["pooled"], measured.get("threshold"), measures.unit(measured)
    drawn = {"confusion_matrix": plots.plot_confusion_matrix(pooled["confusion_matrix"], TUMOR_CLASSES, unit)}
    if best := _best(history, facts):
        drawn["history"] = plots.plot_history(history, best)
    if facts.get("parts"):
        balanced = facts.get("balanced") or {}
        drawn["class_distribution"] = plots.plot_class_distribution(facts["parts"], balanced)
    if pooled["auc"] is not None:
        drawn["roc"] = trust_plots.plot_roc(images, pooled, unit)
        drawn["precision_recall"] = trust_plots.plot_precision_recall(images, pooled, unit)
    if len(images):
        n_patients = measured["n_patients"]
        of = counted(len(images), unit) + (f" of {counted(n_patients, 'patient')}" if n_patients else "")
        drawn["reliability"] = trust_plots.plot_reliability(measured["calibration"], of)
        drawn["abstention"] = trust_plots.plot_abstention(_abstention_curves(images, unit))
    if measured["by_magnification"]:
        drawn["by_magnification"] = plots.plot_by_magnification(measured)
        strip = trust_plots.plot_strip(images, schema.MAGNIFICATION, "Magnifications", threshold, unit)
        drawn["magnification_strip"] = strip
    if len(patients):
        drawn["patients"] = trust_plots.plot_patients(patients)
        drawn["patient_strip"] = trust_plots.plot_strip(images, schema.PATIENT, "Patients", threshold, unit)
    if many := measured.get("multiclass"):
        matrix = many["confusion_matrix"]
        drawn["confusion_matrix_subtype"] = plots.plot_confusion_matrix(matrix, many["class_names"], unit)
    if rows := measured.get("folds"):
        drawn["folds"] = trust_plots.plot_folds(rows, MEASURES)
        drawn["histories"] = trust_plots.plot_histories([row["history"] for row in rows])
    if leak := measured.get("leak"):
        names = f"by {leak['leaky']}, leaky", f"by {leak['honest']}"
        drawn["leak"] = trust_plots.plot_leak(leak["metrics"], MEASURES, names)
    return drawn


def _abstention_curves(images: pd.DataFrame, unit: str) -> dict[str, pd.DataFrame]:
    """Abstention curves of the images or judgements, and of the patients where there are several."""
    patients = aggregate.groups_of_draws(images, schema.PATIENT)
    patients = patients[patients[schema.TUMOR_CLASS].notna()]
    curves = {f"{unit}s": decision.abstention_curve(images)}
    return curves | ({"patients": decision.abstention_curve(patients)} if len(patients) > 1 else {})
