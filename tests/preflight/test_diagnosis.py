"""Faults planted, one after the other, into the facts of a healthy cluster of a head and two workers."""

import re
from dataclasses import replace

import pytest

from bcd.audit.identifiers import Identifier
from bcd.preflight import diagnosis
from bcd.preflight.diagnosis import COLOURS, GIB, INSTALL, MIB, NEXT_STEPS, PLAIN, Check, table_lines, verdict
from bcd.preflight.node import Attempt, Capacity, Clock, ClusterFacts, Disk, Machine, Node, Sample

VERSIONS = {"python": "3.12.3", "bcd": "0.2.0", "ray": "2.60.0", "torch": "2.11.0", "numpy": "2.2.0"}
MACHINE = Machine(
    versions=VERSIONS,
    free_memory_bytes=50 * GIB,
    shm_bytes=32 * GIB,
    ray_disk=Disk("/tmp/ray", 150 * GIB, 90 * GIB),
    cache_disk=Disk("/tmp/bcd-slides-0", 150 * GIB, 90 * GIB),
    torch_gpus=0,
)
OUTPUT = "s3://bucket/runs"
TRIED = (
    Attempt("--data", "read", "s3://bucket/data/a.png", 0.02, 400_000),
    Attempt("--output", "write", OUTPUT, 0.04, 4 * MIB),
    Attempt("--output", "see", OUTPUT, 0.02, 4 * MIB),
    Attempt("--output", "delete", OUTPUT, 0.01),
    Attempt("--model", "load", "s3://bucket/model", 1.5),
)
HEAD = Node("10.0.0.1", 0, 0, 8 * GIB, MACHINE, clock=Clock(0, 0.0004), attempts=TRIED)
ONE = Node(
    "10.0.0.2", 16, 1, 16 * GIB, replace(MACHINE, torch_gpus=1), clock=Clock(0.002, 0.001), attempts=TRIED
)
TWO = replace(ONE, name="10.0.0.3")
THERE = {"CPU": 32.0, "GPU": 2.0}
CAPACITY = Capacity(THERE, THERE, THERE, {"CPU": 3.0, "GPU": 2.0}, "2 training workers and 1 CPU for reading")
HEALTHY = ClusterFacts("10.0.0.1:6379", True, VERSIONS, True, 20 * GIB, CAPACITY, [HEAD, ONE, TWO])

ALL_WELL = [
    Check("nodes", "ok", "3 answered: 10.0.0.1, 10.0.0.2 and 10.0.0.3"),
    Check("versions", "ok", "python 3.12.3, ray 2.60.0, torch 2.11.0 and bcd 0.2.0 everywhere"),
    Check("token", "ok", "10.0.0.1:6379 rejects requests without a token"),
    Check("clocks", "ok", "equal to 3 ms"),
    Check(
        "capacity",
        "ok",
        "2 training workers and 1 CPU for reading: 3 CPUs and 2 GPUs needed; "
        "32 of 32 CPUs and 2 of 2 GPUs are free",
    ),
    Check("GPUs", "ok", "torch can use all 2 on 2 nodes"),
    Check("memory", "ok", "50.0 GiB free or more on every node"),
    Check("object store", "ok", "16.0 GiB or more on every node"),
    Check("disk", "ok", "90.0 GiB free or more for Ray's files"),
    Check("slide cache", "ok", "90.0 GiB free or more on every node"),
    Check("data", "ok", "s3://bucket/data/a.png: read in 0.02 s"),
    Check("output", "ok", "s3://bucket/runs: written at 100 MiB/s and read at 200 MiB/s"),
    Check("model", "ok", "s3://bucket/model: loaded in 1.50 s"),
]


def on_two(**facts):
    return replace(HEALTHY, nodes=[HEAD, ONE, replace(TWO, **facts)])


def machine(**facts):
    return on_two(machine=replace(TWO.machine, **facts))


