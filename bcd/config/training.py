"""Settings of a training run, a search, a cross-validation and the demo."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, cast, get_args

from pydantic import Field, model_validator

from bcd.config.options import (
    AUTO,
    HOLDING_OUT,
    INPUT_PX,
    MAX_INPUT_PX,
    MAX_SEED,
    MIN_INPUT_PX,
    MOST_MEMBERS,
    RANDOM_WEIGHTS,
    TIMM,
    WORKERS,
    Architecture,
    Config,
    DryConfig,
    Fraction,
    LabelledConfig,
    OfNetwork,
    Operational,
    Precision,
    Protocol,
    Shared,
    require_held_out,
    require_run_name,
)
from bcd.taxonomy import MAGNIFICATIONS, N_FOLDS, Target

Recipe = Literal["steady", "stains", "few"]
# Settings by the name of their recipe. Each names a purpose; none is the default before an ablation on
# patients apart supports it.
RECIPES: Mapping[Recipe, Mapping[str, Any]] = MappingProxyType(
    {
        "steady": {"ema_decay": 0.99, "symmetries": True},
        "stains": {"ema_decay": 0.99, "stain_normalisation": "macenko", "stain_jitter": 0.1},
        "few": {
            "ema_decay": 0.99,
            "layer_decay": 0.7,
            "freeze_batchnorm": True,
            "dropout": 0.3,
            "label_smoothing": 0.05,
        },
    }
)
# What needs more of a network in training than its last layer.
OF_ALL_LAYERS = ("ema_decay", "layer_decay", "freeze_batchnorm", "stain_jitter")
Share = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0, le=1)]


class TrainingConfig(LabelledConfig, DryConfig):
    """Settings of a training run, without those of its test part."""

    output: Operational[str] = "runs"
    """Folder of the runs: local, s3:// or gs://. The run is written to OUTPUT/NAME."""

    name: Operational[str]
    """Name of the run. Run the same command again to resume."""

    architecture: OfNetwork[Architecture] = "resnet50"
    """The network: resnet18, resnet34, resnet50, resnet101, or timm:NAME (extra `timm`). resnet18 trains
    several times faster and is often nearly as good; resnet101 is slower."""

    weights: str = "imagenet"
    """Initial weights: imagenet (downloaded by torchvision or timm), none, the URI of a state dict of the
    architecture (.safetensors, or .pth without pickled code), or hf-hub:OWNER/NAME (downloaded by timm)."""

    head: Literal["linear"] | None = None
    """linear: train the last layer only, on features of the initial weights that are computed once for each
    image, without augmentation: a cheap first model."""

    target: Shared[Target] = "tumor_class"
    """What is predicted: benign or malignant, or the eight subtypes."""

    magnifications: Shared[tuple[int, ...]] = MAGNIFICATIONS
    """BreaKHis magnifications to use (40 100 200 400); images without one are always used."""

    folds: Shared[str | None] = None
    """Folder with the published dsfold1.txt to dsfold5.txt, for --protocol official."""

    validation_fraction: Shared[Fraction] = 0.15
    """Share of the images that choose the best epoch."""

    quarantine: Shared[bool] = True
    """Quarantine slides published under two labels (14-13412), and duplicates."""

    balance: Literal["tumor_class", "subtype", "none"] = "tumor_class"
    """Upsample training rows until these classes are equally frequent."""

    weighted_loss: bool = False
    """Weight the loss of each class in place of upsampling its rows: the same in expectation, in shorter
    epochs."""

    max_bad_fraction: Shared[float] = Field(default=0.01, ge=0, lt=1)
    """Largest share of broken images; they are excluded and named. A larger share ends the run."""

    input_height_px: OfNetwork[int] = Field(default=0, ge=0, le=MAX_INPUT_PX)
    """Height of the network's input in pixels; a field is fitted into it whole, aspect ratio kept. 0: 224, or
    what timm states for a network of its own."""

    input_width_px: OfNetwork[int] = Field(default=0, ge=0, le=MAX_INPUT_PX)
    """Width of the network's input in pixels. 0: 336 (a BreaKHis field is 700x460, about 3:2), or what timm
    states for a network of its own."""

    mean: OfNetwork[tuple[Share, Share, Share] | None] = None
    """Mean of red, green and blue, from 0 to 1, which the network's input is relative to. By default that
    of ImageNet, or what timm states."""

    std: OfNetwork[tuple[Deviation, Deviation, Deviation] | None] = None
    """Standard deviation of red, green and blue; see --mean."""

    prepared: Operational[str] = AUTO
    """Folder where decoded and fitted images are kept for later epochs, runs and evaluations: a local path,
    s3:// or gs://; auto: OUTPUT/prepared. off: files are decoded in every epoch. It may be deleted at any
    time."""

    epochs: int = Field(default=20, ge=1)
    """Passes over the balanced training rows."""

    batch_size: int = Field(default=32, ge=2)
    """Images per optimiser step, over all workers together."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with Nesterov momentum 0.9."""

    learning_rate: float = Field(default=2e-4, gt=0)
    """Peak learning rate, between warm-up and cosine decay. SGD needs about 1e-2."""

    weight_decay: float = Field(default=1e-2, ge=0)
    """Weight decay; biases and norms are exempt."""

    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of all steps over which the learning rate rises linearly."""

    target_sensitivity: Fraction | None = None
    """Sensitivity on the validation images that the threshold must reach. By default the threshold maximises
    sensitivity + specificity on validation (Youden)."""

    augment: bool = True
    """Flips, quarter rotations, random resized crop and colour jitter on the training images."""

    recipe: Shared[Recipe | None] = None
    """Settings for a purpose; flags that are given have priority. steady: average of the weights, eight
    orientations; stains: Macenko normalisation, stain jitter, average; few: for few patients, rates by depth,
    frozen batch norm, dropout, smoothed labels, average."""

    ema_decay: Fraction | None = None
    """Exponential moving average of weights and batch norm, which is validated and exported: the share that
    stays at each step, such as 0.99: an average over the last 100 steps, or over the last tenth of a training
    of fewer than 900."""

    stain_jitter: float = Field(default=0.0, ge=0, lt=1)
    """Multiply the amounts of haematoxylin, eosin and the rest in each training image by factors between
    1 - this and 1 + this; glass stays as it is. 0.05 to 0.2 are usual; requires --augment."""

    stain_normalisation: Literal["macenko", "reinhard"] | None = None
    """Normalise the stain of every image to the median of the training images, also in validation, scoring
    and serving. By default none."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each target that is distributed evenly over the classes, such as 0.1."""

    mixup: float = Field(default=0.0, ge=0)
    """Mix images of a batch in pairs, and their targets, by a share from the beta distribution with this
    parameter, such as 0.2."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the pooled features that are zero at each step of the training, before the last layer."""

    layer_decay: Fraction | None = None
    """Factor of the learning rate for each block before the head: with 0.7 the block before it learns at 0.7
    times the rate of the head, the one before that at 0.49. By default all have the same rate."""

    freeze_batchnorm: bool = False
    """Keep the statistics, weights and biases of batch norm as they are in --weights."""

    patience: int = Field(default=0, ge=0)
    """End the training after so many epochs in a row without a better score on validation; 0: never. The
    learning rate falls as if all --epochs followed."""

    symmetries: bool = False
    """Average the features of each image over its eight flips and quarter turns, in validation of the model,
    scoring and serving: eight forward passes. The best epoch is chosen without."""

    precision: Precision = "auto"
    """auto: bfloat16 if the hardware supports it, else float32."""

    sync_batchnorm: bool = True
    """Batch norm over the images of all workers, so that their number does not change the result. Without it
    each worker uses its own images: faster, but poor with few images per worker."""

    seed: Shared[int] = Field(default=0, ge=0, le=MAX_SEED)
    """Seeds the split, the upsampling, the shuffling and the augmentation."""

    num_workers: Operational[str] = "auto"
    """Training workers: a number, or 2-8 for elastic training. auto: one per GPU, or one CPU worker."""

    device: Operational[Literal["auto", "cpu", "gpu"]] = "auto"
    """auto: GPUs if the cluster has or can start them."""

    max_failures: Operational[int] = Field(default=3, ge=0)
    """How often training restarts from the last epoch after a worker or node is lost."""

    @model_validator(mode="before")
    @classmethod
    def _as_in_recipe(cls, given: Any) -> Any:
        """The settings of the recipe, where none is given."""
        # An unknown name is found by the check of the field.
        return {**RECIPES.get(cast(Recipe, given.get("recipe")), {}), **given}

    @model_validator(mode="after")
    def _recipe_is_possible(self) -> Self:
        if self.weighted_loss and self.balance != self.target:
            raise ValueError(
                f"--weighted-loss weights the classes of --target {self.target}, not those of --balance "
                f"{self.balance}: give both the same, or leave it out"
            )
        if self.freeze_batchnorm and self.weights == RANDOM_WEIGHTS:
            raise ValueError("--freeze-batchnorm requires --weights: random ones have no statistics to keep")
        if self.stain_jitter and not self.augment:
            raise ValueError("--stain-jitter is part of --augment, which is off")
        if self.head == "linear" and (given := [name for name in OF_ALL_LAYERS if getattr(self, name)]):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"--head linear trains the last layer alone: leave out {flags}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _residual_networks_have_a_size(cls, given: dict[str, Any]) -> dict[str, Any]:
        if str(given.get("architecture", "")).startswith(TIMM):
            return given
        sizes = zip(("input_height_px", "input_width_px"), INPUT_PX, strict=True)
        return given | {name: given.get(name) or usual for name, usual in sizes}

    @model_validator(mode="after")
    def _settings_are_possible(self) -> "TrainingConfig":
        for flag, pixels in (("height", self.input_height_px), ("width", self.input_width_px)):
            if 0 < pixels < MIN_INPUT_PX:
                raise ValueError(f"--input-{flag}-px {pixels}: expected at least {MIN_INPUT_PX}")
        if self.head == "linear" and self.weights == RANDOM_WEIGHTS:
            raise ValueError("--head linear trains on the features of --weights: expected others than none")
        workers = WORKERS.fullmatch(self.num_workers)
        if not workers:
            raise ValueError(f"--num-workers requires a number, MIN-MAX or auto, not {self.num_workers!r}")
        if workers[1] and int(workers[1]) > int(workers[2]):
            raise ValueError(f"--num-workers {self.num_workers}: the minimum exceeds the maximum")
        if unknown := set(self.magnifications) - set(MAGNIFICATIONS):
            raise ValueError(f"--magnifications {sorted(unknown)}: BreaKHis has {list(MAGNIFICATIONS)}")
        require_run_name(self.name)
        bounds = self.worker_bounds()
        if bounds and not self.sync_batchnorm and self.batch_size < 2 * bounds[1]:
            raise ValueError(
                f"--no-sync-batchnorm: with --batch-size {self.batch_size} some of {bounds[1]} workers get a "
                f"single image, which has no variance; expected at least {2 * bounds[1]}"
            )
        return self

    @property
    def input_size_px(self) -> tuple[int, int]:
        """Height and width of the network's input; zeros until a network of timm has stated its own."""
        return self.input_height_px, self.input_width_px

    def upsampled(self) -> Literal["tumor_class", "subtype", "none"]:
        """The classes whose training rows are repeated."""
        return "none" if self.weighted_loss else self.balance

    def worker_bounds(self) -> tuple[int, int] | None:
        """Smallest and largest number of training workers, or None for auto."""
        if self.num_workers == "auto":
            return None
        low, _, high = self.num_workers.partition("-")
        return int(low), int(high or low)


