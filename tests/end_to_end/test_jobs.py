"""The doors, as people use them: `ray job submit` to a cluster of its own, S3, real images, SIGKILL."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from bcd import errors, storage
from tests import faults, policies
from tests.cluster import PATIENCE_S, finish, finished, kill, read_json, start_job, submit, wait_for
from tests.trained import check_whole, wait_for_epoch

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def data(s3, request):
    """Real images on S3 where they are at hand, else synthetic ones."""
    if not os.environ.get("BCD_REAL_DATA"):
        storage.upload_folder(Path(request.getfixturevalue("tree")), f"{s3}/jobs-data")
        return f"{s3}/jobs-data"
    real = request.getfixturevalue("real_data")
    storage.upload_folder(real / "breakhis/BreaKHis_v1", f"{s3}/BreaKHis_v1")
    return f"{s3}/BreaKHis_v1"


def train_arguments(data, s3, name, *more):
    size = ("--input-height-px", "64", "--input-width-px", "96", "--batch-size", "16", "--epochs", "3")
    size += ("--architecture", "resnet18", "--weights", "none")
    # SGD: its checkpoints are half the size, and the S3 server is written in Python.
    size += ("--optimizer", "sgd", "--learning-rate", "0.01")
    return (
        "jobs/train.py",
        "--data",
        data,
        "--output",
        f"{s3}/jobs",
        "--name",
        name,
        *size,
        *more,
    )


@pytest.mark.trial
def test_a_killed_worker_costs_at_most_its_epoch(cluster, data, s3):
    """Done when 3: one of two workers is SIGKILLed in epoch 2; the run finishes by itself."""
    client = JobSubmissionClient(cluster.dashboard)
    run_uri = f"{s3}/jobs/worker-killed"
    job = submit(cluster, *train_arguments(data, s3, "worker-killed", "--num-workers", "2"))
    wait_for_epoch(client, job, run_uri, 1)
    workers = [pid for pid, command in cluster.processes() if "ray::RayTrainWorker" in command]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    status, log = finish(client, job)
    assert status == JobStatus.SUCCEEDED, log
    assert log.count("epoch 1/3") == 1
    check_whole(run_uri, 3)


@pytest.mark.trial
@pytest.mark.parametrize("process", ["TrainController", "RayTrainWorker"])
def test_a_process_that_is_lost_for_good_is_a_sentence_and_the_job_resumes(process, cluster, data, s3):
    run_uri = f"{s3}/jobs/lost-{process}"
    arguments = train_arguments(data, s3, f"lost-{process}", "--num-workers", "1", "--max-failures", "0")
    job = start_job(*arguments)
    kept = f"{run_uri}/checkpoints/checkpoint_manager_snapshot.json"
    wait_for(lambda: storage.exists(kept), PATIENCE_S, "epoch 1")
    assert kill(cluster.processes(), f"ray::{process}") == 1
    log, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 1, log
    assert "Traceback" not in log
    (said,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert said.startswith(f"error: {process}, a process of this job, is gone")
    assert said.endswith("run the same command again to resume")
    log = finished(start_job(*arguments))
    assert "epoch 1/3" not in log
    check_whole(run_uri, 3)


# What is asked of a store: in the second epoch by Ray Train, and in the end for the report, in a task of Ray.
ASKED = {"checkpoints": "/checkpoints/checkpoint_", "figures": "/figures/"}


@pytest.mark.trial
@pytest.mark.parametrize("moment", ASKED)
def test_credentials_that_expire_cost_at_most_the_running_epoch(moment, cluster, data, s3):
    """Done when 6: a sentence, and the same command resumes."""
    run_uri = f"{s3}/jobs/expired-{moment}"
    arguments = train_arguments(data, s3, f"expired-{moment}", "--num-workers", "1", "--max-failures", "1")
    with faults.store(os.environ["AWS_ENDPOINT_URL"]) as store:
        expired = False

        def answer(method, path):
            nonlocal expired
            kept = f"{run_uri}/checkpoints/checkpoint_manager_snapshot.json"
            expired = expired or (ASKED[moment] in path and storage.exists(kept))
            return faults.EXPIRED if expired else None

        store.fault = answer
        job = start_job(*arguments, **store.variables)
        log, _ = job.communicate(timeout=PATIENCE_S)
        assert job.returncode == 2, log
        assert log.splitlines()[-1].startswith(f"error: {run_uri}/{moment}")
        assert log.splitlines()[-1].endswith(errors.ASK_AGAIN)
        store.fault = lambda method, path: None
        log = finished(start_job(*arguments, **store.variables))
    assert "epoch 1/3" not in log
    check_whole(run_uri, 3)


@pytest.mark.trial
def test_a_store_on_a_bad_day_costs_a_training_time_only(cluster, data, s3):
    """Done when 6: every epoch is one step of all rows, so that both see the same batches."""
    same = ("--num-workers", "1", "--batch-size", "256", "--no-augment", "--precision", "float32")
    started = time.monotonic()
    finished(start_job(*train_arguments(data, s3, "good-day", *same)))
    between = time.monotonic()
    with faults.store(os.environ["AWS_ENDPOINT_URL"]) as store:
        store.fault, store.delay_s = faults.bad_day(), 0.02
        finished(start_job(*train_arguments(data, s3, "bad-day", *same), **store.variables))
        assert len(store.asked) > 400
        assert policies.used(store.asked) <= policies.actions("s3-jobs.json")
    print(f"{between - started:.0f} s on a good day, {time.monotonic() - between:.0f} s on a bad one")
    check_whole(f"{s3}/jobs/bad-day", 3)
    good, bad = (read_json(f"{s3}/jobs/{name}/history.json") for name in ("good-day", "bad-day"))
    for one, other in zip(good, bad, strict=True):
        assert other["class_counts"] == one["class_counts"]
        assert other["train_loss"] == pytest.approx(one["train_loss"], abs=1e-3)
        assert other["validation_loss"] == pytest.approx(one["validation_loss"], abs=1e-3)


def test_a_wrong_command_fails_with_one_sentence(cluster, s3):
    job = start_job("jobs/train.py", "--data", f"{s3}/nothing-here", "--weights", "none", "--output", s3)
    log, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 2
    assert "error: s3://bucket/nothing-here: there is no such folder; check the path or bucket name" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("job", sorted(path.name for path in (ROOT / "jobs").glob("*.py")))
def test_help_shows_the_exact_command(job):
    done = subprocess.run(
        [sys.executable, f"jobs/{job}", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"-- python jobs/{job}" in " ".join(done.stdout.split())
