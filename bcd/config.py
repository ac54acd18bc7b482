"""One frozen, validated configuration per job. Its fields are the flags, their docstrings are the help.

A new option costs two edits: the field here, and its use. What training decides (classes, input size, µm/px,
threshold) is frozen into the model bundle; evaluation reads it from there and has no such flags.
"""

import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bcd.breakhis import N_FOLDS
from bcd.errors import ConfigError
from bcd.manifest import SUFFIXES as MANIFEST_SUFFIXES
from bcd.taxonomy import MAGNIFICATIONS, MAX_MPP, MIN_MPP, Target, given_names

Fraction = Annotated[float, Field(gt=0, lt=1)]
Protocol = Literal["case", "patient", "official", "image"]
Precision = Literal["auto", "float32", "bfloat16"]
Cam = Literal[
    "evidence",
    "gradcam",
    "gradcam++",
    "layercam",
    "eigencam",
    "xgradcam",
    "hirescam",
    "scorecam",
    "ablationcam",
]
# Of the network's input: below, the last convolution has no cell; above, no training fits a GPU.
MIN_INPUT_PX, MAX_INPUT_PX = 32, 4096
# What every generator takes, repeats of a cross-validation included, which count up from it.
MAX_SEED = 2**31 - 1
WORKERS = re.compile(r"auto|[1-9]\d*|([1-9]\d*)-([1-9]\d*)")


class Config(BaseModel):
    """What all jobs share: frozen, no unknown settings, errors that name the flag."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError("; ".join(map(_sentence, error.errors()))) from None


def _sentence(error: Any) -> str:
    flag = "".join(f"--{str(part).replace('_', '-')} " for part in error["loc"][:1])
    message = error["msg"].removeprefix("Value error, ")
    return f"{flag}{message[0].lower()}{message[1:]}" + (f", not {error['input']!r}" if flag else "")


class LabelledConfig(Config):
    """What names a data set whose classes are known."""

    data: str
    """A BreaKHis tree, a folder per class with a folder per patient in it, or a CSV, TSV or Parquet manifest
    (columns uri, tumor_class or subtype, patient, and part where it is divided already): a local path, s3://
    or gs://."""

    classes: tuple[str, ...] = ()
    """Other names of the classes in folders or in the column tumor_class, such as benign=0 malignant=1."""

    @model_validator(mode="after")
    def _classes_are_pairs(self) -> Self:
        given_names(self.classes)
        return self


class TrainingConfig(LabelledConfig):
    """What decides a training, whatever it is tested on."""

    output: str = "runs"
    """Where runs are kept: a local folder, s3:// or gs://. The run lands in OUTPUT/NAME."""

    name: str
    """Name of the run. The same command with the same name goes on where it was stopped."""

    weights: str = "imagenet"
    """Where training starts: imagenet (downloaded by torchvision), none, or the URI of a ResNet50
    state dict (.safetensors, or .pth without pickled code)."""

    target: Target = "tumor_class"
    """What is predicted: benign or malignant, or the eight subtypes."""

    magnifications: tuple[int, ...] = MAGNIFICATIONS
    """BreaKHis magnifications to use (40 100 200 400); images without one are always used."""

    folds: str | None = None
    """Folder with the published dsfold1.txt to dsfold5.txt, for --protocol official."""

    validation_fraction: Fraction = 0.15
    """Share of the images that choose the best epoch."""

    quarantine: bool = True
    """Set aside slides published under two labels (14-13412) and pictures that stand twice."""

    balance: Literal["tumor_class", "subtype", "none"] = "tumor_class"
    """Upsample training rows until these are equally frequent."""

    max_bad_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Share of images that may be broken; they are left out and named. More than this ends the run."""

    input_height_px: int = Field(default=224, ge=MIN_INPUT_PX, le=MAX_INPUT_PX)
    """Height of the network's input in pixels; a field is fitted into it whole, aspect ratio kept."""

    input_width_px: int = Field(default=336, ge=MIN_INPUT_PX, le=MAX_INPUT_PX)
    """Width of the network's input in pixels (a BreaKHis field is 700x460, about 3:2)."""

    epochs: int = Field(default=20, ge=1)
    """Passes over the balanced training rows."""

    batch_size: int = Field(default=32, ge=2)
    """Images per optimiser step, over all workers together."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate, after warm-up and before the cosine. SGD wants about 1e-2."""

    weight_decay: float = Field(default=1e-2, ge=0)
    """Weight decay; biases and norms have none."""

    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of all steps in which the learning rate rises linearly."""

    target_sensitivity: Fraction | None = None
    """Share of the malignant validation images that must be called malignant: the threshold follows. Without
    it the threshold is where sensitivity + specificity is greatest on validation (Youden)."""

    augment: bool = True
    """Flips, quarter rotations, random resized crop and colour jitter on the training images."""

    precision: Precision = "auto"
    """auto: bfloat16 where the hardware computes in it, else float32."""

    sync_batchnorm: bool = True
    """Batch norm counts the images of all workers, so that their number does not change the result. Without
    it each counts its own: that waits less for the others, but is no good with few images a worker."""

    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seeds the split, the upsampling, the shuffling and the augmentation."""

    num_workers: str = "auto"
    """Training workers: a number, or 2-8 for elastic training. auto: one per GPU, or one CPU worker."""

    device: Literal["auto", "cpu", "gpu"] = "auto"
    """auto: GPUs where the cluster has or can start them."""

    max_failures: int = Field(default=3, ge=0)
    """How often training restarts from the last epoch after a worker or node is lost."""

    @model_validator(mode="after")
    def _settings_are_possible(self) -> "TrainingConfig":
        workers = WORKERS.fullmatch(self.num_workers)
        if not workers:
            raise ValueError(f"--num-workers takes a number, MIN-MAX or auto, not {self.num_workers!r}")
        if workers[1] and int(workers[1]) > int(workers[2]):
            raise ValueError(f"--num-workers {self.num_workers}: the minimum exceeds the maximum")
        if unknown := set(self.magnifications) - set(MAGNIFICATIONS):
            raise ValueError(f"--magnifications {sorted(unknown)}: BreaKHis has {list(MAGNIFICATIONS)}")
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(
                f"--name {self.name!r}: use letters, digits, dots, dashes and underscores, a letter or digit "
                "first"
            )
        bounds = self.worker_bounds()
        if bounds and not self.sync_batchnorm and self.batch_size < 2 * bounds[1]:
            raise ValueError(
                f"--no-sync-batchnorm: of --batch-size {self.batch_size} some of {bounds[1]} workers get a "
                f"single image, which has no variance; at least {2 * bounds[1]} are needed"
            )
        return self

    def worker_bounds(self) -> tuple[int, int] | None:
        """Smallest and largest number of training workers, or None for auto."""
        if self.num_workers == "auto":
            return None
        low, _, high = self.num_workers.partition("-")
        return int(low), int(high or low)


