"""Who trains and who tests: group-disjoint, stratified, seeded splits, and the proof that nothing leaks.

The usual order is `quarantine` -> `assign` -> `require_no_leak`. A split depends on the seed and on what the
rows say: not on their order, the platform or the version of NumPy (raw PCG64 words and integers).
"""

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bcd import schema
from bcd.config.options import Protocol
from bcd.data import breakhis
from bcd.errors import ConfigError, DataError, LeakageError
from bcd.split import stratify
from bcd.split.stratify import Integers
from bcd.taxonomy import PARTS, TEST, TRAIN, TUMOR_CLASSES, VALIDATION

# Protocols that put images of one patient on both sides: their numbers are marked wherever they appear.
LEAKY = frozenset({"image"})
# What a data set says of an image, and what tells one content from another.
_SAID = (
    schema.TUMOR_CLASS,
    schema.SUBTYPE,
    schema.PATIENT,
    schema.CASE,
    schema.SLIDE,
    schema.MAGNIFICATION,
    schema.MPP,
)
_CONTENT = (schema.SIZE_BYTES, schema.SHA256)
# Fewer patients of a class than this say little of all others: people are warned.
FEW_PATIENTS = 3
_ROUNDING = 1e-6
_RESTS_ON_THEM = {
    TRAIN: "what the model learns of this class rests",
    VALIDATION: "the best epoch, the threshold and the temperature rest",
    TEST: "its numbers for this class rest",
}

# What must stand on one side only. Patient is named under "case" too, because a manifest may give one
# patient several cases; a picture that stands twice is never shared, under any protocol.
_KEYS: Mapping[Protocol, tuple[str, ...]] = {
    "case": (schema.CASE, schema.PATIENT, schema.SLIDE, schema.SHA256),
    "patient": (schema.PATIENT, schema.SLIDE, schema.SHA256),
    "official": (schema.PATIENT, schema.SLIDE, schema.SHA256),
    "image": (schema.SHA256,),
}


class Quarantine(NamedTuple):
    """Rows to use, rows set aside (both in their old order), and one sentence per reason."""

    kept: pa.Table
    aside: pa.Table
    reasons: list[str]


def quarantine(table: pa.Table) -> Quarantine:
    """Set aside what would teach or test a falsehood.

    Three rules: a slide that stands under several subtypes goes, with all its images; a picture (equal
    `sha256`) that stands under several patients or labels goes, with all its copies; of a picture that stands
    several times under one patient and label, the first copy by `image_id` stays. A null hash says nothing.
    """
    rows = sorted(table.to_pylist(), key=lambda row: row[schema.IMAGE_ID])
    aside: set[str] = set()
    reasons: list[str] = []
    for slide, images in _by(rows, schema.SLIDE).items():
        subtypes = sorted({row[schema.SUBTYPE] for row in images} - {None})
        if len(subtypes) > 1:
            aside.update(_ids(images))
            reasons.append(
                f"slide {slide} stands as {' and '.join(subtypes)}: all {len(images)} images set aside"
            )
    for copies in _by(rows, schema.SHA256).values():
        remaining = [name for name in _ids(copies) if name not in aside]
        labels = {(row[schema.PATIENT], row[schema.TUMOR_CLASS], row[schema.SUBTYPE]) for row in copies}
        if remaining and len(labels) > 1:
            aside.update(remaining)
            reasons.append(
                f"one picture under several patients or labels, all set aside: {_some(_ids(copies))}"
            )
        elif len(remaining) > 1:
            aside.update(remaining[1:])
            reasons.append(
                f"one picture several times, kept as {remaining[0]}: set aside {_some(remaining[1:])}"
            )
    is_aside = pc.is_in(table[schema.IMAGE_ID], pa.array(sorted(aside), pa.string()))
    return Quarantine(table.filter(pc.invert(is_aside)), table.filter(is_aside), reasons)


