"""Without the cluster's token nothing can be submitted or read, and no driver or host joins."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
import uuid

import pytest
import ray

from tests.cluster import BIN, PATIENCE_S, start_ray, wait_for

pytestmark = pytest.mark.ray
NOBODY = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}
WRONG = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}


@pytest.fixture(
    params=[pytest.param(NOBODY, id="none", marks=pytest.mark.trial), pytest.param(WRONG, id="wrong")]
)
def unauthenticated(request, tmp_path):
    """Environment without the token, and without a file that has it."""
    return request.param | {"HOME": str(tmp_path)}


def status(url, token=""):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


READ = (
    "/api/jobs/",
    "/api/version",
    "/api/v0/nodes",
    "/api/v0/actors",
    "/nodes?view=summary",
    "/api/v0/logs",
)
READ += ("/api/cluster_status", "/api/serve/applications/", "/events", "/logical/actors")


@pytest.mark.parametrize("path", READ)
def test_the_dashboard_requires_the_token(cluster, path):
    url = f"{cluster.dashboard}{path}"
    assert status(url, os.environ["RAY_AUTH_TOKEN"]) not in (401, 403)
    assert status(url) == 401
    assert status(url, "0" * 64) == 403


def test_a_job_without_the_token_is_rejected(cluster, unauthenticated, tmp_path):
    command = [
        BIN / "ray",
        "job",
        "submit",
        f"--address={cluster.dashboard}",
        "--",
        "touch",
        tmp_path / "ran",
    ]
    done = subprocess.run(
        [*command, tmp_path / "ran"],
        env=os.environ | unauthenticated,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "token" in done.stdout + done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_driver_without_the_token_is_rejected(cluster, unauthenticated, tmp_path):
    """On a host of the cluster itself, where somebody has a shell but no token."""
    code = f"import ray; ray.init('{cluster.gcs}'); print('joined', ray.nodes())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | unauthenticated,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=PATIENCE_S,
    )
    log = done.stdout + done.stderr
    assert done.returncode != 0, log
    assert "joined [" not in log
    assert "nauthenticated" in log or "token" in log


@pytest.mark.trial
def test_a_host_without_the_token_does_not_join(cluster, joined, unauthenticated):
    before = {node["NodeID"] for node in ray.nodes()}
    host = start_ray([f"--address={cluster.gcs}"], f"BCD_TEST_NODE={uuid.uuid4().hex}", **unauthenticated)
    wait_for(lambda: host.poll() is not None, PATIENCE_S, "the refusal")
    assert host.returncode != 0
    assert {node["NodeID"] for node in ray.nodes()} == before