def with_recipe(config: Config, arguments: Sequence[str]) -> Config:
    """The settings of a command line, with those of its recipe where the arguments give none."""
    if not getattr(config, "recipe", None):
        return config
    names = {part.partition("=")[0].lstrip("-").replace("-", "_") for part in arguments if part[:2] == "--"}
    names |= {name.removeprefix("no_") for name in names}
    return type(config)(**config.model_dump(include=names))


class TrainConfig(TrainingConfig):
    """Train ResNet50 on breast histopathology and evaluate it on patients that it has never seen."""

    name: Operational[str] = "train"
    """Name of the run. Run the same command again to resume."""

    protocol: Protocol = "case"
    """What is never divided between parts of the split. case: all slides of one case number (the safe
    choice); patient: one slide id; official: the published folds; image: leaks patients, only to reproduce
    the literature; magnification, site: as case, and --held-out is in the test part only, alone."""

    held_out: str | None = None
    """Magnification, or name of a site, to test on, for --protocol magnification or site."""

    test_fraction: Fraction = 0.20
    """Share of the images that only the final evaluation uses."""

    fold: int | None = Field(default=None, ge=1)
    """Fold to test on, counted from 1: of the published five, or of --cross-folds."""

    cross_folds: int | None = Field(default=None, ge=2)
    """Divide the groups into this many folds and test on --fold; jobs/crossval.py does this for all folds."""

    @model_validator(mode="after")
    def _split_is_possible(self) -> "TrainConfig":
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("--validation-fraction and --test-fraction leave nothing to train on")
        official = self.protocol == "official"
        if official != (self.folds is not None):
            raise ValueError("--protocol official requires --folds FOLDER, and the reverse")
        held_out = [self.held_out] if self.held_out else []
        require_held_out([self.protocol], held_out, self.magnifications, is_required=True)
        if self.protocol in ("official", "site") and self.cross_folds:
            raise ValueError("--cross-folds: official has its own five folds, and a site is tested whole")
        n_folds = N_FOLDS if official else self.cross_folds
        if (n_folds is None) != (self.fold is None):
            raise ValueError("--fold requires --protocol official or --cross-folds, and the reverse")
        if n_folds and self.fold and self.fold > n_folds:
            raise ValueError(f"--fold {self.fold}: there are {n_folds} folds")
        return self


