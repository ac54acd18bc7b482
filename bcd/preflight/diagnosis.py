"""What may be wrong with a cluster before a long job: facts about its nodes in, checks with a verdict out.

Nothing here asks anything of a cluster: `bcd.preflight.doctor` gathers the facts. Each check looks at its own
facts alone, so that one which fails hides no other.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from bcd.preflight.node import Action, Attempt, Capacity, ClusterFacts, Node
from bcd.text import counted, listed

Verdict = Literal["ok", "warning", "fault"]
Key = TypeVar("Key")

MIB, GIB = 2**20, 2**30
# Another version of these on a node breaks a job or changes its numbers; of the rest it is good to know.
DECISIVE = ("ray", "torch", "bcd")
# Peak of the archive job on two cores, 3,572 MiB, rounded up; a process with torch and one ResNet50: 949.
WANTED_MEMORY_BYTES, LEAST_MEMORY_BYTES = 4 * GIB, GIB
# A block of Ray Data has up to 128 MiB (`DataContext.target_max_block_size`): four in flight. Ray refuses to
# start with less than 75 MiB.
WANTED_STORE_BYTES = 512 * MIB
# Ray creates and spills no object once its disk is 95 % full (`local_fs_capacity_threshold`).
FULL, NEARLY_FULL = 0.95, 0.85
# AWS takes requests whose signature is at most five minutes off (S3: fifteen).
# https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv.html
WANTED_SKEW_S, MOST_SKEW_S = 2.0, 300.0
# Of one stream; eight are read at a time (`storage.READ_THREADS`), so this is 16 fields of 0.5 MB a second:
# what two CPU cores score. Less than `RATED_BYTES` says more about latency than about the rate.
WANTED_RATE, RATED_BYTES = MIB, MIB
# Nodes that a sentence names.
NAMED = 4

INSTALL = "Install the same on every node: pip install -c constraints.txt . (or one image for all nodes)."
NEXT_STEPS: Mapping[Action, str] = {
    "find": "Check the path or bucket name, and that files of a kind that bcd reads lie below it.",
    "read": "Check the path, and credentials and endpoint (AWS_* variables or a role) on every node.",
    "write": "Check that the bucket or disk is there, and that every node may write to it.",
    "see": "Nodes must see what others wrote: give s3:// or gs://, or a folder that all of them share.",
    "delete": "Let the nodes delete there too: jobs replace their own files. Remove what was left behind.",
    "load": "Give a whole bundle or state dict, at a place that every node can read.",
}
PAST: Mapping[Action, str] = {"read": "read", "write": "written", "see": "read", "load": "loaded"}


@dataclass(frozen=True)
class Check:
    """One line of the table; a next step where there is something to do."""

    name: str
    verdict: Verdict
    seen: str
    next_step: str = ""


def diagnose(facts: ClusterFacts) -> list[Check]:
    """Every check, in the order of the table."""
    machines = [node for node in facts.nodes if node.machine]
    workers = [node for node in machines if node.works]
    return [
        *check_answers(facts.nodes),
        *check_versions(facts.versions, machines),
        check_token(facts.address, facts.refuses_strangers),
        *check_clocks(machines),
        *check_capacity(facts.capacity),
        *check_gpus(machines, facts.may_use_gpus),
        *check_memory(workers),
        *check_object_store(workers),
        *check_disks(machines, facts.stages_slides_bytes),
        *check_places(machines),
    ]


def check_answers(nodes: Sequence[Node]) -> Iterator[Check]:
    """Nodes that did not answer."""
    awake = [node.name for node in nodes if node.machine]
    of_all = f" of {len(nodes)}" if len(awake) < len(nodes) else ""
    for trouble, names in _grouped((node.trouble, node.name) for node in nodes if not node.machine):
        step = "See `ray status` and the raylet's log there. Nothing more is known of it."
        if "No module named" in trouble:
            step = f"{INSTALL} The code comes with the job: ray job submit --working-dir ."
        yield Check("nodes", "fault", f"{names}: {trouble}", step)
    if awake:
        yield Check("nodes", "ok", f"{len(awake)}{of_all} answered: {_names(awake)}")


def check_versions(here: Mapping[str, str], nodes: Sequence[Node]) -> Iterator[Check]:
    """Packages whose versions on a node are not those of the asking process."""
    equal = True
    for package, ours in here.items():
        theirs = (
            (node.machine.versions.get(package, "unknown"), node.name) for node in nodes if node.machine
        )
        for version, names in _grouped(pair for pair in theirs if pair[0] != ours):
            equal = False
            verdict: Verdict = "fault" if _breaks(package, ours, version) else "warning"
            seen = f"{package} {version} on {names}, {ours} where this job was started"
            yield Check("versions", verdict, seen, INSTALL)
    if equal and nodes:
        named = [f"{name} {here[name]}" for name in ("python", *DECISIVE) if name in here]
        yield Check("versions", "ok", f"{listed(named)} everywhere")


def _breaks(package: str, ours: str, theirs: str) -> bool:
    # Functions are sent as byte code, which changes with the second number of Python's version.
    minor = package == "python" and ours.split(".")[:2] != theirs.split(".")[:2]
    return minor or package in DECISIVE


def check_token(address: str, refuses_strangers: bool | None) -> Check:
    """Whether the cluster's control port answers someone without a token (CVE-2023-48022)."""
    if refuses_strangers:
        return Check("token", "ok", f"{address} refuses who shows no token")
    if refuses_strangers is None:
        return Check("token", "warning", f"{address}: it could not be told whether it asks for a token")
    step = (
        "Run `ray get-auth-token --generate`, copy ~/.ray/auth_token to every node, and start Ray there with "
        "RAY_AUTH_MODE=token."
    )
    seen = f"{address} answers without a token: whoever reaches that port can run code here"
    return Check("token", "fault", seen, step)


