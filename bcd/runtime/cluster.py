"""The Ray cluster: join or start one, and divide its CPUs and GPUs among trainings and models."""

import atexit
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.data import DataContext, TaskPoolStrategy
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectReconstructionFailedError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.train import ScalingConfig

from bcd.config.training import TrainConfig
from bcd.errors import ConfigError, LostError, ResourceError

# Ray Data needs a CPU besides those of the training workers; without one a run would wait for ever.
DATA_CPUS = 1
# More threads on one small batch gain little.
CPUS_PER_MODEL = 4
CONNECT_TIMEOUT_S = 20
# Of the folder for temporary files, below which Ray has its sockets.
MOST_TEMPORARY_LENGTH = 24
# The port of a cluster that is being started, and which cluster Ray Train asks whether its controller is
# alive: without it, any that runs on the same machine. Another one has never heard of it, so that what
# removes the workers of a controller that is killed ended itself at once, with an error in the log.
PORT_VARIABLE, ADDRESS_VARIABLE = "RAY_GCS_SERVER_PORT", "RAY_API_SERVER_ADDRESS"
# The most that an autoscaler may start, as CPU=192,GPU=4, set on the head node. Ray 2.60 has a field for it
# in the GCS, but its own autoscalers leave it empty.
LIMIT_VARIABLE = "BCD_CLUSTER_LIMIT"
# Environment variables of processes that hold a model. By default glibc returns the memory of every layer
# to the kernel and faults it in again page by page. Keeping up to 1 GiB for the next batch sped training up
# from 6.1 to 7.4 images/s and scoring from 12.2 to 15.9 (ResNet50 in float32 on 2 cores). Waiting threads
# yield their core: beside other processes, busy waiting slowed a training step from 6 to 12 s.
MODEL_VARIABLES = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    # ScoreCAM and AblationCAM would print a progress bar for every batch.
    "TQDM_DISABLE": "1",
}

# What Ray raises in place of the result of a process that is gone, and that it does not start again.
LOSSES = (
    *(RayActorError, WorkerCrashedError, OutOfMemoryError, LocalRayletDiedError, NodeDiedError),
    *(OwnerDiedError, ObjectReconstructionFailedError),
)

# Whether this process has started a cluster without dashboard, where nothing frees the CPUs of a lost
# training.
_is_bare = False


def connect(several_trainings: bool = False, metrics_port: int | None = None) -> bool:
    """Join the cluster named by RAY_ADDRESS (set by `ray job submit`), else start one on this machine, with
    its metrics at a port if one is given.

    Returns:
        Whether this process has started a cluster in which a lost training keeps its CPUs: not for
        `several_trainings`, of which one may be lost while the others continue. See `leave`.

    Raises:
        ResourceError: RAY_ADDRESS names a cluster that does not answer; starting another would hide that.
    """
    global _is_bare
    if not ray.is_initialized():
        if address := os.environ.get("RAY_ADDRESS"):
            _join(address)
        else:
            _start(several_trainings, metrics_port)
        _is_bare = not (address or several_trainings)
    # Ray 2.60's default grants each step what it used in the seconds before. Rounded, that was less than a
    # task of the last step, which commits rows: it waited until all images were scored. This one grants all
    # nodes.
    os.environ.setdefault("RAY_DATA_CLUSTER_AUTOSCALER", "V2")
    # Ray Data logs every execution; the jobs print their own lines.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # that there are no bars
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # An archive with fewer blocks than the cluster has CPUs is no mistake.
    warnings.filterwarnings("ignore", "The maximum number of concurrent tasks for")
    # Ray Data ends one of two workers when half of them have work, as at the first block of a job, and starts
    # none again where its readers use the rest of the cluster: half of it stayed idle.
    context.autoscaling_config.actor_pool_util_downscaling_threshold = -1.0
    # They advise every half minute on the memory and time of our own tasks.
    context.issue_detectors_config.detectors = []
    return _is_bare


def leave() -> None:
    """After a loss: end the cluster if it keeps the CPUs of a lost training. The next job of this process,
    which may be a notebook, starts another."""
    global _is_bare
    if _is_bare:
        ray.shutdown()
        _is_bare = False


def worker_env() -> dict[str, Any]:
    """The runtime environment of processes that hold a model: `MODEL_VARIABLES`, or nothing where all
    processes of the cluster have them, as this one does. Then they can be processes that have started."""
    if MODEL_VARIABLES.items() <= os.environ.items():
        return {}
    return {"env_vars": MODEL_VARIABLES}


