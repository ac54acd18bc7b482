import numpy as np
import pytest
import torch

from bcd.model import train_step, weights
from tests import pictures


def test_learning_rate_rises_and_falls():
    rates = [train_step.learning_rate(1.0, progress, 0.1) for progress in (0, 0.05, 0.1, 0.55, 1)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert train_step.learning_rate(2.0, 0, 0) == 2.0


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_norms_and_biases_are_not_decayed(name):
    network = weights.build(2, architecture="resnet18")
    groups = train_step.optimizer(network, name, 0.1, 0.3).param_groups
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    assert {p.ndim for p in groups[1]["params"]} == {1}
    assert sum(len(g["params"]) for g in groups) == len(list(network.parameters()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_learn_black_from_white(precision):
    torch.manual_seed(0)
    network = weights.build(2, seed=0, architecture="resnet18").to(memory_format=torch.channels_last).train()
    optimizer = train_step.optimizer(network, "adamw", 1e-3, 0.01)
    preset = train_step.augmentation(32, 64)
    step = train_step.Step(network, optimizer, torch.device("cpu"), precision, preset)
    images = torch.cat([torch.zeros(4, 32, 64, 3), torch.full((4, 32, 64, 3), 255)]).to(torch.uint8)
    target = torch.tensor([0] * 4 + [1] * 4)
    losses = [step(images, target, 1e-3).item() for _ in range(3)]
    assert losses[-1] < 0.3 < losses[0]
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("rows", "sizes"), [(34, [16, 9, 9]), (33, [16, 9, 8]), (32, [16, 16]), (17, [9, 8]), (5, [5]), (0, [])]
)
def test_an_epoch_does_not_end_on_a_handful_of_images(rows, sizes):
    batches = [
        {"i": np.arange(rows)[at : at + 16], "x": np.ones(min(16, rows - at))} for at in range(0, rows, 16)
    ]
    evened = list(train_step.even_tail(batches, 16))
    assert [len(batch["x"]) for batch in evened] == [len(batch["i"]) for batch in evened] == sizes
    assert [i for batch in evened for i in batch["i"]] == list(range(rows))


@pytest.mark.parametrize(("rows", "sizes"), [(3, [3]), (5, [2, 3]), (4, [2, 2]), (1, [1])])
def test_no_image_is_left_alone_in_small_batches(rows, sizes):
    batches = [{"i": np.arange(rows)[at : at + 2]} for at in range(0, rows, 2)]
    evened = list(train_step.even_tail(batches, 2))
    assert [len(batch["i"]) for batch in evened] == sizes
    assert [i for batch in evened for i in batch["i"]] == list(range(rows))


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([0.5, 0.25], 2), ([0.5, NAN], 1), ([INFINITE, 0.5, NAN], 0), ([0.5, -INFINITE, NAN], 1), ([3e38], 1)],
)
def test_the_first_loss_that_is_no_number(losses, expected):
    assert train_step.first_not_finite([torch.tensor(loss) for loss in losses]) == expected


def test_weights_and_running_statistics_follow_the_losses():
    for name, number in (("weight", NAN), ("bias", INFINITE), ("running_var", NAN)):
        network = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
        assert train_step.weights_as_loss(network) == 0
        network.state_dict()[f"0.{name}"][1] = number
        assert train_step.weights_as_loss(network).isnan()


def test_augmentation_keeps_shape_and_type_varies_and_is_seeded():
    batch = torch.from_numpy(np.stack([pictures.gradient(96, 144)] * 8)).permute(0, 3, 1, 2)
    preset = train_step.augmentation(96, 144)
    torch.manual_seed(1)
    first, second = train_step.augment(batch, preset), train_step.augment(batch, preset)
    torch.manual_seed(1)
    again = train_step.augment(batch, preset)
    assert first.shape == batch.shape
    assert first.dtype == torch.uint8
    torch.testing.assert_close(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[train_step.IMAGES_PER_DRAW])


def test_quarter_turns_are_exact_and_all_four_occur():
    batch = torch.from_numpy(pictures.gradient(4, 6)).permute(2, 0, 1)[None]
    turned = [train_step.QuarterTurns()(batch) for _ in range(60)]
    for k in range(4):
        assert any(torch.equal(t, torch.rot90(batch, k, (-2, -1))) for t in turned)
