"""The Ray cluster: joining or starting one, and what it has to give."""

import logging
import os
import re
import socket
import sys
from dataclasses import dataclass

import ray
import torch
from ray._private.state import state as ray_state
from ray.data import DataContext
from ray.train import ScalingConfig

from bcd.config.training import TrainConfig
from bcd.errors import ConfigError, ResourceError

# Ray Data needs a CPU of its own beside the training workers; without one a run would wait for ever.
DATA_CPUS = 1
# More threads on one small batch gain little.
CPUS_PER_MODEL = 4
CONNECT_TIMEOUT_S = 20
# What an autoscaler may add, as CPU=192,GPU=4, in the environment of the head node. Ray 2.60 has a place for
# it in the GCS, but its own autoscalers report nothing there.
LIMIT_VARIABLE = "BCD_CLUSTER_LIMIT"
# The runtime environment of processes that hold a model. glibc gives the memory of every layer back and takes
# it anew, page by page, worst in the thread in which Ray Train calls the training function: 6.1 images/s, so
# 7.4; scoring 12.2 and 15.9 (ResNet50 in float32 on 2 cores). Up to 1 GiB is kept for the next batch.
# Threads that wait give their core away: where other processes want the cores too, waiting busily took a
# training step from 6 to 12 s.
MODEL_ENV = {
    "env_vars": {
        "OMP_WAIT_POLICY": "PASSIVE",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        # ScoreCAM and AblationCAM would draw a bar for every batch into the job's log.
        "TQDM_DISABLE": "1",
    }
}


def connect(trains: bool = False) -> None:
    """Join the cluster named by RAY_ADDRESS (as `ray job submit` does), else start one on this machine.

    Args:
        trains: whether Ray Train is to run there.

    Raises:
        ResourceError: RAY_ADDRESS names a cluster that does not answer; starting another would hide that.
    """
    if not ray.is_initialized():
        _init(trains)
    # Ray Data tells of every execution; what people want to know, we print.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # that there are no bars
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # They advise on the memory and the time that tasks ask for, every half minute, of our own code.
    context.issue_detectors_config.detectors = []


def _init(trains: bool) -> None:
    if address := os.environ.get("RAY_ADDRESS"):
        _join(address)
    else:
        # Ray Data in the workers of this cluster tells of every execution, too.
        os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")
        # Ray warns in its own processes of what its own code calls.
        os.environ.setdefault("PYTHONWARNINGS", "ignore::DeprecationWarning")
        # Never a cluster that merely happens to run here: two jobs on one small machine starve each other.
        ray.init(
            address="local",
            num_cpus=max(1 + DATA_CPUS, cores()),
            logging_level=logging.WARNING,
            # Eleven processes and 170 MiB, a quarter of the start, for a page that ends with the job. But Ray
            # Train asks it about itself, and warns about once a second where it is missing.
            include_dashboard=trains,
        )


def _join(address: str) -> None:
    try:
        if match := re.fullmatch(r"([^/]+):(\d+)", address):
            # Ray itself would try a dead address for minutes.
            socket.create_connection((match[1], int(match[2])), timeout=CONNECT_TIMEOUT_S).close()
        ray.init(address=address, logging_level=logging.WARNING)
    except OSError as error:
        raise ResourceError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {error}. Is it running, and is its token "
            "in RAY_AUTH_TOKEN or ~/.ray/auth_token here too?"
        ) from error


