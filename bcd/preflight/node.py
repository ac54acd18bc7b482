"""Facts about a cluster and its nodes, gathered by `bcd.preflight.doctor`, judged by
`bcd.preflight.diagnosis`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bcd.audit.identifiers import Identifier

# find: search one image below a folder; see: read what another node wrote.
Action = Literal["find", "read", "write", "see", "delete", "load"]


@dataclass(frozen=True)
class Disk:
    """A file system, by a path on it."""

    path: str
    total_bytes: int
    free_bytes: int

    @property
    def used(self) -> float:
        """Fraction in use."""
        return 1 - self.free_bytes / max(1, self.total_bytes)


@dataclass(frozen=True)
class Machine:
    """Facts that a node reports: package versions, free memory within its container's limit, shared memory,
    disks of Ray and of the slide cache, and the number of GPUs that torch can use."""

    versions: Mapping[str, str]
    free_memory_bytes: int
    shm_bytes: int
    ray_disk: Disk
    cache_disk: Disk
    torch_gpus: int


@dataclass(frozen=True)
class Attempt:
    """One attempt of a node to use the place that a flag names: its duration and bytes, or the error."""

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
    """By how many seconds a clock is ahead of ours, and the error of this measurement."""

    ahead_s: float = 0.0
    error_s: float = 0.0

    @property
    def surely_s(self) -> float:
        """Least possible difference in seconds."""
        return max(0.0, abs(self.ahead_s) - self.error_s)

    @property
    def perhaps_s(self) -> float:
        """Largest possible difference in seconds."""
        return abs(self.ahead_s) + self.error_s


@dataclass(frozen=True)
class Node:
    """A node: facts from Ray, facts from the node (None: no answer, for the reason in `trouble`), and what it
    attempted."""

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
        """Whether work can be scheduled on it; a head often offers no CPU."""
        return self.cpus + self.gpus > 0


@dataclass(frozen=True)
class Capacity:
    """CPUs and GPUs by name: present, at most with an autoscaler, free, and needed by the job at least; the
    plan in words, or the reason why the job would not start."""

    there: Mapping[str, float]
    limit: Mapping[str, float]
    free: Mapping[str, float]
    needed: Mapping[str, float] = field(default_factory=dict)
    plan: str = ""
    refusal: str = ""


@dataclass(frozen=True)
class Sample:
    """The number of inputs that were searched, and what may identify a patient in them."""

    n_inputs: int
    found: Sequence[Identifier]


@dataclass(frozen=True)
class ClusterFacts:
    """All facts: address of the cluster, whether it rejects requests without a token (None: unknown),
    versions of this process, whether the job may use GPUs, bytes of slides that it stages, capacity, nodes,
    and what may identify a patient in a sample of the inputs (None: not searched)."""

    address: str
    rejects_unauthenticated: bool | None
    versions: Mapping[str, str]
    may_use_gpus: bool
    stages_slides_bytes: int
    capacity: Capacity
    nodes: Sequence[Node]
    sample: Sample | None = None
