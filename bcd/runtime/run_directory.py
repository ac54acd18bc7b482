"""The directory of a run: its owner, whether it is finished, and the files from which a run resumes."""

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from bcd import provenance, schema, storage
from bcd.config.options import differences
from bcd.config.scoring import PoolConfig
from bcd.config.training import TrainConfig, TrainingConfig, TuneConfig
from bcd.errors import BcdError, ConfigError, DataError
from bcd.runtime import output
from bcd.split import split

CONFIG, RUN, DATA, SPLIT, MODEL = "config.json", "run.json", "data.json", "split.parquet", "model"
HISTORY, STAIN = "history.json", "stain.json"
METRICS, REPORT, FIGURES = "metrics.json", "report.html", "figures"
IMAGES = "test_images.parquet"
FINISHED = "finished"
# Folder of the run with a table per finished epoch: the images that it trained on.
EXPOSURE = "exposure"
# In the record of an epoch.
SCORE = "validation_balanced_accuracy"
# Chooses the best epoch: by score, then by loss. On a small validation part many epochs have equal scores,
# and the first of them is seldom the best.
SELECTION = "selection"
# Of a job that writes a run directory.
Settings = TrainingConfig | PoolConfig


def begin_run(config: Settings, run_uri: str) -> bool:
    """Check that the run directory belongs to this run; True if the run is finished.

    Raises:
        ConfigError: it belongs to a run with other settings, or contains foreign files.
    """
    output.read_marker(run_uri, _job(config))
    if storage.exists(storage.join(run_uri, CONFIG)):
        new = config.deciding()
        operational = config.names() - new.keys()
        old = {name: value for name, value in read_json(run_uri, CONFIG).items() if name not in operational}
        if differing := differences(old, new):
            raise ConfigError(
                f"{run_uri} was started with other settings: {'; '.join(differing.values())}. "
                "Repeat the earlier settings to resume, or choose another --name"
            )
        if read_json(run_uri, RUN).get("status") == FINISHED:
            return True
    return False


def claim_run(config: Settings, run_uri: str, before: Callable[[], None] = lambda: None) -> None:
    """Claim the directory for this run (see `output.claim_folder`). `before` is called before each file that
    could replace one of another job, and may raise."""
    output.claim_folder(run_uri, _job(config), before)
    before()
    write_json(run_uri, RUN, _facts(config) | {"status": "started"})
    write_json(run_uri, CONFIG, config.model_dump(mode="json"))


def _job(config: Settings) -> str:
    if isinstance(config, PoolConfig):
        return output.POOL
    if isinstance(config, TuneConfig):
        return output.TUNE
    return output.TRAIN if isinstance(config, TrainConfig) else output.CROSSVAL


def finish_run(config: Settings, run_uri: str, timings: dict[str, Any]) -> None:
    """Mark the run as finished, with its durations in seconds, and what they depended on."""
    write_json(run_uri, RUN, _facts(config) | {"status": FINISHED, "timings": timings})


def _facts(config: Settings) -> dict[str, Any]:
    return {
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "command": provenance.command(),
        "seed": config.seed,
    }


def write_split(run_uri: str, table: pa.Table) -> None:
    """Write the split rows of the run."""
    storage.write_table(storage.join(run_uri, SPLIT), table)


def read_split(run_uri: str) -> pa.Table | None:
    """The split rows (schema `schema.SPLIT`) of the run, or None before they are written."""
    uri = storage.join(run_uri, SPLIT)
    return schema.fill(storage.read_table(uri), schema.SPLIT) if storage.exists(uri) else None


def resume(config: TrainConfig, run_uri: str, now: pa.Table) -> pa.Table | None:
    """`read_split`, after checking that it agrees with the data now, from `prepare.load_data_set`.

    Raises:
        DataError: the data differ: a patient withdrawn since must not be trained on again.
    """
    if (before := read_split(run_uri)) is None:
        return None
    if config.fold or config.held_out:  # which ignore parts given with the data
        now = schema.fill(now, schema.INDEX)
    if changes := split.changes(before, now):
        raise DataError(
            f"{config.data} has changed since {run_uri} was split: {'; '.join(changes)}. "
            "Restore it, or choose another --name for a new run"
        )
    return before


def write_json(run_uri: str, name: str, content: Any) -> None:
    """Write a file of the run."""
    storage.write_bytes(storage.join(run_uri, name), json.dumps(content, indent=2).encode())


def read_json(run_uri: str, name: str) -> Any:
    """Read a file of the run; raises BcdError if it is damaged."""
    uri = storage.join(run_uri, name)
    try:
        return json.loads(storage.read_bytes(uri))
    except json.JSONDecodeError as error:
        raise BcdError(f"{uri} is damaged: {error}; delete the run directory and train again") from error
