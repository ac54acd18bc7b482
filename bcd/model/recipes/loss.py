"""The training loss: cross-entropy, with smoothed labels, mixed images and weighted classes where set."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Mixed:
    """Targets of mixed images: `share` of the first and the rest of the second; both int64 (n,)."""

    first: Tensor
    second: Tensor
    share: float


@dataclass(frozen=True)
class Loss:
    """Cross-entropy of a batch, plain by default.

    `smoothing` distributes this share of each target evenly over the classes (Szegedy et al. 2016, arXiv
    1512.00567). `mixup` is the parameter of the beta distribution from which the share of a mixture is drawn
    (Zhang et al. 2018, arXiv 1710.09412). `weights` (classes,) multiply the loss of each image by that of its
    class: with those of `balance.class_weights` its expectation is that of upsampled rows.
    """

    smoothing: float = 0.0
    mixup: float = 0.0
    weights: Tensor | None = None

    def mix(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor | Mixed]:
        """Images (n, ...), each mixed with another of the batch, and their targets; unchanged without
        `mixup`."""
        if not self.mixup:
            return images, target
        share = float(torch.distributions.Beta(self.mixup, self.mixup).sample())
        other = torch.randperm(len(images)).to(images.device)
        return torch.lerp(images[other], images, share), Mixed(target, target[other], share)

    def __call__(self, logit: Tensor, target: Tensor | Mixed) -> Tensor:
        """The mean loss of float32 logits (n, classes), a scalar."""
        if isinstance(target, Mixed):
            first, second = self(logit, target.first), self(logit, target.second)
            return target.share * first + (1 - target.share) * second
        if self.weights is None:
            return functional.cross_entropy(logit, target, label_smoothing=self.smoothing)
        each = functional.cross_entropy(logit, target, reduction="none", label_smoothing=self.smoothing)
        return (each * self.weights[target]).mean()