class TuneConfig(TrainConfig):
    """Search settings on validation patients, then train with the best and test once on unseen patients.

    Every trial has the same training and validation images; no trial sees the test part. Run the same command
    again to resume.
    """

    name: Operational[str] = "tune"
    """Name of the search. Run the same command again to resume."""

    space: str
    """YAML file of the settings to search, and their values: `dropout: {uniform: [0, 0.5]}`,
    `learning_rate: {loguniform: [1.0e-5, 1.0e-3]}`, `batch_size: {integer: [16, 64]}`, or a list to choose
    from, `optimizer: [adamw, sgd]`."""

    trials: int = Field(default=16, ge=2, le=1000)
    """Number of trainings."""

    parallel: Operational[int | None] = Field(default=None, ge=1)
    """Trials at a time; by default as many as fit on the cluster."""

    search: Literal["random", "optuna"] = "random"
    """How the settings of the next trial are chosen; optuna, by the results of earlier ones."""

    scheduler: Literal["asha", "none"] = "asha"
    """asha: end trials that are behind others at the same epoch; none: train all to their last epoch."""

    @model_validator(mode="after")
    def _is_judged_on_unseen_patients(self) -> "TuneConfig":
        if self.protocol == "image":
            raise ValueError("--protocol image judges trials on patients of the training: expected another")
        return self


