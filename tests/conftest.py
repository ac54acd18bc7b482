"""Fixtures shared by all tests: the real data, a real S3 server, a real Ray cluster, a synthetic tree.

Each server is a process of its own, started once for all tests that need it; tests that need none stay fast.
"""

import importlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow.fs
import pytest
from xdist.scheduler import LoadScopeScheduling

from bcd import storage
from bcd.config import log
from bcd.data import synthetic
from bcd.data.stores import schemes
from bcd.serving import middleware
from tests import hub as hub_server
from tests.cluster import BIN, CLUSTER_CPUS, Cluster, free_port, kill, listens, processes, start_ray, wait_for
from tests.hub import Hub

# Ray reads these when it is imported: the cluster asks for this token, and every client here has it.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process less for every training

# Modules of OpenVINO, which cannot be imported twice.
_openvino: dict[str, ModuleType] = {}


class Halves(LoadScopeScheduling):
    """Of two processes (`-n 2`) one runs every file with tests that need Ray, which share a cluster; the
    other runs the rest, a file at a time, so that what its tests share is made once."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if "pytest.mark.ray" in Path(self.config.rootpath, file).read_text("utf-8") else file

    def remove_node(self, node: Any) -> str | None:
        """The test with which a process ended. xdist (3.8) would run it again, until no process is left."""
        for tests in self.assigned_work[node].values():
            for test, done in tests.items():
                if not done:
                    tests[test] = True
                    super().remove_node(node)
                    return test
        super().remove_node(node)
        return None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """xdist's own groups (3.8) do not know the node ids of pytest 9."""
    return Halves(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In one process the fast tests come first: a slip shows before a cluster starts. Of several one begins
    with those that need Ray, which take longest. Whatever asks for the S3 server is marked as such."""
    for item in items:
        if "s3" in getattr(item, "fixturenames", ()):
            item.add_marker("process")
    first = bool(os.environ.get("PYTEST_XDIST_WORKER"))
    items.sort(key=lambda item: ("pytest.mark.ray" in item.path.read_text("utf-8")) != first)


@pytest.fixture(autouse=True)
def lines() -> None:
    """Print the log of a job as text."""
    log.start("test")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real images, folds and weights; tests that need it skip where it is not given."""
    folder = os.environ.get("BCD_REAL_DATA")
    if not folder:
        pytest.skip("BCD_REAL_DATA is not set: no real BreaKHis images, folds and weights to test with")
    return Path(folder)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URI of a bucket on a moto server, reached by the real wire protocol through the AWS variables."""
    port = free_port()
    server = subprocess.Popen(
        [BIN / "moto_server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        wait_for(lambda: listens(port), 60, "the S3 server")
        pyarrow.fs.S3FileSystem(
            endpoint_override=f"127.0.0.1:{port}",
            scheme="http",
            region="us-east-1",
            allow_bucket_creation=True,
        ).create_dir("bucket")
        yield "s3://bucket"
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, which `hf://` is, without a token."""
    with hub_server.listening() as found:
        monkeypatch.setattr(schemes, "_clients", {})
        monkeypatch.setenv("HF_TOKEN", "")
        with suppress(ImportError):
            constants = importlib.import_module("huggingface_hub.constants")
            # Read from HF_ENDPOINT and HF_HUB_DISABLE_XET when it was imported.
            template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, found.endpoint)
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
            monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield found


@pytest.fixture
def openvino(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The package, for a test and the processes that it starts.

    It is installed beside the environment, or `--engine auto` would choose it in every other test.
    """
    folder = str(Path(sys.prefix) / "openvino")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", folder, prepend=os.pathsep)
    for name, module in _openvino.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield pytest.importorskip("openvino", reason="make env")
    _openvino.update({name: sys.modules[name] for name in [*sys.modules] if name.startswith("openvino")})
    for name in _openvino:
        del sys.modules[name]


@pytest.fixture(scope="session")
def cluster(s3: str) -> Iterator[Cluster]:
    """A Ray cluster as a process of its own: its GCS address and the URL for `ray job submit`.

    Depends on the S3 server so that the variables that reach it stand in the environment of every worker.
    """
    gcs, dashboard = free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="bcd-ray-", dir="/tmp")
    marker = f"BCD_TEST_CLUSTER={uuid.uuid4().hex}"
    arguments = ["--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    arguments += [f"--num-cpus={CLUSTER_CPUS}", f"--temp-dir={folder}", f"--object-store-memory={10**9}"]
    # Imported here: the fast tests do without Ray, and what hands the tests out does without a model.
    from bcd.runtime.cluster import MODEL_VARIABLES
    from tests.service import LIMITS, TOKEN

    # As on a cluster that a job starts: processes that have started become those of models.
    before = {name: os.environ.get(name) for name in MODEL_VARIABLES}
    os.environ.update(MODEL_VARIABLES)
    # The service's HTTP proxy takes token and limits from here.
    head = start_ray(
        arguments,
        marker,
        **{middleware.TOKEN_VARIABLE: TOKEN, middleware.PROXY_VARIABLE: middleware.PROXY_CALLBACK},
        **{middleware.LIMITS_VARIABLE: LIMITS.model_dump_json()},
    )
    try:
        wait_for(lambda: listens(dashboard) and listens(gcs), 120, "the Ray cluster")
        os.environ["RAY_ADDRESS"] = f"127.0.0.1:{gcs}"
        yield Cluster(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", head.pid, marker)
    finally:
        import ray

        ray.shutdown()
        os.environ.pop("RAY_ADDRESS", None)
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        # By force and by id: Ray's own way out takes half a minute.
        head.kill()
        head.wait()
        wait_for(lambda: not kill(processes(head.pid, marker)), 60, "the end of the Ray cluster")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def joined(cluster: Cluster) -> Cluster:
    """The test's own process joined to the cluster."""
    # Imported here: the fast tests do without Ray.
    from bcd.runtime import cluster as ray_cluster

    ray_cluster.connect()
    return cluster


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small synthetic BreaKHis tree on disk: 8 subtypes, 3 patients each."""
    root = tmp_path_factory.mktemp("synthetic")
    plan = synthetic.PatientPlan(
        patients_per_subtype=3,
        images_per_magnification=1,
        magnifications=(40, 200),
        height_px=92,
        width_px=140,
    )
    synthetic.write_tree(root, plan)
    return str(root / "BreaKHis_v1")


@pytest.fixture(scope="session")
def trained(cluster: Cluster, tree_on_s3: str, s3: str) -> Any:
    """The one training that many tests look at: see `tests.trained`."""
    # Imported here: the fast tests do without Ray.
    from tests.trained import trained_by_a_job

    return trained_by_a_job(cluster, tree_on_s3, f"{s3}/runs")


@pytest.fixture(scope="session")
def tree_on_s3(tree: str, s3: str) -> str:
    """The same tree on the S3 server."""
    storage.upload_folder(Path(tree), f"{s3}/synthetic")
    return f"{s3}/synthetic"
