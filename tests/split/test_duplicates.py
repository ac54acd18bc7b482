"""Copies by content and by look, on hashes made by hand."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from bcd import schema
from bcd.split import duplicates


def hashed(bits: int) -> str:
    return f"{bits:064x}"


def table(*rows: tuple[str, int | None, float]) -> pa.Table:
    """Rows of content, hash and tissue fraction."""
    known = [
        {
            schema.IMAGE_ID: f"{number}.png",
            schema.URI: f"{number}.png",
            schema.SHA256: content,
            schema.PHASH: None if phash is None else hashed(phash),
            schema.TISSUE_FRACTION: tissue,
        }
        for number, (content, phash, tissue) in enumerate(rows)
    ]
    return pa.Table.from_pylist(known, schema=schema.AUDIT)


def test_equal_contents_are_groups_and_unknown_ones_are_not() -> None:
    rows = table(("a", 0, 1), ("b", 0, 1), ("a", 0, 1), (None, 0, 1), (None, 0, 1), ("a", 0, 1))
    assert duplicates.exact(rows) == [[0, 2, 5]]


def test_near_pairs_are_counted_bit_by_bit_nearest_first() -> None:
    rows = table(("a", 0, 1), ("b", 0b111 << 200, 1), ("c", 0b1, 1), ("d", (1 << 256) - 1, 1))
    assert duplicates.near(rows, 4, 0.1).tolist() == [[0, 2, 1], [0, 1, 3], [1, 2, 4]]
    assert duplicates.near(rows, 1, 0.1).tolist() == [[0, 2, 1]]
    found = duplicates.named(rows, duplicates.near(rows, 1, 0.1))
    assert found.schema == schema.NEAR_DUPLICATES
    assert found.to_pylist() == [
        {schema.IMAGE_ID_A: "0.png", schema.IMAGE_ID_B: "2.png", schema.HAMMING_DISTANCE: 1}
    ]


def test_duplicates_and_blank_or_broken_images_make_no_pairs() -> None:
    rows = table(("a", 0, 1), ("a", 0, 1), ("b", 0, 0.05), ("c", None, 1), ("d", 0, 0.5))
    assert duplicates.near(rows, 0, 0.1).tolist() == [[0, 4, 0]]
    assert duplicates.near(rows.slice(2, 2), 60, 0.1).shape == (0, 3)
    assert duplicates.near(rows.slice(0, 0), 60, 0.1).shape == (0, 3)


@pytest.mark.parametrize("at_a_time", [1, 1_000, 2**20])
def test_blocks_of_any_size_find_what_all_at_once_finds(
    at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    numbers = [int.from_bytes(random.bytes(32), "big") for _ in range(60)]
    numbers += [number ^ (1 << 77) ^ (1 << bit) for bit, number in enumerate(numbers[::3])]
    rows = table(*((str(number), phash, 1.0) for number, phash in enumerate(numbers)))
    monkeypatch.setattr(duplicates, "PAIRS_AT_A_TIME", at_a_time)
    found = {(i, j): d for i, j, d in duplicates.near(rows, 100, 0.1).tolist()}
    expected = {
        (i, j): (numbers[i] ^ numbers[j]).bit_count()
        for j in range(len(numbers))
        for i in range(j)
        if (numbers[i] ^ numbers[j]).bit_count() <= 100
    }
    assert found == expected
    assert {(3 * i, 60 + i) for i in range(20)} <= found.keys()


def test_memory_stays_bounded_where_everything_is_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 50)
    monkeypatch.setattr(duplicates, "PAIRS_AT_A_TIME", 100)
    assert duplicates.near(table(*((str(i), 0, 1.0) for i in range(100))), 0, 0.1).shape == (50, 3)


def test_as_many_as_breakhis_has_are_compared_in_little_memory() -> None:
    random = np.random.default_rng(0)
    numbers = [int.from_bytes(random.bytes(32), "big") for _ in range(7_909)]
    numbers[7_000] = numbers[1] ^ 0b11
    rows = table(*((str(number), phash, 1.0) for number, phash in enumerate(numbers)))
    tracemalloc.start()
    try:
        assert duplicates.near(rows, 60, 0.1).tolist() == [[1, 7_000, 2]]
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("at_a_time", [1, 7, 2**20])
def test_the_nearest_of_another_table_is_found(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not beyond the bits, not a blank image, and nothing where one table is empty."""
    monkeypatch.setattr(duplicates, "PAIRS_AT_A_TIME", at_a_time)
    others = table(("x", 0, 1.0), ("y", 0b1111, 1.0), ("z", 1 << 200, 0.05))
    rows = table(("a", 0b111, 1.0), ("b", 1 << 200, 1.0), ("c", 0b1 << 90, 1.0), ("d", 0, 0.05))
    assert duplicates.nearest(rows, others, 1, 0.1).tolist() == [1, 0, 0, -1]
    assert duplicates.nearest(rows, others, 0, 0.1).tolist() == [-1] * 4
    assert duplicates.nearest(rows, others.slice(0, 0), 60, 0.1).tolist() == [-1] * 4
    assert duplicates.nearest(rows.slice(0, 0), others, 60, 0.1).tolist() == []
