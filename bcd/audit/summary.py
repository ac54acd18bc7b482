"""The result of an audit: counts, leaks of the given splits, and every finding."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from bcd import schema
from bcd.audit import findings
from bcd.audit.findings import Finding, Frozen, plain
from bcd.audit.identifiers import Identifier
from bcd.data import breakhis
from bcd.data.manifest import Manifest
from bcd.errors import DataError
from bcd.split import split
from bcd.text import counted, listed, some

# What must be in one part only, else the audit fails: groups of images by name, images by content.
GROUPS, PICTURES = (schema.PATIENT, schema.SLIDE), (schema.SHA256,)
# Largest number of cases that a sentence names.
MOST_NAMES = 10


class SplitFacts(Frozen):
    """One given split: its images by part, and the names of what is in more than one part."""

    name: str
    n_images: dict[str, int]
    n_not_in_split: int
    n_not_in_data: int
    groups: tuple[str, ...]
    pictures: tuple[str, ...]
    cases: tuple[str, ...]


class AuditFacts(Frozen):
    """Counts of a data set. A slide label is a slide with one subtype: a "patient" of BreaKHis."""

    n_images: int
    n_patients: int
    n_cases: int
    n_slides: int
    n_slide_labels: int
    by_class: dict[str, int]
    by_subtype: dict[str, int]
    by_magnification: dict[str, int]


class Audit(Frozen):
    """The whole result; `counts` are images present and published, by subtype and magnification."""

    verdict: str
    leaking_splits: tuple[str, ...]
    facts: AuditFacts
    splits: tuple[SplitFacts, ...]
    findings: tuple[Finding, ...]
    counts: dict[str, dict[str, tuple[int, int]]]


class Split(NamedTuple):
    """A given split: the part of every row (None: in no part), and the number of entries without a row."""

    name: str
    parts: list[str | None]
    n_not_in_data: int


def summarise(
    table: pa.Table,
    warnings: Sequence[str],
    splits: Sequence[Split],
    near_pairs: NDArray[np.int64],
    outlier_z: float,
    doubts: Sequence[str] = (),
    identifiers: Sequence[Identifier] = (),
) -> Audit:
    """All facts and findings about a data set, the most serious first.

    Args:
        table: rows with schema `schema.AUDIT`.
        warnings: of `index.read_index`, about missing and surplus files.
        splits: the given ones, from `place_rows`.
        near_pairs: (n, 3) from `duplicates.near`.
        outlier_z: robust z-score beyond which a stain is unusual.
        doubts: of `index.read_index`, about names of folders, columns and patients.
        identifiers: what may identify a patient.
    """
    examined = [_examine(table, given) for given in splits]
    facts = [one for one, _ in examined]
    found = [
        *(one for _, both in examined for one in both),
        findings.label_conflicts(table),
        *findings.exact_duplicates(table),
        *findings.near_duplicates(table, {given.name: given.parts for given in splits}, near_pairs),
        findings.broken(table),
        findings.blank(table),
        findings.stain_outliers(table, outlier_z),
        findings.identifying(identifiers),
        findings.without_patient(table),
        Finding.of("published_counts", "the files are not those published", plain(warnings)),
        Finding.of("reading", "names that may have another meaning", plain(doubts)),
        findings.unusual_sizes(table),
        _coverage(facts),
    ]
    order = list(findings.KINDS)
    found = sorted((one for one in found if one.count), key=lambda one: order.index(one.kind))
    leaking = tuple(given.name for given in facts if given.groups or given.pictures)
    return Audit(
        verdict=_verdict(leaking, facts, found),
        leaking_splits=leaking,
        facts=_facts(table),
        splits=tuple(facts),
        findings=tuple(found),
        counts=_counts(table),
    )


def identifiers_only(audit: Audit) -> Audit:
    """The audit with no other finding than what may identify a patient."""
    found = tuple(one for one in audit.findings if one.kind == "identifier")
    verdict = found[0].sentence if found else "no statement found that may identify a patient"
    return audit.model_copy(update={"findings": found, "verdict": verdict})


def _verdict(leaking: Sequence[str], given: Sequence[SplitFacts], found: Sequence[Finding]) -> str:
    n = len({one.kind for one in found if one.severity == "warning"})
    what = counted(n, "finding") if n else "nothing else" if leaking else "nothing"
    rest = f"{what} to decide on before training"
    if leaking:
        return f"{listed(leaking)} {'leaks' if len(leaking) == 1 else 'leak'}; {rest}"
    partly = any(one.n_not_in_split or one.n_not_in_data for one in given)
    where = listed([one.name for one in given]) + (" among the images that are in both" if partly else "")
    return f"no leak in {where}; {rest}" if given else rest


def _facts(table: pa.Table) -> AuditFacts:
    def distinct(*names: str) -> int:
        return len(table.select(names).drop_null().group_by(list(names)).aggregate([]))

    def tally(name: str) -> dict[str, int]:
        return {str(key): n for key, n in sorted(Counter(table[name].drop_null().to_pylist()).items())}

    return AuditFacts(
        n_images=len(table),
        n_patients=distinct(schema.PATIENT),
        n_cases=distinct(schema.CASE),
        n_slides=distinct(schema.SLIDE),
        n_slide_labels=distinct(schema.SLIDE, schema.SUBTYPE),
        by_class=tally(schema.TUMOR_CLASS),
        by_subtype=tally(schema.SUBTYPE),
        by_magnification={f"{key}X": n for key, n in tally(schema.MAGNIFICATION).items()},
    )


def _counts(table: pa.Table) -> dict[str, dict[str, tuple[int, int]]]:
    """Counts present and published; empty unless all names, subtypes and magnifications are of BreaKHis."""
    columns = [table[name] for name in (schema.SUBTYPE, schema.MAGNIFICATION)]
    known = not any(column.null_count for column in columns)
    if not known or not all(name.startswith(breakhis.PREFIX) for name in _file_names(table)):
        return {}
    here = Counter(zip(*(column.to_pylist() for column in columns), strict=True))
    return {
        subtype: {str(m): (here[subtype, m], n) for m, n in published.items()}
        for subtype, published in breakhis.EXPECTED_COUNTS.items()
    }


def _file_names(table: pa.Table) -> list[str]:
    return [name.rpartition("/")[2] for name in table[schema.IMAGE_ID].to_pylist()]


def read_roles(given: Manifest) -> dict[str, str]:
    """Part of every image of a split file, by image id (or URI, or file name).

    Raises `DataError` if a column is missing, a part unknown, or an image in two parts.
    """
    key = next((column for column in (schema.IMAGE_ID, schema.URI) if column in given.columns), None)
    if key is None or schema.PART not in given.columns:
        raise DataError(
            f"{given.uri}: needs the columns {schema.IMAGE_ID} (or {schema.URI}) and {schema.PART}"
        )
    roles: dict[str, str] = {}
    for row in given.rows:
        image, part = row.cells.get(key), row.cells.get(schema.PART)
        if image is None:
            raise DataError(f"{row.where}: the {key} is empty")
        if part is None or part not in split.PARTS:
            raise DataError(
                f"{row.where}: {image} has part {part!r}; expected one of {', '.join(split.PARTS)}"
            )
        if roles.setdefault(image, part) != part:
            raise DataError(f"{row.where}: {image} is in {roles[image]} and in {part}")
    return roles


def place_rows(table: pa.Table, roles: Mapping[str, str], name: str) -> Split:
    """The part of every row in a split, by image id, by URI, or by file name if it is unique.

    Raises `DataError` if no row has a part.
    """
    file_names = _file_names(table)
    times = Counter(file_names)
    published = list(map(breakhis.published, file_names))
    columns = table[schema.IMAGE_ID].to_pylist(), table[schema.URI].to_pylist(), file_names, published
    keys = [
        next((key for key in names[: 4 if times[names[2]] == 1 else 2] if key in roles), None)
        for names in zip(*columns, strict=True)
    ]
    if not any(keys):
        raise DataError(f"{name}: contains none of the images, by id, URI or file name")
    parts = [roles[key] if key else None for key in keys]
    return Split(name, parts, len(roles.keys() - set(keys)))


def _examine(table: pa.Table, given: Split) -> tuple[SplitFacts, list[Finding]]:
    """Facts of a split, and findings about what is in several of its parts."""
    parted = table.append_column(schema.PART, pa.array(given.parts, pa.string()))
    groups, pictures, cases = (
        split.crossings(parted, columns) for columns in (GROUPS, PICTURES, (schema.CASE,))
    )
    tally = Counter(given.parts)
    facts = SplitFacts(
        name=given.name,
        n_images={part: tally[part] for part in split.PARTS if tally[part]},
        n_not_in_split=tally[None],
        n_not_in_data=given.n_not_in_data,
        groups=tuple(name for name, _ in groups),
        pictures=tuple(name for name, _ in pictures),
        cases=tuple(name for name, _ in cases),
    )
    sentences = [text for _, text in groups]
    # The names of the images follow; a hash would mean nothing to the reader.
    sentences += [text.replace(f"{schema.SHA256} {name}", "one image") for name, text in pictures]
    what = [counted(len(groups), "patient or slide", "patients or slides")] if groups else []
    what += [counted(len(pictures), "image")] if pictures else []
    leak = f"{listed(what)} in several parts"
    case = f"{counted(len(cases), 'case')} in several parts ({some(facts.cases, MOST_NAMES)})"
    return facts, [
        Finding.of("leak", f"{given.name} leaks: {leak}", plain(sentences)),
        Finding.of("case_crossing", f"{given.name}: {case}", plain(text for _, text in cases)),
    ]


def _coverage(facts: Sequence[SplitFacts]) -> Finding:
    sentences = []
    for given in facts:
        n, m = given.n_not_in_split, given.n_not_in_data
        sentences += [f"{given.name}: {counted(n, 'image')} without a part"] if n else []
        sentences += [f"{given.name}: {counted(m, 'entry', 'entries')} without an image"] if m else []
    return Finding.of("coverage", "a split and the data have different images", plain(sentences))
