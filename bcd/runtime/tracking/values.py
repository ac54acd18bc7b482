"""What trackers and TensorBoard show of a run: settings, records of epochs and metrics as flat names."""

from collections.abc import Iterator, Mapping
from typing import Any

from bcd import provenance, schema
from bcd.text import without_folders

# Of a parameter or tag: what servers since 2021 accept.
MAX_CHARACTERS = 500
# Of `metrics.json`, beside the metrics of all images.
COUNTS = ("n_images", "n_patients", "n_errors", "threshold", "temperature")
# Of `metrics.json`, for tags: which model and data, and whatever qualifies the numbers.
FACTS = (
    *(schema.MODEL_ID, "data_fingerprint", "split_fingerprint", "protocol", "held_out", "tested_on"),
    *("synthetic", "leaky", "forced", "too_few_patients"),
)


def settings_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a job that are set, as text, without the folders of this machine."""
    flat = {name: value for name, value in _flat(config) if value is not None}
    return {name: _text(value) for name, value in flat.items()}


def epoch_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an epoch's record."""
    return {name: float(value) for name, value in _flat(record) if _is_number(value)}


def metrics_of(measured: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of all test images with the bounds of their 95 % intervals (`auc`, `auc.low`, `auc.high`),
    their spread over folds (`auc.fold_mean`, `auc.fold_sd`), and `COUNTS`; undefined ones are left out."""
    pooled, spread = measured["pooled"], measured.get("spread") or {}
    found: dict[str, Any] = {name: value for name, value in pooled.items() if not isinstance(value, list)}
    for name, ends in (pooled.get("intervals") or {}).items():
        found |= {f"{name}.{end}": value for end, value in zip(("low", "high"), ends or (), strict=False)}
    for name, row in spread.items():
        found |= {f"{name}.fold_mean": row["mean"], f"{name}.fold_sd": row["sd"]}
    found |= {name: measured.get(name) for name in COUNTS}
    return {name: float(value) for name, value in found.items() if _is_number(value)}


def tags_of(measured: Mapping[str, Any]) -> dict[str, str]:
    """The `FACTS` of an evaluation that are there, as text."""
    return {name: _text(measured[name]) for name in FACTS if measured.get(name)}


def code_of() -> dict[str, str]:
    """Version and git commit of this code."""
    found = {schema.BCD_VERSION: provenance.own_version(), "git_commit": provenance.git_commit()}
    return {name: value for name, value in found.items() if value}


def _flat(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Pairs of a JSON object; those of an object within it as `name.key`."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", inner) for key, inner in _flat(value))
        else:
            yield name, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    parts = value if isinstance(value, list | tuple) else [value]
    return ", ".join(without_folders(str(part)) for part in parts)[:MAX_CHARACTERS]
