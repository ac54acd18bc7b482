"""How long a few images take in this process, from which a dry run estimates how long all of them would.

The network has random weights, or is that of the bundle. Nothing is written, and no Ray is started.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import pyarrow as pa
import torch

from bcd import schema, taxonomy
from bcd.config.training import TrainingConfig
from bcd.data import read
from bcd.model import predictor, resnet, train_step, weights
from bcd.model.recipes import averaging, layers
from bcd.model.resnet import Network
from bcd.text import counted

# Images that are read, and at most that many at a time in a network on a CPU.
SAMPLED = 8
# After one that is not: the first one plans kernels and allocates memory.
MEASURED_STEPS = 2


@dataclass(frozen=True)
class Read:
    """Rows that were read, their fitted images, uint8 (n, height, width, 3), black where one cannot be used,
    the codes of errors, and the seconds of one image in one process."""

    images: np.ndarray
    errors: list[str]
    seconds: float


@dataclass(frozen=True)
class Pace:
    """Seconds of an image on a device: `train` in a training step, `forward` in a forward pass; and the bytes
    of the parameters."""

    device: str
    is_gpu: bool
    n_images: int
    forward: float
    train: float = 0.0
    n_bytes: int = 0


def read_sample(rows: pa.Table, height_px: int, width_px: int, n: int = SAMPLED) -> Read:
    """Read, decode and fit some of the rows, evenly over all of them."""
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(n, len(rows))).round().astype(int))
    ready = schema.fill(rows.take(pa.array(chosen)), schema.READING)
    started = time.perf_counter()
    batch = read.pixels(ready, height_px, width_px, [schema.IMAGE_ID])
    seconds = (time.perf_counter() - started) / max(1, len(chosen))
    return Read(batch[schema.IMAGE], [code for code in batch[schema.ERROR] if code], seconds)


class _NoUpdate:
    """In place of an optimiser: with one, torch imports its compiler, which takes seconds and makes a folder
    for temporary files."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.param_groups: list[dict[str, object]] = []
        self._network = network

    def zero_grad(self, set_to_none: bool) -> None:
        """Forget the gradients."""
        self._network.zero_grad(set_to_none)

    def step(self) -> None:
        """Leave the weights as they are."""


def training_pace(config: TrainingConfig, images: np.ndarray) -> Pace:
    """Training steps without the update of the weights, and forward passes of validation, on copies of some
    images."""
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    batch = torch.from_numpy(_repeated(images, config.batch_size, device.type))
    classes = taxonomy.classes(config.target)
    target = torch.arange(len(batch)) % len(classes)
    names = [str(i) for i in range(len(batch))]
    size = config.input_size_px
    network = weights.build(len(classes), None, config.seed, config.architecture, size)
    network = network.to(device).to(memory_format=torch.channels_last)
    step = _step(config, network, device)
    step.network.train()
    if config.freeze_batchnorm:
        layers.freeze_batch_norm(step.network)
    train = _seconds(lambda: step(batch, target, config.learning_rate, names).item(), len(batch))
    network.eval()
    inputs = step.normalised(batch.to(device).permute(0, 3, 1, 2))

    def validate() -> None:
        with torch.inference_mode(), resnet.autocast(device, config.precision):
            resnet.forward(network, inputs).logit.cpu()

    n_bytes = sum(tensor.nbytes for tensor in network.state_dict().values())
    return Pace(*_named(device), len(batch), _seconds(validate, len(batch)), train, n_bytes)


def _step(config: TrainingConfig, network: Network, device: torch.device) -> train_step.Step:
    """The step of a training with one worker, without the update of the weights, and without the stain that
    images are normalised to."""
    resnet.set_precision(config.precision)
    frozen = train_step.FrozenTrunk(network, config.precision) if config.head == "linear" else None
    average = averaging.average_of(network, config.ema_decay)
    optimizer = cast(torch.optim.Optimizer, _NoUpdate(network))
    trained = network.fc if frozen else network
    return train_step.Step(trained, optimizer, device, config, average=average, frozen=frozen)


def scoring_pace(
    model: predictor.Predictor, images: np.ndarray, batch_size: int, cam: str, cam_layer: str
) -> Pace:
    """Predictions with their maps, on copies of some images."""
    batch = _repeated(images, batch_size, model.device.type)
    seconds = _seconds(lambda: model.predict(batch, cam, cam_layer), len(batch))
    return Pace(*_named(model.device), len(batch), seconds)


def _repeated(images: np.ndarray, batch_size: int, device: str) -> np.ndarray:
    """A batch of copies of the images; on a CPU, where a large one is no faster an image, of few."""
    n = batch_size if device == "cuda" else min(batch_size, SAMPLED)
    return np.ascontiguousarray(np.resize(images, (n, *images.shape[1:])))


def _seconds(work: Callable[[], object], n: int) -> float:
    """Of one of n images; `work` ends when the device has computed it."""
    work()
    started = time.perf_counter()
    for _ in range(MEASURED_STEPS):
        work()
    return (time.perf_counter() - started) / MEASURED_STEPS / n


def _named(device: torch.device) -> tuple[str, bool]:
    """The name of a device, and whether it is a GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device), True
    return f"a CPU with {counted(torch.get_num_threads(), 'thread')}", False
