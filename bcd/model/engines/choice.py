"""Which engine computes the features of a network. Needs neither torch nor OpenVINO."""

from importlib.util import find_spec

from bcd.config.options import AUTO, CLOSED_FORM, TIMM, Engine
from bcd.errors import ConfigError

# Values of `--engine`, and with torch's compiler of the column `engine`.
TORCH: Engine = "torch"
OPENVINO: Engine = "openvino"
COMPILED = "torch_compiled"
INSTALL = "pip install 'openvino>=2026.4,<2027'"


def choose_engine(given: Engine, architecture: str, method: str, has_gpus: bool) -> Engine:
    """The engine of `--engine` for a network and maps by a method (see `Card.cam`), where models have GPUs or
    have none.

    `auto` is OpenVINO where its package is installed here, models are computed on CPUs, and it can compute
    the network and its maps: a ResNet, in closed form. Other methods need torch's backward pass.

    Raises:
        ConfigError: `openvino` was asked for, and cannot be.
    """
    if given == TORCH:
        return TORCH
    obstacle = ""
    if architecture.startswith(TIMM):
        obstacle = f"computes the ResNets of this package only, and the model is {architecture}"
    elif method != CLOSED_FORM:
        obstacle = f"gives evidence maps in closed form only, and --cam is {method}"
    is_installed = find_spec(OPENVINO) is not None
    if given == AUTO:
        return OPENVINO if is_installed and not obstacle and not has_gpus else TORCH
    if obstacle:
        raise ConfigError(f"--engine {OPENVINO} {obstacle}: use --engine {TORCH}")
    if not is_installed:
        raise missing_package(OPENVINO)
    return OPENVINO


def missing_package(name: str | None) -> ConfigError:
    """The error of a machine without OpenVINO, or without a package that it needs."""
    return ConfigError(
        f"--engine {OPENVINO} requires a package that is not installed ({name} is missing); run: {INSTALL}"
    )