def assign(
    table: pa.Table,
    protocol: Protocol,
    seed: int,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.20,
    fold: Mapping[str, str] | None = None,
) -> pa.Table:
    """Give every row its part: `train`, `validation` or `test`.

    Groups are never divided, and subtypes (tumour classes where there are none) are spread as evenly as the
    groups allow. Both tumour classes stand in every part.

    Args:
        table: rows with schema `schema.INDEX`.
        protocol: what makes a group; `official` takes the test part from `fold`.
        seed: chooses one of the many good splits.
        validation_fraction: share of the images; under `official`, of the fold's training images.
        test_fraction: share of the images; not used under `official`.
        fold: role by file name, from `breakhis.read_fold`.

    Returns:
        The table with schema `schema.SPLIT`, rows in their old order.

    Raises:
        ConfigError: the fractions leave a part empty, or the fold is missing.
        DataError: a class has too few groups, a row no patient or class, or an image no place in the fold.
    """
    held_out = {VALIDATION: validation_fraction}
    if protocol != "official":
        held_out[TEST] = test_fraction
    if min(held_out.values()) <= 0 or sum(held_out.values()) >= 1:
        fractions = " and ".join(f"{part} {fraction}" for part, fraction in held_out.items())
        raise ConfigError(f"{fractions}: expected fractions above 0 that leave something to train on")
    rows, order = _ordered(table)
    if protocol == "official":
        parts = _official(rows, seed, held_out, fold)
    else:
        parts = _partition(rows, protocol, seed, held_out)
    return _with_parts(table, order, parts)


def assign_fold(
    table: pa.Table, protocol: Protocol, seed: int, k: int, fold: int, validation_fraction: float = 0.15
) -> pa.Table:
    """Give every row its part in one of k folds; over all folds each row is tested once.

    Args:
        table: rows with schema `schema.INDEX`.
        protocol: what makes a group; not `official`, whose folds are given.
        seed: chooses one of the many good divisions, the same for every fold.
        k: number of folds, at least 2.
        fold: 1 to k, the one to test on.
        validation_fraction: share of all images, taken from those that are not tested on.

    Returns:
        The table with schema `schema.SPLIT`, rows in their old order. A class with fewer groups than folds is
        missing from some test parts, never from training or validation.

    Raises:
        ConfigError: the fraction leaves nothing to train on.
        DataError: there are fewer groups than folds, too few of a class, or a row has no patient or class.
    """
    share = validation_fraction * k / (k - 1)
    if not 0 < share < 1:
        raise ConfigError(
            f"validation fraction {validation_fraction} leaves nothing to train on in {k} folds"
        )
    rows, order = _ordered(table)
    groups, sizes = _groups(rows, protocol)
    if len(sizes) < k:
        raise DataError(f"{len(sizes)} groups by {protocol} cannot make {k} folds; lower --k")
    patients = stratify.patient_counts(rows, groups)
    tested = stratify.divide(sizes, patients, np.full(k, 1 / k), [1] * k, seed)[groups] == fold - 1
    parts = np.full(len(rows), TEST, dtype=object)
    parts[~tested] = _partition(rows.filter(pa.array(~tested)), protocol, seed, {VALIDATION: share})
    return _with_parts(table, order, parts)


def keep(table: pa.Table, protocol: Protocol, seed: int, validation_fraction: float = 0.15) -> pa.Table:
    """Leave every row in the part that it came with.

    Where none came as validation, that part is taken out of the training part, by groups.

    Args:
        table: rows with the columns of `schema.SPLIT`.
        protocol: what makes a group of the training rows.
        seed: chooses the validation part, where there is none.
        validation_fraction: share of the training images, where there is no validation part.

    Returns:
        The table with schema `schema.SPLIT`, rows in their old order.

    Raises:
        DataError: a row has no part or no patient, or a part lacks a class.
        LeakageError: a group or a picture stands in several of the given parts.
    """
    is_known = pc.is_in(table[schema.PART], pa.array(PARTS))
    _require(table, is_known, f"no {schema.PART}; expected {', '.join(PARTS)} for every image, or for none")
    rows, order = _ordered(table)
    _require_patients(rows, protocol)  # without them nobody knows whether the parts leak
    if leaks := crossings_forbidden(rows, protocol):
        raise LeakageError(
            f"the parts that the data come with leak: {_some(leaks, 3, '; ')}. Put every patient into one "
            "part, or give the data undivided"
        )
    parts = np.array(rows[schema.PART].to_pylist(), dtype=object)
    if VALIDATION not in parts:
        training = parts == TRAIN
        chosen = rows.filter(pa.array(training))
        parts[training] = _partition(chosen, protocol, seed, {VALIDATION: validation_fraction})
    classes = rows[schema.TUMOR_CLASS].to_numpy(zero_copy_only=False)
    for part in PARTS:
        if absent := set(TUMOR_CLASSES) - set(classes[parts == part]):
            raise DataError(f"the given part {part} has no {min(absent)} image; expected both classes in it")
    return _with_parts(table.drop_columns(schema.PART), order, parts)


