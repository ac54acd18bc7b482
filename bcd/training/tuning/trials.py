"""The trials of a search: what each was and reached, and the page that shows them."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from bcd import schema
from bcd.reports import plots, style
from bcd.runtime.run_directory import SCORE, SELECTION

# Of the record of an epoch.
LOSS = "validation_loss"
RECORDED = (schema.EPOCH, SCORE, LOSS, SELECTION)


class Trial(BaseModel):
    """A training with the settings that were chosen for it, judged on the validation part alone."""

    number: int
    settings: dict[str, Any]
    epochs: list[dict[str, float]]
    """A record of each epoch: `RECORDED`."""
    failure: str | None = None
    """Why it has no model, as a sentence."""

    @property
    def best(self) -> dict[str, float] | None:
        """The record of its best epoch, by loss where several have the same balanced accuracy."""
        return max(self.epochs, key=lambda record: record[SELECTION], default=None)


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """The trials, the best first, those without a model last."""
    return sorted(
        trials, key=lambda trial: trial.best[SELECTION] if trial.best else float("-inf"), reverse=True
    )


def chosen_flags(settings: Mapping[str, Any]) -> str:
    """Settings as flags."""
    return " ".join(
        f"--{name.replace('_', '-')} {value:.3g}"
        if isinstance(value, float)
        else f"--{name.replace('_', '-')} {value}"
        for name, value in settings.items()
    )


def render_search(trials: Sequence[Trial], facts: Mapping[str, Any]) -> str:
    """The search as self-contained HTML.

    `facts`: title, n_epochs, command, synthetic; n_images, n_patients (or None) and is_choosable of the
    validation part.
    """
    import matplotlib  # takes seconds

    order = ranked(trials)
    with matplotlib.rc_context(plots.STYLE):
        curves = plots.svg(_curves(order))
    rows = [
        {
            "number": trial.number,
            "settings": chosen_flags(trial.settings),
            "n_epochs": len(trial.epochs),
            "reached": trial.best and trial.best[SCORE],
            "loss": trial.best and trial.best[LOSS],
            "at": trial.best and int(trial.best[schema.EPOCH]),
            "failure": trial.failure,
        }
        for trial in order
    ]
    drawn = plots.inline(curves, "validation of every trial")
    marks = ["synthetic data"] if facts["synthetic"] else []
    return style.render(
        "tuning.html", rows=rows, curves=drawn, facts=facts, marks=marks, heading=facts["title"]
    )


def _curves(order: Sequence[Trial]) -> Any:
    figure, (axes,) = plots.canvas(3.2)
    trained = [trial for trial in order if trial.epochs]
    for trial in reversed(trained):
        is_best = trial is trained[0]
        look: dict[str, Any] = {"color": style.GREY, "lw": 1.0}
        look |= {"color": style.BLUE, "lw": 1.8, "zorder": 3} if is_best else {}
        label = f"best: trial {trial.number}" if is_best else None
        epochs = [record[schema.EPOCH] for record in trial.epochs]
        axes.plot(epochs, [record[SCORE] for record in trial.epochs], marker="o", ms=3, label=label, **look)
    plots.percent_axis(axes, "on validation")
    axes.xaxis.set_major_locator(plots.MaxNLocator(integer=True, min_n_ticks=1))
    axes.set(xlabel="epoch", title="Balanced accuracy")
    plots.legend_above(axes)
    return figure
