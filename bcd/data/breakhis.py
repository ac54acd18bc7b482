"""BreaKHis: the grammar of file names, the published counts, and the published folds.

Source of the grammar, the counts and the folds: Spanhol, Oliveira, Petitjean and Heutte 2016, "A Dataset
for Breast Cancer Histopathological Image Classification", IEEE TBME 63(7), doi:10.1109/TBME.2015.2496264.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from bcd import schema
from bcd.errors import DataError
from bcd.storage import File
from bcd.taxonomy import BENIGN, MAGNIFICATIONS, MALIGNANT, MPP_BY_MAGNIFICATION, SUBTYPES, TUMOR_CLASSES
from bcd.text import counted, folded, some

# Prefix of every published file name.
PREFIX = "SOB_"
GRAMMAR = "SOB_<B|M>_<subtype>-<year>-<slide id>-<40|100|200|400>-<sequence>.png (or .jpg, .tif)"

_LETTERS: Mapping[str, str] = {BENIGN: "B", MALIGNANT: "M"}
_NAME = re.compile(
    rf"SOB_(?P<letter>[BM])_(?P<subtype>{'|'.join(SUBTYPES)})"
    r"-(?P<year>[0-9]{2})-(?P<number>[0-9]+)(?P<suffix>[A-Z]*)"
    rf"-(?P<magnification>{'|'.join(map(str, MAGNIFICATIONS))})-(?P<sequence>[0-9]{{3}})"
    r"(?i:\.(?:png|jpe?g|tiff?))"
)
# The published folders that repeat the file name, in the order of `ImageName.folders`; compared folded,
# because case and blanks of a folder have no meaning.
_FOLDERS = (
    re.compile("|".join(TUMOR_CLASSES)),
    re.compile("|".join(subtype.name for subtype in SUBTYPES.values())),
    re.compile(r"sob_[bm]_.+"),
    re.compile(r"[0-9]+x"),
)
_FOLD_LINE = re.compile(r"(?P<name>[^|]+)\|(?P<magnification>[0-9]+)\|(?P<fold>[1-5])\|(?P<role>train|test)")

# Published images per subtype and magnification (Spanhol et al. 2016); the names in the fold files agree.
EXPECTED_COUNTS: Mapping[str, Mapping[int, int]] = {
    "A": {40: 114, 100: 113, 200: 111, 400: 106},
    "F": {40: 253, 100: 260, 200: 264, 400: 237},
    "PT": {40: 109, 100: 121, 200: 108, 400: 115},
    "TA": {40: 149, 100: 150, 200: 140, 400: 130},
    "DC": {40: 864, 100: 903, 200: 896, 400: 788},
    "LC": {40: 156, 100: 170, 200: 163, 400: 137},
    "MC": {40: 205, 100: 222, 200: 196, 400: 169},
    "PC": {40: 145, 100: 142, 200: 135, 400: 138},
}

# Slides whose published labels contradict each other. `bcd.split.quarantine` finds them by rule, without
# this list.
KNOWN_ANOMALIES: Mapping[str, str] = {
    "14-13412": (
        "published as ductal (DC) and as lobular carcinoma (LC), with the same 32, 33, 32 and 26 images at "
        "40X to 400X; counted as two of the 82 patients, and in both parts of official folds 1, 3 and 5"
    ),
}


@dataclass(frozen=True)
class ImageName:
    """Fields of a BreaKHis file name: `SOB_B_A-14-22549AB-40-001.png` is an adenosis at 40X."""

    tumor_class: str
    subtype: str
    year: str
    number: str
    suffix: str
    magnification: int
    sequence: int

    @property
    def case(self) -> str:
        """`14-22549`: the slide id without its letters, whose meaning (another person?) is unpublished."""
        return f"{self.year}-{self.number}"

    @property
    def slide(self) -> str:
        """`14-22549AB`. There are 81 distinct ids; 14-13412 has two subtypes, hence the published "82"."""
        return f"{self.case}{self.suffix}"

    @property
    def patient(self) -> str:
        """The same as `slide`: the publication counts every slide id as a patient."""
        return self.slide

    @property
    def mpp(self) -> float:
        """µm per pixel."""
        return MPP_BY_MAGNIFICATION[self.magnification]

    @property
    def folders(self) -> tuple[str, str, str, str]:
        """The published folders that repeat the name: class, subtype, slide and magnification."""
        slide = f"SOB_{_LETTERS[self.tumor_class]}_{self.subtype}_{self.slide}"
        return self.tumor_class, SUBTYPES[self.subtype].name, slide, f"{self.magnification}X"


def parse_path(path: str) -> ImageName:
    """Parse a BreaKHis path, with or without its folders.

    Raises `DataError` if the file name breaks the grammar or contradicts itself or a folder.
    """
    *folders, file_name = path.split("/")
    match = _NAME.fullmatch(file_name)
    if not match:
        raise DataError(f"{path}: not a BreaKHis name; expected {GRAMMAR} with {', '.join(SUBTYPES)}")
    tumor_class = SUBTYPES[match["subtype"]].tumor_class
    if match["letter"] != _LETTERS[tumor_class]:
        raise DataError(
            f"{path}: {match['subtype']} is {tumor_class}, so expected SOB_{_LETTERS[tumor_class]}_"
        )
    subtype, year, number, suffix = match.group("subtype", "year", "number", "suffix")
    magnification, sequence = int(match["magnification"]), int(match["sequence"])
    name = ImageName(tumor_class, subtype, year, number, suffix, magnification, sequence)
    for folder in folders:
        for pattern, expected in zip(_FOLDERS, name.folders, strict=True):
            if pattern.fullmatch(folded(folder)) and folded(folder) != folded(expected):
                raise DataError(f"{path}: folder {folder} contradicts the file name; expected {expected}")
    return name


def published(path: str) -> str:
    """File name of an image as in the fold files, for any image format."""
    name = path.rpartition("/")[2]
    return f"{name.rpartition('.')[0]}.png" if _NAME.fullmatch(name) else name


def _index_row(file: File) -> dict[str, Any]:
    name = parse_path(file.path)
    return {
        schema.IMAGE_ID: file.path,
        schema.URI: file.uri,
        schema.PATIENT: name.patient,
        schema.CASE: name.case,
        schema.SLIDE: name.slide,
        schema.TUMOR_CLASS: name.tumor_class,
        schema.SUBTYPE: name.subtype,
        schema.MAGNIFICATION: name.magnification,
        schema.MPP: name.mpp,
        schema.SIZE_BYTES: file.size_bytes,
    }


def index(files: Iterable[File]) -> pa.Table:
    """Table of image rows with schema `schema.INDEX`, in the order of the files.

    Raises `DataError` if names are invalid, with their number and the first five.
    """
    rows: list[dict[str, Any]] = []
    invalid: list[str] = []
    for file in files:
        try:
            rows.append(_index_row(file))
        except DataError as error:
            invalid.append(str(error))
    if invalid:
        count = counted(len(invalid), "file name is", "file names are")
        raise DataError(f"{count} invalid: {some(invalid, 5, '; ')}")
    return pa.Table.from_pylist(rows, schema=schema.INDEX)


def count_warnings(table: pa.Table) -> list[str]:
    """Differences between an index and the published counts, as sentences."""
    columns = (table[name].to_pylist() for name in (schema.SUBTYPE, schema.MAGNIFICATION))
    found = Counter(zip(*columns, strict=True))
    expected = Counter({(s, m): n for s, counts in EXPECTED_COUNTS.items() for m, n in counts.items()})
    missing, surplus = expected - found, found - expected
    warnings = []
    if missing:
        here = f"{(found & expected).total():,} of {expected.total():,} published images are here"
        warnings.append(f"{here}; missing {_tally(missing)}")
    if surplus:
        warnings.append(f"{counted(surplus.total(), 'image')} more than published: {_tally(surplus)}")
    return warnings


def _tally(counts: Counter[tuple[str, int]]) -> str:
    """`37 at 40X, 2 at 100X; 30 A, 9 DC`, zeros left out."""
    by_magnification = {m: sum(counts[s, m] for s in SUBTYPES) for m in MAGNIFICATIONS}
    by_subtype = {s: sum(counts[s, m] for m in MAGNIFICATIONS) for s in SUBTYPES}
    magnifications = ", ".join(f"{n:,} at {m}X" for m, n in by_magnification.items() if n)
    subtypes = ", ".join(f"{n:,} {s}" for s, n in by_subtype.items() if n)
    return f"{magnifications} ({subtypes})"


def read_fold(text: str, name: str) -> dict[str, str]:
    """Role of every image, `"train"` or `"test"`, by file name, from the text of an official fold file.

    Raises `DataError`, with the file's `name` and the line, if a line is not
    `file name|magnification|fold|train or test`, repeats an image or names another fold.
    """
    roles: dict[str, str] = {}
    folds: set[str] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{name}, line {number}"
        match = _FOLD_LINE.fullmatch(line)
        if not match:
            raise DataError(f"{where}: {line!r}; expected file name|magnification|fold 1 to 5|train or test")
        if parse_path(match["name"]).magnification != int(match["magnification"]):
            raise DataError(f"{where}: {match['name']} is not at magnification {match['magnification']}")
        if match["name"] in roles:
            raise DataError(f"{where}: {match['name']} is listed twice; expected every image once")
        folds.add(match["fold"])
        if len(folds) > 1:
            raise DataError(f"{where}: fold {match['fold']}; expected one fold per file")
        roles[match["name"]] = match["role"]
    if not roles:
        raise DataError(f"{name}: empty; expected lines of file name|magnification|fold|train or test")
    return roles
