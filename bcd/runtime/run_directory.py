"""The directory of a run: whose it is, whether it is finished, and the files that a rerun goes on from."""

import json
from typing import Any

import pyarrow as pa

from bcd import provenance, schema, storage
from bcd.config.options import changed_flags
from bcd.config.training import TrainConfig, TrainingConfig
from bcd.errors import BcdError, ConfigError, DataError
from bcd.runtime import output
from bcd.split import split

CONFIG, RUN, DATA, SPLIT, MODEL = "config.json", "run.json", "data.json", "split.parquet", "model"
HISTORY = "history.json"
FINISHED = "finished"


def begin_run(config: TrainingConfig, run_uri: str) -> bool:
    """Check that the run directory is ours and can be written; whether the run is already finished.

    Raises:
        ConfigError: it belongs to a run with other settings, which are named, or contains anything else.
        StorageError: nothing can be written there.
    """
    settings = config.model_dump(mode="json")
    output.read_marker(run_uri, _job(config))
    if not storage.exists(storage.join(run_uri, CONFIG)):
        storage.check_writable(run_uri)
        return False
    if differing := changed_flags(read_json(run_uri, CONFIG), settings):
        raise ConfigError(
            f"{run_uri} was started with other settings: {'; '.join(differing)}. "
            "Repeat them to go on, or choose another --name"
        )
    if read_json(run_uri, RUN).get("status") == FINISHED:
        return True
    storage.check_writable(run_uri)
    return False


def claim_run(config: TrainingConfig, run_uri: str) -> None:
    """Make the directory that of this run."""
    output.claim_folder(run_uri, _job(config))
    write_json(run_uri, RUN, _facts(config) | {"status": "started"})
    write_json(run_uri, CONFIG, config.model_dump(mode="json"))


def _job(config: TrainingConfig) -> str:
    return output.TRAIN if isinstance(config, TrainConfig) else output.CROSSVAL


def finish_run(config: TrainingConfig, run_uri: str, timings: dict[str, float]) -> None:
    """Say that the run is finished, and how many seconds it took."""
    write_json(run_uri, RUN, _facts(config) | {"status": FINISHED, "timings": timings})


def _facts(config: TrainingConfig) -> dict[str, Any]:
    return {
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "command": provenance.command(),
        "seed": config.seed,
    }


def write_split(run_uri: str, table: pa.Table) -> None:
    """Keep the split rows of the run."""
    storage.write_table(storage.join(run_uri, SPLIT), table)


def read_split(run_uri: str) -> pa.Table | None:
    """The split rows (schema `schema.SPLIT`) of the run, where it has come so far."""
    uri = storage.join(run_uri, SPLIT)
    if not storage.exists(uri):
        return None
    return schema.fill(storage.read_table(uri), schema.SPLIT)


def resume(config: TrainConfig, run_uri: str, now: pa.Table) -> pa.Table | None:
    """The split rows of the run, where it has come so far, if the data are still the same.

    Args:
        config: of the run.
        run_uri: its directory.
        now: the data, from `prepare.load_data_set`.

    Raises:
        DataError: names what differs: a patient withdrawn since must not be trained on again.
    """
    before = read_split(run_uri)
    if before is None:
        return None
    if config.fold:  # then parts that the data come with are not used
        now = schema.fill(now, schema.INDEX)
    if changes := split.changes(before, now):
        raise DataError(
            f"{config.data} is not what it was when {run_uri} was split: {'; '.join(changes)}. "
            "Restore it, or choose another --name to train anew"
        )
    return before


def write_json(run_uri: str, name: str, content: Any) -> None:
    """Write a file of the run."""
    text = json.dumps(content, indent=2)
    storage.write_bytes(storage.join(run_uri, name), text.encode())


def read_json(run_uri: str, name: str) -> Any:
    """Read a file of the run.

    Raises:
        BcdError: it is damaged.
    """
    uri = storage.join(run_uri, name)
    try:
        return json.loads(storage.read_bytes(uri))
    except json.JSONDecodeError as error:
        raise BcdError(f"{uri} is damaged: {error}; delete the run directory and train anew") from error
