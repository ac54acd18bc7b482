"""Ray between two hosts by TLS, with the certificates that the init container of deploy/ makes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import PATIENCE_S, wait_for
from tests.cluster.hosts import GCS_PORT, Host, network, why_not
from tests.house.test_deploy import DEPLOY, SHOWN

pytestmark = [pytest.mark.ray, pytest.mark.trial]
# The name by which workers call the head on Kubernetes.
HEAD_NAME = "bcd-head-svc.here.svc.cluster.local"
# An object that is made on the worker, and read in pieces by the driver on the head.
DRIVER = """
import ray
ray.init(address="auto", logging_level="ERROR")
nodes = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
made = ray.remote(num_cpus=1)(lambda: bytes(20_000_000)).remote()
print("hosts", len(nodes), "bytes", len(ray.get(made, timeout=60)))
"""


def certificate(host: Host, kind: str, authority: Path) -> dict[str, str]:
    """The variables with which a host shows a certificate for its address."""
    folder = authority / host.name
    folder.mkdir()
    made = {"POD_IP": host.address, "FQ_RAY_IP": HEAD_NAME, "CA": str(authority), "TLS": str(folder)}
    subprocess.run(["bash", DEPLOY / "certificate.sh", kind], env=os.environ | made, check=True)
    files = {"SERVER_CERT": "tls.crt", "SERVER_KEY": "tls.key", "CA_CERT": "ca.crt"}
    return {"RAY_USE_TLS": "1"} | {f"RAY_TLS_{name}": str(folder / file) for name, file in files.items()}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the certificate authority, made as the documentation shows."""
    folder = tmp_path_factory.mktemp("authority")
    (request,) = [line for line in SHOWN if line.startswith("openssl req")]
    subprocess.run(["bash", "-c", request], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def hosts(authority: Path) -> Iterator[tuple[Host, Host, dict[str, str]]]:
    """A head and a worker by TLS, and the variables of the head."""
    if reason := why_not():
        pytest.skip(f"several hosts cannot be had here: {reason}")
    with network(("head", "one")) as found:
        head, one = found["head"], found["one"]
        own = certificate(head, "head", authority)
        head.start_ray("--head", f"--port={GCS_PORT}", "--num-cpus=0", "--include-dashboard=false", **own)
        wait_for(lambda: head.listens(GCS_PORT), PATIENCE_S, "the head")
        worker = certificate(one, "worker", authority)
        one.start_ray(f"--address={head.address}:{GCS_PORT}", "--num-cpus=1", **worker)
        yield head, one, own


def health(head: Host, **variables: str) -> int:
    """Exit code of Ray's own question to the head, with which pods of KubeRay wait for it."""
    asked = head.start(["ray", "health-check", "--address", f"{head.address}:{GCS_PORT}"], **variables)
    return asked.wait(PATIENCE_S)


def test_two_hosts_work_together(hosts):
    head, _, own = hosts

    def done() -> bool:
        driver = head.start([sys.executable, "-c", DRIVER], **own, RAY_ADDRESS=f"{head.address}:{GCS_PORT}")
        driver.wait(PATIENCE_S)
        return "hosts 2 bytes 20000000" in head.log_of(driver)

    wait_for(done, PATIENCE_S, "work of the second host")


def test_who_has_no_certificate_of_the_authority_is_refused(hosts, tmp_path):
    head, one, own = hosts
    assert health(head, **own) == 0
    assert health(head) != 0
    (request,) = [line for line in SHOWN if line.startswith("openssl req")]
    subprocess.run(["bash", "-c", request], cwd=tmp_path, check=True, capture_output=True)
    assert health(head, **certificate(one, "worker", tmp_path)) != 0


def test_a_certificate_for_another_address_is_refused(hosts, authority):
    """The head has one for its own; asked by another of its names that is not in it, Ray hangs up."""
    head, _, own = hosts
    second = "198.18.0.77"
    subprocess.run(["ip", "-n", head.name, "addr", "add", f"{second}/24", "dev", "eth0"], check=True)
    asked = head.start(["ray", "health-check", "--address", f"{second}:{GCS_PORT}"], **own)
    assert asked.wait(PATIENCE_S) != 0
