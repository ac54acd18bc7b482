"""Duplicates and near duplicates, by the hashes of `schema.AUDIT`; not mirrored or rotated copies."""

from collections import defaultdict

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from bcd import schema

# An image with a smaller share of tissue is nearly blank; of 190 real H&E fields the emptiest has 56 %.
BLANK = 0.10
# Pairs compared at a time, and largest number kept: a few MB, and 24 MB.
PAIRS_AT_A_TIME, MOST_PAIRS = 2**20, 2**20


def exact(table: pa.Table) -> list[list[int]]:
    """Groups of rows with equal `sha256`, in the order of the table."""
    copies: dict[str, list[int]] = defaultdict(list)
    for row, content in enumerate(table[schema.SHA256].to_pylist()):
        if content is not None:
            copies[content].append(row)
    return [rows for rows in copies.values() if len(rows) > 1]


def near(table: pa.Table, near_bits: int, least_tissue: float) -> NDArray[np.int64]:
    """Pairs of images whose perceptual hashes differ in at most `near_bits` bits, nearest first.

    Every pair is compared. Only the first of duplicates counts, and images with less than `least_tissue` do
    not, because all blank images are similar.

    Returns:
        (n, 3): rows i < j, and the Hamming distance in bits; at most the first `MOST_PAIRS` found.
    """
    first = ~pd.Series(table[schema.SHA256].to_pylist(), dtype=object).duplicated().to_numpy()
    rows = np.flatnonzero(first & _is_hashed(table, least_tissue))
    words = _words(table, rows)
    step = max(1, PAIRS_AT_A_TIME // max(1, len(rows)))
    found, n_found = [np.zeros((0, 3), np.int64)], 0
    for start in range(0, len(rows), step):
        distance = _distance(words[:, start : start + step], words[:, start:])
        i, j = np.nonzero(np.triu(distance <= near_bits, 1))
        found.append(np.stack([rows[start + i], rows[start + j], distance[i, j]], 1))
        n_found += len(i)
        if n_found >= MOST_PAIRS:
            break
    pairs = np.concatenate(found)[:MOST_PAIRS]
    return pairs[np.argsort(pairs[:, 2], kind="stable")]


def nearest(table: pa.Table, others: pa.Table, near_bits: int, least_tissue: float) -> NDArray[np.int64]:
    """Row (n,) of the most similar image in another table for each image, -1 where none is near.

    As in `near`, images with less than `least_tissue` do not count.
    """
    mine, theirs = (np.flatnonzero(_is_hashed(each, least_tissue)) for each in (table, others))
    words, other_words = _words(table, mine), _words(others, theirs)
    found = np.full(len(table), -1, np.int64)
    step = max(1, PAIRS_AT_A_TIME // max(1, len(theirs)))
    for start in range(0, len(mine) if len(theirs) else 0, step):
        distance = _distance(words[:, start : start + step], other_words)
        is_near = distance.min(axis=1) <= near_bits
        found[mine[start : start + step][is_near]] = theirs[distance.argmin(axis=1)[is_near]]
    return found


def _is_hashed(table: pa.Table, least_tissue: float) -> NDArray[np.bool_]:
    """Whether each image has a hash and enough tissue."""
    is_tissue: NDArray[np.bool_] = table[schema.TISSUE_FRACTION].fill_null(-1).to_numpy() >= least_tissue
    return is_tissue & table[schema.PHASH].is_valid().to_numpy()


def _words(table: pa.Table, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(words, images): the same 64 bits of every hash are contiguous, for speed."""
    hashes = bytes.fromhex("".join(table[schema.PHASH].take(pa.array(rows)).to_pylist()))
    return np.frombuffer(hashes, np.uint64).reshape(len(rows), -1 if len(rows) else 1).T.copy()


def _distance(words: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.int16]:
    """Hamming distances (images, other images) between two sets of hashes."""
    distance = np.zeros((words.shape[1], others.shape[1]), np.int16)
    for word, other in zip(words, others, strict=True):
        distance += np.bitwise_count(word[:, None] ^ other[None])
    return distance


def named(table: pa.Table, pairs: NDArray[np.int64]) -> pa.Table:
    """Pairs of `near` by image id, with schema `schema.NEAR_DUPLICATES`."""
    first, second, distance = (pa.array(column) for column in pairs.T)
    ids = table[schema.IMAGE_ID].combine_chunks()
    columns = [ids.take(first), ids.take(second), distance.cast(pa.int16())]
    return pa.Table.from_arrays(columns, schema=schema.NEAR_DUPLICATES)
