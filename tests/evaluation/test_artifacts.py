import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from bcd import schema
from bcd.errors import DataError, StorageError
from bcd.evaluation import artifacts
from bcd.metrics import aggregate
from bcd.reports import model_report
from bcd.runtime import inspection
from bcd.taxonomy import TUMOR_CLASSES
from tests import studies
from tests.model.test_bundle import card
from tests.reports.test_thumbnails import write


def test_the_probability_before_the_temperature_comes_back(tmp_path):
    """Logits of a bundle are divided by its temperature; the table keeps what was before."""
    uri = write(tmp_path, ["a.png", "b.png"], [1.0, -0.5])
    truth = [
        {schema.IMAGE_ID: name, schema.URI: "", schema.TUMOR_CLASS: kind}
        for name, kind in (("a.png", "malignant"), ("b.png", "benign"))
    ]
    test = schema.fill(pa.Table.from_pylist(truth), schema.INDEX)
    facts = card(temperature=3.0, threshold=0.6)
    frame = artifacts.with_truth(uri, test, facts)
    np.testing.assert_allclose(frame[aggregate.UNCALIBRATED], 1 / (1 + np.exp(-3 * np.array([1.0, -0.5]))))
    images = artifacts.images_of(frame, facts, uri, draw=2)
    assert images[aggregate.CORRECT].all()
    assert images[aggregate.SOURCE].tolist() == [uri, uri]
    assert images[aggregate.DRAW].tolist() == [2, 2]
    np.testing.assert_allclose(images[aggregate.MARGIN], [1 - np.log(1.5), -0.5 - np.log(1.5)], rtol=1e-5)


def test_warnings_are_counted_if_the_model_has_statistics():
    images = aggregate.image_table(studies.predictions(n_patients=4, n_images=2))
    none = pd.DataFrame({schema.IMAGE_ID: []})
    assert artifacts.measure_run(images, none, TUMOR_CLASSES)["warnings"] is None
    far = np.array([1.3, 1.2, 1.1, 1.0] * 2, np.float32)
    seen = images.assign(**{schema.NOVELTY: far, schema.NOVELTY_CUTOFF: np.float32(1.1)})
    measured = artifacts.measure_run(seen, none, TUMOR_CLASSES)
    assert measured["warnings"] == {"unlike_training_data": 4}
    assert ", 4 unlike the training data" in model_report.summary_lines(measured)[0]


def test_an_image_that_storage_did_not_give_is_not_left_out_of_the_numbers():
    names = ["a.png", "b.png", "c.png"]
    inspection.require_given(names, [None, "unreadable", "truncated: unavailable"])
    with pytest.raises(StorageError, match=r"storage failed to deliver b.png \(and 1 more"):
        inspection.require_given(names, [None, "unavailable", "unavailable: /c.png: no"])


def test_nothing_to_compare_with_is_said(tmp_path):
    with pytest.raises(DataError, match=r"--against .*no test_images.parquet there"):
        artifacts.compared(None, str(tmp_path))
