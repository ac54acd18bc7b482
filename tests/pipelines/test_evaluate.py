import pytest

from bcd import bundle, storage
from bcd.config import EvaluateConfig
from bcd.errors import BundleError, DataError
from bcd.pipelines import evaluate, train
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


def test_other_data_are_refused_because_the_unseen_part_is_not_known(run_uri, tree, tmp_path):
    for file in storage.list_files(tree)[:-1]:
        storage.write_bytes(f"{tmp_path}/data/{file.path}", storage.read_bytes(file.uri))
    with pytest.raises(DataError, match=r"is not the data that .* was trained on"):
        evaluate.run(EvaluateConfig(model=f"{run_uri}/model", data=f"{tmp_path}/data"))


def test_no_bundle_no_evaluation(tree, tmp_path):
    with pytest.raises(BundleError, match="no model bundle there"):
        evaluate.run(EvaluateConfig(model=str(tmp_path), data=tree))


def test_the_card_tells_the_numbers_with_their_intervals(run_uri):
    card = bundle.read_card(f"{run_uri}/model")
    assert card.metrics["n_images"] > 0
    text = storage.read_bytes(f"{run_uri}/model/README.md").decode()
    assert "| balanced accuracy |" in text
