"""Tumour classes, the eight BreaKHis subtypes, and magnifications with their scale.

Source: Spanhol et al. 2016, "A Dataset for Breast Cancer Histopathological Image Classification".
The order of classes here is the order of logits in every model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bcd.errors import ConfigError
from bcd.text import folded

Target = Literal["tumor_class", "subtype"]
# Of a model with classes of its publisher's: see `published_class`.
PUBLISHED: Literal["published"] = "published"

BENIGN, MALIGNANT = "benign", "malignant"
TUMOR_CLASSES = (BENIGN, MALIGNANT)


@dataclass(frozen=True)
class Subtype:
    """One histological subtype: its published code, name and tumour class."""

    code: str
    name: str
    tumor_class: str


SUBTYPES: Mapping[str, Subtype] = {
    s.code: s
    for s in (
        Subtype("A", "adenosis", BENIGN),
        Subtype("F", "fibroadenoma", BENIGN),
        Subtype("PT", "phyllodes_tumor", BENIGN),
        Subtype("TA", "tubular_adenoma", BENIGN),
        Subtype("DC", "ductal_carcinoma", MALIGNANT),
        Subtype("LC", "lobular_carcinoma", MALIGNANT),
        Subtype("MC", "mucinous_carcinoma", MALIGNANT),
        Subtype("PC", "papillary_carcinoma", MALIGNANT),
    )
}

# µm per pixel of a BreaKHis field: camera pixel 6.5 µm / (3.3x relay lens * objective), as published
# (the labels 40X..400X are total magnifications of the 4x..40x objectives).
MPP_BY_MAGNIFICATION: Mapping[int, float] = {40: 0.49, 100: 0.20, 200: 0.10, 400: 0.05}
MAGNIFICATIONS = tuple(MPP_BY_MAGNIFICATION)
# Published splits of BreaKHis into training and test images (Spanhol et al. 2016).
N_FOLDS = 5
# Range of µm per pixel of microscopes: the finest BreaKHis fields have 0.05, overview scans up to about 10.
# TIFF's 72 to 1200 dpi, the default of software without a scale, are 353 to 21.
MIN_MPP, MAX_MPP = 0.05, 20.0

# Parts of a split, and their names in the folders or columns of data sets.
TRAIN, VALIDATION, TEST = PARTS = ("train", "validation", "test")
# Images that a split uses in none of them.
LEFT_OUT = "left_out"
_SYNONYMS = {
    TRAIN: ("train", "training", "trn"),
    VALIDATION: ("validation", "valid", "val", "dev"),
    TEST: ("test", "testing", "tst"),
}
_PART_NAMES = {
    f"{word}{ending}": part
    for part, words in _SYNONYMS.items()
    for word in words
    for ending in ("", "set", "_set", "_data", "_images")
}


def classes(target: Target) -> tuple[str, ...]:
    """Class names of a target, in the order of the model's logits."""
    return TUMOR_CLASSES if target == "tumor_class" else tuple(SUBTYPES)


def malignant_mask(class_names: tuple[str, ...]) -> tuple[bool, ...]:
    """For each class name of a card: whether it is malignant."""
    return tuple(tumor_class_of(name) == MALIGNANT for name in class_names)


def published_class(name: str, is_malignant: bool) -> str:
    """The name in a card of a publisher's class: behind the tumour class that it counts as, `malignant:TUM`.
    So every table with predicted classes says by itself which are malignant."""
    return f"{MALIGNANT if is_malignant else BENIGN}:{name}"


def tumor_class_of(name: str) -> str:
    """The tumour class of a class of a card: itself, that of a subtype's code, or what a publisher's class
    counts as."""
    return SUBTYPES[name].tumor_class if name in SUBTYPES else name.partition(":")[0]


def given_names(pairs: Sequence[str]) -> dict[str, str]:
    """Tumour class by the (folded) name that a data set has for it, from `benign=0`, `malignant=1`. Raises
    ConfigError where a pair is malformed, or a name has two classes."""
    named: dict[str, str] = {}
    subtypes = {folded(s.name): s.tumor_class for s in SUBTYPES.values()}
    fixed = {name: name for name in TUMOR_CLASSES} | subtypes
    for pair in pairs:
        tumor_class, _, name = (folded(word) for word in pair.partition("="))
        if tumor_class not in TUMOR_CLASSES or not name:
            raise ConfigError(f"--classes {pair}: expected benign=NAME malignant=NAME")
        if named.setdefault(name, tumor_class) != tumor_class or fixed.get(name, tumor_class) != tumor_class:
            other = next(c for c in TUMOR_CLASSES if c != tumor_class)
            raise ConfigError(f"--classes {pair}: {name} is {other}; a name has one class")
    return named


def part_named(name: str) -> str | None:
    """The part that a name such as `val`, `Training` or `test_set` denotes, or None."""
    return _PART_NAMES.get(folded(name))
