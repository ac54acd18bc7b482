import numpy as np
import pytest
import torch
from torch.nn import functional
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    resized_crop,
)

from bcd.config.training import TrainConfig
from bcd.model import train_step, weights
from bcd.model.recipes import averaging
from bcd.model.recipes.reference import Reinhard
from tests import pictures


def test_learning_rate_rises_and_falls():
    rates = [train_step.learning_rate(1.0, progress, 0.1) for progress in (0, 0.05, 0.1, 0.55, 1)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert train_step.learning_rate(2.0, 0, 0) == 2.0


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_norms_and_biases_are_not_decayed(name):
    network = weights.build(2, architecture="resnet18")
    config = TrainConfig(data="d", optimizer=name, weight_decay=0.3)
    groups = train_step.optimizer(network, config).param_groups
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]
    assert {p.ndim for p in groups[1]["params"]} == {1}
    assert sum(len(g["params"]) for g in groups) == len(list(network.parameters()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_learn_black_from_white(precision):
    torch.manual_seed(0)
    network = weights.build(2, seed=0, architecture="resnet18").to(memory_format=torch.channels_last).train()
    config = TrainConfig(data="d", precision=precision)
    optimizer = train_step.optimizer(network, config)
    step = train_step.Step(network, optimizer, torch.device("cpu"), config)
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


def batch_of(n, height, width):
    """Smooth images uint8 (n, 3, height, width), between 80 and 175, where no change of colour saturates."""
    small = torch.randint(
        80, 176, (n, 3, height // 8, width // 8), generator=torch.Generator().manual_seed(2)
    )
    return functional.interpolate(small.float(), (height, width), mode="bilinear").to(torch.uint8)


def one_by_one(images, draws):
    """What `augment` does, image by image and step by step, as torchvision does it; without hue."""
    height, width = images.shape[2:]
    for i, whole in enumerate(images.float()):
        left, top, across, down = torch.cat([draws.corner[i], draws.part[i]]).int().tolist()
        whole = whole.flip(-1) if draws.is_flipped[i] else whole
        turned = torch.rot90(whole, int(draws.turns[i]), (-2, -1))
        part = resized_crop(turned, top, left, down, across, [height, width], antialias=False) / 255
        changes = list(
            zip((adjust_brightness, adjust_contrast, adjust_saturation), draws.color[i], strict=False)
        )
        # Their order does not matter.
        for change, factor in changes if i % 2 else reversed(changes):
            part = change(part, factor.item())
        yield part * 255


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 64), (64, 64)])
def test_a_batch_is_augmented_as_its_images_one_by_one(height, width):
    torch.manual_seed(1)
    images, draws = batch_of(32, height, width), train_step.draw(32, height, width)
    draws.color[:, 3] = 0
    found = train_step.augment(images, draws)
    assert (found.shape, found.dtype) == (images.shape, torch.uint8)
    expected = torch.stack(list(one_by_one(images, draws)))
    # A part is not enlarged alone: at its edge its neighbours outside count.
    inside = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(found[inside].float(), expected[inside], atol=0.6, rtol=0)
    assert (found.float() - images).abs().mean() > 5


def test_every_image_has_draws_of_its_own_from_the_seed():
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(train_step.draw(64, 96, 144, stain_jitter=0.1))
    for one, other in zip(*draws, strict=True):
        assert torch.equal(one, other)
    assert len(draws[0].color.unique(dim=0)) == 64
    images = torch.from_numpy(pictures.gradient(96, 144)).permute(2, 0, 1).expand(64, -1, -1, -1)
    assert len(train_step.augment(images, draws[0]).unique(dim=0)) == 64


