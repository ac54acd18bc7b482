"""Upsampling repeats rows, whole, in the training part only."""

from collections import Counter

import pyarrow as pa
import pytest

from bcd import schema, taxonomy
from bcd.errors import DataError, LeakageError
from bcd.split import balance, split
from bcd.taxonomy import SUBTYPES


def table(*subtypes: str, part: str | None = None) -> pa.Table:
    columns = {
        schema.IMAGE_ID: [f"{i:03}" for i in range(len(subtypes))],
        schema.SUBTYPE: list(subtypes),
        schema.TUMOR_CLASS: [SUBTYPES[s].tumor_class if s in SUBTYPES else s for s in subtypes],
    }
    return pa.table(columns | ({schema.PART: [part] * len(subtypes)} if part else {}))


ROWS = table(*["A"] * 3, *["DC"] * 11, *["F"] * 2, *["LC"] * 4)


def test_counts_come_in_the_order_of_the_taxonomy_with_zeros() -> None:
    assert list(balance.counts(ROWS, "tumor_class").items()) == [("benign", 5), ("malignant", 15)]
    counts = balance.counts(ROWS, "subtype")
    assert list(counts) == list(SUBTYPES)
    assert [counts[name] for name in SUBTYPES] == [3, 2, 0, 0, 11, 4, 0, 0]


@pytest.mark.parametrize("seed", range(10))
def test_subtypes_become_equal_by_floor_or_ceil_repetitions(seed: int) -> None:
    balanced = balance.upsample(ROWS, "subtype", seed)
    counts = balance.counts(balanced, "subtype")
    assert {name: n for name, n in counts.items() if n} == {"A": 11, "F": 11, "DC": 11, "LC": 11}
    times = Counter(balanced[schema.IMAGE_ID].to_pylist())
    for row in ROWS.to_pylist():
        whole, rest = divmod(11, balance.counts(ROWS, "subtype")[row[schema.SUBTYPE]])
        assert times[row[schema.IMAGE_ID]] in {whole, whole + (rest > 0)}


def test_tumor_classes_become_equal() -> None:
    balanced = balance.upsample(ROWS, "tumor_class", seed=0)
    assert balance.counts(balanced, "tumor_class") == {"benign": 15, "malignant": 15}
    assert set(Counter(balanced[schema.IMAGE_ID].to_pylist()).values()) == {1, 3}
    assert balanced.schema == ROWS.schema


def test_the_draw_depends_on_the_seed_alone() -> None:
    draws = [balance.upsample(ROWS, "subtype", seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    # The rows that seed 0 repeats once more than others: the same on every platform and version of NumPy.
    times = Counter(draws[0][schema.IMAGE_ID].to_pylist())
    assert [name for name in ("000", "001", "002") if times[name] == 4] == ["001", "002"]
    assert [name for name in ("014", "015") if times[name] == 6] == ["015"]


def test_none_changes_nothing() -> None:
    assert balance.upsample(ROWS, "none", seed=0) is ROWS


def test_a_class_that_is_absent_stays_absent() -> None:
    only = table("DC", "DC", "LC")
    assert balance.counts(balance.upsample(only, "tumor_class", 0), "tumor_class") == {
        "benign": 0,
        "malignant": 3,
    }
    empty = ROWS.slice(0, 0)
    assert balance.upsample(empty, "subtype", 0).num_rows == 0


@pytest.mark.parametrize("by", ["tumor_class", "subtype", "none"])
@pytest.mark.parametrize("part", [split.VALIDATION, split.TEST])
def test_only_training_rows_are_repeated(by: balance.Balance, part: str) -> None:
    assert balance.upsample(table("A", "DC", "DC", part=split.TRAIN), by, 0).num_rows in {3, 4}
    mixed = pa.concat_tables([table("A", part=split.TRAIN), table("DC", part=part)])
    with pytest.raises(LeakageError, match=f"only training rows .* {part} rows"):
        balance.upsample(mixed, by, 0)


def test_a_missing_or_unknown_label_is_an_error() -> None:
    unlabelled = pa.table({schema.SUBTYPE: pa.array(["DC", None, "XX"])})
    with pytest.raises(DataError, match="2 rows have no subtype to balance by; expected A, F"):
        balance.upsample(unlabelled, "subtype", 0)


def test_weights_of_classes_are_in_proportion_to_one_over_their_rows():
    rows = table("A", "DC", "DC", "DC")
    assert balance.class_weights(rows, "tumor_class") == pytest.approx((2, 2 / 3))
    found = dict(zip(taxonomy.classes("subtype"), balance.class_weights(rows, "subtype"), strict=True))
    assert found == pytest.approx({**dict.fromkeys(found, 0.0), "A": 2, "DC": 2 / 3})