def tried(*attempts):
    flags = {attempt.flag for attempt in attempts}
    return on_two(attempts=(*(one for one in TRIED if one.flag not in flags), *attempts))


def capacity(**facts):
    return replace(HEALTHY, capacity=replace(CAPACITY, **facts))


def version(**versions):
    return machine(versions=VERSIONS | versions)


def failed(flag, action, uri, error):
    return tried(Attempt(flag, action, uri, error=f"{uri}: {error}"))


# What is planted -> the one line that it changes.
FAULTS = {
    "a node that is silent": (
        on_two(machine=None, trouble="no answer within 60 s"),
        Check("nodes", "fault", "10.0.0.3: no answer within 60 s",
              "See `ray status` and the raylet's log there. Nothing else is known of it."),
    ),
    "a node without bcd": (
        on_two(machine=None, trouble="ModuleNotFoundError: No module named 'bcd'"),
        Check("nodes", "fault", "10.0.0.3: ModuleNotFoundError: No module named 'bcd'",
              f"{INSTALL} The code comes with the job: ray job submit --working-dir ."),
    ),
    "another torch": (
        version(torch="2.10.0"),
        Check("versions", "fault", "torch 2.10.0 on 10.0.0.3, 2.11.0 where this job was started", INSTALL),
    ),
    "another bcd": (
        version(bcd="0.0.9"),
        Check("versions", "fault", "bcd 0.0.9 on 10.0.0.3, 0.2.0 where this job was started", INSTALL),
    ),
    "another Ray": (
        version(ray="2.59.0"),
        Check("versions", "fault", "ray 2.59.0 on 10.0.0.3, 2.60.0 where this job was started", INSTALL),
    ),
    "another Python": (
        version(python="3.11.2"),
        Check("versions", "fault", "python 3.11.2 on 10.0.0.3, 3.12.3 where this job was started", INSTALL),
    ),
    "no token": (
        replace(HEALTHY, rejects_unauthenticated=False),
        Check("token", "fault",
              "10.0.0.1:6379 answers without a token: anyone who reaches that port can run code here",
              "Run `ray get-auth-token --generate`, copy ~/.ray/auth_token to every node, and start Ray "
              "there with RAY_AUTH_MODE=token."),
    ),
    "a clock that is wrong by hours": (
        on_two(clock=Clock(-7200.0, 0.001)),
        Check("clocks", "fault", "10.0.0.3 is 7200.0 s behind: object stores reject its signatures",
              "Run a time service on every node (chrony, systemd-timesyncd)."),
    ),
    "no GPU where one is asked for": (
        capacity(needed={}, plan="", refusal="1 GPU workers asked for, but the cluster has 0 GPUs"),
        Check("capacity", "fault", "1 GPU workers asked for, but the cluster has 0 GPUs",
              "Add nodes with GPUs (the group `gpu` of cluster.yaml), or use --device cpu."),
    ),
    "more replicas than CPUs": (
        capacity(needed={"CPU": 40.0, "GPU": 0.0}, plan="a service of 40 replicas"),
        Check("capacity", "fault",
              "a service of 40 replicas: 40 CPUs needed, but the cluster has 32 CPUs and 2 GPUs",
              "Add nodes, or use fewer workers. `ray status` lists what the cluster has."),
    ),
    "a GPU that torch cannot use": (
        machine(torch_gpus=0),
        Check("GPUs", "fault", "10.0.0.3: Ray offers 1 GPU, torch can use 0",
              "Run `nvidia-smi` there: is the driver new enough for the CUDA of this torch?"),
    ),
    "no memory left": (
        machine(free_memory_bytes=512 * MIB),
        Check("memory", "fault", "10.0.0.3: 512 MiB free, 4.0 GiB or more are recommended",
              "Stop other programs there, or use larger nodes: Ray kills workers when memory runs out."),
    ),
    "a full disk": (
        machine(ray_disk=Disk("/tmp/ray", 150 * GIB, GIB)),
        Check("disk", "fault", "10.0.0.3: 1.0 GiB free at /tmp/ray, 99 % full",
              "Free space there, or start Ray with another --temp-dir: at 95 % Ray stores no more objects."),
    ),
    "data that one node cannot read": (
        failed("--data", "read", "s3://bucket/data/a.png", "cannot read it: AWS Error ACCESS_DENIED"),
        Check("data", "fault", "10.0.0.3: s3://bucket/data/a.png: cannot read it: AWS Error ACCESS_DENIED",
              NEXT_STEPS["read"]),
    ),
    "a folder without images": (
        failed("--data", "find", "s3://bucket/data", "nothing to read below it"),
        Check("data", "fault", "10.0.0.3: s3://bucket/data: nothing to read below it", NEXT_STEPS["find"]),
    ),
    "an output that cannot be written": (
        failed("--output", "write", OUTPUT, "cannot write it: AWS Error NO_SUCH_BUCKET"),
        Check("output", "fault", "10.0.0.3: s3://bucket/runs: cannot write it: AWS Error NO_SUCH_BUCKET",
              NEXT_STEPS["write"]),
    ),
    "an output that nodes do not share": (
        failed("--output", "see", "/runs", "cannot read it: no such file"),
        Check("output", "fault", "10.0.0.3: /runs: cannot read it: no such file", NEXT_STEPS["see"]),
    ),
    "an output where nothing can be deleted": (
        failed("--output", "delete", OUTPUT, "cannot delete it: AWS Error ACCESS_DENIED"),
        Check("output", "fault", "10.0.0.3: s3://bucket/runs: cannot delete it: AWS Error ACCESS_DENIED",
              NEXT_STEPS["delete"]),
    ),
    "no model": (
        failed("--model", "load", "s3://bucket/model", "no model bundle there"),
        Check("model", "fault", "10.0.0.3: s3://bucket/model: no model bundle there", NEXT_STEPS["load"]),
    ),
}  # fmt: skip

