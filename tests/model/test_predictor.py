import copy
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from bcd.errors import BundleError
from bcd.imaging import image
from bcd.model import bundle, cam, predictor, resnet, weights
from bcd.model.recipes import stain
from bcd.model.resnet import normalise
from tests import pictures
from tests.model.recipes.test_reference import MACENKO, REINHARD
from tests.model.test_bundle import card, ready, statistics, untrained, written


@pytest.fixture(scope="module")
def network():
    return weights.build(2, seed=1, architecture="resnet18").eval()


def test_a_bundle_gives_the_logits_of_its_network(tmp_path, network):
    identity = predictor.save(network, card(), str(tmp_path / "model"))
    loaded = predictor.load(str(tmp_path / "model"), device="cpu")
    field = image.fit(pictures.gradient(), 64, 96)
    expected = network(normalise(torch.from_numpy(field).permute(2, 0, 1)[None]))
    prediction = loaded.predict_files([pictures.encode(pictures.gradient())] * 2)
    np.testing.assert_allclose(prediction.logit, expected.detach().repeat(2, 1), rtol=1e-5)
    np.testing.assert_allclose(prediction.probability.sum(1), 1, atol=1e-6)
    assert prediction.evidence.shape == (2, *loaded.evidence_size()) == (2, 2, 3)
    log_odds = prediction.logit[:, 1] - prediction.logit[:, 0]
    np.testing.assert_allclose(
        prediction.evidence.mean((1, 2)) + prediction.evidence_bias, log_odds, atol=1e-4
    )
    assert loaded.model_id == identity
    assert loaded.card == card(**written(loaded.card))
    with pytest.raises(image.ImageError, match="image 2 of 2: the file has no bytes"):
        loaded.predict_files([pictures.encode(pictures.gradient()), b""])


def test_evidence_size_is_that_of_the_map(network):
    odd, black = ready(network, input_height_px=97, input_width_px=145), np.zeros((1, 97, 145, 3), np.uint8)
    assert odd.predict(black).evidence.shape[1:] == odd.evidence_size() == (4, 5)
    for layer in cam.LAYERS:
        assert odd.predict(black, "eigencam", layer).evidence.shape[1:] == odd.evidence_size(layer)


def test_another_method_has_the_same_logits_and_no_bias(network):
    loaded, picture = ready(network), image.fit(pictures.gradient(), 64, 96)[None]
    closed, other = loaded.predict(picture), loaded.predict(picture, "gradcam++", "layer3")
    np.testing.assert_array_equal(closed.logit, other.logit)
    assert (closed.evidence.shape, other.evidence.shape) == ((1, 2, 3), (1, 4, 6))
    assert np.isnan(other.evidence_bias).all()


@pytest.mark.parametrize(("threshold", "expected"), [(0.0, "malignant"), (1.0, "benign")])
def test_the_threshold_of_the_card_decides(network, threshold, expected):
    small = resnet.temper(copy.deepcopy(network), 1000.0)  # no probability is 0 or 1
    decided = ready(small, threshold=threshold)
    assert decided.predict(np.zeros((1, 64, 96, 3), np.uint8)).predicted_class == [expected]


def test_the_canary_has_to_be_what_it_was(tmp_path, network):
    """On the machine that wrote the bundle, in float32 whatever the model computes in."""
    predictor.save(network, card(temperature=2.0), str(tmp_path))
    known = bundle.read_card(str(tmp_path))
    first, second = known.canary_logit
    expected = network(normalise(torch.from_numpy(predictor.canary()).permute(2, 0, 1)[None]))
    np.testing.assert_allclose([[first, second]], expected.detach() / 2, rtol=1e-5)
    bundle.write_card(known.model_copy(update={"canary_logit": (first, second + 1e-4)}), str(tmp_path))
    predictor.load(str(tmp_path), "cpu", "bfloat16")
    bundle.write_card(known.model_copy(update={"canary_logit": (first, second + 1)}), str(tmp_path))
    with pytest.raises(BundleError, match="for the bundle's canary image this machine computes the logits"):
        predictor.load(str(tmp_path), "cpu")


