"""Groups into parts: equal, whole, the same for the same seed, and nothing absent that need not be."""

import numpy as np
import pyarrow as pa
import pytest

from bcd import division, schema


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


def test_sizes_by_hand() -> None:
    table, owner = rows((2, "benign", "A"), (3, "malignant", "DC"), (1, "malignant", "LC"))
    # Columns: benign, malignant, all, then A, DC, LC in order of appearance.
    assert division.sizes(table, owner).tolist() == [
        [2, 0, 2, 2, 0, 0],
        [0, 3, 3, 0, 3, 0],
        [0, 1, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_equal_groups_make_equal_folds(k: int, seed: int) -> None:
    groups = [(4, "benign", "A"), (4, "malignant", "DC")] * (2 * k)
    sizes = division.sizes(*rows(*groups))
    parts = division.divide(sizes, np.full(k, 1 / k), [1] * k, seed)
    assert [sizes[parts == part, :3].sum(axis=0).tolist() for part in range(k)] == [[8, 8, 16]] * k
    assert (parts == division.divide(sizes, np.full(k, 1 / k), [1] * k, seed)).all()


def test_seeds_give_other_folds() -> None:
    sizes = division.sizes(*rows(*[(4, "benign", "A"), (4, "malignant", "DC")] * 10))
    found = {tuple(division.divide(sizes, np.full(5, 0.2), [1] * 5, seed)) for seed in range(10)}
    assert len(found) == 10


def test_a_class_with_fewer_groups_than_folds_goes_to_as_many_as_it_has() -> None:
    sizes = division.sizes(*rows(*[(4, "benign", None)] * 3, *[(4, "malignant", None)] * 12))
    parts = division.divide(sizes, np.full(5, 0.2), [1] * 5, 0)
    assert len(set(parts[:3])) == 3
    assert np.bincount(parts, sizes[:, 2], 5).tolist() == [12] * 5


def test_training_misses_no_stratum_before_the_others() -> None:
    sizes = division.sizes(*rows((4, "benign", "A"), *[(4, "benign", "F"), (4, "malignant", "DC")] * 6))
    for seed in range(5):
        parts = division.divide(sizes, np.array([0.6, 0.2, 0.2]), [2, 0, 1], seed)
        assert parts[0] == 0
