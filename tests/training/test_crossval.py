"""Planted truths: a leak where there is one, and none where there is none; what a study leaves behind."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import ray.train

from bcd import schema, storage
from bcd.config.training import CrossvalConfig, TrainConfig
from bcd.errors import ConfigError, DataError, StorageError
from bcd.model import bundle, train_step, weights
from bcd.runtime import output, predict, prepare, run_directory
from bcd.runtime.run_directory import SELECTION
from bcd.split import split
from bcd.training import crossval, train
from bcd.training.checkpoint import State
from tests import planted, studies
from tests.cluster import PATIENCE_S, ROOT, read_json, wait_for
from tests.runtime.test_datasets import small
from tests.runtime.tracking import made
from tests.trained import flags_of, score_here, statistics_here
from tests.training.test_loop import RECORD

pytestmark = pytest.mark.ray
# Two studies of four trainings each: `pytest -m trial tests/pipelines/test_crossval.py`.
trial = pytest.mark.trial

K = 2
N_IMAGES = planted.N_PATIENTS * planted.N_IMAGES


def config_of(folder, signal, **changes):
    settings = {
        "protocol": "case,image",
        "k": K,
        "architecture": "resnet18",
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
    """The same patients with a sign of their class in every image; two folds at a time."""
    config = config_of(tmp_path_factory.mktemp("signal"), signal=True, parallel=2, export="refit")
    return config, crossval.run(config)


@trial
def test_a_leak_is_reported_where_no_image_shows_the_class(noise):
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
    assert "split by image, with patients in several parts, the same model appears to reach" in page
    mark = "leaky: patients in several parts"
    assert mark in storage.read_bytes(f"{uri}/image/report.html").decode()
    assert mark not in page


@trial
def test_no_leak_is_reported_where_images_show_the_class(signal):
    _, uri = signal
    measured = read_json(f"{uri}/metrics.json")
    assert measured["pooled"]["balanced_accuracy"] > 0.85
    row = measured["leak"]["metrics"]["balanced_accuracy"]
    # Models that agree on every patient have no interval of their difference.
    low, high = row["interval"] or [row["difference"]] * 2
    assert low <= 0 <= high
    assert abs(row["difference"]) < 0.1
    assert measured["leak"]["n_left_out"] == 0
    assert "No effect of a leak is seen" in storage.read_bytes(f"{uri}/report.html").decode()


@trial
def test_a_refit_is_trained_on_all_images_and_says_whose_numbers_it_has(signal):
    _, uri = signal
    card = bundle.read_card(f"{uri}/refit/model")
    epochs = int(card.validation["epoch"])
    seen = storage.read_table(f"{uri}/refit/exposure/epoch-{epochs:04d}.parquet")[schema.IMAGE_ID]
    assert len(set(seen.to_pylist())) == N_IMAGES
    assert not storage.exists(f"{uri}/refit/exposure/epoch-{epochs + 1:04d}.parquet")
    assert (card.study.kind, card.study.n_models, card.leaky) == ("refit", K, False)
    assert card.metrics["pooled"] == read_json(f"{uri}/metrics.json")["pooled"]


@trial
@pytest.mark.parametrize("protocol", ["case", "image"])
def test_every_image_is_tested_once_by_a_model_that_was_not_trained_on_it(noise, protocol):
    _, uri = noise
    tested = []
    for fold in range(1, K + 1):
        run_uri = f"{uri}/{protocol}/repeat-1-fold-{fold}"
        parts = run_directory.read_split(run_uri)
        assert split.crossings_forbidden(parts, protocol) == []
        rows = parts.to_pylist()
        tested += [row[schema.IMAGE_ID] for row in rows if row[schema.PART] == split.TEST]
        card = bundle.read_card(f"{run_uri}/model")
        assert (card.protocol, card.fold, card.training["cross_folds"]) == (protocol, fold, K)
        assert card.leaky == (protocol == "image")
    assert len(tested) == len(set(tested)) == N_IMAGES
    measured = read_json(f"{uri}/{protocol}/metrics.json")
    assert (measured["n_images"], measured["n_patients"]) == (N_IMAGES, planted.N_PATIENTS)


@trial
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


@trial
def test_a_finished_study_says_so_and_another_is_refused(noise, capsys):
    config, uri = noise
    assert crossval.run(config) == uri
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"other settings: --k 2 -> 3"):
        crossval.run(config.model_copy(update={"k": 3}))


def test_warnings_of_folds_have_their_names_and_are_one_where_only_numbers_differ(tmp_path):
    folds = list(crossval.folds_of(CrossvalConfig(data="d", k=2), str(tmp_path), "case"))
    facts = {"data_fingerprint": "0", "synthetic": False, "broken": [], "quarantined": []}
    facts |= {"field_height_px": 1, "field_width_px": 1}
    given = (
        ["of one", "1 of 4 patients", "3 of 4 patients", "patient 1 is in both", "of all"],
        ["of all", "2 of 14 patients", "patient 2 is in both"],
    )
    for fold, warnings in zip(folds, given, strict=True):
        run_directory.write_json(fold.uri, run_directory.DATA, facts | {"warnings": warnings})
    assert crossval._known(folds).warnings == [
        "of all",
        "case, repeat 1, fold 1: of one",
        "2 of 2 folds, such as case, repeat 1, fold 1: 1 of 4 patients",
        "case, repeat 1, fold 1: 3 of 4 patients",
        "case, repeat 1, fold 1: patient 1 is in both",
        "case, repeat 1, fold 2: patient 2 is in both",
    ]


def settings_of(tree, output):
    settings = small(tree).model_dump(
        include={"data", "architecture", "weights", "input_height_px", "input_width_px"}
    )
    return settings | {"output": str(output), "k": 2, "epochs": 1, "validation_fraction": 0.33}


def untrained(config, run_uri, fed, pretrained, scaling, runs_per_node=1, started=0.0, *, cluster_ends=False):
    """In place of `train.train_model`: the checkpoint of an epoch that learned nothing."""
    assert not cluster_ends
    network = weights.build(2, architecture=config.architecture)
    folder, record = Path(run_uri) / "checkpoints" / "only", {**RECORD, "epoch": 1, SELECTION: 0.5}
    folder.mkdir(parents=True)
    State(network, train_step.optimizer(network, TrainConfig(data="d")), [record]).save(folder)
    kept = ray.train.Checkpoint.from_directory(folder)
    return SimpleNamespace(return_value=[record], best_checkpoints=[(kept, record)])


def test_a_study_resumes_with_the_folds_that_are_missing(joined, tree, tmp_path, capsys, monkeypatch):
    """As after a kill between two folds; `test_train` and the trials train with Ray."""
    monkeypatch.setattr(train, "train_model", untrained)
    monkeypatch.setattr(train.export.feature_statistics, "compute_statistics", statistics_here)
    monkeypatch.setattr(predict, "score_rows", score_here)
    config = CrossvalConfig(**settings_of(tree, tmp_path), parallel=1)
    run_directory.claim_run(config, f"{tmp_path}/crossval")
    first, second = crossval.folds_of(config, f"{tmp_path}/crossval", "case")
    train.run(first.config)
    before = {path: path.read_bytes() for path in Path(first.uri).rglob("*") if path.is_file()}
    uri = crossval.run(config)
    check_study(uri, tree)
    assert output.read_marker(second.uri, output.TRAIN)
    assert f"{first.uri} is finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in Path(first.uri).rglob("*") if path.is_file()} == before
    # A finished study is compared without training anything: here with itself.
    crossval.run(config.model_copy(update={"against": uri}))
    measured = read_json(f"{uri}/metrics.json")
    row = measured["comparison"]["metrics"]["accuracy"]
    assert (row["first"], row["difference"], row["p_value"]) == (measured["pooled"]["accuracy"], 0, None)
    with pytest.raises(DataError, match=r"--against .*/nothing: no test_images.parquet there"):
        crossval.run(config.model_copy(update={"against": f"{tmp_path}/nothing"}))
    # Nor is anything trained for a bundle of all its models, and once for one of all images.
    for kind in ("ensemble", "refit"):
        crossval.run(config.model_copy(update={"export": kind}))
        card = bundle.read_card(f"{uri}/{kind}/model")
        assert (card.study.kind, card.study.n_models) == (kind, 2)
        assert card.metrics["n_images"] == measured["n_images"]
        assert output.read_marker(uri, output.CROSSVAL)
        crossval.run(config.model_copy(update={"export": kind}))
    assert capsys.readouterr().out.count("bundle of the study") == 2


def test_a_study_tests_a_magnification_that_its_models_have_not_seen(joined, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_model", untrained)
    monkeypatch.setattr(train.export.feature_statistics, "compute_statistics", statistics_here)
    monkeypatch.setattr(predict, "score_rows", score_here)
    settings = settings_of(tree, tmp_path) | {"protocol": "magnification", "held_out": ("200",)}
    uri = crossval.run(CrossvalConfig(**settings, parallel=1))
    measured = read_json(f"{uri}/metrics.json")
    assert measured["n_images"] == measured["n_patients"] == 24
    assert list(measured["by_magnification"]) == ["200"]
    for row in measured["folds"]:
        assert bundle.read_card(row["model"]).magnifications == (40,)
        # Of the patients who train at 40X those at 200X, and of those who are tested the reverse.
        assert (row["held_out"], row["left_out"]) == ("200", 24)
    assert "200 held out, 24 images in no part" in storage.read_bytes(f"{uri}/report.html").decode()


@trial
def test_a_study_is_logged_with_its_folds_within_it(joined, tree, tmp_path, monkeypatch):
    client = made.of_files(tmp_path / "mlruns", monkeypatch)
    monkeypatch.setattr(train, "train_model", untrained)
    monkeypatch.setattr(train.export.feature_statistics, "compute_statistics", statistics_here)
    monkeypatch.setattr(predict, "score_rows", score_here)
    uri = crossval.run(CrossvalConfig(**settings_of(tree, tmp_path / "runs"), parallel=1))
    whole, *folds = (
        client.get_run(read_json(f"{folder}/mlflow.json")["run_id"])
        for folder in (uri, f"{uri}/case/repeat-1-fold-1", f"{uri}/case/repeat-1-fold-2")
    )
    assert {run.info.status for run in (whole, *folds)} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in folds} == {whole.info.run_id}
    measured = read_json(f"{uri}/metrics.json")
    assert whole.data.metrics["accuracy.fold_mean"] == measured["spread"]["accuracy"]["mean"]
    for run, row in zip(folds, measured["folds"], strict=True):
        assert run.data.metrics["accuracy"] == row["pooled"]["accuracy"]
        assert [file.path for file in client.list_artifacts(run.info.run_id, "model")][-1] == "model/data"


def check_study(uri, tree):
    measured = read_json(f"{uri}/metrics.json")
    assert output.read_marker(uri, output.CROSSVAL)
    assert measured["n_images"] == len(list(Path(tree).rglob("*.png")))
    assert [row["fold"] for row in measured["folds"]] == [1, 2]
    assert read_json(f"{uri}/run.json")["status"] == "finished"


@trial
def test_a_killed_study_trains_only_the_fold_that_is_missing(cluster, tree, tmp_path):
    """SIGKILL while the second of two folds is trained."""
    settings = settings_of(tree, tmp_path) | {"name": "killed", "parallel": 1}
    job = subprocess.Popen([sys.executable, "jobs/crossval.py", *flags_of(settings)], cwd=ROOT)
    first, second = (tmp_path / f"killed/case/repeat-1-fold-{fold}" for fold in (1, 2))
    wait_for(
        lambda: (second / "config.json").exists() or job.poll() is not None, PATIENCE_S, "the second fold"
    )
    assert job.poll() is None
    job.kill()
    job.wait()
    assert is_finished(first)
    assert not is_finished(second)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    check_study(crossval.run(CrossvalConfig(**settings)), tree)
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before


def with_one_more(parts):
    """The rows, and one whose image is gone since."""
    gone = {schema.IMAGE_ID: "gone.png", schema.SHA256: "0" * 64}
    return pa.concat_tables([parts, pa.Table.from_pylist([parts.to_pylist()[0] | gone], schema=parts.schema)])


def test_a_study_does_not_resume_with_other_data(cluster, tree, tmp_path):
    """One image fewer would change all folds."""
    config = CrossvalConfig(
        **small(tree).model_dump(include={"data", "weights", "architecture"}), output=str(tmp_path), k=2
    )
    fold = next(crossval.folds_of(config, f"{tmp_path}/crossval", "case"))
    parts, facts = prepare.prepare(fold.config)
    output.claim_folder(f"{tmp_path}/crossval", output.CROSSVAL)
    run_directory.write_json(fold.uri, run_directory.DATA, facts.model_dump())
    run_directory.write_split(fold.uri, with_one_more(parts))
    with pytest.raises(DataError, match=r"has changed since .*repeat-1-fold-1 was split"):
        crossval.run(config)


def arm(protocol, images):
    return crossval.Arm(protocol, {}, images, None, {})


def test_a_leak_is_measured_on_images_of_both_arms():
    images = studies.Cohort(seed=1).images(1.0)
    leaky, honest = arm("image", images.iloc[5:]), arm("case", images)
    found = crossval._leak(leaky, honest)
    assert (found["n_images"], found["n_left_out"]) == (len(images) - 5, 5)
    assert found["metrics"]["balanced_accuracy"]["difference"] == 0


def test_what_a_user_can_put_right_stays_one_sentence_from_parallel_folds(joined, tmp_path):
    """Ray wraps the errors of its tasks in their traceback."""
    config = CrossvalConfig(data="d", output=str(tmp_path), weights=f"{tmp_path}/none.pth", k=2)
    folds = list(crossval.folds_of(config, str(tmp_path), "case"))
    with pytest.raises(StorageError, match=rf"^{tmp_path}/none.pth: cannot read it"):
        crossval._train(folds, None, parallel=2)


def is_finished(run):
    return read_json(str(run / "run.json"))["status"] == "finished"


def test_more_folds_than_groups_end_a_study_before_it_trains(cluster, tree, tmp_path):
    config = CrossvalConfig(
        **small(tree).model_dump(include={"data", "weights", "architecture", "prepared"}),
        output=str(tmp_path),
        k=40,
    )
    with pytest.raises(DataError, match=r"24 groups by case cannot make 40 folds; lower --k"):
        crossval.run(config)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_finished_study_with_an_unusable_bundle_resumes(monkeypatch, capsys):
    faults = {"a": None, "b": "b: the model card has format 1", "c": None}
    monkeypatch.setattr(crossval.export, "fault", faults.get)
    folds = {uri: SimpleNamespace(uri=uri) for uri in faults}
    assert crossval._is_published([[folds["a"]], [folds["c"]]])
    assert not crossval._is_published([[folds["a"]], [folds["b"], folds["c"]]])
    assert "b: the model card has format 1. Writing new bundles" in capsys.readouterr().out
