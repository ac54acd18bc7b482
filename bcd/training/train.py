"""Train a model: index, split, balance, stream, fit, bundle, evaluate; resumable at every step."""

import time
from typing import Any

import pyarrow as pa
import ray
from ray.data import Dataset
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
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer

from bcd import schema, storage, taxonomy
from bcd.config.training import TrainConfig
from bcd.errors import BcdError, StorageError
from bcd.evaluation import evaluate
from bcd.model import weights
from bcd.runtime import cluster, datasets, inspection, output, run_directory
from bcd.runtime.prepare import DatasetFacts, describe_split, load_data_set, part_of, prepare
from bcd.split import balance
from bcd.taxonomy import TRAIN, VALIDATION
from bcd.training import export
from bcd.training.task import EXPOSURE, SELECTION, ProcessGroup, Task


def run(
    config: TrainConfig, inspected: tuple[pa.Table, DatasetFacts] | None = None, runs_per_node: int = 1
) -> str:
    """Train, write the bundle, evaluate it on the test part, report, and return the URI of the run directory.

    Running the same config again resumes the run, or reports that it is finished.

    Args:
        config: of the run.
        inspected: result of `prepare.load_data_set`, if the caller has it.
        runs_per_node: number of runs that share the cores of a node, including this one.

    Raises:
        BcdError: an error for the user, before any long work where possible.
    """
    run_uri = storage.join(config.output, config.name)
    if run_directory.begin_run(config, run_uri):
        if (fault := export.fault(run_uri)) is None:
            print(f"{run_uri} is finished: see report.html there, or choose another --name to train again")
            return run_uri
        print(f"{fault}. Writing a new bundle from its checkpoint", flush=True)
    started = time.time()
    pretrained = weights.pretrained(config.weights, config.architecture)
    cluster.connect(trains=True)
    scaling = cluster.scaling(config)
    table, facts = _prepared(config, run_uri, inspected)
    result = train_model(config, run_uri, table, pretrained, scaling, runs_per_node)
    run_directory.write_json(run_uri, run_directory.HISTORY, result.return_value)
    export.bundle_of(config, storage.join(run_uri, run_directory.MODEL), table, facts, result)
    trained = time.time()
    owner = output.claim_folder(run_uri, output.TRAIN)
    evaluate.evaluate(storage.join(run_uri, run_directory.MODEL), table, facts, run_uri, owner)
    timings = {"train_s": round(trained - started, 1), "evaluate_s": round(time.time() - trained, 1)}
    run_directory.finish_run(config, run_uri, timings)
    return run_uri


def _prepared(
    config: TrainConfig, run_uri: str, inspected: tuple[pa.Table, DatasetFacts] | None
) -> tuple[pa.Table, DatasetFacts]:
    """The split rows of this run, made once and read back by a resumed run.

    A resumed run reads every image again, because images withdrawn or changed since must not be trained on.
    The run directory is claimed only here, so that a run that failed on its data may be repeated with others.
    """
    inspected = inspected or load_data_set(config)
    if (table := run_directory.resume(config, run_uri, inspected[0])) is not None:
        return table, DatasetFacts(**run_directory.read_json(run_uri, run_directory.DATA))
    table, facts = prepare(config, inspected)
    export.require_valid_card(config, table, facts)
    run_directory.claim_run(config, run_uri)
    run_directory.write_json(run_uri, run_directory.DATA, facts.model_dump())
    run_directory.write_split(run_uri, table)
    print("\n".join(describe_split(config, table, facts)), flush=True)
    return table, facts


def streams_of(config: TrainConfig, table: pa.Table) -> tuple[dict[str, Dataset], int]:
    """The training and validation streams of a split table, and the number of balanced training rows."""
    classes = taxonomy.classes(config.target)
    parts = {part: _with_target(part_of(table, part), config.target, classes) for part in (TRAIN, VALIDATION)}
    balanced = balance.upsample(parts[TRAIN], config.balance, config.seed)
    size = (config.input_height_px, config.input_width_px)
    keep = [schema.IMAGE_ID, schema.TARGET]
    return {
        TRAIN: datasets.read_images(datasets.shuffled(balanced, config.seed), *size, keep),
        VALIDATION: datasets.read_images(datasets.row_dataset(parts[VALIDATION]), *size, keep),
    }, len(balanced)


def _with_target(table: pa.Table, target: str, classes: tuple[str, ...]) -> pa.Table:
    indices = [classes.index(name) for name in table[target].to_pylist()]
    return table.append_column(schema.TARGET, pa.array(indices, pa.int64()))


def train_model(
    config: TrainConfig,
    run_uri: str,
    table: pa.Table,
    pretrained: weights.State | None,
    scaling: ScalingConfig,
    runs_per_node: int = 1,
) -> Result:
    """Train from the last checkpoint of the run, or raise BcdError; `return_value` is the history."""
    streams, n_train = streams_of(config, table)
    filesystem, path = storage.resolve(run_uri)
    classes, shared = taxonomy.classes(config.target), pretrained and ray.put(pretrained)
    task = Task(config, classes, shared, run_uri, n_train, runs_per_node)

    def work(given: Task) -> list[dict[str, Any]] | BcdError:
        # Not at the top: only workers need it, and it takes seconds to import.
        from bcd.training import loop

        return loop.train(given)

    trainer = TorchTrainer(
        work,
        train_loop_config=task,
        torch_config=ProcessGroup(),
        scaling_config=scaling,
        datasets=streams,
        dataset_config=datasets.SplitData(storage.join(run_uri, EXPOSURE)),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=filesystem,
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env=cluster.MODEL_ENV,
            failure_config=FailureConfig(max_failures=config.max_failures),
            # Besides the best, Ray keeps the latest, to resume from; two, in case one is damaged.
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute=SELECTION, checkpoint_score_order="max"
            ),
        ),
    )
    try:
        result = trainer.fit()
    except TrainingFailedError as error:
        raise for_people(error, run_uri) from error
    if isinstance(result.return_value, BcdError):
        raise result.return_value
    return result


def for_people(error: TrainingFailedError, run_uri: str) -> Exception:
    """The cause of a failed training if it is an error for the user: one of bcd's, or one of the storage in
    which Ray Train keeps the checkpoints; else the error itself."""
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
            failure = storage.failure(storage.join(run_uri, "checkpoints"), "keep or read it", cause)
            return StorageError(f"{str(failure).removesuffix('.')}; {inspection.ASK_AGAIN}")
    return error
