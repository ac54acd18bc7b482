"""Faults of a data set: one function for each kind of finding, from a table to findings.

No image is opened: hashes and stain are columns of `schema.AUDIT`. Where they are null, as in an audit of
names only, there are no findings that depend on them.
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
from bcd.audit import identifiers
from bcd.audit.identifiers import Identifier
from bcd.data import breakhis
from bcd.imaging import appearance
from bcd.split import duplicates, quarantine
from bcd.text import counted, listed, some

# A leak ends the job with exit code 1, a warning requires a decision before training, a note is informative.
Severity = Literal["leak", "warning", "note"]
# What to do about every kind of finding, by severity, in the order of the report.
_NEXT_STEPS: Mapping[Severity, Mapping[str, str]] = {
    "leak": {
        "leak": (
            "Trust no result on this split. For data without a split jobs/train.py makes one that does not "
            "leak, with --protocol case."
        ),
    },
    "warning": {
        "label_conflict": (
            "One of the labels is wrong. jobs/train.py quarantines such slides, unless --no-quarantine."
        ),
        "duplicate_across": (
            "A patient or label is wrong. jobs/train.py quarantines all copies, unless --no-quarantine."
        ),
        "near_duplicate_crossing": (
            "Look at each pair: the same tissue in two parts makes results too good. Keep one of the two."
        ),
        "near_duplicate_across": (
            "Look at each pair: the same tissue under two patients or labels is an error. Remove or correct"
            " it."
        ),
        "case_crossing": (
            "Slides of a case may be of one person. For BreaKHis that is unpublished, so it fails no audit."
            " --protocol case keeps them together."
        ),
        "broken": "Download them again. jobs/train.py skips them, up to --max-bad-fraction.",
        "blank": "Look at them: a field without tissue teaches glass as a sign of its label.",
        "stain_outlier": (
            "Look at them: another stain or scanner, pen, blood, blur? Keep what archives will also contain."
        ),
        "identifier": (
            "Remove them before images, names or results are shared. jobs/score.py --pseudonymise KEY keeps "
            "names and ids out of its results; what is in the images remains. All are in identifiers.parquet."
        ),
        "no_patient": "Name the patients: without them no split can be trusted, and no leak detected.",
        "reading": (
            "Rename the folders or columns, or write a manifest with uri, tumor_class and patient, unless "
            "that is right."
        ),
        "published_counts": "Download what is missing, or state with every result what it is based on.",
    },
    "note": {
        "duplicate_within": "jobs/train.py keeps the first copy, unless --no-quarantine.",
        "near_duplicate_within": (
            "Neighbouring fields may overlap: harmless while a patient is in one part only."
        ),
        "size": "Images are fitted whole into the network's input: only another µm/px would matter.",
        "coverage": "Images that are not in both were not checked for leaks.",
    },
}
KINDS: Mapping[str, tuple[Severity, str]] = {
    kind: (severity, step) for severity, steps in _NEXT_STEPS.items() for kind, step in steps.items()
}
# Number of instances of a finding that are kept; all are counted.
MOST_DETAILS = 100
# The median of fewer images is not reliable.
FEWEST_FOR_OUTLIERS = 20


class Frozen(BaseModel):
    """Base of what `audit.json` contains."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Detail(Frozen):
    """One instance of a finding, and the ids of the images to show: none, one, or two side by side."""

    sentence: str
    images: tuple[str, ...] = ()


class Finding(Frozen):
    """One kind of fault: its count (0: none), the first instances, and what to do about it."""

    kind: str
    severity: Severity
    sentence: str
    next_step: str
    count: int
    details: tuple[Detail, ...]

    @classmethod
    def of(cls, kind: str, sentence: str, details: Sequence[Detail], count: int | None = None) -> "Finding":
        """A finding of one of `KINDS`; `count` is given if the details are only the first of more."""
        severity, next_step = KINDS[kind]
        n, first = len(details) if count is None else count, tuple(details[:MOST_DETAILS])
        return cls(
            kind=kind, severity=severity, sentence=sentence, next_step=next_step, count=n, details=first
        )