class TrainConfig(TrainingConfig):
    """Train ResNet50 on breast histopathology and evaluate it on patients that it has never seen."""

    name: str = "train"
    """Name of the run. The same command with the same name goes on where it was stopped."""

    protocol: Protocol = "case"
    """What never stands on two sides of the split. case: all slides of one case number (the safe
    choice); patient: one slide id; official: the published folds; image: leaks patients, kept only
    to reproduce the literature."""

    test_fraction: Fraction = 0.20
    """Share of the images that only the final evaluation sees."""

    fold: int | None = Field(default=None, ge=1)
    """Which fold to test on, from 1: of the published five, or of --cross-folds."""

    cross_folds: int | None = Field(default=None, ge=2)
    """Cut the groups into so many folds and test on --fold; jobs/crossval.py does this for all of them."""

    @model_validator(mode="after")
    def _split_is_possible(self) -> "TrainConfig":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("--validation-fraction and --test-fraction leave nothing to train on")
        official = self.protocol == "official"
        if official != (self.folds is not None):
            raise ValueError("--protocol official goes with --folds FOLDER, and that with it")
        if official and self.cross_folds:
            raise ValueError("--cross-folds is for the other protocols: official has its own five folds")
        n_folds = N_FOLDS if official else self.cross_folds
        if (n_folds is None) != (self.fold is None):
            raise ValueError("--fold goes with --protocol official or --cross-folds, and they with it")
        if n_folds and self.fold and self.fold > n_folds:
            raise ValueError(f"--fold {self.fold}: there are {n_folds} folds")
        return self


class CrossvalConfig(TrainingConfig):
    """Train and evaluate one model for each fold, with the same settings, and report over all of them.

    Several protocols make several arms: `--protocol case,image` shows how much better the same model seems
    when pictures of a patient stand on both sides. The same command again goes on where it was stopped.
    """

    name: str = "crossval"
    """Name of the study. The same command with the same name goes on where it was stopped."""

    protocol: str = "case"
    """case, patient, official or image (see jobs/train.py), or several with commas between: case,image."""

    k: int = Field(default=5, ge=2)
    """Folds of every protocol but official, which has its five."""

    repeats: int = Field(default=1, ge=1)
    """How often, each time with other folds."""

    parallel: int | None = Field(default=None, ge=1)
    """Folds trained at a time; by default as many as the cluster has room for."""

    against: str | None = None
    """Another finished study of the same data: the two are compared on the same patients."""

    @model_validator(mode="after")
    def _arms_are_possible(self) -> "CrossvalConfig":
        named = self.protocol.split(",")
        if unknown := set(named) - set(get_args(Protocol)):
            raise ValueError(f"--protocol {min(unknown)!r}: expected some of {', '.join(get_args(Protocol))}")
        if len(set(named)) < len(named):
            raise ValueError(f"--protocol {self.protocol}: each protocol once")
        if ("official" in named) != (self.folds is not None):
            raise ValueError("--protocol official goes with --folds FOLDER, and that with it")
        return self

    def protocols(self) -> tuple[Protocol, ...]:
        """The protocol of each arm."""
        named = self.protocol.split(",")
        return tuple(protocol for name in named for protocol in get_args(Protocol) if protocol == name)


# Where and with how much a run is carried out; all other settings decide its result.
OPERATIONAL = frozenset(
    {"output", "name", "num_workers", "device", "max_failures", "max_workers", "parallel", "against"}
)


def changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The names of the settings that decide a result and differ."""
    keys = sorted((old.keys() | new.keys()) - OPERATIONAL)
    return [key for key in keys if old.get(key) != new.get(key)]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The same as `--flag old -> new`."""
    return [f"--{key.replace('_', '-')} {old.get(key)} -> {new.get(key)}" for key in changed(old, new)]


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


class EvaluateConfig(LabelledConfig):
    """Score a model's held-out test part, or data that it has never seen, and say how good it is."""

    model: str
    """The model bundle: a local folder, s3:// or gs://."""

    data: str
    """The data set that the model was trained on, whose split is read from the model card, or another one,
    which is scored whole where the run's split.parquet proves that none of its pictures was trained on, no
    near copy of one, and none of its patients."""

    output: str | None = None
    """Where predictions, metrics and report go; by default beside the bundle, in its run."""

    force: bool = False
    """Score data that the model may have been trained on: every number is marked."""

    against: str | None = None
    """Output of another evaluation of the same images: the two models are compared on the same patients."""

    batch_size: int = Field(default=32, ge=1)
    """Images per forward pass."""

    precision: Precision = "float32"
    """float32 gives the same numbers everywhere; bfloat16 is faster."""

    @model_validator(mode="after")
    def _marked_numbers_stay_apart(self) -> "EvaluateConfig":
        if self.force and self.output is None:
            raise ValueError(
                "--force needs --output: its numbers must not replace those of the held-out part"
            )
        return self


class ScoreConfig(Config):
    """Score every image and slide of an archive once, with an evidence map on each row, to Parquet.

    The same command again goes on where it was stopped, takes up files that were added, and scores again
    those that were replaced under their name.
    """

    model: str
    """The model bundle: a local folder, s3:// or gs://."""

    input: str
    """A folder of images (PNG, JPEG, TIFF) and whole slides (SVS, NDPI, MRXS, SCN, BIF, DICOM, pyramidal
    TIFF), mixed as they come, one such file, or a CSV, TSV or Parquet manifest with a column uri: local,
    s3:// or gs://."""

    output: str
    """Folder for the table, the slides' pictures and the gallery: local, s3:// or gs://."""

    cam: Cam = "evidence"
    """evidence: the closed form, free with the forward pass, its mean plus evidence_bias is the log-odds.
    Others: that method of pytorch-grad-cam, raw, at many times the cost."""

    cam_layer: Literal["layer1", "layer2", "layer3", "layer4"] = "layer4"
    """Which features --cam explains; the closed form knows layer4 only."""

    overlays: Literal["none", "png"] = "none"
    """png: each row also carries its picture with the map laid over it (about 100 KB a row); full colour
    is 4 log-odds a cell, with another --cam the largest value of the picture."""

    mpp: float | None = Field(default=None, gt=0)
    """µm per pixel of the slides that do not say it themselves, or say what cannot be (below 0.05 or above
    20), and have none in the manifest's column mpp."""

    mpp_override: float | None = Field(default=None, gt=0)
    """µm per pixel of all slides, in place of what they or the manifest state. Like --mpp it may be added
    to the command of an output that exists: slides in error for want of it are scored again, results stay."""

    tile_mpp: float | None = Field(default=None, gt=0)
    """µm per pixel at which slides are tiled; by default that of the model's training fields, the
    coarsest of them."""

    min_tissue: float = Field(default=0.1, ge=0, le=1)
    """Share of a tile that must be tissue; tiles with less are counted as background and not scored."""

    precision: Precision = "float32"
    """float32 gives the same numbers everywhere; bfloat16 is several times faster on fitting hardware."""

    batch_size: int = Field(default=32, ge=1)
    """Images per forward pass."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the network first: half a minute for 6 %, which pays on long archives. auto: from 20,000 files
    or 4 GB of slides, where there is a compiler (g++, on every node)."""

    max_workers: int | None = Field(default=None, ge=1)
    """Most model workers at a time; by default one per GPU, else one per four CPUs."""

    @model_validator(mode="after")
    def _scale_is_possible(self) -> "ScoreConfig":
        for name in ("mpp", "mpp_override", "tile_mpp"):
            value = getattr(self, name)
            if value is not None and not MIN_MPP <= value <= MAX_MPP:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} {value:g}: between {MIN_MPP:g} and {MAX_MPP:g} µm/px are possible")
        return self

    @model_validator(mode="after")
    def _closed_form_knows_the_last_layer(self) -> "ScoreConfig":
        if self.cam == "evidence" and self.cam_layer != "layer4":
            raise ValueError(f"--cam-layer {self.cam_layer} needs another --cam, such as gradcam or layercam")
        return self


class DemoConfig(Config):
    """Make a small synthetic data set, train on it, evaluate, score an archive, and show the reports."""

    output: str = "demo"
    """Folder for the images and the run."""

    patients_per_subtype: int = Field(default=5, ge=3)
    """Synthetic patients for each of the eight subtypes."""

    epochs: int = Field(default=8, ge=1)
    """Passes over the training rows."""

    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seeds the pictures and the run."""
