"""The settings that a search may change, and their values, from a YAML file.

learning_rate: {loguniform: [1.0e-5, 1.0e-3]}
dropout: {uniform: [0, 0.5]}
batch_size: {integer: [16, 64]}
optimizer: [adamw, sgd]
"""

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from bcd import storage
from bcd.config.options import Role
from bcd.config.training import TrainConfig, TrainingConfig, TuneConfig
from bcd.errors import ConfigError

# What all trials have the same.
FIXED = Role.OPERATIONAL, Role.SHARED, Role.NETWORK
EXPECTED = (
    "a list of values, or {uniform: [LOW, HIGH]}, {loguniform: [LOW, HIGH]} or {integer: [LOW, HIGH]}; "
    "in YAML 1e-5 is text, and 1.0e-5 a number"
)


class Values(BaseModel):
    """The values of one setting: one of `choice`, or a range from the first to the second number."""

    model_config = ConfigDict(extra="forbid", strict=True)

    choice: tuple[Any, ...] | None = None
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    integer: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _is_one_kind(self) -> "Values":
        if len(self.model_fields_set) != 1:
            raise ValueError("expected one kind of values")
        if self.choice is not None and len(self.choice) < 2:
            raise ValueError("expected at least two values")
        if self.choice is None and self.ends()[0] >= self.ends()[1]:
            raise ValueError("the first number has to be below the second")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform is for numbers above 0")
        return self

    def ends(self) -> tuple[Any, ...]:
        """The values that show whether all are possible."""
        (found,) = (getattr(self, kind) for kind in self.model_fields_set)
        return tuple(found)


def read_space(config: TuneConfig) -> dict[str, Values]:
    """The settings of a search by name.

    Raises:
        ConfigError: a setting is unknown, is that of all trials, or cannot have one of its values.
        StorageError: the file cannot be read.
    """
    try:
        given = yaml.safe_load(storage.read_bytes(config.space))
    except yaml.YAMLError as error:
        raise ConfigError(f"--space {config.space}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict) or not given:
        raise ConfigError(f"--space {config.space}: expected settings and their values, such as {EXPECTED}")
    space = {str(name).replace("-", "_"): value for name, value in given.items()}
    if unknown := sorted(space.keys() - TrainingConfig.names(*FIXED)):
        known = ", ".join(sorted(TrainingConfig.names(*FIXED)))
        raise ConfigError(
            f"--space {config.space}: {unknown[0]!r} is no setting in which trials differ: {known}"
        )
    found = {name: _values(config, name, value) for name, value in space.items()}
    for name, values in found.items():
        _require_possible(config, name, values)
    return found


def _values(config: TuneConfig, name: str, given: Any) -> Values:
    kinds = given if isinstance(given, Mapping) else {"choice": given}
    try:
        if not all(isinstance(values, list) for values in kinds.values()):
            raise TypeError
        return Values(**{kind: tuple(values) for kind, values in kinds.items()})
    except (ValidationError, TypeError) as error:
        why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"{given!r}"
        raise ConfigError(
            f"--space {config.space}: {name}: {why.removeprefix('Value error, ')}; expected {EXPECTED}"
        ) from None


def _require_possible(config: TuneConfig, name: str, values: Values) -> None:
    for value in values.ends():
        try:
            training_of(config, {name: value})
        except ConfigError as error:
            raise ConfigError(f"--space {config.space}: {name} cannot be {value!r}: {error}") from None


def training_of(config: TuneConfig, chosen: Mapping[str, Any], **changes: str) -> TrainConfig:
    """The training of a trial, with what was chosen for it; raises ConfigError if it is impossible."""
    own = config.model_dump(include=set(TrainConfig.model_fields))
    return TrainConfig(**own | dict(chosen) | changes)