def plain(sentences: Iterable[str]) -> list[Detail]:
    """Details without images."""
    return [Detail(sentence=sentence) for sentence in sentences]


def label_conflicts(table: pa.Table) -> Finding:
    """Slides with several subtypes, by the rule of `quarantine.apply_rules`, regardless of the contents."""
    aside = quarantine.apply_rules(schema.fill(table.drop_columns(schema.SHA256), schema.INDEX)).quarantined
    sentences = []
    for slide in sorted(set(aside[schema.SLIDE].to_pylist())):
        subtypes = Counter(aside.filter(pc.equal(aside[schema.SLIDE], slide))[schema.SUBTYPE].to_pylist())
        labels = listed([f"{subtype} ({counted(n, 'image')})" for subtype, n in sorted(subtypes.items())])
        known = f"; known: {breakhis.KNOWN_ANOMALIES[slide]}" if slide in breakhis.KNOWN_ANOMALIES else ""
        sentences.append(f"slide {slide} is labelled {labels}{known}")
    sentence = f"{counted(len(sentences), 'slide')} with several subtypes"
    return Finding.of("label_conflict", sentence, plain(sentences))


def exact_duplicates(table: pa.Table) -> list[Finding]:
    """Images with equal files, across patients or labels and within."""
    ids = table[schema.IMAGE_ID].to_pylist()
    labels = table.select([schema.PATIENT, schema.TUMOR_CLASS, schema.SUBTYPE]).to_pylist()
    across, within = list[Detail](), list[Detail]()
    for rows in duplicates.exact(table):
        sentence = f"{some((ids[row] for row in rows), 4)} are the same file"
        one_label = all(labels[row] == labels[rows[0]] for row in rows)
        detail = Detail(sentence=sentence, images=tuple(ids[row] for row in rows[:2]))
        (within if one_label else across).append(detail)
    numbers = counted(len(across), "image"), counted(len(within), "image")
    return [
        Finding.of("duplicate_across", f"{numbers[0]} with duplicates across patients or labels", across),
        Finding.of("duplicate_within", f"{numbers[1]} with duplicates within a patient", within),
    ]


