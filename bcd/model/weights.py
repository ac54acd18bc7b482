"""Weights from users' files, rejected unless complete and finite, and the networks made of them.

The tensors of the trunk have to be exactly those of the architecture; only the head, which is replaced, may
differ.
"""

import io
import logging
import re
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from bcd import storage
from bcd.config.options import HUB_WEIGHTS, IMAGENET_WEIGHTS, INPUT_PX, RANDOM_WEIGHTS, RESNETS, Architecture
from bcd.errors import BundleError
from bcd.model.networks import backbone, timm_weights
from bcd.model.networks.backbone import Backbone
from bcd.model.networks.ensemble import Ensemble
from bcd.model.resnet import Network, ResNet
from bcd.text import some

logger = logging.getLogger(__name__)

State = Mapping[str, Tensor]

# A pickle that is damaged or contains code fails in many ways, all of them before any code runs.
DAMAGED = (
    *(SafetensorError, struct.error, UnpicklingError, zipfile.BadZipFile, ArithmeticError, AssertionError),
    *(AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError),
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Modules besides a trunk, replaced by our last layer.
HEADS = ("fc", "head", "classifier", "last_linear", "projection_head", "projector", "prototypes", "predictor")
# A tensor of every ResNet, as torchvision and timm name it, as HuggingFace does, and TIAToolbox.
TORCHVISION = "layer1.0.conv1.weight"
TIATOOLBOX = "feat_extract.4.0.conv1.weight"
HUGGINGFACE = "encoder.stages.0.layers.0.layer.0.convolution.weight"
ANCHORS = (TORCHVISION, HUGGINGFACE, TIATOOLBOX)
# MoCo has two networks, of which the second is an average: https://github.com/facebookresearch/moco-v3
LEADS, FOLLOWS = {"encoder_q", "base_encoder"}, {"encoder_k", "momentum_encoder"}
EXPECTED = "expected a state dict of tensors in .safetensors or plain .pth form"
STARTS = {
    b"version https://git-lfs": "a Git LFS pointer in place of the file: run `git lfs pull`",
    b"\x89HDF": "an HDF5 file, as Keras writes it",
    b"GGUF": "a GGUF file",
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"\x93NUMPY": "a NumPy array",
    b"{": "JSON text",
}
# TIAToolbox numbers torchvision's modules in their order; two of these have no tensors.
_NUMBERED = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
_KINDS = {"convolution": "conv", "normalization": "bn"}
_IN_BLOCK = re.compile(
    r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(layer\.(\d+)|shortcut)\.(convolution|normalization)\.(\w+)"
)


def pretrained(
    weights: str, architecture: Architecture = "resnet50", size_px: tuple[int, int] = INPUT_PX
) -> dict[str, Tensor] | None:
    """The state dict of `--weights`, for inputs of a size (height, width) in px: `imagenet`, `none` (None),
    the URI of a file, or a name on the Hugging Face Hub.

    One level of wrapping (`state_dict`, `model`, ...) and one prefix (`module.`, `_orig_mod.`, ...) are
    removed, names of HuggingFace's ResNet and of TIAToolbox become torchvision's, and a line is printed about
    it.

    Raises:
        BundleError: the file is no state dict of the architecture, or a download failed.
        StorageError: the URI cannot be read.
    """
    if weights == RANDOM_WEIGHTS:
        return None
    if weights == IMAGENET_WEIGHTS:
        return _download(architecture, size_px)
    own = cast(ResNet | Backbone, skeleton(2, architecture, size_px))
    is_on_hub = weights.startswith(HUB_WEIGHTS)
    found = (
        timm_weights.hub_state(weights) if is_on_hub else read_weights(storage.read_bytes(weights), weights)
    )
    anchors = ANCHORS if isinstance(own, ResNet) else (_own_anchor(own.body.state_dict()),)
    level, state = _unwrapped(found, weights, anchors)
    prefix, anchor = _prefix(state, weights, anchors)
    inside = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
    left_out = [name for name in state if not name.startswith(prefix)]
    if anchor == HUGGINGFACE:
        inside = {_as_torchvision(name): tensor for name, tensor in inside.items()}
    if anchor == TIATOOLBOX:
        inside = {_from_tiatoolbox(name): tensor for name, tensor in inside.items()}
    steps = {
        f"took {level!r} out of the file": level,
        f"removed the prefix {prefix!r}": prefix,
        "renamed from HuggingFace's names": anchor == HUGGINGFACE,
        "renamed from TIAToolbox's names": anchor == TIATOOLBOX,
        f"left out {some(left_out)}": left_out,
    }
    if any(steps.values()):
        done = ", ".join(step for step, is_done in steps.items() if is_done)
        logger.info(f"--weights {weights}: {done}")
    try:
        return _for_network(own, inside, architecture)
    except BundleError as error:
        raise BundleError(f"{weights}: {error}") from None


def _for_network(
    own: ResNet | Backbone, inside: dict[str, Tensor], architecture: Architecture
) -> dict[str, Tensor]:
    """The tensors by our names, for the network's input size; raises BundleError where they do not fit."""
    if isinstance(own, ResNet):
        fitting(own.state_dict(), inside, architecture)
        return inside
    named = own.named(inside)
    try:
        fitting(own.state_dict(), named, architecture)
    except BundleError:
        stated = timm_weights.stated(architecture, RANDOM_WEIGHTS)
        usual = stated.height_px, stated.width_px
        if usual == own.size_px or not hasattr(own.body, "set_input_size"):
            raise
        network = Backbone(architecture, 2, usual)
        fitted = fitting(network.state_dict(), named, architecture)
        return named | network.resized(fitted, own.size_px)
    return named


def _download(architecture: Architecture, size_px: tuple[int, int]) -> dict[str, Tensor]:
    if architecture not in RESNETS:
        state = timm_weights.imagenet_state(architecture, partial(backbone.created, architecture, size_px))
        return {f"body.{name}": tensor for name, tensor in state.items()}
    # Not at the top: it brings in torch's compiler, seconds that scoring and serving do without.
    from torchvision.models import get_model_weights

    weights = get_model_weights(architecture).DEFAULT
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise BundleError(
            f"--weights imagenet: the download from {weights.url} failed ({error}); give the URI of a "
            "state dict, or --weights none to start from random weights"
        ) from error


def read_weights(content: bytes, name: str) -> Any:
    """The content of a file of weights, recognised by its bytes and not by its suffix; no code in it ever
    runs. Raises BundleError where it has no tensors; says what it contains instead."""
    try:
        if content[8:9] == b"{":  # after the length of the header
            return load_safetensors(content)
        if content[:2] in (b"PK", b"\x80\x02"):
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise BundleError(f"{name}: not a state dict, but {_guess(content, error)}; {EXPECTED}") from error
    raise BundleError(f"{name}: not a state dict, but {_guess(content)}; {EXPECTED}")


def is_as_written(content: bytes) -> bool:
    """Whether the checksums in a file of `torch.save` are right; torch loads flipped bits as other
    numbers."""
    try:
        return zipfile.ZipFile(io.BytesIO(content)).testzip() is None
    except DAMAGED:
        return False


def _guess(content: bytes, error: Exception | None = None) -> str:
    """The content of a file without plain tensors, in words; torch's own message advises to trust it."""
    if not content:
        return "an empty file"
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"pickled Python objects ({found[1]}); save `network.state_dict()` alone"
    for start, kind in STARTS.items():
        if content.startswith(start):
            return kind
    if b"<html" in content[:1000].lower():
        return "a web page, such as a login or an error page; download the file again"
    if content.startswith(b"PK"):
        return _guess_zip(content)
    if error is not None:
        kind = "safetensors" if content[8:9] == b"{" else "PyTorch"
        return f"a damaged {kind} file of {len(content):,} bytes; copy it again"
    return f"{len(content):,} bytes of another format, which begin with {content[:8]!r}"


def _guess_zip(content: bytes) -> str:
    try:
        names = zipfile.ZipFile(io.BytesIO(content)).namelist()
    except DAMAGED:
        return f"a damaged PyTorch file of {len(content):,} bytes; copy it again"
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        return (
            "a TorchScript program, which is code and is not run: take the weights alone (in WSInfer's zoo "
            "model.safetensors or pytorch_model.bin), or save `network.state_dict()`"
        )
    if any(name.endswith("data.pkl") for name in names):
        return "a damaged PyTorch file, or one with pickled Python objects; save `network.state_dict()` alone"
    return f"a ZIP archive of {some(names)}"


def _unwrapped(found: Any, name: str, anchors: Sequence[str]) -> tuple[str, State]:
    """The key of the level with the tensors, '' for the top level, and the tensors by name."""
    if _is_state(found):
        return "", found
    if not isinstance(found, Mapping):
        content = f"an object of type {type(found).__name__}"
        raise BundleError(f"{name}: not a state dict, but {content}; {EXPECTED}")
    below = {str(key): value for key, value in found.items() if _is_state(value)}
    is_network = partial(_anchor_of, anchors=anchors)
    networks = {key: state for key, state in below.items() if any(map(is_network, state))} or below
    if len(networks) == 1:
        return next(iter(networks.items()))
    if networks:
        raise BundleError(f"{name}: contains several networks: {', '.join(networks)}; save one of them alone")
    kinds = [f"{key} ({type(value).__name__})" for key, value in found.items()]
    raise BundleError(f"{name}: not a state dict, but a mapping of {some(kinds) or 'nothing'}; {EXPECTED}")


def _is_state(found: Any) -> bool:
    return (
        isinstance(found, Mapping)
        and bool(found)
        and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items())
    )


