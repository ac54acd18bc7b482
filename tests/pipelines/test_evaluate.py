import pyarrow as pa
import pytest

from bcd import bundle, schema, storage
from bcd.config import EvaluateConfig
from bcd.errors import BundleError, DataError
from bcd.pipelines import evaluate, rundir, train
from tests import planted
from tests.cluster import read_json
from tests.pipelines.test_read import small

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def run_uri(cluster, tree, tmp_path_factory):
    return train.run(small(tree, output=str(tmp_path_factory.mktemp("runs")), epochs=1))


def test_evaluating_a_bundle_again_gives_the_same_numbers(run_uri, tree, tmp_path):
    evaluate.run(EvaluateConfig(model=f"{run_uri}/model", data=tree, output=str(tmp_path)))
    assert read_json(f"{tmp_path}/metrics.json")["pooled"] == read_json(f"{run_uri}/metrics.json")["pooled"]
    for name in ("report.html", "figures/confusion_matrix.png", "figures/history.svg"):
        assert storage.exists(f"{tmp_path}/{name}")


def test_the_data_may_have_moved(run_uri, tree_on_s3, tmp_path):
    evaluate.run(EvaluateConfig(model=f"{run_uri}/model", data=tree_on_s3, output=str(tmp_path)))
    assert read_json(f"{tmp_path}/metrics.json")["pooled"] == read_json(f"{run_uri}/metrics.json")["pooled"]


@pytest.fixture
def fewer(tree, tmp_path):
    """The data without one picture: most of it was trained on."""
    for file in storage.list_files(tree)[:-1]:
        storage.write_bytes(f"{tmp_path}/data/{file.path}", storage.read_bytes(file.uri))
    return f"{tmp_path}/data"


def test_what_was_trained_on_is_refused_or_marked_when_forced(run_uri, fewer, tmp_path):
    model, output = f"{run_uri}/model", f"{tmp_path}/out"
    before = storage.read_bytes(f"{model}/card.json")
    with pytest.raises(DataError, match=r"were seen in training.*--force measures and marks"):
        evaluate.run(EvaluateConfig(model=model, data=fewer, output=output))
    evaluate.run(EvaluateConfig(model=model, data=fewer, output=output, force=True))
    measured = read_json(f"{output}/metrics.json")
    assert (measured["tested_on"], measured["n_images"]) == ("forced", 8 * 3 * 2 - 1)
    assert "forced: may have been trained on" in storage.read_bytes(f"{output}/report.html").decode()
    assert storage.read_bytes(f"{model}/card.json") == before


def test_without_its_split_nobody_knows_what_a_model_has_seen(run_uri, fewer, tmp_path):
    for file in storage.list_files(f"{run_uri}/model"):
        storage.write_bytes(f"{tmp_path}/alone/model/{file.path}", storage.read_bytes(file.uri))
    with pytest.raises(DataError, match=r"no split.parquet beside the model tells what it has seen"):
        evaluate.run(EvaluateConfig(model=f"{tmp_path}/alone/model", data=fewer, output=f"{tmp_path}/out"))


def test_a_data_set_that_was_never_seen_is_scored_whole_and_compared(run_uri, cluster, tmp_path):
    """Twice the same model on the same patients: no difference, and no claim."""
    data, outputs = planted.tree(tmp_path / "data", signal=False, n_images=1), []
    for name in ("one", "two"):
        against = outputs[0] if outputs else None
        config = EvaluateConfig(
            model=f"{run_uri}/model", data=data, output=f"{tmp_path}/{name}", against=against
        )
        outputs.append(evaluate.run(config))
    measured = read_json(f"{outputs[1]}/metrics.json")
    assert (measured["tested_on"], measured["n_images"]) == ("external", planted.N_PATIENTS)
    row = measured["comparison"]["metrics"]["accuracy"]
    assert (row["difference"], row["interval"], row["p_value"]) == (0, None, None)
    page = storage.read_bytes(f"{outputs[1]}/report.html").decode()
    assert "None of these pictures was trained on" in page
    assert "Against another" in page
    with pytest.raises(DataError, match="name an --output for its evaluation"):
        evaluate.run(EvaluateConfig(model=f"{run_uri}/model", data=data))


def test_another_slide_of_a_case_that_was_trained_on_is_seen(tmp_path):
    """Whether two slides of a case are of one person is not published."""
    row = {schema.IMAGE_ID: "a.png", schema.URI: "a.png", schema.PART: "train", schema.SHA256: "0"}
    row |= {schema.PATIENT: "14-22549AB", schema.SLIDE: "14-22549AB"}
    known = schema.fill(pa.Table.from_pylist([row | {schema.CASE: "14-22549"}]), schema.SPLIT)
    rundir.write_split(str(tmp_path), known)
    other = {schema.PATIENT: "14-22549CD", schema.SLIDE: "14-22549CD", schema.SHA256: "1"}
    for case, n_seen in (("14-22549", 1), ("14-1", 0), (None, 0)):
        table = pa.Table.from_pylist([other | {schema.CASE: case}])
        assert evaluate._n_seen(f"{tmp_path}/model", table) == n_seen


def test_no_bundle_no_evaluation(tree, tmp_path):
    with pytest.raises(BundleError, match="no model bundle there"):
        evaluate.run(EvaluateConfig(model=str(tmp_path), data=tree))


def test_the_card_tells_the_numbers_with_their_intervals(run_uri):
    card = bundle.read_card(f"{run_uri}/model")
    assert card.metrics["n_images"] > 0
    text = storage.read_bytes(f"{run_uri}/model/README.md").decode()
    assert "| balanced accuracy |" in text
