"""Numbers of an image: known densities, hashes that tolerate invisible changes."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bcd import schema
from bcd.imaging import appearance, image
from bcd.split import duplicates
from tests import pictures

MEAN = [mean for mean, _ in appearance.STAIN_COLUMNS]


def tissue(seed: int, height: int = 460, width: int = 700) -> np.ndarray:
    """uint8 (height, width, 3): blobs of two colours that no other seed has, nothing like glass."""
    coarse = np.random.default_rng(seed).integers(90, 240, (height // 20, width // 20, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def bits(pixels: np.ndarray) -> np.ndarray:
    phash = appearance.measure_appearance(pixels)[schema.PHASH]
    return np.unpackbits(np.frombuffer(bytes.fromhex(phash), np.uint8))


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int((bits(one) != bits(other)).sum())


def stained(hematoxylin: float, eosin: float) -> np.ndarray:
    """The colour of so much of each stain, uint8 (3,)."""
    unit = appearance.STAINS / np.linalg.norm(appearance.STAINS, axis=1, keepdims=True)
    return (255 * 10 ** -(np.array([hematoxylin, eosin]) @ unit)).round().astype(np.uint8)


@pytest.mark.parametrize(("hematoxylin", "eosin"), [(0, 0), (0.5, 0), (0, 0.4), (0.3, 0.6), (1.0, 0.2)])
def test_the_densities_of_mixed_stains_are_found(hematoxylin: float, eosin: float) -> None:
    found = appearance.stain_density(stained(hematoxylin, eosin))
    np.testing.assert_allclose(found, [hematoxylin, eosin], atol=0.02)


def test_a_description_is_that_of_the_tissue_and_not_of_the_glass() -> None:
    weak, strong = stained(0.2, 0.1), stained(0.6, 0.3)
    squares = (np.indices((256, 256)).sum(0) % 2)[..., None]
    field = np.where(squares, weak, strong).astype(np.uint8)
    field[:, 64:] = 245  # three quarters are glass
    described = appearance.measure_appearance(field)
    assert described[schema.TISSUE_FRACTION] == 0.25
    assert described[schema.HEMATOXYLIN_OD_MEAN] == pytest.approx(0.4, abs=0.01)
    assert described[schema.HEMATOXYLIN_OD_STD] == pytest.approx(0.2, abs=0.01)
    assert described[schema.EOSIN_OD_MEAN] == pytest.approx(0.2, abs=0.01)
    assert described[schema.EOSIN_OD_STD] == pytest.approx(0.1, abs=0.01)
    assert (described[schema.HEIGHT_PX], described[schema.WIDTH_PX]) == (256, 256)
    assert len(described[schema.PHASH]) * 4 == appearance.HASH_BITS == 256
    assert described.keys() <= set(schema.AUDIT.names)


def test_glass_has_no_stain() -> None:
    noise = np.random.default_rng(0).normal(230, 3, (460, 700, 3))
    described = appearance.measure_appearance(noise.clip(0, 255).astype(np.uint8))
    assert described[schema.TISSUE_FRACTION] == 0
    assert not described.keys() & set(MEAN)
    assert appearance.measure_appearance(np.full((5, 7, 3), 200, np.uint8))[schema.TISSUE_FRACTION] == 0


def test_copies_differ_in_few_bits_and_others_in_many() -> None:
    original = tissue(0)
    compressed = io.BytesIO(pictures.encode(original, "JPEG", quality=60))
    copies = {
        "compressed": np.asarray(Image.open(compressed)),
        "brightened": (original * 1.05).clip(0, 255).astype(np.uint8),
        "halved": np.asarray(Image.fromarray(original).resize((350, 230))),
        "moved": original[:, 7:],
    }
    assert max(distance(original, copy) for copy in copies.values()) <= 40
    assert min(distance(tissue(i), tissue(j)) for i in range(6) for j in range(i)) >= 90
    assert distance(original, original) == 0


def test_robust_z_is_that_of_iglewicz_and_hoaglin() -> None:
    values = np.array([2.1, 2.6, 2.4, 2.5, 2.3, 2.1, 2.3, 2.6, 8.2, 8.3])
    z = appearance.robust_z(values)
    # By hand: the median is 2.45; deviations .05 .05 .15 .15 .15 .15 .35 .35 5.75 5.85 have the median 0.15.
    assert z[8] == pytest.approx(0.6745 * 5.75 / 0.15)
    assert (np.abs(z) > 3.5).tolist() == [False] * 8 + [True] * 2
    flat = appearance.robust_z(np.array([0.2, 0.2, 0.2, 0.201]))
    assert flat[3] == pytest.approx(0.6745 * 0.001 / appearance.LEAST_DEVIATION)


@pytest.mark.real
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.trial)])
def test_real_copies_are_below_the_cut_off_and_others_above(real_data: Path, every: int) -> None:
    """Of one field in eight; of each as a trial."""
    paths = sorted((real_data / "breakhis").rglob("*.png")) + sorted((real_data / "glas/images").iterdir())
    fields = [Image.fromarray(image.decode(path.read_bytes())) for path in paths[::every]]
    hashes = np.stack([bits(np.asarray(field)) for field in fields]).astype(int)
    others = np.abs(hashes[:, None] - hashes).sum(-1)[np.triu_indices(len(fields), 1)]
    assert others.min() >= 98

    def moved(field: Image.Image, share: float) -> int:
        pixels = np.asarray(field)
        by = int(pixels.shape[1] * share)
        return distance(pixels[:, by:], pixels[:, :-by])

    for field, phash in zip(fields, hashes, strict=True):
        compressed = Image.open(io.BytesIO(pictures.encode(field, "JPEG", quality=50)))
        brighter = field.point(lambda value: min(255, int(value * 1.1)))
        halved = field.resize((field.width // 2, field.height // 2))
        copies = [bits(np.asarray(copy)) for copy in (compressed, brighter, halved)]
        assert max(np.abs(phash - copy).sum() for copy in copies) <= 20
        assert moved(field, 0.01) <= 34
        assert moved(field, 0.02) <= 54
        assert appearance.measure_appearance(np.asarray(field))[schema.TISSUE_FRACTION] > 5 * duplicates.BLANK


def test_the_stain_alone_is_that_of_the_whole_measurement():
    rng = np.random.default_rng(0)
    field = rng.integers(60, 200, (96, 160, 3), np.uint8)
    described = appearance.measure_appearance(field)
    assert appearance.measure_stain(field) == [described[name] for name in schema.STAIN]
    # Of twice the size, every second row and column.
    larger = field.repeat(2, axis=0).repeat(2, axis=1)
    assert appearance.measure_stain(larger) == appearance.measure_stain(field)
    assert np.isnan(appearance.measure_stain(np.full((64, 64, 3), 240, np.uint8))).all()