def share_warnings(table: pa.Table, wanted: Mapping[str, float] | None = None) -> list[str]:
    """A sentence for each part and class of which the part has less than half of its share, of the images or
    of the patients, or fewer than `FEW_PATIENTS` patients.

    Args:
        table: rows with schema `schema.SPLIT`.
        wanted: share of the images that each part should have; by default that which it has.
    """
    groups: dict[tuple[str, str], list[str | None]] = defaultdict(list)
    for name in TUMOR_CLASSES:
        of_class = table.filter(pc.equal(table[schema.TUMOR_CLASS], name)).select(
            [schema.PART, schema.PATIENT]
        )
        for part, patient in zip(*(column.to_pylist() for column in of_class), strict=True):
            groups[part, name].append(patient)
    shares = wanted or {part: pc.mean(pc.equal(table[schema.PART], part)).as_py() for part in PARTS}
    sentences = []
    for part, name in itertools.product(PARTS, TUMOR_CLASSES):
        every = [patient for (_, other), rows in groups.items() if other == name for patient in rows]
        sentences += _share_warning(part, name, groups[part, name], every, shares[part])
    return sentences


def _share_warning(
    part: str, tumor_class: str, here: Sequence[str | None], every: Sequence[str | None], share: float
) -> list[str]:
    """What is wrong with a part's share of a class: at most one sentence, from the patient of every image."""
    counts = [("images", len(here), len(every))]
    if None not in every:
        counts.append(("patients", len(set(here)), len(set(every))))
    has = " and ".join(f"{n:,} of {total:,} {what}" for what, n, total in counts)
    said = f"the {part} part has {has} of class {tumor_class}"
    is_short = any(2 * n < share * total - _ROUNDING for _, n, total in counts)
    is_few = None not in every and len(set(here)) < FEW_PATIENTS
    if is_short:
        said += f", less than half of its share of {100 * share:.0f} %"
    if is_few:
        said += f"; {_RESTS_ON_THEM[part]} on so few patients"
    return [said] if is_short or is_few else []


def crossings_forbidden(table: pa.Table, protocol: Protocol = "patient") -> list[str]:
    """Every case, patient, slide or picture that crosses although the protocol forbids it, as sentences."""
    return [sentence for _, sentence in crossings(table, _KEYS[protocol])]


def crossings(table: pa.Table, keys: Iterable[str]) -> list[tuple[str, str]]:
    """Name and sentence of every value of the columns `keys` that stands in more than one part."""
    sides: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in sorted(table.to_pylist(), key=lambda row: row[schema.IMAGE_ID]):
        for column in keys:
            if row[column] is not None and row[schema.PART] in PARTS:
                side = sides.setdefault((column, row[column]), {})
                side.setdefault(row[schema.PART], []).append(row[schema.IMAGE_ID])
    # A BreaKHis patient is a slide and often a case: one sentence for the three.
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (column, name), parts in sides.items():
        if len(parts) > 1:
            where = " and in ".join(f"{part} (as {_some(parts[part], 1)})" for part in PARTS if part in parts)
            kinds[name, where].append(column)
    return [(name, f"{', '.join(on)} {name} stands in {where}") for (name, where), on in kinds.items()]


