"""Settings from a file (`--config`), and settings as the flags of a command."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from bcd import storage
from bcd.config.options import Config
from bcd.errors import ConfigError
from bcd.text import listed

FLAG = "--config"
# Settings of a job have a few kilobytes; a table of images that is given by mistake has more.
MOST_BYTES = 2**20
# What is null in YAML and JSON, read as text.
NULLS = ("", "~", "null", "Null", "NULL")
Jobs = Mapping[str, type[Config]]


def expanded(arguments: Sequence[str], job: str, jobs: Jobs) -> list[str]:
    """The arguments of a job with those of its `--config FILE` in place of it, before all others, which have
    priority: a command that is complete without the file.

    Args:
        arguments: of the command line.
        job: a key of `jobs`.
        jobs: the settings of every job.

    Raises:
        ConfigError: the file is none of settings of this job.
        StorageError: it cannot be read.
    """
    own, uris, rest = [], [], iter(arguments)
    for argument in rest:
        flag, is_joined, value = argument.partition("=")
        if flag != FLAG:
            own.append(argument)
        elif (uri := value if is_joined else next(rest, "")) and not uri.startswith("-"):
            uris.append(uri)
        else:
            raise ConfigError(f"{FLAG} needs the path or URI of a file of settings")
    if len(uris) > 1:
        raise ConfigError(f"{FLAG} is given twice, as {listed(uris)}: expected one file")
    if not uris:
        return own
    kind = jobs[job]
    given = read_settings_file(uris[0], job, jobs)
    places = [name for name, field in fields_of(kind).items() if _is_positional(field)]
    n_own = next((i for i, argument in enumerate(own) if argument.startswith("-")), len(own))
    flags = as_flags({name: value for name, value in given.items() if name not in places})
    return [*own[:n_own], *(given[name] for name in places[n_own:] if name in given), *flags, *own[n_own:]]


def fields_of(kind: type[Config]) -> dict[str, FieldInfo]:
    """The settings of a job by the names of their flags, with `_` for `-`."""
    return {field.alias or name: field for name, field in kind.model_fields.items() if name != "config"}


def as_flags(settings: Mapping[str, Any]) -> list[str]:
    """The arguments of a command that gives these settings, by names as of `fields_of`; nothing for null."""
    flags: list[str] = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, tuple | list):
            flags += [flag, *map(str, value)]
        elif value is not None:
            flags += [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]
    return flags


def read_settings_file(uri: str, job: str, jobs: Jobs) -> dict[str, Any]:
    """The settings of a job in a file of YAML or JSON, by names as of `fields_of`. Raises ConfigError and
    StorageError."""
    found = {str(name).replace("-", "_"): value for name, value in _parsed(uri).items()}
    _require_known(uri, found.keys(), job, jobs)
    fields = fields_of(jobs[job])
    return {name: _value(uri, name, value, fields[name]) for name, value in found.items()}


def _parsed(uri: str) -> dict[Any, Any]:
    """The mapping in a file; numbers as the text that is written there, as on the command line: YAML 1.1
    would take `off` for false, and 1e-4 for a word."""
    try:
        content = storage.read_bytes(uri, MOST_BYTES).decode()
        if uri.lower().endswith(".json"):
            found = json.loads(content, parse_int=str, parse_float=str)
        else:
            found = yaml.load(content, yaml.BaseLoader)
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{uri}: neither YAML nor JSON: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{uri}: expected settings, each as NAME: VALUE, not {type(found).__name__}")
    return found


def _require_known(uri: str, names: Any, job: str, jobs: Jobs) -> None:
    """Raise ConfigError for a name that is no setting of the job; says of which job it is, or which is
    nearest."""
    known = fields_of(jobs[job])
    if not (unknown := [name for name in names if name not in known]):
        return
    others = [f"bcd {other}" for other, kind in jobs.items() if names <= fields_of(kind).keys()]
    if others:
        raise ConfigError(
            f"{uri} has settings of {' or '.join(others)}, not of bcd {job}, which has no {unknown[0]!r}"
        )
    owners = [f"bcd {other}" for other, kind in jobs.items() if unknown[0] in fields_of(kind)]
    near = difflib.get_close_matches(unknown[0], known, 1)
    hint = f"bcd {job} --help lists them"
    if owners:
        hint = f"it is one of {listed(owners)}"
    elif near:
        hint = f"did you mean {near[0]!r}?"
    raise ConfigError(f"{uri}: {unknown[0]!r} is no setting of bcd {job}; {hint}")


def _value(uri: str, name: str, value: Any, field: FieldInfo) -> Any:
    """The value of a setting, of the type of its field."""
    is_switch = get_origin(field.annotation) is Literal and "off" in get_args(field.annotation)
    if isinstance(value, bool):  # of JSON
        value = ("on" if value else "off") if is_switch else str(value).lower()
    value = None if isinstance(value, str) and value in NULLS else value
    kind: Any = Annotated[field.annotation, field]
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{uri}: {name}: {message[0].lower()}{message[1:]}, not {value!r}") from None


def _is_positional(field: FieldInfo) -> bool:
    return get_args(tyro.conf.Positional[str])[1] in field.metadata