WARNINGS = {
    "another numpy": (
        version(numpy="2.1.0"),
        Check("versions", "warning", "numpy 2.1.0 on 10.0.0.3, 2.2.0 where this job was started", INSTALL),
    ),
    "a version that is unknown": (
        machine(versions={name: v for name, v in VERSIONS.items() if name != "numpy"}),
        Check("versions", "warning", "numpy unknown on 10.0.0.3, 2.2.0 where this job was started", INSTALL),
    ),
    "a cluster that may require a token": (
        replace(HEALTHY, rejects_unauthenticated=None),
        Check("token", "warning", "10.0.0.1:6379: unknown whether it requires a token"),
    ),
    "a clock that is wrong by seconds": (
        on_two(clock=Clock(30.0, 1.0)),
        Check("clocks", "warning", "10.0.0.3 is 30.0 s ahead",
              "Run a time service on every node (chrony, systemd-timesyncd)."),
    ),
    "nodes that an autoscaler must add": (
        capacity(there={"CPU": 0.0, "GPU": 0.0}, free={"CPU": 0.0, "GPU": 0.0}),
        Check("capacity", "warning",
              "2 training workers and 1 CPU for reading: 3 CPUs and 2 GPUs needed; there are 0 CPUs, "
              "up to 32 CPUs and 2 GPUs can be added",
              "The autoscaler will add nodes, which are not examined: run this again when they are there."),
    ),
    "a busy cluster": (
        capacity(free={"CPU": 1.0, "GPU": 2.0}),
        Check("capacity", "warning",
              "2 training workers and 1 CPU for reading: 3 CPUs and 2 GPUs needed; 1 of 32 CPUs and "
              "2 of 2 GPUs are free",
              "Other jobs use the rest: this one would wait for them."),
    ),
    "little memory": (
        machine(free_memory_bytes=3 * GIB),
        Check("memory", "warning", "10.0.0.3: 3.0 GiB free, 4.0 GiB or more are recommended",
              "Stop other programs there, or use larger nodes: Ray kills workers when memory runs out."),
    ),
    "a small object store": (
        on_two(object_store_bytes=100 * MIB),
        Check("object store", "warning", "10.0.0.3: 100 MiB, 512 MiB or more are recommended",
              "Start Ray there with a larger --object-store-memory: images in transit would spill to disk."),
    ),
    "a disk that fills": (
        machine(ray_disk=Disk("/tmp/ray", 100 * GIB, 10 * GIB)),
        Check("disk", "warning", "10.0.0.3: 10.0 GiB free at /tmp/ray, 90 % full",
              "Free space there, or start Ray with another --temp-dir: at 95 % Ray stores no more objects."),
    ),
    "no room for slides": (
        machine(cache_disk=Disk("/tmp/bcd-slides-0", 50 * GIB, 5 * GIB)),
        Check("slide cache", "warning", "10.0.0.3: 5.0 GiB free, 20.0 GiB or more are recommended",
              "Free space, or set TMPDIR to a larger disk on the nodes: whole slides are fetched into it."),
    ),
    "slow storage": (
        tried(TRIED[1], replace(TRIED[2], seconds=16.0)),
        Check("output", "warning", "s3://bucket/runs: read at 0.25 MiB/s only, on 10.0.0.3",
              "The job will wait for images: move storage and nodes closer."),
    ),
}  # fmt: skip