class CrossvalConfig(TrainingConfig):
    """Train and evaluate one model for each fold, with the same settings, and report over all folds.

    Several protocols make several arms: `--protocol case,image` shows how much better the same model seems
    when images of a patient are in both training and test part. Run the same command again to resume.
    """

    name: Operational[str] = "crossval"
    """Name of the study. Run the same command again to resume."""

    protocol: str = "case"
    """case, patient, official, image, magnification or site (see jobs/train.py), or several, separated by
    commas: case,image. magnification has --k folds for each magnification, site one for each site."""

    held_out: tuple[str, ...] = ()
    """Magnifications or sites to test on, by default all, for --protocol magnification or site."""

    k: int = Field(default=5, ge=2)
    """Folds of every protocol but official, which has five, and site."""

    repeats: int = Field(default=1, ge=1)
    """Number of cross-validations, each with other folds."""

    parallel: Operational[int | None] = Field(default=None, ge=1)
    """Folds trained at a time; by default as many as fit on the cluster."""

    against: Operational[str | None] = None
    """Another finished study of the same data, to compare with on the same patients."""

    export: Operational[Literal["none", "ensemble", "refit"]] = "none"
    """One bundle of the whole study, in OUTPUT/NAME/ensemble/model or OUTPUT/NAME/refit/model. ensemble: all
    its models, whose logits are averaged; scoring takes as many forward passes. refit: one model trained on
    all images, for as many epochs as were best in the folds (median). Threshold and temperature of both are
    chosen on all patients, each scored by a model that had not seen them."""

    @model_validator(mode="after")
    def _arms_are_possible(self) -> "CrossvalConfig":
        named = self.protocol.split(",")
        if unknown := set(named) - set(get_args(Protocol)):
            raise ValueError(f"--protocol {min(unknown)!r}: expected some of {', '.join(get_args(Protocol))}")
        if len(set(named)) < len(named):
            raise ValueError(f"--protocol {self.protocol}: expected each protocol once")
        if ("official" in named) != (self.folds is not None):
            raise ValueError("--protocol official requires --folds FOLDER, and the reverse")
        require_held_out(named, self.held_out, self.magnifications)
        if self.export != "none" and {*HOLDING_OUT} & {*named}:
            raise ValueError(
                "--export is of models that know all magnifications and sites: use --protocol case"
            )
        n_models = self.repeats * (N_FOLDS if named[0] == "official" else self.k)
        if self.export != "none" and n_models > MOST_MEMBERS:
            raise ValueError(f"--export is for at most {MOST_MEMBERS} models, not {n_models} in one protocol")
        if self.export == "ensemble" and self.stain_normalisation:
            raise ValueError("--export ensemble: each fold has its own stain, and a bundle one: use refit")
        return self

    def protocols(self) -> tuple[Protocol, ...]:
        """The protocol of each arm."""
        return cast("tuple[Protocol, ...]", tuple(self.protocol.split(",")))