def loss_of(error: BaseException) -> LostError | None:
    """The loss of a process, also in a task, as an error for the user; None for any other error, such as that
    of an actor which failed where it was made."""
    error = error.cause if isinstance(error, RayTaskError) else error
    if not isinstance(error, LOSSES) or getattr(error, "actor_init_failed", False):
        return None
    named = re.search(r"class_name: (\S+)", str(error))
    process = f"{named[1]}, a process of this job" if named else "a process of this job"
    return LostError(
        f"{process}, is gone ({type(error).__name__}): it was killed, perhaps because memory ran out, or its "
        "host is lost; run the same command again to resume"
    )


def _start(several_trainings: bool, metrics_port: int | None = None) -> None:
    os.environ.update(MODEL_VARIABLES)
    # For Ray Data in the workers of this cluster, too.
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "WARNING")
    # By default Ray reports statistics on each cluster to its makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's own processes warn about Ray's own code.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::DeprecationWarning")
    # Ray ends idle processes beyond one per CPU after a second. Jobs of several steps would start them again.
    os.environ.setdefault("RAY_num_workers_soft_limit", str(4 * cores()))
    # A process more that watches for nodes of a cloud that are about to be taken away.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # How often Ray Train asks its workers whether they have finished; by default every 2 s.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    _close_token()
    # It advises to switch the token off.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    # Never a cluster that merely happens to run here: two jobs on one small machine starve each other.
    with _known_to_itself() if several_trainings else nullcontext():
        ray.init(
            address="local",
            _temp_dir=_private_folder(),
            num_cpus=max(1 + DATA_CPUS, cores()),
            logging_level=logging.WARNING,
            # Eleven processes and 170 MiB, a quarter of the start, for a page that ends with the job.
            include_dashboard=several_trainings,
            _metrics_export_port=metrics_port,
        )
    _close_token()


@contextmanager
def _known_to_itself() -> Iterator[None]:
    """A cluster that starts within this states its address to its processes, see `ADDRESS_VARIABLE`."""
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    own = {PORT_VARIABLE: str(port), ADDRESS_VARIABLE: f"127.0.0.1:{port}"}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _close_token() -> None:
    """Keep Ray's token from other users, who could run code as this one; Ray lets all of them read it."""
    token = Path("~/.ray/auth_token").expanduser()
    with suppress(OSError):  # a home, or a mounted secret, that is read only
        token.parent.mkdir(mode=0o700, exist_ok=True)
        if token.exists():
            token.chmod(0o600)


def _private_folder() -> str:
    """A folder for Ray's logs, sockets and spilled objects, deleted when this process ends. Ray opens its own
    to all users, who could read names of images there; the one above it is closed."""
    root = tempfile.gettempdir()
    # The address of a socket has at most 107 bytes.
    root = root if len(root) <= MOST_TEMPORARY_LENGTH else "/tmp"
    closed = tempfile.mkdtemp(prefix="bcd-ray-", dir=root)
    atexit.register(_end, closed)
    return os.path.join(closed, "ray")