def test_draws_are_distributed_as_those_of_torchvision():
    """Turned images of this size have no part that fits, and give the largest in the middle."""
    torch.manual_seed(4)
    n, aspect = 4_000, 1.5
    draws = train_step.draw(n, 96, 144)
    assert draws.is_flipped.float().mean() == pytest.approx(0.5, abs=0.03)
    assert (draws.turns.bincount() / n).tolist() == pytest.approx([0.25] * 4, abs=0.03)
    is_turned = draws.turns % 2 == 1
    kept = torch.cat([draws.corner, draws.part], 1)
    assert kept[is_turned].unique(dim=0).tolist() == [[0, 36, 96, 71]]
    theirs = v2.RandomResizedCrop((96, 144), scale=(0.6, 1.0), ratio=(aspect * 0.9, aspect * 1.1))
    drawn = [theirs.make_params([torch.empty(3, 96, 144)]) for _ in range(1_000)]
    expected = torch.tensor(
        [[one[key] for key in ("left", "top", "width", "height")] for one in drawn]
    ).float()
    upright = kept[~is_turned]
    torch.testing.assert_close(upright.mean(0), expected.mean(0), atol=1, rtol=0)
    torch.testing.assert_close(upright.std(0), expected.std(0), atol=1, rtol=0)
    assert (upright[:, :2] >= 0).all()
    assert (upright[:, :2] + upright[:, 2:] <= torch.tensor([144, 96])).all()
    low, high = draws.color.min(0).values.tolist(), draws.color.max(0).values.tolist()
    assert low == pytest.approx([0.8, 0.8, 0.8, -0.06 * torch.pi], abs=1e-3)
    assert high == pytest.approx([1.2, 1.2, 1.2, 0.06 * torch.pi], abs=1e-3)


def test_a_turn_of_the_hue_keeps_the_luma_and_is_that_of_hsv_for_stains():
    """Of haematoxylin and eosin, strong and weak, by the largest turn in either direction."""
    stains = torch.tensor(
        [[110, 80, 160], [190, 170, 215], [215, 120, 170], [240, 200, 220], [128, 128, 128]]
    )
    images = stains.T.reshape(1, 3, 1, 5).float()
    for turn in (-0.03, 0.03):
        color = torch.tensor([[1.0, 1.0, 1.0, turn * 2 * torch.pi]])
        found = train_step.recolor(images, color)
        luma = [torch.einsum("nchw,c->nhw", one, train_step.COLOR_PARTS[0][0]) for one in (found, images)]
        torch.testing.assert_close(*luma)
        expected = adjust_hue(images / 255, turn) * 255
        assert (expected - images).abs().max() == pytest.approx(17.1, abs=0.1)
        assert (found - expected).abs().max() < 5.1
        torch.testing.assert_close(found[..., 4], images[..., 4])


def test_images_are_turned_and_flipped_exactly():
    image = torch.from_numpy(pictures.gradient(64, 64)).permute(2, 0, 1)
    turns = torch.arange(4).repeat(2)
    whole = torch.zeros(8, 2), torch.full((8, 2), 64.0)
    unchanged = torch.tensor([[1.0, 1, 1, 0]]).expand(8, 4)
    draws = train_step.Draws(torch.arange(8) < 4, turns, *whole, unchanged)
    found = train_step.augment(image.expand(8, -1, -1, -1), draws)
    for i, turned in enumerate(found):
        assert torch.equal(turned, torch.rot90(image.flip(-1) if i < 4 else image, i, (-2, -1)))


def test_stain_jitter_changes_nothing_where_it_is_off():
    """The same draws, in the same order, and the same pixels."""
    images, found = batch_of(8, 32, 48), []
    for strength in (0.0, 0.1):
        torch.manual_seed(5)
        found.append(train_step.draw(8, 32, 48, strength))
    plain, jittered = found
    assert plain.stain is None
    assert torch.equal(plain.color, jittered.color)
    same = jittered._replace(stain=torch.ones(8, 3))
    apart = train_step.augment(images, same).int() - train_step.augment(images, plain).int()
    assert apart.abs().max() <= 1
    apart = train_step.augment(images, jittered).int() - train_step.augment(images, plain).int()
    assert (apart.abs().amax((1, 2, 3)) > 3).all()


