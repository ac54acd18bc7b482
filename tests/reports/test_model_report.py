"""The page and its figures: the right numbers, the marks, nothing from outside, the same bytes twice."""

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from bcd import schema
from bcd.metrics import aggregate, decision, measures
from bcd.metrics.intervals import interval_of_rate
from bcd.model import novelty
from bcd.reports import model_report, plots
from bcd.reports.style import format_interval
from bcd.reports.thumbnails import Example
from bcd.taxonomy import SUBTYPES, TUMOR_CLASSES
from tests import studies
from tests.reports.test_plots import legends

FACTS: dict[str, Any] = {
    "title": "A first run",
    "model_id": "0123456789abcdef",
    "protocol": "case",
    "parts": {"train": {"A": 30, "DC": 70}, "validation": {"A": 10, "DC": 20}, "test": {"A": 5, "DC": 9}},
    "balanced": {"A": 70, "DC": 70},
    "warnings": ["40X: 5 files missing"],
    "quarantined": ["slide 14-13412 has the labels DC and LC"],
    "command": "python jobs/train.py --data <here>",
    "versions": {"bcd": "0.2.0"},
}
FIGURES = {
    "history",
    "class_distribution",
    "confusion_matrix",
    "roc",
    "precision_recall",
    "reliability",
    "abstention",
    "by_magnification",
    "magnification_strip",
    "patients",
    "patient_strip",
}


def predictions(n_patients: int = 8) -> pd.DataFrame:
    """Two images right and one wrong for every patient."""
    codes = [list(SUBTYPES)[i % 8] for i in range(n_patients)]
    return pd.DataFrame(
        {
            schema.IMAGE_ID: f"p{patient}/{image}",
            schema.PATIENT: f"p{patient}",
            schema.TUMOR_CLASS: SUBTYPES[code].tumor_class,
            schema.SUBTYPE: code,
            schema.MAGNIFICATION: (40, 100, 200)[image],
            schema.PROBABILITY: [0.5, 0.5],
            schema.PROBABILITY_MALIGNANT: 0.9
            if (SUBTYPES[code].tumor_class == "malignant") != wrong
            else 0.2,
            schema.ERROR: None,
        }
        for patient, code in enumerate(codes)
        for image, wrong in enumerate((False, False, patient % 2 == 0))
    )


def history(n_epochs: int = 3) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "validation_loss": 1.1 / epoch,
            "validation_balanced_accuracy": (0.5, 0.8125, 0.75)[epoch - 1],
            "validation_accuracy": 0.7,
            "learning_rate": 1e-4,
            "seconds": 2.5,
            "images_per_s": 40.0,
            "class_counts": {"benign": 70, "malignant": 70},
        }
        for epoch in range(1, n_epochs + 1)
    ]


def example(image: pd.Series) -> Example:
    p = image[schema.PROBABILITY_MALIGNANT]
    pixels = np.full((46, 70, 3), 200, np.uint8)
    evidence = np.full((2, 3), image[aggregate.LOG_ODDS])
    return Example(
        image[schema.IMAGE_ID], p, image[schema.PREDICTED_CLASS], image[aggregate.LOG_ODDS], pixels, evidence
    )


def saving(names: Collection[str]) -> Callable[..., str]:
    """`_save` for the figures named, and nothing in place of others."""
    real = model_report._save
    return lambda figure, path, marks: real(figure, path, marks) if path.name in names else ""


def write(
    folder: Path,
    frame: pd.DataFrame,
    n_epochs: int = 0,
    facts: dict[str, Any] | None = None,
    classes: tuple[str, ...] = TUMOR_CLASSES,
    draws: Collection[str] | None = None,
    **more: Any,
) -> str:
    """The page as text, with all figures or those named: they take all the time."""
    images = aggregate.image_table(frame)
    examples = {place: example(images.iloc[place]) for place in model_report.choose_examples(images).all()}
    unscored = aggregate.unscored(frame).to_dict("records")
    measured = studies.measured(frame, class_names=classes) | more
    with pytest.MonkeyPatch.context() as patched:
        if draws is not None:
            patched.setattr(model_report, "_save", saving(draws))
        page = model_report.write_report(
            folder, measured, history(n_epochs), images, facts or {}, examples, unscored
        )
    assert page == folder / "report.html"
    return page.read_text(encoding="utf-8")


