import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.nn import functional

from bcd import schema
from bcd.model.recipes.loss import Loss, Mixed
from bcd.split import balance

LOGIT = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 1, 1, 1, 0, 1])


def test_a_plain_loss_is_cross_entropy_to_the_bit():
    assert torch.equal(Loss()(LOGIT, TARGET), functional.cross_entropy(LOGIT, TARGET))


def test_smoothed_labels_have_a_share_in_every_class():
    soft = 0.9 * functional.one_hot(TARGET, 2) + 0.1 / 2
    expected = -(soft * LOGIT.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(Loss(smoothing=0.1)(LOGIT, TARGET), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_a_mixture_equals_the_formula(smoothing):
    """That of the mixed one-hot targets (Zhang et al., equation 1)."""
    share, other = 0.3, TARGET.flip(0)
    soft = share * functional.one_hot(TARGET, 2) + (1 - share) * functional.one_hot(other, 2)
    soft = (1 - smoothing) * soft + smoothing / 2
    expected = -(soft * LOGIT.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(Loss(smoothing=smoothing)(LOGIT, Mixed(TARGET, other, share)), expected)


def test_images_are_mixed_in_pairs_as_their_targets():
    torch.manual_seed(0)
    images = torch.randn(6, 3, 4, 4)
    mixed, target = Loss(mixup=1.0).mix(images, torch.arange(6))
    assert torch.equal(target.first, torch.arange(6))
    assert sorted(target.second.tolist()) == list(range(6))
    assert 0 < target.share < 1
    torch.testing.assert_close(mixed, target.share * images + (1 - target.share) * images[target.second])


def test_shares_are_from_the_beta_distribution():
    torch.manual_seed(0)
    images, target = torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)
    shares = np.array([Loss(mixup=0.2).mix(images, target)[1].share for _ in range(1000)])
    # Of Beta(a, a) the mean is 1/2, the variance 1 / (4 (2 a + 1)).
    assert shares.mean() == pytest.approx(0.5, abs=0.05)
    assert shares.var() == pytest.approx(1 / (4 * 1.4), abs=0.02)


def test_without_mixup_nothing_is_drawn():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    images, target = Loss(smoothing=0.1).mix(LOGIT, TARGET)
    assert images is LOGIT
    assert target is TARGET
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_classes_equal_the_expectation_of_upsampling(smoothing):
    """Over all rows, by rows that divide evenly: each benign one is repeated twice more."""
    names = ["benign"] * 2 + ["malignant"] * 6
    rows = pa.table({schema.TUMOR_CLASS: names, "at": list(range(8))})
    upsampled = balance.upsample(rows, "tumor_class", 0)["at"].to_pylist()
    assert len(upsampled) == 12
    logit = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([name == "malignant" for name in names]).long()
    weights = torch.tensor(balance.class_weights(rows, "tumor_class"))
    found = Loss(smoothing=smoothing, weights=weights)(logit, target)
    torch.testing.assert_close(found, Loss(smoothing=smoothing)(logit[upsampled], target[upsampled]))
