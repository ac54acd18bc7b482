"""Cross-validation: train and evaluate one model per fold, and report over all of them."""

import logging
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import ray
from ray.exceptions import RayTaskError
from ray.train import Result

from bcd import lease, provenance, schema, storage
from bcd.config import log
from bcd.config.options import HOLDING_OUT, OFF, Protocol
from bcd.config.training import CrossvalConfig, TrainConfig, TrainingConfig
from bcd.errors import DataError
from bcd.evaluation import artifacts, evaluate
from bcd.lease import Lease
from bcd.metrics import aggregate, compare
from bcd.model import bundle, novelty
from bcd.model.card import Study
from bcd.reports import model_report
from bcd.runtime import cluster, prepare, run_directory
from bcd.runtime.prepare import DatasetFacts
from bcd.runtime.tracking.follow import followed
from bcd.split import split
from bcd.taxonomy import LEFT_OUT, N_FOLDS, TUMOR_CLASSES
from bcd.text import counted, without_folders
from bcd.training import export, feed, train
from bcd.training.feed import Held

logger = logging.getLogger(__name__)

# The test parts of all folds together.
OUT_OF_FOLD = "the out-of-fold set"


class Fold(NamedTuple):
    """One training of an arm; repeat and fold count from 1."""

    repeat: int
    fold: int
    config: TrainConfig

    @property
    def draw(self) -> int:
        """Its repeat, which tests each image at most once, or the fold: published folds overlap."""
        return self.fold if self.config.protocol == "official" else self.repeat

    @property
    def uri(self) -> str:
        """Its run directory."""
        return storage.join(self.config.output, self.config.name)


class Arm(NamedTuple):
    """Results under one protocol."""

    protocol: Protocol
    measured: dict[str, Any]
    images: pd.DataFrame
    unscored: pd.DataFrame
    facts: dict[str, Any]


def run(config: CrossvalConfig) -> str:
    """Train and evaluate every fold of every protocol, and report; returns the URI of the study.

    Running the same config again trains the missing folds; a finished study is only compared with `against`,
    and gets the bundle of `export` if it lacks it.

    Raises:
        DataError: the data cannot be used, or differ from those of the finished folds.
    """
    config = train.resolved(config)
    config = config.model_copy(update={"held_out": prepare.held_out_values(config)})
    uri = storage.join(config.output, config.name)
    if config.against:
        artifacts.require_images(config.against)
    folds = {protocol: list(folds_of(config, uri, protocol)) for protocol in config.protocols()}
    finished = run_directory.begin_run(config, uri) and _is_published(folds.values())
    # One of folds that are written again would be of others.
    made = finished and export.fault(storage.join(uri, config.export)) is None
    exported = config.export == "none" or made
    if finished and exported and not config.against:
        logger.info(f"{uri} is finished: see report.html there, or choose another --name to run it again")
        return uri
    started = time.time()
    with lease.held(uri, config.wait) as own, followed(uri, config.name, _nested(folds.values())):
        cluster.connect(several_trainings=True)
        inspected = None
        if not finished:
            inspected = _train_missing(config, own, [fold for arm in folds.values() for fold in arm])
        arms = [_arm(protocol, arm, config) for protocol, arm in folds.items()]
        own.require()
        _report(config, uri, arms)
        if not finished:
            run_directory.finish_run(config, uri, {"seconds": round(time.time() - started, 1)})
        if not exported:
            main = _main(arms)
            _export(config, own, folds[main.protocol], main, inspected)
    return uri


def _is_published(arms: Iterable[Sequence[Fold]]) -> bool:
    """Whether the bundle of every fold of a finished study is usable."""
    faults = [fault for arm in arms for fold in arm if (fault := export.fault(fold.uri))]
    if faults:
        logger.info(f"{faults[0]}. Writing new bundles from the checkpoints")
    return not faults


