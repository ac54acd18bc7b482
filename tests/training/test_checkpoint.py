import zipfile
from pathlib import Path

import pytest
import torch

from bcd.config.training import TrainConfig
from bcd.errors import BundleError
from bcd.model import train_step, weights
from bcd.model.recipes import averaging
from bcd.training import checkpoint
from bcd.training.checkpoint import State
from tests.training.test_loop import RECORD, flipped, small_state


def test_a_checkpoint_restores_network_optimiser_and_history(tmp_path):
    def fresh(seed):
        network = weights.build(2, seed=seed, architecture="resnet18").to(memory_format=torch.channels_last)
        return State(network, train_step.optimizer(network, TrainConfig(data="d")))

    saved, restored = fresh(1), fresh(2)
    saved.history.append(RECORD)
    step = train_step.Step(saved.network.train(), saved.optimizer, torch.device("cpu"), TrainConfig(data="d"))
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


def averaged_state(seed, decay=0.9):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    return State(
        network, torch.optim.AdamW(network.parameters()), average=averaging.average_of(network, decay)
    )


def a_step(state, seed):
    torch.manual_seed(seed)
    state.optimizer.zero_grad()
    (state.network(torch.randn(8, 3)) ** 3).sum().backward()
    state.optimizer.step()
    state.average.update_parameters(state.network)


def test_a_resumed_average_continues_as_if_it_had_not_stopped(tmp_path):
    whole, stopped, resumed = averaged_state(0), averaged_state(0), averaged_state(1)
    for seed in range(3):
        a_step(whole, seed)
        a_step(stopped, seed)
    stopped.save(tmp_path)
    resumed.load(tmp_path)
    for seed in (3, 4):
        a_step(whole, seed)
        a_step(resumed, seed)
    for one, other in ((whole.network, resumed.network), (whole.judged, resumed.judged)):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
    assert not torch.equal(resumed.judged[0].weight, resumed.network[0].weight)


def test_the_weights_of_a_checkpoint_are_those_to_export(tmp_path):
    state = averaged_state(0)
    a_step(state, 0)
    a_step(state, 1)
    state.save(tmp_path)
    tensors, _ = checkpoint.read_checkpoint(tmp_path)
    assert torch.equal(tensors["0.weight"], state.average.module[0].weight)
    assert torch.equal(tensors["1.running_var"], state.average.module[1].running_var)


def test_a_checkpoint_without_an_average_is_of_another_recipe(tmp_path):
    state = averaged_state(0)
    State(state.network, state.optimizer).save(tmp_path)
    with pytest.raises(BundleError, match="is of another optimiser or recipe"):
        averaged_state(1).load(tmp_path)
