"""The optimiser, its learning rate, augmentation, and one training step, on one device or many. Pure torch.

Batch norm uses the batches of all workers, so that a model does not depend on their number: with 32 images a
step on eight workers, plain batch norm would normalise by four images each.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from bcd.config.training import TrainingConfig
from bcd.imaging.image import IMAGENET_MEAN, IMAGENET_STD
from bcd.model import resnet
from bcd.model.networks.backbone import Backbone
from bcd.model.networks.timm_weights import load_timm
from bcd.model.recipes import layers, stain
from bcd.model.recipes.loss import Loss
from bcd.model.recipes.reference import Macenko, Reinhard
from bcd.model.resnet import Network, normalise

# Of the augmentation: shares of the area that are kept, the most by which a side is stretched, tries to find
# such a part, and the largest changes of brightness, contrast and saturation, and of the hue in radians.
AREA, STRETCH, TRIES = (0.6, 1.0), 0.1, 10
FACTOR, HUE = 0.2, 0.03 * 2 * math.pi
# Features of images that are kept where the last layer alone is trained, on the device of the network.
FROZEN_BYTES = 2**31
# Maps from places in an image turned by 0, 90, 180 and 270 degrees to those in the image, x before y.
QUARTER_TURNS = torch.tensor(
    [[[1, 0], [0, 1]], [[0, -1], [1, 0]], [[-1, 0], [0, -1]], [[0, 1], [-1, 0]]]
).float()


def _color_parts() -> tuple[Tensor, Tensor, Tensor]:
    """Linear maps of RGB to its luma, as a grey; to the rest, its chroma; and to that, its hue turned by a
    right angle."""
    luma = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)
    rest = torch.eye(3) - luma
    # The turn about the grey axis, and the same luma again.
    about_grey = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return luma, rest, rest @ about_grey


COLOR_PARTS = _color_parts()


def optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW or SGD with Nesterov momentum, of what is not frozen, over the groups of
    `layers.parameter_groups`."""
    groups = layers.parameter_groups(network, config.weight_decay, config.layer_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.learning_rate)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=0.9, nesterov=True)


class FrozenTrunk:
    """A network of which only the last layer, `fc`, is trained: what enters it is computed once an image.

    Freezes the others in place; running statistics of batch norms remain those of the initial weights.
    """

    def __init__(self, network: Network, precision: str) -> None:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith("fc."))
        self.network, self._precision = network.eval(), precision
        self._known: dict[str, Tensor] = {}
        self._room = FROZEN_BYTES // (4 * network.fc.in_features)

    def __call__(self, image_ids: Sequence[str], images: Tensor) -> Tensor:
        """What enters the last layer, float32 (n, channels), of normalised images with these ids."""
        if all(name in self._known for name in image_ids):
            return torch.stack([self._known[name] for name in image_ids])
        with torch.no_grad(), resnet.autocast(images.device, self._precision):
            pooled = resnet.forward(self.network, images).pooled
        for name, row in zip(image_ids, pooled, strict=True):
            if len(self._known) < self._room:
                self._known[name] = row
        return pooled


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


class Draws(NamedTuple):
    """What augmentation changes in each of n images; on the CPU.

    First is_flipped (n,) bool, then turns (n,), by 90 degrees each, then the part of the turned image that
    fills the result: its corner and size (n, 2) in px, x before y. Last color (n, 4): factors of brightness,
    contrast and saturation, and the turn of the hue in radians. With stain jitter also the factors (n, 3) of
    `stain.draw_amounts`.
    """

    is_flipped: Tensor
    turns: Tensor
    corner: Tensor
    part: Tensor
    color: Tensor
    stain: Tensor | None = None


def draw(n: int, height_px: int, width_px: int, stain_jitter: float = 0.0) -> Draws:
    """Draw from torch's generator what may change in a field of tissue without changing its class."""
    is_flipped, turns = torch.rand(n) < 0.5, torch.randint(4, (n,))
    corner, part = _draw_parts(_turned(turns, height_px, width_px), width_px / height_px)
    # Stains differ between laboratories far more than between classes.
    factors, hue = torch.empty(n, 3).uniform_(1 - FACTOR, 1 + FACTOR), torch.empty(n, 1).uniform_(-HUE, HUE)
    amounts = stain.draw_amounts(n, stain_jitter) if stain_jitter else None
    return Draws(is_flipped, turns, corner, part, torch.cat([factors, hue], 1), amounts)


def _turned(turns: Tensor, height_px: int, width_px: int) -> Tensor:
    """Width and height (n, 2) of images after their turns."""
    size = torch.tensor([width_px, height_px]).expand(len(turns), 2)
    return torch.where((turns % 2 == 1)[:, None], size.flip(1), size)


def _draw_parts(size: Tensor, aspect: float) -> tuple[Tensor, Tensor]:
    """Corner and size of a part of images of sizes (n, 2), as torchvision's RandomResizedCrop draws them: one
    that does not fit is drawn again, and after `TRIES` it is the largest, in the middle."""
    n, low, high = len(size), aspect * (1 - STRETCH), aspect * (1 + STRETCH)
    area = size.prod(1, keepdim=True) * torch.empty(n, TRIES).uniform_(*AREA)
    ratio = torch.empty(n, TRIES).uniform_(math.log(low), math.log(high)).exp()
    parts = torch.stack([area * ratio, area / ratio], 2).sqrt().round()
    does_fit = (parts <= size[:, None]).all(2)
    part = parts[torch.arange(n), does_fit.int().argmax(1)]
    corner = (torch.rand(n, 2) * (size - part + 1)).floor()
    width, height = size.unbind(1)
    largest = torch.stack([(height * high).round(), (width / low).round()], 1).minimum(size)
    is_found, middle = does_fit.any(1, keepdim=True), ((size - largest) / 2).floor()
    return torch.where(is_found, corner, middle), torch.where(is_found, part, largest)


