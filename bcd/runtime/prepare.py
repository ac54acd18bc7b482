"""From a data URI to split rows: index, inspect, quarantine, split, check.

An evaluation calls the same `prepare` as the training, and proves by its fingerprint that the split is equal.
"""

import logging
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from bcd import schema, storage
from bcd.config.options import AUTO, HOLDING_OUT, OFF
from bcd.config.training import CrossvalConfig, TrainConfig, TrainingConfig
from bcd.data import breakhis, index, synthetic
from bcd.errors import BcdError, DataError
from bcd.imaging import prepared
from bcd.imaging.prepared import Store
from bcd.runtime import inspection, output
from bcd.split import balance, quarantine, split
from bcd.taxonomy import LEFT_OUT, TUMOR_CLASSES, Target
from bcd.text import counted, size

logger = logging.getLogger(__name__)


class DatasetFacts(BaseModel):
    """Provenance and limits of a data set, for the report."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str = ""
    data_fingerprint: str
    split_fingerprint: str = ""
    synthetic: bool
    warnings: list[str]
    broken: list[str]
    quarantined: list[str]
    # Images in no part, because a magnification or site is held out.
    left_out: int = 0
    field_height_px: int
    field_width_px: int


def prepare(
    config: TrainConfig, inspected: tuple[pa.Table, DatasetFacts] | None = None
) -> tuple[pa.Table, DatasetFacts]:
    """Split rows (`schema.SPLIT`) of a data set and the facts about it; `inspected` is from `load_data_set`.

    Raises:
        DataError: the data cannot be used, or not be split as requested.
        LeakageError: a group or an image is in more than one part.
    """
    fold = published_fold(config)  # first, to find a missing file before pixels are read
    table, facts = inspected or load_data_set(config)
    warnings = list(facts.warnings)
    if schema.PART in table.column_names and (config.fold or config.held_out):
        table = table.drop_columns(schema.PART)
        flag = "--fold" if config.fold else "--held-out"
        warnings.append(
            f"the parts given with the data are not used: {flag} divides the images into new parts"
        )
    elif schema.PART in table.column_names:
        warnings.append("the parts are those given with the data; --test-fraction is not used")
    try:
        parts = _divided(config, table, fold)
    except BcdError:
        # They often name the cause, such as a column of another name.
        log_warnings(facts)
        raise
    is_given = schema.PART in table.column_names or config.protocol in ("official", *HOLDING_OUT)
    warnings = split.share_warnings(parts, None if is_given else _wanted(config)) + warnings
    changed = {"split_fingerprint": split.fingerprint(parts), "warnings": warnings}
    n_left_out = len(part_of(parts, LEFT_OUT))
    return parts, facts.model_copy(update=changed | {"left_out": n_left_out})


def _divided(config: TrainConfig, table: pa.Table, fold: Mapping[str, str] | None) -> pa.Table:
    """The table with the part of every row, checked for leaks and classes."""
    settings = config.protocol, config.seed
    share = config.validation_fraction
    if schema.PART in table.column_names:
        parts = split.keep(table, *settings, share)
    elif config.held_out:
        folds = (config.cross_folds, config.fold) if config.cross_folds and config.fold else None
        parts = split.hold_out(table, *settings, config.held_out, share, config.test_fraction, folds)
    elif config.cross_folds and config.fold:
        parts = split.assign_fold(table, *settings, config.cross_folds, config.fold, share)
    else:
        parts = split.assign(table, *settings, share, config.test_fraction, fold)
    split.require_no_leak(parts, config.protocol, config.held_out)
    _require_classes(parts)
    return parts


def _wanted(config: TrainConfig) -> dict[str, float]:
    """Intended share of all images in each part."""
    test = 1 / config.cross_folds if config.cross_folds else config.test_fraction
    held_out = {split.VALIDATION: config.validation_fraction, split.TEST: test}
    return held_out | {split.TRAIN: 1 - sum(held_out.values())}


def listed_rows(config: TrainingConfig) -> tuple[pa.Table, list[str]]:
    """The rows of a data set that a training may use, found without opening an image, and warnings, as of
    `index.read_index`. Raises DataError where a setting requires what they lack."""
    table, warnings = index.read_index(config.data, config.classes)
    table = index.select_magnifications(table, config.magnifications)
    _require_subtypes(config, table)
    return table, warnings


def load_data_set(config: TrainingConfig) -> tuple[pa.Table, DatasetFacts]:
    """The usable rows of a data set (`index.read_index`), found by reading every image, and its facts.

    Images are prepared in the same pass, if `store_of` has room for them.
    """
    table, warnings = listed_rows(config)
    table, broken, (height, width) = inspection.inspect_images(table, *_preparing(config, len(table)))
    broken_lines = inspection.check_bad_fraction(broken, len(table) + len(broken), config.max_bad_fraction)
    reasons: list[str] = []
    if config.quarantine:
        table, _, reasons = quarantine.apply_rules(table)
    facts = DatasetFacts(
        data=config.data,
        data_fingerprint=split.data_fingerprint(table),
        synthetic=storage.exists(storage.join(config.data, synthetic.MARKER)),
        warnings=warnings,
        broken=broken_lines,
        quarantined=reasons,
        field_height_px=height,
        field_width_px=width,
    )
    return table, facts


def held_out_values(config: CrossvalConfig) -> tuple[str, ...]:
    """The magnifications or sites that a study holds out, one after another: by default all of its data.

    Raises `DataError` if the data do not say them.
    """
    named = [protocol for protocol in config.protocols() if protocol in HOLDING_OUT]
    if config.held_out or not named:
        return config.held_out
    table, _ = index.read_index(config.data, config.classes)
    table = index.select_magnifications(table, config.magnifications)
    return tuple(split.values_of(table, named[0]))


def store_of(config: TrainingConfig) -> Store | None:
    """Where the prepared images of a run are, if it keeps any."""
    if config.prepared == OFF:
        return None
    uri = storage.join(config.output, output.PREPARED) if config.prepared == AUTO else config.prepared
    return Store(uri, *config.input_size_px)


def _preparing(config: TrainingConfig, n_images: int) -> tuple[Store, pa.Table] | tuple[()]:
    """The store in which to prepare images, and its index; nothing where there is none, or no room."""
    if (store := store_of(config)) is None:
        return ()
    output.claim_folder(store.uri, output.PREPARED)
    found, n_unusable = prepared.list_images(store)
    if n_unusable:
        damaged = counted(n_unusable, "shard")
        logger.warning(f"{damaged} in {store.folder} cannot be used: damaged or incomplete")
    n_new = max(0, n_images - len(found))
    if not store.has_room(n_new):
        needed = size(n_new * store.image_bytes)
        logger.warning(f"no images are prepared in {store.uri}: {needed} would leave too little space")
        return ()
    total = size(n_images * store.image_bytes)
    logger.info(f"prepared images: {total} in {store.folder}, which has {counted(len(found), 'image')}")
    return store, found


def located(rows: pa.Table, store: Store | None) -> pa.Table:
    """Rows with `sha256`, with the places of their prepared images as far as there are any."""
    return prepared.with_places(rows, prepared.list_images(store)[0]) if store else rows


def _require_classes(parts: pa.Table) -> None:
    """Raises DataError if the training part, or validation, which chooses the threshold, lacks a class."""
    for part in (split.TRAIN, split.VALIDATION):
        present = part_of(parts, part)[schema.TUMOR_CLASS].to_pylist()
        if missing := [name for name in TUMOR_CLASSES if name not in present]:
            raise DataError(
                f"the {part} part has no {missing[0]} image; expected both classes in it: use another "
                "--seed, another --validation-fraction, or more patients of that class"
            )


def _require_subtypes(config: TrainingConfig, table: pa.Table) -> None:
    """Raises DataError if a setting requires subtypes, and an image has none."""
    flags = [f"--{name} subtype" for name in ("target", "balance") if getattr(config, name) == "subtype"]
    missing = table.filter(pc.is_null(table[schema.SUBTYPE]))[schema.IMAGE_ID].to_pylist()
    if flags and missing:
        raise DataError(
            f"{flags[0]} needs the subtype of every image, but {len(missing):,} have none, first {missing[0]}"
        )


def published_fold(config: TrainConfig) -> Mapping[str, str] | None:
    """Part of every file name in the published fold of a run; None for other protocols."""
    if config.folds is None:
        return None
    name = f"dsfold{config.fold}.txt"
    return breakhis.read_fold(storage.read_bytes(storage.join(config.folds, name)).decode(), name)


def describe_split(config: TrainConfig, table: pa.Table, facts: DatasetFacts) -> list[str]:
    """The lines that describe the split in the log."""
    lines = [f"left out, broken: {text}" for text in facts.broken]
    lines += [f"left out, quarantined: {text}" for text in facts.quarantined]
    if facts.left_out:
        lines.append(
            f"left out, in no part: {counted(facts.left_out, 'image')}, at {config.held_out} of patients who "
            "are not tested, or at others of those who are"
        )
    for part in split.PARTS:
        rows = part_of(table, part)
        patients = rows[schema.PATIENT]
        of = "unknown patients" if patients.null_count else counted(len(patients.unique()), "patient")
        counts = ", ".join(f"{n:,} {name}" for name, n in balance.counts(rows, "tumor_class").items())
        lines.append(f"{part}: {counted(len(rows), 'image')} of {of} ({counts})")
    return lines


def log_warnings(facts: DatasetFacts, protocol: str | None = None) -> None:
    """Log what is doubtful about a data set, and about its split by a protocol."""
    for text in facts.warnings:
        logger.warning(text)
    if protocol in split.LEAKY:
        logger.warning(f"--protocol {protocol} puts patients into more than one part; its numbers mislead")


def part_of(table: pa.Table, part: str) -> pa.Table:
    """The rows of one part of a split."""
    return table.filter(pc.equal(table[schema.PART], part))


def class_counts(config: TrainConfig, table: pa.Table) -> dict[str, Any]:
    """Images per subtype (or class) in each part, and in training after balancing, for the report."""
    by: Target = "tumor_class" if table[schema.SUBTYPE].null_count else "subtype"
    train = part_of(table, "train")
    balanced = balance.upsample(train, config.upsampled(), config.seed)
    return {
        "by": by,
        "parts": {part: balance.counts(part_of(table, part), by) for part in split.PARTS},
        "balanced": balance.counts(balanced, by),
    }
