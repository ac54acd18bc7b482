import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM

from bcd import storage
from bcd.imaging import image
from bcd.model import cam, resnet, weights
from bcd.model.card import STRIDE_PX
from bcd.model.resnet import normalise
from tests import pictures


class Contrast:
    """The log-odds of class 1, as a target for pytorch-grad-cam."""

    def __call__(self, logit):
        return logit[1] - logit[0]


def inputs(n=3):
    fields = np.stack(
        [pictures.gradient(96, 144), pictures.gradient(96, 144)[::-1], pictures.gradient(96, 144)[:, ::-1]]
    )
    return normalise(torch.from_numpy(fields[:n].copy()).permute(0, 3, 1, 2))


def scaled(maps):
    """ReLU and min-max scaling per image, as pytorch-grad-cam does."""
    maps = np.maximum(maps, 0)
    maps = maps - maps.min((1, 2), keepdims=True)
    return maps / (1e-7 + maps.max((1, 2), keepdims=True))


def oracle(network, images, targets):
    """pytorch-grad-cam's map on layer4, at the size of the features (a field as large as its map is not
    enlarged by OpenCV, so the comparison is exact)."""
    method = GradCAM(network, [network.layer4[-1]])
    method.get_target_width_height = lambda images: (-(-images.shape[-1] // 32), -(-images.shape[-2] // 32))
    return method(images, targets)


@pytest.fixture(scope="module")
def network():
    return weights.build(2, seed=3, architecture="resnet18").eval()


def test_mean_plus_bias_is_the_log_odds(network):
    output = resnet.forward(network, inputs())
    total = output.evidence.mean((1, 2)) + output.evidence_bias
    torch.testing.assert_close(total, output.logit[:, 1] - output.logit[:, 0], atol=1e-4, rtol=0)


def test_more_classes_give_the_centred_logit_of_the_predicted_one():
    network = weights.build(8, seed=4, architecture="resnet18").eval()
    output = resnet.forward(network, inputs())
    centred = output.logit - output.logit.mean(1, keepdim=True)
    expected = centred.gather(1, output.logit.argmax(1, keepdim=True))[:, 0]
    torch.testing.assert_close(
        output.evidence.mean((1, 2)) + output.evidence_bias, expected, atol=1e-4, rtol=0
    )


def test_closed_form_equals_pytorch_grad_cam(network):
    expected = oracle(network, inputs(), [Contrast()] * 3)
    ours = resnet.forward(network, inputs()).evidence.detach().numpy()
    np.testing.assert_allclose(scaled(ours), expected, atol=1e-3)


def test_a_map_is_large_where_the_features_are():
    features = torch.zeros(1, 2, 2, 3)
    features[0, 1, 1, 2] = 6.0
    maps, bias = cam.evidence(
        features, torch.tensor([[0.0, 1.0], [0.0, 3.0]]), torch.tensor([0.5, 1.0]), torch.tensor([1])
    )
    assert maps[0, 1, 2] == 12.0
    assert maps.sum() == 12.0
    assert bias.item() == 0.5


def explain(network, images, method, layer):
    return cam.explain(network, images, method, layer, torch.zeros(len(images), dtype=torch.long))


@pytest.fixture(scope="module")
def closed(network):
    """The closed form of the batch, and the features and contrast it was made from; float32 arrays."""
    with torch.inference_mode():
        features = resnet.features(network, inputs()).numpy()
        evidence = resnet.forward(network, inputs()).evidence.numpy()
    weight = network.fc.weight.detach().numpy()
    return evidence, features, weight[1] - weight[0]


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "xgradcam"])
def test_signed_methods_equal_the_closed_form_on_the_last_layer(method, network, closed):
    maps = explain(network, inputs(), method, "layer4")
    assert maps.dtype == torch.float32
    # Their mean gradient is the weight over the number of cells, 3 x 5.
    np.testing.assert_allclose(15 * maps.numpy(), closed[0], atol=1e-4)


def test_layercam_keeps_what_speaks_for_class_1(network, closed):
    _, features, contrast = closed
    expected = np.einsum("nkhw,k->nhw", features, np.maximum(contrast, 0)) / 15
    np.testing.assert_allclose(explain(network, inputs(), "layercam", "layer4"), expected, atol=1e-5)


