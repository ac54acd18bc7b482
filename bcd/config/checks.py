"""Settings of the jobs that check a data set (audit) and a cluster (doctor)."""

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
    """Check a data set before training: duplicates, leaks, labels, broken images.

    Exit code 1 if a given split leaks: a patient, slide or image is in several of its parts.
    """

    folds: str | None = None
    """Folder with the published dsfold1.txt to dsfold5.txt, or some of them, to check for leaks."""

    split: str | None = None
    """A split to check for leaks: CSV, TSV or Parquet with image_id (or uri, or file names in one of
    them) and part (train, validation or test), such as the split.parquet of a run."""

    output: str = "audit"
    """Folder for audit.html, audit.json, images.parquet, near_duplicates.parquet and identifiers.parquet:
    local, s3:// or gs://."""

    pixels: bool = True
    """Read every image once. Without it only names and file sizes are checked, in seconds."""

    identifiers_only: bool = False
    """Search only for what may identify a patient, in anything that jobs/score.py reads, whose classes need
    not be known: names, ids, and metadata of images and slides."""

    near_bits: int = Field(default=60, ge=0, le=90)
    """Images whose perceptual hashes differ in at most this many of 256 bits are near duplicates. Unrelated
    images differ in 98 or more; a copy shifted by 2 % of its width in up to 54."""

    outlier_z: float = Field(default=3.5, gt=0)
    """Robust z-score (median, MAD) beyond which an image's haematoxylin or eosin is unusual; 3.5 is the
    cut-off of Iglewicz and Hoaglin 1993."""

    @model_validator(mode="after")
    def _identifiers_need_no_split(self) -> "AuditConfig":
        if self.identifiers_only and (self.split or self.folds):
            raise ValueError(
                "--identifiers-only checks no --split or --folds: run the audit once more without it"
            )
        return self

    @model_validator(mode="after")
    def _split_is_a_table(self) -> "AuditConfig":
        if self.split is not None and not self.split.lower().endswith(MANIFEST_SUFFIXES):
            raise ValueError(
                f"--split {self.split}: expected a file ending in {', '.join(MANIFEST_SUFFIXES)}"
            )
        return self


class DoctorConfig(Config):
    """Check a cluster before a long job for everything that would break it.

    Pass the job's own flags; only what is passed is checked. Exit code 1 if the job would fail.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    purpose: Annotated[Purpose, tyro.conf.arg(name="for")] = Field(alias="for")
    """The job to check for: train, score or serve."""

    data: str | None = None
    """--data of jobs/train.py: every node reads one of its images."""

    input: str | None = None
    """--input of jobs/score.py: every node reads one of its images or slides, at most 4 MiB; names and
    metadata of the first 20 are searched for what may identify a patient."""

    output: str | None = None
    """--output of jobs/train.py or jobs/score.py: every node writes 4 MiB, another reads them, and they are
    deleted."""

    model: str | None = None
    """--model of jobs/score.py or jobs/serve.py: every node loads the bundle."""

    architecture: Architecture = "resnet50"
    """--architecture of jobs/train.py, which --weights must match."""

    weights: str | None = None
    """--weights of jobs/train.py: loaded where the job is started; imagenet is downloaded there."""

    num_workers: str = "auto"
    """--num-workers of jobs/train.py, or --min-replicas of jobs/serve.py, of one CPU each."""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    """gpu: the job requires GPUs. cpu: it uses none. auto: it uses those of the cluster."""

    timeout_s: float = Field(default=120, gt=0)
    """Seconds in which a node must answer each request."""

    @model_validator(mode="after")
    def _flags_are_those_of_the_job(self) -> "DoctorConfig":
        for name in sorted(set().union(*PLACES.values()) - set(PLACES[self.purpose])):
            if getattr(self, name) is not None:
                jobs = ", ".join(purpose for purpose, names in PLACES.items() if name in names)
                raise ValueError(f"--{name} requires --for {jobs}, not --for {self.purpose}")
        if self.purpose == "score" and self.num_workers != "auto":
            raise ValueError("--num-workers: jobs/score.py has no such flag; it uses the whole cluster")
        if self.purpose == "serve" and "-" in self.num_workers:
            raise ValueError(f"--num-workers {self.num_workers}: expected a number of replicas")
        self.training()
        return self

    def training(self) -> TrainConfig:
        """The training settings that determine the workers; raises `ConfigError` if they are invalid."""
        return TrainConfig(data=self.data or "", num_workers=self.num_workers, device=self.device)

    def given(self) -> dict[str, str]:
        """The URI of every place that was given, by its flag."""
        return {f"--{name}": uri for name in PLACES[self.purpose] if (uri := getattr(self, name)) is not None}

    def not_given(self) -> list[str]:
        """Flags of the places that were not given."""
        return [f"--{name}" for name in PLACES[self.purpose] if getattr(self, name) is None]


class EnvConfig(Config):
    """Print what a bug report needs: versions, hardware, settings of the environment, without secrets.

    Starts no Ray and writes nothing.
    """

    as_json: bool = False
    """Print one JSON object in place of the page."""
