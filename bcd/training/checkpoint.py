"""Checkpoints of a training: network, optimiser and history, with checksums."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bcd.errors import BundleError
from bcd.model import weights
from bcd.model.resnet import Network
from bcd.model.train_step import FrozenTrunk

WEIGHTS_FILE, STATE_FILE = "model.safetensors", "state.pt"
DIGEST = "weights_sha256"


@dataclass
class State:
    """Content of a checkpoint, and what is frozen of the network."""

    network: Network
    optimizer: torch.optim.Optimizer
    history: list[dict[str, Any]] = field(default_factory=list)
    frozen: FrozenTrunk | None = None

    def save(self, folder: Path) -> None:
        """Write network, optimiser and history into a folder."""
        tensors = {name: tensor.contiguous() for name, tensor in self.network.state_dict().items()}
        save_file(tensors, folder / WEIGHTS_FILE)
        digest = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
        state = {"optimizer": self.optimizer.state_dict(), "history": self.history, DIGEST: digest}
        torch.save(state, folder / STATE_FILE)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote, or raise BundleError if it is damaged, and load nothing."""
        tensors, state = read_checkpoint(folder)
        tensors = weights.fitting(self.network.state_dict(), tensors, whole=True)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, ValueError) as error:
            raise BundleError(f"{STATE_FILE} is of another optimiser: {error}") from error
        self.network.load_state_dict(tensors)
        self.history = state["history"]


def read_checkpoint(folder: Path) -> tuple[weights.State, dict[str, Any]]:
    """Weights, and the rest of a checkpoint; raises BundleError if it is damaged."""
    try:
        content, rest = (folder / WEIGHTS_FILE).read_bytes(), (folder / STATE_FILE).read_bytes()
    except FileNotFoundError as error:
        raise BundleError(f"{Path(error.filename).name} is missing") from error
    state = weights.read_weights(rest, STATE_FILE)
    if not weights.is_as_written(rest):
        raise BundleError(f"{STATE_FILE} is not as it was written: a checksum differs")
    digest = hashlib.sha256(content).hexdigest()
    if digest != state.get(DIGEST, digest):  # older versions wrote none
        raise BundleError(f"{WEIGHTS_FILE} is not as it was written: its SHA-256 differs")
    return weights.read_weights(content, WEIGHTS_FILE), state
