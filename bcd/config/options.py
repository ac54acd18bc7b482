"""What the settings of all jobs share: fields are the flags, and the fields' docstrings are the help.

What training decides (classes, input size, µm/px, threshold) is fixed in the model bundle; other jobs read it
from there and have no such flags.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from bcd.errors import ConfigError
from bcd.taxonomy import given_names

Fraction = Annotated[float, Field(gt=0, lt=1)]
Protocol = Literal["case", "patient", "official", "image", "magnification", "site"]
# Those that test on one value of the column of the same name, and train on the others.
HOLDING_OUT = ("magnification", "site")
Precision = Literal["auto", "float32", "bfloat16"]
Engine = Literal["auto", "torch", "openvino"]
LogFormat = Literal["text", "json"]
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
# Before the name of a network of timm, which numbers in place of those of its name may follow.
TIMM = "timm:"
_TIMM = re.compile(r"timm:\w+(\.[\w-]+)?(,[a-z_]+=[\d.e-]+)*")


def _is_known(name: str) -> str:
    if name not in RESNETS and not _TIMM.fullmatch(name):
        raise ValueError(f"expected {', '.join(RESNETS)} or timm:NAME")
    return name


Architecture = Annotated[str, AfterValidator(_is_known)]
# fmt: off
Cam = Literal["evidence", "gradcam", "gradcam++", "layercam", "eigencam", "xgradcam", "hirescam", "scorecam",
              "ablationcam"]
# fmt: on
# Values of `--prepared` besides a URI: beside the runs, and nowhere. `auto` is one of `--engine`, too.
AUTO: Literal["auto"] = "auto"
OFF = "off"
# Values of `--weights` besides a URI: a download by torchvision or timm, random weights, and the start of a
# name on the Hugging Face Hub.
IMAGENET_WEIGHTS, RANDOM_WEIGHTS, HUB_WEIGHTS = "imagenet", "none", "hf-hub:"
# Our own method of Cam: the closed form.
CLOSED_FORM: Cam = "evidence"
# Networks in one bundle.
MOST_MEMBERS = 64
# Of the network's input: below, the last convolution has no cell; above, no training fits a GPU. A field of
# BreaKHis is 700x460, about 3:2.
MIN_INPUT_PX, MAX_INPUT_PX, INPUT_PX = 32, 4096, (224, 336)
# Largest seed of every generator, with room for the repeats of a cross-validation, which count up from it.
MAX_SEED = 2**31 - 1
WORKERS = re.compile(r"auto|[1-9]\d*|([1-9]\d*)-([1-9]\d*)")


class Role(Enum):
    """What a setting is for, where it does not say how a network is trained or used."""

    OPERATIONAL = "where and with which resources; it does not change the result"
    SHARED = "the same in all trainings that are compared, such as data and split"
    NETWORK = "the network that is trained"


Given = TypeVar("Given")
Operational = Annotated[Given, Role.OPERATIONAL]
Shared = Annotated[Given, Role.SHARED]
OfNetwork = Annotated[Given, Role.NETWORK]


class Config(BaseModel):
    """Frozen settings that reject unknown names and whose errors name the flag."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    # Neither kept nor compared: a job is given what the file contains.
    config: Operational[str | None] = Field(default=None, exclude=True)
    """File with settings, each as NAME: VALUE in YAML or JSON, such as the config.json of a run: local, s3://
    or gs://. Flags have priority over the file, the file over --recipe, and that over defaults."""

    log_format: Operational[LogFormat] = "text"
    """Form of the log: lines of text, or one JSON object per line with time, level, job and message."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        """Make a paragraph of each flag's help, whose lines in the source have another width; required flags
        come first, then a class's own, then those of its bases."""
        fields = cls.model_fields
        for field in fields.values():
            field.description = " ".join((field.description or "").split())
        own_first = [name for base in cls.__mro__ for name in inspect.get_annotations(base) if name in fields]
        for name in sorted(dict.fromkeys(own_first), key=lambda name: not fields[name].is_required()):
            fields[name] = fields.pop(name)

    def deciding(self) -> dict[str, Any]:
        """Values for JSON of the settings that determine the result."""
        return self.model_dump(mode="json", include=self.names(Role.OPERATIONAL))

    @classmethod
    def names(cls, *without: Role) -> set[str]:
        """Names of the settings that have none of these roles."""
        return {name for name, field in cls.model_fields.items() if not {*without} & {*field.metadata}}

    @field_validator("config")
    @classmethod
    def _is_read_before(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("is read by commands, bcd.train and its like: give the settings themselves here")
        return value

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError("; ".join(map(_sentence, error.errors()))) from None


def _sentence(error: Any) -> str:
    flag = "".join(f"--{str(part).replace('_', '-')} " for part in error["loc"][:1])
    message = error["msg"].removeprefix("Value error, ")
    return f"{flag}{message[0].lower()}{message[1:]}" + (f", not {error['input']!r}" if flag else "")


class DryConfig(Config):
    """Settings of a job that can say what it would do."""

    dry_run: Operational[bool] = Field(default=False, exclude=True)
    """Say what would be read, done and written, what is done already, and about how long the rest would
    take, measured on a few images in this process; then end. Nothing is written, and no Ray is started."""


class OutputConfig(Config):
    """Settings of a job that writes into a folder, of which one job at a time has the lease."""

    wait: Operational[bool] = False
    """Wait while another job writes into the same output. Without it this one ends with exit code 2."""


class LabelledConfig(OutputConfig):
    """Settings that name a data set whose classes are known."""

    data: Shared[str]
    """A BreaKHis tree, a folder per class with a folder per patient in it, or a CSV, TSV or Parquet manifest
    (columns uri, tumor_class or subtype, patient, and part if it is split already): a local path, s3://,
    gs://, or another scheme of fsspec, such as hf://datasets/OWNER/NAME."""

    classes: Shared[tuple[str, ...]] = ()
    """Other names of the classes in folders or in the column tumor_class, such as benign=0 malignant=1."""

    @model_validator(mode="after")
    def _classes_are_pairs(self) -> Self:
        given_names(self.classes)
        return self


def require_held_out(
    protocols: Sequence[str],
    held_out: Sequence[str],
    magnifications: Sequence[int],
    is_required: bool = False,
) -> None:
    """Raises ValueError unless what is held out is for one of the protocols, and among the magnifications."""
    named = [protocol for protocol in protocols if protocol in HOLDING_OUT]
    if len(named) > 1 or (held_out and not named):
        raise ValueError("--held-out is for --protocol magnification or site, one of the two")
    if is_required and named and not held_out:
        raise ValueError(f"--protocol {named[0]} requires --held-out, the one to test on")
    if "magnification" in named and (unused := {*held_out} - {str(m) for m in magnifications}):
        used = " ".join(map(str, magnifications))
        raise ValueError(f"--held-out {min(unused)}: expected some of --magnifications {used}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """Settings that differ, by name, as `--flag old -> new`; one that is off is as one that an older version
    did not have."""
    names = [name for name in sorted({*old, *new}) if (old.get(name) or None) != (new.get(name) or None)]
    return {name: f"--{name.replace('_', '-')} {old.get(name)} -> {new.get(name)}" for name in names}


def require_run_name(name: str) -> None:
    """Raise ValueError unless `--name` is good as the name of a folder and in an address."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"--name {name!r}: use letters, digits, dots, dashes and underscores, a letter or digit first"
        )
