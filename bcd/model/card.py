"""The model card: everything that a prediction depends on, and its provenance, with bounds and a checksum.

A card that was truncated or edited is rejected, and so is one with numbers that no model has.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bcd import taxonomy
from bcd.config.options import (
    CLOSED_FORM,
    MAX_INPUT_PX,
    MIN_INPUT_PX,
    MOST_MEMBERS,
    TIMM,
    Architecture,
    Protocol,
)
from bcd.errors import BundleError, ConfigError
from bcd.imaging import image
from bcd.model.novelty import FeatureStatistics
from bcd.model.recipes.reference import StainReference
from bcd.taxonomy import MAGNIFICATIONS, MAX_MPP, MIN_MPP

FORMAT_VERSION: Literal[2] = 2
# A ResNet halves the image five times: a cell of the last layer covers this many pixels of its input.
STRIDE_PX = 32
# The last layer of a residual network, and the method for networks without a closed form.
LAST_LAYER, GRADCAM = "layer4", "gradcam"
CHECKSUM = "checksum"
MOST_CLASSES = 100
# What is known of every model that was trained here.
OWN = ("protocol", "seed", "data_fingerprint", "split_fingerprint")

InputSize = Annotated[int, Field(ge=MIN_INPUT_PX, le=MAX_INPUT_PX)]
FieldSize = Annotated[int, Field(ge=1, le=100_000)]
Share = Annotated[float, Field(ge=0, le=1)]
Deviation = Annotated[float, Field(gt=0, le=1)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Printable text of one line, of users and publishers.
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", min_length=1, max_length=500)]


class Published(BaseModel):
    """Where the weights of an imported model are from, as its publisher states it; nothing was measured."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: Line
    """The library or collection, and the model's name there."""
    license: Line
    """Licence of the weights."""
    citation: Line
    """The publication to cite."""
    trained_on: Line
    """The images that it was trained on."""
    classes: tuple[Line, ...] = Field(min_length=1, max_length=MOST_CLASSES)
    """The publisher's names of the classes, in the order of the file."""
    file_sha256: Digest
    """SHA-256 of the publisher's file of weights."""
    stated: tuple[tuple[Line, Line], ...] = Field(default=(), max_length=50)
    """Name and value of each number that the publisher states, not measured here."""
    stated_on: Line | None = None
    """The images behind these numbers."""


