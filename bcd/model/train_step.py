"""The optimiser, its learning rate, augmentation, and one training step, on one device or many. Pure torch.

Batch norm uses the batches of all workers, so that a model does not depend on their number: with 32 images a
step on eight workers, plain batch norm would normalise by four images each.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torchvision.transforms import v2

from bcd.model import resnet
from bcd.model.resnet import normalise

# torchvision draws one crop, flip and colour per call; this many images share a draw. Small enough for
# variety within a batch, large enough to keep a GPU busy.
IMAGES_PER_DRAW = 4


def optimizer(
    network: nn.Module, name: str, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW or SGD with Nesterov momentum; biases and norms are not decayed."""
    decayed = [p for p in network.parameters() if p.ndim > 1]
    kept = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate)
    return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)


def learning_rate(peak: float, progress: float, warmup_fraction: float) -> float:
    """Linear warm-up, then a cosine to zero.

    Depends only on the fraction of training done, so that it is continuous where a run is resumed with
    another number of workers.
    """
    if progress < warmup_fraction:
        return peak * progress / warmup_fraction
    done = (progress - warmup_fraction) / (1 - warmup_fraction)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def even_tail(
    batches: Iterable[Mapping[str, np.ndarray]], batch_size: int
) -> Iterator[Mapping[str, np.ndarray]]:
    """Distribute the rows of the last two batches evenly where the last has fewer than `batch_size`.

    Batch norm over the one or two images at the end of an epoch spoils the running statistics just before
    they are validated and kept: it cost up to 25 points of balanced accuracy on a set of 112 images.
    """
    held: Mapping[str, np.ndarray] | None = None
    batch: Mapping[str, np.ndarray] | None
    for batch in batches:
        if held is not None:
            if len(next(iter(batch.values()))) < batch_size:
                joined = {name: np.concatenate([held[name], batch[name]]) for name in held}
                n = len(next(iter(joined.values())))
                # Three rows are one batch: half of them would be a single image.
                half = n if n < 4 else -(-n // 2)
                held = {name: rows[:half] for name, rows in joined.items()}
                batch = {name: rows[half:] for name, rows in joined.items()} if half < n else None
            yield held
        held = batch
    if held is not None:
        yield held


def first_not_finite(losses: Sequence[Tensor]) -> Tensor:
    """Index of the first loss that is not finite, or their number where all are: int64, on their device, so
    that nothing waits for it here."""
    bad = ~torch.stack([*losses, losses[0].new_tensor(torch.nan)]).isfinite()
    return bad.int().argmax()


def weights_as_loss(network: nn.Module) -> Tensor:
    """Zero where all weights and running statistics are finite, else NaN, as a last loss for
    `first_not_finite`."""
    tensors = filter(torch.is_floating_point, network.state_dict().values())
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
    return torch.where(finite, 0.0, torch.nan)


def augmentation(height: int, width: int) -> v2.Transform:
    """Training preset for `augment`: what may change in a field of tissue without changing its class."""
    aspect = width / height
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            QuarterTurns(),
            v2.RandomResizedCrop(
                (height, width), scale=(0.6, 1.0), ratio=(aspect * 0.9, aspect * 1.1), antialias=True
            ),
            # Stains differ between laboratories far more than between classes.
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.03),
        ]
    )


class QuarterTurns(v2.Transform):
    """Rotate by 0, 90, 180 or 270 degrees, without resampling; height and width may change places."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        """Draw the number of turns from torch's generator."""
        return {"turns": int(torch.randint(4, ()))}

    def transform(self, inpt: torch.Tensor, params: dict[str, int]) -> torch.Tensor:
        """Turn (..., height, width)."""
        return torch.rot90(inpt, params["turns"], (-2, -1))


def augment(images: torch.Tensor, transform: v2.Transform) -> torch.Tensor:
    """Apply the training preset to a whole batch on its own device.

    Args:
        images: uint8 (n, 3, height, width).
        transform: from `augmentation`.

    Returns:
        uint8 of the same shape.
    """
    return torch.cat([transform(group) for group in images.split(IMAGES_PER_DRAW)])


