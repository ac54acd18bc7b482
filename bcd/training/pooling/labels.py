"""Labels of slides, and the split of the slides that have one: rows like those of images, one per slide."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema
from bcd.config.scoring import PoolConfig
from bcd.data import index, manifest, names
from bcd.errors import DataError
from bcd.split import quarantine, split
from bcd.taxonomy import given_names
from bcd.text import counted, some
from bcd.training.pooling.bags import ScoredSlides


@dataclass(frozen=True)
class LabelledSlides:
    """Rows of `schema.SPLIT`, whose `image_id` is the slide: those with a part, and those without, which have
    no tile or are quarantined. And what is doubtful about them."""

    parts: pa.Table
    others: pa.Table
    warnings: list[str]


def split_slides(config: PoolConfig, scored: ScoredSlides) -> LabelledSlides:
    """Read the labels of `config.labels`, join them with the scored slides, and divide these by patient.

    Raises:
        DataError: a label contradicts another or the scores, no slide has one, or a class has too few
            patients.
        LeakageError: parts given with the labels divide a patient.
    """
    assert config.labels is not None
    given = read_labels(config.labels, config.classes)
    labelled, warnings = join_labels(config.labels, given, scored)
    usable = labelled.filter(pc.is_valid(labelled[schema.SHA256]))  # those with a tile
    if n := len(labelled) - len(usable):
        warnings.append(f"{counted(n, 'labelled slide')} without a tile that has a result: left out")
    kept = quarantine.apply_rules(usable)
    warnings += kept.reasons
    rows = kept.kept
    if schema.PART in rows.column_names:
        parts = split.keep(rows, config.protocol, config.seed, config.validation_fraction)
    else:
        fractions = config.validation_fraction, config.test_fraction
        parts = split.assign(rows, config.protocol, config.seed, *fractions)
    split.require_no_leak(parts, config.protocol)
    used = pc.is_in(labelled[schema.IMAGE_ID], parts[schema.IMAGE_ID].combine_chunks())
    others = schema.fill(labelled.filter(pc.invert(used)), schema.INDEX)
    warnings += split.share_warnings(parts)
    return LabelledSlides(schema.fill(parts, schema.SPLIT), schema.fill(others, schema.SPLIT), warnings)


def read_labels(uri: str, classes: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Class, subtype, patient, case and part (None where unknown) of each slide in a table of labels.

    A slide may be named again with the same values. `classes` as in `index.read_index`.

    Raises:
        DataError: a column is missing, a cell cannot be used, or two rows of a slide contradict each other;
            names the lines.
    """
    found, named = manifest.read_manifest(uri), given_names(classes)
    key = schema.SLIDE if schema.SLIDE in found.columns else schema.IMAGE_ID
    for columns in ((key,), (schema.TUMOR_CLASS, schema.SUBTYPE)):
        if not set(columns) & set(found.columns):
            needed = " or ".join(map(repr, columns if key not in columns else (schema.SLIDE, key)))
            raise DataError(f"{uri}: needs a column {needed}; {names.instead(found.columns)}")
    labels: dict[str, dict[str, Any]] = {}
    first: dict[str, str] = {}
    for row in found.rows:
        if (slide := row.cells.get(key)) is None:
            raise DataError(f"{row.where}: the {key} is empty; expected the name of a slide in the scores")
        ids = {name: names.identity(row.cells.get(name)) for name in (schema.PATIENT, schema.CASE)}
        label = index.labels_of_row(row, named) | ids | {schema.PART: index.part_of_row(row)}
        before = labels.setdefault(slide, label)
        for name, value in label.items():
            if before[name] != value:
                raise DataError(
                    f"{row.where}: the {name} of slide {slide} is {value}, in {first[slide]} it is "
                    f"{before[name]}; expected one for each slide"
                )
        first.setdefault(slide, row.where.rpartition(", ")[2])
    return labels


def join_labels(
    uri: str, labels: dict[str, dict[str, Any]], scored: ScoredSlides
) -> tuple[pa.Table, list[str]]:
    """Rows of the scored slides that have a label (`schema.INDEX`, with `part` if it is given), and warnings
    of labels without a slide and of slides without a label.

    Raises:
        DataError: no slide has a label, or labels and scores name different patients.
    """
    slides = {row[schema.SLIDE]: row for row in scored.table.to_pylist()}
    absent, unlabelled = sorted(labels.keys() - slides.keys()), sorted(slides.keys() - labels.keys())
    if not labels.keys() & slides.keys():
        raise DataError(
            f"no label of {uri} is of a slide in {scored.scores}: it names {some(absent, 2)}, the slides are "
            f"called {some(slides, 2)}"
        )
    warnings = []
    if absent:
        warnings.append(f"{counted(len(absent), 'label')} without a scored slide: {some(absent)}")
    if unlabelled:
        warnings.append(f"{counted(len(unlabelled), 'scored slide')} without a label: {some(unlabelled)}")
    rows = [_row(slides[name], labels[name]) for name in sorted(labels.keys() & slides.keys())]
    warnings += index.check_parts(uri, rows)
    form = schema.SPLIT if schema.PART in rows[0] else schema.INDEX
    table = pa.Table.from_pylist(rows, schema=form)
    for column in (schema.PATIENT, schema.CASE):
        warnings += names.doubtful_ids(table[column].to_pylist(), column)
    return table, warnings


def _row(slide: dict[str, Any], label: dict[str, Any]) -> dict[str, Any]:
    name, patients = slide[schema.SLIDE], (label[schema.PATIENT], slide[schema.PATIENT])
    if None not in patients and len(set(patients)) > 1:
        raise DataError(
            f"slide {name} is of patient {patients[0]} in the labels, of {patients[1]} in the scores: "
            "correct one of them"
        )
    known = {schema.PATIENT: patients[0] if patients[0] is not None else patients[1]}
    same = {column: slide[column] for column in (schema.SLIDE, schema.URI, schema.SHA256)}
    return {schema.IMAGE_ID: name} | same | label | known
