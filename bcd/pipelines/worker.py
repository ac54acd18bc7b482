"""What one training worker does: epochs over its shard, exact validation, a checkpoint each time.

Workers meet twice an epoch, to add up what they saw in training and in validation; both sums are exact over
all rows, whatever the number of workers.
"""

import logging
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import ray.train.torch
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from torchvision.models import ResNet

from bcd import batchnorm, metrics, model, optimise, schema, storage, transform
from bcd.config import TrainConfig
from bcd.pipelines import cluster, read

logger = logging.getLogger(__name__)

WEIGHTS_FILE, STATE_FILE = "model.safetensors", "state.pt"
SCORE = "validation_balanced_accuracy"
# Chooses the best epoch: the score, and of equal scores the lower loss. On a small validation part many
# epochs are equal, and the first of them is seldom the best.
SELECTION = "selection"
TIE_BREAK = 1e-6
# Columns of some rows.
Batch = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Task:
    """All that a worker is told."""

    config: TrainConfig
    classes: tuple[str, ...]
    weights: ray.ObjectRef | None
    run_uri: str
    n_train: int
    runs_per_node: int = 1


@dataclass
class State:
    """What is trained, and how far: the content of a checkpoint."""

    network: ResNet
    optimizer: torch.optim.Optimizer
    history: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write network, optimiser and history into a folder."""
        tensors = {name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_FILE)
        state = {"optimizer": self.optimizer.state_dict(), "history": self.history}
        torch.save(state, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Continue from what `save` wrote."""
        self.network.load_state_dict(load_file(folder / WEIGHTS_FILE))
        state = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]


@dataclass
class Seen:
    """What one worker met in one pass: summed over workers by `_gather`."""

    loss_sum: float = 0.0
    image_ids: list[str] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)

    def add(self, batch: Batch, loss_sum: float) -> None:
        """Count one batch."""
        self.loss_sum += loss_sum
        self.image_ids += batch[schema.IMAGE_ID].tolist()
        self.targets += batch[schema.TARGET].tolist()


