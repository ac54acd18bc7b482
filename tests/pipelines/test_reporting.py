import numpy as np
import pyarrow as pa
import pytest

from bcd import aggregate, schema
from bcd.errors import DataError, StorageError
from bcd.pipelines import read, reporting
from tests.pipelines.test_examples import write
from tests.test_bundle import card


def test_the_probability_before_the_temperature_comes_back(tmp_path):
    """Logits of a bundle are divided by its temperature; the table keeps what was before."""
    uri = write(tmp_path, ["a.png", "b.png"], [1.0, -0.5])
    truth = [
        {schema.IMAGE_ID: name, schema.URI: "", schema.TUMOR_CLASS: kind}
        for name, kind in (("a.png", "malignant"), ("b.png", "benign"))
    ]
    test = schema.fill(pa.Table.from_pylist(truth), schema.INDEX)
    facts = card(temperature=3.0, threshold=0.6)
    frame = reporting.with_truth(uri, test, facts)
    np.testing.assert_allclose(frame[aggregate.UNCALIBRATED], 1 / (1 + np.exp(-3 * np.array([1.0, -0.5]))))
    images = reporting.image_table(frame, facts, uri, draw=2)
    assert images[aggregate.CORRECT].all()
    assert images[aggregate.SOURCE].tolist() == [uri, uri]
    assert images[aggregate.DRAW].tolist() == [2, 2]
    np.testing.assert_allclose(images[aggregate.MARGIN], [1 - np.log(1.5), -0.5 - np.log(1.5)], rtol=1e-5)


def test_an_image_that_storage_did_not_give_is_not_left_out_of_the_numbers():
    names = ["a.png", "b.png", "c.png"]
    read.require_given(names, [None, "unreadable", "truncated: unavailable"])
    with pytest.raises(StorageError, match=r"storage did not give b.png \(and 1 more"):
        read.require_given(names, [None, "unavailable", "unavailable: /c.png: no"])


def test_nothing_to_compare_with_is_said(tmp_path):
    with pytest.raises(DataError, match=r"--against .*no test_images.parquet there"):
        reporting.compared(None, str(tmp_path))
