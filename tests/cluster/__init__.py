"""What the tests on a real cluster share: ports, waiting on conditions, reading results."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bcd import storage

# More than the machine may have: the tests are about correctness, and two training workers, a model actor
# and image reading must fit side by side.
CLUSTER_CPUS = 4
BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent.parent
# The jobs of the tests take about a minute here; two noisy cores may take much longer.
PATIENCE_S = 600


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that a test started: its addresses, and how to find its processes."""

    gcs: str
    dashboard: str
    session: int
    marker: str

    def processes(self) -> Iterator[tuple[int, str]]:
        """Id and command line of each."""
        return processes(self.session, self.marker)


def other_lines(log: str, known: Sequence[str]) -> list[str]:
    """Lines of a job's log that no pattern matches, besides those of `ray job submit` about where it runs."""
    submitted = (r".*\tINFO job_manager\.py:.*", r"Running entrypoint for job \w+: .*")
    patterns = [re.compile(pattern) for pattern in (*known, *submitted, r"")]
    return [line for line in log.splitlines() if not any(pattern.fullmatch(line) for pattern in patterns)]


def free_port() -> int:
    """A port on loopback that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> object:
    """Poll until the condition gives something true, and return it."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return result


def processes(session: int, marker: str) -> Iterator[tuple[int, str]]:
    """Id and command line of every process of a test's cluster.

    Ray's own processes stay in the session of the one that started them, but paint their titles over their
    environment; jobs get sessions of their own, but keep the environment.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end meanwhile
            stat = (process / "stat").read_text().rpartition(")")[2].split()
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            own = int(stat[3]) == session or marker.encode() in (process / "environ").read_bytes()
            if own and stat[0] != "Z":
                yield int(process.name), command


def kill(found: Iterator[tuple[int, str]], pattern: str = "") -> int:
    """SIGKILL those of the processes whose command line matches; how many there were."""
    victims = [pid for pid, command in found if re.search(pattern, command)]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(victims)


def listens(port: int) -> bool:
    """Whether a server accepts connections."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def read_json(uri: str) -> Any:
    """A JSON document at a URI."""
    return json.loads(storage.read_bytes(uri))


def start_ray(
    arguments: list[str], marker: str, prefix: Sequence[str] = (), **variables: str
) -> subprocess.Popen[bytes]:
    """`ray start --block` in a session of its own, by a command that runs others where one is given;
    `processes` finds what belongs to it by the marker."""
    name, _, value = marker.partition("=")
    environment = os.environ | variables | {name: value, "PATH": f"{BIN}:{os.environ['PATH']}"}
    start = [BIN / "ray", "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    # By default agents of all clusters on a machine want one port, and who comes second takes no jobs.
    start.append(f"--dashboard-agent-listen-port={free_port()}")
    return subprocess.Popen(
        [*prefix, *start, *arguments],
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def submit(cluster: Cluster, *arguments: str) -> str:
    """`ray job submit` of a job script without waiting; the id of the job."""
    command = [BIN / "ray", "job", "submit", f"--address={cluster.dashboard}", "--no-wait"]
    command += ["--working-dir", ".", "--", "python", *arguments]

    def accepted() -> re.Match[str] | None:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        # A cluster that has just started, or is starved, has no agent for a while and says so.
        assert done.returncode == 0 or "please try again later" in done.stderr, done.stderr
        return re.search(r"raysubmit_\w+", done.stdout)

    found = wait_for(accepted, PATIENCE_S, "a submission that is accepted")
    assert isinstance(found, re.Match)
    return found[0]


def start_job(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    """A job script as a process of its own, on the cluster that RAY_ADDRESS names."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(job: subprocess.Popen[str]) -> str:
    """Its output; it must end well."""
    log, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, log
    return log


def finish(client: Any, job: str, patience_s: float = PATIENCE_S) -> tuple[Any, str]:
    """Wait for the end of a job; its status and log."""
    wait_for(lambda: client.get_job_status(job).is_terminal(), patience_s, f"the end of {job}")
    return client.get_job_status(job), client.get_job_logs(job)