def folds_of(config: CrossvalConfig, uri: str, protocol: Protocol) -> Iterator[Fold]:
    """The folds of one arm; each is a run as of `jobs/train.py`."""
    shared = config.model_dump(include=set(TrainingConfig.model_fields) - {"output", "name", "seed", "folds"})
    store = prepare.store_of(config)
    for repeat in range(1, config.repeats + 1):
        for fold, division in enumerate(_divisions(config, protocol), 1):
            settings = shared | division
            settings |= {
                "output": storage.join(uri, protocol),
                "name": f"repeat-{repeat}-fold-{fold}",
                "seed": config.seed + repeat - 1,
                "prepared": OFF if store is None else store.uri,
                "protocol": protocol,
                # One GPU per fold, and several folds at a time.
                "num_workers": "1" if config.num_workers == "auto" else config.num_workers,
            }
            yield Fold(repeat, fold, TrainConfig(**settings))


def _divisions(config: CrossvalConfig, protocol: Protocol) -> list[dict[str, Any]]:
    """The settings in which the folds of a repeat differ."""
    if protocol == "official":
        return [{"folds": config.folds, "fold": fold} for fold in range(1, N_FOLDS + 1)]
    folds = [{"cross_folds": config.k, "fold": fold} for fold in range(1, config.k + 1)]
    if protocol not in HOLDING_OUT:
        return folds
    # A site is tested whole, by one model.
    return [
        {"held_out": value} | fold
        for value in config.held_out
        for fold in ([{}] if protocol == "site" else folds)
    ]


def _train_missing(
    config: CrossvalConfig, own: Lease, folds: Sequence[Fold]
) -> tuple[pa.Table, DatasetFacts]:
    """Train the missing folds; data that cannot be split end the study before any training. Returns the data
    set."""
    for fold in folds:
        prepare.published_fold(fold.config)  # before pixels are read
    inspected = prepare.load_data_set(config)
    for fold in folds:
        # One image more or less changes all folds: some images would be tested twice, and others never.
        run_directory.resume(fold.config, fold.uri, inspected[0])
        for text in prepare.prepare(fold.config, inspected)[1].warnings:
            if text not in inspected[1].warnings:
                logger.warning(f"{name_of(fold)}: {text}")
    run_directory.claim_run(config, own.uri, own.require)
    placed = prepare.located(inspected[0], prepare.store_of(folds[0].config))
    _train(folds, inspected, config.parallel, feed.hold(folds[0].config, placed))
    return inspected


def _train(
    folds: Sequence[Fold],
    inspected: tuple[pa.Table, DatasetFacts],
    parallel: int | None,
    held: Held | None = None,
) -> None:
    """Train and evaluate the folds, as many at a time as the cluster holds, with the images in memory."""
    at_once = min(len(folds), parallel or cluster.room(folds[0].config))
    if at_once == 1:
        for number, fold in enumerate(folds, 1):
            logger.info(f"\n{name_of(fold)}: {number} of {len(folds)}")
            train.run(fold.config, inspected, held=held, follows=False)
        return
    logger.info(f"{counted(len(folds), 'fold')}, {at_once} at a time")
    # A fold drives its own workers and needs no CPU of its own. Lost with its node, it resumes elsewhere.
    remote = ray.remote(num_cpus=0, max_retries=folds[0].config.max_failures)(_train_apart)
    shared, waiting, command = ray.put(inspected), list(folds), provenance.command()
    running: dict[ray.ObjectRef, Fold] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            fold = waiting.pop(0)
            running[remote.remote(fold.config, shared, cluster.per_node(at_once), held, command)] = fold
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        fold = running.pop(done)
        try:
            ray.get(done)
        except RayTaskError as error:
            raise error.cause from error
        left = len(waiting) + len(running)
        logger.info(f"{name_of(fold)}: finished, {left} of {len(folds)} left")


