"""Batch norm over the batches of all training workers, so that a model does not depend on their number.

With 32 images a step on eight workers, plain batch norm would normalise by four images each.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _Normalise(torch.autograd.Function):
    """Normalise by the mean and variance of all workers' batches; the gradient goes through both.

    With the kernels of plain batch norm, because written out as sums and products it makes a whole training
    step twice as long on a CPU. They are those of evaluation, which take mean and variance as given; what is
    lacking then in the gradient, how both depend on x, is linear in x within a channel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        total: Tensor,
        eps: float,
    ) -> Tensor:
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
    """What torch's SyncBatchNorm, which refuses CPUs, does on GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (n, channels, height, width) by mean and variance over all workers' batches; the gradient
        goes through both. Collective: every worker has to call it. In evaluation plain batch norm."""
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
    """Mean and variance (channels,) over the batches of all workers, and over how many values, in float64."""
    # The kernel calculates as precisely as the running statistics are that it is given, not used here.
    unused = torch.zeros(2, x.shape[1], dtype=dtype)
    mean, var = (v.double() for v in torch.ops.aten.batch_norm_update_stats(x, *unused, 0.0))
    n = x.numel() // x.shape[1]
    # In float64, because the mean square minus the squared mean loses digits.
    summed = torch.cat([n * mean, n * (var + mean**2), mean.new_tensor([n])])
    dist.all_reduce(summed)
    total = summed[-1]
    mean, square = summed[:-1].view(2, -1) / total
    return mean, square - mean**2, total


def share(network: nn.Module, device: torch.device) -> nn.Module:
    """Let the batch norms of a network count the batches of all workers of the process group, in place."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            # All that differs is `forward`; parameters and buffers stay those that the optimiser knows.
            module.__class__ = SharedBatchNorm
    return network


def average(network: nn.Module) -> None:
    """Give every worker the mean of all workers' running statistics, in place: after steps in which each
    counted its own images alone, they would validate different models. Collective."""
    for buffer in filter(torch.is_floating_point, network.buffers()):
        dist.all_reduce(buffer)
        buffer.div_(dist.get_world_size())