def augment(images: Tensor, draws: Draws) -> Tensor:
    """Apply the draws to a whole batch, on its own device.

    Takes uint8 (n, 3, height, width), or what `stain.transform` makes of it, and returns uint8 of that shape.
    """
    places = _places(draws, *images.shape[2:]).to(images.device, non_blocking=True)
    grid = functional.affine_grid(places, list(images.shape), align_corners=False)
    kept = images.to(torch.float32, memory_format=torch.contiguous_format)
    # Without a filter: at most a tenth of the resolution is lost.
    parts = functional.grid_sample(kept, grid, padding_mode="border", align_corners=False)
    if draws.stain is not None:
        parts = stain.jitter(parts, draws.stain)
    changed = recolor(parts, draws.color.to(images.device, non_blocking=True))
    return changed.round_().clamp_(0, 255).to(torch.uint8)


def _places(draws: Draws, height_px: int, width_px: int) -> Tensor:
    """Affine maps (n, 2, 3) from places in the result to places in the image, both from -1 to 1, x before
    y."""
    size = _turned(draws.turns, height_px, width_px)
    scale, shift = draws.part / size, (2 * draws.corner + draws.part) / size - 1
    places = QUARTER_TURNS[draws.turns] @ torch.cat([torch.diag_embed(scale), shift[..., None]], 2)
    places[draws.is_flipped, 0] *= -1
    return places


def recolor(images: Tensor, color: Tensor) -> Tensor:
    """Change the colours of float32 (n, 3, height, width), from 0 to 255, by the `color` of `Draws`; results
    may exceed that range.

    In whatever order the four are applied, they are one linear map: of a colour about its luma, of luma about
    its mean over the image, and of everything by the brightness.
    """
    luma, chroma, turned = (part.to(images.device, non_blocking=True) for part in COLOR_PARTS)
    brightness, contrast, saturation, hue = color[..., None, None].unbind(1)
    change = luma + saturation * (hue.cos() * chroma + hue.sin() * turned)
    offset = brightness * (1 - contrast) * (luma @ images.mean((2, 3))[..., None])
    changed = torch.baddbmm(offset, brightness * contrast * change, images.flatten(2))
    return changed.view_as(images)


@dataclass(frozen=True)
class Step:
    """One optimiser step on batches of uint8 images, on the device of the network.

    `config` says what a step does, `class_weights` (classes,) are those of the loss, `stain` is what images
    are normalised to, and `average` follows the weights of the network.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    config: TrainingConfig
    class_weights: Sequence[float] | None = None
    stain: Macenko | Reinhard | None = None
    average: AveragedModel | None = None
    frozen: FrozenTrunk | None = None
    """What comes before `network`, where that is a last layer alone; its images are not augmented."""

    @cached_property
    def loss(self) -> Loss:
        """The loss that the settings state, with these weights."""
        weights = torch.tensor(self.class_weights, device=self.device) if self.class_weights else None
        return Loss(self.config.label_smoothing, self.config.mixup, weights)

    def normalised(self, images: Tensor) -> Tensor:
        """Input of the network, float32, from uint8 (n, 3, height, width)."""
        mean, std = self.config.mean or IMAGENET_MEAN, self.config.std or IMAGENET_STD
        return normalise(images, mean, std).contiguous(memory_format=torch.channels_last)

    def __call__(self, images: Tensor, target: Tensor, rate: float, image_ids: Sequence[str] = ()) -> Tensor:
        """Train on uint8 (n, height, width, 3) RGB and int64 (n,) class indices, at a learning rate. What is
        frozen knows images by their ids.

        Returns:
            The mean loss, a scalar on the device, detached.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get(layers.SCALE, 1.0)
        batch = stain.transform(images.to(self.device, non_blocking=True).permute(0, 3, 1, 2), self.stain)
        if self.config.augment and not self.frozen:
            n, _, height, width = batch.shape
            batch = augment(batch, draw(n, height, width, self.config.stain_jitter))
        batch = self.normalised(batch)
        batch = self.frozen(image_ids, batch) if self.frozen else batch
        batch, targets = self.loss.mix(batch, target.to(self.device, non_blocking=True))
        with resnet.autocast(self.device, self.config.precision):
            logit = self.network(batch)
        loss = self.loss(logit.float(), targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
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
    """torch's SyncBatchNorm for CPUs, which it does not support; also in place of timm's batch norms, which
    contain what follows them."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (n, channels, height, width) by mean and variance over all workers' batches. Collective:
        every worker has to call it. In evaluation, plain batch norm."""
        x = self._normalised(x) if self.training else super().forward(x)
        for follower in ("drop", "act"):
            x = getattr(self, follower, nn.Identity())(x)
        return x

    def _normalised(self, x: Tensor) -> Tensor:
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
        if isinstance(network, Backbone):
            return cast(nn.Module, load_timm().layers.convert_sync_batchnorm(network))
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            # Only `forward` differs; parameters and buffers remain those of the optimiser.
            module.__class__ = SharedBatchNorm
    return network


def average_batch_norm(network: nn.Module) -> None:
    """Average the running statistics of all workers, in place: after steps in which each used its own images
    alone, they would validate different models. Collective."""
    for buffer in filter(torch.is_floating_point, network.buffers()):
        dist.all_reduce(buffer)
        buffer.div_(dist.get_world_size())
