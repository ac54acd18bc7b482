"""What docs/operations/security.md says of the cluster that a job starts, on one in a network, a folder for
temporary files and a home of its own."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.cluster import PATIENCE_S, ROOT

pytestmark = [pytest.mark.ray, pytest.mark.trial]
PAGE = (ROOT / "docs/operations/security.md").read_text(encoding="utf-8")
# Of the block that is set aside for tests of networks.
HOST = "198.18.77.2"
OUTSIDE = f"""
set -e
mount -t tmpfs tmpfs /tmp; mount -t tmpfs tmpfs /dev/shm; chmod 1777 /tmp /dev/shm; mkdir -m 755 /tmp/home
ip link set lo up; ip link add host type veth peer name other
ip addr add {HOST}/24 dev host; ip link set host up; ip link set other up
ip route add default dev host
exec "$@"
"""
# With a worker, and an object in the store.
INSIDE = """
import json, os, re, subprocess, sys, urllib.error, urllib.request
from pathlib import Path
import ray
from bcd.runtime import cluster
from tests.cluster import wait_for

def asks(url):
    try:
        urllib.request.urlopen(url, timeout=10)
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    return False

def run(command, **more):
    return subprocess.run(command, capture_output=True, text=True, check=True, **more).stdout

def listening():
    rows = [line.split() for line in run(["ss", "-ltnpH"]).splitlines()]
    pids = [re.search(r"pid=(\\d+)", row[5])[1] for row in rows]
    commands = [Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\\0", b" ").decode() for pid in pids]
    return [(command, row[3]) for command, row in zip(commands, rows)]

cluster.connect(several_trainings=True)
kept = ray.put(bytes(10**7))
ray.get(ray.remote(lambda: None).remote())
wait_for(lambda: any(place.endswith(":52365") for _, place in listening()), 60, "the agent")
found = listening()
nobody = {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"}
readable = ["find", "/tmp", "/dev/shm", "-mindepth", "1", "!", "-path", "/tmp/home", "-readable"]
print(json.dumps({
    "listening": found,
    "asking": {place: asks(f"http://{place}/metrics") for _, place in found if place[0] != "*"},
    "readable": subprocess.run(readable, capture_output=True, text=True, **nobody).stdout.splitlines(),
    "token": oct(Path("~/.ray/auth_token").expanduser().stat().st_mode)[-3:],
    "folders": {path.name: oct(path.stat().st_mode)[-3:] for path in Path("/tmp").iterdir()},
}))
"""
# A command line and the page's name of such a process.
PROCESSES = {
    r"gcs/gcs_server ": "GCS",
    r"raylet/raylet ": "raylet",
    r"dashboard/dashboard\.py ": "dashboard",
    r"autoscaler/_private/monitor\.py ": "monitor of the autoscaler",
    r"ray::DashboardAgent": "dashboard agent",
    r"ray::RuntimeEnvAgent": "agent of runtime environments",
    r"ray::": "workers",
    r"python -c ": "driver",
}


def why_not() -> str | None:
    """What is missing for namespaces here; None where they can be had."""
    if not (shutil.which("ip") and shutil.which("ss")):
        return "iproute2 is missing"
    command = ["unshare", "--net", "--mount", "true"]
    probe = subprocess.run(command, capture_output=True, text=True, check=False)
    return probe.stderr.strip() or None


@pytest.fixture(scope="module")
def found():
    """What ss, find and stat show beside a running job."""
    if reason := why_not():
        pytest.skip(f"no network of its own for a cluster: {reason}")
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "BCD_"))}
    ours |= {"HOME": "/tmp/home", "TMPDIR": "/tmp", "PYTHONPATH": str(ROOT)}
    command = ["unshare", "--net", "--mount", "sh", "-c", OUTSIDE, "sh", sys.executable, "-c", INSIDE]
    done = subprocess.run(command, env=ours, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def named(command: str) -> str:
    return next(name for pattern, name in PROCESSES.items() if re.search(pattern, command))


def place_of(address: str) -> str:
    """The page's name of an address; ports that change with each start are left out."""
    host, _, port = address.rpartition(":")
    name = {"0.0.0.0": "all", "*": "all", HOST: "the host's address"}.get(host, host)
    return f"{name}:{port}" if f":{port}" in PAGE else name


def stated() -> dict[tuple[str, str], tuple[str, str]]:
    """The page's table: the protocol of a process at an address, and whether it asks for the token."""
    rows = re.findall(r"^\| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", PAGE, re.M)[1:]
    return {
        (process, address): (protocol, asks)
        for processes, addresses, protocol, asks in rows
        for process in processes.split(", ")
        for address in addresses.split(", ")
    }


def test_the_page_names_who_listens_and_where(found):
    seen = {(named(command), place_of(address)) for command, address in found["listening"]}
    assert seen == set(stated())


def test_the_page_says_who_asks_for_the_token(found):
    """Of HTTP."""
    places = {address: (named(command), place_of(address)) for command, address in found["listening"]}
    seen = {places[address]: asks for address, asks in found["asking"].items()}
    page = {pair: asks == "yes" for pair, (protocol, asks) in stated().items() if protocol == "HTTP"}
    assert seen == page
    assert set(page.values()) == {True, False}


def test_other_users_read_nothing_of_a_job(found):
    assert found["readable"] == []
    assert found["folders"].pop("home") == "755"  # of the test
    page = " ".join(PAGE.split())
    folder = re.search(r"in the temporary folder, closed to other users \(`0(\d+)`\)", page)
    assert any(name.startswith("bcd-ray-") for name in found["folders"])
    assert set(found["folders"].values()) == {folder[1]} == {"700"}
    token = re.search(r"`~/.ray/auth_token`, is readable by its user alone \(`0(\d+)`\)", page)
    assert found["token"] == token[1] == "600"