class Study(BaseModel):
    """What a bundle is that a cross-validation made of all its models."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Literal["ensemble", "refit"]
    """ensemble: the models of the study, whose logits are averaged; refit: one network, trained on all
    images."""
    n_models: int = Field(ge=2, le=MOST_MEMBERS)
    """Models of the study."""


class Card(BaseModel):
    """Everything that a prediction depends on, and its provenance."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    format_version: Literal[2] = FORMAT_VERSION
    architecture: Architecture = "resnet50"
    evidence: Literal["evidence", "gradcam"] = "evidence"
    """What the evidence maps are. evidence: the closed form, whose mean plus bias is the log-odds; gradcam:
    Grad-CAM, which adds up to nothing, of networks that have more than a mean before the last layer."""
    weights_license: Annotated[str, Field(max_length=200)] | None = None
    """Licence of the initial weights, where it is known; of an imported model see `published`."""
    study: Study | None = None
    """Of a bundle of a cross-validation: it has seen all images, its metrics are those of the study's models
    on images that each had not seen, and these chose temperature and threshold. None for one training."""
    weights_sha256: Digest | None = None
    """SHA-256 of the file of weights; None before the bundle is written."""
    canary_logit: tuple[float, ...] = ()
    """Logits of `bundle.canary`, in float32 on the machine that wrote the bundle."""
    target: Literal["tumor_class", "subtype", "published"]
    """What is predicted; `published`: classes of the publisher's, each behind the tumour class that it counts
    as, such as `malignant:TUM`."""
    classes: tuple[str, ...]
    """Class names in the order of the logits."""
    input_height_px: InputSize
    input_width_px: InputSize
    decoder_version: Literal[2] = image.DECODER_VERSION
    """Version of the conversion of images to pixels; it converts colour profiles to sRGB, for example."""
    mean: tuple[Share, Share, Share] = image.IMAGENET_MEAN
    std: tuple[Deviation, Deviation, Deviation] = image.IMAGENET_STD
    stain: StainReference | None = None
    """The stain of the training images, to which every image is normalised; None: images stay as they are."""
    symmetries: bool = False
    """Whether the features of each image are averaged over its eight flips and quarter turns."""
    field_height_px: FieldSize
    """Height of the usual training field in its own pixels; slides are cut into tiles of this size."""
    field_width_px: FieldSize
    """Width of the usual training field in its own pixels."""
    mpp: tuple[Annotated[float, Field(ge=MIN_MPP, le=MAX_MPP)], ...]
    """µm per pixel of the training fields, where known."""
    magnifications: tuple[int, ...]
    """BreaKHis magnifications of the training fields, where known."""
    temperature: float = Field(default=1.0, ge=0.01, le=100)
    """Divisor of the logits that calibrates the probabilities; fitted on validation, or 1."""
    threshold: Share = 0.5
    """Probability from which an image is called malignant; chosen on validation, or the prior."""
    operating_point: dict[str, Any] = {}
    """How the threshold was chosen, and its metrics on validation: `decision.choose_threshold`."""
    calibration: dict[str, float] = {}
    """On validation, before and after the temperature: cross-entropy, Brier score, calibration error."""
    published: Published | None = None
    """The publisher's statements, of an imported model; of such a one, protocol, seed and fingerprints are
    unknown."""
    protocol: Protocol | None = None
    fold: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=0)
    data_fingerprint: Digest | None = None
    """Hash over the ids, sizes and classes of the images before the split."""
    split_fingerprint: Digest | None = None
    """Hash over the part of every image."""
    leaky: bool
    """Whether patients may be in more than one part of the split, which makes the metrics misleading."""
    synthetic: bool
    """Whether the training images are synthetic: the metrics say nothing about tissue."""
    warnings: tuple[str, ...] = ()
    """Limitations of the training data and their split."""
    feature_statistics: FeatureStatistics | None = None
    """Statistics of the pooled features over the training images, for the novelty of other images."""
    training: dict[str, Any]
    """All settings of the training run, from which an evaluation reproduces the split."""
    validation: dict[str, float]
    """The best epoch, and its metrics on the validation part."""
    metrics: dict[str, Any] = {}
    """Metrics on the test part, with intervals."""
    bundle_license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,99}$")] | None = None
    """Licence under which the bundle is published, an id of the hub's list; None where none was stated."""
    versions: dict[str, str]
    git_commit: str | None

    @property
    def input_size_px(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return self.input_height_px, self.input_width_px

    @property
    def n_members(self) -> int:
        """Networks whose logits are averaged: a prediction takes as many forward passes."""
        return self.study.n_models if self.study and self.study.kind == "ensemble" else 1

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "Card":
        if self.target == taxonomy.PUBLISHED:
            _require_published_classes(self.classes)
        elif self.classes != taxonomy.classes(self.target):
            raise ValueError(
                f"classes {list(self.classes)}: expected {list(taxonomy.classes(self.target))}, in this order"
            )
        if self.canary_logit and len(self.canary_logit) != len(self.classes):
            raise ValueError(f"{len(self.canary_logit)} canary logits for {len(self.classes)} classes")
        if unknown := set(self.magnifications) - set(MAGNIFICATIONS):
            raise ValueError(f"magnifications {sorted(unknown)}: expected some of {list(MAGNIFICATIONS)}")
        if missing := [key for key in ("name", "data", "weights") if key not in self.training]:
            raise ValueError(f"training: {missing[0]} is missing")
        if not self.published and "epoch" not in self.validation:
            raise ValueError("validation: the epoch is missing")
        if not self.published and (missing := [name for name in OWN if getattr(self, name) is None]):
            raise ValueError(f"{missing[0]} is missing")
        known = self.feature_statistics
        if known and len(known.mean) != len(known.spread):
            raise ValueError("feature_statistics: expected as many means as spreads")
        return self

    def cam(self, given: str, layer: str = LAST_LAYER) -> str:
        """The method of `--cam` and `--cam-layer` for this model; raises ConfigError where it has none."""
        if self.n_members > 1 and given != CLOSED_FORM:
            raise ConfigError(
                f"--cam {given} explains a single network, and this bundle averages {self.n_members}: use "
                f"--cam {CLOSED_FORM}, whose maps add up to the log-odds, or the bundle of one fold"
            )
        if not self.architecture.startswith(TIMM):
            return given
        if layer != LAST_LAYER or given in ("scorecam", "ablationcam"):
            raise ConfigError(
                f"--cam {given} --cam-layer {layer} needs a ResNet, and the model is {self.architecture}: "
                f"leave out --cam-layer, and use another --cam than scorecam and ablationcam"
            )
        return self.evidence if given == CLOSED_FORM else given


def _require_published_classes(names: tuple[str, ...]) -> None:
    """Raise ValueError unless they are of the form of `taxonomy.published_class`."""
    parts = [name.partition(":") for name in names]
    if {word for word, _, name in parts if name} != set(taxonomy.TUMOR_CLASSES):
        raise ValueError(f"classes {list(names)}: expected benign:NAME and malignant:NAME, at least one each")
    if not all(word in taxonomy.TUMOR_CLASSES and name for word, _, name in parts):
        raise ValueError(f"classes {list(names)}: expected benign:NAME and malignant:NAME only")
    if not len(set(names)) == len(names) <= MOST_CLASSES:
        raise ValueError(f"classes: expected at most {MOST_CLASSES}, of different names")


def make(**facts: Any) -> Card:
    """Create a card; raises BundleError for invalid fields."""
    try:
        return Card(**facts)
    except ValidationError as error:
        raise BundleError(f"no model card can be written: {_first(error)}") from None


def dump(card: Card) -> bytes:
    """The card as JSON with its checksum; raises BundleError where it could not be read again."""
    content = json.loads(make(**card.model_dump()).model_dump_json())
    return json.dumps(content | {CHECKSUM: seal(content)}, indent=2).encode()


def parse_card(content: bytes, uri: str) -> Card:
    """Parse the card of the bundle at a URI; raises BundleError for an invalid one or another format."""
    try:
        found = json.loads(content, object_pairs_hook=_unique)
        if not isinstance(found, dict):
            raise ValueError("expected a JSON object")
        _require_format(found.get("format_version"), uri)
        if found.pop(CHECKSUM, None) != seal(found):
            raise BundleError(
                f"{uri}: the model card is not as it was written: its checksum differs. Copy the bundle "
                "again, or run the command of its training again, which writes a new one"
            )
        return Card.model_validate_json(json.dumps(found), strict=True)
    except ValidationError as error:
        raise BundleError(f"{uri}: not a valid model card: {_first(error)}") from None
    # Nesting too deep is a RecursionError; text not in UTF-8, and NaN, are ValueErrors.
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{uri}: not a valid model card: {error}") from error


def model_id(card: Card) -> str:
    """Hash over everything that a prediction depends on, with the hash of the weights. Metrics, warnings and
    licences and a publisher's statements do not change it, nor do the canary's logits, whose rounding depends
    on the machine, nor the kind of evidence, which follows from the network, nor fields that an older version
    did not have, where they are off."""
    off = {name for name in ("stain", "symmetries", "study") if not getattr(card, name)}
    words = {"metrics", "warnings", "weights_license", "bundle_license", "published"}
    left_out = dict.fromkeys(words | {"canary_logit", "evidence"} | off, True)
    # No prediction depends on it, only the sentence about an archive.
    facts = card.model_dump_json(exclude={**left_out, "feature_statistics": {"stain"}})
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _require_format(version: Any, uri: str) -> None:
    if version == FORMAT_VERSION:
        return
    todo = "run the command of its training again, with the same --name: it writes a new bundle"
    if version != 1:
        todo = "install the version of bcd that wrote it"
    raise BundleError(
        f"{uri}: the model card has format {version}, this version reads {FORMAT_VERSION}; {todo}"
    )


def seal(content: dict[str, Any]) -> str:
    """Hash over the content of a card, independent of its layout."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _first(error: ValidationError) -> str:
    """The first fault, as a sentence."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}{': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
