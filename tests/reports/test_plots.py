"""What the figures show, as numbers; their look is checked with the pages that hold them."""

import re
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from bcd.reports import plots
from bcd.taxonomy import TUMOR_CLASSES


def bars(figure: Figure) -> dict[str, list[float]]:
    """Heights of the bars of the first panel, by the label in the legend."""
    return {group.get_label(): [bar.get_height() for bar in group] for group in figure.axes[0].containers}


def texts(figure: Figure) -> str:
    with matplotlib.rc_context(plots.STYLE):
        return " ".join(re.findall(r"<text[^>]*>(.*?)</text>", plots.svg(figure), flags=re.S))


def test_every_probability_is_in_one_bar_of_the_class_it_is_called() -> None:
    values = np.concatenate([np.linspace(0, 1, 101), [0.3, 0.3, 1.0]])
    figure = plots.plot_probabilities(values, 0.3)
    below, above = bars(figure)["called benign"], bars(figure)["called malignant"]
    assert sum(below) == (values < 0.3).sum() == 30
    assert sum(above) == 74
    assert max(np.flatnonzero(below)) == 14
    assert min(np.flatnonzero(above)) == 15
    assert above[15] == 4  # 0.30, three times, and 0.31
    assert above[49] == 4  # 0.98, 0.99 and 1.00, twice
    assert "images (n = 104)" in texts(figure)
    assert "threshold 0.3" in texts(figure)


def test_a_threshold_inside_a_bar_divides_it() -> None:
    figure = plots.plot_probabilities(np.array([0.501, 0.505, 0.515]), 0.51)
    below, above = figure.axes[0].containers
    assert (below[25].get_height(), above[25].get_height(), above[25].get_y()) == (2, 1, 2)


def test_the_confusion_matrix_says_counts_and_shares_of_the_row() -> None:
    figure = plots.plot_confusion_matrix([[8, 2], [0, 5]], TUMOR_CLASSES)
    said = [text.get_text() for text in figure.axes[0].texts]
    assert said == [
        "8\n80\N{NO-BREAK SPACE}%",
        "2\n20\N{NO-BREAK SPACE}%",
        "0\n0\N{NO-BREAK SPACE}%",
        "5\n100\N{NO-BREAK SPACE}%",
    ]
    assert "n = 15 images" in texts(figure)


def test_the_classes_are_stacked_by_part_with_repeats_hatched() -> None:
    figure = plots.plot_class_distribution(
        {"train": {"A": 3, "DC": 7}, "test": {"A": 1, "DC": 2}}, {"A": 7, "DC": 7}
    )
    assert [[bar.get_width() for bar in group] for group in figure.axes[0].containers] == [[3, 7], [1, 2]]
    assert [[bar.get_width() for bar in group] for group in figure.axes[1].containers] == [[3, 7], [4, 0]]
    assert all(bar.get_hatch() for bar in figure.axes[1].containers[1])


def test_the_best_epoch_is_marked() -> None:
    records = [
        {"epoch": n, "train_loss": 1 / n, "validation_loss": 2 / n, "validation_balanced_accuracy": n / 4}
        for n in (1, 2, 3)
    ]
    figure = plots.plot_history(records, records[1])
    loss, rate = figure.axes
    assert [line.get_ydata()[0] for line in loss.lines[:2]] == [1, 2]
    assert "best 50.0" in texts(figure)
    assert all(axes.lines[-1].get_xdata()[0] == 2 for axes in (loss, rate))


@pytest.mark.parametrize("losses", [(0.84, 0.69), (0.69, 0.84), (0.001, 0.001)])
def test_the_highest_loss_is_drawn_whole(losses: tuple[float, float]) -> None:
    """Of an only epoch the axis ended in the middle of its dot."""
    record = dict(zip(("train_loss", "validation_loss"), losses, strict=True))
    record |= {"epoch": 1, "validation_balanced_accuracy": 0.5}
    loss, _ = plots.plot_history([record], record).axes
    height_pt = 72 / loss.figure.dpi * loss.get_window_extent().height
    assert height_pt * (1 - max(losses) / loss.get_ylim()[1]) > loss.lines[0].get_markersize() / 2


@pytest.mark.parametrize("marks", [[], ["synthetic data", "leaky"]])
def test_marks_are_above_a_figure(marks: list[str]) -> None:
    figure = plots.plot_probabilities(np.array([0.5]), 0.5)
    plots.mark(figure, marks)
    assert ("SYNTHETIC DATA · LEAKY" in texts(figure)) == bool(marks)


def test_a_figure_in_a_page_has_ids_of_its_own_and_the_colours_of_the_page() -> None:
    with matplotlib.rc_context(plots.STYLE):
        figure = plots.plot_probabilities(np.array([0.2, 0.9]), 0.5)
        svg = plots.svg(figure)
        assert svg == plots.svg(plots.plot_probabilities(np.array([0.2, 0.9]), 0.5))
    inside = plots.inline(svg, "two_bars")
    assert inside.startswith('<svg role="img" aria-label="two bars"')
    assert "http" not in inside
    assert all(name.startswith("two_bars-") for name in re.findall(r'\bid="([^"]*)"', inside))
    assert "currentColor" in inside
    assert to_hex(plots.INK) not in inside


def legends(figure: Figure) -> list[tuple[Any, list[Any]]]:
    """The place of each legend, and those of what it must not lie on: all data, titles and marks."""
    FigureCanvasAgg(figure).draw()
    others = [axes.bbox for axes in figure.axes]
    words = [axes.title for axes in figure.axes] + [axes._left_title for axes in figure.axes]
    others += [word.get_window_extent() for word in words + figure.texts if word.get_text()]
    return [(found.get_window_extent(), others) for axes in figure.axes if (found := axes.get_legend())]


@pytest.mark.parametrize(
    "labels", [["a"], ["benign", "malignant", "mixed", "threshold 0.5"], ["long" * 12] * 3]
)
@pytest.mark.parametrize("title", ["Loss", "Balanced accuracy, best 81.2 % at epoch 2 of a long run"])
@pytest.mark.parametrize("square", [False, True])
def test_a_legend_covers_nothing(labels: list[str], title: str, square: bool) -> None:
    with matplotlib.rc_context(plots.STYLE):
        figure, panels = plots.canvas(4.2 if square else 4.8, rows=1 if square else 2)
        for axes in panels:
            for label in labels:
                axes.plot([0, 1], [0, 1], label=label)
            axes.set_title(title)
            plots.percent_axis(axes, "share")
            axes.set_aspect("equal" if square else "auto")
            plots.legend_above(axes)
        plots.mark(figure, ["synthetic data"])
        found = legends(figure)
    assert len(found) == len(panels)
    for place, others in found:
        assert not [other for other in others if place.overlaps(other)]
        assert place.x0 >= 0
        assert place.x1 <= figure.bbox.x1
