"""Feature statistics: Ray's sums against plain NumPy over the same images."""

import numpy as np
import pyarrow as pa
import pytest
import ray

from bcd import schema
from bcd.data import read
from bcd.errors import BcdError
from bcd.model import weights
from bcd.runtime import feature_statistics, predict
from tests import pictures
from tests.model.test_bundle import card
from tests.trained import statistics_here

pytestmark = pytest.mark.ray


def table(folder, prefix, n, seed):
    """Rows of n images of different shades."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        path = folder / f"{prefix}-{i}.png"
        shade = rng.integers(-60, 60, 3)
        pixels = np.clip(pictures.gradient(92, 140).astype(int) + shade, 0, 255).astype(np.uint8)
        path.write_bytes(pictures.encode(pixels))
        rows.append({schema.IMAGE_ID: path.name, schema.URI: str(path)})
    return schema.fill(pa.Table.from_pylist(rows), schema.INDEX)


def test_they_are_those_of_a_plain_loop(joined, tmp_path):
    network, facts = weights.build(2, seed=1, architecture="resnet18").eval(), card()
    train, validation = table(tmp_path, "t", 41, 0), table(tmp_path, "v", 12, 1)
    before = network.fc.weight.clone()
    found, logit = feature_statistics.compute_statistics(network, facts, train, validation)
    expected, expected_logit = statistics_here(network, facts, train, validation)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.spread, expected.spread, rtol=0.02)
    spread = np.array(expected.spread)
    assert (spread > spread.min()).mean() > 0.5  # most are no lower bound
    np.testing.assert_allclose(logit, expected_logit, atol=1e-4)
    assert found.cutoff == pytest.approx(expected.cutoff, rel=1e-2)
    assert (found.n_training, found.n_validation) == (41, 12)
    assert found.stain.n_patients == 41 + 12  # files, whose patients are unknown
    assert (network.fc.weight == before).all()


def test_a_missing_image_is_named(joined, tmp_path):
    """Asked of one worker: a failed run of Ray Data keeps its actors and their CPUs until it is collected."""
    rows = table(tmp_path, "t", 3, 0)
    (tmp_path / "t-1.png").unlink()
    pooler = feature_statistics._Pooler(
        ray.put((weights.build(2, architecture="resnet18").state_dict(), card())), 2
    )
    listed = feature_statistics._listed(rows, "train")
    pixels = read.pixels(listed, **predict.reading_options(card(), feature_statistics.KEEP))
    with pytest.raises(BcdError, match=r"t-1.png became unusable"):
        pooler(pixels)
