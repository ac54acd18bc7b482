"""From a data URI to split rows: index, inspect, quarantine, split, check.

Training and evaluation call the same `prepare`, so that an evaluation makes the split of the training again
and can prove by its fingerprint that it is the same.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from bcd import schema, storage
from bcd.config.training import TrainConfig, TrainingConfig
from bcd.data import breakhis, index, synthetic
from bcd.errors import BcdError, DataError
from bcd.runtime import inspection
from bcd.split import balance, split
from bcd.taxonomy import TUMOR_CLASSES, Target
from bcd.text import counted


class DatasetFacts(BaseModel):
    """What people should know about a data set before they believe a number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = ""
    """URI of the data set."""
    data_fingerprint: str
    split_fingerprint: str = ""
    """Of the split, where there is one."""
    synthetic: bool
    warnings: list[str]
    broken: list[str]
    quarantined: list[str]
    field_height_px: int
    field_width_px: int


def prepare(
    config: TrainConfig, inspected: tuple[pa.Table, DatasetFacts] | None = None
) -> tuple[pa.Table, DatasetFacts]:
    """Split rows (schema `schema.SPLIT`) of a training data set, and the facts about it.

    Args:
        config: of the run.
        inspected: the data, from `load_data_set`, where the caller has already read them.

    Raises:
        DataError: the data cannot be used, or cannot be split as asked.
        LeakageError: the split lets a group or a picture stand on two sides.
    """
    fold = published_fold(config)  # a missing file is found before pixels are read
    table, facts = inspected or load_data_set(config)
    warnings = list(facts.warnings)
    if schema.PART in table.column_names and config.fold:
        table = table.drop_columns(schema.PART)
        warnings.append("the parts that the data come with are not used: --fold divides the images anew")
    elif schema.PART in table.column_names:
        warnings.append("the parts are those that the data come with; --test-fraction is not used")
    try:
        parts = _divided(config, table, fold)
    except BcdError:
        # What the data may lack, such as a column of another name, is often the reason.
        print("".join(f"warning: {text}\n" for text in facts.warnings), end="", flush=True)
        raise
    is_given = schema.PART in table.column_names or config.protocol == "official"
    warnings = split.share_warnings(parts, None if is_given else _wanted(config)) + warnings
    changed = {"split_fingerprint": split.fingerprint(parts), "warnings": warnings}
    return parts, facts.model_copy(update=changed)


def _divided(config: TrainConfig, table: pa.Table, fold: Mapping[str, str] | None) -> pa.Table:
    """The table with the part of every row: its own where it came with one. None leaks."""
    settings = config.protocol, config.seed
    if schema.PART in table.column_names:
        parts = split.keep(table, *settings, config.validation_fraction)
    elif config.cross_folds and config.fold:
        parts = split.assign_fold(
            table, *settings, config.cross_folds, config.fold, config.validation_fraction
        )
    else:
        parts = split.assign(table, *settings, config.validation_fraction, config.test_fraction, fold)
    split.require_no_leak(parts, config.protocol)
    _require_classes(parts)
    return parts


def _wanted(config: TrainConfig) -> dict[str, float]:
    """Share of all images that each part of a division of ours should have."""
    test = 1 / config.cross_folds if config.cross_folds else config.test_fraction
    held_out = {split.VALIDATION: config.validation_fraction, split.TEST: test}
    return held_out | {split.TRAIN: 1 - sum(held_out.values())}


def load_data_set(config: TrainingConfig) -> tuple[pa.Table, DatasetFacts]:
    """The usable rows of a data set (`index.read_index`), every image read once, and the facts about it.

    Raises:
        DataError: the data cannot be used.
    """
    table, warnings = index.read_index(config.data, config.classes)
    table = index.select_magnifications(table, config.magnifications)
    _require_subtypes(config, table)
    table, broken, (height, width) = inspection.inspect_images(table)
    broken_named = inspection.check_bad_fraction(broken, len(table) + len(broken), config.max_bad_fraction)
    reasons: list[str] = []
    if config.quarantine:
        table, _, reasons = split.quarantine(table)
    facts = DatasetFacts(
        data=config.data,
        data_fingerprint=split.data_fingerprint(table),
        synthetic=storage.exists(storage.join(config.data, synthetic.MARKER)),
        warnings=warnings,
        broken=broken_named,
        quarantined=reasons,
        field_height_px=height,
        field_width_px=width,
    )
    return table, facts


def _require_classes(parts: pa.Table) -> None:
    """Raises DataError where the model could not be trained, or its epoch and threshold not be chosen."""
    for part in (split.TRAIN, split.VALIDATION):
        present = set(part_of(parts, part)[schema.TUMOR_CLASS].to_pylist())
        if missing := [name for name in TUMOR_CLASSES if name not in present]:
            raise DataError(
                f"the {part} part has no {missing[0]} image; expected both classes in it: use another "
                "--seed, another --validation-fraction, or more patients of that class"
            )


def _require_subtypes(config: TrainingConfig, table: pa.Table) -> None:
    """Raises DataError where a setting goes by subtypes, and an image has none."""
    flags = [f"--{name} subtype" for name in ("target", "balance") if getattr(config, name) == "subtype"]
    missing = table.filter(pc.is_null(table[schema.SUBTYPE]))[schema.IMAGE_ID].to_pylist()
    if flags and missing:
        raise DataError(
            f"{flags[0]} needs the subtype of every image, but {len(missing):,} have none, "
            f"{missing[0]} among them"
        )


def published_fold(config: TrainConfig) -> Mapping[str, str] | None:
    """Part of every file name in the published fold of a run; None for the other protocols.

    Raises:
        BcdError: the fold file is missing or damaged.
    """
    if config.folds is None:
        return None
    name = f"dsfold{config.fold}.txt"
    return breakhis.read_fold(storage.read_bytes(storage.join(config.folds, name)).decode(), name)


def describe_split(config: TrainConfig, table: pa.Table, facts: DatasetFacts) -> list[str]:
    """The split in lines for people."""
    lines = [f"warning: {text}" for text in facts.warnings]
    lines += [f"left out, broken: {text}" for text in facts.broken]
    lines += [f"left out, quarantined: {text}" for text in facts.quarantined]
    for part in split.PARTS:
        rows = part_of(table, part)
        patients = rows[schema.PATIENT]
        of = "unknown patients" if patients.null_count else counted(len(patients.unique()), "patient")
        counts = ", ".join(f"{n:,} {name}" for name, n in balance.counts(rows, "tumor_class").items())
        lines.append(f"{part}: {counted(len(rows), 'image')} of {of} ({counts})")
    if config.protocol in split.LEAKY:
        lines.append("warning: --protocol image puts patients on both sides; its numbers mislead")
    return lines


def part_of(table: pa.Table, part: str) -> pa.Table:
    """The rows of one part of a split."""
    return table.filter(pa.array([name == part for name in table[schema.PART].to_pylist()]))


def class_counts(config: TrainConfig, table: pa.Table) -> dict[str, Any]:
    """Images per subtype (or class) in each part, and in training after balancing: for the report."""
    by: Target = "tumor_class" if table[schema.SUBTYPE].null_count else "subtype"
    train = part_of(table, "train")
    balanced = balance.upsample(train, config.balance, config.seed)
    return {
        "by": by,
        "parts": {part: balance.counts(part_of(table, part), by) for part in split.PARTS},
        "balanced": balance.counts(balanced, by),
    }
