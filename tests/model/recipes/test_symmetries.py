from functools import partial

import numpy as np
import pytest
import torch

from bcd.model import resnet
from bcd.model.predictor import from_state
from bcd.model.recipes import symmetries
from tests import pictures
from tests.model.test_bundle import card, untrained

NETWORK = untrained(std=0.05).eval()
TURNS = [(is_flipped, turns) for is_flipped in (False, True) for turns in range(4)]


def turned(images, is_flipped, turns):
    """Arrays (n, height, width, ...) in another orientation."""
    return np.ascontiguousarray(np.rot90(images[:, :, ::-1] if is_flipped else images, turns, (1, 2)))


def images():
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
    return np.concatenate([pictures.gradient(64, 96)[None], noise])


def predictors():
    state = {name: tensor.clone() for name, tensor in NETWORK.state_dict().items()}
    return from_state(dict(state), card()), from_state(dict(state), card(symmetries=True))


def test_logits_are_the_means_over_the_eight_orientations():
    plain, averaged = predictors()
    each = [plain.predict(turned(images(), *how)).logit for how in TURNS]
    assert np.ptp(each, axis=0).max() > 1e-3
    np.testing.assert_allclose(averaged.predict(images()).logit, np.mean(each, 0), atol=1e-5)


def test_the_evidence_is_the_mean_of_those_turned_back():
    plain, averaged = predictors()
    expected = 0
    for is_flipped, turns in TURNS:
        found = np.rot90(plain.predict(turned(images(), is_flipped, turns)).evidence, -turns, (1, 2))
        expected = expected + (found[:, :, ::-1] if is_flipped else found) / 8
    found = averaged.predict(images())
    assert found.evidence.shape == (2, 2, 3)
    np.testing.assert_allclose(found.evidence, expected, atol=1e-5)
    log_odds = found.logit[:, 1] - found.logit[:, 0]
    np.testing.assert_allclose(found.evidence.mean((1, 2)) + found.evidence_bias, log_odds, atol=1e-5)


@pytest.mark.parametrize("how", TURNS[1:])
def test_an_image_has_the_same_answer_in_every_orientation(how):
    features = symmetries.averaged(partial(resnet.features, NETWORK))
    given = torch.from_numpy(images()).permute(0, 3, 1, 2).float()
    other = torch.from_numpy(turned(images(), *how)).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        one, two = (features(batch).mean((2, 3)) for batch in (given, other))
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-4)