def _train_apart(
    config: TrainConfig,
    inspected: tuple[pa.Table, DatasetFacts],
    runs_per_node: int,
    held: Held | None,
    command: str,
) -> str:
    """`train.run` in a process of Ray, as of the command of the study."""
    log.hand_on("crossval")
    with provenance.stating(command):
        return train.run(config, inspected, runs_per_node, held, follows=False)


def _nested(arms: Iterable[Sequence[Fold]]) -> dict[str, str]:
    return {name_of(fold): fold.uri for arm in arms for fold in arm}


def name_of(fold: Fold) -> str:
    """`case, repeat 1, fold 2`."""
    held_out = f", {fold.config.held_out} held out" if fold.config.held_out else ""
    return f"{fold.config.protocol}, repeat {fold.repeat}, fold {fold.fold}{held_out}"


def _arm(protocol: Protocol, folds: Sequence[Fold], config: CrossvalConfig) -> Arm:
    """The results of an arm's models on images that they were not trained on."""
    rows, tables, unscored, logits = zip(*map(_tested, folds), strict=True)
    pooled, failed = pd.concat(tables, ignore_index=True), pd.concat(unscored, ignore_index=True)
    card = bundle.read_card(storage.join(folds[0].uri, run_directory.MODEL))
    data = _known(folds)
    about = {
        "title": f"Breast cancer detection: {config.name}, {counted(len(folds), 'model')}",
        "data": without_folders(config.data),
        "target": config.target,
        "classes": card.classes,
        "weights": config.weights,
        "protocol": protocol,
        "seed": config.seed,
        "leaky": protocol in split.LEAKY,
        "synthetic": data.synthetic,
        "data_fingerprint": data.data_fingerprint,
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "command": without_folders(provenance.command()),
    }
    measured = about | artifacts.measure_run(pooled, failed, card.classes)
    measured |= {"threshold": None, "folds": list(rows), "spread": _spread(rows)}
    prior = export.prior_of(config, _seen(folds[0]))
    measured["out_of_fold"] = _chosen(pooled, np.concatenate(logits), prior, config)
    size = card.input_size_px
    facts = about | data.model_dump(exclude={"split_fingerprint", "left_out"})
    facts |= {"input_size_px": size, "evidence": card.evidence}
    # The balance of the first fold represents all.
    facts |= prepare.class_counts(folds[0].config, _split(folds[0]))
    return Arm(protocol, measured, pooled, failed, facts)


def _chosen(
    images: pd.DataFrame, logit: np.ndarray, prior: float, config: CrossvalConfig
) -> dict[str, Any] | None:
    """Temperature and threshold by all patients, each scored by a model that had not seen them, from the
    logits (n, classes) of their images before any temperature; None if a class was not scored."""
    if set(images[schema.TUMOR_CLASS]) != set(TUMOR_CLASSES):
        return None
    rows = pa.Table.from_pandas(images[[schema.TUMOR_CLASS, schema.SUBTYPE, schema.PATIENT]])
    return export.decided(logit, rows, prior, config.target, config.target_sensitivity, OUT_OF_FOLD)


def _known(folds: Sequence[Fold]) -> DatasetFacts:
    """The facts about the data. Warnings of single folds have their names; those that differ in numbers only
    are one, with the first as the example."""
    facts = [DatasetFacts(**run_directory.read_json(fold.uri, run_directory.DATA)) for fold in folds]
    alike: dict[str, dict[str, str]] = {}
    for fold, each in zip(folds, facts, strict=True):
        for text in each.warnings:
            kind = re.sub(r"[\d,]+ of [\d,]+", "n of n", text)
            kind = text if name_of(fold) in alike.get(kind, {}) else kind
            alike.setdefault(kind, {})[name_of(fold)] = text
    warnings = [_of_folds(texts, len(folds)) for texts in alike.values()]
    of_all = set(facts[0].warnings)
    return facts[0].model_copy(update={"warnings": sorted(warnings, key=lambda text: text not in of_all)})