@dataclass(frozen=True)
class Step:
    """One optimiser step on batches of uint8 images, on the device of the network."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str
    augmentation: v2.Transform | None

    def __call__(self, images: Tensor, target: Tensor, rate: float) -> Tensor:
        """Train on uint8 (n, height, width, 3) RGB and int64 (n,) class indices, at a learning rate.

        Returns:
            The mean loss, a scalar on the device, detached.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        if self.augmentation is not None:
            batch = augment(batch, self.augmentation)
        batch = normalise(batch).contiguous(memory_format=torch.channels_last)
        with resnet.autocast(self.device, self.precision):
            logit = self.network(batch)
        loss = nn.functional.cross_entropy(logit.float(), target.to(self.device, non_blocking=True))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class _Normalise(torch.autograd.Function):
    """Normalise by the mean and variance of all workers' batches, and propagate the gradient through both.

    Uses the kernels of plain batch norm, because sums and products double the time of a training step on a
    CPU. They are those of evaluation, which treat mean and variance as constants; the missing part of the
    gradient, the dependence of both on x, is linear in x within a channel.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, mean, var, total, eps = inputs
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.eps = eps
        return functional.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, total = ctx.saved_tensors
        given = (x, weight, mean, var, None, None, False, ctx.eps, [True, True, True])
        straight, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(gradient, *given)
        summed = torch.stack([of_weight, of_bias]).double()
        dist.all_reduce(summed)
        slope, offset = -(summed / total).to(weight.dtype) * weight * torch.rsqrt(var + ctx.eps)
        through_both = functional.batch_norm(x, mean, var, slope, offset, eps=ctx.eps)
        return straight.add_(through_both), of_weight, of_bias, None, None, None, None


class SharedBatchNorm(nn.BatchNorm2d):
    """torch's SyncBatchNorm for CPUs, which it does not support."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (n, channels, height, width) by mean and variance over all workers' batches. Collective:
        every worker has to call it. In evaluation, plain batch norm."""
        if not self.training:
            return super().forward(x)
        mean, var, total = _over_all(x.detach(), self.weight.dtype)
        self._remember(mean, var * total / (total - 1))
        mean, var = mean.to(self.weight.dtype), var.to(self.weight.dtype)
        return cast(Tensor, _Normalise.apply(x, self.weight, self.bias, mean, var, total, self.eps))

    def _remember(self, mean: Tensor, var: Tensor) -> None:
        self.get_buffer("num_batches_tracked").add_(1)
        for name, new in (("running_mean", mean), ("running_var", var)):
            kept = self.get_buffer(name)
            kept.lerp_(new.to(kept.dtype), cast(float, self.momentum))


def _over_all(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance (channels,) over the batches of all workers, and the number of values, in float64."""
    # The kernel has the precision of the running statistics that it is given, which are not used here.
    unused = torch.zeros(2, x.shape[1], dtype=dtype)
    mean, var = (v.double() for v in torch.ops.aten.batch_norm_update_stats(x, *unused, 0.0))
    n = x.numel() // x.shape[1]
    # In float64, because the mean square minus the squared mean loses digits.
    summed = torch.cat([n * mean, n * (var + mean**2), mean.new_tensor([n])])
    dist.all_reduce(summed)
    total = summed[-1]
    mean, square = summed[:-1].view(2, -1) / total
    return mean, square - mean**2, total


def share_batch_norm(network: nn.Module, device: torch.device) -> nn.Module:
    """Make the batch norms of a network use the batches of all workers of the process group, in place."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            # Only `forward` differs; parameters and buffers remain those of the optimiser.
            module.__class__ = SharedBatchNorm
    return network


def average_batch_norm(network: nn.Module) -> None:
    """Average the running statistics of all workers, in place: after steps in which each used its own images
    alone, they would validate different models. Collective."""
    for buffer in filter(torch.is_floating_point, network.buffers()):
        dist.all_reduce(buffer)
        buffer.div_(dist.get_world_size())
