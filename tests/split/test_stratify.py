"""Groups into parts: equal, whole, the same for the same seed, and nothing absent that need not be."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from bcd import schema
from bcd.split import stratify

SHARES = np.array([0.65, 0.15, 0.2])


def rows(*groups: tuple[int, str, str | None]) -> tuple[pa.Table, np.ndarray]:
    """Index rows of (images, tumour class, subtype) groups, and the group of each."""
    owner = np.repeat(np.arange(len(groups)), [n for n, _, _ in groups])
    found = [
        {
            schema.IMAGE_ID: str(i),
            schema.URI: "",
            schema.TUMOR_CLASS: groups[g][1],
            schema.SUBTYPE: groups[g][2],
        }
        for i, g in enumerate(owner)
    ]
    return schema.fill(pa.Table.from_pylist(found), schema.INDEX), owner


NOBODY = np.zeros((99, 2), np.int64)


def divide(sizes: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Equal folds of groups without patients."""
    return stratify.divide(sizes, NOBODY[: len(sizes)], np.full(k, 1 / k), [1] * k, seed)


def test_sizes_by_hand() -> None:
    table, owner = rows((2, "benign", "A"), (3, "malignant", "DC"), (1, "malignant", "LC"))
    # Columns: benign, malignant, all, then A, DC, LC in order of appearance.
    assert stratify.image_counts(table, owner).tolist() == [
        [2, 0, 2, 2, 0, 0],
        [0, 3, 3, 0, 3, 0],
        [0, 1, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_equal_groups_make_equal_folds(k: int, seed: int) -> None:
    groups = [(4, "benign", "A"), (4, "malignant", "DC")] * (2 * k)
    sizes = stratify.image_counts(*rows(*groups))
    parts = divide(sizes, k, seed)
    assert [sizes[parts == part, :3].sum(axis=0).tolist() for part in range(k)] == [[8, 8, 16]] * k
    assert (parts == divide(sizes, k, seed)).all()


def test_seeds_give_other_folds() -> None:
    sizes = stratify.image_counts(*rows(*[(4, "benign", "A"), (4, "malignant", "DC")] * 10))
    found = {tuple(divide(sizes, 5, seed)) for seed in range(10)}
    assert len(found) == 10


def test_a_class_with_fewer_groups_than_folds_goes_to_as_many_as_it_has() -> None:
    sizes = stratify.image_counts(*rows(*[(4, "benign", None)] * 3, *[(4, "malignant", None)] * 12))
    parts = divide(sizes, 5, 0)
    assert len(set(parts[:3])) == 3
    assert np.bincount(parts, sizes[:, 2], 5).tolist() == [12] * 5


def test_training_misses_no_stratum_before_the_others() -> None:
    sizes = stratify.image_counts(
        *rows((4, "benign", "A"), *[(4, "benign", "F"), (4, "malignant", "DC")] * 6)
    )
    for seed in range(5):
        parts = stratify.divide(sizes, NOBODY[:13], np.array([0.6, 0.2, 0.2]), [2, 0, 1], seed)
        assert parts[0] == 0


def test_patients_by_hand() -> None:
    """Two patients in one group, one of both classes in the other, and one whom nobody knows."""
    known = [
        ("p", "benign"),
        ("p", "benign"),
        ("q", "benign"),
        ("r", "benign"),
        ("r", "malignant"),
        (None, "benign"),
    ]
    found = [
        {schema.IMAGE_ID: str(i), schema.URI: "", schema.PATIENT: who, schema.TUMOR_CLASS: name}
        for i, (who, name) in enumerate(known)
    ]
    table = schema.fill(pa.Table.from_pylist(found), schema.INDEX)
    assert stratify.patient_counts(table, np.array([0, 0, 0, 1, 1, 1])).tolist() == [[2, 0], [1, 1]]


def cohort(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and patients of n groups, at least three of each class: one of large groups, one of small."""
    of_class = np.array([0, 0, 0, 1, 1, 1, *random.integers(0, 2, n - 6)])
    images = np.where(of_class == 0, random.integers(20, 80, n), random.integers(1, 6, n))
    counts, patients = np.zeros((n, 2), np.int64), np.zeros((n, 2), np.int64)
    counts[np.arange(n), of_class] = images
    patients[np.arange(n), of_class] = random.integers(1, 3, n)
    return np.hstack([counts, images[:, None], counts]), patients


def has_half(counts: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Whether every part (of divisions, (..., groups)) has half of its share of every column."""
    held = np.stack([(parts == part).astype(np.int64) @ counts for part in range(len(SHARES))], -2)
    return (2 * held >= np.outer(SHARES, counts.sum(axis=0)) - 1e-6).all(axis=(-1, -2))


def test_half_of_each_share_is_found_wherever_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """All divisions of small cohorts are tried: of 20, 19 have one, and by images alone 12 were found."""
    monkeypatch.setattr(stratify, "_WORK", 900)
    everything = np.array(list(itertools.product(range(3), repeat=9)))
    possible, by_images, found = [], [], []
    for seed in range(20):
        sizes, patients = cohort(np.random.default_rng(seed), 9)
        counts = np.hstack([sizes[:, :2], patients])
        possible.append(bool(has_half(counts, everything).any()))
        by_images.append(bool(has_half(counts, stratify._search(sizes, SHARES, [2, 0, 1], seed))))
        found.append(bool(has_half(counts, stratify.divide(sizes, patients, SHARES, [2, 0, 1], seed))))
    assert found == possible
    assert (sum(possible), sum(by_images)) == (19, 12)


def test_what_gives_each_class_half_of_its_share_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stratify, "_WORK", 300)
    sizes, patients = np.zeros((30, 5), np.int64), np.zeros((30, 2), np.int64)
    sizes[:, 2] = 4
    for group in range(30):
        sizes[group, [group % 2, 3 + group % 2]] = 4
        patients[group, group % 2] = 1
    for seed in range(5):
        before = stratify._search(sizes, SHARES, [2, 0, 1], seed)
        assert (stratify.divide(sizes, patients, SHARES, [2, 0, 1], seed) == before).all()
