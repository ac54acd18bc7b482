"""Cross-validation: one model for each fold, trained and evaluated alike, and one report over all of them."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import ray

from bcd import aggregate, bundle, compare, provenance, report, schema, split, storage
from bcd.breakhis import N_FOLDS
from bcd.config import CrossvalConfig, Protocol, TrainConfig, TrainingConfig
from bcd.errors import DataError
from bcd.pipelines import cluster, evaluate, prepare, reporting, rundir, train
from bcd.pipelines.prepare import Facts


class Fold(NamedTuple):
    """One training of an arm; repeat and fold count from 1."""

    repeat: int
    fold: int
    config: TrainConfig

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

    Running the same config again goes on with the folds that are missing.
    """
    uri = storage.join(config.output, config.name)
    if rundir.begin(config, uri):
        print(f"{uri} is finished: see report.html there, or choose another --name to run it anew")
        return uri
    started = time.time()
    cluster.connect()
    folds = {protocol: list(_folds(config, uri, protocol)) for protocol in config.protocols()}
    inspected = prepare.inspect(config)
    for fold in (each for arm in folds.values() for each in arm):
        # What cannot be split ends the study here, before any training.
        prepare.prepare(fold.config, inspected)
    rundir.claim(config, uri)
    _train([fold for arm in folds.values() for fold in arm], inspected, config.parallel)
    arms = [_arm(protocol, arm, config) for protocol, arm in folds.items()]
    for arm in arms:
        arm_uri = storage.join(uri, arm.protocol)
        print(f"\nprotocol {arm.protocol}{' (leaky)' if arm.facts['leaky'] else ''}")
        reporting.write(arm_uri, arm.measured, [], arm.images, arm.facts, arm.unscored)
    _conclude(config, uri, arms)
    rundir.finish(config, uri, {"seconds": round(time.time() - started, 1)})
    return uri


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


def _train(folds: Sequence[Fold], inspected: tuple[pa.Table, Facts], parallel: int | None) -> None:
    """Train and evaluate the folds, several at a time where there is room."""
    at_once = min(len(folds), parallel or cluster.room(folds[0].config))
    if at_once == 1:
        for number, fold in enumerate(folds, 1):
            print(f"\n{_name(fold)}: {number} of {len(folds)}", flush=True)
            train.run(fold.config, inspected)
        return
    print(f"{len(folds)} folds, {at_once} at a time", flush=True)
    # A fold drives its own workers and needs no CPU of its own.
    remote = ray.remote(num_cpus=0, max_retries=0)(train.run)
    shared, waiting = ray.put(inspected), list(folds)
    running: dict[ray.ObjectRef, Fold] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            fold = waiting.pop(0)
            running[remote.remote(fold.config, shared, cluster.per_node(at_once))] = fold
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        fold = running.pop(done)
        ray.get(done)
        left = len(waiting) + len(running)
        print(f"{_name(fold)}: finished, {left} of {len(folds)} left", flush=True)


def _name(fold: Fold) -> str:
    return f"{fold.config.protocol}, repeat {fold.repeat}, fold {fold.fold}"


def _arm(protocol: Protocol, folds: Sequence[Fold], config: CrossvalConfig) -> Arm:
    """Everything that an arm's models said about images that they were not trained on."""
    rows, tables, unscored = [], [], []
    for number, fold in enumerate(folds, 1):
        row, images, failed = _tested(fold, number)
        rows.append(row)
        tables.append(images)
        unscored.append(failed)
    pooled = pd.concat(tables, ignore_index=True)
    failed = pd.concat(unscored, ignore_index=True)
    card = bundle.read_card(storage.join(folds[0].uri, rundir.MODEL))
    known = Facts(**rundir.read_json(folds[0].uri, rundir.DATA))
    about = {
        "title": f"Breast cancer detection: {config.name}, {len(folds)} models",
        "data": config.data,
        "weights": config.weights,
        "protocol": protocol,
        "seed": config.seed,
        "leaky": protocol in split.LEAKY,
        "synthetic": known.synthetic,
        "data_fingerprint": known.data_fingerprint,
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
    }
    measured = about | reporting.measure(pooled, failed, card.classes)
    measured |= {"threshold": None, "folds": rows, "spread": _spread(rows)}
    size = (card.input_height_px, card.input_width_px)
    told = about | known.model_dump(exclude={"split_fingerprint"}) | {"input_size_px": size}
    # The balance of one fold stands for all.
    told |= prepare.class_counts(folds[0].config, _split(folds[0]))
    return Arm(protocol, measured, pooled, failed, told)


def _tested(fold: Fold, number: int) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """A row about one fold, its image table, and what could not be scored."""
    card = bundle.read_card(storage.join(fold.uri, rundir.MODEL))
    predictions_uri = storage.join(fold.uri, evaluate.PREDICTIONS)
    frame = reporting.with_truth(predictions_uri, prepare.part_of(_split(fold), split.TEST), card)
    images = reporting.image_table(frame, card, predictions_uri, number)
    measured = reporting.measure(images, aggregate.unscored(frame), card.classes)
    row = {
        "repeat": fold.repeat,
        "fold": fold.fold,
        "n_images": len(images),
        "n_patients": measured["n_patients"],
        "threshold": card.threshold,
        "temperature": card.temperature,
        "best_epoch": card.validation[schema.EPOCH],
        "model": storage.join(fold.uri, rundir.MODEL),
        "pooled": measured["pooled"],
        "history": rundir.read_json(fold.uri, rundir.HISTORY),
    }
    return row, images, aggregate.unscored(frame)


def _split(fold: Fold) -> pa.Table:
    parts = rundir.read_split(fold.uri)
    if parts is None:
        raise DataError(f"{fold.uri} has no {rundir.SPLIT}; delete the folder and run the command again")
    return parts


def _spread(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and standard deviation of each metric over the folds in which it is defined."""
    found = {}
    for name in report.MEASURES:
        values = [row["pooled"][name] for row in rows if row["pooled"][name] is not None]
        found[name] = {
            "mean": statistics.fmean(values) if values else None,
            "sd": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(values),
        }
    return found


def _conclude(config: CrossvalConfig, uri: str, arms: Sequence[Arm]) -> None:
    """The report of the study: the first honest arm, with what a leak would add and how another compares."""
    main = next((arm for arm in arms if not arm.facts["leaky"]), arms[0])
    measured = dict(main.measured)
    for arm in arms:
        if arm.facts["leaky"] and arm is not main and _same_images(arm, main):
            compared = compare.paired(arm.images, main.images)
            measured["leak"] = compared | {"leaky": arm.protocol, "honest": main.protocol}
            print(f"\n{report.leak_sentence(measured['leak'])}")
    if config.against:
        measured["comparison"] = reporting.compared(main.images, config.against)
    reporting.write(uri, measured, [], main.images, main.facts, main.unscored)


def _same_images(one: Arm, other: Arm) -> bool:
    """Whether both test each image equally often; the published folds do not."""
    first, second = (arm.images[schema.IMAGE_ID].sort_values().tolist() for arm in (one, other))
    return first == second
