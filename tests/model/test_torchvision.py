"""torchvision is the oracle: the same names, numbers and gradients, to the bit."""

import pytest
import torch
import torchvision
from torchvision.transforms import v2

from bcd.imaging import image
from bcd.model.resnet import BLOCKS, ResNet, normalise


def seeded(build):
    torch.manual_seed(3)
    return build()


@pytest.mark.parametrize("architecture", BLOCKS)
def test_a_network_is_torchvisions(architecture):
    own = seeded(lambda: ResNet(architecture, 3))
    reference = seeded(lambda: torchvision.models.get_model(architecture, num_classes=3))
    state, expected = own.state_dict(), reference.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert {name for name, _ in own.named_modules()} == {name for name, _ in reference.named_modules()}
    images = torch.randn(2, 3, 32, 64)
    logit, other = own(images), reference(images)
    assert torch.equal(logit, other)
    logit.sum().backward()
    other.sum().backward()
    for parameter, twin in zip(own.parameters(), reference.parameters(), strict=True):
        assert torch.equal(parameter.grad, twin.grad)
    assert torch.equal(own.eval()(images), reference.eval()(images))


def test_images_are_normalised_as_torchvision_does():
    images = torch.arange(3 * 256, dtype=torch.int32).remainder(256).to(torch.uint8).view(1, 3, 16, 16)
    scaled = v2.functional.to_dtype(images, torch.float32, scale=True)
    expected = v2.functional.normalize(scaled, list(image.IMAGENET_MEAN), list(image.IMAGENET_STD))
    assert torch.equal(normalise(images), expected)


def test_normalise_is_imagenets():
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor(image.IMAGENET_MEAN)) / torch.tensor(image.IMAGENET_STD)
    torch.testing.assert_close(normalise(white)[0, :, 0, 0], expected)


def test_fill_is_nothing_to_the_network():
    filled = torch.tensor(image.FILL, dtype=torch.uint8).view(1, 3, 1, 1)
    assert normalise(filled).abs().max() < 0.5 / 255 / 0.22
