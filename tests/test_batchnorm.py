"""Two workers with half a batch each compute what one computes with the whole."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bcd import batchnorm

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


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    shared = batchnorm.share(network(), CPU)
    images, target = data()
    mine = slice(3 * rank, 3 * rank + 3)
    loss = step(DistributedDataParallel(shared), images[mine], target[mine])
    dist.all_reduce(loss)
    gradients = [parameter.grad for parameter in shared.parameters()]
    torch.save((loss / 2, gradients, shared.state_dict()), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_workers_equal_one(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    whole = network()
    expected = step(whole, *data())
    for rank in range(2):
        loss, gradients, state = torch.load(tmp_path / str(rank))
        assert loss == pytest.approx(expected.item(), abs=1e-12)
        for found, parameter in zip(gradients, whole.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad, rtol=0, atol=1e-12)
        assert state.keys() == whole.state_dict().keys()
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-12)


def test_in_evaluation_it_is_plain_batch_norm():
    images, _ = data()
    torch.testing.assert_close(batchnorm.share(network().eval(), CPU)(images), network().eval()(images))
