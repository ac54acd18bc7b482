import zipfile
from pathlib import Path

import pytest
import torch

from bcd.errors import BundleError
from bcd.model import train_step, weights
from bcd.training import checkpoint
from bcd.training.checkpoint import State
from tests.training.test_loop import RECORD, flipped, small_state


def test_a_checkpoint_restores_network_optimiser_and_history(tmp_path):
    def fresh(seed):
        network = weights.build(2, seed=seed, architecture="resnet18").to(memory_format=torch.channels_last)
        return State(network, train_step.optimizer(network, "adamw", 1e-3, 0.01))

    saved, restored = fresh(1), fresh(2)
    saved.history.append(RECORD)
    step = train_step.Step(saved.network.train(), saved.optimizer, torch.device("cpu"), "float32", None)
    step(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.tensor([0, 1]), 1e-3)
    saved.save(tmp_path)
    restored.load(tmp_path)
    for name, tensor in saved.network.state_dict().items():
        assert torch.equal(tensor, restored.network.state_dict()[name])
    first = lambda state: state.optimizer.state_dict()["state"][0]["exp_avg"]  # noqa: E731
    assert torch.equal(first(saved), first(restored))
    assert restored.history == [RECORD]


def flipped_tensor(path):
    """Between its records the file has bytes that mean nothing."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        tensor = max((file.read(name) for name in file.namelist() if "/data/" in name), key=len)
    place = content.index(tensor) + len(tensor) // 2
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


DAMAGES = [
    (checkpoint.WEIGHTS_FILE, flipped, "is not as it was written"),
    (checkpoint.WEIGHTS_FILE, cut, "is not as it was written"),
    (checkpoint.WEIGHTS_FILE, Path.unlink, "model.safetensors is missing"),
    (checkpoint.STATE_FILE, cut, "a damaged PyTorch file"),
    (checkpoint.STATE_FILE, flipped_tensor, "state.pt is not as it was written"),
    (checkpoint.STATE_FILE, Path.unlink, "state.pt is missing"),
    (checkpoint.STATE_FILE, lambda path: path.write_bytes(b""), "an empty file"),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGES)
def test_a_damaged_checkpoint_changes_nothing(tmp_path, name, damage, said):
    small_state(weight=torch.tensor([1.0, 2.0, 3.0])).save(tmp_path)
    damage(tmp_path / name)
    state = small_state(weight=torch.tensor([4.0, 5.0, 6.0]))
    with pytest.raises(BundleError, match=said):
        state.load(tmp_path)
    assert state.network.weight.tolist() == [4, 5, 6]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_checkpoint_that_is_no_number_is_damaged(tmp_path, number):
    small_state(bias=torch.tensor([0.0, number, 0.0])).save(tmp_path)
    with pytest.raises(BundleError, match="bias has NaN or infinite values"):
        small_state().load(tmp_path)