def test_a_step_with_a_recipe_is_plain_where_the_recipe_is_off():
    """Against the step as it was before recipes: forward, cross-entropy, AdamW."""
    given = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
    target, config = torch.tensor([0, 1, 1, 0]), TrainConfig(data="d", augment=False, precision="float32")
    networks = [weights.build(2, architecture="resnet18").train() for _ in range(2)]
    optimizers = [train_step.optimizer(network, config) for network in networks]
    step = train_step.Step(networks[0], optimizers[0], torch.device("cpu"), config)
    found = [step(given, target, 1e-4) for _ in range(2)]
    for loss in found:
        for group in optimizers[1].param_groups:
            group["lr"] = 1e-4
        batch = train_step.normalise(given.permute(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)
        expected = functional.cross_entropy(networks[1](batch), target)
        optimizers[1].zero_grad(set_to_none=True)
        expected.backward()
        optimizers[1].step()
        assert torch.equal(loss, expected.detach())
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_step_applies_every_recipe():
    torch.manual_seed(0)
    network = weights.build(2, architecture="resnet18").train()
    average = averaging.average_of(network, 0.9)
    reference = Reinhard(n_images=1, mean=(-1.0, 0.1, 0.0), spread=(0.3, 0.1, 0.05))
    config = TrainConfig(
        data="d", layer_decay=0.7, label_smoothing=0.1, mixup=0.2, stain_jitter=0.1, precision="float32"
    )
    optimizer = train_step.optimizer(network, config)
    step = train_step.Step(network, optimizer, torch.device("cpu"), config, [2.0, 0.5], reference, average)
    for n in range(1, 4):
        loss = step(torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8), torch.tensor([0, 1, 1, 0]), 1e-4)
        assert loss.isfinite()
        assert average.n_averaged == n
    assert not torch.equal(average.module.fc.weight, network.fc.weight)


def test_frozen_features_are_computed_once_and_only_the_last_layer_learns(monkeypatch):
    network = weights.build(2, seed=0, architecture="resnet18").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    frozen = train_step.FrozenTrunk(network, "float32")
    passes = []
    network.conv1.register_forward_hook(lambda *_: passes.append(1))
    config = TrainConfig(data="d", precision="float32")
    optimizer = train_step.optimizer(network, config)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    step = train_step.Step(network.fc, optimizer, torch.device("cpu"), config, frozen=frozen)
    images = torch.cat([torch.zeros(2, 32, 64, 3), torch.full((2, 32, 64, 3), 255)]).to(torch.uint8)
    target, names = torch.tensor([0, 0, 1, 1]), list("abcd")
    losses = [float(step(images, target, 1e-5, names)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert len(passes) == 1
    # Those of other images, in another order and of others beside them.
    again = frozen(["c", "a"], torch.zeros(2, 3, 32, 64))
    torch.testing.assert_close(again, torch.stack([frozen._known["c"], frozen._known["a"]]), rtol=0, atol=0)
    assert len(passes) == 1
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_frozen_features_stay_within_their_memory(monkeypatch):
    monkeypatch.setattr(train_step, "FROZEN_BYTES", 3 * 4 * 512)
    frozen = train_step.FrozenTrunk(weights.build(2, architecture="resnet18"), "float32")
    images = torch.zeros(5, 3, 32, 32)
    assert frozen(list("abcde"), images).shape == (5, 512)
    assert set(frozen._known) == set("abc")
    assert frozen(list("de"), images[:2]).shape == (2, 512)


def test_a_step_normalises_by_the_colours_of_the_network():
    class Seen(torch.nn.Linear):
        def forward(self, batch):
            self.batch = batch
            return super().forward(batch.mean((2, 3)))

    network = Seen(3, 2)
    config = TrainConfig(
        data="d", augment=False, mean=(0.5, 0.25, 0.0), std=(0.5, 0.5, 1.0), precision="float32"
    )
    step = train_step.Step(network, train_step.optimizer(network, config), torch.device("cpu"), config)
    step(torch.full((2, 4, 4, 3), 255, dtype=torch.uint8), torch.tensor([0, 1]), 0.1)
    torch.testing.assert_close(network.batch[0, :, 0, 0], torch.tensor([1.0, 1.5, 1.0]))
