"""Train a model: index, split, balance, stream, fit, bundle, evaluate; resumable at every step."""

import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import ray
from ray.exceptions import RayError
from ray.train import (
    CheckpointConfig,
    ControllerError,
    FailureConfig,
    LoggingConfig,
    Result,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)

from bcd import lease, storage, taxonomy
from bcd.config.options import TIMM
from bcd.config.training import TrainConfig, TrainingConfig
from bcd.errors import BcdError
from bcd.evaluation import evaluate
from bcd.lease import Lease
from bcd.runtime import cluster, datasets, output, run_directory
from bcd.runtime.prepare import (
    DatasetFacts,
    describe_split,
    load_data_set,
    located,
    log_warnings,
    prepare,
    store_of,
)
from bcd.runtime.run_directory import EXPOSURE, SELECTION
from bcd.runtime.tracking.follow import followed
from bcd.training import export, feed
from bcd.training.feed import Feed, Held

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from bcd.model.weights import State

logger = logging.getLogger(__name__)

Settings = TypeVar("Settings", bound=TrainingConfig)


def run(
    config: TrainConfig,
    inspected: tuple[pa.Table, DatasetFacts] | None = None,
    runs_per_node: int = 1,
    held: Held | None = None,
    follows: bool = True,
) -> str:
    """Train, write the bundle, evaluate it on the test part, report, and return the URI of the run directory.

    Running the same config again resumes the run, or reports that it is finished.

    Args:
        config: of the run.
        inspected: result of `prepare.load_data_set`, if the caller has it.
        runs_per_node: number of runs that share the cores of a node, including this one.
        held: the images of `inspected`, if the caller holds them in memory.
        follows: log the run to MLflow, which a study does for its folds.

    Raises:
        BcdError: an error for the user, before any long work where possible.
    """
    config = resolved(config)
    run_uri = storage.join(config.output, config.name)
    if _open_work(config, run_uri) is not None:
        logged = followed(run_uri, config.name) if follows else nullcontext()
        with lease.held(run_uri, config.wait) as own, logged:
            # Another job may have finished it meanwhile.
            if (work := _open_work(config, run_uri)) is not None:
                logger.info(work)
                _complete(config, run_uri, own, inspected, runs_per_node, held)
                return run_uri
    logger.info(f"{run_uri} is finished: see report.html there, or choose another --name to train again")
    return run_uri


def resolved(config: Settings) -> Settings:
    """The settings with what timm states about a network of its own in place of what was not given: input
    size, mean and standard deviation. Raises BcdError where it has no such network."""
    if not config.architecture.startswith(TIMM):
        return config
    from bcd.model.networks import timm_weights  # not at the top: a job starts without torch

    stated = timm_weights.stated(config.architecture, config.weights)
    sizes = {"input_height_px": stated.height_px, "input_width_px": stated.width_px}
    names: dict[str, Any] = sizes | {"mean": stated.mean, "std": stated.std}
    return config.model_copy(update={name: getattr(config, name) or value for name, value in names.items()})


def _open_work(config: TrainConfig, run_uri: str) -> str | None:
    """What a run lacks, as a line of the log; None if it is finished."""
    if not run_directory.begin_run(config, run_uri):
        return f"training {run_uri}"
    fault = export.fault(run_uri)
    return fault and f"{fault}. Writing a new bundle from its checkpoint"


def _complete(
    config: TrainConfig,
    run_uri: str,
    own: Lease,
    inspected: tuple[pa.Table, DatasetFacts] | None,
    runs_per_node: int,
    held: Held | None,
) -> None:
    """Train, or continue a run, and evaluate it."""
    started = time.time()
    with ThreadPoolExecutor(1) as pool:
        # Ray starts meanwhile.
        reading = pool.submit(initial_weights, config)
        cluster_ends = cluster.connect()
        pretrained = reading.result()
    scaling = cluster.scaling(config)
    table, facts = split_of(config, run_uri, inspected, own)
    table = located(table, store_of(config))
    stain = feed.stain_of(config, run_uri, table)
    fed = feed.feed_of(config, table, held, stain)
    result = train_model(
        *(config, run_uri, fed, pretrained, scaling, runs_per_node, started), cluster_ends=cluster_ends
    )
    own.require()
    run_directory.write_json(run_uri, run_directory.HISTORY, result.return_value)
    export.bundle_of(config, storage.join(run_uri, run_directory.MODEL), table, facts, result, stain)
    trained = time.time()
    owner = output.claim_folder(run_uri, output.TRAIN)
    evaluate.evaluate(storage.join(run_uri, run_directory.MODEL), table, facts, run_uri, owner)
    timings = {"train_s": round(trained - started, 1), "evaluate_s": round(time.time() - trained, 1)}
    own.require()
    run_directory.finish_run(config, run_uri, timings | _rates(result.return_value))


def _rates(history: list[dict[str, Any]]) -> dict[str, Any]:
    """When the first step ended, and how well the last epoch was fed; None in a run of an older version."""
    last = {name: history[-1].get(name) for name in ("headspace", "images_from")}
    return {"first_step_s": history[0].get("first_step_s")} | last


def initial_weights(config: TrainConfig) -> "State | None":
    """The tensors of `--weights`; None for random ones. Raises BcdError."""
    from bcd.model import weights  # takes seconds, with torch

    return weights.pretrained(config.weights, config.architecture, config.input_size_px)


