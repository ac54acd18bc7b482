"""Two workers with half a batch each compute what one computes with the whole."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bcd.model import train_step

CPU = torch.device("cpu")


def network():
    torch.manual_seed(1)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).double()


def data():
    generator = torch.Generator().manual_seed(2)
    # The halves differ, so that statistics of one half are not those of the whole.
    images = torch.randn(6, 3, 12, 12, generator=generator, dtype=torch.double)
    images[3:] = 4 * images[3:] + 7
    return images, torch.tensor([0, 1, 0, 1, 1, 0])


def step(model, images, target):
    loss = nn.functional.cross_entropy(model(images), target)
    loss.backward()
    return loss.detach()


def layer():
    """One in mixed precision, an input as the network has it there, and a gradient."""
    generator = torch.Generator().manual_seed(3)
    found = nn.BatchNorm2d(8)
    for parameter in found.parameters():
        nn.init.uniform_(parameter, 0.5, 2, generator)
    numbers = torch.randn(2, 6, 8, 12, 12, generator=generator)
    numbers[0] += torch.arange(6).view(6, 1, 1, 1)
    x, gradient = (half.to(torch.bfloat16, memory_format=torch.channels_last) for half in numbers)
    return found, x, gradient


def through(batch_norm, x, gradient):
    x.requires_grad_()
    output = batch_norm(x)
    output.backward(gradient)
    return output.detach(), x.grad, batch_norm.weight.grad, batch_norm.bias.grad


def work(rank, folder):
    meeting = f"file://{folder}/meeting"
    limit = timedelta(minutes=2)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=limit)
    mine = slice(3 * rank, 3 * rank + 3)
    batch_norm, x, gradient = layer()
    mixed = through(train_step.share_batch_norm(batch_norm, CPU), x[mine].detach(), gradient[mine])
    shared = train_step.share_batch_norm(network(), CPU)
    images, target = data()
    loss = step(DistributedDataParallel(shared), images[mine], target[mine])
    dist.all_reduce(loss)
    gradients = [parameter.grad for parameter in shared.parameters()]
    apart = network()
    apart(images[mine])
    train_step.average_batch_norm(apart)
    torch.save((loss / 2, gradients, shared.state_dict(), mixed, apart.state_dict()), f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    # One of the two is this process, which has imported torch.
    other = mp.get_context("spawn").Process(target=work, args=(1, str(folder)))
    other.start()
    try:
        work(0, str(folder))
    finally:
        other.join()
    assert other.exitcode == 0
    return [torch.load(folder / str(rank)) for rank in range(2)]


@pytest.mark.process
def test_two_workers_equal_one(found):
    whole = network()
    expected = step(whole, *data())
    for loss, gradients, state, *_ in found:
        assert loss == pytest.approx(expected.item(), abs=1e-12)
        for gradient, parameter in zip(gradients, whole.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=0, atol=1e-12)
        assert state.keys() == whole.state_dict().keys()
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-12)


@pytest.mark.process
def test_two_workers_equal_one_in_mixed_precision(found):
    batch_norm, x, gradient = layer()
    output, of_x, *of_parameters = through(batch_norm, x.float(), gradient.float())
    halves = [mixed for *_, mixed, _ in found]
    for number, expected in enumerate((output, of_x)):
        both = torch.cat([half[number] for half in halves])
        assert both.dtype == torch.bfloat16
        torch.testing.assert_close(both.float(), expected, rtol=2**-7, atol=2**-7)
    for number, expected in enumerate(of_parameters, start=2):
        torch.testing.assert_close(halves[0][number] + halves[1][number], expected, rtol=1e-4, atol=1e-4)


def test_in_evaluation_it_is_plain_batch_norm():
    images, _ = data()
    torch.testing.assert_close(
        train_step.share_batch_norm(network().eval(), CPU)(images), network().eval()(images)
    )


@pytest.mark.process
def test_running_statistics_of_workers_that_counted_apart_are_averaged(found):
    halves = [network() for _ in found]
    images, _ = data()
    for half, mine in zip(halves, images.split(3), strict=True):
        half(mine)
    first, second = (half.state_dict() for half in halves)
    for *_, state in found:
        for name, value in state.items():
            expected = torch.stack([first[name], second[name]]).double().mean(0).to(value.dtype)
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


class WithActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d, which contains what follows the norm."""

    def __init__(self):
        super().__init__(8)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def test_a_batch_norm_keeps_the_activation_that_it_contains(tmp_path):
    images = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    expected, shared = WithActivation(), train_step.share_batch_norm(WithActivation(), CPU)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        trained = shared(images)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(trained, expected(images), atol=1e-5, rtol=1e-5)
    assert (trained == 0).any()
    torch.testing.assert_close(shared.eval()(images), expected.eval()(images), atol=1e-5, rtol=1e-5)
