"""What may be wrong with a data set, one function for each kind of fault: a table in, findings out.

Nothing here opens a picture: hashes and stain come as columns of `schema.AUDIT`. Where they are null, as in
an audit of names only, what needs them is not found.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from bcd import schema
from bcd.data import breakhis
from bcd.imaging import appearance
from bcd.split import duplicates, split
from bcd.text import counted, listed

# A leak ends the job with exit code 1, a warning asks for a decision before training, a note is good to know.
Severity = Literal["leak", "warning", "note"]
# What is looked for, in the order of the report: how serious it is, and what to do about it.
KINDS: Mapping[str, tuple[Severity, str]] = {
    "leak": (
        "leak",
        "Believe no result on this split. For data that come without one jobs/train.py makes one that does "
        "not leak, with --protocol case.",
    ),
    "label_conflict": (
        "warning",
        "One of the labels is wrong. jobs/train.py sets such slides aside, unless --no-quarantine.",
    ),
    "duplicate_across": (
        "warning",
        "A patient or label is wrong. jobs/train.py sets all copies aside, unless --no-quarantine.",
    ),
    "near_duplicate_crossing": (
        "warning",
        "Look at each pair: the same tissue in two parts makes results too good. Keep one of the two.",
    ),
    "near_duplicate_across": (
        "warning",
        "Look at each pair: the same tissue under two patients or labels is an error. Remove or correct it.",
    ),
    "case_crossing": (
        "warning",
        "Slides of a case may be of one person. For BreaKHis that is unpublished, so it fails no audit. "
        "--protocol case keeps them together.",
    ),
    "broken": ("warning", "Fetch them again. jobs/train.py leaves them out, up to --max-bad-fraction."),
    "blank": ("warning", "Look at them: a field without tissue teaches glass as a sign of its label."),
    "stain_outlier": (
        "warning",
        "Look at them: another stain or scanner, pen, blood, blur? Keep what archives will hold, too.",
    ),
    "no_patient": (
        "warning",
        "Name the patients: without them no split can be trusted, and no leak is seen.",
    ),
    "reading": (
        "warning",
        "Rename the folders or columns, or write a manifest with uri, tumor_class and patient, unless that "
        "is right.",
    ),
    "published_counts": ("warning", "Fetch what is missing, or say beside every result what it is based on."),
    "duplicate_within": ("note", "jobs/train.py keeps the first copy, unless --no-quarantine."),
    "near_duplicate_within": (
        "note",
        "Neighbouring fields may overlap: harmless while a patient stands in one part only.",
    ),
    "size": ("note", "Pictures are fitted whole into the network's input: only another µm/px would matter."),
    "coverage": ("note", "What is not in both was not checked for leaks."),
}
# Instances of a finding that are kept; all of them are counted.
MOST_DETAILS = 100
# Of fewer pictures no median can be trusted.
FEWEST_FOR_OUTLIERS = 20


class Frozen(BaseModel):
    """What stands in `audit.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Detail(Frozen):
    """One instance of a finding, and ids of the pictures to look at: none, one, or two side by side."""

    sentence: str
    images: tuple[str, ...] = ()


class Finding(Frozen):
    """One kind of fault: what, how often (0: not here), the first instances, and what to do about it."""

    kind: str
    severity: Severity
    sentence: str
    next_step: str
    count: int
    details: tuple[Detail, ...]

    @classmethod
    def of(cls, kind: str, sentence: str, details: Sequence[Detail], count: int | None = None) -> "Finding":
        """A finding of one of `KINDS`; counts its details unless they are only the first of more."""
        severity, next_step = KINDS[kind]
        return cls(
            kind=kind,
            severity=severity,
            sentence=sentence,
            next_step=next_step,
            count=len(details) if count is None else count,
            details=tuple(details[:MOST_DETAILS]),
        )


def plain(sentences: Iterable[str]) -> list[Detail]:
    """Details without pictures."""
    return [Detail(sentence=sentence) for sentence in sentences]


def label_conflicts(table: pa.Table) -> Finding:
    """Slides under several subtypes, by the rule of `split.quarantine`, without a look at the contents."""
    aside = split.quarantine(schema.fill(table.drop_columns(schema.SHA256), schema.INDEX)).aside
    sentences = []
    for slide in sorted(set(aside[schema.SLIDE].to_pylist())):
        subtypes = Counter(aside.filter(pc.equal(aside[schema.SLIDE], slide))[schema.SUBTYPE].to_pylist())
        stands = listed([f"{subtype} ({counted(n, 'image')})" for subtype, n in sorted(subtypes.items())])
        known = f"; known: {breakhis.KNOWN_ANOMALIES[slide]}" if slide in breakhis.KNOWN_ANOMALIES else ""
        sentences.append(f"slide {slide} stands as {stands}{known}")
    return Finding.of(
        "label_conflict", f"{counted(len(sentences), 'slide')} under several subtypes", plain(sentences)
    )


def exact_duplicates(table: pa.Table) -> list[Finding]:
    """Pictures whose files are equal byte by byte, across patients or labels and within."""
    ids = table[schema.IMAGE_ID].to_pylist()
    labels = table.select([schema.PATIENT, schema.TUMOR_CLASS, schema.SUBTYPE]).to_pylist()
    across, within = list[Detail](), list[Detail]()
    for rows in duplicates.exact(table):
        more = f" and {len(rows) - 4} more" if len(rows) > 4 else ""
        sentence = f"{', '.join(ids[row] for row in rows[:4])}{more} are the same file"
        one_label = all(labels[row] == labels[rows[0]] for row in rows)
        detail = Detail(sentence=sentence, images=tuple(ids[row] for row in rows[:2]))
        (within if one_label else across).append(detail)
    said = counted(len(across), "picture"), counted(len(within), "picture")
    return [
        Finding.of("duplicate_across", f"{said[0]} under several patients or labels", across),
        Finding.of("duplicate_within", f"{said[1]} several times within a patient", within),
    ]


def near_duplicates(
    table: pa.Table, parts: Mapping[str, Sequence[str | None]], pairs: NDArray[np.int64]
) -> list[Finding]:
    """Pictures that look alike: in several parts of a split, across patients, and within one.

    Args:
        table: rows with schema `schema.AUDIT`.
        parts: of every row, for each given split.
        pairs: (n, 3) from `duplicates.near`.
    """
    columns = (schema.IMAGE_ID, schema.PATIENT, schema.SUBTYPE, schema.TUMOR_CLASS)
    ids, patients, subtypes, classes = (table[name].to_pylist() for name in columns)
    labels = [
        f"{patient or 'unknown'} ({subtype or tumor_class})"
        for patient, subtype, tumor_class in zip(patients, subtypes, classes, strict=True)
    ]
    crossing, across, within = list[int](), list[int](), list[int]()
    for number, (i, j, _) in enumerate(pairs.tolist()):
        (within if patients[i] is not None and labels[i] == labels[j] else across).append(number)
        crossing += [number] if _sides(parts, i, j) else []

    def detail(i: int, j: int, distance: int) -> Detail:
        whose = " and ".join(dict.fromkeys([labels[i], labels[j]]))
        said = f"{distance} of {appearance.HASH_BITS} bits differ; {'; '.join([whose, *_sides(parts, i, j)])}"
        return Detail(sentence=f"{ids[i]} and {ids[j]}: {said}", images=(ids[i], ids[j]))

    groups = {"crossing": (crossing, "in several parts"), "across": (across, "across patients or labels")}
    groups["within"] = (within, "within a patient")
    return [
        Finding.of(
            f"near_duplicate_{kind}",
            f"{counted(len(numbers), 'pair')} of near duplicates {where}",
            [detail(*pairs[number].tolist()) for number in numbers[:MOST_DETAILS]],
            len(numbers),
        )
        for kind, (numbers, where) in groups.items()
    ]


def _sides(parts: Mapping[str, Sequence[str | None]], i: int, j: int) -> list[str]:
    """`fold 1: train and test`, for each split that parts two rows."""
    sides = ((name, of_row[i], of_row[j]) for name, of_row in parts.items())
    return [f"{name}: {a} and {b}" for name, a, b in sides if a and b and a != b]


def broken(table: pa.Table) -> Finding:
    """Files that could not be decoded; in an audit of names, files without a byte."""
    empty = pc.and_(pc.is_null(table[schema.ERROR]), pc.equal(table[schema.SIZE_BYTES], 0))
    rows = table.filter(pc.or_(pc.is_valid(table[schema.ERROR]), empty.fill_null(False)))
    codes = rows[schema.ERROR].fill_null("empty").to_pylist()
    messages = rows[schema.ERROR_MESSAGE].fill_null("the file has no bytes").to_pylist()
    named = zip(rows[schema.IMAGE_ID].to_pylist(), codes, messages, strict=True)
    by_code = listed([f"{n:,} {code.replace('_', ' ')}" for code, n in Counter(codes).most_common()])
    sentence = f"{counted(len(rows), 'broken picture')}: {by_code}"
    return Finding.of("broken", sentence, plain(": ".join(words) for words in named))


def blank(table: pa.Table) -> Finding:
    """Pictures of nearly nothing but glass."""
    rows = table.filter(pc.less(table[schema.TISSUE_FRACTION], duplicates.BLANK))
    found = zip(rows[schema.IMAGE_ID].to_pylist(), rows[schema.TISSUE_FRACTION].to_pylist(), strict=True)
    details = [Detail(sentence=f"{name}: {share:.1%} tissue", images=(name,)) for name, share in found]
    sentence = f"{counted(len(details), 'picture')} with less than {duplicates.BLANK:.0%} tissue"
    return Finding.of("blank", sentence, details)


def stain_outliers(table: pa.Table, outlier_z: float) -> Finding:
    """Pictures whose mean density of haematoxylin or eosin is far from the median; blank ones have none."""
    rows = table.filter(pc.greater_equal(table[schema.TISSUE_FRACTION], duplicates.BLANK))
    rows = rows if len(rows) >= FEWEST_FOR_OUTLIERS else rows.slice(0, 0)
    ids, patients = (rows[name].to_pylist() for name in (schema.IMAGE_ID, schema.PATIENT))
    far: dict[int, tuple[float, str]] = {}
    for mean, _ in appearance.STAIN_COLUMNS if ids else ():
        values, stain = rows[mean].to_numpy(), mean.removesuffix("_od_mean")
        for i, z in enumerate(appearance.robust_z(values).tolist()):
            if abs(z) > max(outlier_z, abs(far[i][0]) if i in far else 0):
                said = f"{stain} {values[i]:.2f}, median {np.median(values):.2f}, robust z {z:+.1f}"
                far[i] = z, f"{ids[i]}: {said}"
    worst = sorted(far, key=lambda i: -abs(far[i][0]))
    details = [Detail(sentence=far[i][1], images=(ids[i],)) for i in worst]
    whose = counted(len({patients[i] for i in far}), "patient")
    sentence = (
        f"{counted(len(far), 'picture')} of {whose} stained unlike the rest, robust z beyond {outlier_z:g}"
    )
    return Finding.of("stain_outlier", sentence, details)


def unusual_sizes(table: pa.Table) -> Finding:
    """Pictures of another size than most."""
    rows = table.filter(pc.is_valid(table[schema.WIDTH_PX]))
    by_size: dict[str, list[str]] = {}
    for name, width, height in zip(
        *(rows[column].to_pylist() for column in (schema.IMAGE_ID, schema.WIDTH_PX, schema.HEIGHT_PX)),
        strict=True,
    ):
        by_size.setdefault(f"{width} x {height} px", []).append(name)
    usual, *others = sorted(by_size, key=lambda size: -len(by_size[size])) or [""]
    sentences = [
        f"{size}: {counted(len(by_size[size]), 'picture')}, such as {by_size[size][0]}" for size in others
    ]
    n = sum(len(by_size[size]) for size in others)
    return Finding.of("size", f"{counted(n, 'picture')} not {usual} like most", plain(sentences), n)


def without_patient(table: pa.Table) -> Finding:
    """Pictures that belong to nobody."""
    names = table.filter(pc.is_null(table[schema.PATIENT]))[schema.IMAGE_ID].to_pylist()
    return Finding.of("no_patient", f"{counted(len(names), 'picture')} of unknown patients", plain(names))
