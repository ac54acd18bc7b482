"""Into an MLflow that keeps files, in this process."""

import pytest

import bcd
from bcd import schema, storage
from bcd.runtime import run_directory
from bcd.runtime.tracking import mirror
from bcd.runtime.tracking.mirror import FAILED, FINISHED, Mirror
from tests import pictures
from tests.runtime.tracking import made


@pytest.fixture
def client(tmp_path, monkeypatch):
    return made.of_files(tmp_path / "mlruns", monkeypatch)


def runs(client):
    experiment = client.get_experiment_by_name(mirror.EXPERIMENT)
    return client.search_runs([experiment.experiment_id]) if experiment else []


def points(client, run_id, name):
    return [(one.step, one.value) for one in client.get_metric_history(run_id, name)]


# About the code of its own agents, when `mlflow.pyfunc` is imported.
@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")
def test_a_run_is_logged_whole_and_its_model_loads(client, tmp_path):
    import mlflow

    bundle_uri = made.bundle_in(tmp_path / "bundle")
    uri = str(tmp_path / "run")
    followed = Mirror(uri, "first")
    followed.update(client)
    assert runs(client) == []  # the job has not claimed its folder
    made.begun(uri, 2)
    followed.update(client)
    (run,) = runs(client)
    assert (run.info.status, run.info.run_name, run.info.user_id) == ("RUNNING", "first", "unknown")
    assert run.data.params["data"] == "BreaKHis_v1"
    assert run.data.tags["data_fingerprint"] == "d" * 64
    assert points(client, run.info.run_id, "train_loss") == [(1, 1.0), (2, 0.5)]
    made.finished(uri, bundle_uri)
    followed.update(client, FINISHED)
    (run,) = runs(client)
    assert run.info.status == "FINISHED"
    assert points(client, run.info.run_id, "validation_loss") == [(1, 0.25), (2, 0.25), (3, 0.25)]
    assert {name: run.data.metrics[name] for name in ("auc", "auc.low", "auc.high")} == {
        "auc": 0.9,
        "auc.low": 0.7,
        "auc.high": 0.95,
    }
    assert run.data.tags["model_id"] == made.MEASURED["model_id"]
    listed = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert listed == ["figures", "model", "report.html"]
    loaded = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model", suppress_warnings=True)
    content = pictures.encode(pictures.gradient())
    expected = bcd.load(bundle_uri).predict_files([content])
    found = loaded.predict([content])
    assert found[schema.PROBABILITY_MALIGNANT][0] == expected.probability_malignant[0]
    logged = b"".join(path.read_bytes() for path in (tmp_path / "mlruns").rglob("*") if path.is_file())
    assert b"/home/someone" not in logged


def test_a_resumed_run_continues_the_same_one(client, tmp_path):
    uri = str(tmp_path / "run")
    made.begun(uri, 2)
    first = Mirror(uri, "first")
    first.update(client, FAILED)
    (run,) = runs(client)
    assert run.info.status == FAILED
    made.begun(uri, num_workers="2")  # which decides no result
    # The last epoch was lost with its worker, and is trained again.
    history = [made.HISTORY[0], made.HISTORY[1] | {"train_loss": 0.4}, made.HISTORY[2]]
    run_directory.write_json(uri, run_directory.HISTORY, history)
    again = Mirror(uri, "first")
    again.update(client)
    (run,) = runs(client)
    assert run.info.status == "RUNNING"
    assert run.data.params["num_workers"] == "auto"
    assert points(client, run.info.run_id, "train_loss") == [(1, 1.0), (2, 0.5), (2, 0.4), (3, 1 / 3)]


def test_a_run_that_the_server_does_not_know_begins_as_another(client, tmp_path):
    uri = str(tmp_path / "run")
    made.begun(uri, 1)
    run_directory.write_json(uri, mirror.IDENTITY, {"run_id": "0" * 32})
    Mirror(uri, "first").update(client)
    (run,) = runs(client)
    assert run_directory.read_json(uri, mirror.IDENTITY) == {"run_id": run.info.run_id}
    client.delete_run(run.info.run_id)
    Mirror(uri, "first").update(client)
    (other,) = runs(client)
    assert other.info.run_id != run.info.run_id


def test_what_failed_is_repeated_and_not_logged_twice(client, tmp_path, monkeypatch):
    uri = str(tmp_path / "run")
    made.begun(uri, 2)
    followed, log_batch = Mirror(uri, "first"), client.log_batch
    monkeypatch.setattr(client, "log_batch", lambda *args, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        followed.update(client)
    monkeypatch.setattr(client, "log_batch", log_batch)
    followed.update(client)
    followed.update(client)
    (run,) = runs(client)
    assert points(client, run.info.run_id, "train_loss") == [(1, 1.0), (2, 0.5)]
    assert run.data.params["name"] == "first"


def test_the_folds_of_a_study_are_nested_and_end_by_themselves(client, tmp_path):
    uri = str(tmp_path / "run")
    made.study(uri)
    whole = Mirror(uri, "study")
    folds = [Mirror(f"{uri}/case/repeat-1-fold-{i}", f"fold {i}", parent=whole) for i in (1, 2)]
    made.finished(folds[0].uri)
    made.begun(folds[1].uri, 1)
    for each in (whole, *folds):
        each.update(client)
    found = {run.info.run_name: run for run in runs(client)}
    assert {name: run.info.status for name, run in found.items()} == {
        "study": "RUNNING",
        "fold 1": FINISHED,
        "fold 2": "RUNNING",
    }
    parents = {run.data.tags.get(mirror.PARENT) for run in found.values()}
    assert parents == {None, found["study"].info.run_id}
    # The study resumes: a fold that has ended is left as it is.
    ended = Mirror(folds[0].uri, "fold 1", parent=whole)
    ended.update(client)
    assert ended.has_ended
    made.evaluated(uri, spread={"auc": {"mean": 0.8, "sd": 0.1, "n": 2}})
    whole.update(client, FINISHED)
    assert client.get_run(whole.run_id).data.metrics["auc.fold_sd"] == 0.1


def test_an_evaluation_leaves_no_file_and_is_logged_each_time(client, tmp_path):
    uri = str(tmp_path / "out")
    made.evaluated(uri, tested_on="external")
    settings = {"model": "/home/someone/run/model", "data": "s3://b/new", "force": False}
    for _ in range(2):
        Mirror(uri, "evaluation of first", settings, str(tmp_path / "none")).update(client, FINISHED)
    one, other = runs(client)
    assert one.data.params == other.data.params == {"model": "model", "data": "s3://b/new", "force": "False"}
    assert one.data.tags["tested_on"] == "external"
    assert not storage.exists(f"{uri}/{mirror.IDENTITY}")
