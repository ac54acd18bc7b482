"""An image in its eight orientations: tissue has no upside, so that each is an image of the same field."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Features = Callable[[Tensor], Tensor]
N = 8


def averaged(features: Features) -> Features:
    """The mean of the features (n, channels, h, w) over flips and quarter turns of the images, turned back.

    What follows is linear in the features: the mean over each image, and the last layer. So the logits are
    the means of those of the orientations, and so is the evidence, whose mean plus bias remains the log-odds.
    """
    return partial(_averaged, features)


def _averaged(features: Features, images: Tensor) -> Tensor:
    total = None
    for is_flipped in (False, True):
        for turns in range(4):
            turned = torch.rot90(images.flip(3) if is_flipped else images, turns, (2, 3))
            maps = features(turned.contiguous(memory_format=torch.channels_last)).float()
            back = torch.rot90(maps, -turns, (2, 3))
            back = (back.flip(3) if is_flipped else back) / N
            total = back if total is None else total + back
    assert total is not None
    return total
