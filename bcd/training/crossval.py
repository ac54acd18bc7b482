"""Cross-validation: one model for each fold, trained and evaluated alike, and one report over all of them."""

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import ray
from ray.exceptions import RayTaskError

from bcd import provenance, schema, storage
from bcd.config.options import Protocol
from bcd.config.training import CrossvalConfig, TrainConfig, TrainingConfig
from bcd.errors import DataError
from bcd.evaluation import artifacts, evaluate
from bcd.metrics import aggregate, compare
from bcd.model import bundle
from bcd.reports import model_report
from bcd.runtime import cluster, prepare, run_directory
from bcd.runtime.prepare import DatasetFacts
from bcd.split import split
from bcd.taxonomy import N_FOLDS
from bcd.text import counted
from bcd.training import export, train


class Fold(NamedTuple):
    """One training of an arm; repeat and fold count from 1."""

    repeat: int
    fold: int
    config: TrainConfig

    @property
    def draw(self) -> int:
        """Which division this fold is of: each tests an image once at most. The published folds overlap."""
        return self.fold if self.config.protocol == "official" else self.repeat

    @property
    def uri(self) -> str:
        """Its run directory."""
        return storage.join(self.config.output, self.config.name)


class Arm(NamedTuple):
    """All that was tested under one protocol: metrics, image table, what could not be scored, facts."""

    protocol: Protocol
    measured: dict[str, Any]
    images: pd.DataFrame
    unscored: pd.DataFrame
    facts: dict[str, Any]


def run(config: CrossvalConfig) -> str:
    """Train and evaluate every fold of every protocol, and report; returns the URI of the study.

    Running the same config again goes on with the folds that are missing. A finished study is only reported
    anew, where `against` asks for a comparison.

    Raises:
        DataError: the data cannot be used, or are not those of the folds that stand already.
    """
    uri = storage.join(config.output, config.name)
    if config.against:
        artifacts.require_images(config.against)
    folds = {protocol: list(_folds(config, uri, protocol)) for protocol in config.protocols()}
    finished = run_directory.begin_run(config, uri) and _is_published(folds.values())
    if finished and not config.against:
        print(f"{uri} is finished: see report.html there, or choose another --name to run it anew")
        return uri
    started = time.time()
    cluster.connect(trains=True)
    if not finished:
        _train_missing(config, uri, [fold for arm in folds.values() for fold in arm])
    _report(config, uri, [_arm(protocol, arm, config) for protocol, arm in folds.items()])
    if not finished:
        run_directory.finish_run(config, uri, {"seconds": round(time.time() - started, 1)})
    return uri


def _is_published(arms: Iterable[Sequence[Fold]]) -> bool:
    """Whether the bundle of every fold of a finished study can be used."""
    faults = [fault for arm in arms for fold in arm if (fault := export.fault(fold.uri))]
    if faults:
        print(f"{faults[0]}. Writing new bundles from the checkpoints", flush=True)
    return not faults


def _folds(config: CrossvalConfig, uri: str, protocol: Protocol) -> Iterator[Fold]:
    """The runs of one arm; in a study every fold is one of `jobs/train.py`."""
    official = protocol == "official"
    shared = config.model_dump(include=set(TrainingConfig.model_fields) - {"output", "name", "seed", "folds"})
    n_folds = N_FOLDS if official else config.k
    for repeat in range(1, config.repeats + 1):
        for fold in range(1, n_folds + 1):
            settings = shared | {
                "output": storage.join(uri, protocol),
                "name": f"repeat-{repeat}-fold-{fold}",
                "seed": config.seed + repeat - 1,
                "protocol": protocol,
                "fold": fold,
                "folds": config.folds if official else None,
                "cross_folds": None if official else n_folds,
                # One GPU for each of several folds, rather than all for one after the other.
                "num_workers": "1" if config.num_workers == "auto" else config.num_workers,
            }
            yield Fold(repeat, fold, TrainConfig(**settings))


