"""What publishers state about their classifiers: classes, scale, input and transform, licence and paper.

From what is known of TIAToolbox's models, from the config.json of WSInfer's zoo and of timm, and from flags.
A transform is accepted only where a bundle applies it exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from bcd import storage
from bcd.config.options import RESNETS, TIMM, Architecture
from bcd.config.signing import ImportConfig, Triple
from bcd.errors import BundleError, ConfigError
from bcd.imaging.image import IMAGENET_MEAN, IMAGENET_STD
from bcd.text import listed, some, without_folders

MOST_BYTES = 2**20
NOT_STATED = "not stated"
BILINEAR = "bilinear"
_TIATOOLBOX_PAPER = "Pocock et al. 2022, TIAToolbox, doi:10.1038/s43856-022-00186-5"
# TIAToolbox 2.1.3: names of classes in `KatherPatchDataset`; scale and size in pretrained_model.yaml, where
# PCam has 1 µm/px; `predefined_preproc_func` scales to 0 to 1 and no more. Weights have their data's licence.
_TIATOOLBOX: Mapping[str, Mapping[str, Any]] = {
    "pcam": {
        "classes": ("other", "tumour"),
        "malignant": ("tumour",),
        "mpp": 1.0,
        "input_px": 96,
        "license": "CC0-1.0, the licence of PatchCamelyon",
        "citation": f"{_TIATOOLBOX_PAPER}; Veeling et al. 2018, PatchCamelyon, arXiv:1806.03962",
        "trained_on": "PatchCamelyon: sections of lymph nodes of the breast (CAMELYON16), tumour or not",
    },
    "kather100k": {
        "classes": ("BACK", "NORM", "DEB", "TUM", "ADI", "MUC", "MUS", "STR", "LYM"),
        "malignant": ("TUM",),
        "mpp": 0.5,
        "input_px": 224,
        "license": "CC-BY-4.0, the licence of NCT-CRC-HE-100K",
        "citation": f"{_TIATOOLBOX_PAPER}; Kather et al. 2019, NCT-CRC-HE-100K, "
        "doi:10.1371/journal.pmed.1002730",
        "trained_on": "NCT-CRC-HE-100K: nine tissues of the colon, not of the breast",
    },
}
# Statements in words, for the card.
WORDS = ("source", "license", "citation", "trained_on")
_WSINFER_PAPER = "Kaczmarzyk et al. 2024, WSInfer, doi:10.1038/s41698-024-00499-9"


@dataclass(frozen=True)
class Classifier:
    """A published classifier, without its weights.

    `classes` are in the order of the logits, `malignant` are some of them. A tile of `tile_px` at `mpp`, µm
    per pixel, is resized to `input_px` by `interpolation`, scaled to 0 to 1, and normalised.
    """

    name: str
    architecture: Architecture
    classes: tuple[str, ...]
    malignant: tuple[str, ...]
    mpp: float | None
    tile_px: int
    input_px: int
    mean: Triple
    std: Triple
    source: str
    license: str = NOT_STATED
    citation: str = NOT_STATED
    trained_on: str = NOT_STATED
    interpolation: str = BILINEAR


class _Step(BaseModel):
    name: str
    arguments: dict[str, Any] = {}


class _WSInfer(BaseModel):
    """The schema 1.0 of wsinfer-zoo 0.6.3."""

    architecture: str
    num_classes: int
    class_names: tuple[str, ...]
    tile_px: int = Field(ge=1, alias="patch_size_pixels")
    mpp: float = Field(gt=0, alias="spacing_um_px")
    transform: tuple[_Step, ...]


class _TimmInput(BaseModel):
    input_size: tuple[int, int, int]
    mean: Triple
    std: Triple
    crop_pct: float
    interpolation: str


class _Timm(BaseModel):
    """What timm 1.0 writes when it pushes a model to a hub."""

    architecture: str
    num_classes: int
    label_names: tuple[str, ...] | None = None
    pretrained_cfg: _TimmInput


def read_source(config: ImportConfig) -> Classifier:
    """Everything about a classifier but its weights.

    Raises:
        ConfigError: flags are missing, or contradict what the publisher's files state.
        BundleError: the publisher's config.json is invalid, or states what a bundle cannot do exactly.
        StorageError: it cannot be read.
    """
    publisher, _, name = config.published.partition(":")
    if publisher == "tiatoolbox":
        stated = _of_tiatoolbox(name)
    elif publisher == "wsinfer" and config.publisher_config and not name:
        stated = _of_wsinfer(config.publisher_config)
    elif publisher == "timm" and config.publisher_config and not name:
        stated = _of_timm(config.publisher_config)
    elif publisher in ("timm", "torchvision") and name and not config.publisher_config:
        stated = {"architecture": name, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        stated |= {key: value for key in ("mean", "std") if (value := getattr(config, key))}
    else:
        raise ConfigError(
            f"{config.published}: expected tiatoolbox:resnet50-pcam or the like; wsinfer, or timm, with "
            "--publisher-config; or timm:resnet50, torchvision:resnet50 or the like without it"
        )
    stated.setdefault("source", f"{publisher}: {name or without_folders(config.weights)}")
    facts = _agreed(config, stated)
    facts["tile_px"] = facts.get("tile_px") or facts["input_px"]
    architecture = _known(publisher, facts.pop("architecture"))
    found = Classifier(**facts, name=name or architecture, architecture=architecture)
    _require_exact(found)
    return found


def _agreed(config: ImportConfig, stated: dict[str, Any]) -> dict[str, Any]:
    """What files and flags state together; of words for the card, the flag's."""
    given = {
        name: value
        for name in (*("classes", "malignant", "mpp", "input_px", "tile_px", "mean", "std"), *WORDS)
        if (value := getattr(config, name))
    }
    for name, value in given.items():
        if name not in (*WORDS, "malignant") and stated.get(name, value) != value:
            raise ConfigError(f"--{_flag(name)} {value}: the publisher states {stated[name]}")
    facts = stated | given
    if missing := [
        f"--{_flag(name)}" for name in ("classes", "malignant", "input_px") if not facts.get(name)
    ]:
        raise ConfigError(f"{config.published} does not state everything: give {listed(missing)}")
    return facts | {"mpp": facts.get("mpp")}


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _of_tiatoolbox(name: str) -> dict[str, Any]:
    architecture, _, data = name.rpartition("-")
    if data not in _TIATOOLBOX:
        raise ConfigError(f"tiatoolbox:{name}: expected ARCHITECTURE-{' or ARCHITECTURE-'.join(_TIATOOLBOX)}")
    return {"architecture": architecture, "mean": (0.0,) * 3, "std": (1.0,) * 3} | dict(_TIATOOLBOX[data])


