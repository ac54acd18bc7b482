"""Who trains and who tests: group-disjoint, stratified, seeded splits, and the proof that nothing leaks.

The usual order is `quarantine` -> `assign` -> `check`. A split depends on the seed and on what the rows say:
not on their order, the platform or the version of NumPy (raw PCG64 words and integers).
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bcd import schema
from bcd.errors import ConfigError, DataError, LeakageError
from bcd.taxonomy import TUMOR_CLASSES

Protocol = Literal["case", "patient", "official", "image"]
Integers = NDArray[np.int64]

TRAIN, VALIDATION, TEST = PARTS = ("train", "validation", "test")
# Protocols that put images of one patient on both sides: their numbers are marked wherever they appear.
LEAKY = frozenset({"image"})

# What must stand on one side only. Patient is named under "case" too, because a manifest may give one
# patient several cases; a picture that stands twice is never shared, under any protocol.
_KEYS: Mapping[Protocol, tuple[str, ...]] = {
    "case": (schema.CASE, schema.PATIENT, schema.SLIDE, schema.SHA256),
    "patient": (schema.PATIENT, schema.SLIDE, schema.SHA256),
    "official": (schema.PATIENT, schema.SLIDE, schema.SHA256),
    "image": (schema.SHA256,),
}

# A fair split: subtypes take shares of every part that are within 5 points of their shares in the whole,
# and parts are within 10 % of the wanted size.
_SHARE, _SIZE = 0.05, 0.10
# Effort of one split: local searches from nothing, rounds of each, and a bound on the groups looked at. The
# first searches insist on a fair split; where the groups allow none, each later one is content with less.
_SEARCHES, _STRICT, _ROUNDS, _WORK = 8, 4, 100, 60_000
# Columns of the table of group sizes: images of each tumour class, of all, and of each stratum.
_CLASSES, _ALL, _STRATA = slice(0, 2), 2, slice(3, None)


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
    order = pc.sort_indices(table[schema.IMAGE_ID]).to_numpy()
    rows = table.take(order)
    is_known = pc.is_in(rows[schema.TUMOR_CLASS], pa.array(TUMOR_CLASSES))
    _require(rows, is_known, f"no {schema.TUMOR_CLASS}; expected {' or '.join(TUMOR_CLASSES)}")
    if protocol == "official":
        parts = _official(rows, seed, held_out, fold)
    else:
        parts = _partition(rows, protocol, seed, held_out)
    unsorted = np.empty_like(parts)
    unsorted[order] = parts
    return table.append_column(schema.SPLIT.field(schema.PART), pa.array(unsorted, pa.string()))


def audit(table: pa.Table, protocol: Protocol = "patient") -> list[str]:
    """Every case, patient, slide or picture that crosses although the protocol forbids it, as sentences."""
    sides: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in sorted(table.to_pylist(), key=lambda row: row[schema.IMAGE_ID]):
        for column in _KEYS[protocol]:
            if row[column] is not None and row[schema.PART] in PARTS:
                side = sides.setdefault((column, row[column]), {})
                side.setdefault(row[schema.PART], []).append(row[schema.IMAGE_ID])
    # A BreaKHis patient is a slide and often a case: one sentence for the three.
    kinds: dict[str, list[str]] = defaultdict(list)
    for (column, name), parts in sides.items():
        if len(parts) > 1:
            where = " and in ".join(f"{part} (as {_some(parts[part], 1)})" for part in PARTS if part in parts)
            kinds[f"{name} stands in {where}"].append(column)
    return [f"{', '.join(columns)} {sentence}" for sentence, columns in kinds.items()]


def check(table: pa.Table, protocol: Protocol) -> None:
    """Raise `LeakageError`, naming what crosses and between which parts, unless the split is disjoint."""
    if crossings := audit(table, protocol):
        raise LeakageError(f"the split by {protocol} leaks: {_some(crossings, 3, '; ')}")


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


def _official(
    rows: pa.Table, seed: int, held_out: Mapping[str, float], fold: Mapping[str, str] | None
) -> NDArray[np.object_]:
    """Parts by the published roles; the training images are divided once more, by case."""
    if fold is None:
        raise ConfigError("protocol official needs one of the published folds")
    names = [name.rpartition("/")[2] for name in rows[schema.IMAGE_ID].to_pylist()]
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
    if protocol != "image":
        needs = f"protocol {protocol} needs the column {schema.PATIENT} (protocol image does not, but leaks)"
        _require(rows, pc.is_valid(rows[schema.PATIENT]), f"no {schema.PATIENT}; {needs}")
    parts = [TRAIN, *held_out]
    groups = _connected(rows, _KEYS[protocol])
    sizes = _sizes(rows, groups)
    unit = schema.PATIENT if protocol == "case" and not rows[schema.CASE].drop_null() else protocol
    for tumor_class, n in zip(TUMOR_CLASSES, np.count_nonzero(sizes[:, _CLASSES], axis=0), strict=True):
        if n < len(parts):
            needs = f"{', '.join(parts[:-1])} and {parts[-1]} need at least {len(parts)}"
            raise DataError(f"class {tumor_class} has {n} {unit}{'' if n == 1 else 's'}; {needs}")
    shares = np.array([1 - sum(held_out.values()), *held_out.values()])
    return np.array(parts, dtype=object)[_divide(sizes, shares, seed)[groups]]


def _connected(rows: pa.Table, columns: Iterable[str]) -> Integers:
    """Number of every row's group: an equal value in any of the columns connects, a null does not."""
    label = np.arange(rows.num_rows)
    codes = [_codes(rows[column]) for column in columns]
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


