"""What is known of a cluster and its nodes: plain facts, gathered by `bcd.preflight.doctor`, judged by
`bcd.preflight.diagnosis`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

# find: look for one picture below a folder; see: read what another node wrote.
Action = Literal["find", "read", "write", "see", "delete", "load"]


@dataclass(frozen=True)
class Disk:
    """A file system, by a path on it."""

    path: str
    total_bytes: int
    free_bytes: int

    @property
    def used(self) -> float:
        """Share in use."""
        return 1 - self.free_bytes / max(1, self.total_bytes)


@dataclass(frozen=True)
class Machine:
    """What a node says of itself: package versions, memory within its container's limit, shared memory, the
    disks of Ray and of the slide cache, and the GPUs that torch can use."""

    versions: Mapping[str, str]
    memory_bytes: int
    free_memory_bytes: int
    shm_bytes: int
    ray_disk: Disk
    cache_disk: Disk
    torch_gpus: int


@dataclass(frozen=True)
class Attempt:
    """One try of a node to use what a flag names: how long it took, over how many bytes, or why it failed."""

    flag: str
    action: Action
    uri: str
    seconds: float = 0.0
    n_bytes: int = 0
    error: str = ""

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.n_bytes / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Clock:
    """By how many seconds a clock is ahead of ours, and how exactly that is known."""

    ahead_s: float = 0.0
    error_s: float = 0.0

    @property
    def surely_s(self) -> float:
        """Seconds by which it differs at least."""
        return max(0.0, abs(self.ahead_s) - self.error_s)

    @property
    def perhaps_s(self) -> float:
        """Seconds by which it differs at most."""
        return abs(self.ahead_s) + self.error_s


@dataclass(frozen=True)
class Node:
    """A node: what Ray knows of it, what it says of itself (None: nothing, and `trouble` tells why), and what
    it tried."""

    name: str
    cpus: float
    gpus: float
    object_store_bytes: int
    machine: Machine | None = None
    trouble: str = ""
    clock: Clock = Clock()
    attempts: tuple[Attempt, ...] = ()

    @property
    def works(self) -> bool:
        """Whether work can be scheduled on it; a head often has no CPU to offer."""
        return self.cpus + self.gpus > 0


@dataclass(frozen=True)
class Capacity:
    """CPUs and GPUs by kind: there, at most with what an autoscaler may add, free; what the job needs at
    least, the plan in words, or why the job would refuse to start."""

    there: Mapping[str, float]
    limit: Mapping[str, float]
    free: Mapping[str, float]
    needed: Mapping[str, float] = field(default_factory=dict)
    plan: str = ""
    refusal: str = ""


@dataclass(frozen=True)
class ClusterFacts:
    """All that was gathered: where the cluster answers, whether it refuses who shows no token (None: it could
    not be told), versions of the asking process, whether the job may use GPUs."""

    address: str
    refuses_strangers: bool | None
    versions: Mapping[str, str]
    may_use_gpus: bool
    stages_slides_bytes: int
    capacity: Capacity
    nodes: Sequence[Node]