def text(page: str) -> str:
    """What a person reads: no style, no tags, single spaces."""
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page)).replace("&nbsp;", " ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write(folder, predictions(), 3, FACTS)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def test_the_first_sentence_says_what_was_measured_on_whom_and_how_sure_it_is(page: str) -> None:
    low, high = studies.measured(predictions())["pooled"]["intervals"]["balanced_accuracy"]
    says = f"a balanced accuracy of 83.3 % (95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    assert "On 24 images of 8 patients that it had never seen" in text(page)
    assert says in text(page)
    assert "Research use only. Not a medical device" in text(page)


def test_numbers_and_facts_are_on_the_page(page: str) -> None:
    for fact in (
        "A first run",
        "0123456789abcdef",
        "2 of 12 malignant images were called benign, and 2 of 12 benign images malignant",
        "best 81.2 % at epoch 2",
        "40X: 5 files missing",
        "slide 14-13412 has the labels DC and LC",
        "--data &lt;here&gt;",
        "bcd 0.2.0",
        "phyllodes tumor",
    ):
        assert fact in text(page)


def test_the_page_needs_nothing_from_outside(page: str) -> None:
    assert "http" not in page
    assert not re.search(r"<(script|link|iframe)\b|@import|\bsrc=(?!\"data:image/)", page)
    assert not [target for target in re.findall(r'href="([^"]*)"', page) if not target.startswith("#")]
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_every_figure_is_there_and_shows_something(folder: Path, page: str) -> None:
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg")
    }
    for name in FIGURES:
        assert f'aria-label="{name.replace("_", " ")}"' in page
        pixels = np.asarray(Image.open(folder / "figures" / f"{name}.png").convert("L"), float)
        assert pixels.std() > 10
        assert pixels[[0, -1]].min() == 255  # nothing is cut off above or below


def test_no_legend_covers_data_or_titles() -> None:
    images = aggregate.image_table(predictions())
    measured = studies.measured(predictions()) | {"folds": [study(1, 1, predictions())] * 3}
    row = {"first": 0.99, "second": 0.52, "difference": 0.47}
    measured["leak"] = {
        "leaky": "image",
        "honest": "case",
        "metrics": dict.fromkeys(model_report.MEASURES, row),
    }
    with matplotlib.rc_context(plots.STYLE):
        patients = aggregate.groups(images, schema.PATIENT)
        for name, figure in model_report._draw(measured, history(), images, patients, FACTS).items():
            plots.mark(figure, ["synthetic data", "leaky: patients in several parts"])
            for place, others in legends(figure):
                assert not [other for other in others if place.overlaps(other)], name


def test_the_same_input_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, predictions(), 3, FACTS)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        assert path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes(), path.name


MARKS = {
    "synthetic": "synthetic data",
    "leaky": "leaky: patients in several parts",
    "forced": "forced: may have been trained on",
}


