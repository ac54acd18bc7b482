"""The settings of the jobs that check: a data set (audit) and a cluster (doctor)."""

from typing import Annotated, Literal

import tyro
from pydantic import ConfigDict, Field, model_validator

from bcd.config.options import Architecture, Config, LabelledConfig
from bcd.config.training import TrainConfig
from bcd.schema import MANIFEST_SUFFIXES

Purpose = Literal["train", "score", "serve"]
# What each job reads and writes; the names are those of its own flags.
PLACES: dict[Purpose, tuple[str, ...]] = {
    "train": ("data", "output", "weights"),
    "score": ("input", "output", "model"),
    "serve": ("model",),
}


class AuditConfig(LabelledConfig):
    """Say what is wrong with a data set before anyone trains on it: copies, leaks, labels, broken pictures.

    Exit code 1 where a given split leaks: a patient, slide or picture stands in several of its parts.
    """

    folds: str | None = None
    """Folder with the published dsfold1.txt to dsfold5.txt, or some of them, to be checked for leaks."""

    split: str | None = None
    """A split to be checked for leaks: CSV, TSV or Parquet with image_id (or uri, or file names in one of
    them) and part (train, validation or test), such as the split.parquet of a run."""

    output: str = "audit"
    """Folder for audit.html, audit.json, images.parquet and near_duplicates.parquet: local, s3:// or gs://."""

    pixels: bool = True
    """Read every picture once. Without, names and file sizes alone are audited, in seconds."""

    near_bits: int = Field(default=60, ge=0, le=90)
    """Pictures whose perceptual hashes differ in at most so many of 256 bits are near duplicates. Strangers
    differ in 98 or more; a copy moved by 2 % of its width in up to 54."""

    outlier_z: float = Field(default=3.5, gt=0)
    """Robust z-score (median, MAD) beyond which a picture's haematoxylin or eosin is unusual; 3.5 is the
    cut-off of Iglewicz and Hoaglin 1993."""

    @model_validator(mode="after")
    def _split_is_a_table(self) -> "AuditConfig":
        if self.split is not None and not self.split.lower().endswith(MANIFEST_SUFFIXES):
            raise ValueError(
                f"--split {self.split}: expected a file ending in {', '.join(MANIFEST_SUFFIXES)}"
            )
        return self


class DoctorConfig(Config):
    """Examine a cluster before a long job, and say what would break it.

    Give the job's own flags; what is not given is not looked at. Exit code 1 where the job would break.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    purpose: Annotated[Purpose, tyro.conf.arg(name="for")] = Field(alias="for")
    """The job that is to run: train, score or serve."""

    data: str | None = None
    """--data of jobs/train.py: one picture of it is read from every node."""

    input: str | None = None
    """--input of jobs/score.py: one picture or slide of it is read from every node, 4 MiB at most."""

    output: str | None = None
    """--output of jobs/train.py or jobs/score.py: 4 MiB are written by every node, read by another, and
    deleted."""

    model: str | None = None
    """--model of jobs/score.py or jobs/serve.py: the bundle is loaded on every node."""

    architecture: Architecture = "resnet50"
    """--architecture of jobs/train.py, which --weights has to fit."""

    weights: str | None = None
    """--weights of jobs/train.py: loaded where the job is started; imagenet is downloaded there."""

    num_workers: str = "auto"
    """--num-workers of jobs/train.py, or --min-replicas of jobs/serve.py, of one CPU each."""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    """gpu: the job needs GPUs. cpu: it takes none. auto: it takes what is there."""

    timeout_s: float = Field(default=120, gt=0)
    """Seconds that a node has for each answer."""

    @model_validator(mode="after")
    def _flags_are_those_of_the_job(self) -> "DoctorConfig":
        for name in sorted(set().union(*PLACES.values()) - set(PLACES[self.purpose])):
            if getattr(self, name) is not None:
                jobs = ", ".join(purpose for purpose, names in PLACES.items() if name in names)
                raise ValueError(f"--{name} goes with --for {jobs}, not with --for {self.purpose}")
        if self.purpose == "score" and self.num_workers != "auto":
            raise ValueError("--num-workers: jobs/score.py uses what is there")
        if self.purpose == "serve" and "-" in self.num_workers:
            raise ValueError(f"--num-workers {self.num_workers}: a number of replicas is expected")
        self.training()
        return self

    def training(self) -> TrainConfig:
        """As much of a training's settings as decides its workers.

        Raises:
            ConfigError: they are not possible.
        """
        return TrainConfig(data=self.data or "", num_workers=self.num_workers, device=self.device)

    def given(self) -> dict[str, str]:
        """The URI of every place that was given, by its flag."""
        named = {name: getattr(self, name) for name in PLACES[self.purpose]}
        return {f"--{name}": uri for name, uri in named.items() if uri is not None}

    def not_given(self) -> list[str]:
        """Flags of the job's places that were not given."""
        return [f"--{name}" for name in PLACES[self.purpose] if getattr(self, name) is None]
