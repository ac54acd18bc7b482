"""Faults planted on the real thing: the tests' cluster, its S3 server, disks, and a second node.

a bucket that does not exist         data that do not exist               more workers than CPUs
an output below a file               a folder without images              a GPU where there is none
a model that does not exist          a manifest without an image          another torch on one node
a folder that is no bundle           weights that do not exist            an output that one node does not see
a bundle cut short                   weights of another network           a full disk on one node
a cluster that asks for no token     no cluster where one is named        a node that has stopped answering
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pyarrow.fs
import pytest
import ray
import torch
from safetensors.torch import save, save_file

from bcd import provenance, storage
from bcd.config.checks import DoctorConfig
from bcd.model import bundle, predictor, weights
from bcd.preflight import diagnosis, doctor
from tests import planted_identifiers
from tests.cluster import CLUSTER_CPUS, ROOT, free_port, kill, listens, processes, start_ray, wait_for
from tests.model.test_bundle import card

pytestmark = pytest.mark.ray


def config(purpose, **settings):
    return DoctorConfig(**{"for": purpose}, **settings)


def everything_below(uri):
    """Paths of all files, hidden ones too."""
    filesystem, path = storage.resolve(uri)
    infos = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True, allow_not_found=True))
    return sorted(info.path for info in infos if info.type == pyarrow.fs.FileType.File)


def diagnose(purpose, **settings):
    """The checks that are not ok."""
    return [check for check in doctor.examine(config(purpose, **settings)) if check.verdict != "ok"]


@pytest.fixture(autouse=True)
def _any_machine(monkeypatch):
    """How full the disk is here, and what else uses memory and disk now, is no part of these tests."""
    monkeypatch.setattr(diagnosis, "NEARLY_FULL", diagnosis.FULL)
    monkeypatch.setattr(diagnosis, "WANTED_MEMORY_BYTES", diagnosis.LEAST_MEMORY_BYTES)
    monkeypatch.setattr(diagnosis, "WANTED_RATE", 0.0)


@pytest.fixture(scope="module")
def examiners(cluster):
    """The actors on the nodes, which start once for all tests."""
    started = {}
    start = doctor._examiner

    def once(*arguments):
        if arguments not in started:
            started[arguments] = start(*arguments)
        return started[arguments]

    return once


@pytest.fixture
def idle(joined, examiners, monkeypatch):
    """The cluster with all its CPUs free: what an earlier test started may still be ending."""
    monkeypatch.setattr(doctor, "_examiner", examiners)
    wait_for(lambda: ray.available_resources().get("CPU") == CLUSTER_CPUS, 120, "free CPUs")
    return joined


@pytest.fixture(scope="module")
def good_model(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("bundle") / "model")
    predictor.save(weights.build(2, architecture="resnet18"), card(), uri)
    return uri


@pytest.fixture(scope="module")
def good_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet50.safetensors"
    save_file(dict(weights.build(1000).state_dict()), path)
    return str(path)


def test_nothing_is_found_on_a_healthy_cluster_with_s3_and_nothing_stays(
    idle, s3, tree_on_s3, good_weights, capsys
):
    before = everything_below(s3)
    checks = doctor.run(config("train", data=tree_on_s3, output=f"{s3}/doctor/runs", weights=good_weights))
    assert [(check.name, check.verdict) for check in checks] == [
        (name, "ok")
        for name in (
            *("nodes", "versions", "token", "clocks", "capacity", "memory", "object store", "disk"),
            *("data", "output", "weights"),
        )
    ]
    assert not any(check.next_step for check in checks)
    assert everything_below(s3) == before
    seen = {check.name: check.seen for check in checks}
    assert seen["capacity"] == "1 training worker and 1 CPU for reading: 2 CPUs needed; 4 of 4 CPUs are free"
    assert seen["token"] == f"{gcs()} rejects requests without a token"
    said = capsys.readouterr().out
    assert said.startswith("examining 1 node for jobs/train.py\n")
    assert said.endswith("\nnothing found: jobs/train.py can start.\n")


def test_nothing_is_found_on_a_healthy_cluster_with_local_disks(idle, tree, good_model, tmp_path, capsys):
    output = tmp_path / "scores"
    checks = doctor.run(config("score", input=tree, output=str(output), model=good_model))
    assert {check.verdict for check in checks} == {"ok"}
    assert [check.name for check in checks][-4:] == ["input", "output", "model", "privacy"]
    assert everything_below(str(output)) == []
    assert {check.verdict for check in doctor.run(config("serve"))} == {"ok"}
    assert "not checked, because not given: --model\n" in capsys.readouterr().out
    content, expected = planted_identifiers.files()["d.svs"]
    storage.write_bytes(str(tmp_path / "archive/Doe_1950/d.svs"), content)
    privacy = doctor.examine(config("score", input=str(tmp_path / "archive")))[-1]
    assert privacy.verdict == "warning"
    assert privacy.seen.startswith(f"{len(expected) + 1} statements in 2 files or folders that may identify")
    assert "1950" not in privacy.seen


def gcs():
    return ray.get_runtime_context().gcs_address


@pytest.fixture
def planted(tmp_path, good_model):
    """A folder of places that all have something wrong."""
    storage.write_bytes(str(tmp_path / "empty" / "notes.txt"), b"no image")
    storage.write_bytes(str(tmp_path / "manifest.csv"), b"uri,tumor_class\ngone.png,benign\n")
    storage.write_bytes(str(tmp_path / "vgg.safetensors"), save({"conv.weight": torch.zeros(1)}))
    shutil.copytree(good_model, tmp_path / "cut")
    weights = tmp_path / "cut" / bundle.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    return tmp_path


@pytest.mark.parametrize(
    ("purpose", "settings", "said"),
    [
        (
            "train",
            {"data": "{}/none", "output": "s3://nobucket/runs", "weights": "{}/none.pth", "device": "gpu"},
            {
                "capacity": "1 GPU workers asked for, but the cluster has 0 GPUs",
                "data": "{}/none: there is no such folder; check the path or bucket name",
                "output": "s3://nobucket/runs: cannot write it: When uploading object with key "
                "'runs' in bucket 'nobucket': AWS Error NO_SUCH_BUCKET",
                "weights": "{}/none.pth: cannot read it: ",
            },
        ),
        (
            "train",
            {
                "data": "{}/empty",
                "output": "{}/manifest.csv/runs",
                "weights": "{}/vgg.safetensors",
                "num_workers": "4",
            },
            {
                "capacity": "4 training workers and 1 CPU for reading images need 5 CPUs, but the cluster",
                "data": "{}/empty: nothing to read below it; expected .png, ",
                "output": "{0}/manifest.csv/runs: cannot write it: [Errno 20] Not a directory: '{0}/",
                "weights": "{}/vgg.safetensors: not the weights of a ResNet50: ",
            },
        ),
        ("train", {"data": "{}/manifest.csv"}, {"data": "{}/gone.png: cannot read it: "}),
        (
            "score",
            {"model": "{}/none", "device": "gpu"},
            {
                "capacity": "up to 1 model worker: 3 CPUs and 1 GPU needed, but the cluster has 4 CPUs",
                "model": "{}/none: no model bundle there; expected card.json, ",
            },
        ),
        (
            "serve",
            {"model": "{}/empty", "num_workers": "9"},
            {
                "capacity": "a service of 9 replicas: 9 CPUs needed, but the cluster has 4 CPUs",
                "model": "{}/empty: no model bundle there; expected card.json, ",
            },
        ),
        (
            "serve",
            {"model": "{}/cut"},
            {
                "model": "{}/cut: model.safetensors (1,000,000 bytes) is not the file that card.json was "
                "written for"
            },
        ),
    ],
)
def test_each_planted_fault_is_found_and_hides_no_other(idle, planted, purpose, settings, said):
    (node,) = (node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
    found = diagnose(purpose, **{flag: value.format(planted) for flag, value in settings.items()})
    assert [check.name for check in found] == list(said)
    for check in found:
        where = "" if check.name == "capacity" else f"{node}: "
        assert check.seen.startswith(where + said[check.name].format(planted))
        assert (check.verdict, doctor.PROBE in check.seen) == ("fault", False)
        assert check.next_step
    assert not list(planted.rglob(f"{doctor.PROBE}*"))


# In a mount namespace of its own a node has a small disk for Ray, and another one at the place of the output.
OWN_DISKS = 'mount -t tmpfs -o size=64m own "$0" && mount -t tmpfs own "$1" && shift && exec "$@"'
METADATA = "Metadata-Version: 2.1\nName: torch\nVersion: 0.0.1\n"


@pytest.fixture
def second(joined, tmp_path):
    """A second node with another torch and disks of its own: its process, marker, Ray folder and output."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a mount namespace: a node with disks of its own cannot be had here")
    (tmp_path / "torch-0.0.1.dist-info").mkdir()
    (tmp_path / "torch-0.0.1.dist-info" / "METADATA").write_text(METADATA)
    output = tmp_path / "output"
    output.mkdir()
    folder = tempfile.mkdtemp(prefix="bcd-ray-", dir="/tmp")
    marker = f"BCD_TEST_NODE={uuid.uuid4().hex}"
    node = start_ray(
        [f"--address={joined.gcs}", "--num-cpus=0", f"--temp-dir={folder}", f"--object-store-memory={10**8}"],
        marker,
        ["unshare", "--mount", "sh", "-c", OWN_DISKS, folder, str(output)],
        PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', ROOT)}",
    )
    try:
        wait_for(lambda: alive() == 2, 120, "the second node")
        yield node, marker, folder, output
    finally:
        node.kill()
        node.wait()
        wait_for(lambda: not kill(processes(node.pid, marker)), 60, "the end of the second node")
        wait_for(lambda: alive() == 1, 120, "the cluster without it")
        shutil.rmtree(folder, ignore_errors=True)


