import numpy as np
import pytest
import torch

from bcd.errors import DataError
from bcd.imaging import appearance
from bcd.imaging.image import FILL
from bcd.model.recipes import stain
from bcd.model.recipes.reference import Macenko, Reinhard

# Haematoxylin and eosin of two laboratories.
STAINS = {
    "one": np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]]),
    "two": np.array([[0.55, 0.75, 0.37], [0.20, 0.92, 0.33]]),
}


def amounts(seed=0, n=4, side=64):
    """Amounts (n, 2, side, side) of two stains: nuclei, stroma, and glass in the lower eighth."""
    generator = np.random.default_rng(seed)
    found = 0.1 + generator.gamma(4, 0.2, (n, 2, side, side))
    is_nucleus = generator.random((n, 1, side, side)) < 0.4
    # Each pixel has one stain, and a trace of the other.
    found *= np.where(is_nucleus, [[[1.0]], [[0.02]]], [[[0.02]], [[1.0]]])
    found[..., -side // 8 :, :] = 0
    return found


def stained(which, given, scale=(1.0, 1.0)):
    """Images uint8 (n, 3, side, side) with these amounts of a laboratory's stains."""
    unit = STAINS[which] / np.linalg.norm(STAINS[which], axis=1, keepdims=True)
    density = np.einsum("nshw,sc->nchw", given * np.array(scale)[:, None, None], unit)
    return torch.from_numpy(np.clip(np.round(256 * np.exp(-density) - 1), 0, 255).astype(np.uint8))


def test_the_stains_are_those_of_the_audit():
    np.testing.assert_allclose(stain.HED[:2].numpy(), appearance.STAINS, rtol=1e-6)


def test_jitter_leaves_white_untouched():
    white = torch.full((8, 3, 5, 7), 255.0)
    assert torch.equal(stain.jitter(white, stain.draw_amounts(8, 0.5)), white)


def test_jitter_multiplies_the_amount_of_each_stain():
    """The balance of a stain's optical density over red, green and blue stays; its amount is multiplied."""
    unit = stain.HED / stain.HED.norm(dim=1, keepdim=True)
    for which, factor in ((0, 1.3), (1, 0.6), (2, 1.1)):
        density = 0.8 * unit[which].view(1, 3, 1, 1).expand(1, 3, 4, 4)
        factors = torch.full((1, 3), 0.9)
        factors[0, which] = factor
        changed = stain.jitter(256 * density.neg().exp() - 1, factors)
        torch.testing.assert_close(stain._density(changed), factor * density.flatten(2))


def test_factors_of_one_change_nothing_and_each_image_has_its_own():
    images = stained("one", amounts()).float()
    torch.testing.assert_close(stain.jitter(images, torch.ones(4, 3)), images, atol=1e-3, rtol=0)
    torch.manual_seed(0)
    factors = stain.draw_amounts(1000, 0.2)
    assert factors.min() >= 0.8
    assert factors.max() <= 1.2
    assert len(factors.unique(dim=0)) == 1000
    changed = stain.jitter(images[:1].expand(4, -1, -1, -1), factors[:4])
    assert len(changed.unique(dim=0)) == 4


def test_images_of_two_planted_stains_coincide_after_macenko():
    given = amounts(side=160)
    one, two = stained("one", given), stained("two", given, (1.4, 0.7))
    reference = stain.fit_reference(one, "macenko")
    first, second = (stain.transform(images, reference) for images in (one, two))
    assert (one.float() - two.float()).abs().mean() > 20
    assert (first - second).abs().mean() < 0.6
    # The amounts of one image differ from the median over all.
    assert (first - one).abs().mean() < 2


def test_images_of_two_planted_stains_coincide_after_reinhard():
    """The second differs by a shift and a stretch of each axis of l-alpha-beta."""
    one = stained("one", 0.5 + amounts()[..., :48, :])
    color = stain._lab(one)
    moved = color * torch.tensor([1.1, 1.2, 0.8])[:, None] + torch.tensor([-0.2, 0.05, 0.02])[:, None]
    light = torch.linalg.inv(stain.CONES) @ (torch.linalg.inv(stain.LAB) @ moved).exp()
    two = (256 * light - 1).round().clamp(0, 255).to(torch.uint8).view(one.shape)
    reference = stain.fit_reference(one, "reinhard")
    first, second = (stain.transform(images, reference) for images in (one, two))
    assert (one.float() - two.float()).abs().mean() > 10
    assert (first - second).abs().mean() < 1
    assert (first - one).abs().mean() < 2


def test_macenko_finds_the_planted_stains_and_their_amounts():
    given = amounts(n=8, side=128)
    reference = stain.fit_reference(stained("two", given), "macenko")
    unit = STAINS["two"] / np.linalg.norm(STAINS["two"], axis=1, keepdims=True)
    for found, planted in zip((reference.hematoxylin, reference.eosin), unit, strict=True):
        assert np.dot(found, planted) > 0.999
    is_stained = given.sum(1) > 0
    most = [np.quantile(given[:, i][is_stained], 0.99) for i in range(2)]
    assert reference.density == pytest.approx(most, rel=0.1)
    assert reference.n_images == 8


def test_reinhard_gives_every_image_the_mean_and_spread_of_the_reference():
    reference = Reinhard(n_images=1, mean=(-1.2, 0.1, 0.02), spread=(0.3, 0.06, 0.03))
    images = stained("two", amounts(side=128))
    changed = stain.transform(images, reference)
    which = stain._stained(images, stain._density(images)).weight > 0
    colors = [color[:, one] for color, one in zip(stain._lab(changed), which, strict=True)]
    mean, spread = (torch.stack([getattr(one, name)(1) for one in colors]) for name in ("mean", "std"))
    torch.testing.assert_close(mean, torch.tensor(reference.mean).expand(4, 3), atol=0.02, rtol=0)
    torch.testing.assert_close(spread, torch.tensor(reference.spread).expand(4, 3), atol=0.02, rtol=0)


REFERENCES = [
    stain.fit_reference(stained("one", amounts(seed=9)), method) for method in ("macenko", "reinhard")
]


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda one: one.method)
def test_an_image_does_not_depend_on_its_neighbours(reference):
    images = torch.cat([stained("two", amounts(n=3)), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)])
    together = stain.transform(images, reference)
    for i in range(3):
        torch.testing.assert_close(
            together[i : i + 1], stain.transform(images[i : i + 1], reference), atol=1e-2, rtol=0
        )


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda one: one.method)
@pytest.mark.parametrize("value", [0, 7, 200, 255])
def test_an_image_without_tissue_keeps_finite_colours(reference, value):
    plain = torch.full((2, 3, 32, 32), value, dtype=torch.uint8)
    changed = stain.transform(plain, reference)
    assert changed.isfinite().all()
    if value >= 255 or reference.method == "macenko":
        assert torch.equal(changed, plain.float())


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda one: one.method)
def test_the_frame_around_an_image_is_no_tissue_and_keeps_its_colour(reference):
    images = stained("two", amounts(n=1))
    frame = torch.tensor(FILL, dtype=torch.uint8).view(1, 3, 1, 1)
    framed = torch.cat([frame.expand(1, 3, 24, 64), images, frame.expand(1, 3, 24, 64)], 2)
    changed = stain.transform(framed, reference)
    torch.testing.assert_close(changed[..., 24:-24, :], stain.transform(images, reference), atol=1e-2, rtol=0)
    assert (changed[..., :24, :] == frame).all()


@pytest.mark.parametrize("reference", REFERENCES, ids=lambda one: one.method)
def test_white_stays_white(reference):
    changed = stain.transform(stained("two", amounts(n=1)), reference)
    assert changed[..., -8:, :].min() > 254.9


def test_without_a_reference_nothing_happens():
    images = stained("one", amounts(n=1))
    assert stain.transform(images, None) is images


def test_training_images_without_tissue_are_an_error():
    with pytest.raises(
        DataError, match="--stain-normalisation macenko: none of 3 training images has stained"
    ):
        stain.fit_reference(torch.full((3, 3, 16, 16), 255, dtype=torch.uint8), "macenko")


def test_the_reference_is_the_median_over_images():
    images = torch.cat([stained("one", amounts(seed=i, n=1), (1 + i, 1)) for i in range(3)])
    middle = stain.fit_reference(images[1:2], "macenko")
    assert stain.fit_reference(images, "macenko").density[0] == pytest.approx(middle.density[0], rel=1e-6)
    assert isinstance(middle, Macenko)
