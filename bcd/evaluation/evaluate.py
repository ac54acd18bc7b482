"""Evaluate a model on patients that it has never seen: predictions, metrics, report, card."""

import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bcd import lease, provenance, schema, storage
from bcd.config.checks import AuditConfig
from bcd.config.evaluation import EvaluateConfig
from bcd.config.options import AUTO, CLOSED_FORM, OFF
from bcd.config.training import TrainConfig
from bcd.errors import DataError
from bcd.evaluation import artifacts
from bcd.lease import Lease
from bcd.metrics import aggregate
from bcd.model import bundle
from bcd.model.card import Card, model_id
from bcd.model.engines.choice import choose_engine
from bcd.preflight import signing
from bcd.reports import model_report
from bcd.runtime import cluster, datasets, output, predict, run_directory
from bcd.runtime.prepare import (
    DatasetFacts,
    class_counts,
    load_data_set,
    located,
    part_of,
    prepare,
    store_of,
)
from bcd.runtime.tracking.board import write_board
from bcd.runtime.tracking.follow import followed
from bcd.split import duplicates, split
from bcd.text import counted, without_folders

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions"
# What is tested: the test part of the model's own data, data that it has not seen, or others with --force; or
# data of which it is not known whether a published model has seen them.
HELD_OUT, EXTERNAL, FORCED, UNPROVEN = "held_out", "external", "forced", "unproven"


def run(config: EvaluateConfig) -> str:
    """Evaluate a bundle on the test part of its data set, or on another, and return the URI of the output.

    The split is repeated from the settings in the card; the fingerprint proves that it is the same.

    Raises:
        DataError: the model may have been trained on the data.
    """
    config = config.model_copy(update={"model": storage.pinned(config.model)})
    card_sha256 = signing.verified(config.model, config.require_signature)
    card = bundle.read_card(config.model, card_sha256)
    if config.against:
        artifacts.require_images(config.against)
    folder, job = place_of(config)
    beside = job == output.TRAIN
    with lease.held(folder, config.wait) as own:
        owner = output.claim_folder(folder, job, own.require)
        name, settings = card.training["name"], config.model_dump(mode="json")
        apart = () if beside else (None, settings, config.model)
        with followed(folder, name if beside else f"evaluation of {name}", *apart):
            _evaluate_into(config, card, card_sha256, folder, beside, owner, own)
    return folder


def place_of(config: EvaluateConfig) -> tuple[str, str]:
    """The folder of an evaluation, and the job that it belongs to: that of the training, if it is beside the
    bundle. Raises DataError and ConfigError where nothing may be written there."""
    run_uri = storage.parent(config.model)
    folder = config.output or run_uri
    beside = storage.absolute(folder) == run_uri
    if beside and output.owner(run_uri) != output.TRAIN:
        raise DataError(f"{run_uri} is not the directory of a training: name an --output for the evaluation")
    job = output.TRAIN if beside else output.EVALUATE
    output.read_marker(folder, job)
    return folder, job


def _evaluate_into(
    config: EvaluateConfig,
    card: Card,
    card_sha256: str | None,
    folder: str,
    beside: bool,
    owner: str,
    own: Lease,
) -> None:
    """Evaluate, and write into the folder, of which `owner` is the id."""
    cluster.connect()
    run_uri = storage.parent(config.model)
    changed: dict[str, Any] = {"data": config.data, "prepared": _prepared_beside(config.prepared, run_uri)}
    changed |= {"classes": config.classes} if config.classes else {}
    training = TrainConfig(**card.training | changed)
    table, facts, kind = _tested(config, card, training, *load_data_set(training))
    if kind != HELD_OUT and beside:
        raise DataError(f"{config.data} is not the model's own data: name an --output for its evaluation")
    has_gpus = cluster.total_resources()["GPU"] > 0
    engine = choose_engine(config.engine, card.architecture, card.cam(CLOSED_FORM), has_gpus)
    settings = predict.Settings.of(config, model_id(card), card_sha256=card_sha256, engine=engine)
    table = located(table, store_of(training))
    own.require()
    evaluate(config.model, table, facts, folder, owner, settings, kind, config.against)


