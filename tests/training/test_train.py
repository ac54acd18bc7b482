"""One real training of two workers on S3, and what must hold of all it leaves behind."""

import io
import json
import re
import socket
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ray.exceptions import ActorDiedError, GetTimeoutError, WorkerCrashedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from bcd import schema, storage
from bcd.errors import BundleError, ConfigError, DivergedError, ResourceError, StorageError
from bcd.model import bundle, predictor, weights
from bcd.runtime import output, predict, prepare
from bcd.training import task, train
from bcd.training.feed import Feed
from tests.cluster import other_lines, read_json
from tests.runtime.test_datasets import small
from tests.runtime.tracking import made
from tests.trained import check_whole, trained_by_a_job

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def config(trained):
    return trained.config


@pytest.fixture(scope="module")
def run_uri(trained):
    return trained.uri


# All that a training prints where nothing is wrong.
LINES = (
    r"training s3://.*",
    r"prepared images: .* in s3://.*, which has \d+ images",
    r"checked [\d,]+ of [\d,]+ images; \d+ images/s(; .* left)?",
    r"(train|validation|test): \d+ images of \d+ patients \(\d+ benign, \d+ malignant\)",
    r"reading \d+ images into memory: .* on every node",
    r"\x1b\[36m\(RayTrainWorker pid=\d+\)\x1b\[0m epoch \d/2: .*",
    r"scoring the test part: \d+ images",
    r"test part: \d+ images, .* \[synthetic data\]",
    r" +value   95 % interval over patients",
    r"  (balanced accuracy|sensitivity|specificity|AUC|(image|patient) recognition rate) .*",
    r"report: s3://.*/report\.html",
)


def test_a_training_prints_what_is_known_and_no_warning(trained):
    assert not other_lines(trained.log, LINES)
    assert other_lines("prepared images: no", LINES)


def test_every_epoch_and_the_test_part_are_there(trained):
    assert trained.log.count("epoch 1/2") == trained.log.count("epoch 2/2") == 1
    check_whole(trained.uri, 2)


@pytest.mark.trial
def test_a_killed_job_resumes_from_its_last_checkpoint(cluster, tree_on_s3, s3):
    resumed = trained_by_a_job(cluster, tree_on_s3, f"{s3}/runs", killed=True)
    assert "epoch 1/2" not in resumed.log
    assert "epoch 2/2" in resumed.log
    check_whole(resumed.uri, 2)
    check_epochs(resumed.uri)


RECIPES = {
    "ema_decay": 0.9,
    "stain_jitter": 0.1,
    "stain_normalisation": "reinhard",
    "label_smoothing": 0.1,
    "mixup": 0.2,
    "dropout": 0.2,
    "layer_decay": 0.7,
    "patience": 2,
    "weighted_loss": True,
}


@pytest.mark.trial
def test_two_workers_train_with_every_recipe_and_the_bundle_predicts_what_was_evaluated(
    cluster, tree, tmp_path
):
    given = small(tree, output=str(tmp_path), epochs=4, num_workers="2", symmetries=True, **RECIPES)
    uri = train.run(given)
    model = predictor.load(f"{uri}/model", device="cpu")
    assert model.card.symmetries
    assert model.card.stain.model_dump(mode="json") == read_json(f"{uri}/stain.json")
    columns = [schema.IMAGE_ID, schema.URI, schema.LOGIT, schema.EVIDENCE, schema.EVIDENCE_BIAS]
    rows = predict.read_back(f"{uri}/predictions", columns).to_pylist()
    for row in rows:
        logit = model.predict_files([storage.read_bytes(row[schema.URI])]).logit[0]
        np.testing.assert_allclose(row[schema.LOGIT], logit, atol=1e-4)
        log_odds = np.mean(row[schema.EVIDENCE]) + row[schema.EVIDENCE_BIAS]
        assert log_odds == pytest.approx(logit[1] - logit[0], abs=1e-3)
    assert output.read_marker(uri, output.TRAIN)
    # The same command reports that it is finished.
    assert train.run(given) == uri


def test_the_run_directory_is_as_promised(run_uri, config):
    names = {file.path.split("/")[0] for file in storage.list_files(run_uri)}
    promised = (
        "config.json run.json checkpoints model predictions metrics.json report.html figures tensorboard"
    )
    assert names >= set(promised.split())
    assert read_json(f"{run_uri}/config.json") == config.model_dump(mode="json")
    run = read_json(f"{run_uri}/run.json")
    assert run["status"] == "finished"
    assert run["versions"]["ray"]
    assert run["timings"]["train_s"] > run["timings"]["first_step_s"] > 0
    assert 0 < run["timings"]["headspace"] <= 1
    assert run["timings"]["images_from"] == "host memory"
    paths = [file.path for file in storage.list_files(f"{run_uri}/tensorboard")]
    assert all(path.removeprefix("test/").startswith("events.out.tfevents.") for path in paths)
    assert not [path for path in paths if socket.gethostname() in path]
    assert output.read_marker(run_uri, output.TRAIN)  # every file in it is one that it may contain