def alive():
    return sum(node["Alive"] for node in ray.nodes())


@pytest.mark.trial
def test_a_node_with_another_torch_a_full_disk_and_its_own_output_and_then_a_stopped_one(idle, second):
    node, marker, folder, output = second
    # Into the node's own mount namespace.
    disk = Path(f"/proc/{node.pid}/root{folder}")
    (disk / "filled").write_bytes(bytes(int(shutil.disk_usage(disk).free - 0.03 * 64 * 2**20)))
    known = {n["NodeID"]: n for n in ray.nodes() if n["Alive"]}
    names = doctor._names(known)
    name = next(names[node_id] for node_id, n in known.items() if not n["Resources"].get("CPU"))
    found = {check.name: check for check in diagnose("train", output=str(output))}
    assert {kind: check.verdict for kind, check in found.items()} == {
        "versions": "fault",
        "disk": "fault",
        "output": "fault",
    }
    ours = provenance.versions()["torch"]
    assert found["versions"].seen == f"torch 0.0.1 on {name}, {ours} where this job was started"
    assert re.fullmatch(rf"{re.escape(name)}: \d MiB free at {folder}, 9[5-9] % full", found["disk"].seen)
    assert f"{output}: cannot read it: " in found["output"].seen
    assert found["output"].next_step.startswith("Nodes must see what others wrote")
    assert everything_below(str(output)) == []
    assert not list(Path(f"/proc/{node.pid}/root{output}").iterdir())

    for pid, _ in processes(node.pid, marker):
        os.kill(pid, signal.SIGSTOP)
    found = diagnose("train", timeout_s=60)
    assert [(check.name, check.verdict) for check in found] == [("nodes", "fault")]
    assert found[0].seen.startswith(f"{name}: ")
    assert found[0].next_step == "See `ray status` and the raylet's log there. Nothing else is known of it."