def _train_missing(config: CrossvalConfig, uri: str, folds: Sequence[Fold]) -> None:
    """Train what is not trained yet; what cannot be split ends the study here, before any training."""
    for fold in folds:
        prepare.published_fold(fold.config)  # before pixels are read
    inspected = prepare.load_data_set(config)
    for fold in folds:
        # One image more or less divides all folds anew: some would be tested twice, and others never.
        run_directory.resume(fold.config, fold.uri, inspected[0])
        _tell(fold, prepare.prepare(fold.config, inspected)[1].warnings, inspected[1].warnings)
    run_directory.claim_run(config, uri)
    _train(folds, inspected, config.parallel)


def _train(folds: Sequence[Fold], inspected: tuple[pa.Table, DatasetFacts], parallel: int | None) -> None:
    """Train and evaluate the folds, several at a time where there is room."""
    at_once = min(len(folds), parallel or cluster.room(folds[0].config))
    if at_once == 1:
        for number, fold in enumerate(folds, 1):
            print(f"\n{_name(fold)}: {number} of {len(folds)}", flush=True)
            train.run(fold.config, inspected)
        return
    print(f"{counted(len(folds), 'fold')}, {at_once} at a time", flush=True)
    # A fold drives its own workers and needs no CPU of its own. Lost with its node, it goes on elsewhere.
    remote = ray.remote(num_cpus=0, max_retries=folds[0].config.max_failures)(train.run)
    shared, waiting = ray.put(inspected), list(folds)
    running: dict[ray.ObjectRef, Fold] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            fold = waiting.pop(0)
            running[remote.remote(fold.config, shared, cluster.per_node(at_once))] = fold
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        fold = running.pop(done)
        try:
            ray.get(done)
        except RayTaskError as error:
            raise error.cause from error
        left = len(waiting) + len(running)
        print(f"{_name(fold)}: finished, {left} of {len(folds)} left", flush=True)


def _tell(fold: Fold, warnings: Sequence[str], known: Sequence[str]) -> None:
    """Print what the division into a fold warns of, before any training."""
    for text in warnings:
        if text not in known:
            print(f"warning: {_name(fold)}: {text}", flush=True)


def _name(fold: Fold) -> str:
    return f"{fold.config.protocol}, repeat {fold.repeat}, fold {fold.fold}"


def _arm(protocol: Protocol, folds: Sequence[Fold], config: CrossvalConfig) -> Arm:
    """Everything that an arm's models said about images that they were not trained on."""
    rows, tables, unscored = [], [], []
    for fold in folds:
        row, images, failed = _tested(fold)
        rows.append(row)
        tables.append(images)
        unscored.append(failed)
    pooled = pd.concat(tables, ignore_index=True)
    failed = pd.concat(unscored, ignore_index=True)
    card = bundle.read_card(storage.join(folds[0].uri, run_directory.MODEL))
    known = _known(folds)
    about = {
        "title": f"Breast cancer detection: {config.name}, {counted(len(folds), 'model')}",
        "data": config.data,
        "target": config.target,
        "weights": config.weights,
        "protocol": protocol,
        "seed": config.seed,
        "leaky": protocol in split.LEAKY,
        "synthetic": known.synthetic,
        "data_fingerprint": known.data_fingerprint,
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "command": provenance.command(),
    }
    measured = about | artifacts.measure_run(pooled, failed, card.classes)
    measured |= {"threshold": None, "folds": rows, "spread": _spread(rows)}
    size = (card.input_height_px, card.input_width_px)
    told = about | known.model_dump(exclude={"split_fingerprint"}) | {"input_size_px": size}
    # The balance of one fold stands for all.
    told |= prepare.class_counts(folds[0].config, _split(folds[0]))
    return Arm(protocol, measured, pooled, failed, told)


