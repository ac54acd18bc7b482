"""Group-disjoint, stratified, seeded splits, and the check that nothing leaks.

The usual order is `quarantine.apply_rules` -> `assign` -> `require_no_leak`. A split depends on the seed and
the content of the rows: not on their order, the platform or the version of NumPy (raw PCG64 words and
integers).
"""

import hashlib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bcd import schema
from bcd.config.options import Protocol
from bcd.data import breakhis
from bcd.errors import ConfigError, DataError, LeakageError
from bcd.metrics import decision
from bcd.split import stratify
from bcd.split.stratify import Integers
from bcd.taxonomy import LEFT_OUT, PARTS, TEST, TRAIN, TUMOR_CLASSES, VALIDATION
from bcd.text import counted, some

# Protocols that put images of one patient into several parts: their numbers are always marked.
LEAKY = frozenset({"image"})
# Metadata of an image, and what identifies its content.
_METADATA = (
    *(schema.TUMOR_CLASS, schema.SUBTYPE, schema.PATIENT, schema.CASE, schema.SLIDE),
    *(schema.MAGNIFICATION, schema.MPP),
)
_CONTENT = (schema.SIZE_BYTES, schema.SHA256)
# A part with fewer patients of a class gets a warning.
FEW_PATIENTS = {TRAIN: 3, VALIDATION: decision.MIN_CHOOSING, TEST: 3}
_ROUNDING = 1e-6
_DEPENDS_ON_THEM = {
    TRAIN: "what the model learns of this class depends",
    VALIDATION: "these are too few for a threshold and a temperature, and the best epoch depends",
    TEST: "its numbers for this class depend",
}

# What must be in one part only. "case" includes the patient, because a manifest may give one patient several
# cases; duplicates are never divided, under any protocol.
_BY_CASE = (schema.CASE, schema.PATIENT, schema.SLIDE, schema.SHA256)
_KEYS: Mapping[Protocol, tuple[str, ...]] = {
    "case": _BY_CASE,
    "magnification": _BY_CASE,
    "site": _BY_CASE,
    "patient": (schema.PATIENT, schema.SLIDE, schema.SHA256),
    "official": (schema.PATIENT, schema.SLIDE, schema.SHA256),
    "image": (schema.SHA256,),
}


def assign(
    table: pa.Table,
    protocol: Protocol,
    seed: int,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.20,
    fold: Mapping[str, str] | None = None,
) -> pa.Table:
    """Assign every row of an index to a part (schema `schema.SPLIT`, rows in their old order).

    Groups are never divided, subtypes (tumour classes where there are none) are spread as evenly as the
    groups allow, and every part has both tumour classes.

    Args:
        table: rows with schema `schema.INDEX`.
        protocol: defines the groups; `official` takes the test part from `fold`.
        seed: selects one of many equally good splits.
        validation_fraction: share of the images; under `official`, of the fold's training images.
        test_fraction: share of the images; not used under `official`.
        fold: role by file name, from `breakhis.read_fold`.

    Raises:
        ConfigError: the fractions leave a part empty, or the fold is missing.
        DataError: a class has too few groups, a row no patient or class, or the fold lacks an image.
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
    """`assign` for one of k folds; over all folds each row is tested once.

    A class with fewer groups than folds is missing from some test parts, never from training or validation.

    Args:
        table: rows with schema `schema.INDEX`.
        protocol: defines the groups; not `official`, whose folds are given.
        seed: selects one of many equally good divisions, the same for every fold.
        k: number of folds, at least 2.
        fold: the one to test on, 1 to k.
        validation_fraction: share of all images, taken from those that are not tested on.

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
    tested = _tested(rows, seed, _groups(rows, protocol), (k, fold), f"by {protocol}")
    parts = np.full(len(rows), TEST, dtype=object)
    parts[~tested] = _partition(rows.filter(pa.array(~tested)), protocol, seed, {VALIDATION: share})
    return _with_parts(table, order, parts)


