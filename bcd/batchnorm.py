"""Batch norm over the batches of all training workers, so that a model does not depend on their number.

With 32 images a step on eight workers, plain batch norm would normalise by four images each.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn


class _Sum(torch.autograd.Function):
    """The sum over all workers: each worker's loss depends on what every worker added."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


class SharedBatchNorm(nn.BatchNorm2d):
    """What torch's SyncBatchNorm, which refuses CPUs, does on GPUs."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (n, channels, height, width) by mean and variance over all workers' batches; the gradient
        goes through both. Collective: every worker has to call it. In evaluation plain batch norm."""
        if not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        n = x.numel() // x.shape[1]
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        # In float64, because the mean square minus the squared mean loses digits.
        mean, var = mean.double(), var.double()
        counted = torch.cat([n * mean, n * (var + mean**2), mean.new_tensor([n])])
        summed = _Sum.apply(counted)
        total = summed[-1].detach()
        mean, square = summed[:-1].view(2, -1) / total
        var = square - mean**2
        self._remember(mean.detach(), var.detach() * total / (total - 1))
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        scale, shift = (v.to(wide.dtype).view(1, -1, 1, 1) for v in (scale, shift))
        return torch.addcmul(shift, wide, scale).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor) -> None:
        self.get_buffer("num_batches_tracked").add_(1)
        for name, new in (("running_mean", mean), ("running_var", var)):
            kept = self.get_buffer(name)
            kept.lerp_(new.to(kept.dtype), cast(float, self.momentum))


def share(network: nn.Module, device: torch.device) -> nn.Module:
    """Let the batch norms of a network count the batches of all workers of the process group, in place."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            # All that differs is `forward`; parameters and buffers stay those that the optimiser knows.
            module.__class__ = SharedBatchNorm
    return network
