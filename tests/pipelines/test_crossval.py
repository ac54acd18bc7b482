"""Planted truths: a leak where there is one, and none where there is none; what a study leaves behind."""

import pytest

from bcd import bundle, schema, split, storage
from bcd.config import CrossvalConfig
from bcd.errors import ConfigError, DataError
from bcd.pipelines import crossval, rundir
from tests import planted
from tests.cluster import read_json
from tests.pipelines.test_read import small

# Two studies of four trainings each: `pytest -m trial tests/pipelines/test_crossval.py`.
pytestmark = [pytest.mark.ray, pytest.mark.trial]

K = 2
N_IMAGES = planted.N_PATIENTS * planted.N_IMAGES


def config_of(folder, signal, **changes):
    settings = {
        "protocol": "case,image",
        "k": K,
        "weights": "none",
        "augment": False,
        "epochs": 4,
        "batch_size": 8,
        "input_height_px": 32,
        "input_width_px": 48,
        "learning_rate": 1e-3,
        "validation_fraction": 0.1,
    }
    data = planted.tree(folder / "data", signal)
    return CrossvalConfig(data=data, output=str(folder), name="study", **settings | changes)


@pytest.fixture(scope="module")
def noise(cluster, tmp_path_factory):
    """A study of patients who can be known again and whose class was drawn by lot."""
    config = config_of(tmp_path_factory.mktemp("noise"), signal=False)
    return config, crossval.run(config)


@pytest.fixture(scope="module")
def signal(cluster, tmp_path_factory):
    """The same patients with a sign of their class in every picture; two folds at a time."""
    config = config_of(tmp_path_factory.mktemp("signal"), signal=True, parallel=2)
    return config, crossval.run(config)


def test_a_leak_is_seen_and_said_where_the_class_stands_in_no_picture(noise):
    _, uri = noise
    measured = read_json(f"{uri}/metrics.json")
    honest, leaky = measured["pooled"], read_json(f"{uri}/image/metrics.json")["pooled"]
    assert leaky["balanced_accuracy"] > 0.95
    low, high = honest["intervals"]["balanced_accuracy"]
    assert low < 0.5 < high < 0.8
    row = measured["leak"]["metrics"]["balanced_accuracy"]
    assert row["difference"] == pytest.approx(leaky["balanced_accuracy"] - honest["balanced_accuracy"])
    assert row["interval"][0] > 0.15
    page = storage.read_bytes(f"{uri}/report.html").decode()
    assert "The leak adds +" in page
    assert "split by image, with patients on both sides, the same model seems to reach" in page
    mark = "leaky: patients stand on both sides"
    assert mark in storage.read_bytes(f"{uri}/image/report.html").decode()
    assert mark not in page


def test_no_leak_is_seen_where_the_class_stands_in_every_picture(signal):
    _, uri = signal
    measured = read_json(f"{uri}/metrics.json")
    leaky = read_json(f"{uri}/image/metrics.json")["pooled"]["balanced_accuracy"]
    assert measured["pooled"]["balanced_accuracy"] > 0.85
    low, high = measured["pooled"]["intervals"]["balanced_accuracy"]
    assert low <= leaky <= high
    assert "No leak is seen" in storage.read_bytes(f"{uri}/report.html").decode()


@pytest.mark.parametrize("protocol", ["case", "image"])
def test_every_image_is_tested_once_by_a_model_that_was_not_trained_on_it(noise, protocol):
    _, uri = noise
    tested = []
    for fold in range(1, K + 1):
        run_uri = f"{uri}/{protocol}/repeat-1-fold-{fold}"
        parts = rundir.read_split(run_uri)
        assert split.audit(parts, protocol) == []
        rows = parts.to_pylist()
        tested += [row[schema.IMAGE_ID] for row in rows if row[schema.PART] == split.TEST]
        card = bundle.read_card(f"{run_uri}/model")
        assert (card.protocol, card.fold, card.training["cross_folds"]) == (protocol, fold, K)
        assert card.leaky == (protocol == "image")
    assert len(tested) == len(set(tested)) == N_IMAGES
    measured = read_json(f"{uri}/{protocol}/metrics.json")
    assert (measured["n_images"], measured["n_patients"]) == (N_IMAGES, planted.N_PATIENTS)


def test_the_spread_is_that_of_the_folds(noise):
    _, uri = noise
    measured = read_json(f"{uri}/metrics.json")
    values = [
        read_json(f"{uri}/case/repeat-1-fold-{fold}/metrics.json")["pooled"]["accuracy"]
        for fold in range(1, K + 1)
    ]
    spread = measured["spread"]["accuracy"]
    assert spread["mean"] == pytest.approx(sum(values) / K)
    assert spread["sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert measured["pooled"]["accuracy"] == pytest.approx(sum(values) / K)  # folds of equal size


def test_a_finished_study_says_so_and_another_is_refused(noise, capsys):
    config, uri = noise
    assert crossval.run(config) == uri
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"other settings: --k 2 -> 3"):
        crossval.run(config.model_copy(update={"k": 3}))


def test_more_folds_than_groups_end_a_study_before_it_trains(cluster, tree, tmp_path):
    config = CrossvalConfig(**small(tree).model_dump(include={"data", "weights"}), output=str(tmp_path), k=40)
    with pytest.raises(DataError, match=r"24 groups by case cannot make 40 folds; lower --k"):
        crossval.run(config)
    assert not list(tmp_path.iterdir())