def _known(folds: Sequence[Fold]) -> DatasetFacts:
    """The facts about the data, which all folds share, and the warnings of each fold under its name."""
    facts = [DatasetFacts(**run_directory.read_json(fold.uri, run_directory.DATA)) for fold in folds]
    of_all = [text for text in facts[0].warnings if all(text in each.warnings for each in facts)]
    of_one = [
        f"{_name(fold)}: {text}"
        for fold, each in zip(folds, facts, strict=True)
        for text in each.warnings
        if text not in of_all
    ]
    return facts[0].model_copy(update={"warnings": of_all + of_one})


def _tested(fold: Fold) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """A row about one fold, its image table, and what could not be scored."""
    card = bundle.read_card(storage.join(fold.uri, run_directory.MODEL))
    predictions_uri = storage.join(fold.uri, evaluate.PREDICTIONS)
    frame = artifacts.with_truth(predictions_uri, prepare.part_of(_split(fold), split.TEST), card)
    images = artifacts.images_of(frame, card, predictions_uri, fold.draw)
    measured = artifacts.measure_run(images, aggregate.unscored(frame), card.classes)
    row = {
        "repeat": fold.repeat,
        "fold": fold.fold,
        "n_images": len(images),
        "n_patients": measured["n_patients"],
        "threshold": card.threshold,
        "temperature": card.temperature,
        "best_epoch": card.validation[schema.EPOCH],
        "model": storage.join(fold.uri, run_directory.MODEL),
        "pooled": measured["pooled"],
        "history": run_directory.read_json(fold.uri, run_directory.HISTORY),
    }
    return row, images, aggregate.unscored(frame)


def _split(fold: Fold) -> pa.Table:
    parts = run_directory.read_split(fold.uri)
    if parts is None:
        raise DataError(
            f"{fold.uri} has no {run_directory.SPLIT}; delete the folder and run the command again"
        )
    return parts


def _spread(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation of each metric over the folds in which it is defined."""
    found = {}
    for name in model_report.MEASURES:
        values = [row["pooled"][name] for row in rows if row["pooled"][name] is not None]
        found[name] = {
            "mean": statistics.fmean(values) if values else None,
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(values),
        }
    return found


def _report(config: CrossvalConfig, uri: str, arms: Sequence[Arm]) -> None:
    """The report of the study: the first honest arm, with what a leak would add and how another compares. Of
    several arms each has a report of its own, too."""
    main = next((arm for arm in arms if not arm.facts["leaky"]), arms[0])
    for arm in arms if len(arms) > 1 else ():
        print(f"\nprotocol {arm.protocol}")
        arm_uri = storage.join(uri, arm.protocol)
        artifacts.write_artifacts(arm_uri, arm.measured, [], arm.images, arm.facts, arm.unscored)
    measured = dict(main.measured)
    for arm in arms:
        if arm.facts["leaky"] and arm is not main:
            measured["leak"] = _leak(arm, main)
            print(f"\n{model_report.leak_sentence(measured['leak'])}")
    if config.against:
        measured["comparison"] = artifacts.compared(main.images, config.against)
    artifacts.write_artifacts(uri, measured, [], main.images, main.facts, main.unscored)


def _leak(leaky: Arm, honest: Arm) -> dict[str, Any]:
    """`compare.paired` of two arms on the images that both tested equally often: the published folds do not,
    and an image may have failed in one of them."""
    counts = [arm.images[schema.IMAGE_ID].value_counts() for arm in (leaky, honest)]
    everywhere = pd.concat(counts, axis=1, keys=("leaky", "honest")).fillna(0)
    same = everywhere.index[everywhere["leaky"] == everywhere["honest"]]
    first, second = (arm.images[arm.images[schema.IMAGE_ID].isin(same)] for arm in (leaky, honest))
    return compare.paired(first, second) | {
        "leaky": leaky.protocol,
        "honest": honest.protocol,
        "n_left_out": len(everywhere) - len(same),
    }