def check_clocks(nodes: Sequence[Node]) -> Iterator[Check]:
    """Clocks that surely differ from ours."""
    bad = [node for node in nodes if node.clock.surely_s >= WANTED_SKEW_S]
    for node in bad:
        way = "ahead" if node.clock.ahead_s > 0 else "behind"
        seen = f"{node.name} is {abs(node.clock.ahead_s):.1f} s {way}"
        too_far = node.clock.surely_s >= MOST_SKEW_S
        seen += ": object stores refuse what it signs" if too_far else ""
        step = "Let a time service run on every node (chrony, systemd-timesyncd)."
        yield Check("clocks", "fault" if too_far else "warning", seen, step)
    if nodes and not bad:
        bound = max(node.clock.perhaps_s for node in nodes)
        yield Check("clocks", "ok", f"equal to {max(1, round(bound * 1000)):,} ms")


def check_capacity(has: Capacity) -> Iterator[Check]:
    """Whether the job finds the CPUs and GPUs that it needs, now or at all."""
    lacking = [kind for kind, n in has.needed.items() if has.limit[kind] < n]
    asked = f"{has.plan}: {_amounts(has.needed)} needed"
    if has.refusal or lacking:
        seen = has.refusal or f"{asked}, but the cluster has {_amounts(has.limit)}"
        step = "Add nodes, or ask for less. `ray status` tells what is there."
        if "GPU" in lacking or "GPU" in has.refusal:
            step = "Add nodes with GPUs (the group `gpu` of cluster.yaml), or ask for --device cpu."
        yield Check("capacity", "fault", seen, step)
    elif any(has.there[kind] < n for kind, n in has.needed.items()):
        seen = f"{asked}; there are {_amounts(has.there)}, up to {_amounts(has.limit)} can be added"
        step = "The autoscaler will add nodes, which are not examined: run this again when they are there."
        yield Check("capacity", "warning", seen, step)
    elif any(has.free[kind] < n for kind, n in has.needed.items()):
        step = "Other jobs hold the rest: this one would wait for them."
        yield Check("capacity", "warning", f"{asked}; {_free(has)}", step)
    else:
        yield Check("capacity", "ok", f"{asked}; {_free(has)}")


def check_gpus(nodes: Sequence[Node], wanted: bool) -> Iterator[Check]:
    """GPUs that Ray hands out and torch cannot use."""
    with_gpus = [node for node in nodes if node.gpus]
    bad = [n for n in with_gpus if n.machine and n.machine.torch_gpus < n.gpus]
    for node in bad:
        usable = node.machine.torch_gpus if node.machine else 0
        seen = f"{node.name}: Ray gives out {_amounts({'GPU': node.gpus})}, torch can use {usable}"
        step = "Look at `nvidia-smi` there: is the driver new enough for the CUDA of this torch?"
        yield Check("GPUs", "fault" if wanted else "warning", seen, step)
    if with_gpus and not bad:
        total = sum(node.gpus for node in with_gpus)
        yield Check("GPUs", "ok", f"torch can use all {total:g} on {counted(len(with_gpus), 'node')}")


def check_memory(nodes: Sequence[Node]) -> Iterator[Check]:
    """Free memory where work is done."""
    free = {node.name: node.machine.free_memory_bytes for node in nodes if node.machine}
    step = "End what else runs there, or take larger nodes: Ray kills workers when memory runs out."
    yield from _least("memory", free, WANTED_MEMORY_BYTES, LEAST_MEMORY_BYTES, " free", step)


def check_object_store(nodes: Sequence[Node]) -> Iterator[Check]:
    """Ray's object store, and whether it fits into shared memory."""
    sizes = {node.name: node.object_store_bytes for node in nodes}
    step = "Start Ray there with a larger --object-store-memory: pictures on their way would go to disk."
    yield from _least("object store", sizes, WANTED_STORE_BYTES, 0, "", step)
    shared = {n.name: (n.machine.shm_bytes, n.object_store_bytes) for n in nodes if n.machine}
    small = ((sizes, name) for name, sizes in shared.items() if sizes[0] < sizes[1])
    for (shm, store), names in _grouped(small):
        seen = f"{names}: /dev/shm has {_size(shm)}, the object store {_size(store)}"
        step = (
            "Give containers more (--shm-size, an emptyDir of medium Memory): Ray uses a slow disk instead."
        )
        yield Check("object store", "warning", seen, step)


