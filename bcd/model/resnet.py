"""ResNet50 and its siblings: the forward pass, and logit to probability."""

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
    """A network with a new head, from the given weights or from random ones.

    Weights of a head for as many classes are kept; any other head is replaced.

    Raises:
        BundleError: the weights are not exactly those of the architecture; names the first that are not.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResNet(architecture, n_classes)
    if given is not None:
        network.load_state_dict(weights.fitting(network.state_dict(), given, architecture))
    return network


def assembled(n_classes: int, state: State, architecture: Architecture = "resnet50") -> ResNet:
    """The network of exactly these tensors, which it then holds; for a bundle, in evaluation mode.

    Raises:
        BundleError: they are not exactly those of one.
    """
    network = weights.skeleton(n_classes, architecture)
    network.load_state_dict(
        weights.fitting(network.state_dict(), state, architecture, whole=True), assign=True
    )
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
    """The convolutions as one compiled function, weights frozen into it: worth a minute on a long archive.

    Needs a C++ compiler on CPUs. The first call compiles, for the shape it is given.
    """
    function = torch.compile(partial(features, network), dynamic=False, options={"freezing": True})
    return cast(Callable[[Tensor], Tensor], function)


@dataclass(frozen=True)
class Output:
    """What one forward pass says about a batch; all float32.

    logit (n, classes), evidence (n, h, w) and evidence_bias (n,), see `bcd.model.cam`, and pooled (n,
    channels), the mean of each feature over the picture.
    """

    logit: Tensor
    evidence: Tensor
    evidence_bias: Tensor
    pooled: Tensor


def forward(network: ResNet, images: Tensor) -> Output:
    """Logits and evidence maps from one forward pass.

    Args:
        network: from `build`, in evaluation mode.
        images: (n, 3, height, width), normalised.
    """
    return explained(network, features(network, images))


def explained(network: ResNet, maps: Tensor) -> Output:
    """Logits and evidence from the features (n, channels, h, w).

    The head is computed in float32 whatever the precision of the convolutions, so that mean of the
    evidence plus bias equals the log-odds closely.
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
    """Divide the last layer by the temperature: logits, log-odds, evidence and probabilities are
    then calibrated alike, and the evidence still adds up to the log-odds. For evaluation only."""
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
    """Let `float32` mean float32 in this process: on GPUs cuDNN computes convolutions in TF32 by default,
    with 10 bits of mantissa, and the numbers would not be those of other machines."""
    if precision == "float32":
        torch.backends.cudnn.allow_tf32 = False


def effective_precision(device: torch.device, precision: str) -> str:
    """What `--precision auto|float32|bfloat16` computes in on this device: float32 or bfloat16."""
    if precision != "auto":
        return precision
    return "bfloat16" if bfloat16_is_fast(device) else "float32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Mixed precision for `--precision auto|float32|bfloat16` on this device."""
    enabled = effective_precision(device, precision) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
