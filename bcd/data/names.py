"""Normalise names of columns and ids of patients as users write them.

A blank, a capital or another Unicode form must not turn one patient into two, nor hide a column.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from bcd import schema
from bcd.text import folded, some, visible

# What spreadsheets and pandas write for missing values.
_UNKNOWN = frozenset({"", "nan", "<na>", "none", "null", "nat", "n/a", "#n/a"})
_INTEGRAL = re.compile(r"([+-]?[0-9]+)\.0+")
# 123456789012, as a narrow cell of a spreadsheet displays and saves it.
_ROUNDED = re.compile(r"[0-9]([.,][0-9]+)?[Ee][+][0-9]+")
# Names often used for one of our columns: a warning suggests ours, but nothing is guessed.
_MEANT: Mapping[str, frozenset[str]] = {
    schema.URI: frozenset({"path", "file", "filename", "file_name", "filepath", "file_path", "image_path"}),
    schema.PATIENT: frozenset({"patient_id", "patientid", "pid", "subject", "subject_id", "person", "donor"}),
    schema.CASE: frozenset({"case_id", "caseid", "accession", "accession_number"}),
    schema.SLIDE: frozenset({"slide_id", "slideid", "slide_name", "wsi"}),
    schema.TUMOR_CLASS: frozenset(
        {"label", "labels", "class", "target", "diagnosis", "category", "tumour_class", "malignant", "y"}
    ),
    schema.SUBTYPE: frozenset({"sub_type", "histology", "tumor_type", "tumour_type"}),
    schema.SITE: frozenset({"hospital", "center", "centre", "clinic", "institution"}),
    schema.PART: frozenset({"split", "fold", "set", "subset", "partition", "phase"}),
    schema.MAGNIFICATION: frozenset({"mag", "zoom", "objective"}),
    schema.MPP: frozenset({"um_per_px", "pixel_size", "pixel_size_um", "microns_per_pixel", "resolution"}),
}


def identity(value: Any) -> str | None:
    """Normalised id of a patient, case or slide; None if it is missing.

    Removes surrounding blanks, invisible characters, Unicode variants (NFKC) and the `.0` that a spreadsheet
    adds: 12.0, "12.0" and " 12" are 12. Leading zeros are kept: 007 is not 7.
    """
    name = visible(str(value))
    if name.casefold() in _UNKNOWN:
        return None
    whole = _INTEGRAL.fullmatch(name)
    return whole[1] if whole else name


def doubtful_ids(ids: Iterable[str | None], what: str) -> list[str]:
    """Warnings that name suspicious ids of a column (`what`).

    These differ only in case, leading zeros or punctuation, or were rounded by a spreadsheet.
    """
    known = {name for name in ids if name is not None}
    groups: dict[str, set[str]] = defaultdict(set)
    for name in known:
        groups[_key(name)].add(name)
    similar = sorted(" and ".join(map(repr, sorted(group))) for group in groups.values() if len(group) > 1)
    rounded = sorted(repr(name) for name in known if _ROUNDED.fullmatch(name))
    warnings = []
    if similar:
        warnings.append(
            f"{what} ids differ only in case, zeros or punctuation: {some(similar, separator='; ')}. They "
            f"count as different {what}s: write the id of one {what} in one way"
        )
    if rounded:
        warnings.append(
            f"{what} ids were rounded by a spreadsheet: {some(rounded)}. Several {what}s may have become "
            "one: save that column as text"
        )
    return warnings


def shared_ids(ids: Iterable[str | None], sites: Iterable[str | None]) -> list[str]:
    """A warning that names the ids of patients that occur at several sites: two people, or one."""
    places: dict[str, set[str]] = defaultdict(set)
    for name, site in zip(ids, sites, strict=True):
        if name is not None and site is not None:
            places[name].add(site)
    found = sorted(f"{name!r} at {some(sorted(at))}" for name, at in places.items() if len(at) > 1)
    if not found:
        return []
    return [
        f"{schema.PATIENT} ids occur at several sites: {some(found, separator='; ')}. Each counts as one "
        f"{schema.PATIENT}: if hospitals use the same numbers, put the {schema.SITE} into "
        f"{schema.PATIENT!r}, as in A/12"
    ]


def _key(name: str) -> str:
    # A slash separates hospital and patient, so it is kept.
    parts = (re.sub(r"(?<!\d)0+(?=\d)", "", part.casefold()) for part in name.split("/"))
    return "/".join(re.sub(r"[\W_]+", "", part) or part for part in parts)


def column(name: str, known: Collection[str]) -> str:
    """Our name of a known column, ignoring case, blanks and a byte-order mark; others unchanged."""
    return folded(name) if folded(name) in known else name


def unused_columns(columns: Collection[str]) -> list[str]:
    """A warning for each unused column whose name is similar to one of ours."""
    return [
        f"column {written!r} is not used; "
        + (f"the column {name!r} is" if name in columns else f"call it {name!r} to use it")
        for written in columns
        for name, others in _MEANT.items()
        if folded(written) in others
    ]


def instead(columns: Collection[str]) -> str:
    """The columns that a table has, and which of them may be meant for ours."""
    return "; ".join([f"it has {some(columns, most=10)}", *unused_columns(columns)])