def split_of(
    config: TrainConfig, run_uri: str, inspected: tuple[pa.Table, DatasetFacts] | None, own: Lease
) -> tuple[pa.Table, DatasetFacts]:
    """The split rows of this run and facts about them, made once and read back by a resumed run.

    A resumed run reads every image again, because images withdrawn or changed since must not be trained on.
    The run directory is claimed only here, so that a run that failed on its data may be repeated with others.
    """
    inspected = inspected or load_data_set(config)
    if (table := run_directory.resume(config, run_uri, inspected[0])) is not None:
        return table, DatasetFacts(**run_directory.read_json(run_uri, run_directory.DATA))
    table, facts = prepare(config, inspected)
    export.require_valid_card(config, table, facts)
    run_directory.claim_run(config, run_uri, own.require)
    run_directory.write_json(run_uri, run_directory.DATA, facts.model_dump())
    run_directory.write_split(run_uri, table)
    log_warnings(facts, config.protocol)
    for line in describe_split(config, table, facts):
        logger.info(line)
    return table, facts


def refit(config: TrainConfig, run_uri: str, rows: pa.Table) -> Result:
    """Train on all rows, none of which validates, from the last checkpoint of the run; the last epoch is the
    best. Raises BcdError."""
    started = time.time()
    rows = located(rows, store_of(config))
    fed = feed.feed_of(config, rows, stain=feed.stain_of(config, run_uri, rows))
    return train_model(
        config, run_uri, fed, initial_weights(config), cluster.scaling(config), started=started
    )


def train_model(
    config: TrainConfig,
    run_uri: str,
    fed: Feed,
    pretrained: "State | None",
    scaling: ScalingConfig,
    runs_per_node: int = 1,
    started: float = 0.0,
    callbacks: Sequence[UserCallback] = (),
    *,
    cluster_ends: bool = False,
) -> Result:
    """Train from the last checkpoint of the run, or raise BcdError; `return_value` is the history.

    `started` is when the job started, in seconds since 1970; `callbacks` see every epoch; `cluster_ends` with
    this training.
    """
    # Not at the top: a job starts without torch.
    from bcd.training.task import ProcessGroup, Task, Trainer

    classes, shared = taxonomy.classes(config.target), pretrained and ray.put(pretrained)
    listed = fed.listed and ray.put(fed.listed)
    task = Task(
        *(config, classes, shared, run_uri, fed.n_train, runs_per_node, listed, started),
        class_weights=fed.class_weights,
        stain=fed.stain,
        validates=fed.validates,
    )

    def work(given: Task) -> list[dict[str, Any]] | BcdError:
        # Not at the top: only workers need it, and it takes seconds to import.
        from bcd.training import loop

        return loop.train(given)

    trainer = Trainer(
        work,
        cluster_ends=cluster_ends,
        train_loop_config=task,
        torch_config=ProcessGroup(),
        scaling_config=scaling,
        datasets=fed.streams,
        dataset_config=datasets.SplitData(storage.join(run_uri, EXPOSURE)),
        run_config=kept_in(run_uri, config.max_failures, callbacks),
    )
    return fitted(trainer, run_uri)


def fitted(trainer: "TorchTrainer", run_uri: str) -> Result:
    """The result of a training; raises the BcdError that ended it, or that its workers returned."""
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise for_people(error, run_uri) from error
    if isinstance(result.return_value, BcdError):
        raise result.return_value
    return result


def kept_in(run_uri: str, max_failures: int, callbacks: Sequence[UserCallback] = ()) -> RunConfig:
    """Where and which checkpoints are kept, how often a lost worker is replaced, and what sees epochs."""
    filesystem, path = storage.resolve(run_uri)
    return RunConfig(
        name="checkpoints",
        storage_path=path,
        storage_filesystem=filesystem,
        logging_config=LoggingConfig(log_level="WARNING"),
        worker_runtime_env=cluster.worker_env(),
        failure_config=FailureConfig(max_failures=max_failures),
        callbacks=[*callbacks],
        # Besides the best, Ray keeps the latest, to resume from; two, in case one is damaged.
        checkpoint_config=CheckpointConfig(
            num_to_keep=2, checkpoint_score_attribute=SELECTION, checkpoint_score_order="max"
        ),
    )


def for_people(error: TrainingFailedError, run_uri: str) -> Exception:
    """The cause of a failed training if it is an error for the user: one of bcd's, the loss of a process, or
    one of the storage in which Ray Train keeps the checkpoints; else the error itself."""
    causes: list[Exception] = []
    if isinstance(error, WorkerGroupError):
        causes = list(error.worker_failures.values())
    if isinstance(error, ControllerError):
        causes = [error.controller_failure]
    for cause in causes:
        if isinstance(cause, BcdError):
            return cause
    for cause in causes:
        # Ray's own timeouts are OSErrors, too.
        if isinstance(cause, OSError) and not isinstance(cause, RayError):
            return storage.failure(storage.join(run_uri, "checkpoints"), "keep or read it", cause)
    # Of a worker that does not answer, what Ray Train met when it asked.
    found = [cluster.loss_of(getattr(cause, "health_check_failure", cause)) for cause in causes]
    return next(filter(None, found), error)
