"""Networks of timm: the closed form is pytorch-grad-cam's where it is claimed; elsewhere nothing adds up."""

import numpy as np
import pytest
import torch

from bcd.errors import BundleError
from bcd.model import bundle, cam, predictor, resnet, weights
from bcd.model.networks.backbone import Backbone
from bcd.model.resnet import normalise
from tests.model.test_bundle import card, statistics

timm = pytest.importorskip("timm", reason="needs the extra `timm`")

SIZE = (64, 96)
# Cells of the map, and whether its mean plus bias is the log-odds: a residual network; one that ends in a 1x1
# convolution; one with a norm, and one with a norm and channels last, after pooling; an answer by a token; by
# the mean of tokens and a norm.
NETWORKS = {
    "test_resnet": (2, 3, True),
    "test_efficientnet": (2, 3, True),
    "test_convnext": (2, 3, False),
    "test_mambaout": (2, 3, False),
    "test_vit": (4, 6, False),
    "test_vit_relpos": (4, 6, False),
}


def bundle_card(name, **changes):
    return card(architecture=f"timm:{name}", **changes)


def images(n=2):
    generator = np.random.default_rng(0)
    return np.stack([generator.integers(0, 255, (*SIZE, 3), np.uint8) for _ in range(n)])


def inputs(n=2):
    return normalise(torch.from_numpy(images(n)).permute(0, 3, 1, 2))


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A network whose batch norms have seen images."""
    made = weights.build(2, seed=1, architecture=f"timm:{request.param}", size_px=SIZE)
    with torch.no_grad():
        made.train()(inputs())
    return made.eval()


def name_of(network):
    return network.architecture.removeprefix("timm:")


@torch.no_grad()
def test_forward_is_that_of_timm(network):
    torch.testing.assert_close(network(inputs()), network.direct(inputs()))
    torch.testing.assert_close(resnet.forward(network, inputs()).logit, network(inputs()))


def test_the_network_says_whether_its_maps_add_up(network):
    height, width, adds_up = NETWORKS[name_of(network)]
    assert network.layout[:3] == (height, width, adds_up)
    assert resnet.has_closed_form(network) == adds_up
    output = resnet.forward(network, inputs())
    assert (output.evidence is not None) == (output.evidence_bias is not None) == adds_up
    if adds_up:
        total = output.evidence.mean((1, 2)) + output.evidence_bias
        torch.testing.assert_close(total, output.logit[:, 1] - output.logit[:, 0], atol=1e-5, rtol=0)


def test_gradcam_equals_the_closed_form_where_there_is_one_and_nowhere_else(network):
    height, width, adds_up = NETWORKS[name_of(network)]
    chosen = torch.zeros(2, dtype=torch.long)
    found = cam.explain(network, inputs(), "gradcam", network.layout.layer, chosen)
    assert found.shape == (2, height, width)
    assert found.std() > 0
    features = network.spatial(network.features(inputs())).detach()
    if features.shape[1] != network.fc.in_features:
        assert not adds_up
        return
    claimed, bias = cam.evidence(features, network.fc.weight, network.fc.bias, chosen)
    log_odds = torch.diff(network(inputs()))[:, 0]
    assert bool((claimed.mean((1, 2)) + bias - log_odds).abs().max() < 1e-5) == adds_up
    difference = (height * width * found - claimed).abs().max() / claimed.abs().max()
    assert bool(difference < 1e-4) == adds_up


@torch.no_grad()
def test_features_are_laid_out_as_the_image_is(network):
    """A corner that changes alone changes its own cell most."""
    plain = torch.zeros(1, 3, *SIZE)
    changed = plain.clone()
    changed[..., 48:, 80:] = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    before, after = (network.spatial(network.features(one)) for one in (plain, changed))
    assert before.shape[2:] == network.layout[:2]
    assert (after - before).norm(dim=1).argmax() == before.shape[2] * before.shape[3] - 1


def test_a_bundle_is_saved_and_loaded_with_what_its_evidence_is(tmp_path, network):
    height, width, adds_up = NETWORKS[name_of(network)]
    made = card(architecture=network.architecture)
    predictor.save(network, made, str(tmp_path))
    loaded = predictor.load(str(tmp_path), "cpu")
    assert loaded.card.evidence == ("evidence" if adds_up else "gradcam")
    found = loaded.predict(images())
    expected = network(inputs()).detach().numpy()
    np.testing.assert_allclose(found.logit, expected, atol=1e-5)
    assert found.evidence.shape == (2, *loaded.evidence_size()) == (2, height, width)
    assert np.isnan(found.evidence_bias).all() != adds_up
    assert found.pooled.shape == (2, network.fc.in_features)
    if adds_up:
        total = found.evidence.mean((1, 2)) + found.evidence_bias
        np.testing.assert_allclose(total, np.diff(found.logit)[:, 0], atol=1e-5)


def save(tmp_path, name, **changes):
    network = weights.build(2, seed=1, architecture=f"timm:{name}", size_px=SIZE)
    predictor.save(network, bundle_card(name, **changes), str(tmp_path))
    return network


def test_a_card_that_claims_the_wrong_evidence_is_rejected(tmp_path):
    save(tmp_path, "test_vit")
    known = bundle.read_card(str(tmp_path))
    bundle.write_card(known.model_copy(update={"evidence": "evidence"}), str(tmp_path))
    with pytest.raises(BundleError, match="states 'evidence' as evidence, but timm:test_vit has 'gradcam'"):
        predictor.load(str(tmp_path), "cpu")


def test_a_closed_form_that_does_not_add_up_is_not_written(tmp_path, monkeypatch):
    network = weights.build(2, seed=1, architecture="timm:test_convnext", size_px=SIZE)
    monkeypatch.setattr(Backbone, "layout", network.layout._replace(is_mean=True))
    with pytest.raises(
        BundleError, match=r"bias of the evidence map of the canary image are .*, expected its"
    ):
        predictor.save(network, bundle_card("test_convnext"), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_statistics_of_other_features_are_rejected(tmp_path):
    known = weights.build(2, seed=1, architecture="timm:test_resnet", size_px=SIZE).eval()
    ready = predictor.from_state(known.state_dict(), bundle_card("test_resnet"))
    pooled, _ = ready.pooled(images())
    assert pooled.shape == (2, 96)
    other = statistics(weights.build(2, seed=1, architecture="resnet18").eval())
    with pytest.raises(BundleError, match="statistics of 512 features, expected 96"):
        predictor.from_state(known.state_dict(), bundle_card("test_resnet", feature_statistics=other))


def test_numbers_that_are_in_no_file_are_made():
    """Of relative positions, which a skeleton has without data."""
    made = weights.build(2, seed=1, architecture="timm:test_vit_relpos", size_px=SIZE).eval()
    again = weights.assembled(2, made.state_dict(), "timm:test_vit_relpos", SIZE)
    torch.testing.assert_close(again(inputs()), made(inputs()))


def test_more_classes_explain_the_predicted_one():
    network = weights.build(8, seed=1, architecture="timm:test_vit", size_px=SIZE).eval()
    maps = cam.explain(network, inputs(), "gradcam", network.layout.layer, torch.tensor([3, 5]))
    assert maps.shape == (2, 4, 6)
    assert not torch.equal(
        maps, cam.explain(network, inputs(), "gradcam", network.layout.layer, torch.tensor([0, 1]))
    )


@pytest.mark.parametrize(
    ("architecture", "size", "said"),
    [
        (
            "timm:resnet5000",
            SIZE,
            r"--architecture timm:resnet5000: timm .* has no such network; expected one",
        ),
        ("timm:test_vit", (65, 97), r"timm:test_vit cannot be made for 65x97 px \(height x width\): "),
        ("timm:test_vit,depth=99999", SIZE, "depth=99999: expected some of init_values, "),
        ("timm:test_vit,depth=1.2.3", SIZE, "could not convert string to float"),
    ],
)
def test_what_timm_does_not_have_is_said(architecture, size, said):
    with pytest.raises(BundleError, match=said):
        weights.build(2, architecture=architecture, size_px=size)


def test_arguments_follow_the_name():
    network = weights.skeleton(2, "timm:test_vit,init_values=1e-5,depth=3", SIZE)
    assert len(network.body.blocks) == 3
    assert "body.blocks.0.ls1.gamma" in network.state_dict()