class AblateConfig(CrossvalConfig):
    """Cross-validate several arms on the same folds, and report the paired difference of each from the first.

    An arm is a recipe, or settings; all other flags are those of every arm. Run the same command again to
    resume.
    """

    name: Operational[str] = "ablation"
    """Name of the ablation. Run the same command again to resume."""

    arms: tuple[str, ...] = ("plain", *RECIPES)
    """What is compared, the baseline first: plain (the other flags alone), recipes, or settings such as
    ema_decay=0.99 or ema_decay=0.99,mixup=0.2. The settings of an arm have priority over other flags."""

    @model_validator(mode="after")
    def _arms_are_comparable(self) -> "AblateConfig":
        if len(set(self.arms)) < max(2, len(self.arms)):
            raise ValueError(f"--arms {' '.join(self.arms)}: expected two or more, each once")
        if self.against or "," in self.protocol:
            raise ValueError("--arms are compared under one --protocol, without --against")
        return self


class DemoConfig(Config):
    """Make a small synthetic data set, train on it, evaluate, score an archive, and write the reports."""

    output: Operational[str] = "demo"
    """Folder for the images and the run."""

    patients_per_subtype: int = Field(default=5, ge=3)
    """Synthetic patients for each of the eight subtypes."""

    epochs: int = Field(default=8, ge=1)
    """Passes over the training rows."""

    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seeds the images and the run."""
