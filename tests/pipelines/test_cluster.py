import os
import subprocess
import sys

import pytest
import ray

from bcd.config import TrainConfig
from bcd.errors import ResourceError
from bcd.pipelines import cluster
from tests.cluster import CLUSTER_CPUS, free_port


def fake(monkeypatch, cpus, gpus=0):
    monkeypatch.setattr(cluster, "capacity", lambda: {"CPU": float(cpus), "GPU": float(gpus)})


@pytest.mark.parametrize(
    ("have", "settings", "expected"),
    [
        ((2, 0), {}, (1, False)),
        ((8, 4), {}, (4, True)),
        ((8, 4), {"device": "cpu"}, (1, False)),
        ((8, 4), {"num_workers": "2"}, (2, True)),
        ((8, 0), {"num_workers": "2-6"}, ((2, 6), False)),
        ((3, 0), {"num_workers": "2-6"}, ((2, 6), False)),
    ],
)
def test_scaling_uses_what_is_there(monkeypatch, have, settings, expected):
    fake(monkeypatch, *have)
    scaling = cluster.scaling(TrainConfig(data="d", **settings))
    assert (scaling.num_workers, scaling.use_gpu) == expected


@pytest.mark.parametrize(
    ("have", "settings", "said"),
    [
        ((2, 0), {"num_workers": "2"}, "2 training workers and 1 CPU for reading images need 3 CPUs.*has 2"),
        ((1, 0), {}, "1 training workers and 1 CPU for reading images need 2 CPUs.*has 1"),
        ((64, 0), {"device": "gpu"}, "1 GPU workers asked for, but the cluster has 0 GPUs"),
        ((64, 2), {"num_workers": "4"}, "4 GPU workers asked for, but the cluster has 2 GPUs"),
        ((64, 2), {"num_workers": "3-8"}, "3 GPU workers asked for"),
    ],
)
def test_more_than_there_is_fails_at_once_with_the_numbers(monkeypatch, have, settings, said):
    fake(monkeypatch, *have)
    with pytest.raises(ResourceError, match=said):
        cluster.scaling(TrainConfig(data="d", **settings))


@pytest.mark.ray
def test_connect_joins_the_cluster_that_is_named(joined):
    assert ray.get_runtime_context().gcs_address.endswith(joined.gcs.partition(":")[2])
    assert cluster.capacity() == {"CPU": CLUSTER_CPUS, "GPU": 0}
    cluster.connect()
    assert ray.is_initialized()


DEAD = """
import types
from bcd import cli, config
from bcd.pipelines import cluster
cli.import_module = lambda name: types.SimpleNamespace(run=lambda config: cluster.connect())
cli.main(config.DemoConfig, "demo", None)
"""


def test_a_named_cluster_that_does_not_answer_is_an_error_and_not_replaced():
    environment = os.environ | {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
    done = subprocess.run(
        [sys.executable, "-c", DEAD], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "error: no Ray cluster answers at RAY_ADDRESS=127.0.0.1:" in done.stderr
