"""What a training worker is given, its process group, and what starts it; without the loop, which drivers do
not need."""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from bcd.config.training import TrainConfig
from bcd.model.recipes.reference import Macenko, Reinhard


@dataclass(frozen=True)
class Task:
    """Arguments of a worker."""

    config: TrainConfig
    classes: tuple[str, ...]
    weights: ray.ObjectRef | None
    run_uri: str
    n_train: int
    runs_per_node: int = 1
    listed: ray.ObjectRef | None = None
    """`feed.Listed`, unless the rows are streamed."""
    started: float = 0.0
    """When the job started, in seconds since 1970."""
    class_weights: tuple[float, ...] | None = None
    """Of the loss, in the order of the classes."""
    stain: Macenko | Reinhard | None = None
    """The stain that images are normalised to."""
    validates: bool = True
    """Whether there are validation rows, which choose the best epoch; without them it is the last."""


def interface(address: str) -> str | None:
    """Name of the network interface that has an IPv4 or IPv6 address; None if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        families = (socket.AF_INET, socket.AF_INET6)
        # A link-local address is followed by % and its interface.
        if any(a.family in families and a.address.partition("%")[0] == address for a in addresses):
            return name
    return None


def _use_address_of_node() -> None:
    if name := interface(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_use_address_of_node)
        super().on_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        # Of a worker that is lost, which is why the others are shut down, Ray Train would log a stack trace.
        with suppress(RayActorError):
            super().on_shutdown(worker_group, backend_config)


@dataclass
class ProcessGroup(TorchConfig):
    """Torch's process group over the addresses by which Ray knows the nodes; GLOO_SOCKET_IFNAME has priority.

    Gloo would use the address of the host's name, which on Debian and Ubuntu is one of loopback: workers on
    two such hosts search for each other on themselves, and training fails with "Connection refused".
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class Trainer(TorchTrainer):
    """Ray's trainer, which frees the CPUs of a training whose controller is lost only where the cluster
    outlives the training: `cluster_ends`, if it does not (decision page 14)."""

    def __init__(self, *given: Any, cluster_ends: bool, **named: Any) -> None:
        super().__init__(*given, **named)
        self._cluster_ends = cluster_ends

    def _create_default_callbacks(self) -> list[Any]:
        created = super()._create_default_callbacks()
        if not self._cluster_ends:
            return created
        return [one for one in created if not isinstance(one, PlacementGroupCleanerCallback)]
