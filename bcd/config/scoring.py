"""Settings of a scoring job, and of what reads its embeddings."""

from typing import Literal

from pydantic import Field, model_validator

from bcd.config.options import (
    MAX_SEED,
    Cam,
    DryConfig,
    Engine,
    Fraction,
    Operational,
    OutputConfig,
    Precision,
    require_run_name,
)
from bcd.config.signing import SignedConfig
from bcd.taxonomy import MAX_MPP, MIN_MPP, given_names


class ScoreConfig(OutputConfig, SignedConfig, DryConfig):
    """Score every image and slide of an archive once, with an evidence map on each row, to Parquet.

    Run the same command again to resume, to score files that were added, and to score again those that were
    replaced under the same name.
    """

    model: str
    """The model bundle: a local folder, s3://, gs:// or hf://OWNER/NAME[@REVISION]."""

    input: str
    """A folder of images (PNG, JPEG, TIFF) and whole slides (SVS, NDPI, MRXS, SCN, BIF, DICOM, pyramidal
    TIFF), in any mixture, one such file, or a CSV, TSV or Parquet manifest with a column uri: local,
    s3://, gs://, or another scheme of fsspec; of https:// a manifest or one file."""

    output: Operational[str]
    """Folder for the table, the slides' heat maps and the gallery: local, s3:// or gs://."""

    pseudonymise: str | None = None
    """KEY, a file of at least 32 random bytes: ids made with it replace the names of images, slides and
    patients in all that is written, and no URI is; the map of ids is written beside KEY. A local path, s3://
    or gs://."""

    cam: Cam = "evidence"
    """evidence: the closed form, free with the forward pass; its mean plus evidence_bias is the log-odds.
    Others: raw values of that method of pytorch-grad-cam, at many times the cost."""

    cam_layer: Literal["layer1", "layer2", "layer3", "layer4"] = "layer4"
    """Layer whose features --cam explains; the closed form supports layer4 only."""

    overlays: Literal["none", "png"] = "none"
    """png: each row also contains its image overlaid with the map (about 100 KB a row); full colour is 4
    log-odds a cell, with another --cam the largest value of the image."""

    embeddings: bool = False
    """Each row also contains the pooled features that enter the last layer, as float16: for search, and for
    jobs/pool.py (4 KB a row of a ResNet50)."""

    mpp: float | None = Field(default=None, gt=0)
    """µm per pixel of the slides that state none, or an impossible one (below 0.05 or above 20), and have
    none in the manifest's column mpp."""

    mpp_override: float | None = Field(default=None, gt=0)
    """µm per pixel of all slides, instead of what they or the manifest state. Like --mpp it may be added when
    resuming: slides that failed for lack of it are scored again, results stay."""

    tile_mpp: float | None = Field(default=None, gt=0)
    """µm per pixel at which slides are tiled; by default the coarsest of the model's training fields."""

    tile_overlap: float = Field(default=0.0, ge=0, lt=1)
    """Share of a tile's side that it has in common with the next one: 0.5 scores each place four times. Heat
    maps show the mean of the tiles at a place; shares and quantiles of a slide count tiles."""

    min_tissue: float = Field(default=0.1, ge=0, le=1)
    """Smallest share of tissue in a tile; tiles with less are counted as background and not scored."""

    masks: str | None = None
    """Folder of tissue masks in place of the rule for tissue: NAME.png of the whole slide NAME at any scale,
    not 0 where there is tissue; for one slide also one file. Local, s3:// or gs://."""

    regions: str | None = None
    """Folder of regions of interest, outside of which nothing is scored: NAME.geojson of the slide NAME, as
    QuPath exports annotations; for one slide also one file. Regions of class Ignore* are left out. A slide
    without a file is not scored. Local, s3:// or gs://."""

    min_region: float = Field(default=0.5, ge=0, le=1)
    """Smallest share of a tile within --regions; tiles with less are counted as outside and not scored."""

    precision: Precision = "float32"
    """float32 gives the same numbers everywhere; bfloat16 is several times faster on fitting hardware."""

    engine: Engine = "auto"
    """What computes the network. auto: OpenVINO (extra `openvino`) for ResNets and maps in closed form, where
    it is installed and the cluster has no GPU, else torch. In float32 both give the same numbers up to
    rounding. An output keeps the engine that it began with."""

    batch_size: int = Field(default=32, ge=1)
    """Images per forward pass."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the network first, which costs half a minute and changes rounding. auto: from 20,000 files or
    4 GB of slides on GPUs, and on CPUs where --precision is bfloat16 and a compiler (g++) is installed; never
    with OpenVINO, which compiles by itself."""

    max_workers: Operational[int | None] = Field(default=None, ge=1)
    """Largest number of model workers; by default one per GPU, else one per four CPUs."""

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

    @model_validator(mode="after")
    def _one_engine_compiles(self) -> "ScoreConfig":
        if self.engine == "openvino" and self.compile == "on":
            raise ValueError("--compile on is torch's compiler: leave it out with --engine openvino")
        return self


class PoolConfig(OutputConfig):
    """Answer for whole slides by attention over their tiles: train on labelled slides, or apply a model.

    With --labels, a model is trained on the embeddings of a scored archive and tested on patients that it
    has never seen; with --model, a trained one answers for every slide of an archive.
    """

    scores: str
    """Output of jobs/score.py --embeddings: local, s3:// or gs://."""

    labels: str | None = None
    """CSV, TSV or Parquet table of the slides to train on: columns slide (as in the scores; or image_id),
    tumor_class or subtype, patient unless the scores have it, and, where known, case and part."""

    model: str | None = None
    """Model of an earlier run, OUTPUT/NAME/model, to apply."""

    output: Operational[str] = "runs"
    """Folder of the runs: local, s3:// or gs://. The run is written to OUTPUT/NAME."""

    name: Operational[str] = "pool"
    """Name of the run."""

    maps: int = Field(default=20, ge=0)
    """Slides whose attention is drawn over the slide, the most probable first; each is opened for that."""

    classes: tuple[str, ...] = ()
    """Other names of the classes in the labels, such as benign=negative malignant=positive."""

    protocol: Literal["case", "patient"] = "case"
    """What is never divided between parts of the split, see jobs/train.py."""

    validation_fraction: Fraction = 0.2
    """Share of the slides that choose the best epoch and the threshold."""

    test_fraction: Fraction = 0.2
    """Share of the slides that only the final evaluation uses."""

    epochs: int = Field(default=60, ge=1)
    """Passes over the training slides; the best on validation is kept."""

    learning_rate: float = Field(default=5e-4, gt=0)
    """Learning rate of AdamW."""

    target_sensitivity: Fraction | None = None
    """Sensitivity on the validation slides that the threshold must reach, see jobs/train.py."""

    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Seeds the split and the training."""

    max_failures: Operational[int] = Field(default=3, ge=0)
    """How often training starts again after its worker or node is lost."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "PoolConfig":
        require_run_name(self.name)
        given_names(self.classes)
        if (self.labels is None) == (self.model is None):
            raise ValueError(
                "expected --labels to train, or --model to apply a trained model: one of the two"
            )
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("--validation-fraction and --test-fraction leave nothing to train on")
        applies = {"scores", "labels", "model", "output", "name", "maps", "wait", "log_format"}
        for name, field in type(self).model_fields.items():
            if self.model and name not in applies and getattr(self, name) != field.default:
                raise ValueError(f"--{name.replace('_', '-')} is for training, which needs --labels")
        return self
