from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import bcd
from bcd import schema
from bcd.errors import ConfigError
from bcd.runtime.tracking import pyfunc
from tests import pictures
from tests.runtime.tracking import made


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    uri = made.bundle_in(tmp_path_factory.mktemp("bundle"))
    return bcd.load(uri), pyfunc._load_pyfunc(uri)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    pixels = [pictures.gradient(), pictures.gradient()[::-1]]
    for name, one in zip("ab", pixels, strict=True):
        (folder / f"{name}.png").write_bytes(pictures.encode(one))
    (folder / "c.png").write_bytes(b"no image")
    return [str(folder / f"{name}.png") for name in "abc"]


def test_rows_are_those_of_the_predictions_table(model, files):
    loaded, wrapped = model
    found = wrapped.predict(files)
    assert list(found) == schema.predictions(*loaded.evidence_size()).names
    expected = loaded.predict_files([Path(file).read_bytes() for file in files[:2]])
    np.testing.assert_array_equal(
        found[schema.PROBABILITY_MALIGNANT][:2].to_numpy(np.float32), expected.probability_malignant
    )
    np.testing.assert_array_equal(np.stack(found[schema.EVIDENCE][:2]), expected.evidence.reshape(2, -1))
    assert found[schema.PREDICTED_CLASS].tolist()[:2] == expected.predicted_class
    assert found[schema.URI].tolist() == files
    broken = found.iloc[2]
    assert broken[schema.ERROR] == "unsupported_format"
    assert pd.isna(broken[schema.PROBABILITY_MALIGNANT])
    assert set(found[schema.MODEL_ID]) == {loaded.model_id}


def test_paths_bytes_and_tables_give_the_same_numbers(model, files, monkeypatch):
    monkeypatch.setattr(pyfunc, "BATCH", 1)
    _, wrapped = model
    contents = [Path(file).read_bytes() for file in files]
    given = [
        files,
        contents,
        [files[0], *contents[1:]],
        pd.DataFrame({"anything": files}),
        pd.DataFrame({"n": [1, 2, 3], schema.IMAGE: contents}),
    ]
    tables = [wrapped.predict(one)[[schema.LOGIT, schema.SHA256, schema.ERROR]] for one in given]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])
    assert wrapped.predict(contents)[schema.IMAGE_ID].tolist() == ["0", "1", "2"]
    assert len(wrapped.predict([])) == 0


def test_another_input_is_refused(model):
    _, wrapped = model
    with pytest.raises(ConfigError, match=r"columns .*'a', 'b'.*expected 'image'"):
        wrapped.predict(pd.DataFrame({"a": [1], "b": [2]}))
    with pytest.raises(ConfigError, match="an image is of type int"):
        wrapped.predict([1])
