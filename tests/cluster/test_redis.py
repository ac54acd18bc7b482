"""A service whose GCS keeps its state in Redis answers without its head, and with a new one (decision 9)."""

import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from bcd.model import predictor
from bcd.serving import middleware
from tests import pictures
from tests.cluster import BIN, PATIENCE_S, ROOT, wait_for
from tests.cluster.hosts import DASHBOARD_PORT, GCS_PORT, Host, network, why_not
from tests.model.test_bundle import card, untrained
from tests.service import TOKEN

pytestmark = [pytest.mark.ray, pytest.mark.trial]
# What KubeRay sets where `gcsFaultToleranceOptions` are given.
PATIENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
OUTAGE_S = 45


@dataclass
class Service:
    """The head, the host of the replica, and what both need in their environment."""

    head: Host
    replica: Host
    redis: Host

    def start_head(self) -> None:
        """Start the head, or a new one in its place."""
        self.head.start_ray(
            *("--head", f"--port={GCS_PORT}", "--num-cpus=0", "--redis-password=secret"),
            *(f"--dashboard-host={self.head.address}", f"--dashboard-port={DASHBOARD_PORT}"),
            **self.variables,
            RAY_REDIS_ADDRESS=f"{self.redis.address}:6379",
            RAY_external_storage_namespace="service",
        )
        wait_for(lambda: self.head.listens(DASHBOARD_PORT), PATIENCE_S, "the head")

    @property
    def variables(self) -> dict[str, str]:
        """As in rayservice.yaml."""
        return {
            middleware.TOKEN_VARIABLE: TOKEN,
            middleware.PROXY_VARIABLE: middleware.PROXY_CALLBACK,
            "PYTHONPATH": str(ROOT),
        }

    def ask(self) -> int:
        """Status of an answer to an image; 0 where there is none."""
        try:
            return httpx.post(
                f"http://{self.replica.address}:8000/v1/predict",
                content=pictures.encode(pictures.gradient()),
                headers={"Authorization": f"Bearer {TOKEN}"},
                timeout=30,
            ).status_code
        except httpx.TransportError:
            return 0


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """A service with one replica, on a host of its own."""
    if reason := why_not():
        pytest.skip(f"several hosts cannot be had here: {reason}")
    if not (server := shutil.which("redis-server")):
        pytest.skip("redis-server is missing")
    network_ = untrained(architecture="resnet18")
    predictor.save(network_, card(architecture="resnet18"), str(tmp_path / "model"))
    config = yaml.safe_load((ROOT / "serve.yaml").read_text(encoding="utf-8"))
    arguments = {"model": str(tmp_path / "model"), "min_replicas": 1, "max_replicas": 1, "num_gpus": 0}
    config["applications"][0]["args"] |= arguments
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with network(("head", "one", "redis")) as found:
        running = Service(found["head"], found["one"], found["redis"])
        running.redis.start(
            [
                server,
                "--bind",
                running.redis.address,
                "--requirepass",
                "secret",
                "--save",
                "",
                "--dir",
                "/tmp",
            ]
        )
        wait_for(lambda: running.redis.listens(6379), PATIENCE_S, "Redis")
        running.start_head()
        head = f"{running.head.address}:{GCS_PORT}"
        running.replica.start_ray(f"--address={head}", "--num-cpus=3", **running.variables, **PATIENT)
        url = f"http://{running.head.address}:{DASHBOARD_PORT}"
        deploy = [BIN / "serve", "deploy", "--address", url, tmp_path / "serve.yaml"]
        wait_for(lambda: not subprocess.run(deploy).returncode, PATIENCE_S, "the deployment")
        wait_for(lambda: running.ask() == 200, PATIENCE_S, "the first answer")
        yield running


def answers(service: Service, seconds: float) -> Counter[int]:
    """Status of the answers in some time."""
    found, until = Counter[int](), time.monotonic() + seconds
    while time.monotonic() < until:
        found[service.ask()] += 1
    return found


def test_a_service_answers_without_its_head(service):
    service.head.lose()
    without = answers(service, OUTAGE_S)
    service.start_head()
    again = answers(service, OUTAGE_S)
    print(f"{OUTAGE_S} s without a head: {dict(without)}; with a new one: {dict(again)}")
    assert without.keys() == again.keys() == {200}
    assert sum(without.values()) > OUTAGE_S / 10
