import hashlib

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bcd import schema
from bcd.metrics import aggregate
from bcd.reports import thumbnails
from bcd.taxonomy import TUMOR_CLASSES
from tests import pictures


def write(folder, names, log_odds):
    """A predictions table of images that exist, and its URI."""
    rows = []
    for name, odds in zip(names, log_odds, strict=True):
        path = folder / name
        path.write_bytes(pictures.encode(pictures.gradient(46, 70)))
        p = 1 / (1 + np.exp(-odds))
        rows.append(
            {schema.IMAGE_ID: name, schema.URI: str(path), schema.HEIGHT_PX: 46, schema.WIDTH_PX: 70}
            | {schema.SHA256: hashlib.sha256(path.read_bytes()).hexdigest()}
            | {schema.LOGIT: [0.0, odds], schema.PROBABILITY: [1 - p, p], schema.PROBABILITY_MALIGNANT: p}
            | {schema.PREDICTED_CLASS: "malignant" if p > 0.5 else "benign"}
            | {schema.EVIDENCE: [odds] * 6, schema.EVIDENCE_HEIGHT: 2, schema.EVIDENCE_WIDTH: 3}
            | {schema.MODEL_ID: "m", schema.BCD_VERSION: "0"}
        )
    uri = folder / "predictions"
    uri.mkdir()
    pq.write_table(schema.fill(pa.Table.from_pylist(rows), schema.predictions(2, 3)), uri / "a.parquet")
    return str(uri)


def test_examples_come_in_the_order_asked_for_from_several_tables(tmp_path):
    sources = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        sources.append(write(tmp_path / name, ["a.png", "b.png"], [1.5, -2.0]))
    images = pd.DataFrame(
        {
            schema.IMAGE_ID: ["b.png", "a.png", "b.png"],
            aggregate.SOURCE: [sources[1], sources[0], sources[0]],
        }
    )
    found = thumbnails.of_images(images, TUMOR_CLASSES)
    assert [one.image_id for one in found] == ["b.png", "a.png", "b.png"]
    assert [one.log_odds for one in found] == pytest.approx([-2.0, 1.5, -2.0])
    assert found[0].pixels.shape == (46, 70, 3)
    np.testing.assert_allclose(found[1].evidence, np.full((2, 3), 1.5))


def test_a_missing_image_is_grey(tmp_path):
    source = write(tmp_path, ["a.png"], [1.0])
    (tmp_path / "a.png").unlink()
    (one,) = thumbnails.of_images(
        pd.DataFrame({schema.IMAGE_ID: ["a.png"], aggregate.SOURCE: [source]}), TUMOR_CLASSES
    )
    assert (one.pixels == 128).all()
    assert (one.missing, one.evidence.any()) == (thumbnails.GONE, False)


@pytest.mark.parametrize(
    "content", [pictures.encode(pictures.gradient(46, 70)[::-1]), b"damaged", b""], ids=["other", "bad", "no"]
)
def test_an_old_map_is_never_drawn_over_new_pixels(tmp_path, content):
    source = write(tmp_path, ["a.png", "b.png"], [1.0, 1.0])
    (tmp_path / "a.png").write_bytes(content)
    names = ["a.png", "b.png"]
    new, same = thumbnails.of_images(
        pd.DataFrame({schema.IMAGE_ID: names, aggregate.SOURCE: [source] * 2}), TUMOR_CLASSES
    )
    assert (new.missing, new.pixels.shape) == (thumbnails.CHANGED, (46, 70, 3))
    assert ((new.pixels == 128).all(), new.evidence.any()) == (True, False)
    assert (same.missing, same.evidence.any(), (same.pixels == 128).all()) == (None, True, False)
