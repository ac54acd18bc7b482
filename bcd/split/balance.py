"""Upsampling: rows of the training part are repeated until the classes are equally frequent. Or weights of
the classes in the loss, to the same effect."""

from collections import Counter
from typing import Literal

import numpy as np
import pyarrow as pa

from bcd import schema, taxonomy
from bcd.errors import DataError, LeakageError
from bcd.split.split import TRAIN

Balance = Literal["tumor_class", "subtype", "none"]


def counts(table: pa.Table, by: taxonomy.Target) -> dict[str, int]:
    """Rows of every class, in the taxonomy's order; raises `DataError` if a label is missing or unknown."""
    classes = taxonomy.classes(by)
    found = Counter(table[by].to_pylist())  # a target and its column have the same name
    if n := sum(found[name] for name in found.keys() - set(classes)):
        raise DataError(f"{n:,} rows have no {by} to balance by; expected {', '.join(classes)}")
    return {name: found[name] for name in classes}


def upsample(table: pa.Table, by: Balance, seed: int) -> pa.Table:
    """Repeat rows until every class that occurs has as many as the largest; `none` returns the table
    unchanged.

    Every row of a class occurs equally often or once more: the remainder is drawn without replacement, by raw
    PCG64 words (the same rows on every platform and version). Repetitions are adjacent, so shuffle before
    use.

    Raises:
        LeakageError: the table has a part other than training.
        DataError: a label is missing or unknown.
    """
    if schema.PART in table.column_names and (others := set(table[schema.PART].to_pylist()) - {TRAIN}):
        raise LeakageError(
            f"only training rows may be repeated, but there are {', '.join(sorted(others))} rows"
        )
    if by == "none":
        return table
    wanted = max(counts(table, by).values())
    labels = np.array(table[by].to_pylist(), dtype=object)
    times = np.zeros(len(labels), dtype=np.int64)
    words = np.random.PCG64(seed).random_raw(len(labels))
    for label in set(labels):
        members = np.flatnonzero(labels == label)
        whole, rest = divmod(wanted, len(members))
        times[members] = whole
        times[members[np.argsort(words[members], kind="stable")[:rest]]] += 1
    return table.take(np.repeat(np.arange(len(labels)), times))


def class_weights(table: pa.Table, by: taxonomy.Target) -> tuple[float, ...]:
    """Weight of the loss of each class, in the taxonomy's order, by which its expectation over the rows is
    that over upsampled ones: rows / (classes * rows of the class); 0 for a class that does not occur."""
    found = counts(table, by)
    share = len(table) / max(1, sum(n > 0 for n in found.values()))
    return tuple(share / n if n else 0.0 for n in found.values())