def test_every_epoch_is_balanced_and_saw_no_held_out_image(run_uri):
    check_epochs(run_uri)


def check_epochs(run_uri):
    table = pq.read_table(io.BytesIO(storage.read_bytes(f"{run_uri}/split.parquet")))
    parts = dict(zip(table[schema.IMAGE_ID].to_pylist(), table[schema.PART].to_pylist(), strict=True))
    history = read_json(f"{run_uri}/history.json")
    orders = []
    for record in history:
        counts = record["class_counts"]
        assert abs(counts["benign"] - counts["malignant"]) <= 2
        assert record["workers"] == 2
        exposure = pq.read_table(
            io.BytesIO(storage.read_bytes(f"{run_uri}/exposure/epoch-{record['epoch']:04d}.parquet"))
        )
        orders.append(exposure[schema.IMAGE_ID].to_pylist())
        assert len(orders[-1]) == sum(counts.values())
        assert {parts[name] for name in orders[-1]} == {"train"}
    assert orders[0] != orders[1]


def test_validation_counted_every_row_of_both_workers(run_uri):
    table = pq.read_table(io.BytesIO(storage.read_bytes(f"{run_uri}/split.parquet")))
    expected = len(prepare.part_of(table, "validation"))
    assert [record["n_validation"] for record in read_json(f"{run_uri}/history.json")] == [expected] * 2


def test_both_workers_validated_the_model_that_is_kept(run_uri):
    check_validated(run_uri)


@pytest.mark.trial
def test_they_do_so_too_where_each_counts_its_own_batches(cluster, config):
    apart = {"name": "apart", "epochs": 1, "sync_batchnorm": False}
    check_validated(train.run(config.model_copy(update=apart)))


@pytest.mark.trial
def test_a_training_is_logged_with_every_epoch(cluster, config, tmp_path, monkeypatch):
    client = made.of_files(tmp_path / "mlruns", monkeypatch)
    uri = train.run(config.model_copy(update={"name": "logged"}))
    run = client.get_run(read_json(f"{uri}/mlflow.json")["run_id"])
    assert run.info.status == "FINISHED"
    logged = client.get_metric_history(run.info.run_id, "train_loss")
    assert [(one.step, one.value) for one in logged] == [
        (record["epoch"], record["train_loss"]) for record in read_json(f"{uri}/history.json")
    ]
    assert run.data.tags["model_id"] == bundle.identify(f"{uri}/model")


def check_validated(run_uri):
    """Running statistics could differ between workers after the last step: only the first's are kept."""
    table = pq.read_table(io.BytesIO(storage.read_bytes(f"{run_uri}/split.parquet")))
    rows = prepare.part_of(table, "validation").to_pylist()
    loaded = predictor.load(f"{run_uri}/model", device="cpu")
    direct = loaded.predict_files([storage.read_bytes(row[schema.URI]) for row in rows])
    logit = torch.tensor(direct.logit) * loaded.card.temperature
    target = torch.tensor([loaded.card.classes.index(row[schema.TUMOR_CLASS]) for row in rows])
    best = read_json(f"{run_uri}/history.json")[int(loaded.card.validation["epoch"]) - 1]
    loss = torch.nn.functional.cross_entropy(logit, target)
    assert best["validation_loss"] == pytest.approx(float(loss), rel=1e-4)


def test_predictions_are_the_bundles_own(run_uri):
    """The table on S3 equals what Python without Ray computes from the bundle and the files."""
    loaded = predictor.load(f"{run_uri}/model", device="cpu")
    rows = pq.read_table(
        f"{run_uri}/predictions".removeprefix("s3://"), filesystem=storage.resolve(run_uri)[0]
    ).to_pylist()
    direct = loaded.predict_files([storage.read_bytes(row[schema.URI]) for row in rows])
    np.testing.assert_allclose([row[schema.LOGIT] for row in rows], direct.logit, atol=1e-4)
    assert [row[schema.PREDICTED_CLASS] for row in rows] == direct.predicted_class
    for row in rows:
        total = np.mean(row[schema.EVIDENCE]) + row[schema.EVIDENCE_BIAS]
        assert total == pytest.approx(row[schema.LOGIT][1] - row[schema.LOGIT][0], abs=1e-3)
        assert row[schema.MODEL_ID] == loaded.model_id
        assert (row[schema.HEIGHT_PX], row[schema.WIDTH_PX], row[schema.ERROR]) == (92, 140, None)


