import copy
from collections import OrderedDict
from functools import partial

import torch
from torch import nn

from bcd.model import predictor, resnet, weights


def test_a_network_is_seeded():
    network, again, other = (weights.build(2, seed=seed, architecture="resnet18") for seed in (1, 1, 2))
    assert torch.equal(network.conv1.weight, again.conv1.weight)
    assert not torch.equal(network.conv1.weight, other.conv1.weight)


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    weights.build(2, seed=9, architecture="resnet18")
    assert torch.equal(torch.rand(3), expected)


def test_weights_are_taken_over_but_a_head_of_other_classes_is_not():
    build = partial(weights.build, architecture="resnet18")
    given = build(8, seed=5).half().state_dict()
    network = build(2, given, seed=1)
    torch.testing.assert_close(network.layer4[1].conv2.weight, given["layer4.1.conv2.weight"].float())
    assert network.conv1.weight.dtype == torch.float32
    assert torch.equal(network.fc.weight, build(2, seed=1).fc.weight)
    assert torch.equal(build(8, given).fc.bias, given["fc.bias"].float())


def test_forward_equals_the_network_itself():
    network = weights.build(3, seed=2).eval()
    images = torch.randn(2, 3, 96, 144, generator=torch.Generator().manual_seed(0))
    output = resnet.forward(network, images)
    torch.testing.assert_close(output.logit, network(images), atol=1e-5, rtol=1e-5)
    assert output.evidence.shape == (2, 3, 5)


def test_float32_is_no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    resnet.set_precision("auto")
    assert torch.backends.cudnn.allow_tf32
    resnet.set_precision("float32")
    assert not torch.backends.cudnn.allow_tf32


def test_forward_gives_float32_under_autocast():
    network = weights.build(2, architecture="resnet18").eval()
    with torch.autocast("cpu", torch.bfloat16):
        output = resnet.forward(network, torch.zeros(1, 3, 64, 64))
    assert {output.logit.dtype, output.evidence.dtype} == {torch.float32}
    total = output.evidence.mean((1, 2)) + output.evidence_bias
    torch.testing.assert_close(total, output.logit[:, 1] - output.logit[:, 0], atol=1e-5, rtol=0)


def test_folding_the_batch_norms_keeps_the_function():
    network = weights.build(2, seed=3)
    images = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(2):
            network.train()(images)  # batch norms that have seen something
        expected = network.eval()(images)
        folded = resnet.fold(copy.deepcopy(network))
        torch.testing.assert_close(folded(images), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(resnet.forward(folded, images).logit, expected, atol=1e-4, rtol=1e-4)
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules()) == 53
    assert not [module for module in folded.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert sum(isinstance(module, torch.nn.Conv2d) for module in folded.modules()) == 53


def test_probability():
    logit = torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    torch.testing.assert_close(predictor.probabilities(logit)[:, 1], torch.sigmoid(torch.tensor([2.0, 0.0])))


def test_a_temperature_divides_logits_and_evidence_alike():
    network = weights.build(2, seed=1, architecture="resnet18").eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        plain = resnet.forward(network, images)
        cooler = resnet.forward(resnet.temper(network, 2.0), images)
    torch.testing.assert_close(cooler.logit, plain.logit / 2)
    torch.testing.assert_close(cooler.evidence, plain.evidence / 2)
    torch.testing.assert_close(cooler.evidence_bias, plain.evidence_bias / 2)
    torch.testing.assert_close(cooler.pooled, plain.pooled)


def test_probability_malignant_sums_over_malignant_subtypes():
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    torch.testing.assert_close(
        predictor.malignant_share(probabilities, ("A", "DC", "F", "LC")), torch.tensor([0.6])
    )


def test_compiling_fuses_and_packs_the_convolutions(monkeypatch):
    """Where torch takes weights as inputs, it compiles too, and gains nothing."""
    from torch._dynamo.utils import counters
    from torch._inductor import config

    monkeypatch.setattr(config, "freezing", False)
    torch.manual_seed(0)
    layers = {"conv1": nn.Conv2d(3, 8, 3), "relu": nn.ReLU(), "avgpool": nn.Identity()}
    network = nn.Sequential(OrderedDict(layers)).requires_grad_(False)
    images = torch.randn(2, 3, 16, 24).contiguous(memory_format=torch.channels_last)
    counters.clear()
    with torch.inference_mode():
        found = resnet.compiled_features(network)(images)
        torch.testing.assert_close(found, resnet.features(network, images))
    assert counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] == 1
    assert counters["inductor"]["mkldnn_unary_fusion_matcher_count"] == 1
