"""A folder that a job writes, as a run of MLflow: it is made of the folder's files, and brought up to date.

What failed is repeated the next time, and what is logged is not logged again. The id of the MLflow run is
kept in the folder (`mlflow.json`), so that a job that resumes continues it.
"""

import logging
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bcd import storage
from bcd.model import bundle
from bcd.runtime import run_directory
from bcd.runtime.run_directory import FIGURES, METRICS, REPORT
from bcd.runtime.tracking import pyfunc, values

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

IDENTITY = "mlflow.json"
# Of MLflow: where runs are, unless MLFLOW_EXPERIMENT_NAME says so, their states, and the tag of a nested one.
EXPERIMENT, PARENT = "bcd", "mlflow.parentRunId"
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"
# Of an epoch: shows whether it is logged, or was trained again since.
LOSS = "train_loss"
# Of a logged model: the folder with the files of the bundle.
DATA = "data"


@dataclass
class Mirror:
    """A folder and its run of MLflow.

    Args:
        uri: of the folder.
        name: of the MLflow run.
        settings: of an evaluation, which is not resumed; those of other jobs are in the folder.
        model_uri: of the bundle; by default the one in the folder.
        parent: that of the study to which a fold belongs. A fold has ended when its own record says so.
    """

    uri: str
    name: str
    settings: Mapping[str, Any] | None = None
    model_uri: str | None = None
    parent: "Mirror | None" = None
    run_id: str = ""
    has_ended: bool = False
    _losses: dict[int, float] = field(default_factory=dict)
    _has_begun: bool = False

    def update(self, client: "MlflowClient", outcome: str | None = None) -> None:
        """Log what is new. `outcome` is the state of the MLflow run, once the job has ended. Raises what
        MLflow and its stores raise."""
        self._has_begun = self._has_begun or self._begin(client)
        if self.has_ended or not self._has_begun:
            return
        self._log_epochs(client)
        if self.parent and self._read(run_directory.RUN)["status"] == run_directory.FINISHED:
            outcome = FINISHED
        if outcome == FINISHED:
            self._log_results(client)
        if outcome:
            client.set_terminated(self.run_id, outcome)
            self.has_ended = True

    def _begin(self, client: "MlflowClient") -> bool:
        """Continue or create the MLflow run, with its settings; false before the job claims the folder."""
        from mlflow.entities import Param

        if (settings := self.settings or self._read(run_directory.CONFIG)) is None:
            return False
        run = self._known(client) or self._created(client)
        self.run_id = run.info.run_id
        if self.settings is None:
            run_directory.write_json(self.uri, IDENTITY, {"run_id": self.run_id})
        # MLflow refuses another value of a parameter, such as of the number of workers in a resumed run.
        new = {k: v for k, v in values.settings_of(settings).items() if k not in run.data.params}
        client.log_batch(self.run_id, params=[Param(*pair) for pair in new.items()])
        self.has_ended = self.parent is not None and run.info.status == FINISHED
        if not self.has_ended and run.info.status != RUNNING:
            client.update_run(self.run_id, RUNNING)
        self._losses = {one.step: one.value for one in client.get_metric_history(self.run_id, LOSS)}
        return True

    def _known(self, client: "MlflowClient") -> "Run | None":
        """The MLflow run of which the folder has the id; None if this server has none, or it was deleted."""
        from mlflow.exceptions import MlflowException

        found = None if self.settings else self._read(IDENTITY)
        if not (run_id := self.run_id or (found and found["run_id"])):
            return None
        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _created(self, client: "MlflowClient") -> "Run":
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
        tags = values.code_of() | values.tags_of(self._read(run_directory.DATA) or {})
        tags |= {PARENT: self.parent.run_id} if self.parent and self.parent.run_id else {}
        run = client.create_run(experiment_id, tags=tags, run_name=self.name)
        logger.info(f"MLflow: {self.name} is the run {run.info.run_id} of the experiment {name}")
        return run

    def _log_epochs(self, client: "MlflowClient") -> None:
        from mlflow.entities import Metric

        history = self._read(run_directory.HISTORY) if self.settings is None else None
        for record in history or ():
            found, now = values.epoch_of(record), int(time.time() * 1000)
            step = int(found.pop("epoch"))
            if self._losses.get(step) != found[LOSS]:
                client.log_batch(self.run_id, metrics=[Metric(*pair, now, step) for pair in found.items()])
                self._losses[step] = found[LOSS]

    def _log_results(self, client: "MlflowClient") -> None:
        """Log metrics, figures, report and, where there is one, the bundle."""
        from mlflow.entities import Metric, RunTag

        measured, now = run_directory.read_json(self.uri, METRICS), int(time.time() * 1000)
        metrics = [Metric(*pair, now, 0) for pair in values.metrics_of(measured).items()]
        tags = [RunTag(*pair) for pair in (values.code_of() | values.tags_of(measured)).items()]
        client.log_batch(self.run_id, metrics=metrics, tags=tags)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            _download(self.uri, REPORT, folder)
            for file in storage.list_files_if_any(storage.join(self.uri, FIGURES)):
                _download(self.uri, f"{FIGURES}/{file.path}", folder)
            client.log_artifacts(self.run_id, name)
        model_uri = self.model_uri or storage.join(self.uri, run_directory.MODEL)
        if bundle.is_complete(model_uri):
            self._log_bundle(client, model_uri)

    def _log_bundle(self, client: "MlflowClient", model_uri: str) -> None:
        """Log a bundle as a model that `mlflow.pyfunc` loads: its files, and the name of their loader."""
        from mlflow.models import Model

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for file in bundle.FILES:
                if storage.exists(storage.join(model_uri, file)):
                    _download(model_uri, file, folder / DATA)
            bundle.identify(str(folder / DATA))  # whole, or logged the next time
            model = Model(artifact_path=run_directory.MODEL, run_id=self.run_id)
            about = {"loader_module": pyfunc.__name__, "python_version": platform.python_version()}
            model.add_flavor("python_function", data=DATA, **about)
            model.save(str(folder / "MLmodel"))
            client.log_artifacts(self.run_id, name, run_directory.MODEL)

    def _read(self, name: str) -> Any:
        """A file of the folder; None before it is written."""
        there = storage.exists(storage.join(self.uri, name))
        return run_directory.read_json(self.uri, name) if there else None


def _download(uri: str, name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    storage.download(storage.join(uri, name), folder / name)