@pytest.fixture(scope="module")
def marked_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with every mark at once."""
    folder = tmp_path_factory.mktemp("marked")
    write(folder, predictions(), 1, dict.fromkeys(MARKS, True))
    return folder


@pytest.mark.parametrize(("fact", "mark"), MARKS.items())
def test_marks_are_wherever_numbers_are(
    fact: str, mark: str, page: str, marked_folder: Path, tmp_path: Path
) -> None:
    assert mark.upper() not in page.upper()
    alone = write(tmp_path, predictions(), 1, {fact: True}, draws=())
    marked = (marked_folder / "report.html").read_text(encoding="utf-8")
    for found, marks in ((alone, {mark}), (marked, {*MARKS.values()})):
        cards = re.findall(r'<div class="card">.*?</small>.*?</div>', found, flags=re.S)
        assert len(cards) == 5
        assert all({other for other in MARKS.values() if other in card} == marks for card in cards)
    svgs = re.findall(r"<svg.*?</svg>", marked, flags=re.S)
    assert len(svgs) == len(FIGURES) - 1
    assert all(mark.upper() in svg for svg in svgs)
    assert all(mark.upper() in path.read_text() for path in (marked_folder / "figures").glob("*.svg"))
    assert ("that it had never seen" in text(alone)) == (fact == "synthetic")


def test_one_patient_one_class_and_no_run(tmp_path: Path) -> None:
    """Drawing leaves matplotlib as it was, too."""
    before = dict(matplotlib.rcParams)
    page = write(tmp_path, predictions(1))
    assert "0 malignant patients are too few" in text(page).replace("1 benign and ", "")
    assert "image recognition rate 66.7 %" in text(page)
    assert "One class is absent here" in text(page)
    assert not re.search(r"\b(nan|None)\b", text(page))
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {
        "confusion_matrix",
        "reliability",
        "abstention",
        "by_magnification",
        "magnification_strip",
        "patients",
        "patient_strip",
    }
    assert dict(matplotlib.rcParams) == before


def of(n_benign: int, n_malignant: int) -> pd.DataFrame:
    """Predictions of so many patients of each class, one image right and one wrong."""
    kinds = ["A"] * n_benign + ["DC"] * n_malignant
    return pd.DataFrame(
        {
            schema.IMAGE_ID: f"p{number}/{image}",
            schema.PATIENT: f"p{number}",
            schema.TUMOR_CLASS: SUBTYPES[code].tumor_class,
            schema.SUBTYPE: code,
            schema.MAGNIFICATION: 40,
            schema.PROBABILITY: [0.5, 0.5],
            schema.PROBABILITY_MALIGNANT: (0.1, 0.9)[image],
            schema.ERROR: None,
        }
        for number, code in enumerate(kinds)
        for image in range(2)
    )


def without_figures(frame: pd.DataFrame) -> str:
    """The page alone, which takes milliseconds."""
    images = aggregate.image_table(frame)
    patients = aggregate.groups(images, schema.PATIENT)
    shown = model_report._pictures(images, model_report.choose_examples(images), {}, {})
    return model_report._page(studies.measured(frame), [], patients, [], {}, {}, shown)


@pytest.mark.parametrize(
    ("n_benign", "n_malignant", "said"),
    [
        (2, 9, "2 benign and 9 malignant patients are too few"),
        (9, 1, "9 benign and 1 malignant patient are too few"),
        (0, 5, "0 benign and 5 malignant patients are too few"),
    ],
)
def test_too_few_patients_replace_the_headline(n_benign: int, n_malignant: int, said: str) -> None:
    page = without_figures(frame := of(n_benign, n_malignant))
    wanted = "to say how often the model is right on others: a headline requires 3 of each class, and an "
    assert f"{said} {wanted}interval of 10 points to each side some 35" in text(page)
    headline = f"{min(n_benign, n_malignant)} patient{'' if n_malignant == 1 else 's'}: too few to say"
    hero = re.search(r'<section class="hero".*?</section>', page, flags=re.S)
    assert hero
    assert headline in text(hero[0].replace("<br>", " "))
    assert 'class="number"' not in hero[0]
    assert "%" not in text(hero[0])
    assert f"<title>Breast cancer detection: {headline}</title>" in page
    assert page.count('<div class="card">') == len(model_report.MEASURES)
    assert model_report.summary_lines(studies.measured(frame))[1].startswith(f"  {headline}: {said}")


def test_three_patients_of_each_class_have_a_headline() -> None:
    page = without_figures(of(3, 3))
    assert 'class="instead"' not in page
    assert re.search(r'<div class="number">50.0\s%</div>\s*<div class="label">balanced accuracy', page)
    assert "balanced accuracy" not in "".join(re.findall(r'class="name">(.*?)<', page))
    unknown = studies.measured(of(1, 1).drop(columns=[schema.PATIENT]))
    assert (unknown["patients_by_class"], model_report.too_few_patients(unknown)) == (None, None)


def test_one_is_no_plural() -> None:
    frame = of(1, 1).iloc[[0, 3]]
    said = text(without_figures(frame))
    assert "On 2 images of 2 patients" in said
    assert "1 benign and 1 malignant image;" in said
    assert not re.findall(r"(?<![\d,.])1 (?:\w+ )?(?:images|patients|judgements|folds|models)\b", said)
    lines = model_report.summary_lines(studies.measured(frame.iloc[:1]))
    assert lines[0] == "test part: 1 image, 1 patient, 0 not scored"


def test_images_without_patients_and_with_errors(tmp_path: Path) -> None:
    frame = predictions().drop(columns=[schema.PATIENT, schema.MAGNIFICATION, schema.SUBTYPE])
    frame.loc[3, [schema.ERROR, schema.PROBABILITY_MALIGNANT]] = ["truncated", np.nan]
    page = write(tmp_path, frame)
    assert "the images have no patient ids" in text(page)
    assert "1 image could not be scored" in text(page)
    assert "p1/0: truncated" in text(page)


def test_a_model_of_subtypes_has_both_matrices(tmp_path: Path) -> None:
    frame, names = predictions(), tuple(SUBTYPES)
    frame[schema.PROBABILITY] = [np.eye(8)[names.index(code)] for code in frame[schema.SUBTYPE]]
    page = write(tmp_path, frame, classes=names, draws={"confusion_matrix_subtype"})
    assert "Accuracy 100.0 %, balanced accuracy 100.0 % over 24 images" in text(page)
    assert (tmp_path / "figures" / "confusion_matrix_subtype.svg").exists()


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    frame = predictions()
    frame.loc[frame[schema.PATIENT] == "p0", schema.PATIENT] = "<b>$x^$"
    page = write(tmp_path, frame, draws={"patients", "patient_strip"})
    assert "<b>$x" not in page
    assert page.count("&lt;b&gt;$x^$") == 4  # in the table, over its image and below two columns


def test_every_wrong_prediction_is_shown_by_patient_and_the_rest_as_samples(page: str) -> None:
    """Of 8 patients with 3 images each, every other one has one wrong."""
    images = aggregate.image_table(predictions())
    choice = model_report.choose_examples(images)
    assert [images[schema.IMAGE_ID].iloc[i] for i in choice.wrong] == ["p0/2", "p2/2", "p4/2", "p6/2"]
    assert images.iloc[choice.clearest][schema.TUMOR_CLASS].tolist() == ["benign"] * 3 + ["malignant"] * 3
    assert len(choice.correct) == model_report.N_CORRECT
    assert not set(choice.correct) & {*choice.clearest, *choice.wrong}
    assert images.iloc[choice.correct + choice.clearest][aggregate.CORRECT].all()
    for patient in ("p0", "p2", "p4", "p6"):
        assert f"Patient {patient}: 1 wrong" in text(page)
    assert page.count('<figure class="example">') == 4 + 6 + 12
    assert "4 of 24 images; patients with most of them first" in text(page)
    # On the scale of service and gallery, stated at the legend and beside each image.
    assert "<span>−4</span><span>0</span><span>+4</span>" in page
    assert text(page).count("· full colour ±4") == 4 + 6 + 12


def test_what_it_costs_is_said_in_missed_cancers(tmp_path: Path) -> None:
    point = {"threshold": 0.5, "rule": "sensitivity", "target_sensitivity": 0.95, "sensitivity": 0.96}
    point |= {"specificity": 0.8, "n_malignant": 50, "n_benign": 20, "n_patients": 9}
    page = text(write(tmp_path, predictions(), draws=(), operating_point=point, temperature=1.7))
    assert "Missed cancers: 2 of 12 malignant images (16.7 %), 0 of 4 malignant patients as a whole" in page
    assert "chosen on validation (50 malignant and 20 benign images of 9 patients) for a sensitivity" in page
    assert "Temperature 1.70, fitted on validation only: above 1, the network was overconfident" in page


def test_few_validation_patients_are_said_to_have_chosen_nothing(tmp_path: Path) -> None:
    point = {"threshold": 0.5, "rule": "prior", "target_sensitivity": None, "sensitivity": 0.96}
    point |= {"specificity": 0.8, "n_malignant": 50, "n_benign": 1, "n_patients": 2}
    page = text(write(tmp_path, predictions(), draws=(), operating_point=point, temperature=1.0))
    assert "The threshold, 0.5, is the share of malignant images in training, because validation (50" in page
    assert "malignant and 1 benign image of 2 patients) has too few patients to choose one" in page
    assert "The temperature is 1: validation has too few patients to fit one." in page


def test_metrics_of_too_few_patients_say_so_and_others_have_intervals() -> None:
    rows = {name: (value, said) for name, value, said in model_report.summary(studies.measured(of(1, 9)))}
    assert rows["specificity"] == ("50.0\N{NO-BREAK SPACE}%", "1 patient: too few to say")
    assert rows["AUC"] == ("0.500", "1 patient: too few to say")
    assert re.fullmatch(r"\d+\.\d to \d+\.\d\s%", rows["sensitivity"][1])
    two = {name: said for name, _, said in model_report.summary(studies.measured(of(2, 9)))}
    assert all(re.fullmatch(r"[\d.]+ to [\d.]+(\s%)?", said) for said in two.values())
    unknown = studies.measured(of(1, 9).drop(columns=[schema.PATIENT]))
    assert {said for _, _, said in model_report.summary(unknown)} == {"–"}


def study(repeat: int, fold: int, values: pd.DataFrame) -> dict[str, Any]:
    measured = studies.measured(values)
    row = {"repeat": repeat, "fold": fold, "n_patients": measured["n_patients"], "threshold": 0.4}
    row["rule"] = ("youden", "prior")[fold % 2]
    return row | {"temperature": 1.2, "pooled": measured["pooled"], "history": history(2)}


def test_a_cross_validation_shows_its_folds_and_what_a_leak_adds(tmp_path: Path) -> None:
    frame = predictions()
    rows = [study(1, n, frame.iloc[part]) for n, part in enumerate((slice(0, 12), slice(12, 24)), 1)]
    spread = {name: {"mean": 0.9, "sd": 0.04, "n": 2} for name in model_report.MEASURES}
    row = {"first": 0.99, "second": 0.52, "difference": 0.47, "interval": [0.4, 0.54], "p_value": 1e-6}
    unclear = row | {"interval": [-0.1, 0.9]}
    leak = {"leaky": "image", "honest": "case", "n_left_out": 3}
    leak["metrics"] = dict.fromkeys(model_report.MEASURES, row) | {"auc": unclear}
    drawn = {"folds", "histories", "leak"}
    whole = {"threshold": 0.25, "temperature": 1.5, "operating_point": {"rule": "youden", "n_patients": 8}}
    more = {"folds": rows, "spread": spread, "leak": leak, "threshold": None, "out_of_fold": whole}
    said = text(write(tmp_path, frame, draws=drawn, **more))
    assert "the threshold 0.25 and the temperature 1.50, chosen on the images of all 8 patients" in said
    assert "each judged by a model that had not seen the patient, 2 models distinguish" in said
    assert "Its mean over the folds is 90.0 ± 4.0 %" in said
    assert "in 1 of 2 folds validation has too few patients to choose, so the temperature is 1" in said
    assert "3 images that one of the two arms tested more often than the other" in said
    assert "they are of all 8 patients together" in said
    assert "The leak adds +47.0 points of balanced accuracy: split by image, with patients in several" in said
    assert "and 0.990 AUC instead of 0.520 (95 % interval of the difference \u22120.100 to +0.900)" in said
    assert "instead of 52.0 % (95 % interval of the difference +40.0 to +54.0 points)" in said
    assert drawn == {path.stem for path in (tmp_path / "figures").iterdir()}
    spread["auc"] |= {"n": 1}
    lines = model_report.summary_lines(studies.measured(frame) | {"spread": spread, "folds": rows})
    assert lines[1].endswith("mean ± SD of folds")
    assert lines[2].endswith("90.0 ± 4.0\N{NO-BREAK SPACE}%")
    assert lines[5].endswith("0.900 ± 0.040 (1 of 2 folds)")


def test_several_models_of_an_image_are_not_several_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither on the page nor above a figure."""
    titles: list[str] = []

    def read(figure: Figure, *_: object) -> Markup:
        titles.extend(axes.get_title(loc="left") for axes in figure.axes)
        return Markup("")

    monkeypatch.setattr(model_report, "_save", read)
    frame = predictions()
    tables = [aggregate.image_table(frame).assign(**{aggregate.DRAW: n}) for n in (1, 2)]
    measured = measures.measure(joined := pd.concat(tables, ignore_index=True))
    measured |= {"n_errors": 26, "warnings": {novelty.CODE: 31}}
    page = text(model_report.write_report(tmp_path, measured, [], joined, {}).read_text(encoding="utf-8"))
    assert "On 24 images of 8 patients" in page
    assert "24 judgements of benign and 24 of malignant images" in page
    assert "Missed cancers: 4 of 24 judgements of malignant images" in page
    assert "4 of 24 judgements of malignant images were called benign" in page
    assert "26 judgements could not be made" in page
    assert "31 judgements are of images that do not look like the training data of their model" in page
    assert {"Confusion matrix, n = 48 judgements", "ROC, n = 48 judgements"} <= set(titles)
    assert "Reliability, n = 48 judgements of 8 patients" in titles
    counts = re.findall(r"(\d+) (?:benign |malignant )?images?\b", "\n".join([page, *titles]))
    assert "24" in counts
    assert not {"26", "31", "48"} & {*counts}
    first = model_report.summary_lines(measured)[0]
    assert first.startswith("test part: 24 images, 8 patients, 48 judgements, 26 not scored, 31 unlike")


