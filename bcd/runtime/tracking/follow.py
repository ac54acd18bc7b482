"""Log what a job writes to MLflow, beside the job: it is neither ended nor delayed by a server.

A thread of the job's own process looks at the files of the run, in which its workers record each epoch.
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from threading import Event
from typing import TYPE_CHECKING, Any

from bcd.runtime.tracking.mirror import FAILED, FINISHED, KILLED, Mirror

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

VARIABLE = "MLFLOW_TRACKING_URI"
# Seconds between two looks at the run; those that the end of a job waits for the last one, also of one that
# ends early.
LOOK_S, END_S, EARLY_S = 10.0, 120.0, 10.0
# Of MLflow's client, unless they are set: it gives up soon, because all is repeated; it reports no statistics
# to its makers, and prints no lines and bars.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


@contextmanager
def followed(
    uri: str,
    name: str,
    folds: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    model_uri: str | None = None,
) -> Iterator[None]:
    """Log a job to MLflow while it runs, where `MLFLOW_TRACKING_URI` is set.

    Args:
        uri: of the folder of the run, study or evaluation.
        name: of the MLflow run.
        folds: folders of the folds of a study, by their names: nested runs.
        settings: of an evaluation into a folder of its own, and
        model_uri: its bundle.
    """
    if not os.environ.get(VARIABLE):
        yield
        return
    if find_spec("mlflow") is None:
        logger.warning(f"{VARIABLE} is set, but nothing is logged without MLflow: pip install mlflow-skinny")
        yield
        return
    whole = Mirror(uri, name, settings, model_uri)
    nested = [Mirror(fold, each, parent=whole) for each, fold in (folds or {}).items()]
    follower, outcome = Follower([whole, *nested]), FAILED
    try:
        yield
        outcome = FINISHED
    except KeyboardInterrupt:
        outcome = KILLED
        raise
    finally:
        follower.end(outcome)


class Follower:
    """Brings MLflow up to date, again and again, in a thread that a hanging server holds up alone."""

    def __init__(self, mirrors: Sequence[Mirror]) -> None:
        for variable, value in DEFAULTS.items():
            os.environ.setdefault(variable, value)
        self._mirrors = mirrors
        self._outcome: str | None = None
        self._has_failed = self._has_warned = False
        self._client: MlflowClient | None = None
        self._ending, self._done = Event(), Event()
        # It hands over any exception as a value: of MLflow, a store of artifacts, a plugin.
        self._pool = ThreadPool(1)
        self._begin()

    def end(self, outcome: str) -> None:
        """Log the end of the job. Waits for a server that answers, at most `END_S`, and for no other."""
        self._outcome = outcome
        self._ending.set()
        limit = END_S if outcome == FINISHED else EARLY_S
        if not self._has_failed and not self._done.wait(limit):
            self._warn(f"not done within {limit:.0f} s", "the job ends, and what is missing is not logged")
        if self._done.is_set():
            self._pool.terminate()

    def _begin(self) -> None:
        self._pool.apply_async(self._follow, error_callback=self._fail)

    def _follow(self) -> None:
        while not self._ending.wait(LOOK_S):
            self._update()
            self._has_failed = False
        self._update()
        self._done.set()

    def _update(self) -> None:
        if self._client is None:
            from mlflow import MlflowClient

            logging.getLogger("mlflow").setLevel(logging.ERROR)
            self._client = MlflowClient()
        for mirror in self._mirrors:
            # That a fold is finished is in its own record.
            is_by_itself = mirror.parent and self._outcome == FINISHED
            mirror.update(self._client, None if is_by_itself else self._outcome)

    def _fail(self, error: BaseException) -> None:
        """Try again later; at the end of the job once."""
        self._warn(str(error) or type(error).__name__, "the job continues, and tries again until its end")
        if self._ending.is_set() and self._has_failed:
            self._done.set()
            return
        self._has_failed = True
        self._begin()

    def _warn(self, reason: str, so: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            first = re.sub(r"//[^/@\s]*@", "//", reason).splitlines()[0][:300]  # without a password
            logger.warning(f"MLflow: {first.rstrip('.')}: {so}")
