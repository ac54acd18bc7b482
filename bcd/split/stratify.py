"""Divide groups of images into parts: a random balanced division, found by local search in integers only.

First by images alone. If a part then has less than half of its share of a class, in images or in patients,
again with every class weighted like the whole data set and that shortfall minimised before all imbalance.

A seed gives the same division on every platform and with every version of NumPy (raw PCG64 words).
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from bcd import schema
from bcd.taxonomy import TUMOR_CLASSES

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

# A balanced split: the share of each subtype in every part is within 5 points of that in the whole, and parts
# are within 10 % of the wanted size.
_SHARE, _SIZE = 0.05, 0.10
# Effort of one split: local searches from scratch, rounds of each, and a bound on the groups visited. The
# first searches require a balanced split; if the groups allow none, each later one accepts a little more
# imbalance.
_SEARCHES, _STRICT, _ROUNDS, _WORK = 8, 4, 100, 60_000
# Searches of the second attempt, whose moves cost more.
_MORE = 2
# Columns of the table of group sizes: images of each tumour class, of all, and of each stratum.
CLASSES, _ALL, _STRATA = slice(0, 2), 2, slice(3, None)
# Weight of a missing class or stratum, above any number of images or patients; sums still fit into 64 bits.
_FIRST = 2**40


def number_values(column: pa.ChunkedArray) -> Integers:
    """Code of every value, in order of appearance; -1 for null."""
    indices = column.combine_chunks().dictionary_encode().indices
    return indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)


def image_counts(rows: pa.Table, groups: Integers) -> Integers:
    """Images of every group (rows): of each tumour class, in total, and of each stratum (columns)."""
    classes = pc.index_in(rows[schema.TUMOR_CLASS], pa.array(TUMOR_CLASSES)).to_numpy()
    strata = number_values(pc.coalesce(rows[schema.SUBTYPE], rows[schema.TUMOR_CLASS]))
    n_groups, n_strata = groups.max(initial=-1) + 1, strata.max(initial=-1) + 1
    sizes = np.zeros((n_groups, _STRATA.start + n_strata), dtype=np.int64)
    sizes[:, _ALL] = np.bincount(groups, minlength=n_groups)
    np.add.at(sizes, (groups, classes), 1)
    np.add.at(sizes, (groups, _STRATA.start + strata), 1)
    return sizes


def patient_counts(rows: pa.Table, groups: Integers) -> Integers:
    """Known patients of each tumour class (columns) in every group (rows)."""
    classes = pc.index_in(rows[schema.TUMOR_CLASS], pa.array(TUMOR_CLASSES)).to_numpy()
    who = np.stack([groups, classes, number_values(rows[schema.PATIENT])])
    counts = np.zeros((groups.max(initial=-1) + 1, len(TUMOR_CLASSES)), dtype=np.int64)
    group, tumor_class, _ = np.unique(who[:, who[2] >= 0], axis=1)
    np.add.at(counts, (group, tumor_class), 1)
    return counts


def divide(sizes: Integers, patients: Integers, shares: Floats, wanted: Sequence[int], seed: int) -> Integers:
    """Part of every group: a random division balanced by images and, as far as these allow, in each class.

    Args:
        sizes: (groups, columns) from `image_counts`.
        patients: (groups, classes) from `patient_counts`.
        shares: (parts,) wanted share of the images.
        wanted: (parts,) cost of a missing stratum; a missing class costs more than all strata.
        seed: of raw PCG64 words, which NumPy promises never to change, unlike `Generator` methods.
    """
    by_images = _search(sizes, shares, wanted, seed)
    counts = np.hstack([sizes[:, CLASSES], patients])
    owed = counts * (sizes[:, _ALL].sum() // np.maximum(counts.sum(axis=0), 1))

    def shortfall(part: Integers) -> int:
        return _Division(sizes, shares, wanted, part, owed).shortfall()

    if shortfall(by_images) == 0:
        return by_images
    return min(by_images, _search(sizes, shares, wanted, seed, owed), key=shortfall)


def _search(
    sizes: Integers, shares: Floats, wanted: Sequence[int], seed: int, owed: Integers | None = None
) -> Integers:
    """Part of every group: a random balanced division, found by local search; `owed` as in `_Division`.

    The best division would be the same for every seed, so the first balanced one is returned. A round removes
    a random quarter of the groups, puts them back one by one where they fit best, moves single groups while
    that helps, and keeps the result if it is no worse.
    """
    n = len(sizes)
    rounds = int(np.clip(_WORK // n, 1, (_SEARCHES if owed is None else _MORE) * _ROUNDS))
    words = np.random.PCG64(seed).random_raw(rounds * n).reshape(rounds, n) >> np.uint64(40)
    results: list[_Division] = []
    for number, word in enumerate(words.astype(np.int64)):
        fresh = number % _ROUNDS == 0
        part = np.full(n, -1) if fresh else results[-1].part.copy()
        out = np.arange(n) if fresh else np.argsort(word, kind="stable")[: max(2, n // 4)]
        part[out] = -1
        trial = _Division(sizes, shares, wanted, part, owed)
        # Roughly the large groups first; the small ones then even out the rest.
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
    """A division in progress, and the cost of adding or moving a group.

    Absence is minimised first: missing classes, then missing strata weighted by `wanted`, then the shortfall.
    Unevenness is the squared distance to the wanted number of images, in units of the part's wanted size,
    summed over parts, classes, strata and the whole. Integers only, so that rounding never decides a tie
    (exact up to some 10 million rows).
    """

    def __init__(
        self,
        sizes: Integers,
        shares: Floats,
        wanted: Sequence[int],
        part: Integers,
        owed: Integers | None = None,
    ) -> None:
        """Start from the part of every group, -1 for unassigned ones; arguments as in `divide`.

        A part should have at least half of its share of each column of `owed` (groups, columns). If given, a
        class of few images weighs as much as the whole.
        """
        inside = (part == np.arange(len(shares))[:, None]).astype(np.int64)
        self.sizes, self.part, self.owed = sizes, part, owed
        self.holds = (sizes > 0).astype(np.int64)
        self.target = np.rint(np.outer(shares, sizes.sum(axis=0))).astype(np.int64)
        self.excess = inside @ sizes - self.target
        self.holders = inside @ self.holds
        self.weight = np.rint(1 / (shares * shares)).astype(np.int64)
        self.heft = np.ones_like(self.target[0])
        if owed is not None:
            self.due = np.rint(np.outer(shares, owed.sum(axis=0))).astype(np.int64)
            self.has = inside @ owed
            of_class = np.maximum(sizes[:, CLASSES].sum(axis=0), 1)
            self.heft[CLASSES] = (sizes[:, _ALL].sum() // of_class) ** 2
        self.must = np.zeros_like(self.excess)
        self.must[:, CLASSES] = 3 * sizes.shape[1]
        self.must[:, _STRATA] = np.array(wanted)[:, None]
        # A stratum with fewer groups than parts is missing somewhere: best where that costs least.
        groups = self.holds.sum(axis=0)
        dearest_first = -np.sort(-self.must, axis=0)
        missing = np.arange(len(shares))[:, None] >= groups
        self.unavoidable = int((dearest_first * missing).sum()) * _FIRST

    def measure(self) -> tuple[int, int]:
        """Absence, and unevenness in fourth powers: one stratum far off is worse than all a little."""
        squares = (self.excess**2 * self.weight[:, None] * self.heft).astype(object)
        return self._absence(), (squares**2).sum()

    def shortfall(self) -> int:
        """Twice what is missing from half of each share, summed over parts and columns of `owed`."""
        return 0 if self.owed is None else int(self._short(0 * self.owed[:1]).sum())

    def is_fair(self, slack: int) -> bool:
        """Whether nothing avoidable is absent, and all deviations are within slack times the tolerances.

        Strata with fewer groups than parts are exempt from the tolerance of shares.
        """
        groups = self.holds.sum(axis=0)
        if self._absence() > self.unavoidable:
            return False
        images, total = self.target + self.excess, self.sizes.sum(axis=0)
        shares = np.abs(images / images[:, [_ALL]] - total / total[_ALL])
        sizes = np.abs(self.excess[:, _ALL]) / np.maximum(self.target[:, _ALL], 1)
        within = shares[:, groups >= len(images)].max() <= slack * _SHARE
        return bool(within and sizes.max() <= slack * _SIZE)

    def fill(self, order: Integers) -> None:
        """Put each group where it fits best, in the given order."""
        for group in order:
            absence, unevenness = self._adding(slice(group, group + 1))
            self._put(group, int(np.lexsort((unevenness[0], absence[0]))[0]))

    def settle(self) -> None:
        """Repeat the best move of a single group, until none gains a tenth of a point, squared.

        Then each class with as many groups as parts is in every part: otherwise some part would have two
        groups of it, and moving one of them would help.
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
        return int(self.must[self.holders == 0].sum()) * _FIRST + self.shortfall()

    def _short(self, more: Integers, parts: slice | Integers = slice(None)) -> Integers:
        """`shortfall` of each part with `more` (..., columns) of what it is owed."""
        return np.maximum(self.due[parts] - 2 * (self.has[parts] + more), 0).sum(axis=-1)

    def _adding(self, groups: slice) -> tuple[Integers, Integers]:
        """Change of absence and unevenness, each (groups, parts), on adding a group to a part."""
        x = self.sizes[groups]
        absence = -(self.holds[groups] @ (self.must * (self.holders == 0)).T) * _FIRST
        if self.owed is not None:
            more = self.owed[groups][:, None]
            absence += self._short(more) - self._short(0 * more)
        heavy = x * self.heft
        return absence, (2 * heavy @ self.excess.T + (heavy * x).sum(axis=1, keepdims=True)) * self.weight

    def _moving(self) -> tuple[Integers, Integers]:
        """Change of absence and unevenness, each (groups, parts), on moving a group to a part."""
        x, part, everyone = self.sizes, self.part, np.arange(len(self.sizes))
        absence, unevenness = self._adding(slice(None))
        leaves = (self.holds * (self.must * (self.holders == 1))[part]).sum(axis=1)
        relieves = (x * self.heft * (x - 2 * self.excess[part])).sum(axis=1) * self.weight[part]
        absence += leaves[:, None] * _FIRST
        if self.owed is not None:
            absence += (self._short(-self.owed, part) - self._short(0 * self.owed, part))[:, None]
        unevenness += relieves[:, None]
        absence[everyone, part] = unevenness[everyone, part] = 0
        return absence, unevenness

    def _put(self, group: int, part: int) -> None:
        for where, sign in ((self.part[group], -1), (part, 1)):
            if where >= 0:
                self.excess[where] += sign * self.sizes[group]
                self.holders[where] += sign * self.holds[group]
                if self.owed is not None:
                    self.has[where] += sign * self.owed[group]
        self.part[group] = part
