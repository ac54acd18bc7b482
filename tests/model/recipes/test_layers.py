import pytest
import torch
from torch import nn

from bcd.config.training import TrainConfig
from bcd.model import train_step, weights
from bcd.model.recipes import layers


def network():
    return weights.build(2, architecture="resnet18")


def test_rates_fall_by_a_factor_for_each_block_before_the_head():
    given = network()
    config = TrainConfig(data="d", weight_decay=0.3, layer_decay=0.5)
    optimizer = train_step.optimizer(given, config)
    names = {id(parameter): name for name, parameter in given.named_parameters()}
    rates = {
        names[id(p)].split(".")[0]: group[layers.SCALE]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert rates == {
        "fc": 1,
        "layer4": 0.5,
        "layer3": 0.25,
        "layer2": 0.125,
        "layer1": 0.0625,
        "conv1": 0.03125,
        "bn1": 0.03125,
    }
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    assert {p.ndim for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]} == {1}


def test_a_step_moves_each_block_at_its_rate():
    given = network()
    config = TrainConfig(data="d", optimizer="sgd", layer_decay=0.5, augment=False)
    optimizer = train_step.optimizer(given, config)
    step = train_step.Step(given.train(), optimizer, torch.device("cpu"), config)
    step(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.tensor([0, 1]), 0.08)
    assert [group["lr"] for group in optimizer.param_groups[::2]] == pytest.approx(
        [0.08, 0.04, 0.02, 0.01, 0.005, 0.0025]
    )


def test_frozen_batch_norms_stay_as_they_are():
    given, config = network(), TrainConfig(data="d", optimizer="sgd")
    optimizer = train_step.optimizer(given, config)
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    given.train()
    layers.freeze_batch_norm(given)
    step = train_step.Step(given, optimizer, torch.device("cpu"), config)
    step(torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), 0.1)
    norms = {
        f"{name}.{tensor}"
        for name, module in given.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for tensor in module.state_dict()
    }
    same = {name for name, tensor in given.state_dict().items() if torch.equal(tensor, before[name])}
    assert same == norms


def test_dropout_zeroes_features_in_training_only_and_keeps_their_mean():
    torch.manual_seed(0)
    head = nn.Linear(1000, 1, bias=False).requires_grad_(False)
    nn.init.ones_(head.weight)
    names = set(head.state_dict())
    layers.drop_features(head, 0.3)
    features = torch.ones(200, 1000)
    found = head.train()(features)
    assert found.mean() == pytest.approx(1000, rel=0.01)
    # Of each sum of 1000 features that are kept with probability 0.7, and then are 1 / 0.7.
    assert found.std() == pytest.approx((1000 * 0.3 / 0.7) ** 0.5, rel=0.2)
    assert (head.eval()(features) == 1000).all()
    assert set(head.state_dict()) == names


def test_without_dropout_the_head_is_as_it_was():
    head = nn.Linear(2, 1)
    layers.drop_features(head, 0.0)
    assert not head._forward_pre_hooks
