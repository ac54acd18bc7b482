"""Done when 5: who has no token can submit nothing, read nothing, join nothing."""

import os
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from tests.cluster import BIN, wait_for
from tests.cluster.hosts import GCS_PORT

pytestmark = pytest.mark.ray
NOBODY = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}
WRONG = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}


@pytest.fixture(
    params=[pytest.param(NOBODY, id="none", marks=pytest.mark.trial), pytest.param(WRONG, id="wrong")]
)
def stranger(request, tmp_path):
    """Environment of somebody without the token, nor a file that has it."""
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
def test_the_dashboard_shows_nothing(hosts, path):
    url = f"{hosts.dashboard}{path}"
    assert status(url, os.environ["RAY_AUTH_TOKEN"]) not in (401, 403)
    assert status(url) == 401
    assert status(url, "0" * 64) == 403


def test_no_job_is_taken(hosts, stranger, tmp_path):
    command = [BIN / "ray", "job", "submit", f"--address={hosts.dashboard}", "--", "touch", tmp_path / "ran"]
    done = subprocess.run(
        command, env=os.environ | stranger, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode != 0
    assert "token" in done.stdout + done.stderr
    assert not (tmp_path / "ran").exists()


def test_no_driver_is_taken(hosts, stranger):
    """On a host of the cluster itself, where somebody has a shell but no token."""
    code = f"import ray; ray.init('{hosts.head.address}:{GCS_PORT}'); print('in', ray.nodes())"
    process = hosts.head.start([sys.executable, "-c", code], **stranger)
    wait_for(lambda: process.poll() is not None, 120, "the refusal")
    log = hosts.head.log_of(process)
    assert process.returncode != 0, log
    assert "in [" not in log
    assert "nauthenticated" in log or "token" in log


def test_no_host_joins(hosts, stranger):
    before = hosts.alive()
    hosts.two.start_ray(f"--address={hosts.head.address}:{GCS_PORT}", "--num-cpus=2", **stranger)
    process = hosts.two.started[-1]
    wait_for(lambda: process.poll() is not None, 120, "the refusal")
    assert process.returncode != 0
    assert hosts.alive() == before
    hosts.two.lose()