def test_nothing_is_found_on_a_healthy_cluster():
    assert diagnosis.diagnose(HEALTHY) == ALL_WELL


@pytest.mark.parametrize(("facts", "line"), [*FAULTS.values(), *WARNINGS.values()], ids=[*FAULTS, *WARNINGS])
def test_each_planted_fault_changes_its_line_and_no_other(facts, line):
    found = diagnosis.diagnose(facts)
    assert [check for check in found if check.verdict != "ok"] == [line]
    others = {"nodes"} if line.name == "nodes" else set()
    kept = [check for check in ALL_WELL if check.name not in others | {line.name}]
    assert [check for check in found if check.name not in others | {line.name}] == [
        replace(check, seen=check.seen.replace("all 2 on 2 nodes", "all 1 on 1 node"))
        if line.name == "nodes"
        else check
        for check in kept
    ]


def test_nineteen_faults_and_eleven_warnings_are_planted():
    assert {check.verdict for _, check in FAULTS.values()} == {"fault"}
    assert {check.verdict for _, check in WARNINGS.values()} == {"warning"}
    assert (len(FAULTS), len(WARNINGS)) == (19, 11)


def test_shared_memory_smaller_than_the_object_store():
    small = replace(
        HEALTHY,
        nodes=[HEAD, *(replace(n, machine=replace(n.machine, shm_bytes=64 * MIB)) for n in (ONE, TWO))],
    )
    (line,) = (check for check in diagnosis.diagnose(small) if check.verdict != "ok")
    assert line == Check(
        "object store",
        "warning",
        "10.0.0.2 and 10.0.0.3: /dev/shm has 64 MiB, the object store 16.0 GiB",
        "Enlarge it (--shm-size, an emptyDir of medium Memory): Ray uses a slow disk instead.",
    )


def test_a_gpu_that_is_not_used_breaks_nothing():
    facts = replace(machine(torch_gpus=0), may_use_gpus=False)
    assert [check.verdict for check in diagnosis.diagnose(facts) if check.name == "GPUs"] == ["warning"]


def test_a_head_without_cpus_needs_no_memory_and_no_object_store():
    poor = replace(
        HEAD, machine=replace(MACHINE, free_memory_bytes=MIB, shm_bytes=MIB), object_store_bytes=MIB
    )
    assert diagnosis.diagnose(replace(HEALTHY, nodes=[poor, ONE, TWO])) == ALL_WELL


def test_a_clock_known_badly_is_not_called_wrong():
    assert [c.verdict for c in diagnosis.check_clocks([replace(TWO, clock=Clock(3.0, 2.5))])] == ["ok"]