def test_gradcam_plus_plus_weighs_by_its_equation_19(network, closed):
    _, features, contrast = closed
    g, total = contrast / 15, features.sum((2, 3))
    alpha = g**2 / (2 * g**2 + total * g**3 + 1e-6)  # the tool's own epsilon
    expected = np.einsum("nkhw,nk->nhw", features, 15 * np.maximum(g, 0) * alpha)
    found = explain(network, inputs(), "gradcam++", "layer4").numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_eigencam_is_the_first_principal_component(network, closed):
    cells = closed[1][0].reshape(512, -1)
    strongest = np.linalg.svd(cells - cells.mean(1, keepdims=True), compute_uv=False)[0]
    first = explain(network, inputs(1), "eigencam", "layer4")[0].numpy()
    assert np.linalg.norm(first) == pytest.approx(strongest, rel=1e-4)
    assert abs(first.mean()) < 1e-4 * strongest


def test_scorecam_is_a_weighted_mean_of_the_channels(network):
    small = inputs(2)[:, :, :64, :64]
    features = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(small))))).detach()
    maps = explain(network, small, "scorecam", "layer1")
    assert maps.shape == (2, 16, 16)
    assert (maps >= features.amin(1) - 1e-5).all()
    assert (maps <= features.amax(1) + 1e-5).all()


def test_ablationcam_weighs_each_channel_by_what_the_log_odds_lose_without_it():
    """On the last layer that is the weight times the channel's mean, whatever the sign of the log-odds."""
    network = weights.build(2, seed=3, architecture="resnet18").eval()
    network.fc.bias.data[0] += 9
    small = inputs(1)[:, :, :33, :33]
    output, features = resnet.forward(network, small), resnet.features(network, small).detach().numpy()
    assert output.logit[0, 1] < output.logit[0, 0]
    contrast = (network.fc.weight[1] - network.fc.weight[0]).detach().numpy()
    expected = np.einsum("nkhw,nk->nhw", features, contrast * features.mean((2, 3)))
    found = explain(network, small, "ablationcam", "layer4").numpy()
    assert found.shape == (1, 2, 2)
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("layer", "size"), [*zip(cam.LAYERS, [(24, 36), (12, 18), (6, 9), (3, 5)], strict=True)]
)
def test_a_map_is_as_large_as_the_features_of_its_layer(layer, size, network):
    maps = explain(network, inputs(), "gradcam", layer)
    assert maps.shape == (3, *size)
    assert maps.std() > 0


def test_more_classes_explain_the_centred_logit_of_the_class_given():
    network = weights.build(8, seed=4, architecture="resnet18").eval()
    given = torch.tensor([5, 0, 2])
    features = resnet.features(network, inputs()).detach()
    expected, _ = cam.evidence(features, network.fc.weight, network.fc.bias, given)
    found = 15 * cam.explain(network, inputs(), "gradcam", "layer4", given)
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["gradcam", "eigencam", "ablationcam"])
def test_explaining_leaves_the_network_as_it_was(method):
    network = weights.build(2, seed=3, architecture="resnet18").eval().requires_grad_(False)
    layers = dict(network.named_modules())
    with torch.inference_mode():
        maps = explain(network, inputs(2)[:, :, :32, :32], method, "layer3")
    assert maps.shape == (2, 2, 2)
    assert dict(network.named_modules()) == layers
    assert not any(module._forward_hooks for module in layers.values())
    assert all(weight.grad is None and not weight.requires_grad for weight in network.parameters())


@pytest.mark.real
def test_the_closed_form_on_real_fields_and_weights(real_data):
    paths = sorted(map(str, (real_data / "breakhis").rglob("*.png")))[::10][:3]
    given = weights.pretrained(str(real_data / "weights" / "resnet50_imagenet.safetensors"))
    network = weights.build(2, given).eval()
    fields = np.stack([image.fit(image.decode(storage.read_bytes(path)), 224, 336) for path in paths])
    images = normalise(torch.from_numpy(fields).permute(0, 3, 1, 2))
    with torch.inference_mode():
        ours = resnet.forward(network, images).evidence.numpy()
    assert len(ours) == 3
    theirs = explain(network, images, "gradcam", "layer4").numpy()
    np.testing.assert_allclose(7 * 11 * theirs, ours, atol=1e-3 * np.abs(ours).max())
    np.testing.assert_allclose(scaled(theirs), scaled(ours), atol=1e-3)


def test_the_stride_is_the_network_s(network):
    features = resnet.features(network, torch.zeros(1, 3, 2 * STRIDE_PX, 3 * STRIDE_PX))
    assert features.shape[2:] == (2, 3)
