import shutil
from pathlib import Path

import pytest

from bcd.config.evaluation import EvaluateConfig
from bcd.errors import BundleError, DataError
from bcd.preflight.dry_run import evaluate, train
from bcd.runtime import prepare, run_directory
from tests.preflight.dry_run.test_train import config as training


@pytest.fixture
def run_uri(bundle_uri, tree, tmp_path):
    """A bundle beside the split of a training on the tree."""
    uri = str(tmp_path / "runs/train")
    given = training(tree, output=str(tmp_path / "runs"))
    run_directory.claim_run(given, uri)
    run_directory.write_split(uri, prepare.prepare(given, train.data_set(given))[0])
    shutil.copytree(bundle_uri, Path(uri) / "model")
    return uri


def test_of_the_data_of_the_training_the_test_part_is_scored(dry, run_uri, tree):
    lines = dry(evaluate, EvaluateConfig(model=f"{run_uri}/model", data=tree))
    n = len(prepare.part_of(run_directory.read_split(run_uri), "test"))
    assert 0 < n < 48
    assert "the data of the training, by their names: its test part is scored" in lines
    assert any(line.startswith(f"to score: {n} images, ") for line in lines)
    assert "resnet18: input 64x96 px, batches of 32; classes benign, malignant" in lines
    assert any(
        line.startswith("estimates, from 8 images in this process, for one model on ") for line in lines
    )


def test_other_data_are_scored_whole(dry, run_uri, tree, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(tree, copy / "BreaKHis_v1", symlinks=True)
    next(copy.rglob("*.png")).unlink()
    (tmp_path / "out").mkdir()
    config = EvaluateConfig(
        model=f"{run_uri}/model", data=str(copy), output=str(tmp_path / "out"), force=True
    )
    lines = dry(evaluate, config)
    assert any(line.startswith("not the data of the training, by their names") for line in lines)
    assert any(line.startswith("to score: 47 images, ") for line in lines)


def test_a_fault_is_that_of_the_evaluation(dry, bundle_uri, tree, tmp_path):
    with pytest.raises(DataError, match="name an --output for the evaluation"):
        dry(evaluate, EvaluateConfig(model=bundle_uri, data=tree))
    with pytest.raises(BundleError, match="no model bundle there"):
        dry(evaluate, EvaluateConfig(model=str(tmp_path / "none"), data=tree))
