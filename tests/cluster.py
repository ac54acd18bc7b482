"""What the tests on a real cluster share: ports, waiting on conditions, reading results."""

import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bcd import storage

# More than the machine may have: the tests are about correctness, and two training workers, a model actor
# and image reading must fit side by side.
CLUSTER_CPUS = 4
BIN = Path(sys.executable).parent


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


def processes(marker: str) -> Iterator[tuple[int, str]]:
    """Id and command line of every process with `marker` in its environment: those that a test started."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
        except OSError:  # it has ended meanwhile
            continue
        if marker.encode() in environment and int(process.name) != os.getpid():
            yield int(process.name), command.replace(b"\0", b" ").decode()


def kill(marker: str, pattern: str) -> int:
    """SIGKILL every process with this marker whose command line matches; how many there were."""
    victims = [pid for pid, command in processes(marker) if re.search(pattern, command)]
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