def _of_wsinfer(uri: str) -> dict[str, Any]:
    found = _parsed(uri, _WSInfer)
    if len(found.class_names) != found.num_classes:
        raise BundleError(f"{uri}: {found.num_classes} classes with {len(found.class_names)} names")
    steps = {step.name: step.arguments for step in found.transform}
    order = [step.name for step in found.transform]
    possible = [name for name in ("Resize", "ToTensor", "Normalize") if name in order or name == "ToTensor"]
    resize, normalize = steps.get("Resize", {}), steps.get("Normalize", {})
    size = resize.get("size", found.tile_px)
    side = size[0] if isinstance(size, list) and len(size) == 2 and size[0] == size[1] else size
    is_known = resize.keys() <= {"size"} and normalize.keys() <= {"mean", "std"} and isinstance(side, int)
    if order != possible or not is_known or ("Normalize" in steps and len(normalize) != 2):
        given = [f"{step.name} {step.arguments or ''}".strip() for step in found.transform]
        raise BundleError(
            f"{uri}: its transform, {listed(given)}, cannot be applied exactly; expected Resize to a square "
            "of one size, ToTensor, and Normalize by mean and std, in this order"
        )
    return {
        "architecture": found.architecture,
        "classes": found.class_names,
        "mpp": found.mpp,
        "tile_px": found.tile_px,
        "input_px": side,
        "mean": tuple(normalize.get("mean", (0.0,) * 3)),
        "std": tuple(normalize.get("std", (1.0,) * 3)),
        "citation": _WSINFER_PAPER,
    }


def _of_timm(uri: str) -> dict[str, Any]:
    found = _parsed(uri, _Timm)
    _, height, width = found.pretrained_cfg.input_size
    if height != width or found.pretrained_cfg.crop_pct != 1:
        crop = found.pretrained_cfg.crop_pct
        raise BundleError(
            f"{uri}: an input of {height} x {width} px, cropped to {crop:g} of the image, cannot be made "
            "exactly: a bundle fits the whole image into a square. If it was trained on uncropped squares, "
            "import timm:NAME with --input-px, --mean and --std, without --publisher-config"
        )
    facts = {"classes": found.label_names} if found.label_names else {}
    return facts | {
        "architecture": found.architecture,
        "input_px": height,
        "mean": found.pretrained_cfg.mean,
        "std": found.pretrained_cfg.std,
        "interpolation": found.pretrained_cfg.interpolation,
    }


Parsed = TypeVar("Parsed", bound=BaseModel)


def _parsed(uri: str, kind: type[Parsed]) -> Parsed:
    try:
        return kind.model_validate_json(storage.read_bytes(uri, MOST_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{uri}: not the config.json that was expected: {where}: {first['msg']}") from None


def _known(publisher: str, name: str) -> Architecture:
    """The architecture of a publisher's name, a ResNet's without the tag of its weights. WSInfer's names are
    timm's."""
    plain = name.partition(".")[0]
    if plain in RESNETS:
        return plain
    if publisher in ("timm", "wsinfer"):
        return f"{TIMM}{name}"
    raise BundleError(
        f"{publisher}: no {name!r} can be imported; expected {some(RESNETS, 9)}, or a network of timm under "
        "timm's names of its tensors"
    )


def _require_exact(found: Classifier) -> None:
    if unknown := set(found.malignant) - set(found.classes):
        raise ConfigError(f"--malignant {some(unknown)}: expected some of {some(found.classes, 99)}")
    if len(set(found.classes)) < len(found.classes):
        raise ConfigError(f"--classes {some(found.classes, 99)}: a name occurs twice")
    if len(found.classes) > 1 and set(found.malignant) == set(found.classes):
        raise ConfigError("--malignant: all classes; expected another one, which counts as benign")
    if found.tile_px != found.input_px and found.interpolation != BILINEAR:
        raise BundleError(
            f"the publisher resizes tiles by {found.interpolation} interpolation, a bundle by {BILINEAR}: "
            f"only tiles of the network's size are exact, --tile-px {found.input_px}"
        )