def test_what_could_not_be_loaded_is_not_written(tmp_path):
    for change, facts, said in (
        (
            {"fc.bias": torch.tensor([3e38, 0.0]), "fc.weight": torch.full((2, 512), 3e37)},
            {},
            "gives the logits",
        ),
        ({"fc.bias": torch.tensor([float("nan"), 0.0])}, {}, "fc.bias has NaN"),
        ({}, {"threshold": 1.5}, "threshold: Input should be less than or equal to 1"),
    ):
        network = untrained()
        network.load_state_dict(network.state_dict() | change)
        with pytest.raises(BundleError, match=said):
            predictor.save(network, card().model_copy(update=facts), str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_no_class_without_finite_logits(network):
    """Of the three images of a batch, one."""

    def features(batch):
        maps = resnet.features(network, batch)
        maps[1] = torch.nan
        return maps

    broken = replace(ready(network), features=features)
    prediction = broken.predict(np.zeros((3, 64, 96, 3), np.uint8))
    assert [name is None for name in prediction.predicted_class] == [False, True, False]
    assert prediction.finite.tolist() == [True, False, True]
    first, second, _ = prediction.rows()
    first.require_finite()
    with pytest.raises(image.ImageError) as raised:
        second.require_finite()
    assert raised.value.code == "not_finite"


def test_novelty_is_the_distance_of_the_pooled_features(network):
    black, white = np.zeros((64, 96, 3), np.uint8), np.full((64, 96, 3), 255, np.uint8)
    loaded = ready(network, feature_statistics=statistics(network))
    prediction = loaded.predict(np.stack([black, white]))
    pooled, logit = loaded.pooled(np.stack([black, white]))
    assert pooled.shape == (2, 512)
    np.testing.assert_allclose(logit, prediction.logit, atol=1e-6)
    expected = np.sqrt(np.mean((2 * (pooled[1] - pooled[0])) ** 2))
    assert prediction.novelty[0] == pytest.approx(0, abs=1e-4)
    assert prediction.novelty[1] == pytest.approx(expected, rel=1e-4)
    assert np.isnan(ready(network).predict(white[None]).novelty).all()


def test_a_temperature_is_in_every_number(network):
    """The evidence adds up to the log-odds of the very probability that is reported."""
    picture = np.random.default_rng(0).integers(0, 255, (3, 64, 96, 3), np.uint8)
    state = network.state_dict()
    plain, cooler = (predictor.from_state(state, card(temperature=t)).predict(picture) for t in (1.0, 50.0))
    np.testing.assert_allclose(cooler.logit, plain.logit / 50, rtol=1e-5)
    log_odds = np.log(cooler.probability_malignant / (1 - cooler.probability_malignant))
    total = cooler.evidence.mean((1, 2)) + cooler.evidence_bias
    np.testing.assert_allclose(total, log_odds, atol=1e-3)


def test_rows_are_predictions_of_one_image(network):
    images = np.stack([np.full((64, 96, 3), shade, np.uint8) for shade in (0, 90, 255)])
    whole = ready(network).predict(images)
    for i, row in enumerate(whole.rows()):
        np.testing.assert_array_equal(row.logit, whole.logit[i : i + 1])
        np.testing.assert_array_equal(row.evidence, whole.evidence[i : i + 1])
        assert row.predicted_class == whole.predicted_class[i : i + 1]
    assert len(whole.rows()) == 3


def test_a_bundle_from_weights_in_memory_is_the_one_on_disk(tmp_path, network):
    predictor.save(network, card(), str(tmp_path))
    picture = image.fit(pictures.gradient(), 64, 96)[None]
    loaded, made = (
        predictor.load(str(tmp_path), device="cpu"),
        predictor.from_state(network.state_dict(), card()),
    )
    np.testing.assert_allclose(made.predict(picture).logit, loaded.predict(picture).logit, rtol=1e-6)


LOAD = """
import sys, bcd
bcd.load(sys.argv[1]).predict_files([open(sys.argv[2], "rb").read()])
print(sorted({"ray", "cv2", "tensorboard", "torchvision", "torch._dynamo", "sklearn"} & set(sys.modules)))
"""


@pytest.mark.process
def test_loading_and_predicting_import_no_ray_and_no_compiler(tmp_path, network):
    predictor.save(network, card(), str(tmp_path / "model"))
    (tmp_path / "a.png").write_bytes(pictures.encode(pictures.gradient()))
    command = [sys.executable, "-c", LOAD, tmp_path / "model", tmp_path / "a.png"]
    assert subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("reference", [MACENKO, REINHARD], ids=lambda one: one.method)
def test_the_stain_of_every_image_is_normalised_before_the_network(tmp_path, network, reference):
    predictor.save(network, card(stain=reference), str(tmp_path))
    loaded = predictor.load(str(tmp_path), device="cpu")
    pixels = np.random.default_rng(0).integers(60, 256, (2, 64, 96, 3), dtype=np.uint8)
    changed = stain.transform(torch.from_numpy(pixels).permute(0, 3, 1, 2), reference)
    expected = network(normalise(changed)).detach()
    assert np.abs(ready(network).predict(pixels).logit - expected.numpy()).max() > 1e-3
    for found in (loaded.predict(pixels).logit, loaded.pooled(pixels)[1]):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_canary_checks_the_network_alone(network):
    """Its colours are no stain; a rounding of theirs must not reject a bundle on another machine."""
    state = dict(network.state_dict())
    plain, other = (predictor.from_state(state, card(**change)) for change in ({}, {"stain": MACENKO}))
    np.testing.assert_array_equal(plain._canary()[0], other._canary()[0])


def test_the_card_states_the_recipe_of_the_input(tmp_path, network):
    predictor.save(network, card(stain=MACENKO, symmetries=True), str(tmp_path))
    text = " ".join((tmp_path / "README.md").read_text().split())
    assert "normalised to that of 3 training images by the method of Macenko" in text
    assert "read in its eight orientations" in text
    predictor.save(network, card(), str(tmp_path))
    assert "normalised to" not in (tmp_path / "README.md").read_text()
