"""No server, whatever it does, ends or delays a job: it costs one line."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from bcd import storage
from bcd.runtime.tracking import follow
from bcd.runtime.tracking.follow import followed
from bcd.runtime.tracking.mirror import Mirror
from tests import pictures
from tests.cluster import ROOT, free_port, listens, wait_for
from tests.runtime.tracking import made

# Of a test on a slow machine: much less than what a job would wait for.
SOON_S = 60


@pytest.fixture
def client(tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "LOOK_S", 0.05)
    monkeypatch.setattr(follow, "EARLY_S", SOON_S)
    return made.of_files(tmp_path / "mlruns", monkeypatch)


def only_run(client):
    (experiment,) = client.search_experiments(filter_string="name = 'bcd'")
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def warnings_of(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]


def test_nothing_happens_without_the_variable(tmp_path, monkeypatch):
    monkeypatch.delenv(follow.VARIABLE, raising=False)
    monkeypatch.setattr(follow, "Follower", None)
    with followed(str(tmp_path), "first"):
        made.begun(str(tmp_path))
    assert not storage.exists(f"{tmp_path}/mlflow.json")


def test_a_missing_package_costs_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(follow.VARIABLE, "http://127.0.0.1:1")
    monkeypatch.setattr(follow, "find_spec", lambda name: None)
    with followed(str(tmp_path), "first"):
        pass
    (line,) = warnings_of(capsys)
    assert line.endswith("pip install mlflow-skinny")


def test_a_job_is_logged_while_it_runs(client, tmp_path, capsys):
    uri = str(tmp_path / "run")
    with followed(uri, "first"):
        made.begun(uri, 1)
        wait_for(lambda: storage.exists(f"{uri}/mlflow.json"), SOON_S, "the run")
        wait_for(lambda: "train_loss" in only_run(client).data.metrics, SOON_S, "the first epoch")
        assert only_run(client).info.status == "RUNNING"
        made.finished(uri)
    run = only_run(client)
    assert (run.info.status, run.data.metrics["auc"]) == ("FINISHED", 0.9)
    assert warnings_of(capsys) == []


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_job_that_ends_early_says_so_and_its_folds_too(client, tmp_path, error, status):
    uri = str(tmp_path / "run")
    folds = {"fold 1": f"{uri}/case/repeat-1-fold-1", "fold 2": f"{uri}/case/repeat-1-fold-2"}
    made.study(uri)
    made.begun(folds["fold 1"])
    made.finished(folds["fold 2"])
    with pytest.raises(error), followed(uri, "study", folds):
        raise error
    (experiment,) = client.search_experiments(filter_string="name = 'bcd'")
    found = {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}
    assert found == {"study": status, "fold 1": status, "fold 2": "FINISHED"}


def test_whatever_is_raised_costs_one_line_and_is_tried_again(client, tmp_path, monkeypatch, capsys):
    uri, update, raised = str(tmp_path / "run"), Mirror.update, [RuntimeError("a\nb"), MemoryError()]

    def failing(self, *given):
        if raised:
            raise raised.pop(0)
        update(self, *given)

    monkeypatch.setattr(Mirror, "update", failing)
    with followed(uri, "first"):
        made.begun(uri, 1)
        wait_for(lambda: storage.exists(f"{uri}/mlflow.json"), SOON_S, "the run")
        made.finished(uri)
    assert only_run(client).info.status == "FINISHED"
    (line,) = warnings_of(capsys)
    assert line == "warning: MLflow: a: the job continues, and tries again until its end"


@contextmanager
def refusing():
    """A server that answers everything with an error of its own."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(500)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *given):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@contextmanager
def silent():
    """A server that accepts connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def dead():
    yield free_port()


@pytest.mark.parametrize("server", [dead, refusing, silent])
def test_a_server_that_does_not_work_costs_one_line(server, client, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(follow.DEFAULTS, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    for variable in follow.DEFAULTS:
        monkeypatch.delenv(variable, raising=False)
    with server() as port:
        monkeypatch.setenv(follow.VARIABLE, f"http://someone:secret@127.0.0.1:{port}")
        made.finished(f"{tmp_path}/run")
        started = time.monotonic()
        with followed(f"{tmp_path}/run", "first"):
            pass
        assert time.monotonic() - started < SOON_S
    (line,) = warnings_of(capsys)
    assert str(port) in line
    assert "secret" not in line


def test_a_server_that_is_slow_is_waited_for_so_long_and_no_longer(client, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(follow, "END_S", 0.1)
    held = threading.Event()
    monkeypatch.setattr(Mirror, "update", lambda *given: held.wait(SOON_S))
    with followed(str(tmp_path), "first"):
        pass
    assert not held.is_set()
    held.set()
    (line,) = warnings_of(capsys)
    assert "MLflow: not done within 0 s: the job ends" in line


LOADED = """
import sys
sys.modules["ray"] = None  # an import of it fails
import mlflow
found = mlflow.pyfunc.load_model(sys.argv[1], suppress_warnings=True).predict([sys.argv[2]])
print(found["predicted_class"][0])
"""


@pytest.mark.process
def test_a_real_server_has_the_run_and_its_model_loads_without_ray(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    pytest.importorskip("alembic", reason="what MLflow's server needs is not installed")
    uri, port = str(tmp_path / "run"), free_port()
    made.finished(uri, made.bundle_in(tmp_path / "bundle"))
    (tmp_path / "a.png").write_bytes(pictures.encode(pictures.gradient()))
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    variables = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    monkeypatch.setenv(follow.VARIABLE, f"http://127.0.0.1:{port}")
    server = subprocess.Popen(command, env=os.environ | variables, start_new_session=True, cwd=tmp_path)
    try:
        wait_for(lambda: listens(port), 300, "MLflow's server")
        with followed(uri, "first"):
            pass
        run_id = json.loads((tmp_path / "run/mlflow.json").read_text())["run_id"]
        from mlflow import MlflowClient

        run = MlflowClient().get_run(run_id)
        assert (run.info.status, run.data.metrics["auc.low"]) == ("FINISHED", 0.7)
        assert run.data.tags["model_id"] == made.MEASURED["model_id"]
        arguments = [sys.executable, "-c", LOADED, f"runs:/{run_id}/model", str(tmp_path / "a.png")]
        loaded = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
        assert loaded.stdout.split()[-1] in ("benign", "malignant")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