def hold_out(
    table: pa.Table,
    protocol: Protocol,
    seed: int,
    held_out: str,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.20,
    folds: tuple[int, int] | None = None,
) -> pa.Table:
    """Test on one magnification or site, and train on the others and on other patients.

    The test part has images of the value `held_out` only, training and validation only others. No case or
    patient is in two parts: held-out images of patients who are not tested, and others of those who are, are
    in no part (`LEFT_OUT`). A site is tested whole; of a magnification, a share of its cases.

    Args:
        table: rows with schema `schema.INDEX`.
        protocol: `magnification` or `site`.
        seed: selects one of many equally good divisions, the same for every fold.
        held_out: the magnification or site, as text.
        validation_fraction: share of the images that are neither tested on nor left out.
        test_fraction: share of the images of the held-out magnification; not used with `folds`.
        folds: their number, and the one to test on, counted from 1; over all of them each image of the
            held-out magnification is tested once.

    Raises `DataError` if a row has no patient, class or value, none has the one to hold out, a patient is at
    several sites, or there are too few groups.
    """
    rows, order = _ordered(table)
    _require_patients(rows, protocol)
    if held_out not in (known := values_of(rows, protocol)):
        raise DataError(f"no image has the {protocol} {held_out}; there are {', '.join(known)}")
    groups, is_held = _groups(rows, "case"), _has(rows, protocol, held_out)
    tested = is_held.copy()
    if protocol == "site":
        _require_one_site(rows, groups)
    elif folds:
        tested[is_held] = _tested(rows, seed, groups, folds, f"of magnification {held_out}", is_held)
    else:
        tested[is_held] = _drawn(rows, seed, groups, {TEST: test_fraction}, used=is_held) == TEST
    others = ~is_held & ~np.isin(groups, groups[tested])
    parts = np.where(tested, TEST, LEFT_OUT).astype(object)
    parts[others] = _drawn(rows, seed, groups, {VALIDATION: validation_fraction}, used=others)
    return _with_parts(table, order, parts)


def values_of(table: pa.Table, protocol: Protocol) -> list[str]:
    """The magnifications or sites of a data set, as text; raises DataError if an image has none, or all have
    the same."""
    needs = f"no {protocol}; protocol {protocol} needs it of every image"
    if protocol == "site":
        needs += f": give a manifest with the column {schema.SITE}"
    _require(table, pc.is_valid(table[protocol]), needs)  # a protocol and its column have the same name
    values = [str(value) for value in sorted(set(table[protocol].to_pylist()))]
    if len(values) < 2:
        raise DataError(
            f"all images have the {protocol} {', '.join(values)}; expected several, to hold one out"
        )
    return values


