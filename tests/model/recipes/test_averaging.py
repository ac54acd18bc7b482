import torch
from torch import nn

from bcd.model.recipes.averaging import average_of


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def test_the_average_equals_the_formula_with_the_statistics_of_batch_norm():
    decay, given = 0.9, network()
    average = average_of(given, decay)
    expected = None
    for step in range(5):
        given(torch.randn(8, 3, 4, 4) + step)  # moves the running statistics
        with torch.no_grad():
            for parameter in given.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update_parameters(given)
        now = {name: tensor.clone() for name, tensor in given.state_dict().items()}
        expected = now if expected is None else {n: decay * expected[n] + (1 - decay) * now[n] for n in now}
    found = average.module.state_dict()
    floats = [name for name in found if found[name].is_floating_point()]
    assert {"0.weight", "1.bias", "1.running_mean", "1.running_var"} <= set(floats)
    for name in floats:
        torch.testing.assert_close(found[name], expected[name])
        assert not torch.equal(found[name], given.state_dict()[name])


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