def train(task: Task) -> list[dict[str, Any]]:
    """The training function of every worker; returns the history, a record per epoch."""
    config, context = task.config, ray.train.get_context()
    # Ray Train tells of every report and checkpoint; what people want to know is our line per epoch.
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("bcd").setLevel(logging.INFO)
    device = ray.train.torch.get_device()
    model.set_precision(config.precision)
    if device.type == "cpu":
        cluster.share_cores(context.get_local_world_size() * task.runs_per_node)
    # Every worker augments differently, every epoch anew, all from one seed.
    torch.manual_seed(config.seed * 1_000 + context.get_world_rank())
    state = _state(task, device)
    network = ray.train.torch.prepare_model(state.network, False)
    if isinstance(network, DistributedDataParallel):
        # Running statistics are the same on all workers, or `batchnorm.average` makes them so. As an argument
        # torch 2.11 only takes it by this name, and torch 2.13 warns about it.
        network.broadcast_buffers = False
    height, width = config.input_height_px, config.input_width_px
    augmentation = transform.augmentation(height, width) if config.augment else None
    step = optimise.Step(network, state.optimizer, device, config.precision, augmentation)
    stream = Stream(read.TRAIN, max(1, config.batch_size // context.get_world_size()))
    with tempfile.TemporaryDirectory() as folder:
        board = SummaryWriter(folder) if context.get_world_rank() == 0 else None
        for epoch in range(len(state.history) + 1, config.epochs + 1):
            record = _epoch(task, step, state, epoch, stream)
            state.history.append(record)
            if board is not None:
                _publish(task, board, Path(folder), record)
            _checkpoint(state, record)
    return state.history


def _state(task: Task, device: torch.device) -> State:
    config = task.config
    weights = ray.get(task.weights) if task.weights is not None else None
    network = model.build(len(task.classes), weights, config.seed)
    network = network.to(device).to(memory_format=torch.channels_last)
    if config.sync_batchnorm and ray.train.get_context().get_world_size() > 1:
        batchnorm.share(network, device)
    optimizer = optimise.optimizer(network, config.optimizer, config.learning_rate, config.weight_decay)
    state = State(network, optimizer)
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            state.load(Path(folder))
    return state


def _epoch(task: Task, step: optimise.Step, state: State, epoch: int, stream: "Stream") -> dict[str, Any]:
    started = time.monotonic()
    trained = _gather(_train_epoch(task, step, epoch, stream))
    seconds = time.monotonic() - started
    if epoch < task.config.epochs:
        stream.begin()
    if not task.config.sync_batchnorm and ray.train.get_context().get_world_size() > 1:
        batchnorm.average(state.network)
    validated = _gather(_validate(task, state.network, step.device))
    _log_exposure(task, trained, epoch)
    names = [task.classes[target] for target in trained.targets]
    counted = Counter(names)
    n = len(names)
    return {
        "epoch": epoch,
        "train_loss": trained.loss_sum / n,
        "learning_rate": step.optimizer.param_groups[0]["lr"],
        "seconds": time.monotonic() - started,
        "images_per_s": n / seconds,
        "class_counts": {name: counted[name] for name in task.classes},
        "workers": ray.train.get_context().get_world_size(),
        **_validation_metrics(task, validated),
    }


def _train_epoch(task: Task, step: optimise.Step, epoch: int, stream: "Stream") -> Seen:
    config, world = task.config, ray.train.get_context().get_world_size()
    n_steps = -(-(task.n_train // world) // stream.batch_size)
    seen, losses = Seen(), []
    step.network.train()
    for i, batch in enumerate(optimise.even_tail(stream.batches(), stream.batch_size)):
        progress = (epoch - 1 + i / n_steps) / config.epochs
        rate = optimise.learning_rate(config.learning_rate, progress, config.warmup_fraction)
        images, target = _tensors(batch)
        loss = step(images, target, rate)
        losses.append(loss * len(images))
        seen.add(batch, 0.0)
    # One transfer at the end: asking for the loss at every step would make a GPU wait.
    seen.loss_sum = float(torch.stack(losses).sum())
    return seen


class Stream:
    """Passes over this worker's share of some rows, each of which can begin before it is needed.

    Its first batch takes one to three seconds, in which a GPU trains on a thousand images.
    """

    def __init__(self, name: str, batch_size: int) -> None:
        self.batch_size = batch_size
        self._shard = ray.train.get_dataset_shard(name)
        self._begun: tuple[Future[Batch | None], Iterator[Batch]] | None = None

    def begin(self) -> None:
        """Start to read the next pass."""
        self._begun = self._start()

    def batches(self) -> Iterator[Batch]:
        """The pass that was begun, else one that begins now."""
        first, rest = self._begun or self._start()
        self._begun = None
        if (batch := first.result()) is not None:
            yield batch
            yield from rest

    def _start(self) -> tuple[Future[Batch | None], Iterator[Batch]]:
        """The first batch, which another thread asks for, and those that follow."""
        rows = self._shard.iter_batches(batch_size=self.batch_size, batch_format="numpy", prefetch_batches=2)
        rest = map(_whole, rows)
        pool = ThreadPoolExecutor(1, "stream")
        first = pool.submit(next, rest, None)
        pool.shutdown(wait=False)
        return first, rest


def _whole(batch: Batch) -> Batch:
    read.require_whole(batch[schema.ERROR], batch[schema.IMAGE_ID])
    return batch


def _tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and targets; copied, because Ray hands out read-only views of its object store."""
    return torch.tensor(batch[schema.IMAGE]), torch.tensor(batch[schema.TARGET])


@torch.inference_mode()
def _validate(task: Task, network: ResNet, device: torch.device) -> Seen:
    seen = Seen()
    network.eval()
    for batch in Stream(read.VALIDATION, task.config.batch_size).batches():
        images, target = _tensors(batch)
        inputs = transform.normalise(images.to(device).permute(0, 3, 1, 2))
        with model.autocast(device, task.config.precision):
            logit = model.forward(network, inputs.contiguous(memory_format=torch.channels_last)).logit
        loss_sum = nn.functional.cross_entropy(logit, target.to(device), reduction="sum")
        seen.add(batch, float(loss_sum))
        seen.logits.append(logit.cpu().numpy())
    return seen


def _validation_metrics(task: Task, seen: Seen) -> dict[str, float]:
    probability = model.probability(torch.from_numpy(np.concatenate(seen.logits))).numpy()
    targets = np.array(seen.targets)
    measured = metrics.multiclass(targets, probability, task.classes)
    loss = seen.loss_sum / len(targets)
    return {
        "validation_loss": loss,
        "validation_accuracy": measured["accuracy"],
        SCORE: measured["balanced_accuracy"],
        SELECTION: measured["balanced_accuracy"] - TIE_BREAK * loss,
        "n_validation": len(targets),
    }


def _gather(seen: Seen) -> Seen:
    """The sum over all workers, on every worker."""
    world = ray.train.get_context().get_world_size()
    parts: list[Any] = [seen]
    if world > 1:
        parts = [None] * world
        torch.distributed.all_gather_object(parts, seen)
    total = Seen()
    for part in parts:
        total.loss_sum += part.loss_sum
        total.image_ids += part.image_ids
        total.targets += part.targets
        total.logits += part.logits
    return total


def _log_exposure(task: Task, seen: Seen, epoch: int) -> None:
    """Keep which images this epoch trained on: the proof that none was held out."""
    if ray.train.get_context().get_world_rank() != 0:
        return
    columns = {schema.EPOCH: [epoch] * len(seen.image_ids), schema.IMAGE_ID: seen.image_ids}
    uri = storage.join(task.run_uri, "exposure", f"epoch-{epoch:04d}.parquet")
    storage.write_table(uri, pa.table(columns, schema=schema.EXPOSURE))


def _publish(task: Task, board: SummaryWriter, folder: Path, record: dict[str, Any]) -> None:
    for name, value in record.items():
        if isinstance(value, float):
            board.add_scalar(name, value, record["epoch"])
    board.flush()
    storage.upload_folder(folder, storage.join(task.run_uri, "tensorboard"))
    # Ray Train echoes what a worker prints, so a print would show twice.
    logger.info(progress_line(record, task.config.epochs))


def progress_line(record: dict[str, Any], epochs: int) -> str:
    """One epoch, in a line for people."""
    counts = ", ".join(f"{name} {n:,}" for name, n in record["class_counts"].items())
    left = (epochs - record["epoch"]) * record["seconds"]
    return (
        f"epoch {record['epoch']}/{epochs}: "
        f"loss {record['train_loss']:.3f} (validation {record['validation_loss']:.3f}), "
        f"balanced accuracy {record[SCORE]:.3f} on {record['n_validation']:,} validation images; "
        f"saw {counts}; learning rate {record['learning_rate']:.1e}; "
        f"{record['images_per_s']:.1f} images/s, {record['seconds']:.0f} s; {_duration(left)} left"
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _checkpoint(state: State, record: dict[str, Any]) -> None:
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(record)
        return
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder))
        ray.train.report(record, checkpoint=ray.train.Checkpoint.from_directory(folder))
