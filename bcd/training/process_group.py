"""Torch's process group of CPU workers, over the addresses by which Ray knows their nodes.

Gloo would use the address of the host's name, which on Debian and Ubuntu is one of loopback: workers on
two such hosts look for each other on themselves, and training fails with "Connection refused".
"""

import os
import socket
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

VARIABLE = "GLOO_SOCKET_IFNAME"


def interface(address: str) -> str | None:
    """Name of the network interface that has an IPv4 or IPv6 address; None where none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        families = (socket.AF_INET, socket.AF_INET6)
        # Behind % stands the interface of a link-local address.
        if any(a.family in families and a.address.partition("%")[0] == address for a in addresses):
            return name
    return None


def _use_address_of_node() -> None:
    if name := interface(ray.util.get_node_ip_address()):
        os.environ.setdefault(VARIABLE, name)


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_use_address_of_node)
        super().on_start(worker_group, backend_config)


@dataclass
class ProcessGroup(TorchConfig):
    """Ray's own configuration, but that workers first learn their network interface. What
    GLOO_SOCKET_IFNAME says on a node stays."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """Sets the group up."""
        return _Backend
