"""Breast cancer detection on histopathology, on Ray: a model bundle opened, and jobs as functions.

`bcd.load(uri)` opens a model bundle; `bcd.train(...)`, `bcd.evaluate(...)` and `bcd.score(...)` are the jobs
of the same names. Importing this package imports neither Ray nor torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bcd.cli import JobResult

__all__ = ["evaluate", "load", "score", "train"]


def train(**settings: Any) -> "JobResult":
    """Train a model and evaluate it on patients that it has never seen, or resume a run.

    Args:
        settings: those of `bcd train --help`, with `_` for `-`: `data="./BreaKHis_v1", epochs=30`. `config`
            names a file with settings, over which these have priority.

    Returns:
        The run: its URI, the predictions of the test part, the bundle, the metrics.

    Raises:
        BcdError: what the user can correct, in one sentence; its classes are in `bcd.errors`.
    """
    return _call("train", settings)


def evaluate(**settings: Any) -> "JobResult":
    """Evaluate a model on its held-out test part, or on data that it has never seen.

    Settings are those of `bcd evaluate --help`; they, what is returned and what is raised are as of `train`.
    """
    return _call("evaluate", settings)


def score(**settings: Any) -> "JobResult":
    """Score every image and slide of an archive once, or resume.

    Settings are those of `bcd score --help`; they, what is returned and what is raised are as of `train`,
    with the summary of the archive for metrics.
    """
    return _call("score", settings)


def _call(job: str, settings: dict[str, Any]) -> "JobResult":
    # Not at the top: it takes a second.
    from bcd import cli

    return cli.run_job(job, settings)


def __getattr__(name: str) -> Any:
    """Import `load` on first use: torch takes seconds."""
    if name == "load":
        from bcd.model.predictor import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