def _end(folder: str) -> None:
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


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
    """How many of n runs share a node when they are spread evenly over the nodes with CPUs."""
    return -(-n // max(1, len(_node_cpus())))


def _node_cpus() -> list[int]:
    """CPUs of each live node that has any."""
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return [n for n in cpus if n]


def share_cores(local_workers: int) -> None:
    """Set the threads of this process so that `local_workers` share the machine; Ray sets one per CPU held.

    With more threads than cores, threads wait for each other at every layer: two folds of a small network
    took four times as long (95 instead of 25 s an epoch on 2 cores).
    """
    _set_threads(max(1, cores() // local_workers))


def use_threads(threads: int) -> None:
    """Compute with this many threads, or one per core where the machine has fewer."""
    _set_threads(min(threads, cores()))


def _set_threads(threads: int) -> None:
    # Not at the top: processes that hold no model do without torch.
    import torch

    torch.set_num_threads(threads)


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_resources() -> dict[str, float]:
    """CPUs and GPUs of the cluster, with those that its autoscaler may add; raises ConfigError."""
    now = ray.cluster_resources()
    limit = ray_state.get_max_resources_from_cluster_config() or _stated_limit()
    return {name: max(now.get(name, 0.0), limit.get(name, 0.0)) for name in ("CPU", "GPU")}


def _stated_limit() -> dict[str, float]:
    text = os.environ.get(LIMIT_VARIABLE, "")
    if not re.fullmatch(r"((CPU|GPU)=\d+(,|$))*", text):
        raise ConfigError(f"{LIMIT_VARIABLE}: expected CPU=192,GPU=4 or similar, not {text!r}")
    return {name: float(limit) for name, limit in re.findall(r"(\w+)=(\d+)", text)}


@dataclass
class CpuScaling(ScalingConfig):
    """Elastic workers without GPUs that leave a CPU to read images; Ray's own class might leave none."""

    @property
    def max_workers(self) -> int:
        """Upper bound, which Ray reads whenever it starts or resizes the workers."""
        live = int(ray.cluster_resources().get("CPU", 0))
        return max(self.min_workers, min(self.num_workers[1], live - DATA_CPUS))


def scaling(config: TrainConfig) -> ScalingConfig:
    """Workers of a training run; raises ResourceError if they do not fit: Ray would wait silently."""
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
    # GPUs of one node communicate fastest; CPU workers of one node would share its cores.
    strategy = "PACK" if use_gpu else "SPREAD"
    form = ScalingConfig if use_gpu or low == high else CpuScaling
    return form(num_workers=workers, use_gpu=use_gpu, placement_strategy=strategy)


def training_cpus(workers: int, use_gpu: bool) -> int:
    """CPUs that a training occupies: one per worker without a GPU, and those that read images."""
    return DATA_CPUS + (0 if use_gpu else workers)


def room(config: TrainConfig) -> int:
    """How many training runs of maximum size fit in the cluster at a time; at least 1."""
    have = total_resources()
    _, high = config.worker_bounds() or (1, 1)
    if config.device != "cpu" and have["GPU"]:
        return max(1, int(have["GPU"] // high))
    return max(1, int(have["CPU"] // training_cpus(high, use_gpu=False)))


def waiting_cpus() -> float:
    """CPUs to request for a task that mostly waits, while models hold all CPUs but one, or the only one.

    A request of 0 could also be placed on a head node that must run nothing (CPU 0).
    """
    return 0.01 if total_resources()["CPU"] > 1 else 0.0


def beside_models(num_cpus: float | None = None) -> dict[str, Any]:
    """Options of Ray Data for tasks that work while models hold all CPUs but one: as many at a time as there
    are CPUs, each with `num_cpus`, by default `waiting_cpus`.

    Every stage of a job with models needs them. Without a limit Ray would start a process for each task that
    asks for no whole CPU, and keep a share of all CPUs for the stage, which a model on a host that joins
    needs.
    """
    limit = TaskPoolStrategy(max(1, int(total_resources()["CPU"])))
    return {"num_cpus": waiting_cpus() if num_cpus is None else num_cpus, "compute": limit}


@dataclass(frozen=True)
class Pool:
    """Actors that each hold a model: at most `size`, of which `ready` start without waiting for new nodes."""

    size: int
    ready: int
    threads: int
    num_cpus: int
    num_gpus: int


def model_workers(limit: int | None = None, may_use_gpus: bool = True) -> Pool:
    """One model per GPU; without GPUs one per four CPUs of a node, or per smaller node; at most `limit`.

    One CPU stays free for other tasks (planning slides, cutting blocks); without it Ray Data would wait for
    ever.
    """
    now, most = ray.cluster_resources(), limit or sys.maxsize
    have = total_resources()
    if have["GPU"] >= 1 and may_use_gpus:
        size = min(int(have["GPU"]), most)
        return Pool(size, min(size, max(1, int(now.get("GPU", 0)))), threads=1, num_cpus=1, num_gpus=1)
    threads = min([*_node_cpus(), CPUS_PER_MODEL])
    num_cpus = max(1, threads - 1)
    size, ready = (
        min(most, max(1, min(int(total) // threads, (int(total) - 1) // num_cpus)))
        for total in (have["CPU"], now.get("CPU", 0))
    )
    # What others hold, such as a service that stays, is not ours: reserve less, so that one still stays free.
    free = int(ray.available_resources().get("CPU", 0))
    if free < int(now.get("CPU", 0)):
        num_cpus = max(1, min(num_cpus, (free - 1) // ready))
    return Pool(size, ready, threads, num_cpus, 0)