def require_no_leak(table: pa.Table, protocol: Protocol) -> None:
    """Raise `LeakageError`, naming what crosses and between which parts, unless the split is disjoint."""
    if crossings := crossings_forbidden(table, protocol):
        raise LeakageError(f"the split by {protocol} leaks: {_some(crossings, 3, '; ')}")


def changes(before: pa.Table, now: pa.Table) -> list[str]:
    """What of a data set is no longer as it was, as sentences.

    Args:
        before: rows with schema `schema.SPLIT`.
        now: rows with the columns of `schema.INDEX`, and with `part` where it must be the same, too.
    """
    old, new = ({row[schema.IMAGE_ID]: row for row in table.to_pylist()} for table in (before, now))
    patients = [{row[schema.PATIENT] for row in rows.values()} - {None} for rows in (old, new)]
    said = []
    for names, who, verb in (
        (old.keys() - new.keys(), patients[0] - patients[1], "gone"),
        (new.keys() - old.keys(), patients[1] - patients[0], "new"),
    ):
        if names:
            whole = f", and with them patient {_some(sorted(who), 3)}" if who else ""
            said.append(f"{_images(len(names))} {verb} ({_some(sorted(names), 3)}){whole}")
    both = sorted(old.keys() & new.keys())
    if other := [name for name in both if any(old[name][key] != new[name][key] for key in _CONTENT)]:
        said.append(f"other content in {_images(len(other))} ({_some(other, 3)})")
    has_parts = schema.PART in now.column_names
    if has_parts and VALIDATION not in now[schema.PART].to_pylist():
        # That part was then taken out of the training part.
        old = {
            name: row | {schema.PART: TEST if row[schema.PART] == TEST else TRAIN}
            for name, row in old.items()
        }
    for column in (*_SAID, schema.PART) if has_parts else _SAID:
        if other := [name for name in both if old[name][column] != new[name][column]]:
            was, is_now = old[other[0]][column], new[other[0]][column]
            said.append(f"another {column} of {_images(len(other))} ({other[0]}: {was} -> {is_now})")
    return said


def _images(n: int) -> str:
    return f"{n:,} image{'' if n == 1 else 's'}"


def fingerprint(table: pa.Table) -> str:
    """SHA-256 (hex) of a split: which image stands in which part, whatever the order of rows."""
    return _digest(table, (schema.IMAGE_ID, schema.PART))


def data_fingerprint(table: pa.Table) -> str:
    """SHA-256 (hex) of a data set: image ids, sizes in bytes and labels, whatever the order of rows."""
    return _digest(table, (schema.IMAGE_ID, schema.SIZE_BYTES, schema.TUMOR_CLASS, schema.SUBTYPE))


def _digest(table: pa.Table, columns: Sequence[str]) -> str:
    rows = zip(*(table[column].to_pylist() for column in columns), strict=True)
    return hashlib.sha256(json.dumps(sorted(rows, key=lambda row: row[0])).encode()).hexdigest()


def _by(rows: Iterable[dict[str, Any]], column: str) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row[column] is not None:
            groups[row[column]].append(row)
    return groups


def _ids(rows: Iterable[dict[str, Any]]) -> list[str]:
    return [row[schema.IMAGE_ID] for row in rows]


def _some(names: Sequence[str], limit: int = 5, separator: str = ", ") -> str:
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more


def _require(rows: pa.Table, fulfilled: pa.ChunkedArray, otherwise: str) -> None:
    """Raise `DataError` that names the rows where a condition does not hold."""
    if lacking := rows.filter(pc.invert(fulfilled))[schema.IMAGE_ID].to_pylist():
        raise DataError(f"{_some(lacking)}: {otherwise}")


def _ordered(table: pa.Table) -> tuple[pa.Table, Integers]:
    """Rows sorted by id, and where each of them stood."""
    order = pc.sort_indices(table[schema.IMAGE_ID]).to_numpy()
    rows = table.take(order)
    is_known = pc.is_in(rows[schema.TUMOR_CLASS], pa.array(TUMOR_CLASSES))
    _require(rows, is_known, f"no {schema.TUMOR_CLASS}; expected {' or '.join(TUMOR_CLASSES)}")
    return rows, order


