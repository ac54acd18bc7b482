"""Images that no part of a split may have: contradictory labels, and duplicates.

By rule, never by name: slide 14-13412 of BreaKHis, published twice with two labels, is one case of it.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema
from bcd.text import some


class Quarantine(NamedTuple):
    """Rows to use and quarantined rows, both in their old order, and one sentence per reason."""

    kept: pa.Table
    quarantined: pa.Table
    reasons: list[str]


def apply_rules(table: pa.Table) -> Quarantine:
    """Quarantine images with contradictory labels, and duplicates.

    Three rules: a slide with several subtypes is quarantined with all its images; duplicates (equal `sha256`)
    with several patients or labels are all quarantined; of duplicates with one patient and label the first by
    `image_id` is kept. A null hash equals no other.
    """
    rows = sorted(table.to_pylist(), key=lambda row: row[schema.IMAGE_ID])
    quarantined: set[str] = set()
    reasons: list[str] = []
    for slide, images in _by(rows, schema.SLIDE).items():
        subtypes = sorted({row[schema.SUBTYPE] for row in images} - {None})
        if len(subtypes) > 1:
            quarantined.update(_ids(images))
            reasons.append(
                f"slide {slide} is labelled {' and '.join(subtypes)}: all {len(images)} images quarantined"
            )
    for copies in _by(rows, schema.SHA256).values():
        remaining = [name for name in _ids(copies) if name not in quarantined]
        labels = {(row[schema.PATIENT], row[schema.TUMOR_CLASS], row[schema.SUBTYPE]) for row in copies}
        if remaining and len(labels) > 1:
            quarantined.update(remaining)
            reasons.append(
                f"duplicates with several patients or labels, all quarantined: {some(_ids(copies), 5)}"
            )
        elif len(remaining) > 1:
            quarantined.update(remaining[1:])
            reasons.append(f"duplicates of {remaining[0]} (kept), quarantined: {some(remaining[1:], 5)}")
    is_quarantined = pc.is_in(table[schema.IMAGE_ID], pa.array(sorted(quarantined), pa.string()))
    return Quarantine(table.filter(pc.invert(is_quarantined)), table.filter(is_quarantined), reasons)


def _by(rows: Iterable[dict[str, Any]], column: str) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row[column] is not None:
            groups[row[column]].append(row)
    return groups


def _ids(rows: Iterable[dict[str, Any]]) -> list[str]:
    return [row[schema.IMAGE_ID] for row in rows]