def _of_folds(texts: Mapping[str, str], n_folds: int) -> str:
    """One sentence for a warning of some folds, by their names."""
    name, text = next(iter(texts.items()))
    if len(texts) == 1:
        return f"{name}: {text}"
    if len(texts) == n_folds and len(set(texts.values())) == 1:
        return text
    return f"{len(texts)} of {n_folds} folds, such as {name}: {text}"


def _tested(fold: Fold) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame, np.ndarray]:
    """Summary of one fold, its image table, the images not scored, and the logits of the others (n, classes),
    before the temperature."""
    card = bundle.read_card(storage.join(fold.uri, run_directory.MODEL))
    predictions_uri = storage.join(fold.uri, evaluate.PREDICTIONS)
    frame = artifacts.with_truth(predictions_uri, prepare.part_of(_split(fold), split.TEST), card)
    images = artifacts.images_of(frame, card, predictions_uri, fold.draw)
    measured = artifacts.measure_run(images, aggregate.unscored(frame), card.classes)
    row = {
        "repeat": fold.repeat,
        "fold": fold.fold,
        "held_out": fold.config.held_out,
        "left_out": len(prepare.part_of(_split(fold), LEFT_OUT)),
        "n_images": len(images),
        "n_patients": measured["n_patients"],
        "threshold": card.threshold,
        "temperature": card.temperature,
        "rule": card.operating_point.get("rule"),
        "best_epoch": card.validation[schema.EPOCH],
        "model": storage.join(fold.uri, run_directory.MODEL),
        "pooled": measured["pooled"],
        "history": run_directory.read_json(fold.uri, run_directory.HISTORY),
    }
    logit = np.array(frame.loc[frame[schema.ERROR].isna(), schema.LOGIT].tolist(), np.float64)
    logit = logit.reshape(-1, len(card.classes)) * card.temperature
    return row, images, aggregate.unscored(frame), logit


def _split(fold: Fold) -> pa.Table:
    parts = run_directory.read_split(fold.uri)
    if parts is None:
        raise DataError(
            f"{fold.uri} has no {run_directory.SPLIT}; delete the folder and run the same command again"
        )
    return parts