def _with_parts(table: pa.Table, order: Integers, parts: NDArray[np.object_]) -> pa.Table:
    unsorted = np.empty_like(parts)
    unsorted[order] = parts
    return table.append_column(schema.SPLIT.field(schema.PART), pa.array(unsorted, pa.string()))


def _official(
    rows: pa.Table, seed: int, held_out: Mapping[str, float], fold: Mapping[str, str] | None
) -> NDArray[np.object_]:
    """Parts by the published roles; the training images are divided once more, by case."""
    if fold is None:
        raise ConfigError("protocol official needs one of the published folds")
    names = [breakhis.published(name) for name in rows[schema.IMAGE_ID].to_pylist()]
    if strangers := [name for name in names if name not in fold]:
        raise DataError(f"{len(strangers):,} images are not in the official fold: {_some(strangers)}")
    is_test = np.array([fold[name] == TEST for name in names])
    test_classes = set(rows.filter(pa.array(is_test))[schema.TUMOR_CLASS].to_pylist())
    if absent := [name for name in TUMOR_CLASSES if name not in test_classes]:
        raise DataError(f"the fold's test part has no {absent[0]} image here; expected both classes")
    parts = np.full(len(names), TEST, dtype=object)
    training = rows.filter(pa.array(~is_test))
    parts[~is_test] = _partition(training, "case", seed, held_out)
    return parts


def _partition(
    rows: pa.Table, protocol: Protocol, seed: int, held_out: Mapping[str, float]
) -> NDArray[np.object_]:
    """Part of every row: `train`, or one of those held out, given with their shares."""
    parts = [TRAIN, *held_out]
    groups, sizes = _groups(rows, protocol)
    unit = schema.PATIENT if protocol == "case" and not rows[schema.CASE].drop_null() else protocol
    of_class = np.count_nonzero(sizes[:, stratify.CLASSES], axis=0)
    for tumor_class, n in zip(TUMOR_CLASSES, of_class, strict=True):
        if n < len(parts):
            needs = f"{', '.join(parts[:-1])} and {parts[-1]} need at least {len(parts)}"
            raise DataError(f"class {tumor_class} has {n} {unit}{'' if n == 1 else 's'}; {needs}")
    shares = np.array([1 - sum(held_out.values()), *held_out.values()])
    # Training should miss no stratum; validation may, rather than the test.
    wanted = [2, 0, 1][: len(parts)]
    divided = stratify.divide(sizes, stratify.patient_counts(rows, groups), shares, wanted, seed)
    return np.array(parts, dtype=object)[divided[groups]]


def _groups(rows: pa.Table, protocol: Protocol) -> tuple[Integers, Integers]:
    """Group of every row, and the groups' sizes as in `division.sizes`."""
    _require_patients(rows, protocol)
    groups = _connected(rows, _KEYS[protocol])
    return groups, stratify.image_counts(rows, groups)


def _require_patients(rows: pa.Table, protocol: Protocol) -> None:
    if protocol != "image":
        needs = f"protocol {protocol} needs the column {schema.PATIENT} (protocol image does not, but leaks)"
        _require(rows, pc.is_valid(rows[schema.PATIENT]), f"no {schema.PATIENT}; {needs}")


def _connected(rows: pa.Table, columns: Iterable[str]) -> Integers:
    """Number of every row's group: an equal value in any of the columns connects, a null does not."""
    label = np.arange(rows.num_rows)
    codes = [stratify.number_values(rows[column]) for column in columns]
    settled = False
    while not settled:
        before = label.copy()
        for code in codes:
            # The last place, -1, collects the nulls: where there are any, no value has that number.
            smallest = np.full(rows.num_rows, rows.num_rows)
            np.minimum.at(smallest, code, label)
            label = np.where(code < 0, label, smallest[code])
        settled = bool((label == before).all())
    return np.unique(label, return_inverse=True)[1]
