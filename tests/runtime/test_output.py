"""Whose an output folder is: nothing that something else wrote is replaced or deleted, here or on S3."""

import json

import pytest

from bcd import demo, storage
from bcd.audit import audit
from bcd.config.checks import AuditConfig
from bcd.config.evaluation import EvaluateConfig
from bcd.config.scoring import PoolConfig, ScoreConfig
from bcd.config.training import CrossvalConfig, DemoConfig, TrainConfig
from bcd.errors import ConfigError, DataError, StorageError
from bcd.evaluation import evaluate
from bcd.model import predictor
from bcd.runtime import cluster, output
from bcd.scoring import score
from bcd.training import crossval, train
from bcd.training.pooling import pool
from tests.model.test_bundle import card, untrained

# One file of each kind that a job writes, by the pattern of its path; ID is the id of the folder.
WRITTEN = {
    "train": "config.json run.json data.json history.json mlflow.json split.parquet "
    "exposure/epoch-0001.parquet tensorboard/events.out.tfevents.1 checkpoints/a/b.pt "
    "model/model.safetensors model/card.json model/README.md metrics.json test_images.parquet "
    "report.html figures/roc.svg figures/roc.png predictions/part-ID-w-000000.parquet",
    "crossval": "config.json run.json mlflow.json metrics.json report.html image/metrics.json "
    "image/figures/roc.png case/repeat-1-fold-2/config.json case/repeat-1-fold-2/checkpoints/x "
    "ensemble/split.parquet ensemble/model/card.json refit/run.json refit/model/model.sig",
    "evaluate": "metrics.json report.html test_images.parquet figures/roc.svg "
    "predictions/part-ID-w-000000.parquet",
    "score": "config.json summary.json slides.parquet inputs.parquet gallery.html slides/a/b.svs/heatmap.png "
    "slides/a/b.svs/tiles.geojson slides/a/b.svs/tiles.geojson.gz slides/a/b.svs/tissue.geojson "
    "slides/a/b.svs/tissue.jpg predictions/part-ID-0001-00000.parquet "
    "predictions/part-ID-0001-00000.parquet.0a1b.part work/0001/0123456789abcdef01234567.parquet "
    "work/0001/plans/0123456789abcdef01234567.json work/0001/plans/0123456789abcdef01234567.mask.png",
    "pool": "config.json run.json history.json metrics.json split.parquet slides.parquet attention.parquet "
    "slides/a/b.svs/attention.png checkpoints/a/b model/model.safetensors model/card.json",
    "audit": "audit.html audit.json images.parquet near_duplicates.parquet identifiers.parquet",
    "demo": "BreaKHis_v1/SYNTHETIC.txt BreaKHis_v1/histology_slides/breast/a.png archive/cut short.png "
    "archive/BreaKHis_v1/histology_slides/breast/a.png run/config.json scores/gallery.html",
}
JOBS = list(WRITTEN)


def fill(uri, owner, names):
    for name in names:
        storage.write_bytes(storage.join(uri, name.replace("ID", owner)), b"x")


def names_of(job):
    return WRITTEN[job].replace("cut short", "cut_short").split(" ")


@pytest.mark.parametrize("job", JOBS)
def test_an_empty_folder_is_claimed_and_then_the_jobs_own(job, tmp_path):
    uri = str(tmp_path / "out")
    assert output.read_marker(uri, job) is None
    owner = output.claim_folder(uri, job)
    fill(uri, owner, [name.replace("cut_short", "cut short") for name in names_of(job)])
    assert output.read_marker(uri, job) == output.claim_folder(uri, job) == owner
    assert output.owner(uri) == job
    assert json.loads((tmp_path / "out" / output.MARKER).read_text())["job"] == job


@pytest.mark.parametrize("job", JOBS)
def test_every_other_job_is_refused(job, tmp_path):
    output.claim_folder(str(tmp_path), job)
    for other in set(JOBS) - {job}:
        message = rf"belongs to jobs/{job}\.py; jobs/{other}\.py needs its own: choose another --output"
        with pytest.raises(ConfigError, match=message):
            output.claim_folder(str(tmp_path), other)
    assert output.owner(str(tmp_path)) == job


@pytest.mark.parametrize("name", ["notes.txt", "predictions/mine.csv", "a/b/c.parquet", "metrics.json"])
@pytest.mark.parametrize("job", JOBS)
def test_a_folder_that_no_job_wrote_is_refused(job, name, tmp_path):
    """Whatever the file is called: `metrics.json` of someone else is someone else's."""
    fill(str(tmp_path), "", [name, "z.txt"])
    with pytest.raises(ConfigError, match=rf"contains {name} \(and 1 other files\), and no record .*Move it"):
        output.claim_folder(str(tmp_path), job)
    assert not (tmp_path / output.MARKER).exists()
    assert (tmp_path / name).read_bytes() == b"x"


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "predictions/notes.txt",
        "predictions/part-0001-00000.parquet",
        "predictions/part-0123456789ab-0001-00000.parquet",
        "predictions.parquet",
        "figures/sub/roc.png",
        "work/0001/mine.parquet",
    ],
)
@pytest.mark.parametrize("job", ["train", "evaluate", "score"])
def test_a_strange_file_in_an_own_folder_is_named(job, name, tmp_path):
    """Such as a table copied from another output: it would be deleted, or counted as rows of this one."""
    output.claim_folder(str(tmp_path), job)
    fill(str(tmp_path), "", [name])
    with pytest.raises(ConfigError, match=rf"contains {name}, which it did not write: jobs/{job}\.py"):
        output.claim_folder(str(tmp_path), job)