def _codes(column: pa.ChunkedArray) -> Integers:
    """Number of every value, in order of appearance; -1 for null."""
    indices = column.combine_chunks().dictionary_encode().indices
    return indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def _sizes(rows: pa.Table, groups: Integers) -> Integers:
    """Images of every group (rows): of each tumour class, of all, and of each stratum (columns)."""
    classes = pc.index_in(rows[schema.TUMOR_CLASS], pa.array(TUMOR_CLASSES)).to_numpy()
    strata = _codes(pc.coalesce(rows[schema.SUBTYPE], rows[schema.TUMOR_CLASS]))
    n_groups, n_strata = groups.max(initial=-1) + 1, strata.max(initial=-1) + 1
    sizes = np.zeros((n_groups, _STRATA.start + n_strata), dtype=np.int64)
    sizes[:, _ALL] = np.bincount(groups, minlength=n_groups)
    np.add.at(sizes, (groups, classes), 1)
    np.add.at(sizes, (groups, _STRATA.start + strata), 1)
    return sizes


def _divide(sizes: Integers, shares: NDArray[np.float64], seed: int) -> Integers:
    """Part of every group: a random fair division, found by local search.

    The best division would be the same for every seed, so the first that is fair is taken. A round takes a
    random quarter of the groups out, puts them back one by one where they fit best, moves single groups while
    that helps, and goes on from the result if it is no worse.

    Args:
        sizes: (groups, columns) from `_sizes`.
        shares: (parts,) wanted share of the images; the first part is for training.
        seed: of raw PCG64 words, which NumPy promises never to change, unlike `Generator` methods.
    """
    n = len(sizes)
    rounds = int(np.clip(_WORK // n, 1, _SEARCHES * _ROUNDS))
    words = np.random.PCG64(seed).random_raw(rounds * n).reshape(rounds, n) >> np.uint64(40)
    results: list[_Division] = []
    for number, word in enumerate(words.astype(np.int64)):
        fresh = number % _ROUNDS == 0
        part = np.full(n, -1) if fresh else results[-1].part.copy()
        out = np.arange(n) if fresh else np.argsort(word, kind="stable")[: max(2, n // 4)]
        part[out] = -1
        trial = _Division(sizes, shares, part)
        # Roughly the large before the small, which then even out what the large leave.
        trial.fill(out[np.argsort(-word[out] * sizes[out, _ALL], kind="stable")])
        trial.settle()
        if fresh:
            results.append(trial)
        elif trial.measure() <= results[-1].measure():
            results[-1] = trial
        if trial.is_fair(slack=max(1, len(results) - _STRICT + 1)):
            return trial.part
    return min(results, key=_Division.measure).part


class _Division:
    """Groups on their way into parts, and what it costs to add or to move one.

    Absence comes before all else: it counts the classes missing from a part and, far behind, the strata
    missing from training, and behind those the strata missing from the test (the third part). Unevenness
    is the squared distance to the wanted number of images, in units of the part's wanted size, summed over
    parts, classes, strata and the whole. Integers only: no rounding that tips a tie one way here and
    another way there (exact up to some 10 million rows).
    """

    def __init__(self, sizes: Integers, shares: NDArray[np.float64], part: Integers) -> None:
        """Start from the part of every group, -1 for those still out; arguments as in `_divide`."""
        inside = (part == np.arange(len(shares))[:, None]).astype(np.int64)
        self.sizes, self.part = sizes, part
        self.holds = (sizes > 0).astype(np.int64)
        self.target = np.rint(np.outer(shares, sizes.sum(axis=0))).astype(np.int64)
        self.excess = inside @ sizes - self.target
        self.holders = inside @ self.holds
        self.weight = np.rint(1 / (shares * shares)).astype(np.int64)
        self.must = np.zeros_like(self.excess)
        self.must[:, _CLASSES] = 3 * sizes.shape[1]
        self.must[0, _STRATA], self.must[2:, _STRATA] = 2, 1

    def measure(self) -> tuple[int, int]:
        """Absence, and the unevenness by fourth powers: one stratum far off is worse than all a little."""
        squares = (self.excess**2 * self.weight[:, None]).astype(object)
        return self._absence(), (squares**2).sum()

    def is_fair(self, slack: int) -> bool:
        """Nothing is absent that need not be, and all is within slack times the tolerances.

        A stratum of a single group can only be trained on; one with fewer groups than parts keeps no share.
        """
        groups = self.holds.sum(axis=0)
        if self._absence() > np.count_nonzero(groups[_STRATA] == 1):
            return False
        images, total = self.target + self.excess, self.sizes.sum(axis=0)
        shares = np.abs(images / images[:, [_ALL]] - total / total[_ALL])
        sizes = np.abs(self.excess[:, _ALL]) / np.maximum(self.target[:, _ALL], 1)
        within = shares[:, groups >= len(images)].max() <= slack * _SHARE
        return bool(within and sizes.max() <= slack * _SIZE)

    def fill(self, order: Integers) -> None:
        """Put groups where they fit best, in the given order."""
        for group in order:
            absence, unevenness = self._adding(slice(group, group + 1))
            self._put(group, int(np.lexsort((unevenness[0], absence[0]))[0]))

    def settle(self) -> None:
        """Move the one group whose move helps most, until none helps by a tenth of a point, squared.

        Afterwards each class with as many groups as parts stands in every part: if it lacked one, some part
        would have two groups of it, and of those one can go without taking the other class along for good.
        """
        worthwhile = -(int(self.sizes[:, _ALL].sum()) ** 2) // 10**6
        while True:
            absence, unevenness = self._moving()
            best = absence.min()
            candidates = np.where(absence == best, unevenness, np.iinfo(np.int64).max)
            group, part = np.unravel_index(candidates.argmin(), candidates.shape)
            if best == 0 and candidates[group, part] >= worthwhile:
                return
            self._put(int(group), int(part))

    def _absence(self) -> int:
        return int(self.must[self.holders == 0].sum())

    def _adding(self, groups: slice) -> tuple[Integers, Integers]:
        """Change of absence and unevenness, each (groups, parts), by adding one group to a part."""
        x = self.sizes[groups]
        absence = -(self.holds[groups] @ (self.must * (self.holders == 0)).T)
        return absence, (2 * x @ self.excess.T + (x * x).sum(axis=1, keepdims=True)) * self.weight

    def _moving(self) -> tuple[Integers, Integers]:
        """Change of absence and unevenness, each (groups, parts), by moving one group to a part."""
        x, part, everyone = self.sizes, self.part, np.arange(len(self.sizes))
        absence, unevenness = self._adding(slice(None))
        leaves = (self.holds * (self.must * (self.holders == 1))[part]).sum(axis=1)
        relieves = (x * (x - 2 * self.excess[part])).sum(axis=1) * self.weight[part]
        absence += leaves[:, None]
        unevenness += relieves[:, None]
        absence[everyone, part] = unevenness[everyone, part] = 0
        return absence, unevenness

    def _put(self, group: int, part: int) -> None:
        old = self.part[group]
        if old >= 0:
            self.excess[old] -= self.sizes[group]
            self.holders[old] -= self.holds[group]
        self.excess[part] += self.sizes[group]
        self.holders[part] += self.holds[group]
        self.part[group] = part
