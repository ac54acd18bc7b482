import pytest
import torch
from torch import nn

from bcd.model.recipes.averaging import average_of, share_after


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_the_average_equals_the_formula_with_the_statistics_of_batch_norm(decay):
    given = network()
    average = average_of(given, decay)
    expected = None
    for n in range(5):
        given(torch.randn(8, 3, 4, 4) + n)  # moves the running statistics
        with torch.no_grad():
            for parameter in given.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update_parameters(given)
        now = {name: tensor.clone() for name, tensor in given.state_dict().items()}
        share = min(decay, (1 + n) / (10 + n))
        expected = now if n == 0 else {k: share * expected[k] + (1 - share) * now[k] for k in now}
    found = average.module.state_dict()
    floats = [name for name in found if found[name].is_floating_point()]
    assert {"0.weight", "1.bias", "1.running_mean", "1.running_var"} <= set(floats)
    for name in floats:
        torch.testing.assert_close(found[name], expected[name])
        assert not torch.equal(found[name], given.state_dict()[name])


def test_an_average_over_few_steps_is_of_the_last_ones_and_not_of_the_initial_weights():
    given = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(given.weight)
    average = average_of(given, 0.99)
    average.update_parameters(given)
    for n in range(1, 42):
        nn.init.constant_(given.weight, n)
        average.update_parameters(given)
    assert 41 - average.module.weight.item() == pytest.approx(41 / 10, abs=0.5)


def test_the_share_is_the_decay_after_enough_steps():
    assert [share_after(n, 0.99) for n in (0, 90, 890, 10**6)] == [0.1, 0.91, 0.99, 0.99]


def test_a_network_that_is_wrapped_for_several_workers_has_the_same_average():
    given = network()
    averages = [average_of(given, 0.5) for _ in range(2)]
    for _ in range(2):
        given(torch.randn(8, 3, 4, 4))
        averages[0].update_parameters(given)
        averages[1].update_parameters(nn.ModuleDict({"module": given}))  # as DistributedDataParallel
    for one, other in zip(*(average.state_dict().values() for average in averages), strict=True):
        assert torch.equal(one, other)


def test_the_average_is_for_evaluation_and_is_not_trained():
    average = average_of(network(), 0.5)
    assert not any(module.training for module in average.modules())
    assert not any(parameter.requires_grad for parameter in average.parameters())


def test_without_a_decay_there_is_none():
    assert average_of(network(), None) is None
