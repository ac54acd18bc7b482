import numpy as np
import torch

from bcd.imaging import image
from bcd.model import preprocessing
from tests import pictures


def test_normalise_is_imagenets():
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    expected = (1 - torch.tensor(image.IMAGENET_MEAN)) / torch.tensor(image.IMAGENET_STD)
    torch.testing.assert_close(preprocessing.normalise(white)[0, :, 0, 0], expected)


def test_fill_is_nothing_to_the_network():
    filled = torch.tensor(image.FILL, dtype=torch.uint8).view(1, 3, 1, 1)
    assert preprocessing.normalise(filled).abs().max() < 0.5 / 255 / 0.22


def test_augmentation_keeps_shape_and_type_varies_and_is_seeded():
    batch = torch.from_numpy(np.stack([pictures.gradient(96, 144)] * 8)).permute(0, 3, 1, 2)
    preset = preprocessing.augmentation(96, 144)
    torch.manual_seed(1)
    first, second = preprocessing.augment(batch, preset), preprocessing.augment(batch, preset)
    torch.manual_seed(1)
    again = preprocessing.augment(batch, preset)
    assert first.shape == batch.shape
    assert first.dtype == torch.uint8
    torch.testing.assert_close(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[preprocessing.IMAGES_PER_DRAW])


def test_quarter_turns_are_exact_and_all_four_occur():
    batch = torch.from_numpy(pictures.gradient(4, 6)).permute(2, 0, 1)[None]
    turned = [preprocessing.QuarterTurns()(batch) for _ in range(60)]
    for k in range(4):
        assert any(torch.equal(t, torch.rot90(batch, k, (-2, -1))) for t in turned)
