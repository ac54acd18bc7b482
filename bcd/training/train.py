"""Train a model: index, split, balance, stream, fit, bundle, evaluate. One call, resumable at every step."""

import time

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
from bcd.training import export, loop, process_group


def run(
    config: TrainConfig, inspected: tuple[pa.Table, DatasetFacts] | None = None, runs_per_node: int = 1
) -> str:
    """Train, write the bundle, evaluate it on the test part, and report.

    Running the same config again goes on where it was stopped, or says that it is finished.

    Args:
        config: of the run.
        inspected: the data, from `prepare.load_data_set`, where the caller has already read them.
        runs_per_node: how many runs share the cores of a node at a time, this one included.

    Returns:
        URI of the run directory.

    Raises:
        BcdError: what the user can put right, before any long work where that is possible.
    """
    run_uri = storage.join(config.output, config.name)
    if run_directory.begin_run(config, run_uri):
        if (fault := export.fault(run_uri)) is None:
            print(f"{run_uri} is finished: see report.html there, or choose another --name to train anew")
            return run_uri
        print(f"{fault}. Writing a new bundle from its checkpoint", flush=True)
    started = time.time()
    given = weights.pretrained(config.weights, config.architecture)
    cluster.connect(trains=True)
    scaling = cluster.scaling(config)
    table, facts = _prepared(config, run_uri, inspected)
    result = train_model(config, run_uri, table, given, scaling, runs_per_node)
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
    """The split of this run: made once, then read back, so that a resumed run cannot see another one. It
    reads every image again first, because what was withdrawn or changed since must not be trained on.

    Only now is the run directory claimed: a run that failed on its data may be tried again with other data.
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
    given: weights.State | None,
    scaling: ScalingConfig,
    runs_per_node: int = 1,
) -> Result:
    """Train on the split rows, from the last checkpoint of the run where there is one.

    The result's `return_value` is the history, a record per epoch.

    Raises:
        BcdError: what the user can put right, such as a training that diverges.
    """
    streams, n_train = streams_of(config, table)
    filesystem, path = storage.resolve(run_uri)
    classes, shared = taxonomy.classes(config.target), given and ray.put(given)
    task = loop.Task(config, classes, shared, run_uri, n_train, runs_per_node)
    trainer = TorchTrainer(
        loop.train,
        train_loop_config=task,
        torch_config=process_group.ProcessGroup(),
        scaling_config=scaling,
        datasets=streams,
        dataset_config=datasets.SplitData(storage.join(run_uri, loop.EXPOSURE)),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=filesystem,
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env=cluster.MODEL_ENV,
            failure_config=FailureConfig(max_failures=config.max_failures),
            # The latest is kept as well, to go on from; of two, one is left where another is damaged.
            checkpoint_config=CheckpointConfig(
                num_to_keep=2, checkpoint_score_attribute=loop.SELECTION, checkpoint_score_order="max"
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
    """What ended a training, as a sentence where the user can put it right: one of ours, or that storage
    failed Ray Train, which keeps the checkpoints."""
    faults: list[Exception] = []
    if isinstance(error, WorkerGroupError):
        faults = list(error.worker_failures.values())
    if isinstance(error, ControllerError):
        faults = [error.controller_failure]
    told = [fault for fault in faults if isinstance(fault, BcdError)]
    kept = storage.join(run_uri, "checkpoints")
    # Ray's own timeouts are OSErrors, too.
    lost = [fault for fault in faults if isinstance(fault, OSError) and not isinstance(fault, RayError)]
    for fault in lost:
        sentence = str(storage.failure(kept, "keep or read it", fault)).removesuffix(".")
        told.append(StorageError(f"{sentence}; {inspection.ASK_AGAIN}"))
    return told[0] if told else error
