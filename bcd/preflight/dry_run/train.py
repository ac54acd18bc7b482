"""What a training would do: data, split, steps, space and time."""

from collections.abc import Sequence

import pyarrow as pa

from bcd import storage
from bcd.config.options import HUB_WEIGHTS, IMAGENET_WEIGHTS, RANDOM_WEIGHTS
from bcd.config.training import TrainConfig, TrainingConfig
from bcd.data import synthetic
from bcd.preflight.dry_run import measure, page
from bcd.preflight.dry_run.measure import Pace, Read
from bcd.runtime import cluster, prepare, run_directory
from bcd.runtime.prepare import DatasetFacts
from bcd.split import balance, quarantine, split
from bcd.taxonomy import TEST, TRAIN, VALIDATION, classes
from bcd.text import counted, duration, size
from bcd.training import export, train
from bcd.training.train import Settings

# Of the network, as Ray Train keeps them: the best, and two to resume from.
CHECKPOINTS = 3


def run(config: TrainConfig) -> list[str]:
    """Log the lines of a dry run, and return them; raises BcdError as the training would before its work."""
    config = resolved_here(config)
    uri = storage.join(config.output, config.name)
    if run_directory.begin_run(config, uri) and export.fault(uri) is None:
        return page.show([f"{uri} is finished: nothing is left to do"])
    rows, facts = data_set(config)
    lines, done = data_lines(config, rows, facts), 0
    if (parts := run_directory.read_split(uri)) is None:
        parts, facts = prepare.prepare(config, (rows, facts))
        lines += [f"warning: {text}" for text in facts.warnings]
    else:
        done = _epochs_done(uri)
        of = counted(config.epochs, "epoch")
        lines.append(f"{uri} is begun: its split is used, and {done} of {of} are done")
    lines += prepare.describe_split(config, parts, facts.model_copy(update={"quarantined": []}))
    lines += [network_line(config), _steps(config, parts)]
    left = config.model_copy(update={"epochs": config.epochs - done})
    return page.show([*lines, *estimated_lines(left, [parts])])


def resolved_here(config: Settings) -> Settings:
    """`train.resolved`, without the download of what a page of the hub states about weights."""
    if not config.weights.startswith(HUB_WEIGHTS):
        return train.resolved(config)
    own = train.resolved(config.model_copy(update={"weights": RANDOM_WEIGHTS}))
    return own.model_copy(update={"weights": config.weights})


def data_set(config: TrainingConfig) -> tuple[pa.Table, DatasetFacts]:
    """The rows of a data set, as far as they are known without opening an image, and what is known of it."""
    table, warnings = prepare.listed_rows(config)
    reasons: list[str] = []
    if config.quarantine:
        table, _, reasons = quarantine.apply_rules(table)
    return table, DatasetFacts(
        data=config.data,
        data_fingerprint=split.data_fingerprint(table),
        synthetic=storage.exists(storage.join(config.data, synthetic.MARKER)),
        warnings=warnings,
        broken=[],
        quarantined=reasons,
        field_height_px=0,
        field_width_px=0,
    )


def data_lines(config: TrainingConfig, rows: pa.Table, facts: DatasetFacts) -> list[str]:
    """The index: images and patients of each class, bytes, and what is left out."""
    lines = [f"{config.data}: {page.described_rows(rows)}", page.UNREAD]
    return lines + [f"left out, quarantined: {text}" for text in facts.quarantined]


def network_line(config: TrainingConfig) -> str:
    """The network, its input and its classes. Raises StorageError where a file of weights cannot be read."""
    height, width = config.input_size_px
    known = "random" if config.weights == RANDOM_WEIGHTS else "downloaded unless they are here"
    if config.weights not in (RANDOM_WEIGHTS, IMAGENET_WEIGHTS) and not config.weights.startswith(
        HUB_WEIGHTS
    ):
        storage.read_start(config.weights, 1)
        known = "not loaded here"
    names = ", ".join(classes(config.target))
    return (
        f"{config.architecture}: input {height}x{width} px, batches of {config.batch_size}, "
        f"weights {config.weights} ({known}); classes {names}"
    )


def _epochs_done(uri: str) -> int:
    there = storage.exists(storage.join(uri, run_directory.HISTORY))
    return len(run_directory.read_json(uri, run_directory.HISTORY)) if there else 0


def _balanced_rows(config: TrainingConfig, parts: pa.Table) -> int:
    rows = prepare.part_of(parts, TRAIN)
    return len(balance.upsample(rows, config.upsampled(), config.seed))


def _steps(config: TrainConfig, parts: pa.Table) -> str:
    n = _balanced_rows(config, parts)
    steps = -(-n // config.batch_size)
    return (
        f"an epoch: {counted(n, 'image')}, balanced, {counted(steps, 'step')}; "
        f"{counted(config.epochs, 'epoch')}: {counted(steps * config.epochs, 'step')}"
    )


def estimated_lines(config: TrainingConfig, runs: Sequence[pa.Table]) -> list[str]:
    """What runs with these split tables, one after another, need of space and time, by a measurement."""
    sample = measure.read_sample(runs[0], *config.input_size_px)
    pace = measure.training_pace(config, sample.images)
    return [*_space_lines(config, runs, pace), *_time_lines(config, runs, sample, pace)]


def _space_lines(config: TrainingConfig, runs: Sequence[pa.Table], pace: Pace) -> list[str]:
    of_optimizer = 0 if config.head else 2 if config.optimizer == "adamw" else 1
    copies = 1 + of_optimizer + (config.ema_decay is not None)
    kept = len(runs) * pace.n_bytes * (CHECKPOINTS * copies + 1)
    return [
        page.prepared_images(prepare.store_of(config), len(runs[0])),
        f"estimate: checkpoints and bundles need about {size(kept)}; {page.free_space(config.output)}",
    ]


def _time_lines(config: TrainingConfig, runs: Sequence[pa.Table], sample: Read, pace: Pace) -> list[str]:
    cores = cluster.cores()
    checked = len(runs[0]) * sample.seconds / cores
    total = checked + sum(_run_s(config, parts, pace) for parts in runs)
    what = counted(config.epochs, "epoch") + (f" of {counted(len(runs), 'run')}" if len(runs) > 1 else "")
    steps = f"{counted(measure.MEASURED_STEPS, 'step')} of {counted(pace.n_images, 'image')}"
    return [
        f"estimates, {page.of_sample(sample)} and {steps} in this process, for one worker on {pace.device}:",
        f"  every image read once: about {duration(checked)} on {counted(cores, 'CPU')} "
        f"({1_000 * sample.seconds:.0f} ms an image)",
        f"  an epoch with validation: about {duration(_epoch_s(config, runs[0], pace))} "
        f"({1_000 * pace.train:.0f} ms an image in a step), where reading keeps up",
        f"  all, with {what} and the test part: about {duration(total)}",
    ]


def _run_s(config: TrainingConfig, parts: pa.Table, pace: Pace) -> float:
    """Seconds of a training and its evaluation."""
    # Of a linear head, what comes before it is computed once for each image.
    once = parts if config.head else prepare.part_of(parts, TEST)
    return config.epochs * _epoch_s(config, parts, pace) + len(once) * pace.forward


def _epoch_s(config: TrainingConfig, parts: pa.Table, pace: Pace) -> float:
    n_validation = 0 if config.head else len(prepare.part_of(parts, VALIDATION))
    return _balanced_rows(config, parts) * pace.train + n_validation * pace.forward
