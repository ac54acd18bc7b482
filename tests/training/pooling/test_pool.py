import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bcd import schema, storage
from bcd.config.scoring import PoolConfig
from bcd.errors import BundleError, ConfigError
from bcd.runtime import output
from bcd.training.pooling import attention, bags, pool
from tests.training.pooling.planted import write_scores, write_study

SETTINGS = {"epochs": 3, "maps": 1}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"), patients=20, tiles=20, length=8)[:2]


def fitted_here(config, uri, scores, slides, cluster_ends):
    """In place of a worker of Ray Train."""
    with tempfile.TemporaryDirectory() as folder:
        held = bags.load_bags(scores, slides[schema.SLIDE].to_pylist(), Path(folder))
        return attention.fit_network(held, slides, config.seed, config.epochs, config.learning_rate)


@pytest.fixture
def here(monkeypatch):
    """Ray's tasks as plain calls; the worker of the training is this process."""

    def remote(**options):
        return lambda function: SimpleNamespace(remote=function)

    monkeypatch.setattr(pool, "ray", SimpleNamespace(remote=remote, get=lambda results: results))
    monkeypatch.setattr(pool.cluster, "connect", lambda: True)
    monkeypatch.setattr(pool, "_fitted", fitted_here)


def trained(study, folder, **settings):
    scores, given = study
    config = PoolConfig(scores=scores, labels=given, output=str(folder), **SETTINGS | settings)
    return pool.run(config), config


def table_of(uri, name):
    return storage.read_table(f"{uri}/{name}.parquet")


def check_run(uri):
    """What a training leaves behind."""
    assert output.read_marker(uri, output.POOL)  # every file in it is one that it may contain
    names = {file.path.split("/")[0] for file in storage.list_files(uri)}
    files = "config.json run.json history.json metrics.json split.parquet slides.parquet attention.parquet"
    assert names - {"checkpoints"} == {*files.split(), "model", "slides"}
    slides, weighed = table_of(uri, "slides"), table_of(uri, "attention")
    assert slides.schema.equals(schema.POOLED_SLIDES)
    assert weighed.schema.equals(schema.TILE_ATTENTION)
    assert (len(slides), len(weighed)) == (20, 400)
    sums = weighed.group_by(schema.SLIDE).aggregate([(schema.ATTENTION, "sum")]).to_pandas()
    np.testing.assert_allclose(sums[f"{schema.ATTENTION}_sum"], 1, atol=1e-5)
    assert slides[schema.PROBABILITY_MALIGNANT].null_count == 0
    assert sum(".png" in file.path for file in storage.list_files(uri)) == 1
    measured = json.loads(storage.read_bytes(f"{uri}/metrics.json"))
    test = [row for row in slides.to_pylist() if row[schema.PART] == "test"]
    assert measured["by_level"]["patient"]["n"] == len(test) == 4
    assert set(measured["comparison"]) == {schema.MALIGNANT_TILE_SHARE, schema.TOP_PROBABILITY}


def test_a_training_leaves_answers_attention_and_metrics(here, study, tmp_path, caplog):
    uri, config = trained(study, tmp_path)
    check_run(uri)
    modified = storage.version(f"{uri}/slides.parquet")
    pool.run(config)  # is finished
    assert storage.version(f"{uri}/slides.parquet") == modified
    with pytest.raises(ConfigError, match="other settings: --epochs 3 -> 4"):
        trained(study, tmp_path, epochs=4)


def test_a_killed_training_is_run_again(here, study, tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pool, "_answered", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(study, tmp_path)
    uri, _ = trained(study, tmp_path)
    check_run(uri)
    undisturbed, _ = trained(study, tmp_path, name="other")
    # The name is in the card.
    found, expected = (table_of(one, "slides").drop_columns(schema.MODEL_ID) for one in (uri, undisturbed))
    assert found.equals(expected)


def test_an_applied_model_gives_the_same_answers(here, study, tmp_path):
    """Of slides with other names, without labels."""
    uri, config = trained(study, tmp_path)
    model_uri, elsewhere = f"{uri}/model", str(tmp_path / "scores")
    shutil.copytree(config.scores, elsewhere)
    applied = pool.run(
        PoolConfig(scores=elsewhere, model=model_uri, output=str(tmp_path), name="applied", maps=0)
    )
    columns = [schema.SLIDE, schema.LOGIT, schema.PROBABILITY_MALIGNANT, schema.MODEL_ID]
    found = table_of(applied, "slides")
    assert found.select(columns).equals(table_of(uri, "slides").select(columns))
    assert found[schema.PART].null_count == found[schema.TUMOR_CLASS].null_count == 20
    assert table_of(applied, "attention").equals(table_of(uri, "attention"))


def test_embeddings_of_another_model_are_refused(here, study, tmp_path):
    uri, config = trained(study, tmp_path)
    tables = storage.dataset(f"{config.scores}/predictions").to_table()
    place = tables.column_names.index(schema.MODEL_ID)
    other = tables.set_column(place, tables.schema.field(place), [["f" * 16] * len(tables)])
    elsewhere = write_scores(tmp_path / "scores", other)
    with pytest.raises(BundleError, match=r"pools embeddings of the model 0123456789abcdef \(8 numbers\)"):
        pool.run(PoolConfig(scores=elsewhere, model=f"{uri}/model", output=str(tmp_path), name="applied"))
    assert not storage.exists(str(tmp_path / "applied/config.json"))


@pytest.mark.ray
def test_the_whole_job_on_ray_train(joined, s3, study):
    uri, _ = trained(study, f"{s3}/pooled")
    check_run(uri)
    history = json.loads(storage.read_bytes(f"{uri}/history.json"))
    assert [record["epoch"] for record in history] == [1, 2, 3]