def _prepared_beside(given: str, run_uri: str) -> str:
    """Where prepared images are, or `OFF`: by default those of the run, if they are beside it."""
    if given != AUTO:
        return given
    uri = storage.join(storage.parent(run_uri), output.PREPARED)
    return uri if output.owner(uri) == output.PREPARED else OFF


def _tested(
    config: EvaluateConfig, card: Card, training: TrainConfig, table: pa.Table, facts: DatasetFacts
) -> tuple[pa.Table, DatasetFacts, str]:
    """Rows with their part, the facts, and what the test part is, such as `HELD_OUT`."""
    if facts.data_fingerprint == card.data_fingerprint and card.study is None:
        parts, facts = prepare(training, (table, facts))
        known = run_directory.read_split(storage.parent(config.model))
        same = facts.split_fingerprint == card.split_fingerprint
        if same and (known is None or not split.changes(known, parts)):
            return parts, facts, HELD_OUT
    whole = pa.array([split.TEST] * len(table))
    table = schema.fill(table, schema.INDEX)  # without parts given with the data
    parts = table.append_column(schema.SPLIT.field(schema.PART), whole)
    if card.published:
        return parts, facts.model_copy(update={"warnings": [*card.warnings, *facts.warnings]}), UNPROVEN
    doubts = _doubts(config.model, table)
    if not doubts:
        return parts, facts, EXTERNAL
    if config.force:
        return parts, facts.model_copy(update={"warnings": [*doubts, *facts.warnings]}), FORCED
    why = f"{config.data} is not the data set that {config.model} was trained on, as it was then"
    if card.study:
        why = f"{config.model} is of a whole study, none of whose images was left to test it on"
    raise DataError(
        f"{why}, and {'; '.join(doubts)}: its numbers would not be honest. --force measures and marks them"
    )


def _doubts(model_uri: str, table: pa.Table) -> list[str]:
    """Why a model may have seen the images, or their patients, in training; empty if it provably has not."""
    known = run_directory.read_split(storage.parent(model_uri))
    if known is None:
        return ["there is no split.parquet beside the model to show what it has seen"]
    seen = known.filter(pc.is_in(known[schema.PART], pa.array([split.TRAIN, split.VALIDATION])))
    doubts = []
    if n_seen := _n_seen(seen, table):
        doubts.append(
            f"{n_seen:,} of its images, or others of their patients or cases, were seen in training"
        )
    for rows, whose in ((table, "its images"), (seen, "the images seen in training")):
        if unknown := rows[schema.PATIENT].null_count:
            doubts.append(f"{unknown:,} of {whose} name no patient, who may be in both")
    if seen[schema.PHASH].null_count:
        doubts.append("the run, of an older version of bcd, keeps no perceptual hashes to find copies")
    return doubts + _copies(seen, table)


def _n_seen(seen: pa.Table, table: pa.Table) -> int:
    """Number of images whose content, patient, case or slide was in training or validation."""
    keys = (schema.SHA256, schema.PATIENT, schema.CASE, schema.SLIDE)
    used = {(key, row[key]) for row in seen.to_pylist() for key in keys if row[key] is not None}
    return sum(any((key, row[key]) in used for key in keys) for row in table.to_pylist())


def _copies(seen: pa.Table, table: pa.Table) -> list[str]:
    """A sentence if images look like others that were seen: saved again, scaled or slightly moved."""
    near_bits = AuditConfig.model_fields["near_bits"].default
    nearest = duplicates.nearest(table, seen, near_bits, duplicates.BLANK)
    copies = np.flatnonzero(nearest >= 0)
    if not len(copies):
        return []
    name = table[schema.IMAGE_ID][copies[0]].as_py()
    like = seen[schema.IMAGE_ID][nearest[copies[0]]].as_py()
    n = len(copies)
    return [f"{n:,} of its images look{'s' if n == 1 else ''} like one seen in training ({name} like {like})"]