def keep(table: pa.Table, protocol: Protocol, seed: int, validation_fraction: float = 0.15) -> pa.Table:
    """Keep the given part of every row (columns of `schema.SPLIT`), rows in their old order.

    Without a validation part, one with the share `validation_fraction` is taken from training, by groups.

    Raises:
        DataError: a row has no part or no patient, or a part lacks a class.
        LeakageError: a group or duplicates are in several of the given parts.
    """
    is_known = pc.is_in(table[schema.PART], pa.array(PARTS))
    _require(table, is_known, f"no {schema.PART}; expected {', '.join(PARTS)} for every image, or for none")
    rows, order = _ordered(table)
    _require_patients(rows, protocol)  # without them a leak cannot be detected
    if leaks := crossings_forbidden(rows, protocol):
        raise LeakageError(
            f"the given parts leak: {some(leaks, 3, '; ')}. Put every patient into one part, or give the "
            "data without parts"
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
    """A sentence for each part and class with less than half of its share of images or of patients, or with
    fewer than `FEW_PATIENTS` patients; `wanted` is the intended share of each part, by default its actual
    one.
    """
    rows = table.select([schema.PART, schema.TUMOR_CLASS, schema.PATIENT]).to_pandas()
    rows = rows[rows[schema.PART].isin(PARTS)]
    shares = wanted or {part: (rows[schema.PART] == part).mean() for part in PARTS}
    sentences = []
    for part, name in itertools.product(PARTS, TUMOR_CLASSES):
        every = rows[rows[schema.TUMOR_CLASS] == name]
        here = every[every[schema.PART] == part]
        counts = [("images", len(here), len(every))]
        is_few = False
        if every[schema.PATIENT].notna().all():
            counts.append(("patients", *(found[schema.PATIENT].nunique() for found in (here, every))))
            is_few = counts[1][1] < FEW_PATIENTS[part]
        is_short = any(2 * n < shares[part] * total - _ROUNDING for _, n, total in counts)
        if is_short or is_few:
            has = " and ".join(f"{n:,} of {total:,} {what}" for what, n, total in counts)
            share = f", less than half of its share of {100 * shares[part]:.0f} %" if is_short else ""
            few = f"; {_DEPENDS_ON_THEM[part]} on so few patients" if is_few else ""
            sentences.append(f"the {part} part has {has} of class {name}{share}{few}")
    return sentences


def crossings_forbidden(table: pa.Table, protocol: Protocol = "patient") -> list[str]:
    """A sentence for every case, patient, slide or duplicate in several parts against the protocol."""
    return [sentence for _, sentence in crossings(table, _KEYS[protocol])]


def crossings(table: pa.Table, keys: Iterable[str]) -> list[tuple[str, str]]:
    """Name and sentence of every value of the columns `keys` that is in more than one part."""
    images: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(table.to_pylist(), key=lambda row: row[schema.IMAGE_ID]):
        for column in keys:
            if row[column] is not None and row[schema.PART] in PARTS:
                images[column, row[column]][row[schema.PART]].append(row[schema.IMAGE_ID])
    # A BreaKHis patient is a slide and often a case: one sentence for the three.
    columns: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (column, name), parts in images.items():
        if len(parts) > 1:
            where = " and in ".join(f"{part} (as {some(parts[part], 1)})" for part in PARTS if part in parts)
            columns[name, where].append(column)
    return [(name, f"{', '.join(of)} {name} is in {where}") for (name, where), of in columns.items()]


def require_no_leak(table: pa.Table, protocol: Protocol, held_out: str | None = None) -> None:
    """Raise `LeakageError`, naming what is in which parts, unless the split is disjoint.

    The test part must have images of the magnification or site `held_out` only, and the others none.
    """
    leaks = crossings_forbidden(table, protocol)
    if held_out is not None:
        leaks += _misplaced(table, protocol, held_out)
    if leaks:
        raise LeakageError(f"the split by {protocol} leaks: {some(leaks, 3, '; ')}")


def changes(before: pa.Table, now: pa.Table) -> list[str]:
    """Differences between two versions of a data set, as sentences; compares `part` if `now` has one."""
    old, new = ({row[schema.IMAGE_ID]: row for row in table.to_pylist()} for table in (before, now))
    patients = [{row[schema.PATIENT] for row in rows.values()} - {None} for rows in (old, new)]
    said = []
    for names, who, verb in (
        (old.keys() - new.keys(), patients[0] - patients[1], "gone"),
        (new.keys() - old.keys(), patients[1] - patients[0], "new"),
    ):
        if names:
            whole = f", and with them patient {some(sorted(who))}" if who else ""
            said.append(f"{counted(len(names), 'image')} {verb} ({some(sorted(names))}){whole}")
    both = sorted(old.keys() & new.keys())
    if other := [name for name in both if any(old[name][key] != new[name][key] for key in _CONTENT)]:
        said.append(f"other content in {counted(len(other), 'image')} ({some(other)})")
    # Runs of older versions know no sites.
    metadata = (*_METADATA, schema.SITE) if len(before[schema.SITE].drop_null()) else _METADATA
    has_parts = schema.PART in now.column_names
    if has_parts and VALIDATION not in now[schema.PART].to_pylist():
        # The validation part was then taken from the training part.
        for row in old.values():
            row[schema.PART] = TEST if row[schema.PART] == TEST else TRAIN
    for column in (*metadata, schema.PART) if has_parts else metadata:
        if other := [name for name in both if old[name][column] != new[name][column]]:
            was, is_now = old[other[0]][column], new[other[0]][column]
            said.append(f"another {column} of {counted(len(other), 'image')} ({other[0]}: {was} -> {is_now})")
    return said


def fingerprint(table: pa.Table) -> str:
    """SHA-256 (hex) of a split: image ids and parts, independent of the order of rows."""
    return _digest(table, (schema.IMAGE_ID, schema.PART))


def data_fingerprint(table: pa.Table) -> str:
    """SHA-256 (hex) of a data set: image ids, sizes in bytes and labels, independent of the order of rows."""
    return _digest(table, (schema.IMAGE_ID, schema.SIZE_BYTES, schema.TUMOR_CLASS, schema.SUBTYPE))


def _digest(table: pa.Table, columns: Sequence[str]) -> str:
    rows = zip(*(table[column].to_pylist() for column in columns), strict=True)
    return hashlib.sha256(json.dumps(sorted(rows, key=lambda row: row[0])).encode()).hexdigest()


def _require(rows: pa.Table, fulfilled: pa.ChunkedArray, otherwise: str) -> None:
    """Raise `DataError` that names the rows where a condition does not hold."""
    if lacking := rows.filter(pc.invert(fulfilled))[schema.IMAGE_ID].to_pylist():
        raise DataError(f"{some(lacking, 5)}: {otherwise}")


def _ordered(table: pa.Table) -> tuple[pa.Table, Integers]:
    """Rows sorted by id, and the former position of each."""
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
    """Parts by the published roles; the validation part is taken from the training images, by case."""
    if fold is None:
        raise ConfigError("protocol official needs one of the published folds")
    names = [breakhis.published(name) for name in rows[schema.IMAGE_ID].to_pylist()]
    if unknown := [name for name in names if name not in fold]:
        raise DataError(f"{len(unknown):,} images are not in the official fold: {some(unknown, 5)}")
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
    """Part of every row: `train`, or one of the held-out parts, given with their shares."""
    unit = schema.PATIENT if protocol == "case" and not rows[schema.CASE].drop_null() else protocol
    return _drawn(rows, seed, _groups(rows, protocol), held_out, unit)


def _drawn(
    rows: pa.Table,
    seed: int,
    groups: Integers,
    held_out: Mapping[str, float],
    unit: str = schema.PATIENT,
    used: NDArray[np.bool_] | None = None,
) -> NDArray[np.object_]:
    """`_partition` of the rows used by the given groups of all, called `unit` in errors."""
    parts = [TRAIN, *held_out]
    rows, groups = _used(rows, groups, used)
    sizes = stratify.image_counts(rows, groups)
    of_class = np.count_nonzero(sizes[:, stratify.CLASSES], axis=0)
    for tumor_class, n in zip(TUMOR_CLASSES, of_class, strict=True):
        if n < len(parts):
            needs = f"{', '.join(parts[:-1])} and {parts[-1]} need at least {len(parts)}"
            raise DataError(f"class {tumor_class} has {counted(n, unit)}; {needs}")
    shares = np.array([1 - sum(held_out.values()), *held_out.values()])
    # Training should have every stratum; if one is missing, then from validation rather than from test.
    wanted = [2, 0, 1][: len(parts)]
    divided = stratify.divide(sizes, stratify.patient_counts(rows, groups), shares, wanted, seed)
    return np.array(parts, dtype=object)[divided[groups]]


def _used(rows: pa.Table, groups: Integers, used: NDArray[np.bool_] | None) -> tuple[pa.Table, Integers]:
    """The rows used, by default all, and their groups, numbered from 0."""
    if used is None:
        return rows, groups
    return rows.filter(pa.array(used)), np.unique(groups[used], return_inverse=True)[1]


def _tested(
    rows: pa.Table,
    seed: int,
    groups: Integers,
    folds: tuple[int, int],
    which: str,
    used: NDArray[np.bool_] | None = None,
) -> NDArray[np.bool_]:
    """Whether each of the rows used is tested in one of so many folds, given with their number; errors say
    `which` groups these are."""
    k, fold = folds
    rows, groups = _used(rows, groups, used)
    sizes, patients = stratify.image_counts(rows, groups), stratify.patient_counts(rows, groups)
    if len(sizes) < k:
        raise DataError(f"{counted(len(sizes), 'group')} {which} cannot make {k} folds; lower --k")
    is_tested = stratify.divide(sizes, patients, np.full(k, 1 / k), [1] * k, seed)[groups] == fold - 1
    return np.asarray(is_tested)


def _has(rows: pa.Table, protocol: Protocol, value: str) -> NDArray[np.bool_]:
    """Whether each row is of a magnification or site, given as text."""
    return np.array([str(own) == value for own in rows[protocol].to_pylist()], bool)


def _require_one_site(rows: pa.Table, groups: Integers) -> None:
    """Raise `DataError` if a group is at several sites: the same number may be of two people, or of one."""
    sites = rows[schema.SITE].to_pylist()
    first: dict[int, int] = {}
    for row, group in enumerate(groups.tolist()):
        if sites[row] != sites[one := first.setdefault(group, row)]:
            names, who = (rows[key].to_pylist() for key in (schema.IMAGE_ID, schema.PATIENT))
            raise DataError(
                f"{names[one]} (patient {who[one]}) is at site {sites[one]}, and "
                f"{names[row]} (patient {who[row]}) at {sites[row]}, with the same patient, case, slide or "
                f"content: give two people ids of their own, as in {sites[row]}/{who[row]}, and one person "
                "one site"
            )


def _misplaced(parts: pa.Table, protocol: Protocol, held_out: str) -> list[str]:
    """A sentence for each image that the magnification or site held out puts into the wrong part."""
    is_held = _has(parts, protocol, held_out)
    rows = zip(*(parts[key].to_pylist() for key in (schema.IMAGE_ID, schema.PART, protocol)), strict=True)
    return [
        f"{name} of the {protocol} {value} is in {part}, and {held_out} is held out"
        for (name, part, value), held in zip(rows, is_held.tolist(), strict=True)
        if part in PARTS and held != (part == TEST)
    ]


def _groups(rows: pa.Table, protocol: Protocol) -> Integers:
    """Group of every row."""
    _require_patients(rows, protocol)
    return _connected(rows, _KEYS[protocol])


def _require_patients(rows: pa.Table, protocol: Protocol) -> None:
    if protocol != "image":
        needs = f"protocol {protocol} needs the column {schema.PATIENT} (protocol image does not, but leaks)"
        _require(rows, pc.is_valid(rows[schema.PATIENT]), f"no {schema.PATIENT}; {needs}")


def _connected(rows: pa.Table, columns: Iterable[str]) -> Integers:
    """Number of every row's group: rows with an equal value in any of the columns are in one group."""
    label = np.arange(rows.num_rows)
    codes = [stratify.number_values(rows[column]) for column in columns]
    settled = False
    while not settled:
        before = label.copy()
        for code in codes:
            # Nulls, -1, index the last element: if there are any, no value has that number.
            smallest = np.full(rows.num_rows, rows.num_rows)
            np.minimum.at(smallest, code, label)
            label = np.where(code < 0, label, smallest[code])
        settled = bool((label == before).all())
    return np.unique(label, return_inverse=True)[1]
