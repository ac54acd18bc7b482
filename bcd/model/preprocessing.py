"""Preprocessing of a batch on its device: the evaluation preset and the training preset."""

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.transforms import v2

from bcd.imaging.image import IMAGENET_MEAN, IMAGENET_STD

# torchvision draws one crop, flip and colour per call; this many images share them. Small enough for variety
# within a batch, large enough to keep a GPU busy.
IMAGES_PER_DRAW = 4


def normalise(
    images: torch.Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> torch.Tensor:
    """Evaluation preset: uint8 (n, 3, height, width) to the network's float32 input."""
    return v2.functional.normalize(v2.functional.to_dtype(images, torch.float32, scale=True), mean, std)


def augmentation(height: int, width: int) -> v2.Transform:
    """Training preset for `augment`: transformations of a field of tissue that keep its class."""
    aspect = width / height
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            QuarterTurns(),
            v2.RandomResizedCrop(
                (height, width), scale=(0.6, 1.0), ratio=(aspect * 0.9, aspect * 1.1), antialias=True
            ),
            # Stains differ far more between laboratories than between classes.
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.03),
        ]
    )


class QuarterTurns(v2.Transform):
    """Rotate by 0, 90, 180 or 270 degrees, without resampling; height and width may be exchanged."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        """Draw the number of turns from torch's generator."""
        return {"turns": int(torch.randint(4, ()))}

    def transform(self, inpt: torch.Tensor, params: dict[str, int]) -> torch.Tensor:
        """Rotate (..., height, width)."""
        return torch.rot90(inpt, params["turns"], (-2, -1))


def augment(images: torch.Tensor, transform: v2.Transform) -> torch.Tensor:
    """Apply the training preset from `augmentation` to uint8 (n, 3, height, width) on its own device."""
    return torch.cat([transform(group) for group in images.split(IMAGES_PER_DRAW)])
