"""Train a model: index, split, balance, stream, fit, bundle, evaluate. One call, resumable at every step."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import Dataset
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    Result,
    RunConfig,
    ScalingConfig,
    WorkerGroupError,
)
from ray.train.torch import TorchTrainer
from safetensors.torch import load_file

from bcd import balance, bundle, model, provenance, schema, split, storage, taxonomy
from bcd.config import TrainConfig, differences
from bcd.errors import BcdError, ConfigError
from bcd.pipelines import cluster, evaluate, features, read, worker
from bcd.pipelines.prepare import Facts, describe, part_of, prepare

CONFIG, RUN, DATA, SPLIT, MODEL = "config.json", "run.json", "data.json", "split.parquet", "model"
FINISHED = "finished"


def run(config: TrainConfig) -> str:
    """Train, write the bundle, evaluate it on the test part, and report.

    Running the same config again goes on where it was stopped, or says that it is finished.

    Returns:
        URI of the run directory.

    Raises:
        BcdError: what the user can put right, before any long work where that is possible.
    """
    run_uri = storage.join(config.output, config.name)
    if _begin(config, run_uri):
        print(f"{run_uri} is finished: see report.html there, or choose another --name to train anew")
        return run_uri
    started = time.time()
    classes = taxonomy.classes(config.target)
    weights = model.pretrained(config.weights)
    model.build(len(classes), weights)  # wrong weights end the run here, not in a worker
    cluster.connect()
    scaling = cluster.scaling(config)
    table, facts = _prepared(config, run_uri)
    result = fit(config, run_uri, table, weights, scaling)
    _write_json(run_uri, evaluate.HISTORY, result.return_value)
    _publish_bundle(config, run_uri, table, facts, result)
    trained = time.time()
    evaluate.evaluate(storage.join(run_uri, MODEL), table, facts, run_uri)
    timings = {"train_s": round(trained - started, 1), "evaluate_s": round(time.time() - trained, 1)}
    _write_json(run_uri, RUN, _run_facts(config) | {"status": FINISHED, "timings": timings})
    return run_uri


def _begin(config: TrainConfig, run_uri: str) -> bool:
    """Check that the run directory is ours and can be written; whether the run is already finished.

    Raises:
        ConfigError: it belongs to a run with other settings, which are named.
        StorageError: nothing can be written there.
    """
    settings = config.model_dump(mode="json")
    if not storage.exists(storage.join(run_uri, CONFIG)):
        storage.check_writable(run_uri)
        return False
    if differing := differences(_read_json(run_uri, CONFIG), settings):
        raise ConfigError(
            f"{run_uri} was started with other settings: {'; '.join(differing)}. "
            "Repeat them to go on, or choose another --name"
        )
    if _read_json(run_uri, RUN).get("status") == FINISHED:
        return True
    storage.check_writable(run_uri)
    return False


def _run_facts(config: TrainConfig) -> dict[str, Any]:
    return {
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "command": provenance.command(),
        "seed": config.seed,
    }


def _prepared(config: TrainConfig, run_uri: str) -> tuple[pa.Table, Facts]:
    """The split of this run: made once, then read back, so that a resumed run cannot see another one.

    Only now is the run directory claimed: a run that failed on its data may be tried again with other data.
    """
    split_uri = storage.join(run_uri, SPLIT)
    if storage.exists(split_uri):
        table = pq.read_table(io.BytesIO(storage.read_bytes(split_uri)))
        return table.cast(schema.SPLIT), Facts(**_read_json(run_uri, DATA))
    table, facts = prepare(config)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    _write_json(run_uri, DATA, facts.model_dump())
    _write_json(run_uri, RUN, _run_facts(config) | {"status": "started"})
    _write_json(run_uri, CONFIG, config.model_dump(mode="json"))
    storage.write_bytes(split_uri, buffer.getvalue())
    print("\n".join(describe(config, table, facts)), flush=True)
    return table, facts


def datasets(config: TrainConfig, table: pa.Table) -> tuple[dict[str, Dataset], int]:
    """The training and validation streams of a split table, and the number of balanced training rows."""
    classes = taxonomy.classes(config.target)
    parts = {
        part: _with_target(part_of(table, part), config.target, classes)
        for part in (read.TRAIN, read.VALIDATION)
    }
    balanced = balance.upsample(parts[read.TRAIN], config.balance, config.seed)
    size = (config.input_height_px, config.input_width_px)
    keep = [schema.IMAGE_ID, schema.TARGET]
    return {
        read.TRAIN: read.images(read.shuffled(balanced, config.seed), *size, keep),
        read.VALIDATION: read.images(read.rows(parts[read.VALIDATION]), *size, keep),
    }, len(balanced)


def _with_target(table: pa.Table, target: str, classes: tuple[str, ...]) -> pa.Table:
    indices = [classes.index(name) for name in table[target].to_pylist()]
    return table.append_column(schema.TARGET, pa.array(indices, pa.int64()))


def fit(
    config: TrainConfig, run_uri: str, table: pa.Table, weights: model.State | None, scaling: ScalingConfig
) -> Result:
    """Train on the split rows, from the last checkpoint of the run where there is one.

    The result's `return_value` is the history, a record per epoch.
    """
    streams, n_train = datasets(config, table)
    filesystem, path = storage.resolve(run_uri)
    task = worker.Task(
        config, taxonomy.classes(config.target), weights and ray.put(weights), run_uri, n_train
    )
    trainer = TorchTrainer(
        worker.train,
        train_loop_config=task,
        scaling_config=scaling,
        datasets=streams,
        dataset_config=read.SplitData(),
        run_config=RunConfig(
            name="checkpoints",
            storage_path=path,
            storage_filesystem=filesystem,
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env=cluster.KEEP_MEMORY,
            failure_config=FailureConfig(max_failures=config.max_failures),
            # The latest is kept as well, to go on from.
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=worker.SELECTION, checkpoint_score_order="max"
            ),
        ),
    )
    try:
        return trainer.fit()
    except WorkerGroupError as error:
        for fault in error.worker_failures.values():
            if isinstance(fault, BcdError):
                raise fault from error
        raise


def _publish_bundle(config: TrainConfig, run_uri: str, table: pa.Table, facts: Facts, result: Result) -> None:
    """Write the best epoch by validation balanced accuracy as the bundle."""
    checkpoint, measured = max(result.best_checkpoints, key=lambda pair: pair[1][worker.SELECTION])
    network = model.build(len(taxonomy.classes(config.target)))
    with checkpoint.as_directory() as folder:
        network.load_state_dict(load_file(Path(folder) / worker.WEIGHTS_FILE))
    train = part_of(table, read.TRAIN)
    card = bundle.Card(
        target=config.target,
        classes=taxonomy.classes(config.target),
        input_height_px=config.input_height_px,
        input_width_px=config.input_width_px,
        field_height_px=facts.field_height_px,
        field_width_px=facts.field_width_px,
        mpp=_distinct(train, schema.MPP),
        magnifications=_distinct(train, schema.MAGNIFICATION),
        protocol=config.protocol,
        fold=config.fold,
        seed=config.seed,
        data_fingerprint=facts.data_fingerprint,
        split_fingerprint=facts.split_fingerprint,
        leaky=config.protocol in split.LEAKY,
        synthetic=facts.synthetic,
        training=config.model_dump(mode="json"),
        validation={name: measured[name] for name in (schema.EPOCH, worker.SCORE, "n_validation")},
        versions=provenance.versions(),
        git_commit=provenance.git_commit(),
    )
    statistics = features.statistics(network, card, train, part_of(table, read.VALIDATION))
    card = card.model_copy(update={"feature_statistics": statistics})
    bundle.save(network, card, storage.join(run_uri, MODEL))


def _distinct(table: pa.Table, column: str) -> tuple[Any, ...]:
    return tuple(sorted({round(v, 4) for v in table[column].to_pylist() if v is not None}))


def _write_json(run_uri: str, name: str, content: Any) -> None:
    storage.write_bytes(storage.join(run_uri, name), json.dumps(content, indent=2).encode())


def _read_json(run_uri: str, name: str) -> dict[str, Any]:
    uri = storage.join(run_uri, name)
    try:
        return json.loads(storage.read_bytes(uri))
    except json.JSONDecodeError as error:
        raise BcdError(f"{uri} is damaged: {error}; delete the run directory and train anew") from error
