"""Class, patient and part of an image from the folders above it.

    <site>/<train, val or test>/<class>/<subtype>/<patient>/<anything>/<image>

Only class and image are required; folders for magnifications, folds and the like may be in between. Only the
class folder gives the label. An ambiguous tree is rejected, or read with a warning if that may be right.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from bcd import schema, storage
from bcd.data import names
from bcd.errors import DataError
from bcd.taxonomy import MAGNIFICATIONS, SUBTYPES, TUMOR_CLASSES, part_named
from bcd.text import folded, some

# Tumour class, and subtype where known, by the folded name of a folder.
Label = tuple[str, str | None]
_NAMES: Mapping[str, Label] = {
    **{name: (name, None) for name in TUMOR_CLASSES},
    **{folded(s.name): (s.tumor_class, s.code) for s in SUBTYPES.values()},
}
# `A` may be a hospital, `DC` a person: codes count only if they are a whole level of the tree.
_CODES: Mapping[str, Label] = {folded(s.code): (s.tumor_class, s.code) for s in SUBTYPES.values()}
# The same holds for names as short as a code, such as 0 or B.
_SHORT = 2
_FOLD = re.compile(r"(cv_?)?(fold|split)_?[0-9]+")
_MAGNIFICATION = re.compile(
    r"((mag|magnification)_?)?(1\.25|2|2\.5|4|5|10|20|40|60|63|100|200|400|1000)_?x|(mag|magnification)_?[0-9]+"
)
# Folders that contain images of many patients in any data set.
_STRUCTURE = re.compile(
    "sob|(images?|imgs?|pictures|photos|tiles|fields|crops)|(data|dataset|all|png|jpe?g|tiff?)"
    "|(raw|originals?|cropped|processed|normali[sz]ed|resized)(_images)?"
)
# A patient may have the number 40, so these are magnifications only if they are a whole level.
_NUMBERS = frozenset(f"{x}{m}" for m in MAGNIFICATIONS for x in ("", "x"))
EXPECTED = (
    "expected CLASS/PATIENT/IMAGE, such as benign/P1/a.png, or a manifest with uri, tumor_class and patient"
)


@dataclass
class _Place:
    """An image and its folders: the class, those above it, and those below that may name the patient."""

    file: storage.File
    tumor_class: str
    subtype: str | None
    class_folder: str
    sites: list[str]
    below: list[str]
    structure: list[str]
    refused: str | None = None

    def skip(self, n: int = 0) -> None:
        """Skip n folders below the class, and then those that are known to be no patient."""
        while self.below and (n > 0 or _is_structural(self.below[0])):
            self.structure.append(self.below.pop(0))
            if part_named(self.structure[-1]) is None:
                self.refused = self.structure[-1]
            n -= 1


def rows_of_tree(
    data: str, files: Sequence[storage.File], given: Mapping[str, str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """A row per image of a tree with class folders, and warnings.

    `given` has tumour classes by other (folded) names of class folders, from `taxonomy.given_names`. Raises
    `DataError` if an image is in no class folder or in several, or no folder can be its patient.
    """
    places = [_place(data, *found) for found in zip(files, _labels(data, files, given), strict=True)]
    _strip_sites(places)
    warnings = _find_subtypes(data, places) + _find_patients(data, places) + _site_warnings(places)
    parted = parts_of(data, [(place.file.path, place.structure) for place in places])
    return [_row(place, part) for place, part in zip(places, parted, strict=True)], warnings


def parts_of(data: str, images: Sequence[tuple[str, Sequence[str]]]) -> list[str | None]:
    """Part of every image, from its path and the folders that may name a part (train, val, test, ...).

    Raises `DataError` if an image is in several parts, or the tree has several divisions.
    """
    found = [{part for name in folders if (part := part_named(name))} for _, folders in images]
    for (path, _), of_image in zip(images, found, strict=True):
        if len(of_image) > 1:
            raise DataError(f"{data}: {path} is in {' and '.join(sorted(of_image))}; expected one part")
    folds = {folded(name) for _, folders in images for name in folders if _FOLD.fullmatch(folded(name))}
    if any(found) and len(folds) > 1:
        raise DataError(
            f"{data}: {some(sorted(folds))} divide the images in several ways; name one as --data"
        )
    return [next(iter(of_image), None) for of_image in found]


def _folders(file: storage.File) -> list[str]:
    return file.path.split("/")[:-1]


def _labels(data: str, files: Sequence[storage.File], given: Mapping[str, str]) -> list[dict[int, Label]]:
    """Labels of each image by the position of their folders; at least one."""
    trees = [[folded(name) for name in _folders(file)] for file in files]
    own: dict[str, Label] = {name: (tumor_class, None) for name, tumor_class in given.items()}
    sure = {name: label for name, label in own.items() if len(name) > _SHORT} | dict(_NAMES)
    found = [{i: sure[name] for i, name in enumerate(tree) if name in sure} for tree in trees]
    short = {name: label for name, label in own.items() if len(name) <= _SHORT}
    short = short or ({} if any(found) else dict(_CODES))
    if not all(found):
        known = short | sure
        levels = [i for i in range(min(map(len, trees))) if all(tree[i] in known for tree in trees)]
        levels = [i for i in levels if any(tree[i] in short for tree in trees)]
        found = [
            label | {i: known[tree[i]] for i in levels} for label, tree in zip(found, trees, strict=True)
        ]
    if all(found):
        return found
    unlabelled = [number for number, labels in enumerate(found) if not labels]
    # If short names are no whole level, all images are unlabelled: name one without any.
    worst = next((number for number in unlabelled if not short.keys() & trees[number]), unlabelled[0])
    raise DataError(
        f"{data}: {files[worst].path} is in no class folder; expected benign/ and malignant/ (or names of "
        "subtypes, or --classes benign=NAME malignant=NAME), BreaKHis names, or a manifest with uri, "
        f"tumor_class and patient. Names of one or two letters, such as {min(short or _CODES).upper()}, "
        "count only if every image has a class at that level"
    )


def _place(data: str, file: storage.File, labels: Mapping[int, Label]) -> _Place:
    folders, level = _folders(file), min(labels)
    classes = {tumor_class for tumor_class, _ in labels.values()}
    subtypes = {subtype for _, subtype in labels.values()} - {None}
    others = [name for i, name in enumerate(folders) if i > level and i not in labels]
    # `malignant_tiles` below a folder of benign images contradicts it, too.
    words = ((name, set(re.split(r"[\W\d_]+", folded(name)))) for name in others)
    odd = [name for name, found in words if found & set(TUMOR_CLASSES) not in (set(), classes)]
    if len(classes) > 1 or len(subtypes) > 1 or odd:
        raise _contradiction(data, file, [*(folders[i] for i in sorted(labels)), *odd])
    place = _Place(
        file=file,
        tumor_class=classes.pop(),
        subtype=next(iter(subtypes), None),
        class_folder=folders[level],
        sites=[name for name in folders[:level] if not _is_structural(name)],
        below=others,
        structure=[name for name in folders[:level] if _is_structural(name)],
    )
    place.skip()
    return place


def _contradiction(data: str, file: storage.File, named: Sequence[str]) -> DataError:
    folders = " and ".join(dict.fromkeys(named))
    return DataError(
        f"{data}: {file.path}: its folders {folders} name different classes; move the image, rename a "
        "folder, or write a manifest with uri, tumor_class and patient"
    )


def _is_structural(name: str) -> bool:
    """Whether a folder of this name contains images of many patients."""
    plain = folded(name)
    known = any(pattern.fullmatch(plain) for pattern in (_FOLD, _MAGNIFICATION, _STRUCTURE))
    return known or part_named(plain) is not None


def _strip_sites(places: Sequence[_Place]) -> None:
    """Keep only those folders above the classes that differ between images: hospitals, or the like."""
    # Levels on which all images share a folder: where the data set was unpacked.
    levels = zip(*(place.sites for place in places), strict=False)
    shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, levels))
    numbers = {folded(name) for place in places for name in place.sites[shared:]}
    for place in places:
        place.sites = [] if numbers <= _NUMBERS else place.sites[shared:]


def _find_subtypes(data: str, places: Sequence[_Place]) -> list[str]:
    """Read codes below the class folders as subtypes if all folders of that level are codes."""
    level = {folded(place.below[0]): place for place in places if place.below and place.subtype is None}
    codes = level.keys() & _CODES.keys()
    if codes and codes != level.keys():
        named = some(sorted(level[code].below[0] for code in codes))
        other = level[min(level.keys() - codes)].below[0]
        return [f"{named}: read as a patient and not as a subtype, because {other} beside it is no subtype"]
    for place in places if codes else ():
        if place.below and place.subtype is None:
            tumor_class, place.subtype = _CODES[folded(place.below[0])]
            if tumor_class != place.tumor_class:
                raise _contradiction(data, place.file, [place.class_folder, place.below[0]])
            del place.below[0]
            place.skip()
    return []


def _find_patients(data: str, places: Sequence[_Place]) -> list[str]:
    """Skip folders between the classes and the patients; reject images whose folder is no patient."""
    warnings = []
    first = {place.below[0] for place in places if place.below}
    several = len({place.tumor_class for place in places}) > 1
    if len(first) > 1 and {folded(name) for name in first} <= _NUMBERS:
        for place in places:
            place.skip(1)
    elif len(first) == 1 and several and all(_deeper(place) for place in places):
        warnings.append(
            f"folder {min(first)} contains all images of every class: patients are those below it"
        )
        for place in places:
            place.skip(1)
    for place in places:
        if place.refused and not place.below:
            raise DataError(f"{data}: {place.file.path}: {place.refused} is no patient; {EXPECTED}")
    return warnings + (_in_both_classes(data, places) if several else [])


def _deeper(place: _Place) -> str | None:
    """The folder below the presumed patient, if it may be a patient itself."""
    return next((name for name in place.below[1:] if not _is_structural(name)), None)


def _in_both_classes(data: str, places: Sequence[_Place]) -> list[str]:
    """Warn if all presumed patients have both classes; reject if folders below them could be the patients."""
    classes, inside = defaultdict[Any, set[str]](set), defaultdict[Any, set[str | None]](set)
    for place in places:
        who = (*place.sites, *place.below[:1])
        classes[who].add(place.tumor_class)
        inside[who].add(_deeper(place))
    if not all(place.below for place in places) or min(map(len, classes.values())) == 1:
        return []
    named = some(sorted({who[-1] for who in classes}))
    if all(map(all, inside.values())) and any(len(found) > 1 for found in inside.values()):
        below = min(filter(None, set().union(*inside.values())))
        raise DataError(
            f"{data}: {named} have images of every class, and folders such as {below} in them: patients or "
            "hospitals? Expected patients right below the class and hospitals above it "
            "(SITE/CLASS/PATIENT/IMAGE), or a manifest with uri, tumor_class and patient"
        )
    return [f"every patient ({named}) has images of every class; if these are no patients, write a manifest"]


def _site_warnings(places: Sequence[_Place]) -> list[str]:
    found = sorted({"/".join(place.sites) for place in places if place.sites})
    if not found:
        return []
    of_patient = defaultdict[str, set[str]](set)
    for place in places:
        for name in place.below[:1]:
            of_patient[name].add("/".join(place.sites))
    if not of_patient:
        return [
            f"folders above the classes ({some(found)}) may be patients or hospitals: no patient is known; "
            f"{EXPECTED}"
        ]
    shared = sorted(name for name, sites in of_patient.items() if len(sites) > 1)
    people = f"An id of several sites, such as {shared[0]}, counts as several people. " if shared else ""
    return [
        f"folders above the classes ({some(found)}) are read as sites, and patients as SITE/PATIENT. {people}"
        "If that is wrong, write a manifest with uri, tumor_class and patient"
    ]


def _row(place: _Place, part: str | None) -> dict[str, Any]:
    patient = names.identity(place.below[0]) if place.below else None
    sites = [names.identity(name) or name for name in place.sites]
    return {
        schema.IMAGE_ID: place.file.path,
        schema.URI: place.file.uri,
        schema.PATIENT: "/".join([*sites, patient]) if patient else None,
        schema.SITE: "/".join(sites) or None,
        schema.TUMOR_CLASS: place.tumor_class,
        schema.SUBTYPE: place.subtype,
        schema.SIZE_BYTES: place.file.size_bytes,
        schema.PART: part,
    }
