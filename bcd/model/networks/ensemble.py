"""Several networks as one: the mean of their logits.

Each ends in a linear layer over its pooled features, and the mean of linear maps is linear: over the features
of all, one network after another, it is one linear layer. So logits, evidence, bias, novelty and embeddings
of an ensemble are those of a network with that last layer, and what holds for one network holds for it.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Networks with a linear last layer `fc` each, over the same number of features.

    Its tensors are those of the members, whose names begin with `members.0.`, `members.1.` and so on. `fc`,
    the joint last layer, is there after `join`, and in no file.
    """

    fc: nn.Linear

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of normalised images (n, 3, height, width), by each member's own way."""
        return torch.stack([member(images) for member in self.members]).mean(0)

    def heads(self) -> list[Any]:
        """The last layer of each member."""
        return [member.fc for member in self.members]

    def join(self) -> Self:
        """Make `fc` of the last layers of the members as they are now. For evaluation only."""
        heads = self.heads()
        weight = torch.cat([head.weight for head in heads], 1) / len(heads)
        self.fc = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        self.fc.weight = nn.Parameter(weight.detach())
        self.fc.bias = nn.Parameter(torch.stack([head.bias for head in heads]).mean(0).detach())
        return self

    def logits(self, pooled: Tensor) -> Tensor:
        """Logits (n, members, classes) of each member, from the pooled features (n, channels) of all."""
        parts = pooled.chunk(len(self.members), 1)
        return torch.stack([head(part) for head, part in zip(self.heads(), parts, strict=True)], 1)
