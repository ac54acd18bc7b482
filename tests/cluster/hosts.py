"""Several hosts on one machine: network namespaces on a bridge, each with an address, a Ray folder and
processes of its own. What is done to one, the others learn over the network alone."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

from pyarrow.fs import S3FileSystem
from ray.job_submission import JobStatus, JobSubmissionClient
from ray.util.state import list_nodes

from tests.cluster import BIN, PATIENCE_S, Cluster, finish, submit, wait_for

WORKERS = ("one", "two")
# What Ray believes each worker to have: room for one model, and for training and the reading of images.
CPUS = 3
BUCKET = "s3://hosts"
# Ray misses a silent host after a minute; here after half of one.
IMPATIENT = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "5000"}
# How a host is lost: the cable is pulled, or Ray's own process there is killed.
LOSSES = ("cut", "raylet")
# Each network has the next number. Of the block that is set aside for tests of networks, so that nobody's own
# network is hidden.
NETWORKS = (f"198.18.{number}" for number in range(256))
# Processes of the jobs, by their titles.
SCORER, TRAINER = "ray::MapWorker(MapBatches(Scorer)", "ray::RayTrainWorker"
GCS_PORT, DASHBOARD_PORT, S3_PORT = 6379, 8265, 5000


def why_not() -> str | None:
    """What is missing for hosts here; None where they can be had."""
    if not shutil.which("ip"):
        return "iproute2 is missing"
    probe = subprocess.run(["ip", "netns", "add", "bcd-probe"], capture_output=True, text=True, check=False)
    if probe.returncode:
        return f"no right to make network namespaces: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "bcd-probe"], check=True)
    return None


def _ip(arguments: str) -> str:
    return subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True).stdout


@dataclass
class Host:
    """One host: its name is that of its namespace."""

    name: str
    address: str
    folder: Path
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(
        self, command: Sequence[str | Path], under: Sequence[str] = (), **variables: str
    ) -> subprocess.Popen[bytes]:
        """Start a process on the host, under a command such as taskset where one is given; its output goes to
        a file in the host's folder."""
        with self._log(len(self.started)).open("wb") as log:
            process = subprocess.Popen(
                [*under, "ip", "netns", "exec", self.name, *command],
                env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"} | variables,
                start_new_session=True,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def log_of(self, process: subprocess.Popen[bytes]) -> str:
        """What a process that was started here has written."""
        return self._log(self.started.index(process)).read_text()

    @property
    def tmp(self) -> Path:
        """Where Ray's processes on the host put temporary files, TMPDIR."""
        return self.folder / "tmp"

    def _log(self, number: int) -> Path:
        return self.folder / f"{number}.log"

    def start_ray(
        self, *arguments: str, under: Sequence[str] = (), **variables: str
    ) -> subprocess.Popen[bytes]:
        """`ray start --block` on the host."""
        ray = [BIN / "ray", "start", "--block", f"--node-ip-address={self.address}", "--disable-usage-stats"]
        ray += [f"--temp-dir={self.folder}/ray", f"--object-store-memory={4 * 10**8}"]
        self.tmp.mkdir(exist_ok=True)
        return self.start([*ray, *arguments], under, TMPDIR=str(self.tmp), **variables)

    def listens(self, port: int) -> bool:
        """Whether a server on the host accepts connections from here."""
        with socket.socket() as client:
            client.settimeout(1)
            return client.connect_ex((self.address, port)) == 0

    def cut(self) -> None:
        """Pull the cable: nothing arrives any more, and nobody is told."""
        _ip(f"link set {self.name} down")

    def mend(self) -> None:
        """Plug the cable in again."""
        _ip(f"link set {self.name} up")

    def processes(self) -> dict[int, str]:
        """Command line of every process on the host, by its id."""
        found = {}
        for pid in map(int, _ip(f"netns pids {self.name}").split()):
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except FileNotFoundError:
                continue  # it ended meanwhile
        return found

    def zombies(self) -> list[int]:
        """Ids of processes that have ended and that no process of the host has asked about."""
        own, found = self.processes(), []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it may be gone meanwhile
                state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
                if state == "Z" and int(parent) in own:
                    found.append(int(process.name))
        return found

    def runs(self, pattern: str) -> bool:
        """Whether a process on the host has this in its command line."""
        return any(pattern in command for command in self.processes().values())

    def kill(self, pattern: str = "") -> int:
        """SIGKILL those processes whose command line holds the pattern; how many there were."""
        victims = [pid for pid, command in self.processes().items() if pattern in command]
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return len(victims)

    def lose(self) -> None:
        """End every process at once, as a loss of power does."""
        wait_for(lambda: not self.kill(), 60, f"the end of {self.name}")
        for process in self.started:
            process.wait()
        self.started.clear()
        for folder in (self.folder / "ray", self.tmp):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def network(names: Sequence[str]) -> Iterator[dict[str, Host]]:
    """A host for each name; the test itself is on the network, too. All is removed in the end."""
    address = next(NETWORKS)
    # A link's name has 15 letters at most.
    prefix = f"bcd{os.getpid():x}{address.rpartition('.')[2]}"
    with ExitStack() as stack:
        bridge = f"{prefix}br"
        _ip(f"link add {bridge} type bridge")
        stack.callback(_ip, f"link del {bridge}")
        _ip(f"addr add {address}.1/24 dev {bridge}")
        _ip(f"link set {bridge} up")
        found = {}
        for number, name in enumerate(names, start=2):
            # Short, because the paths of Ray's sockets may have 107 characters only.
            folder = Path(tempfile.mkdtemp(prefix="bcd-", dir="/tmp"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            host = Host(f"{prefix}{name}", f"{address}.{number}", folder)
            _ip(f"netns add {host.name}")
            stack.callback(_ip, f"netns del {host.name}")
            stack.callback(host.lose)
            _ip(f"link add {host.name} type veth peer name eth0 netns {host.name}")
            _ip(f"link set {host.name} master {bridge} up")
            for line in (f"addr add {host.address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                _ip(f"-n {host.name} {line}")
            found[name] = host
        yield found


@dataclass(frozen=True)
class Hosts:
    """The head, which runs no work, the two workers, and the store."""

    head: Host
    one: Host
    two: Host
    store: Host

    @classmethod
    @contextmanager
    def up(cls) -> Iterator["Hosts"]:
        """The hosts and their network, an empty bucket on the store, and the AWS variables that reach it.
        Ray is started by `start_head` and `join`."""
        with network(("head", *WORKERS, "store")) as found, ExitStack() as stack:
            store = found["store"]
            store.start([BIN / "moto_server", "-H", store.address, "-p", str(S3_PORT)])
            variables = {
                "AWS_ENDPOINT_URL": f"http://{store.address}:{S3_PORT}",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_REGION": "us-east-1",
            }
            stack.enter_context(mock.patch.dict(os.environ, variables))
            # It names a cluster that other tests started, and would count for more than what we ask for.
            os.environ.pop("RAY_ADDRESS", None)
            wait_for(lambda: store.listens(S3_PORT), PATIENCE_S, "the store")
            S3FileSystem(
                endpoint_override=f"{store.address}:{S3_PORT}", scheme="http", allow_bucket_creation=True
            ).create_dir(BUCKET.removeprefix("s3://"))
            yield cls(**found)

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted."""
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    @property
    def cluster(self) -> Cluster:
        """As `tests.cluster.submit` wants it."""
        return Cluster(f"{self.head.address}:{GCS_PORT}", self.dashboard, 0, "")

    @property
    def client(self) -> JobSubmissionClient:
        """Asks for jobs."""
        return JobSubmissionClient(self.dashboard)

    def start_head(self) -> None:
        """Start Ray on the head, and wait until it takes jobs."""
        self.head.start_ray(
            "--head",
            f"--port={GCS_PORT}",
            "--num-cpus=0",
            f"--dashboard-host={self.head.address}",
            f"--dashboard-port={DASHBOARD_PORT}",
            BCD_CLUSTER_LIMIT=f"CPU={CPUS * len(WORKERS)}",
            **IMPATIENT,
        )
        wait_for(lambda: self.head.listens(DASHBOARD_PORT), PATIENCE_S, "the head")

    def join(self, host: Host, under: Sequence[str] = ()) -> None:
        """Start Ray on a worker, and wait until the cluster has it."""
        ray = host.start_ray(f"--address={self.head.address}:{GCS_PORT}", f"--num-cpus={CPUS}", under=under)

        def come() -> bool:
            assert ray.poll() is None, host.log_of(ray)
            return host.address in self.alive()

        wait_for(come, PATIENCE_S, f"{host.name} in the cluster")

    def leave(self, host: Host) -> None:
        """End a worker, and wait until the cluster knows."""
        host.lose()
        host.mend()
        wait_for(lambda: host.address not in self.alive(), PATIENCE_S, f"the cluster to miss {host.name}")

    def lose(self, loss: str) -> None:
        """Lose worker `two` in one of the ways of `LOSSES`."""
        if loss == "cut":
            self.two.cut()
        else:
            assert self.two.kill("raylet/raylet") == 1

    def alive(self) -> set[str]:
        """Addresses of the nodes that the cluster believes in."""
        # While a node goes, Ray counts one more than it lists, and would call that an error.
        nodes = list_nodes(self.dashboard, raise_on_missing_output=False)
        return {node.node_ip for node in nodes if node.state == "ALIVE"}


class Job:
    """A submitted job, and where it writes."""

    def __init__(self, hosts: Hosts, output: str, arguments: Sequence[str]) -> None:
        self.hosts, self.output, self.arguments = hosts, output, arguments
        self.client = hosts.client
        self.id = submit(hosts.cluster, *arguments)

    def again(self) -> "Job":
        """The same command once more."""
        return Job(self.hosts, self.output, self.arguments)

    @property
    def ended(self) -> bool:
        """Whether it has, well or not."""
        return self.client.get_job_status(self.id).is_terminal()

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Until something is seen, while the job runs."""

        def come() -> object:
            assert not self.ended, self.client.get_job_logs(self.id)
            return condition()

        wait_for(come, PATIENCE_S, what)

    def wait_until(self, condition: Callable[[], object], what: str) -> None:
        """Until something is seen, or the job has ended."""
        wait_for(lambda: self.ended or condition(), PATIENCE_S, what)

    def wait_for_work_on(self, *hosts: Host, of: str) -> None:
        """Until each host runs such a process."""
        for host in hosts:
            self.wait_for(partial(host.runs, of), f"{of} on {host.name}")

    def succeed(self, patience_s: float = PATIENCE_S) -> str:
        """Its log; it must end well."""
        status, log = finish(self.client, self.id, patience_s)
        assert status == JobStatus.SUCCEEDED, log
        return log