def evaluate(
    model_uri: str,
    table: pa.Table,
    facts: DatasetFacts,
    folder: str,
    owner: str,
    settings: predict.Settings | None = None,
    kind: str = HELD_OUT,
    against: str | None = None,
) -> dict[str, Any]:
    """Score the test part through the same pipeline as archives; write predictions, metrics, card and report.

    They are written into `folder`, of which `owner` is the id (see `output.claim_folder`), each atomically.
    """
    settings = settings or predict.Settings(model_uri, model_id(bundle.read_card(model_uri)))
    card = predict.read_card_of(settings)
    test = part_of(table, split.TEST)
    logger.info(f"scoring the test part: {counted(len(test), 'image')}")
    predictions_uri = storage.join(folder, PREDICTIONS)
    inputs = schema.fill(test, schema.READING)
    dataset = datasets.row_dataset(inputs, settings.batch_size, **cluster.beside_models())
    rows = predict.score_rows(dataset, settings)
    with predict.one_model(settings):
        predict.write_predictions(rows, predictions_uri, owner)
    frame = artifacts.with_truth(predictions_uri, test, card)
    images = artifacts.images_of(frame, card, predictions_uri)
    unscored = aggregate.unscored(frame)
    about = _about(card, facts, kind) | {"model": without_folders(model_uri)}
    measured = about | artifacts.measure_run(images, unscored, card.classes)
    measured |= {name: getattr(card, name) for name in ("threshold", "temperature", "operating_point")}
    measured["summary"] = model_report.summary(measured)
    measured["too_few_patients"] = model_report.too_few_patients(measured)
    if kind in (HELD_OUT, UNPROVEN):
        _write_metrics(card, measured, model_uri)
    if against:
        measured["comparison"] = artifacts.compared(images, against)
    shown = about | facts.model_dump() | {"input_size_px": card.input_size_px}
    shown |= {"evidence": card.evidence, "published": card.published and card.published.model_dump()}
    if kind == HELD_OUT:
        shown |= class_counts(TrainConfig(**card.training), table)
    run_uri = storage.parent(model_uri)
    in_run = storage.exists(storage.join(run_uri, run_directory.HISTORY))
    history = run_directory.read_json(run_uri, run_directory.HISTORY) if in_run else []
    artifacts.write_artifacts(folder, measured, history, images, shown, unscored)
    if in_run and storage.absolute(folder) == storage.absolute(run_uri):
        write_board(folder)
    return measured


def _write_metrics(card: Card, measured: dict[str, Any], model_uri: str) -> None:
    """Write metrics into the card, unless the bundle is signed, which would make its signature invalid, or is
    on the hub."""
    signed = bundle.is_signed(model_uri)
    if signed or not storage.is_writable(model_uri):
        why = "signed" if signed else "only read"
        logger.info(f"{model_uri} is {why} and keeps its card: the metrics are in the output only")
    else:
        bundle.write_card(card.model_copy(update={"metrics": measured}), model_uri)


def _about(card: Card, facts: DatasetFacts, kind: str) -> dict[str, Any]:
    return {
        schema.MODEL_ID: model_id(card),
        "title": f"Breast cancer detection: {card.training['name']}",
        "data": without_folders(facts.data or card.training["data"]),
        "target": card.target,
        "classes": card.classes,
        "weights": card.training["weights"],
        "best_epoch": card.validation.get(schema.EPOCH),
        "protocol": card.protocol,
        "fold": card.fold,
        "held_out": card.training.get("held_out"),
        "seed": card.seed,
        "leaky": card.leaky and kind == HELD_OUT,
        "synthetic": card.synthetic or facts.synthetic,
        "tested_on": kind,
        "external": kind == EXTERNAL,
        "forced": kind == FORCED,
        "data_fingerprint": facts.data_fingerprint,
        "split_fingerprint": facts.split_fingerprint,
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "command": without_folders(provenance.command()),
    }