def near_duplicates(
    table: pa.Table, parts: Mapping[str, Sequence[str | None]], pairs: NDArray[np.int64]
) -> list[Finding]:
    """Near duplicates: in several parts of a split, across patients, and within one.

    `parts` are those of every row, for each given split; `pairs` (n, 3) are from `duplicates.near`.
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
        crossing += [number] if _parts_of_pair(parts, i, j) else []

    def detail(i: int, j: int, distance: int) -> Detail:
        whose = " and ".join(dict.fromkeys([labels[i], labels[j]]))
        facts = "; ".join([whose, *_parts_of_pair(parts, i, j)])
        differ = f"{distance} of {appearance.HASH_BITS} bits differ"
        return Detail(sentence=f"{ids[i]} and {ids[j]}: {differ}; {facts}", images=(ids[i], ids[j]))

    groups = {
        "crossing": (crossing, "in several parts"),
        "across": (across, "across patients or labels"),
        "within": (within, "within a patient"),
    }
    return [
        Finding.of(
            f"near_duplicate_{kind}",
            f"{counted(len(numbers), 'pair')} of near duplicates {where}",
            [detail(*pairs[number].tolist()) for number in numbers[:MOST_DETAILS]],
            len(numbers),
        )
        for kind, (numbers, where) in groups.items()
    ]


def _parts_of_pair(parts: Mapping[str, Sequence[str | None]], i: int, j: int) -> list[str]:
    """`fold 1: train and test`, for each split with the two rows in different parts."""
    pairs = ((name, of_row[i], of_row[j]) for name, of_row in parts.items())
    return [f"{name}: {a} and {b}" for name, a, b in pairs if a and b and a != b]


def broken(table: pa.Table) -> Finding:
    """Files that could not be decoded; in an audit of names, empty files."""
    empty = pc.and_(pc.is_null(table[schema.ERROR]), pc.equal(table[schema.SIZE_BYTES], 0))
    rows = table.filter(pc.or_(pc.is_valid(table[schema.ERROR]), empty.fill_null(False)))
    codes = rows[schema.ERROR].fill_null("empty").to_pylist()
    messages = rows[schema.ERROR_MESSAGE].fill_null("the file has no bytes").to_pylist()
    named = zip(rows[schema.IMAGE_ID].to_pylist(), codes, messages, strict=True)
    by_code = listed([f"{n:,} {code.replace('_', ' ')}" for code, n in Counter(codes).most_common()])
    sentence = f"{counted(len(rows), 'broken image')}: {by_code}"
    return Finding.of("broken", sentence, plain(map(": ".join, named)))


def blank(table: pa.Table) -> Finding:
    """Images of almost only glass."""
    rows = table.filter(pc.less(table[schema.TISSUE_FRACTION], duplicates.BLANK))
    found = zip(rows[schema.IMAGE_ID].to_pylist(), rows[schema.TISSUE_FRACTION].to_pylist(), strict=True)
    details = [Detail(sentence=f"{name}: {share:.1%} tissue", images=(name,)) for name, share in found]
    sentence = f"{counted(len(details), 'image')} with less than {duplicates.BLANK:.0%} tissue"
    return Finding.of("blank", sentence, details)


def stain_outliers(table: pa.Table, outlier_z: float) -> Finding:
    """Images, not blank, whose mean density of haematoxylin or eosin is far from the median."""
    rows = table.filter(pc.greater_equal(table[schema.TISSUE_FRACTION], duplicates.BLANK))
    rows = rows if len(rows) >= FEWEST_FOR_OUTLIERS else rows.slice(0, 0)
    ids, patients = (rows[name].to_pylist() for name in (schema.IMAGE_ID, schema.PATIENT))
    far: dict[int, tuple[float, str]] = {}
    for mean, _ in appearance.STAIN_COLUMNS if ids else ():
        values, stain = rows[mean].to_numpy(), mean.removesuffix("_od_mean")
        for i, z in enumerate(appearance.robust_z(values).tolist()):
            if abs(z) > max(outlier_z, abs(far[i][0]) if i in far else 0):
                numbers = f"{values[i]:.2f}, median {np.median(values):.2f}, robust z {z:+.1f}"
                far[i] = z, f"{ids[i]}: {stain} {numbers}"
    worst = sorted(far, key=lambda i: -abs(far[i][0]))
    details = [Detail(sentence=far[i][1], images=(ids[i],)) for i in worst]
    whose = counted(len({patients[i] for i in far}), "patient")
    sentence = f"{counted(len(far), 'image')} of {whose} with unusual stain, robust z beyond {outlier_z:g}"
    return Finding.of("stain_outlier", sentence, details)


def unusual_sizes(table: pa.Table) -> Finding:
    """Images of another size than most."""
    rows = table.filter(pc.is_valid(table[schema.WIDTH_PX])).select(
        [schema.IMAGE_ID, schema.WIDTH_PX, schema.HEIGHT_PX]
    )
    by_size: dict[str, list[str]] = {}
    for name, width, height in zip(*(column.to_pylist() for column in rows), strict=True):
        by_size.setdefault(f"{width} x {height} px", []).append(name)
    usual, *others = sorted(by_size, key=lambda size: -len(by_size[size])) or [""]
    sentences = [
        f"{size}: {counted(len(by_size[size]), 'image')}, such as {by_size[size][0]}" for size in others
    ]
    n = sum(len(by_size[size]) for size in others)
    return Finding.of("size", f"{counted(n, 'image')} not {usual} like most", plain(sentences), n)


def identifying(found: Sequence[Identifier]) -> Finding:
    """Statements that may identify a patient, without their values."""
    first = plain(identifiers.sentences(found, MOST_DETAILS))
    return Finding.of("identifier", identifiers.summed(found), first, len(found))


def without_patient(table: pa.Table) -> Finding:
    """Images without a patient."""
    names = table.filter(pc.is_null(table[schema.PATIENT]))[schema.IMAGE_ID].to_pylist()
    return Finding.of("no_patient", f"{counted(len(names), 'image')} of unknown patients", plain(names))