def _spread(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation of each metric over the folds where it is defined."""
    spread = {}
    for name in model_report.MEASURES:
        values = [row["pooled"][name] for row in rows if row["pooled"][name] is not None]
        spread[name] = {
            "mean": statistics.fmean(values) if values else None,
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(values),
        }
    return spread


def _report(config: CrossvalConfig, uri: str, arms: Sequence[Arm]) -> None:
    """Report the main arm, with the effect of a leak and the comparison, and each of several arms."""
    main = _main(arms)
    for arm in arms if len(arms) > 1 else ():
        logger.info(f"\nprotocol {arm.protocol}")
        arm_uri = storage.join(uri, arm.protocol)
        artifacts.write_artifacts(arm_uri, arm.measured, [], arm.images, arm.facts, arm.unscored)
    measured = dict(main.measured)
    for arm in arms:
        if arm.facts["leaky"] and arm is not main:
            measured["leak"] = _leak(arm, main)
            logger.info(f"\n{model_report.leak_sentence(measured['leak'])}")
    if config.against:
        measured["comparison"] = artifacts.compared(main.images, config.against)
    artifacts.write_artifacts(uri, measured, [], main.images, main.facts, main.unscored)


def _main(arms: Sequence[Arm]) -> Arm:
    """The first honest arm, or the first of leaky ones."""
    return next((arm for arm in arms if not arm.facts["leaky"]), arms[0])


def _export(
    config: CrossvalConfig,
    own: Lease,
    folds: Sequence[Fold],
    arm: Arm,
    inspected: tuple[pa.Table, DatasetFacts] | None,
) -> None:
    """Write the bundle of all models of an arm, beside the rows that it has seen: all of the data."""
    if config.export == "none":
        return
    if arm.measured["out_of_fold"] is None:
        raise DataError(f"{own.uri}: no image of one class was scored, which a threshold requires")
    models = [storage.join(fold.uri, run_directory.MODEL) for fold in folds]
    cards = {model: bundle.read_card(model) for model in models}
    whole = train.resolved(_of_all(config, folds[0], export.median_epoch(cards.values())))
    rows = _seen(folds[0])
    facts = _known(folds).model_copy(update={"split_fingerprint": split.fingerprint(rows)})
    study = Study(kind=config.export, n_models=len(folds))
    known = export.card_of_study(study, whole, rows, facts, arm.measured)
    uri = storage.join(own.uri, config.export)
    if config.export == "ensemble":
        own.require()
        run_directory.write_split(uri, rows)
        export.ensemble_of(cards, known, _judged(arm, len(rows)), storage.join(uri, run_directory.MODEL))
    else:
        result = _refit(whole, uri, own, rows, folds[0], inspected)
        own.require()
        known = known.model_copy(update={"stain": feed.stain_of(whole, uri, rows)})
        export.refit_of(
            whole, known, _judged(arm, len(rows)), storage.join(uri, run_directory.MODEL), rows, result
        )
        run_directory.finish_run(whole, uri, {})
    logger.info(f"bundle of the study, {config.export}: {storage.join(uri, run_directory.MODEL)}")


def _seen(fold: Fold) -> pa.Table:
    """All rows of a study, as rows of training."""
    rows = schema.fill(_split(fold), schema.INDEX)
    return rows.append_column(schema.SPLIT.field(schema.PART), pa.array([split.TRAIN] * len(rows)))


def _judged(arm: Arm, n_rows: int) -> dict[str, Any] | None:
    """Cut-off and counts of novelty, by models that had not seen the images; None without statistics."""
    distances = arm.images[schema.NOVELTY].dropna().to_numpy(float)
    if not len(distances):
        return None
    return {"cutoff": novelty.cutoff(distances), "n_training": n_rows, "n_validation": len(distances)}


def _of_all(config: CrossvalConfig, fold: Fold, epochs: int) -> TrainConfig:
    """Settings of a training on all images of a study, for so many epochs."""
    changed: dict[str, Any] = config.model_dump(include={"output", "seed", "num_workers"})
    changed |= {"name": f"{config.name}-{config.export}", "epochs": epochs}
    if fold.config.protocol != "official":
        changed |= {"fold": None, "cross_folds": None}
    return fold.config.model_copy(update=changed)


def _refit(
    whole: TrainConfig,
    uri: str,
    own: Lease,
    rows: pa.Table,
    fold: Fold,
    inspected: tuple[pa.Table, DatasetFacts] | None,
) -> Result:
    """Train on all rows, or continue to."""
    logger.info(f"\ntraining on all {counted(len(rows), 'image')} for {counted(whole.epochs, 'epoch')}")
    run_directory.begin_run(whole, uri)
    # A patient withdrawn since must not be trained on again.
    run_directory.resume(fold.config, fold.uri, (inspected or prepare.load_data_set(whole))[0])
    run_directory.claim_run(whole, uri, own.require)
    run_directory.write_split(uri, rows)
    return train.refit(whole, uri, rows)


def _leak(leaky: Arm, honest: Arm) -> dict[str, Any]:
    """`compare.paired` on the images that both arms tested equally often, which published folds do not, and
    which excludes images that failed in one arm."""
    counts = [arm.images[schema.IMAGE_ID].value_counts() for arm in (leaky, honest)]
    everywhere = pd.concat(counts, axis=1, keys=("leaky", "honest")).fillna(0)
    same = everywhere.index[everywhere["leaky"] == everywhere["honest"]]
    first, second = (arm.images[arm.images[schema.IMAGE_ID].isin(same)] for arm in (leaky, honest))
    return compare.paired(first, second) | {
        "leaky": leaky.protocol,
        "honest": honest.protocol,
        "n_left_out": len(everywhere) - len(same),
    }