def check_disks(nodes: Sequence[Node], cache_bytes: int) -> Iterator[Check]:
    """Room where Ray spills, and where slides are staged (`cache_bytes` of them, 0 where none will be)."""
    found = [(node.machine.ray_disk, node) for node in nodes if node.machine]
    bad = [(disk, node) for disk, node in found if disk.used >= NEARLY_FULL]
    for disk, node in bad:
        seen = f"{node.name}: {_size(disk.free_bytes)} free at {disk.path}, {100 * disk.used:.0f} % full"
        step = "Make room there, or start Ray with another --temp-dir: at 95 % Ray stores no more objects."
        yield Check("disk", "fault" if disk.used >= FULL else "warning", seen, step)
    if found and not bad:
        free = min(disk.free_bytes for disk, _ in found)
        yield Check("disk", "ok", f"{_size(free)} free or more for Ray's files")
    caches = {n.name: n.machine.cache_disk.free_bytes for n in nodes if n.machine and n.works}
    if cache_bytes and caches:
        step = "Make room, or set TMPDIR to a larger disk on the nodes: whole slides are fetched into it."
        yield from _least("slide cache", caches, cache_bytes, 0, " free", step)


def check_places(nodes: Sequence[Node]) -> Iterator[Check]:
    """What the flags name: whether every node could do there what the job does, and how fast."""
    tried = [(attempt, node.name) for node in nodes for attempt in node.attempts]
    for flag in dict.fromkeys(attempt.flag for attempt, _ in tried):
        mine = [pair for pair in tried if pair[0].flag == flag]
        title = flag.removeprefix("--")
        failed = [pair for pair in mine if pair[0].error]
        for (action, error), names in _grouped(((a.action, a.error), name) for a, name in failed):
            yield Check(title, "fault", f"{names}: {error}", NEXT_STEPS[action])
        if not failed:
            yield _speed(title, [pair[0] for pair in mine], [pair for pair in mine if _is_slow(pair[0])])


def _is_slow(attempt: Attempt) -> bool:
    return attempt.n_bytes >= RATED_BYTES and attempt.rate < WANTED_RATE


def _speed(title: str, attempts: Sequence[Attempt], slow: Sequence[tuple[Attempt, str]]) -> Check:
    if slow:
        worst, name = min(slow, key=lambda pair: pair[0].rate)
        seen = f"{worst.uri}: {PAST[worst.action]} at {worst.rate / MIB:.2f} MiB/s only, on {name}"
        return Check(title, "warning", seen, "Pictures will be waited for: bring storage and nodes closer.")
    said = {}
    for attempt in sorted(attempts, key=lambda one: -one.rate):  # the slowest says it
        said[attempt.action] = _done(attempt)
    words = listed([said[action] for action in NEXT_STEPS if said.get(action)])
    return Check(title, "ok", f"{attempts[0].uri}: {words}")


def _done(attempt: Attempt) -> str:
    past = PAST.get(attempt.action)
    if past is None:
        return ""
    if attempt.n_bytes >= RATED_BYTES and attempt.action != "load":
        return f"{past} at {attempt.rate / MIB:,.0f} MiB/s"
    return f"{past} in {attempt.seconds:.2f} s"


def _least(
    name: str, sizes: Mapping[str, int], wanted: int, least: int, what: str, step: str
) -> Iterator[Check]:
    """A line for the nodes with less than wanted, a fault below the least; one line where none is."""
    bad = {node: n for node, n in sizes.items() if n < wanted}
    for node, n in bad.items():
        seen = f"{node}: {_size(n)}{what}, {_size(wanted)} or more are wanted"
        yield Check(name, "fault" if n < least else "warning", seen, step)
    if sizes and not bad:
        yield Check(name, "ok", f"{_size(min(sizes.values()))}{what} or more on every node")


def _grouped(pairs: Iterable[tuple[Key, str]]) -> list[tuple[Key, str]]:
    """Each key with the names that go with it, as one phrase."""
    groups: dict[Key, list[str]] = {}
    for key, name in pairs:
        groups.setdefault(key, []).append(name)
    return [(key, _names(list(dict.fromkeys(names)))) for key, names in groups.items()]


def _names(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return listed([*names[:NAMED], f"{more} more"] if more > 0 else names)


def _amounts(resources: Mapping[str, float]) -> str:
    """`16 CPUs and 4 GPUs`; what is 0 goes unsaid, but for CPUs alone."""
    some = {kind: n for kind, n in resources.items() if n} or {"CPU": 0}
    return listed([f"{n:g} {kind}{'' if n == 1 else 's'}" for kind, n in some.items()])


def _free(has: Capacity) -> str:
    kinds = [kind for kind, n in has.there.items() if n]
    return listed([f"{has.free[kind]:g} of {has.there[kind]:g} {kind}s" for kind in kinds]) + " are free"


def _size(n_bytes: float) -> str:
    """`3.5 GiB`, `64 MiB`."""
    return f"{n_bytes / GIB:,.1f} GiB" if n_bytes >= GIB else f"{n_bytes / MIB:,.0f} MiB"
