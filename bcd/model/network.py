"""The residual networks, and the input that they expect.

Structure, names of tensors and random start are those of torchvision, to the bit, which the tests hold. The
code is our own because `import torchvision` brings in torch's compiler: half of the time that a process that
scores or serves needs to start.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bcd.config.options import Architecture
from bcd.imaging.image import IMAGENET_MEAN, IMAGENET_STD

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
            if isinstance(module, nn.Conv2d):
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


def _convolution(channels: int, n_out: int, kernel: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, n_out, kernel, stride, padding=kernel // 2, bias=False)