def per_node(n: int) -> int:
    """How many of n things a node holds, where they are spread evenly over the nodes that have CPUs."""
    return -(-n // max(1, len(_node_cpus())))


def _node_cpus() -> list[int]:
    """CPUs of each live node that has any."""
    found = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return [n for n in found if n]


def share_cores(local_workers: int) -> None:
    """Let this many workers of a machine share its cores; Ray gives each one thread per CPU held.

    Threads that outnumber the cores wait for each other at every layer: two folds of a small network took
    four times as long (95 and 25 s an epoch on 2 cores).
    """
    torch.set_num_threads(max(1, cores() // local_workers))


def use_threads(threads: int) -> None:
    """Let this process compute with so many threads, if the machine has as many cores."""
    torch.set_num_threads(min(threads, cores()))


def cores() -> int:
    """Cores of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_resources() -> dict[str, float]:
    """CPUs and GPUs that the cluster has, or that its autoscaler may add.

    Raises:
        ConfigError: BCD_CLUSTER_LIMIT is not of the form CPU=192,GPU=4.
    """
    now = ray.cluster_resources()
    limit = ray_state.get_max_resources_from_cluster_config() or _stated_limit()
    return {kind: max(now.get(kind, 0.0), limit.get(kind, 0.0)) for kind in ("CPU", "GPU")}


def _stated_limit() -> dict[str, float]:
    text = os.environ.get(LIMIT_VARIABLE, "")
    if not re.fullmatch(r"((CPU|GPU)=\d+(,|$))*", text):
        raise ConfigError(f"{LIMIT_VARIABLE}: expected CPU=192,GPU=4 or the like, not {text!r}")
    return {kind: float(limit) for kind, limit in re.findall(r"(\w+)=(\d+)", text)}


@dataclass
class CpuScaling(ScalingConfig):
    """Elastic workers without GPUs, as many as the live nodes hold beside the reading of images.

    Ray's own would take the last CPU, too, and wait for images for ever: at the start where as many are
    allowed, and on the nodes that are left when one is lost.
    """

    @property
    def max_workers(self) -> int:
        """Of `num_workers`, a pair; Ray asks for it anew whenever it starts or resizes the workers."""
        live = int(ray.cluster_resources().get("CPU", 0))
        return max(self.min_workers, min(self.num_workers[1], live - DATA_CPUS))


def scaling(config: TrainConfig) -> ScalingConfig:
    """How many workers of which kind a training run uses.

    Raises:
        ResourceError: the cluster cannot hold that many, with the numbers. Ray would wait silently.
    """
    have = total_resources()
    use_gpu = config.device == "gpu" or (config.device == "auto" and have["GPU"] > 0)
    low, high = config.worker_bounds() or ((int(have["GPU"]),) * 2 if use_gpu else (1, 1))
    if use_gpu and have["GPU"] < max(low, 1):
        raise ResourceError(f"{max(low, 1)} GPU workers asked for, but the cluster has {have['GPU']:g} GPUs")
    cpus = training_cpus(low, use_gpu)
    if have["CPU"] < cpus:
        raise ResourceError(
            f"{low} training workers and {DATA_CPUS} CPU for reading images need {cpus} CPUs, "
            f"but the cluster has {have['CPU']:g}; lower --num-workers or start Ray with more --num-cpus"
        )
    workers = low if low == high else (low, high)
    # GPUs of one node talk to each other fastest; CPU workers would share its cores.
    strategy = "PACK" if use_gpu else "SPREAD"
    kind = ScalingConfig if use_gpu or low == high else CpuScaling
    return kind(num_workers=workers, use_gpu=use_gpu, placement_strategy=strategy)


def training_cpus(workers: int, use_gpu: bool) -> int:
    """CPUs that a training holds: one for each worker without a GPU, and those that read images."""
    return DATA_CPUS + (0 if use_gpu else workers)


def room(config: TrainConfig) -> int:
    """How many training runs, each as large as it may become, the cluster holds at a time; at least 1."""
    have = total_resources()
    _, high = config.worker_bounds() or (1, 1)
    if config.device != "cpu" and have["GPU"]:
        return max(1, int(have["GPU"] // high))
    return max(1, int(have["CPU"] // training_cpus(high, use_gpu=False)))


def waiting_cpus() -> float:
    """What a task asks for that mostly waits and runs beside models that hold all CPUs but one.

    With none at all it would also land on a head that is to run nothing (CPU 0). Where one CPU is all there
    is, a model holds it.
    """
    return 0.01 if total_resources()["CPU"] > 1 else 0.0


@dataclass(frozen=True)
class Pool:
    """Actors that each hold a model: at most `size`, `ready` of them without waiting for new nodes."""

    size: int
    ready: int
    threads: int
    num_cpus: int
    num_gpus: int


def model_workers(limit: int | None = None) -> Pool:
    """One model per GPU; without GPUs one per four CPUs of a node, or per smaller node.

    A CPU stays free for what runs beside the models (planning slides, cutting blocks): with none, Ray Data
    would wait for ever.

    Args:
        limit: at most so many.
    """
    now, most = ray.cluster_resources(), limit or sys.maxsize
    have = total_resources()
    if have["GPU"] >= 1:
        size = min(int(have["GPU"]), most)
        return Pool(size, min(size, max(1, int(now.get("GPU", 0)))), threads=1, num_cpus=1, num_gpus=1)
    threads = min([*_node_cpus(), CPUS_PER_MODEL])
    num_cpus = max(1, threads - 1)
    size, ready = (
        min(most, max(1, min(int(total) // threads, (int(total) - 1) // num_cpus)))
        for total in (have["CPU"], now.get("CPU", 0))
    )
    return Pool(size, ready, threads, num_cpus, 0)
