"""The settings of a scoring job."""

from typing import Literal

from pydantic import Field, model_validator

from bcd.config.options import Cam, Config, Precision
from bcd.taxonomy import MAX_MPP, MIN_MPP


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
