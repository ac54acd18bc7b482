"""A training worker: epochs over its shard of the rows, exact validation, a checkpoint after each.

Workers synchronise twice an epoch, to add up training and validation; both sums are exact over all rows.
"""

import logging
import math
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import ray.train.torch
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from bcd import schema, storage
from bcd.config import log
from bcd.config.training import TrainingConfig
from bcd.errors import BcdError, BundleError, ConfigError, DivergedError
from bcd.metrics import measures
from bcd.model import predictor, resnet, train_step, weights
from bcd.model.recipes import averaging, layers, stain, stopping
from bcd.model.resnet import Network, ResNet
from bcd.runtime import cluster, run_directory
from bcd.runtime.run_directory import EXPOSURE, HISTORY, SCORE, SELECTION
from bcd.text import duration
from bcd.training.checkpoint import State
from bcd.training.stream import Batch, Stream, streams_of
from bcd.training.task import Task

logger = logging.getLogger(__name__)

# Share of the loss in `SELECTION`.
TIE_BREAK = 1e-6
# Steps between two checks of the loss, each of which makes a GPU wait for its queue to empty.
CHECK_STEPS = 20
# Time between two lines about an epoch.
PROGRESS_S = 30


@dataclass
class Seen:
    """What one worker read in one pass, summed over workers by `_gather`."""

    loss_sum: float = 0.0
    image_ids: list[str] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)

    def add(self, batch: Batch, loss_sum: float) -> None:
        self.loss_sum += loss_sum
        self.image_ids += batch.image_ids
        self.targets += batch.targets


def train(task: Task) -> list[dict[str, Any]] | BcdError:
    """The training function of every worker; returns the history, a record per epoch.

    Errors for the user, which all workers find at the same step, are returned: Ray Train would restart a
    worker that raises.
    """
    try:
        return _train(task)
    except (ConfigError, DivergedError) as error:
        return error


