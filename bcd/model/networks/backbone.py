"""Networks of timm behind one interface: features, what enters the last layer, and where a map can be drawn.

Whether the mean of a map can add up to the log-odds is asked of the network itself: its own head gets random
features, and returns their mean over the image or something else.
"""

import math
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bcd.config.options import INPUT_PX
from bcd.errors import BundleError
from bcd.model.networks import timm_weights

# What timm and torch raise for names, sizes and arguments that do not fit together.
UNFIT = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Largest difference between the mean of random features, of about 1, and what the head makes of them.
ROUNDING = 1e-4


class Layout(NamedTuple):
    """What an input becomes: cells of the map down and across, whether the mean of the features enters the
    last layer, and the module whose features a map explains."""

    height: int
    width: int
    is_mean: bool
    layer: str


class Backbone(nn.Module):
    """A network of timm, without its own classifier, and a last layer `fc` of `n_classes`.

    Raises BundleError where timm has no such network, or it cannot have an input of this size, height and
    width in px.
    """

    def __init__(self, architecture: str, n_classes: int, size_px: tuple[int, int] = INPUT_PX) -> None:
        super().__init__()
        self.architecture, self.size_px = architecture, size_px
        self.body = created(architecture, size_px)
        self.before_pool = nn.Identity()
        self.fc = nn.Linear(self.body.head_hidden_size, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of normalised images (n, 3, height, width)."""
        return self.fc(self.pool(self.features(images)))

    def direct(self, images: Tensor) -> Tensor:
        """The same by timm's own forward pass, to compare with."""
        return self.fc(self.body(images))

    def features(self, images: Tensor) -> Tensor:
        """The features before pooling, in the layout of the network: see `spatial`."""
        return self.before_pool(self.body.forward_features(images))

    def pool(self, features: Tensor) -> Tensor:
        """What enters the last layer, (n, channels), of `features`."""
        return self.body.forward_head(features, pre_logits=True)

    def spatial(self, features: Tensor) -> Tensor:
        """Features as (n, channels, h, w), from maps with channels first or last, or from tokens (n, length,
        channels), of which the first may be no places."""
        if features.ndim == 4:
            is_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"
            return features.permute(0, 3, 1, 2) if is_last else features
        places = features[:, getattr(self.body, "num_prefix_tokens", 0) :]
        rows = round(math.sqrt(places.shape[1] * self.size_px[0] / self.size_px[1]))
        return places.unflatten(1, (rows, -1)).permute(0, 3, 1, 2)

    @cached_property
    def layout(self) -> Layout:
        """Of inputs of `size_px`, by a forward pass, and by random features in the network's own head.

        Raises:
            BundleError: the answer does not depend on features that have a place.
        """
        was_training, device = self.training, self.fc.weight.device
        self.eval()
        try:
            with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
                return self._layout(torch.zeros(1, 3, *self.size_px, device=device))
        except UNFIT as error:
            raise BundleError(f"{self.architecture}: no evidence map can be drawn: {error}") from error
        finally:
            self.train(was_training)

    def _layout(self, images: Tensor) -> Layout:
        with torch.no_grad():
            shape = self.features(images).shape
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(shape, generator=generator).to(images.device)
        with torch.enable_grad():
            drawn.requires_grad_()
            pooled, mean = self.pool(drawn), self.spatial(drawn).mean((2, 3))
            # Random, because a sum of normalised numbers has no gradient.
            weight = torch.randn(pooled.shape, generator=generator).to(images.device)
            (gradient,) = torch.autograd.grad((weight * pooled).sum(), drawn)
        layer = "before_pool"
        if not self.spatial(gradient).any():
            # One token is the answer: it reads the places for the last time in the last block.
            layer = f"body.blocks.{len(self.body.blocks) - 1}.norm1"
            self.get_submodule(layer)
        is_mean = mean.shape == pooled.shape and bool((mean - pooled).abs().max() < ROUNDING)
        height, width = self.spatial(gradient).shape[2:]
        return Layout(height, width, is_mean, layer)

    def named(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors with timm's names by ours; its classifier becomes `fc`, and foreign names remain."""
        own, classifier, ours = self.body.state_dict(), self.body.pretrained_cfg.get("classifier"), {}
        for name, tensor in given.items():
            owner, _, rest = name.rpartition(".")
            ours[f"body.{name}" if name in own else f"fc.{rest}" if owner == classifier else name] = tensor
        return ours

    def resized(self, state: dict[str, Tensor], size_px: tuple[int, int]) -> dict[str, Tensor]:
        """Tensors of the body for another input size: timm interpolates embeddings of positions."""
        self.load_state_dict(state)
        self.body.set_input_size(img_size=size_px)
        return {f"body.{name}": tensor for name, tensor in self.body.state_dict().items()}


def created(architecture: str, size_px: tuple[int, int], **more: Any) -> Any:
    """A network of timm without its classifier, for inputs of a size, or BundleError where there is none."""
    config, timm = timm_weights.config_of(architecture), timm_weights.load_timm()
    try:
        name, arguments = timm_weights.parsed(architecture)
        # Others take any size.
        fixed = {"img_size": size_px} if config.get("fixed_input_size") else {}
        return timm.create_model(name, num_classes=0, **fixed, **arguments, **more)
    except UNFIT as error:
        size = f"{size_px[0]}x{size_px[1]} px (height x width)"
        raise BundleError(f"--architecture {architecture} cannot be made for {size}: {error}") from error
