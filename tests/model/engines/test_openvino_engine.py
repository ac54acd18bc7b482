from functools import partial

import numpy as np
import pytest
import torch

from bcd.errors import BundleError, ConfigError
from bcd.model import predictor, resnet
from bcd.model.card import Study
from bcd.model.engines import openvino_engine
from bcd.model.engines.openvino_engine import OpenVinoFeatures
from bcd.model.networks.ensemble import Ensemble
from tests.model.recipes.test_reference import MACENKO
from tests.model.test_bundle import card, statistics, untrained

pytestmark = pytest.mark.usefixtures("openvino")

IMAGES = np.random.default_rng(0).integers(0, 255, (3, 64, 96, 3), np.uint8)


def log_odds(prediction):
    return prediction.logit[:, 1] - prediction.logit[:, 0]


@pytest.fixture(scope="module")
def network():
    return untrained()


@pytest.fixture(scope="module")
def uri(network, tmp_path_factory):
    """Of a ResNet18 with every part that follows from the features."""
    folder = str(tmp_path_factory.mktemp("model"))
    predictor.save(network, card(feature_statistics=statistics(network), temperature=2.0), folder)
    return folder


def require_equal(found, expected):
    assert found.predicted_class == expected.predicted_class
    np.testing.assert_allclose(log_odds(found), log_odds(expected), atol=1e-4)
    np.testing.assert_allclose(found.evidence, expected.evidence, atol=1e-4)
    np.testing.assert_allclose(found.evidence.mean((1, 2)) + found.evidence_bias, log_odds(found), atol=1e-3)
    np.testing.assert_allclose(found.novelty, expected.novelty, rtol=1e-4)
    np.testing.assert_allclose(found.pooled, expected.pooled, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.log_odds_sd, expected.log_odds_sd, atol=1e-4)


def test_every_number_is_that_of_torch(uri):
    plain, other = predictor.load(uri, "cpu"), predictor.load(uri, engine="openvino")
    assert (plain.engine, other.engine, other.model_id) == ("torch", "openvino", plain.model_id)
    require_equal(other.predict(IMAGES), plain.predict(IMAGES))
    require_equal(other.predict(IMAGES[:1]), plain.predict(IMAGES[:1]))


@pytest.mark.parametrize("made", ["bottlenecks", "ensemble", "orientations and stain"])
def test_every_kind_of_model_is_that_of_torch(made, network, tmp_path):
    if made == "bottlenecks":
        predictor.save(untrained(architecture="resnet50"), card(architecture="resnet50"), str(tmp_path))
    elif made == "ensemble":
        study = Study(kind="ensemble", n_models=2)
        predictor.save(Ensemble([network, untrained(seed=2)]), card(study=study), str(tmp_path))
    else:
        predictor.save(network, card(symmetries=True, stain=MACENKO), str(tmp_path))
    plain, other = (predictor.load(str(tmp_path), "cpu", engine=name) for name in ("torch", "openvino"))
    require_equal(other.predict(IMAGES), plain.predict(IMAGES))


def test_bfloat16_is_within_its_tolerance(openvino, uri):
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")
    expected = predictor.load(uri, "cpu").predict(IMAGES)
    loaded = predictor.load(uri, "cpu", "bfloat16", engine="openvino")
    found = loaded.predict(IMAGES)
    summand = (torch.from_numpy(expected.pooled) @ loaded.network.fc.weight.abs().T).max()
    difference = np.abs(found.logit - expected.logit).max()
    assert 0 < difference < predictor.TOLERANCE_BFLOAT16 * float(summand) < 1
    np.testing.assert_allclose(found.evidence.mean((1, 2)) + found.evidence_bias, log_odds(found), atol=1e-3)


def test_an_image_has_the_same_features_in_any_batch(uri):
    images = torch.from_numpy(np.random.default_rng(1).normal(size=(5, 3, 64, 96)).astype(np.float32))
    features = OpenVinoFeatures(predictor.load(uri, "cpu").network, "float32")
    whole = features(images)
    for i in range(len(images)):
        assert torch.equal(features(images[i : i + 1]), whole[i : i + 1])


def test_it_computes_with_the_threads_that_the_worker_reserves(uri, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    features = OpenVinoFeatures(predictor.load(uri, "cpu").network, "float32")
    features(torch.zeros(1, 3, 64, 96))
    features(torch.zeros(3, 3, 64, 96))
    given = [requests[0].get_compiled_model().get_property for requests in features._requests.values()]
    for get, streams in zip(given, (1, 2), strict=True):
        assert (get("INFERENCE_NUM_THREADS"), get("NUM_STREAMS")) == (2, streams)
        assert not get("ENABLE_CPU_PINNING")


def test_an_engine_with_other_numbers_is_refused(uri, monkeypatch):
    computed = OpenVinoFeatures.__call__
    monkeypatch.setattr(OpenVinoFeatures, "__call__", lambda self, images: computed(self, images) * 1.01)
    with pytest.raises(
        BundleError, match=r"for a canary image --engine openvino computes the logits .*float32"
    ):
        predictor.load(uri, engine="openvino")
    monkeypatch.setattr(OpenVinoFeatures, "__call__", lambda self, images: computed(self, images) * np.nan)
    with pytest.raises(BundleError, match="use --engine torch"):
        predictor.load(uri, engine="openvino")


def test_a_precision_that_the_cpu_lacks_is_refused(uri, monkeypatch):
    """OpenVINO computes in another one and says so."""
    monkeypatch.setitem(openvino_engine.PRECISIONS, "bfloat16", "f32")
    with pytest.raises(
        ConfigError, match="has no bfloat16 on this CPU: use --precision float32, or --engine"
    ):
        predictor.load(uri, precision="bfloat16", engine="openvino")


def test_it_has_the_layers_of_torch(network):
    """In float32, layer by layer in one product, with the size of an odd input."""
    folded = resnet.fold(untrained()).requires_grad_(False)
    images = torch.rand(2, 3, 65, 97)
    expected = partial(resnet.features, folded)(images)
    torch.testing.assert_close(OpenVinoFeatures(folded, "float32")(images), expected, rtol=1e-4, atol=1e-4)