def test_the_same_trouble_of_many_nodes_is_one_line():
    nodes = [
        Node(f"10.0.1.{i}", 4, 0, GIB, attempts=(), machine=None, trouble="no answer within 9 s")
        for i in range(9)
    ]
    (line,) = diagnosis.check_answers(nodes)
    assert line.seen == "10.0.1.0, 10.0.1.1, 10.0.1.2, 10.0.1.3 and 5 more: no answer within 9 s"


def test_those_who_answered_are_counted_beside_all():
    facts, _ = FAULTS["a node that is silent"]
    assert list(diagnosis.check_answers(facts.nodes))[1].seen == "2 of 3 answered: 10.0.0.1 and 10.0.0.2"


def test_several_faults_are_all_listed():
    facts = replace(version(torch="2.10.0"), rejects_unauthenticated=False, capacity=CAPACITY)
    both = [check.name for check in diagnosis.diagnose(facts) if check.verdict == "fault"]
    assert both == ["versions", "token"]


CHECKS = [
    Check("nodes", "ok", "3 answered"),
    Check("disk", "fault", "10.0.0.3: 1.0 GiB free at /tmp/ray, 99 % full", "Free space there."),
    Check("memory", "warning", "10.0.0.2: 3.0 GiB free", "Stop other programs there."),
]


def test_a_line_for_each_check_and_a_next_step_below_where_there_is_one():
    assert table_lines(CHECKS, 100, coloured=False) == [
        "  ok       nodes   3 answered",
        "  FAULT    disk    10.0.0.3: 1.0 GiB free at /tmp/ray, 99 % full",
        "                   -> Free space there.",
        "  WARNING  memory  10.0.0.2: 3.0 GiB free",
        "                   -> Stop other programs there.",
    ]


def test_colours_add_nothing_but_colour():
    coloured = "\n".join(table_lines(CHECKS, 100, coloured=True))
    assert f"{COLOURS['fault']}FAULT  {PLAIN}  disk" in coloured
    assert re.sub(r"\033\[[\d;]*m", "", coloured).splitlines() == table_lines(CHECKS, 100, coloured=False)


def test_long_sentences_are_wrapped_below_themselves_and_what_is_copied_stays_whole():
    uri = "s3://bucket/" + "deep-folder/" * 8
    table = table_lines([Check("data", "fault", f"{uri} cannot be read", "Check the path, " * 6)], 80, False)
    assert table[0] == f"  FAULT    data  {uri}"
    assert table[1] == " " * 17 + "cannot be read"
    assert table[2].startswith(" " * 17 + "-> Check the path,")
    assert all(line.startswith(" " * 20) and line[20] != " " for line in table[3:])
    assert max(map(len, table[1:])) <= 80


def test_the_last_sentence_counts_and_says_whether_to_start():
    assert (
        verdict(CHECKS, "jobs/train.py")
        == "1 fault and 1 warning: jobs/train.py should not be started here yet."
    )
    assert verdict(CHECKS[:1], "jobs/score.py") == "nothing found: jobs/score.py can start."
    assert verdict(CHECKS[2:], "jobs/serve.py") == "1 warning: jobs/serve.py can start."


def test_what_identifies_patients_in_the_inputs_is_a_warning_without_its_value():
    assert not list(diagnosis.check_privacy(None))
    (well,) = diagnosis.check_privacy(Sample(20, ()))
    assert well == Check("privacy", "ok", "nothing in names and metadata of 20 inputs identifies a patient")
    found = [Identifier("Doe_1950/a.svs", "person", "TIFF Artist", "D***")] * 5
    (seen,) = diagnosis.diagnose(replace(HEALTHY, sample=Sample(20, found)))[len(ALL_WELL) :]
    assert (seen.name, seen.verdict) == ("privacy", "warning")
    assert seen.seen.startswith(
        "5 statements in 1 file or folder that may identify a patient: 5 person, among 20"
    )
    assert "D***/a.svs: person in TIFF Artist (D***)" in seen.seen
    assert "1950" not in seen.seen
