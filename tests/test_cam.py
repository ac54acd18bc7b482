import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM

from bcd import cam, model, transform
from tests import pictures


class Contrast:
    """The log-odds of class 1, as a target for pytorch-grad-cam."""

    def __call__(self, logit):
        return logit[1] - logit[0]


def inputs(n=3):
    fields = np.stack(
        [pictures.gradient(96, 144), pictures.gradient(96, 144)[::-1], pictures.gradient(96, 144)[:, ::-1]]
    )
    return transform.normalise(torch.from_numpy(fields[:n].copy()).permute(0, 3, 1, 2))


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
    return model.build(2, seed=3).eval()


def test_mean_plus_bias_is_the_log_odds(network):
    output = model.forward(network, inputs())
    total = output.evidence.mean((1, 2)) + output.evidence_bias
    torch.testing.assert_close(total, output.logit[:, 1] - output.logit[:, 0], atol=1e-4, rtol=0)


def test_more_classes_give_the_centred_logit_of_the_predicted_one():
    network = model.build(8, seed=4).eval()
    output = model.forward(network, inputs())
    centred = output.logit - output.logit.mean(1, keepdim=True)
    expected = centred.gather(1, output.logit.argmax(1, keepdim=True))[:, 0]
    torch.testing.assert_close(
        output.evidence.mean((1, 2)) + output.evidence_bias, expected, atol=1e-4, rtol=0
    )


def test_closed_form_equals_pytorch_grad_cam(network):
    expected = oracle(network, inputs(), [Contrast()] * 3)
    ours = model.forward(network, inputs()).evidence.detach().numpy()
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