def test_a_cluster_without_tokens_answers_anyone(tmp_path, joined):
    assert doctor.rejects_unauthenticated(gcs()) is True
    port, folder = free_port(), tempfile.mkdtemp(prefix="bcd-ray-", dir="/tmp")
    assert doctor.rejects_unauthenticated(f"127.0.0.1:{port}") is None
    marker = f"BCD_TEST_OPEN={uuid.uuid4().hex}"
    arguments = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false"]
    arguments += [f"--temp-dir={folder}", f"--object-store-memory={10**8}"]
    head = start_ray(arguments, marker, RAY_AUTH_MODE="disabled")
    try:
        wait_for(lambda: listens(port), 120, "a cluster without tokens")
        assert doctor.rejects_unauthenticated(f"127.0.0.1:{port}") is False
    finally:
        head.kill()
        head.wait()
        wait_for(lambda: not kill(processes(head.pid, marker)), 60, "its end")
        shutil.rmtree(folder, ignore_errors=True)


def door(environment, *arguments):
    """`python jobs/doctor.py` as a process of its own."""
    command = [sys.executable, "jobs/doctor.py", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_a_cluster_that_does_not_answer_is_a_fault():
    done = door({"RAY_ADDRESS": f"127.0.0.1:{free_port()}"}, "--for", "serve")
    assert done.returncode == 1
    assert "FAULT    cluster  no Ray cluster answers at RAY_ADDRESS=127.0.0.1:" in done.stdout
    assert done.stderr == "error: 1 fault: jobs/serve.py should not be started here yet.\n"


@pytest.mark.trial
def test_a_wrong_token_is_a_fault(cluster):
    done = door({"RAY_AUTH_TOKEN": "0" * 64}, "--for", "serve")
    assert (done.returncode, "FAULT    cluster" in done.stdout) == (1, True)


def test_the_door_prints_every_fault_and_exits_1(idle, tmp_path):
    done = door(
        {}, "--for", "train", "--device", "gpu", "--data", str(tmp_path / "none"), "--output", "s3://no/x"
    )
    assert done.returncode == 1
    table = done.stdout.splitlines()
    assert [line.split()[1] for line in table if line.startswith("  FAULT ")] == [
        "capacity",
        "data",
        "output",
    ]
    assert [line.split()[1] for line in table if line.startswith("  ok ")][:4] == [
        "nodes",
        "versions",
        "token",
        "clocks",
    ]
    # A disk that is nearly full here adds a warning.
    assert re.search(r"error: 3 faults( and \d warnings?)?: jobs/train\.py should not be", done.stderr)


def test_a_check_that_fails_in_an_unforeseen_way_hides_no_other(idle):
    party = doctor.Party(
        {"node": doctor._examiner(ray.get_runtime_context().get_node_id(), "resnet50", False)}, 120
    )
    answers = party.attempt("--data", "fly", {"node": "s3://bucket/data"})
    assert answers["node"].error == "s3://bucket/data: KeyError: 'fly'"


def test_a_clock_is_measured_between_question_and_answer(idle):
    examiner = doctor._examiner(ray.get_runtime_context().get_node_id(), "resnet50", False)
    ray.get(examiner.clock.remote())
    clock = doctor._clock(examiner, 60)
    assert abs(clock.ahead_s) <= clock.error_s < 1
