"""ResNet50 and its siblings: the network, its input, logits and evidence, precision.

Structure, names of tensors and random start are those of torchvision, to the bit, which the tests hold. The
code is our own because `import torchvision` brings in torch's compiler: half of the time that a process that
scores or serves needs to start.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bcd.config.options import Architecture
from bcd.imaging.image import IMAGENET_MEAN, IMAGENET_STD
from bcd.model import cam
from bcd.model.networks.backbone import Backbone

# He et al. 2015, table 1: https://arxiv.org/abs/1512.03385
BLOCKS: dict[Architecture, tuple[int, int, int, int]] = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
}


def normalise(
    images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """uint8 (n, 3, height, width) to the network's float32 input."""
    shift, scale = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
    return images.to(torch.float32).mul_(1 / 255).sub(shift).div_(scale)


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or where `expansion` is 4 one between two of 1x1.

    The stride is that of the 3x3 convolution ("ResNet v1.5").
    """

    def __init__(
        self, channels: int, width: int, stride: int, expansion: int, shortcut: nn.Module | None
    ) -> None:
        super().__init__()
        # (kernel, channels, stride) of each convolution
        plain = ((3, width, stride), (3, width, 1))
        bottleneck = ((1, width, 1), (3, width, stride), (1, expansion * width, 1))
        self.n = 0
        for kernel, n_out, step in plain if expansion == 1 else bottleneck:
            self.n += 1
            self.add_module(f"conv{self.n}", _convolution(channels, n_out, kernel, step))
            self.add_module(f"bn{self.n}", nn.BatchNorm2d(n_out))
            channels = n_out
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) to (n, expansion * width, h / stride, w / stride)."""
        out = x
        for number in range(1, self.n + 1):
            out = getattr(self, f"bn{number}")(getattr(self, f"conv{number}")(out))
            if number < self.n:
                out = self.relu(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet of one of the sizes in `BLOCKS`, with a head of `n_classes`."""

    def __init__(self, architecture: Architecture, n_classes: int) -> None:
        super().__init__()
        self.channels, self.expansion = 64, 1 if architecture in ("resnet18", "resnet34") else 4
        self.conv1 = _convolution(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for stage, n_blocks in enumerate(BLOCKS[architecture]):
            self.add_module(f"layer{stage + 1}", self._stage(64 << stage, n_blocks, 1 if stage == 0 else 2))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.channels, n_classes)
        for module in self.modules():
            # A normal distribution without data would bring in torch's compiler, three seconds.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, width: int, n_blocks: int, stride: int) -> nn.Sequential:
        blocks = []
        for _ in range(n_blocks):
            n_out, shortcut = width * self.expansion, None
            if stride > 1 or self.channels != n_out:
                shortcut = nn.Sequential(_convolution(self.channels, n_out, 1, stride), nn.BatchNorm2d(n_out))
            blocks.append(Block(self.channels, width, stride, self.expansion, shortcut))
            self.channels, stride = n_out, 1
        return nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, classes) of normalised images (n, 3, height, width)."""
        for name, module in self.named_children():
            images = module(images.flatten(1) if name == "fc" else images)
        return images


# What a bundle can have.
Network = ResNet | Backbone


def _convolution(channels: int, n_out: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, n_out, kernel, stride, padding=kernel // 2, bias=False)


def fold(network: Network) -> Network:
    """Fold every batch norm into the convolution before it, in place: fewer passes over memory, and the same
    function up to rounding. For evaluation only. Networks of timm remain: their norms may contain more."""
    network.eval()
    if isinstance(network, Backbone):
        return network
    for module in list(network.modules()):
        if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[1], nn.BatchNorm2d):
            _fold_pair(module, "0", "1")
        for number in ("1", "2", "3"):
            if hasattr(module, f"conv{number}"):
                _fold_pair(module, f"conv{number}", f"bn{number}")
    return network


def _fold_pair(parent: nn.Module, convolution: str, norm: str) -> None:
    pair = parent.get_submodule(convolution), parent.get_submodule(norm)
    setattr(parent, convolution, fuse_conv_bn_eval(cast(nn.Conv2d, pair[0]), cast(nn.BatchNorm2d, pair[1])))
    setattr(parent, norm, nn.Identity())


def compiled_features(network: Network) -> Callable[[Tensor], Tensor]:
    """The convolutions as one compiled function with frozen weights, for long archives.

    Requires a C++ compiler on CPUs. The first call compiles for the shape of its batch, in about a minute.
    """
    # Not at the top: see above. For the process, because an option of one function comes too late:
    # torch 2.15 has all weights as inputs by then, and fuses and packs none.
    from torch._inductor import config

    config.freezing = True
    function = torch.compile(partial(features, network), dynamic=False)
    return cast(Callable[[Tensor], Tensor], function)


@dataclass(frozen=True)
class Output:
    """Output of one forward pass, all float32: logit (n, classes); pooled (n, channels), what enters the last
    layer; evidence (n, h, w) and evidence_bias (n,) as in `bcd.model.cam`, None where they have no closed
    form."""

    logit: Tensor
    pooled: Tensor
    evidence: Tensor | None
    evidence_bias: Tensor | None


def forward(network: Network, images: Tensor) -> Output:
    """Logits and evidence maps of normalised (n, 3, height, width); the network is in evaluation mode."""
    return explained(network, features(network, images))


def has_closed_form(network: Network) -> bool:
    """Whether the mean of the features over the image is what enters the last layer."""
    return not isinstance(network, Backbone) or network.layout.is_mean


def explained(network: Network, maps: Tensor) -> Output:
    """Logits and evidence from what `features` gives.

    The head is always computed in float32, so that mean of the evidence plus bias equals the log-odds
    closely.
    """
    with torch.autocast(maps.device.type, enabled=False):
        maps = maps.float()
        pooled = network.pool(maps) if isinstance(network, Backbone) else maps.mean((2, 3))
        logit = network.fc(pooled)
        if not has_closed_form(network):
            return Output(logit, pooled, None, None)
        maps = network.spatial(maps) if isinstance(network, Backbone) else maps
        evidence, bias = cam.evidence(maps, network.fc.weight, network.fc.bias, logit.argmax(1))
    return Output(logit, pooled, evidence, bias)


def features(network: Network, images: Tensor) -> Tensor:
    """Output (n, channels, h, w) of the last convolution, or what a network of timm has before it pools."""
    if isinstance(network, Backbone):
        return network.features(images)
    for name, module in network.named_children():
        if name == "avgpool":
            break
        images = module(images)
    return images


def temper(network: Network, temperature: float) -> Network:
    """Divide the last layer by the temperature: this calibrates logits, log-odds, evidence and probabilities,
    and the evidence still adds up to the log-odds. For evaluation only."""
    with torch.no_grad():
        network.fc.weight = nn.Parameter(network.fc.weight / temperature)
        network.fc.bias = nn.Parameter(network.fc.bias / temperature)
    return network


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the device computes in bfloat16: Ampere GPUs and newer, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def set_precision(precision: str) -> None:
    """Disable TF32 in this process for `float32`: by default cuDNN computes convolutions on GPUs with 10 bits
    of mantissa, and the numbers differ from those of other machines."""
    if precision == "float32":
        torch.backends.cudnn.allow_tf32 = False


def effective_precision(device: torch.device, precision: str) -> str:
    """The precision, float32 or bfloat16, of `--precision auto|float32|bfloat16` on this device."""
    if precision != "auto":
        return precision
    return "bfloat16" if bfloat16_is_fast(device) else "float32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for `--precision auto|float32|bfloat16` on this device."""
    enabled = effective_precision(device, precision) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
