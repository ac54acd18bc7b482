"""ResNet50 and its siblings: construction, forward pass, logit to probability, precision."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bcd.config.options import Architecture
from bcd.model import cam, weights
from bcd.model.network import ResNet
from bcd.model.weights import State
from bcd.taxonomy import malignant_mask


def build(
    n_classes: int, given: State | None = None, seed: int = 0, architecture: Architecture = "resnet50"
) -> ResNet:
    """A network from the given weights or from random ones, with a new head unless theirs fits `n_classes`.
    Raises BundleError where the weights are not exactly those of the architecture; names the first that are
    not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResNet(architecture, n_classes)
    if given is not None:
        network.load_state_dict(weights.fitting(network.state_dict(), given, architecture))
    return network


def assembled(n_classes: int, state: State, architecture: Architecture = "resnet50") -> ResNet:
    """The network of a bundle, which shares these tensors, in evaluation mode. Raises BundleError where they
    are not exactly those of the architecture."""
    network = weights.skeleton(n_classes, architecture)
    fitted = weights.fitting(network.state_dict(), state, architecture, whole=True)
    network.load_state_dict(fitted, assign=True)
    return network.eval()


def fold(network: ResNet) -> ResNet:
    """Fold every batch norm into the convolution before it, in place: fewer passes over memory, and the same
    function up to rounding. For evaluation only."""
    network.eval()
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


def compiled_features(network: ResNet) -> Callable[[Tensor], Tensor]:
    """The convolutions as one compiled function with frozen weights, for long archives.

    Requires a C++ compiler on CPUs. The first call compiles for the shape of its batch, in about a minute.
    """
    function = torch.compile(partial(features, network), dynamic=False, options={"freezing": True})
    return cast(Callable[[Tensor], Tensor], function)


@dataclass(frozen=True)
class Output:
    """Output of one forward pass, all float32: logit (n, classes), evidence (n, h, w) and evidence_bias (n,)
    as in `bcd.model.cam`, and pooled (n, channels), the mean of each feature over the image."""

    logit: Tensor
    evidence: Tensor
    evidence_bias: Tensor
    pooled: Tensor


def forward(network: ResNet, images: Tensor) -> Output:
    """Logits and evidence maps of normalised (n, 3, height, width); the network is in evaluation mode."""
    return explained(network, features(network, images))


def explained(network: ResNet, maps: Tensor) -> Output:
    """Logits and evidence from the features (n, channels, h, w).

    The head is always computed in float32, so that mean of the evidence plus bias equals the log-odds
    closely.
    """
    with torch.autocast(maps.device.type, enabled=False):
        maps = maps.float()
        pooled = maps.mean((2, 3))
        logit = network.fc(pooled)
        evidence, bias = cam.evidence(maps, network.fc.weight, network.fc.bias, logit.argmax(1))
    return Output(logit, evidence, bias, pooled)


def features(network: ResNet, images: Tensor) -> Tensor:
    """Output (n, channels, h, w) of the last convolution."""
    for name, module in network.named_children():
        if name == "avgpool":
            break
        images = module(images)
    return images


def temper(network: ResNet, temperature: float) -> ResNet:
    """Divide the last layer by the temperature: this calibrates logits, log-odds, evidence and probabilities,
    and the evidence still adds up to the log-odds. For evaluation only."""
    with torch.no_grad():
        network.fc.weight = nn.Parameter(network.fc.weight / temperature)
        network.fc.bias = nn.Parameter(network.fc.bias / temperature)
    return network


def probability(logit: Tensor) -> Tensor:
    """Logits (n, classes) to probabilities (n, classes)."""
    return logit.softmax(1)


def malignant_share(probabilities: Tensor, class_names: tuple[str, ...]) -> Tensor:
    """Probability of malignancy (n,): that of the class, or the sum over malignant subtypes."""
    return probabilities[:, torch.tensor(malignant_mask(class_names))].sum(1)


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
