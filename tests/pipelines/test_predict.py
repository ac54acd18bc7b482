import numpy as np
import pytest

from bcd import bundle, index, model, schema, storage
from bcd.pipelines import score
from tests import pictures
from tests.test_bundle import card

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def model_uri(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("bundle"))
    bundle.save(model.build(2, seed=1), card(), uri)
    return uri


def test_every_row_gives_one_row_a_result_or_an_error(joined, model_uri, tmp_path):
    good = {f"benign/p/{i}.png": pictures.encode(pictures.gradient(50 + i, 70)) for i in range(5)}
    bad = {f"benign/p/{name}.png": content for name, (content, _) in pictures.broken().items()}
    for name, content in (good | bad).items():
        storage.write_bytes(storage.join(str(tmp_path / "in"), name), content)
    table, _ = index.read(str(tmp_path / "in"))
    uri = str(tmp_path / "out")
    score.write(score.predictions(table, model_uri, card(), 4, "float32"), uri)
    result = score.read_back(uri, schema.predictions(2, 3).names)
    assert result.schema.equals(schema.predictions(2, 3))
    assert result[schema.IMAGE_ID].to_pylist() == sorted(good | bad)
    rows = {row[schema.IMAGE_ID]: row for row in result.to_pylist()}
    expected = bundle.load(model_uri, device="cpu").predict_files(list(good.values()))
    np.testing.assert_allclose([rows[name][schema.LOGIT] for name in good], expected.logit, atol=1e-4)
    for name, (_, code) in pictures.broken().items():
        row = rows[f"benign/p/{name}.png"]
        assert (row[schema.ERROR], row[schema.LOGIT], row[schema.EVIDENCE]) == (code, None, None)
        assert row[schema.ERROR_MESSAGE]


def test_a_batch_without_one_good_picture_is_all_errors(model_uri):
    batch = {
        schema.IMAGE: np.zeros((2, 64, 96, 3), np.uint8),
        schema.HEIGHT_PX: np.zeros(2, np.int32),
        schema.WIDTH_PX: np.zeros(2, np.int32),
        schema.ERROR: np.array(["empty", "truncated"]),
        schema.ERROR_MESSAGE: np.array(["a", "b"]),
        **{name: np.array(["x", "y"], object) for name in score.CARRIED},
        schema.MPP: np.array([np.nan, 0.5], np.float32),
    }
    result = score.Scorer(model_uri, "float32")(batch)
    assert result.schema.equals(schema.predictions(2, 3))
    assert result[schema.ERROR].to_pylist() == ["empty", "truncated"]
    assert result[schema.LOGIT].null_count == result[schema.HEIGHT_PX].null_count == 2
    assert result[schema.MPP].to_pylist() == [None, 0.5]


def test_writing_replaces_what_stood_there(joined, model_uri, tmp_path):
    storage.write_bytes(str(tmp_path / "in/benign/p/a.png"), pictures.encode(pictures.gradient()))
    table, _ = index.read(str(tmp_path / "in"))
    for _ in range(2):
        score.write(score.predictions(table, model_uri, card(), 4, "float32"), str(tmp_path / "out"))
    assert len(score.read_back(str(tmp_path / "out"), [schema.IMAGE_ID])) == 1