def _train(task: Task) -> list[dict[str, Any]]:
    config, context = task.config, ray.train.get_context()
    # Without Ray Train's lines about every report and checkpoint.
    logging.getLogger().setLevel(logging.WARNING)
    log.hand_on("train")
    device = ray.train.torch.get_device()
    resnet.set_precision(config.precision)
    if device.type == "cpu":
        cluster.share_cores(context.get_local_world_size() * task.runs_per_node)
    state = _state(task, device)
    listed = ray.get(task.listed) if task.listed is not None else None
    sizes = max(1, config.batch_size // context.get_world_size()), config.batch_size
    streams = streams_of(listed, config.seed, sizes, device, task.validates)
    if len(state.history) < config.epochs and not config.patience:
        streams[0].begin(len(state.history))
    torch.manual_seed(augmentation_seed(config.seed, context.get_world_rank(), len(state.history)))
    network = ray.train.torch.prepare_model(state.network.fc if state.frozen else state.network, False)
    if isinstance(network, DistributedDataParallel):
        # Running statistics are equal on all workers, or made so by `train_step.average_batch_norm`. Torch
        # 2.11 accepts this only under this name, about which torch 2.13 warns if it is an argument.
        network.broadcast_buffers = False
    step = _step(task, state, network, device)
    with tempfile.TemporaryDirectory() as folder:
        board = SummaryWriter(folder) if context.get_world_rank() == 0 else None
        for epoch in range(len(state.history) + 1, config.epochs + 1):
            if stopping.is_over([one[SELECTION] for one in state.history], config.patience):
                break
            record = _epoch(task, step, state, epoch, streams)
            state.history.append(record)
            if board is not None:
                _publish(task, board, Path(folder), state.history)
            _checkpoint(state, record)
    return state.history


def _step(task: Task, state: State, network: nn.Module, device: torch.device) -> train_step.Step:
    """The step of a network that may be wrapped for several workers."""
    beside = task.class_weights, task.stain, state.average, state.frozen
    return train_step.Step(network, state.optimizer, device, task.config, *beside)


def augmentation_seed(seed: int, rank: int, n_epochs: int) -> int:
    """Seed of a worker's augmentation, which differs between workers, and after resuming at `n_epochs`."""
    return seed * 1_000 + rank + 1_000_000 * n_epochs


def _state(task: Task, device: torch.device) -> State:
    config = task.config
    pretrained = ray.get(task.weights) if task.weights is not None else None
    size = config.input_size_px
    network = weights.build(len(task.classes), pretrained, config.seed, config.architecture, size)
    network = network.to(device).to(memory_format=torch.channels_last)
    if config.symmetries:
        _require_orientations(network, config)
    if config.sync_batchnorm and ray.train.get_context().get_world_size() > 1:
        train_step.share_batch_norm(network, device)
    if config.freeze_batchnorm:
        layers.freeze_batch_norm(network)
    layers.drop_features(network.fc, config.dropout)
    optimizer = train_step.optimizer(network, config)
    frozen = train_step.FrozenTrunk(network, config.precision) if config.head == "linear" else None
    average = averaging.average_of(network, config.ema_decay)
    state = State(network, optimizer, average=average, frozen=frozen)
    _resume(state)
    return state


def _require_orientations(network: Network, config: TrainingConfig) -> None:
    """Raises ConfigError for a network whose features cannot be averaged over orientations."""
    if isinstance(network, ResNet):
        return
    if not resnet.has_closed_form(network):
        raise ConfigError(
            f"--symmetries averages maps, and {config.architecture} does not pool by their mean: leave it out"
        )
    if config.input_height_px != config.input_width_px:
        raise ConfigError(
            f"--symmetries turns images, and {config.architecture} may have a fixed input of "
            f"{config.input_height_px}x{config.input_width_px} px: expected a square"
        )


def _resume(state: State) -> None:
    """Load the newest intact checkpoint, if there is one."""
    for checkpoint in _checkpoints():
        try:
            with checkpoint.as_directory() as folder:
                return state.load(Path(folder))
        except BundleError as error:
            logger.warning(f"the checkpoint {checkpoint.path} is damaged ({error}); the one before is used")
    return None


def _checkpoints() -> Iterator[ray.train.Checkpoint]:
    """Those of this run that are kept, newest first."""
    if (newest := ray.train.get_checkpoint()) is None:
        return
    yield newest
    reported = ray.train.get_all_reported_checkpoints()
    older = [one for one in reported if one.checkpoint.path != newest.path]
    yield from (one.checkpoint for one in sorted(older, key=lambda one: -one.metrics[schema.EPOCH]))


def _epoch(
    task: Task, step: train_step.Step, state: State, epoch: int, streams: tuple[Stream, Stream]
) -> dict[str, Any]:
    started = time.monotonic()
    stream, validation = streams
    clock = StepClock(step.device)
    trained = _gather(_train_epoch(task, step, epoch, stream, clock))
    seconds = time.monotonic() - started
    # What validation may end is not begun before.
    if epoch < task.config.epochs and not task.config.patience:
        stream.begin(epoch)
    if not task.config.sync_batchnorm and ray.train.get_context().get_world_size() > 1:
        for network in dict.fromkeys([state.network, state.judged]):
            train_step.average_batch_norm(network)
    validated = _gather(_validate(task, state.judged, step, validation.batches(epoch - 1)))
    if not math.isfinite(validated.loss_sum):
        raise _diverged(task, epoch, "the loss on the validation images is no finite number")
    _log_exposure(task, trained, epoch)
    n, counts = len(trained.targets), Counter(trained.targets)
    return {
        "epoch": epoch,
        "train_loss": trained.loss_sum / n,
        "learning_rate": step.optimizer.param_groups[0]["lr"],
        "seconds": time.monotonic() - started,
        "images_per_s": n / seconds,
        "headspace": min(1.0, clock.seconds() / seconds),
        "images_from": stream.images_from,
        **({"first_step_s": clock.first - task.started} if epoch == 1 else {}),
        "class_counts": {name: counts[target] for target, name in enumerate(task.classes)},
        "workers": ray.train.get_context().get_world_size(),
        **_validation_metrics(task, validated, epoch),
    }


class StepClock:
    """Measures the time that training steps take, to compare with an epoch, in which they also wait."""

    def __init__(self, device: torch.device) -> None:
        self.first = math.nan
        """When the first step ended, in seconds since 1970."""
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context of one step."""
        start = self._now()
        yield
        self._spans.append((start, self._now()))
        if len(self._spans) == 1:
            self.first = time.time()

    def seconds(self) -> float:
        """Total time of all steps."""
        if not self._on_gpu:
            return sum(end - start for start, end in self._spans)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self._spans) / 1_000

    def _now(self) -> Any:
        """Now on the device: a GPU computes a step after the call has returned."""
        if not self._on_gpu:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _train_epoch(task: Task, step: train_step.Step, epoch: int, stream: Stream, clock: StepClock) -> Seen:
    config, world = task.config, ray.train.get_context().get_world_size()
    n_steps = -(-(task.n_train // world) // stream.batch_size)
    seen, losses, told = Seen(), [], Told(task, epoch)
    step.network.train()
    if config.freeze_batchnorm:
        layers.freeze_batch_norm(step.network)
    for i, batch in enumerate(stream.batches(epoch - 1)):
        # Of the middle of the step: the rate is zero at both ends of the training.
        progress = (epoch - 1 + (i + 0.5) / n_steps) / config.epochs
        rate = train_step.learning_rate(config.learning_rate, progress, config.warmup_fraction)
        _require_several(len(batch.images) * (world if config.sync_batchnorm else 1))
        with clock.step():
            loss = step(batch.images, batch.target, rate, batch.image_ids)
        losses.append(loss * len(batch.images))
        seen.add(batch, 0.0)
        told.tell(len(seen.image_ids) * world)
        if len(losses) % CHECK_STEPS == 0:
            _require_finite(task, epoch, losses)
    _require_several(len(losses) * stream.batch_size * world)
    _require_finite(task, epoch, losses, step.network)
    # One transfer at the end: reading the loss at every step would make a GPU wait.
    seen.loss_sum = float(torch.stack(losses).sum())
    return seen


class Told:
    """Log lines within an epoch, for a run whose epochs take long."""

    def __init__(self, task: Task, epoch: int) -> None:
        self._name = f"epoch {epoch}/{task.config.epochs}"
        self._total = task.n_train
        self._speaks = ray.train.get_context().get_world_rank() == 0
        self._started = self._last = time.monotonic()

    def tell(self, n: int) -> None:
        """Log that n images were trained on, unless a line was logged just before."""
        now = time.monotonic()
        if self._speaks and now - self._last >= PROGRESS_S and n < self._total:
            self._last = now
            rate = n / (now - self._started)
            left = duration((self._total - n) / rate)
            logger.info(f"{self._name}: {n:,} of {self._total:,} images, {rate:.1f} images/s, {left} left")


def _require_several(n_images: int) -> None:
    """Raises ConfigError for a step of a single image, which has no variance for batch norm."""
    if n_images < 2:
        raise ConfigError(
            "a training step has a single image, which has no variance for batch norm: use fewer "
            "--num-workers, a larger --batch-size, or more training images"
        )


def _require_finite(
    task: Task, epoch: int, losses: list[torch.Tensor], network: nn.Module | None = None
) -> None:
    """Raises DivergedError on all workers if one has a loss since the last check, or a weight at the end of
    an epoch, that is not finite."""
    start = (len(losses) - 1) // CHECK_STEPS * CHECK_STEPS
    watched = losses[start:] + ([train_step.weights_as_loss(network)] if network is not None else [])
    first = train_step.first_not_finite(watched)
    if ray.train.get_context().get_world_size() > 1:
        torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
    position = int(first)
    if position == len(watched):
        return
    if start + position < len(losses):
        raise _diverged(task, epoch, f"from step {start + position + 1} on the loss is no finite number")
    raise _diverged(task, epoch, f"after its last step, {len(losses)}, the weights are no finite numbers")


def _diverged(task: Task, epoch: int, what: str) -> DivergedError:
    return DivergedError(
        f"the training diverged in epoch {epoch}: {what}. Nothing of this epoch is kept. Train again under "
        f"another --name with a lower --learning-rate than {task.config.learning_rate:g}, or with "
        "--precision float32 if it was not"
    )


@torch.inference_mode()
def _validate(task: Task, network: Network, step: train_step.Step, batches: Iterator[Batch]) -> Seen:
    seen, device = Seen(), step.device
    network.eval()
    for batch in batches:
        images = batch.images.to(device, non_blocking=True).permute(0, 3, 1, 2)
        images = stain.transform(images, task.stain)
        inputs = step.normalised(images)
        if step.frozen:
            logit = network.fc(step.frozen(batch.image_ids, inputs))
        else:
            with resnet.autocast(device, task.config.precision):
                logit = resnet.forward(network, inputs).logit
        loss_sum = nn.functional.cross_entropy(logit, batch.target.to(device), reduction="sum")
        seen.add(batch, float(loss_sum))
        seen.logits.append(logit.cpu().numpy())
    return seen


def _validation_metrics(task: Task, seen: Seen, epoch: int) -> dict[str, float | None]:
    if not task.validates:
        unknown = dict.fromkeys(("validation_loss", "validation_accuracy", SCORE))
        return {**unknown, SELECTION: float(epoch), "n_validation": 0}
    probability = predictor.probabilities(torch.from_numpy(np.concatenate(seen.logits))).numpy()
    targets = np.array(seen.targets)
    measured = measures.multiclass(targets, probability, task.classes)
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
    parts: list[Any] = [seen] * world
    if world > 1:
        torch.distributed.all_gather_object(parts, seen)
    total = Seen()
    for part in parts:
        total.loss_sum += part.loss_sum
        total.image_ids += part.image_ids
        total.targets += part.targets
        total.logits += part.logits
    return total


def _log_exposure(task: Task, seen: Seen, epoch: int) -> None:
    """Record the images that this epoch trained on, the proof that none was held out."""
    if ray.train.get_context().get_world_rank() != 0:
        return
    columns = {schema.EPOCH: [epoch] * len(seen.image_ids), schema.IMAGE_ID: seen.image_ids}
    uri = storage.join(task.run_uri, EXPOSURE, f"epoch-{epoch:04d}.parquet")
    storage.write_table(uri, pa.table(columns, schema=schema.EXPOSURE))


def _publish(task: Task, board: SummaryWriter, folder: Path, history: list[dict[str, Any]]) -> None:
    record = history[-1]
    for name, value in record.items():
        if isinstance(value, float):
            board.add_scalar(name, value, record["epoch"])
    board.flush()
    for path in folder.iterdir():
        uri = storage.join(task.run_uri, "tensorboard", without_host(path.name))
        storage.write_bytes(uri, path.read_bytes())
    run_directory.write_json(task.run_uri, HISTORY, history)
    # Ray Train echoes what a worker prints: a print would appear twice.
    logger.info(progress_line(record, task.config.epochs))


def without_host(name: str) -> str:
    """The name of a file of TensorBoard without that of this host, which others need not know."""
    return name.replace(f".{socket.gethostname()}.", ".")


def progress_line(record: dict[str, Any], epochs: int) -> str:
    """The log line of one epoch."""
    counts = ", ".join(f"{name} {n:,}" for name, n in record["class_counts"].items())
    left = duration((epochs - record["epoch"]) * record["seconds"])
    validated = ""
    if n := record["n_validation"]:
        validated = (
            f" (validation {record['validation_loss']:.3f}), balanced accuracy {record[SCORE]:.3f} on "
        )
        validated += f"{n:,} validation images"
    return (
        f"epoch {record['epoch']}/{epochs}: loss {record['train_loss']:.3f}{validated}; "
        f"saw {counts}; learning rate {record['learning_rate']:.1e}; "
        f"{record['images_per_s']:.1f} images/s (headspace {record['headspace']:.2f}, images from "
        f"{record['images_from']}), {record['seconds']:.0f} s; {left} left"
    )


def _checkpoint(state: State, record: dict[str, Any]) -> None:
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(record)
        return
    with tempfile.TemporaryDirectory() as folder:
        state.save(Path(folder))
        ray.train.report(record, checkpoint=ray.train.Checkpoint.from_directory(folder))