@pytest.mark.parametrize("uri", ["hf://owner/name", "https://host/out", "az://container/out"])
def test_no_job_writes_where_nothing_is_written(uri):
    """Found before any request."""
    for job in output.FILES:
        with pytest.raises(
            StorageError, match="cannot write there: outputs are on a local path, s3://"
        ) as found:
            output.read_marker(uri, job)
        assert found.value.lasting


def test_prepared_images_have_a_folder_of_their_own(tmp_path):
    """Runs and evaluations share it; what a user calls a run must not be taken for it."""
    uri = str(tmp_path / "prepared")
    owner = output.claim_folder(uri, output.PREPARED)
    fill(uri, owner, ["224x336-v2/18ec84fb43c73603-7b68cfd4c183.rgb", "32x48-v2/0-1.parquet"])
    assert output.claim_folder(uri, output.PREPARED) == owner
    with pytest.raises(
        ConfigError, match=r"belongs to a store of prepared images; jobs/train\.py needs its own"
    ):
        output.claim_folder(uri, output.TRAIN)
    output.claim_folder(str(tmp_path / "run"), output.TRAIN)
    with pytest.raises(ConfigError, match=r"belongs to jobs/train\.py; .* choose another --prepared$"):
        output.claim_folder(str(tmp_path / "run"), output.PREPARED)


def test_hidden_files_and_notes_of_file_managers_are_passed_over(tmp_path):
    hidden = [".DS_Store", ".git/config", "Thumbs.db", "sub/desktop.ini", ".nfs0001"]
    fill(str(tmp_path), "", hidden)
    owner = output.claim_folder(str(tmp_path), "evaluate")
    storage.delete_files(str(tmp_path), f"part-{owner}-.*")
    assert all((tmp_path / name).read_bytes() == b"x" for name in hidden)


def test_a_prefix_of_a_store_is_a_folder(s3):
    output.claim_folder(f"{s3}/mine", "score")
    fill(f"{s3}/mine-too", "", ["a.png"])
    fill(f"{s3}/theirs", "", ["deep/below/a.png"])
    assert output.claim_folder(f"{s3}/mine", "score") == output.read_marker(f"{s3}/mine/", "score")
    with pytest.raises(ConfigError, match=r"s3://bucket/theirs contains deep/below/a.png, and no record"):
        output.claim_folder(f"{s3}/theirs", "audit")
    assert storage.exists(f"{s3}/theirs/deep/below/a.png")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"job": "score"}', b"\xff"])
def test_a_damaged_marker_proves_nothing(content, tmp_path):
    (tmp_path / output.MARKER).write_bytes(content)
    with pytest.raises(ConfigError, match=r"\.bcd-output\.json is damaged .* choose another --output"):
        output.claim_folder(str(tmp_path), "score")


def test_a_job_that_no_one_knows_is_no_owner(tmp_path):
    storage.write_bytes(str(tmp_path / output.MARKER), b'{"job": "later", "id": "1"}')
    with pytest.raises(ConfigError, match=r"belongs to jobs/later\.py"):
        output.read_marker(str(tmp_path), "train")


@pytest.fixture(scope="module")
def model_uri(tmp_path_factory):
    """A bundle in a folder of its own, in no run."""
    uri = str(tmp_path_factory.mktemp("models") / "model")
    predictor.save(untrained(), card(), uri)
    return uri


def start(job, model, tree, folder):
    """Run a job into a folder."""
    if job in ("train", "crossval"):
        config_type, run = (TrainConfig, train.run) if job == "train" else (CrossvalConfig, crossval.run)
        run(config_type(data=tree, output=str(folder.parent), name=folder.name, weights="none"))
    elif job == "evaluate":
        evaluate.run(EvaluateConfig(model=model, data=tree, output=str(folder)))
    elif job == "score":
        score.run(ScoreConfig(model=model, input=tree, output=str(folder)))
    elif job == "pool":
        pool.run(PoolConfig(scores=tree, model=model, output=str(folder.parent), name=folder.name))
    elif job == "audit":
        audit.run(AuditConfig(data=tree, output=str(folder)))
    else:
        demo.run(DemoConfig(output=str(folder)))


@pytest.mark.parametrize("job", JOBS)
def test_jobs_leave_what_is_not_theirs(job, model_uri, tree, tmp_path, monkeypatch):
    """Before Ray is started: someone's notes where a table would go, another job's output, an own folder."""
    monkeypatch.setattr(cluster, "connect", lambda **_: pytest.fail("Ray was started"))
    theirs, other, own = (tmp_path / name for name in ("theirs", "other", "own"))
    fill(str(theirs), "", ["predictions/notes.txt"])
    fill(str(other), output.claim_folder(str(other), "audit" if job == "score" else "score"), ["config.json"])
    output.claim_folder(str(own), job)
    fill(str(own), "", ["predictions/notes.txt"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refusals = {theirs: "notes.txt, and no record", other: r"belongs to jobs/", own: "did not write"}
    for folder, message in refusals.items():
        with pytest.raises(ConfigError, match=message):
            start(job, model_uri, tree, folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_evaluation_goes_beside_its_model_in_a_run_only(model_uri, tree):
    with pytest.raises(DataError, match=r"is not the directory of a training: name an --output"):
        evaluate.run(EvaluateConfig(model=model_uri, data=tree))
    with pytest.raises(DataError, match=r"is not the directory of a training: name an --output"):
        evaluate.run(EvaluateConfig(model=model_uri, data=tree, output=storage.parent(model_uri)))
    assert output.owner(storage.parent(model_uri)) is None
