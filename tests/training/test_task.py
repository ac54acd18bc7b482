import socket

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from bcd.training import task
from bcd.training.task import Trainer, interface


def test_an_interface_is_found_by_its_address():
    """Workers on several hosts use it: see `tests/cluster`."""
    names = {name for _, name in socket.if_nameindex()}
    assert interface("127.0.0.1") in names
    assert interface("192.0.2.1") is None


@pytest.mark.parametrize("cluster_ends", [True, False])
def test_cpus_of_a_lost_training_are_freed_where_its_cluster_continues(cluster_ends):
    """All of Ray's callbacks, and this one only there: without a dashboard it would warn every second."""
    given = {"scaling_config": ScalingConfig(num_workers=1)}
    ray_has, ours = (
        [type(one).__name__ for one in trainer._create_default_callbacks()]
        for trainer in (TorchTrainer(print, **given), Trainer(print, cluster_ends=cluster_ends, **given))
    )
    assert "PlacementGroupCleanerCallback" in ray_has
    assert ours == [name for name in ray_has if name != "PlacementGroupCleanerCallback" or not cluster_ends]


def test_shutting_down_beside_a_lost_worker_is_quiet(monkeypatch):
    """Ray Train would log what this raises with its stack trace, and continue."""
    asked = []

    def ask(*given):
        asked.append(given)
        raise ActorDiedError

    monkeypatch.setattr(task._TorchBackend, "on_shutdown", ask)
    task._Backend().on_shutdown([], task.ProcessGroup())
    assert len(asked) == 1