def test_numbers_of_a_publisher_are_marked_as_not_measured(tmp_path: Path) -> None:
    words = {"source": "timm: x", "license": "CC0", "citation": "Someone", "trained_on": "PCam"}
    published = words | {"stated": (("AUC", "0.96"),), "stated_on": "its test part"}
    page = text(write(tmp_path, predictions(), facts=FACTS | {"published": published}, draws=()))
    assert "AUC, stated by the publisher, not measured0.96 on its test part" in page
    assert "which its publisher may have trained it on, the model distinguishes" in page
    assert "that it had never seen" not in page


def test_colours_speak_for_the_predicted_subtype_where_there_are_eight(tmp_path: Path) -> None:
    targets = ("tumor_class", "subtype")
    pages = [text(write(tmp_path, predictions(), facts={"target": target}, draws=())) for target in targets]
    assert "vermilion for malignant, blue for benign" in pages[0]
    assert "vermilion for the predicted class, blue against it" in pages[1]
    assert "vermilion for malignant" not in pages[1]


@pytest.mark.parametrize(
    ("difference", "interval", "start"),
    [
        (0.1, [0.02, 0.18], "The leak adds +10.0 points of balanced accuracy and +0.100 of AUC: split"),
        (0.1, [-0.02, 0.2], "No effect of a leak is seen"),
        (0.1, None, "No"),
    ],
)
def test_a_leak_is_claimed_only_where_the_interval_says_so(
    difference: float, interval: list[float] | None, start: str
) -> None:
    row = {"first": 0.9, "second": 0.8, "difference": difference, "interval": interval}
    leak = {"leaky": "image", "honest": "case", "metrics": {"balanced_accuracy": row, "auc": row}}
    assert model_report.leak_sentence(leak).startswith(start)
    undefined = {"first": None, "second": 0.8, "difference": None, "interval": None}
    leak["metrics"]["balanced_accuracy"] = undefined
    assert "the same model appears to reach 0.900 AUC instead of 0.800" in model_report.leak_sentence(leak)
    leak["metrics"]["auc"] = undefined
    assert model_report.leak_sentence(leak) == "The effect of a leak is undefined: a class is missing."