def _anchor_of(name: str, anchors: Sequence[str]) -> str | None:
    """The anchor that a name ends with, as whole components."""
    return next((anchor for anchor in anchors if f".{name}".endswith(f".{anchor}")), None)


def _own_anchor(state: State) -> str:
    """The first name that no other one ends with."""
    return next(name for name in state if not any(other.endswith(f".{name}") for other in state))


def _prefix(state: State, name: str, anchors: Sequence[str]) -> tuple[str, str]:
    """The prefix of the names of the one network among these tensors, and its anchor."""
    found = {key.removesuffix(anchor): anchor for key in state if (anchor := _anchor_of(key, anchors))}
    last = {prefix: prefix.rstrip(".").rpartition(".")[2] for prefix in found}
    if len(found) == 2 and set(last.values()) & LEADS and set(last.values()) & FOLLOWS:
        found = {prefix: anchor for prefix, anchor in found.items() if last[prefix] in LEADS}
    if len(found) > 1:
        raise BundleError(f"{name}: contains several networks: {', '.join(found)}; save one of them alone")
    return next(iter(found.items()), ("", anchors[0]))


def _as_torchvision(name: str) -> str:
    """The torchvision name of a tensor of HuggingFace's ResNet, such as microsoft/resnet-50."""
    if found := _IN_BLOCK.fullmatch(name):
        stage, block, part, number, kind, rest = found.groups()
        is_norm = kind == "normalization"
        module = f"downsample.{is_norm:d}" if part == "shortcut" else f"{_KINDS[kind]}{int(number) + 1}"
        return f"layer{int(stage) + 1}.{block}.{module}.{rest}"
    for kind, ours in _KINDS.items():
        name = name.replace(f"embedder.embedder.{kind}.", f"{ours}1.")
    return name