def test_metrics_are_those_of_the_predictions(run_uri):
    measured = read_json(f"{run_uri}/metrics.json")
    table = pq.read_table(io.BytesIO(storage.read_bytes(f"{run_uri}/split.parquet")))
    test = prepare.part_of(table, "test")
    truth = dict(zip(test[schema.IMAGE_ID].to_pylist(), test[schema.TUMOR_CLASS].to_pylist(), strict=True))
    rows = pq.read_table(
        f"{run_uri}/predictions".removeprefix("s3://"), filesystem=storage.resolve(run_uri)[0]
    ).to_pylist()
    assert {row[schema.IMAGE_ID] for row in rows} == truth.keys()
    right = [row[schema.PREDICTED_CLASS] == truth[row[schema.IMAGE_ID]] for row in rows]
    assert measured["pooled"]["accuracy"] == pytest.approx(np.mean(right))
    assert measured["synthetic"] is True
    assert bundle.read_card(f"{run_uri}/model").metrics == measured
    assert "Synthetic" in storage.read_bytes(f"{run_uri}/model/README.md").decode()
    assert "synthetic" in storage.read_bytes(f"{run_uri}/report.html").decode()


def test_running_it_again_does_nothing_and_says_so(run_uri, config, capsys):
    before = [(file.path, file.size_bytes) for file in storage.list_files(run_uri)]
    assert train.run(config) == run_uri
    assert "is finished" in capsys.readouterr().out
    assert [(file.path, file.size_bytes) for file in storage.list_files(run_uri)] == before


def test_other_settings_under_the_same_name_are_refused_by_name(run_uri, config):
    other = config.model_copy(update={"seed": 7, "epochs": 9})
    with pytest.raises(
        ConfigError, match=r"other settings: --epochs 2 -> 9; --seed 0 -> 7. Repeat the earlier settings"
    ):
        train.run(other)


def test_an_output_that_cannot_be_written_is_found_first(tree, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write it"):
        train.run(small(tree, output=str(tmp_path / "file")))


def test_wrong_weights_are_found_before_data_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(train.cluster, "connect", lambda **_: None)
    (tmp_path / "w.pth").write_bytes(b"nothing")
    with pytest.raises(BundleError, match=r"w.pth: not a state dict"):
        train.run(small("no/such/data", output=str(tmp_path), weights=str(tmp_path / "w.pth")))


def test_too_many_workers_fail_at_once(cluster, tree, tmp_path):
    with pytest.raises(ResourceError, match="99 training workers and 1 CPU for reading images need 100 CPUs"):
        train.run(small(tree, output=str(tmp_path), num_workers="99"))


def test_a_damaged_run_directory_says_so(tree, tmp_path):
    config = small(tree, output=str(tmp_path), name="x")
    output.claim_folder(f"{tmp_path}/x", output.TRAIN)
    storage.write_bytes(f"{tmp_path}/x/config.json", json.dumps(config.model_dump(mode="json")).encode()[:-9])
    with pytest.raises(train.BcdError, match=r"config.json is damaged"):
        train.run(config)


@pytest.mark.parametrize(("fault", "goes_on"), [(None, False), ("m: the model card has format 1", True)])
def test_a_finished_run_with_an_unusable_bundle_resumes(monkeypatch, capsys, fault, goes_on):
    def stop(*_):
        raise BundleError("goes on")

    monkeypatch.setattr(train.run_directory, "begin_run", lambda *_: True)
    monkeypatch.setattr(train.export, "fault", lambda _: fault)
    monkeypatch.setattr(weights, "pretrained", stop)
    monkeypatch.setattr(train.cluster, "connect", lambda **_: None)
    if goes_on:
        with pytest.raises(BundleError, match="goes on"):
            train.run(small("d"))
    else:
        train.run(small("d"))
    said = (
        "m: the model card has format 1. Writing a new bundle from its checkpoint"
        if goes_on
        else "is finished"
    )
    assert said in capsys.readouterr().out


def test_what_the_workers_return_instead_of_a_history_ends_the_run(monkeypatch):
    """They do not raise it: Ray Train would start them again."""
    error = DivergedError("in epoch 1: from step 25 on the loss is no finite number")
    trained = SimpleNamespace(fit=lambda: SimpleNamespace(return_value=error))
    monkeypatch.setattr(task, "Trainer", lambda *_, **__: trained)
    with pytest.raises(DivergedError, match="from step 25 on"):
        train.train_model(small("d"), "/tmp/run", Feed(8, {}), None, None)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (BundleError("no such layer"), "no such layer"),
        (
            OSError("When reading: AWS Error UNKNOWN; Details: 7"),
            "s3://b/run/checkpoints: .* UNKNOWN$",
        ),
        (WorkerCrashedError(), "is gone .*; run the same command again to resume$"),
        (
            WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError()),
            "is gone .*; run the same command again to resume$",
        ),
        (ValueError("ours"), "Training failed"),
        (GetTimeoutError("Ray's own, and an OSError"), "Training failed"),
    ],
)
def test_errors_for_the_user_that_end_a_training_are_short(fault, told):
    for error in (WorkerGroupError("trace", {0: ValueError("peer"), 1: fault}), ControllerError(fault)):
        assert re.search(told, str(train.for_people(error, "s3://b/run")))
