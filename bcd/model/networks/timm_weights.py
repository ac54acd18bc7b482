"""What timm states about weights, their licences, and their download. timm is an extra, imported where it is
used: it takes seconds."""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from bcd.config.options import HUB_WEIGHTS, IMAGENET_WEIGHTS, MAX_INPUT_PX, MIN_INPUT_PX, TIMM
from bcd.errors import BundleError, ConfigError

logger = logging.getLogger(__name__)

# Arguments that may follow the name of a network, as published weights need them, and their largest value.
ARGUMENTS = ("init_values", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "reg_tokens")
LARGEST = 4096
NC_ND, UNKNOWN = "CC-BY-NC-ND-4.0", "unknown licence: check the page of the weights"
Found = TypeVar("Found")


class Terms(NamedTuple):
    """The licence of weights, whether their owner admits each user first, and the network that they fit."""

    license: str
    is_commercial: bool
    is_gated: bool
    fits: str = ""


# Encoders of pathology on the Hugging Face Hub, as their pages state it; others are `UNKNOWN`.
FOREIGN = "it is no network of timm, and is not read"
ENCODERS = {
    "mahmoodlab/uni": Terms(NC_ND, False, True, "timm:vit_large_patch16_224,init_values=1e-5"),
    "mahmoodlab/uni2-h": Terms(NC_ND, False, True, "its layers have no name in timm, and it is not read"),
    "mahmoodlab/conch": Terms(NC_ND, False, True, FOREIGN),
    "paige-ai/virchow": Terms(
        "Apache-2.0", True, True, "its layers have no name in timm, and it is not read"
    ),
    "paige-ai/virchow2": Terms(NC_ND, False, True, "its layers have no name in timm, and it is not read"),
    "prov-gigapath/prov-gigapath": Terms("Apache-2.0", True, True),
    "owkin/phikon": Terms("Owkin non-commercial", False, False, FOREIGN),
    "owkin/phikon-v2": Terms(NC_ND, False, False, FOREIGN),
    "bioptimus/h-optimus-0": Terms("Apache-2.0", True, True, "timm:vit_giant_patch14_reg4_dinov2"),
}


class Stated(NamedTuple):
    """Input size in px, mean and standard deviation of RGB from 0 to 1, that weights were trained with."""

    height_px: int
    width_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def load_timm() -> Any:
    """The library; raises ConfigError with the command that installs it."""
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"networks of timm require packages that are not installed ({error.name} is missing); run: "
            "pip install 'timm>=1.0.22,<2'"
        ) from None
    return timm


def parsed(architecture: str) -> tuple[str, dict[str, int | float]]:
    """timm's name of a network, and the arguments that follow it; raises ValueError for others than these."""
    name, *given = architecture.removeprefix(TIMM).split(",")
    arguments: dict[str, int | float] = {}
    for one in given:
        key, _, value = one.partition("=")
        number = int(value) if value.isdigit() else float(value)
        if key not in ARGUMENTS or not 0 <= number <= LARGEST:
            raise ValueError(f"{one}: expected some of {', '.join(ARGUMENTS)}, each up to {LARGEST}")
        arguments[key] = number
    return name, arguments


def stated(architecture: str, weights: str) -> Stated:
    """What timm states about a network, or the page of `--weights hf-hub:` about its weights.

    Raises:
        BundleError: it is nothing that a card can have, there is no such network, or the download failed.
    """
    if weights.startswith(HUB_WEIGHTS):
        announce(weights)
        load = load_timm().models.load_model_config_from_hf
        config, *_ = _downloaded(weights, lambda: load(weights.removeprefix(HUB_WEIGHTS)))
    else:
        config = config_of(architecture)
    height, width = config.get("input_size", (3, 224, 224))[1:]
    found = Stated(height, width, tuple(config["mean"]), tuple(config["std"]))
    is_possible = (
        all(MIN_INPUT_PX <= side <= MAX_INPUT_PX for side in (height, width))
        and all(0 <= value <= 1 for value in found.mean)
        and all(0 < value <= 1 for value in found.std)
        and len(found.mean) == len(found.std) == 3
    )
    if not is_possible:
        raise BundleError(
            f"{architecture}: timm states {found}, expected {MIN_INPUT_PX} to {MAX_INPUT_PX} px and numbers "
            "from 0 to 1 for three colours; choose another --architecture"
        )
    return found


def config_of(architecture: str) -> Mapping[str, Any]:
    """What timm states about a network and its own weights; BundleError where it has no such network."""
    timm = load_timm()
    try:
        name, _ = parsed(architecture)
    except ValueError as error:
        raise BundleError(f"--architecture {architecture}: {error}") from None
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.partition('_')[0]}*")[:3]
        raise BundleError(
            f"--architecture {architecture}: timm {timm.__version__} has no such network; "
            f"expected one of timm.list_models(), such as {', '.join(near or ['convnext_tiny'])}"
        )
    config: Mapping[str, Any] = timm.get_pretrained_cfg(name).to_dict()
    return config


def license_of(architecture: str, weights: str) -> str | None:
    """The licence of the initial weights, where it is known: by our table, or as timm states it."""
    if weights.startswith(HUB_WEIGHTS):
        known = ENCODERS.get(_name(weights))
        return known.license if known else UNKNOWN
    if weights == IMAGENET_WEIGHTS and architecture.startswith(TIMM):
        return config_of(architecture).get("license", UNKNOWN)
    return None


@cache
def announce(weights: str) -> None:
    """Log the terms of weights on the Hub, once in a process, before anything is downloaded."""
    known = ENCODERS.get(_name(weights))
    if known is None:
        logger.warning(f"--weights {weights}: {UNKNOWN}")
        return
    said = [f"licence {known.license}"]
    said += [] if known.is_commercial else ["no commercial use"]
    said += ["gated: ask for access on their page and set HF_TOKEN"] if known.is_gated else []
    said += [known.fits if " " in known.fits else f"fits --architecture {known.fits}"] if known.fits else []
    logger.warning(f"--weights {weights}: {'; '.join(said)}")


def _name(weights: str) -> str:
    """The name on the Hub in lower case, without a revision."""
    return weights.removeprefix(HUB_WEIGHTS).partition("@")[0].lower()


def hub_state(weights: str) -> Mapping[str, Tensor]:
    """The tensors of `--weights hf-hub:`, no code in which ever runs. Raises BundleError where the download
    failed."""
    announce(weights)
    load = load_timm().models.load_state_dict_from_hf
    return _downloaded(weights, lambda: load(weights.removeprefix(HUB_WEIGHTS), weights_only=True))


def imagenet_state(architecture: str, make: Callable[..., Any]) -> dict[str, Tensor]:
    """The tensors, by their names in timm, of a network that `make` makes with `pretrained=True`. Raises
    BundleError where the download failed."""
    logger.info(f"--weights {IMAGENET_WEIGHTS}: licence {license_of(architecture, IMAGENET_WEIGHTS)}")
    state: dict[str, Tensor] = _downloaded(IMAGENET_WEIGHTS, lambda: make(pretrained=True).state_dict())
    return state


def _downloaded(weights: str, load: Callable[[], Found]) -> Found:
    try:
        return load()
    # Those of huggingface_hub are OSErrors or ValueErrors.
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise BundleError(
            f"--weights {weights}: the download through timm failed ({type(error).__name__}: {reason}); give "
            "the URI of a state dict, or --weights none to start from random weights"
        ) from error
