import copy
import hashlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save

from bcd import provenance
from bcd.config.training import TrainConfig
from bcd.errors import BundleError
from bcd.imaging import image
from bcd.model import bundle, cam, novelty, predictor, resnet, weights
from bcd.model.card import Card, dump, model_id
from bcd.model.resnet import normalise
from tests import pictures


def untrained(std=1e-3, seed=1, architecture="resnet18"):
    """A network whose last layer is small and always the same.

    The features of an untrained network are large: without this all probabilities are 0 or 1.
    """
    network = weights.build(2, seed=seed, architecture=architecture)
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(network.fc.weight, std=std, generator=generator)
    return network


def card(**changes):
    config = TrainConfig(data="d", weights="none", input_height_px=64, input_width_px=96)
    facts = {
        "architecture": "resnet18",
        "target": "tumor_class",
        "classes": ("benign", "malignant"),
        "input_height_px": 64,
        "input_width_px": 96,
        "field_height_px": 460,
        "field_width_px": 700,
        "mpp": (0.49,),
        "magnifications": (40,),
        "protocol": "case",
        "seed": 0,
        "data_fingerprint": "d" * 64,
        "split_fingerprint": "5" * 64,
        "leaky": False,
        "synthetic": False,
        "training": config.model_dump(mode="json"),
        "validation": {"epoch": 3},
        "versions": provenance.versions(),
        "git_commit": None,
    }
    return Card(**facts | changes)


def written(known):
    """What a card gets when the bundle is written."""
    return {"weights_sha256": known.weights_sha256, "canary_logit": known.canary_logit}


@pytest.fixture(scope="module")
def network():
    return weights.build(2, seed=1, architecture="resnet18").eval()


def ready(network, **changes):
    """A bundle without files."""
    features = partial(resnet.features, network)
    return predictor.Predictor(card(**changes), "id", network, features, torch.device("cpu"), "float32")


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


def test_the_readme_says_what_must_be_said(tmp_path, network):
    predictor.save(network, card(leaky=True, synthetic=True, protocol="image"), str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    for words in ("Research use only", "Synthetic", "Leaky split", "benign, malignant", "40X", "0.49 µm/px"):
        assert words in text


@pytest.mark.parametrize("few", [None, "2 benign and 9 malignant patients are too few"])
def test_the_readme_says_where_patients_are_too_few(few):
    metrics = {"summary": [["AUC", "1.000", "–"]], "n_images": 1, "n_patients": 1, "too_few_patients": few}
    text = bundle._readme(card(metrics=metrics))
    assert ("**Too few patients.** 2 benign and 9" in text) == bool(few)
    assert "On 1 image of 1 patient that it was not trained on" in text


def test_no_card_no_bundle(tmp_path, network):
    with pytest.raises(BundleError, match=r"no model bundle there; expected card.json"):
        predictor.load(str(tmp_path))
    predictor.save(network, card(), str(tmp_path))
    (tmp_path / "card.json").unlink()
    assert not bundle.is_complete(str(tmp_path))


def sealed(folder, content):
    """A bundle that is as it was written, whatever it holds."""
    known = {"weights_sha256": hashlib.sha256(content).hexdigest(), "canary_logit": (0.0, 0.0)}
    (folder / "model.safetensors").write_bytes(content)
    (folder / "card.json").write_bytes(dump(card(**known)))
    return str(folder)


def test_weights_that_are_not_the_cards_are_rejected(tmp_path):
    content = save({"a": torch.zeros(9)})
    uri = sealed(tmp_path, content)
    for damaged in (content[:-1] + b"x", content[:-1], content + b"x", b""):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        for use in (predictor.load, bundle.identify):
            with pytest.raises(BundleError, match=r"is not the file that card.json was written for"):
                use(uri)


def test_weights_that_are_no_network_are_rejected(tmp_path):
    uri = sealed(tmp_path, save({"a": torch.zeros(9)}))
    with pytest.raises(BundleError, match=r": not the weights of a ResNet18: conv1.weight is missing"):
        predictor.load(uri)
    with pytest.raises(BundleError, match=r"model.safetensors: not a state dict, but an empty file"):
        predictor.load(sealed(tmp_path, b""))


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


def test_a_bundle_that_changed_is_reported(tmp_path, network):
    uri = str(tmp_path)
    began = predictor.save(network, card(), uri)
    assert bundle.read_same(uri, began) == bundle.read_card(uri)
    bundle.write_card(
        bundle.read_card(uri).model_copy(
            update={"metrics": {"summary": [], "n_images": 1, "n_patients": None}}
        ),
        uri,
    )
    assert bundle.identify(uri) == began
    now = predictor.save(network, card(threshold=0.4), uri)
    with pytest.raises(
        BundleError, match=f"has changed since the start: the model was {began}, now it is {now}"
    ):
        bundle.read_same(uri, began)


def statistics(network, cutoff=1.0):
    """Such that the pooled features of a black image are the mean."""
    black = ready(network).pooled(np.zeros((1, 64, 96, 3), np.uint8))[0][0]
    facts = {"mean": tuple(black.tolist()), "spread": (0.5,) * len(black), "cutoff": cutoff}
    return novelty.FeatureStatistics(**facts, n_training=1, n_validation=1)


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


def test_statistics_in_the_card_decide_its_identity(tmp_path, network):
    known = card(feature_statistics=statistics(network))
    predictor.save(network, known, str(tmp_path))
    read = bundle.read_card(str(tmp_path))
    assert read == known.model_copy(update=written(read))
    assert model_id(known) != model_id(card())


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