def _from_tiatoolbox(name: str) -> str:
    """The torchvision name of a tensor of TIAToolbox's CNNModel."""
    part, _, rest = name.partition(".")
    number, _, inner = rest.partition(".")
    if part == "feat_extract" and number.isdecimal() and int(number) < len(_NUMBERED):
        return f"{_NUMBERED[int(number)]}.{inner}"
    return f"fc.{rest}" if part == "classifier" else name


def build(
    n_classes: int,
    given: State | None = None,
    seed: int = 0,
    architecture: Architecture = "resnet50",
    size_px: tuple[int, int] = INPUT_PX,
) -> Network:
    """A network from the given weights or from random ones, with a new head unless theirs fits `n_classes`.
    Raises BundleError where the weights are not exactly those of the architecture; names the first that are
    not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _made(architecture, n_classes, size_px)
    if given is not None:
        network.load_state_dict(fitting(network.state_dict(), given, architecture))
    return network


def assembled(
    n_classes: int,
    state: State,
    architecture: Architecture = "resnet50",
    size_px: tuple[int, int] = INPUT_PX,
    n_members: int = 1,
) -> Network:
    """The network of a bundle, or its ensemble of so many, which shares these tensors, in evaluation mode.
    Raises BundleError where they are not exactly those of the architecture."""

    def of(make: Callable[[], Network]) -> Network:
        return Ensemble([make() for _ in range(n_members)]) if n_members > 1 else make()

    network = of(lambda: skeleton(n_classes, architecture, size_px))
    fitted = fitting(network.state_dict(), state, architecture, whole=True)
    if any(name not in fitted for name, _ in network.named_buffers()):
        # Numbers that are in no file: timm computes them where it makes the network.
        network = of(lambda: build(n_classes, architecture=architecture, size_px=size_px))
    network.load_state_dict(fitted, assign=True)
    return (network.join() if isinstance(network, Ensemble) else network).eval()


def skeleton(
    n_classes: int, architecture: Architecture = "resnet50", size_px: tuple[int, int] = INPUT_PX
) -> Network:
    """A network whose tensors have names, shapes and dtypes, but no data."""
    with torch.device("meta"):
        return _made(architecture, n_classes, size_px)


def _made(architecture: Architecture, n_classes: int, size_px: tuple[int, int]) -> Network:
    if architecture in RESNETS:
        return ResNet(architecture, n_classes)
    return Backbone(architecture, n_classes, size_px)


def fitting(
    own: State, given: State, architecture: Architecture = "resnet50", whole: bool = False
) -> dict[str, Tensor]:
    """The given tensors in the dtypes of `own`, those of the network, with its head where theirs does not
    fit.

    With `whole`, head, counters and dtypes have to fit as well, as in a bundle.

    Raises:
        BundleError: they are not exactly those of the network; names the first that are not.
    """
    kept = set() if whole else _replaceable(own, given)
    judged = [name for name in own if name not in kept]
    faults = [fault for name in judged if (fault := _fault(name, own[name], given.get(name), whole))]
    foreign = [name for name in given if name not in own and (whole or not _is_head(name))]
    faults += [f"{name} is no part of it" for name in foreign]
    if faults:
        name = architecture.replace("resnet", "ResNet") if architecture in RESNETS else architecture
        raise BundleError(f"not the weights of a {name}: {some(faults, separator='; ')}")
    return {name: own[name] if name in kept else given[name].to(own[name].dtype) for name in own}


def _is_head(name: str) -> bool:
    return name.partition(".")[0] in HEADS


def _replaceable(own: State, given: State) -> set[str]:
    """Tensors that need not be given: the head if any part of it does not fit, and counters, which are
    unused."""
    lacking = {name for name in own if name not in given or given[name].shape != own[name].shape}
    head = {name for name in own if _is_head(name)}
    return (head if head & lacking else set()) | {n for n in lacking if n.endswith("num_batches_tracked")}


def _fault(name: str, own: Tensor, given: Tensor | None, whole: bool) -> str | None:
    """The fault of a tensor as a sentence, None for no fault."""
    if given is None:
        return f"{name} is missing, expected {tuple(own.shape)}"
    if given.shape != own.shape:
        return f"{name} has shape {tuple(given.shape)}, expected {tuple(own.shape)}"
    dtypes = (own.dtype,) if whole else FLOATS if own.is_floating_point() else (torch.int64, torch.int32)
    if given.layout != torch.strided or given.is_meta or given.is_quantized or given.dtype not in dtypes:
        kind = "a name without data" if given.is_meta else f"{given.dtype}, {given.layout}"
        return f"{name} is {kind}, expected {' or '.join(map(str, dtypes[:2]))}, dense"
    if not is_finite(given):
        return f"{name} has NaN or infinite values"
    if name.endswith("running_var") and bool((given < 0).any()):
        return f"{name} has negative variances"
    return None


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite as float32."""
    # NaN and infinity propagate to a sum, which takes half the time of a check of each number.
    tensor = tensor.float()
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