def test_summary_lines() -> None:
    lines = model_report.summary_lines(studies.measured(predictions()))
    assert lines[0] == "test part: 24 images, 8 patients, 0 not scored"
    assert re.fullmatch(r"  balanced accuracy +83.3\s% +\d+\.\d to \d+\.\d\s%", lines[2])
    assert len(lines) == 2 + len(model_report.MEASURES)
    marked = model_report.summary_lines(studies.measured(predictions()) | {"leaky": True, "forced": True})
    assert marked[0].endswith("[leaky: patients in several parts] [forced: may have been trained on]")


def cells(table: str) -> dict[str, list[str]]:
    """Text of the cells of a table, by its first."""
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in table.split("<tr>")[2:]]
    plain = [[" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in row] for row in rows]
    return {row[0]: row[1:] for row in plain}


def test_groups_of_images_show_their_own_numbers(tmp_path: Path) -> None:
    """By a plain computation from the table of predictions."""
    sites = {f"p{i}": "Lyon" if i < 6 else "Porto" for i in range(7)} | {"p7": "Turin"}
    frame = predictions().assign(**{schema.SITE: lambda rows: rows[schema.PATIENT].map(sites)})
    page = write(tmp_path, frame, facts=FACTS, draws=())
    section = page.split("<h2>By subtype, magnification and site")[1].split("<h2>")[0]
    subtypes, magnifications, by_site = map(cells, section.split("<table>")[1:])
    assert subtypes["A adenosis"] == ["", "66.7 % 1 patient: too few to say", "3", "1"]
    right = (frame[schema.PROBABILITY_MALIGNANT] >= 0.5) == (frame[schema.TUMOR_CLASS] == "malignant")
    for found, column, unit in (
        (magnifications, schema.MAGNIFICATION, "X"),
        (by_site, schema.SITE, ""),
    ):
        assert found.keys() == {f"{value}{unit}" for value in frame[column].unique()} | {"all"}
        for value, rows in frame.groupby(column):
            here = right[rows.index].groupby(rows[schema.PATIENT])
            n, patients, images, recognised, *_ = found[f"{value}{unit}"]
            assert (n, patients) == (str(len(rows)), str(here.ngroups))
            ends = interval_of_rate(here.sum().to_numpy(int), here.size().to_numpy())
            certainty = format_interval(ends) if ends else "1 patient: too few to say"
            assert images == f"{100 * right[rows.index].mean():.1f} % {certainty}".replace("\xa0", " ")
            assert recognised.startswith(f"{100 * here.mean().mean():.1f} %")
    assert by_site["Turin"][2].endswith("1 patient: too few to say")
    assert by_site["Turin"][4] == "–"  # one class only


def test_the_page_says_what_is_held_out_and_in_no_part(tmp_path: Path) -> None:
    facts = FACTS | {"protocol": "magnification", "held_out": "40", "left_out": 1234}
    page = write(tmp_path, predictions(), facts=facts, draws=())
    assert "Split by magnification, 40 held out." in page
    assert "<dt>in no part</dt><dd>1,234 images, because they are at 40 and their patients" in page


def test_sets_of_classes_are_stated_from_ten_patients_on(tmp_path: Path) -> None:
    few, many = (write(tmp_path, predictions(n), draws=()) for n in (8, 16))
    assert "8 patients: too few to say. With fewer than 10, every image would get both classes" in few
    sets = decision.class_sets(aggregate.image_table(predictions(16)))
    assert sets is not None
    assert f"within {sets['cutoff']:.2f} of the threshold" in many
    assert f"Here {100 * sets['both']:.1f}\xa0% of the images get both classes" in many
