"""Checks of a cluster before a long job, from the facts that `bcd.preflight.doctor` gathers, and their table.

Each check uses its own facts alone, so that a failed one hides no other.
"""

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from bcd.audit import identifiers
from bcd.preflight.node import Action, Attempt, Capacity, ClusterFacts, Node, Sample
from bcd.text import counted, listed, size, some

Verdict = Literal["ok", "warning", "fault"]
Key = TypeVar("Key")

MIB, GIB = 2**20, 2**30
# Different versions of these break a job or change its numbers; for the others there is a warning.
DECISIVE = ("ray", "torch", "bcd")
# Peak of the archive job on two cores, 3,572 MiB, rounded up; a process with torch and one ResNet50: 949.
WANTED_MEMORY_BYTES, LEAST_MEMORY_BYTES = 4 * GIB, GIB
# A block of Ray Data has up to 128 MiB (`DataContext.target_max_block_size`): four in flight. Ray refuses to
# start with less than 75 MiB.
WANTED_STORE_BYTES = 512 * MIB
# Ray creates and spills no object once its disk is 95 % full (`local_fs_capacity_threshold`).
FULL, NEARLY_FULL = 0.95, 0.85
# AWS accepts requests whose signature is at most five minutes off (S3: fifteen).
# https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv.html
WANTED_SKEW_S, MOST_SKEW_S = 2.0, 300.0
# Of one stream; eight are read at a time (`storage.READ_THREADS`), so this is 16 fields of 0.5 MB a second:
# the speed of scoring on two CPU cores. Below `RATED_BYTES`, latency dominates.
WANTED_RATE, RATED_BYTES = MIB, MIB
# Nodes that a sentence names.
NAMED = 4

INSTALL = "Install the same on every node: pip install -c constraints.txt . (or one image for all nodes)."
NEXT_STEPS: Mapping[Action, str] = {
    "find": "Check the path or bucket name, and that there are files of a supported format below it.",
    "read": "Check the path, and credentials and endpoint (AWS_* variables or a role) on every node.",
    "write": "Check that the bucket or disk exists, and that every node may write to it.",
    "see": "Nodes must see what others wrote: use s3:// or gs://, or a folder that all of them share.",
    "delete": "Permit the nodes to delete there: jobs replace their own files. Remove what was left behind.",
    "load": "Use a complete bundle or state dict, at a place that every node can read.",
}
PAST: Mapping[Action, str] = {"read": "read", "write": "written", "see": "read", "load": "loaded"}
# Verdicts as words, so that the table reads the same without colours.
WORDS: dict[Verdict, str] = {"ok": "ok", "warning": "WARNING", "fault": "FAULT"}
COLOURS: dict[Verdict, str] = {"ok": "\033[32m", "warning": "\033[1;33m", "fault": "\033[1;31m"}
PLAIN = "\033[0m"
WIDEST, NARROWEST = 110, 60


@dataclass(frozen=True)
class Check:
    """One line of the table, and the next step where there is something to do."""

    name: str
    verdict: Verdict
    seen: str
    next_step: str = ""


def diagnose(facts: ClusterFacts) -> list[Check]:
    """Run every check, in the order of the table."""
    machines = [node for node in facts.nodes if node.machine]
    workers = [node for node in machines if node.works]
    return [
        *check_answers(facts.nodes),
        *check_versions(facts.versions, machines),
        check_token(facts.address, facts.rejects_unauthenticated),
        *check_clocks(machines),
        *check_capacity(facts.capacity),
        *check_gpus(machines, facts.may_use_gpus),
        *check_memory(workers),
        *check_object_store(workers),
        *check_disks(machines, facts.stages_slides_bytes),
        *check_places(machines),
        *check_privacy(facts.sample),
    ]


def check_answers(nodes: Sequence[Node]) -> Iterator[Check]:
    """Nodes that did not answer."""
    awake = [node.name for node in nodes if node.machine]
    of_all = f" of {len(nodes)}" if len(awake) < len(nodes) else ""
    for trouble, names in _grouped((node.trouble, node.name) for node in nodes if not node.machine):
        step = "See `ray status` and the raylet's log there. Nothing else is known of it."
        if "No module named" in trouble:
            step = f"{INSTALL} The code comes with the job: ray job submit --working-dir ."
        yield Check("nodes", "fault", f"{names}: {trouble}", step)
    if awake:
        yield Check("nodes", "ok", f"{len(awake)}{of_all} answered: {_names(awake)}")


def check_versions(here: Mapping[str, str], nodes: Sequence[Node]) -> Iterator[Check]:
    """Packages whose versions on a node differ from those of this process."""
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
    # Functions are sent as byte code, which depends on Python's minor version.
    minor = package == "python" and ours.split(".")[:2] != theirs.split(".")[:2]
    return minor or package in DECISIVE


def check_token(address: str, rejects_unauthenticated: bool | None) -> Check:
    """Whether the cluster's control port answers requests without a token (CVE-2023-48022)."""
    if rejects_unauthenticated:
        return Check("token", "ok", f"{address} rejects requests without a token")
    if rejects_unauthenticated is None:
        return Check("token", "warning", f"{address}: unknown whether it requires a token")
    step = (
        "Run `ray get-auth-token --generate`, copy ~/.ray/auth_token to every node, and start Ray there with "
        "RAY_AUTH_MODE=token."
    )
    seen = f"{address} answers without a token: anyone who reaches that port can run code here"
    return Check("token", "fault", seen, step)


def check_clocks(nodes: Sequence[Node]) -> Iterator[Check]:
    """Clocks that differ from ours by more than the error of the measurement."""
    bad = [node for node in nodes if node.clock.surely_s >= WANTED_SKEW_S]
    for node in bad:
        way = "ahead" if node.clock.ahead_s > 0 else "behind"
        seen = f"{node.name} is {abs(node.clock.ahead_s):.1f} s {way}"
        too_far = node.clock.surely_s >= MOST_SKEW_S
        seen += ": object stores reject its signatures" if too_far else ""
        step = "Run a time service on every node (chrony, systemd-timesyncd)."
        yield Check("clocks", "fault" if too_far else "warning", seen, step)
    if nodes and not bad:
        bound = max(node.clock.perhaps_s for node in nodes)
        yield Check("clocks", "ok", f"equal to {max(1, round(bound * 1000)):,} ms")


def check_capacity(has: Capacity) -> Iterator[Check]:
    """Whether the cluster has the CPUs and GPUs that the job needs, now or at all."""
    lacking = [kind for kind, n in has.needed.items() if has.limit[kind] < n]
    needed = f"{has.plan}: {_amounts(has.needed)} needed"
    if has.refusal or lacking:
        seen = has.refusal or f"{needed}, but the cluster has {_amounts(has.limit)}"
        step = "Add nodes, or use fewer workers. `ray status` lists what the cluster has."
        if "GPU" in lacking or "GPU" in has.refusal:
            step = "Add nodes with GPUs (the group `gpu` of cluster.yaml), or use --device cpu."
        yield Check("capacity", "fault", seen, step)
    elif any(has.there[kind] < n for kind, n in has.needed.items()):
        seen = f"{needed}; there are {_amounts(has.there)}, up to {_amounts(has.limit)} can be added"
        step = "The autoscaler will add nodes, which are not examined: run this again when they are there."
        yield Check("capacity", "warning", seen, step)
    elif any(has.free[kind] < n for kind, n in has.needed.items()):
        step = "Other jobs use the rest: this one would wait for them."
        yield Check("capacity", "warning", f"{needed}; {_free(has)}", step)
    else:
        yield Check("capacity", "ok", f"{needed}; {_free(has)}")


def check_gpus(nodes: Sequence[Node], wanted: bool) -> Iterator[Check]:
    """GPUs that Ray offers and torch cannot use."""
    with_gpus = [node for node in nodes if node.gpus]
    bad = [n for n in with_gpus if n.machine and n.machine.torch_gpus < n.gpus]
    for node in bad:
        usable = node.machine.torch_gpus if node.machine else 0
        seen = f"{node.name}: Ray offers {_amounts({'GPU': node.gpus})}, torch can use {usable}"
        step = "Run `nvidia-smi` there: is the driver new enough for the CUDA of this torch?"
        yield Check("GPUs", "fault" if wanted else "warning", seen, step)
    if with_gpus and not bad:
        total = sum(node.gpus for node in with_gpus)
        yield Check("GPUs", "ok", f"torch can use all {total:g} on {counted(len(with_gpus), 'node')}")


def check_memory(nodes: Sequence[Node]) -> Iterator[Check]:
    """Free memory of the workers' nodes."""
    free = {node.name: node.machine.free_memory_bytes for node in nodes if node.machine}
    step = "Stop other programs there, or use larger nodes: Ray kills workers when memory runs out."
    yield from _least("memory", free, WANTED_MEMORY_BYTES, LEAST_MEMORY_BYTES, " free", step)


def check_object_store(nodes: Sequence[Node]) -> Iterator[Check]:
    """Ray's object store, and whether it fits into shared memory."""
    sizes = {node.name: node.object_store_bytes for node in nodes}
    step = "Start Ray there with a larger --object-store-memory: images in transit would spill to disk."
    yield from _least("object store", sizes, WANTED_STORE_BYTES, 0, "", step)
    shared = {n.name: (n.machine.shm_bytes, n.object_store_bytes) for n in nodes if n.machine}
    small = ((sizes, name) for name, sizes in shared.items() if sizes[0] < sizes[1])
    for (shm, store), names in _grouped(small):
        seen = f"{names}: /dev/shm has {size(shm)}, the object store {size(store)}"
        step = "Enlarge it (--shm-size, an emptyDir of medium Memory): Ray uses a slow disk instead."
        yield Check("object store", "warning", seen, step)


def check_disks(nodes: Sequence[Node], cache_bytes: int) -> Iterator[Check]:
    """Free space where Ray spills, and where up to `cache_bytes` of slides are staged."""
    found = [(node.machine.ray_disk, node) for node in nodes if node.machine]
    bad = [(disk, node) for disk, node in found if disk.used >= NEARLY_FULL]
    for disk, node in bad:
        seen = f"{node.name}: {size(disk.free_bytes)} free at {disk.path}, {100 * disk.used:.0f} % full"
        step = "Free space there, or start Ray with another --temp-dir: at 95 % Ray stores no more objects."
        yield Check("disk", "fault" if disk.used >= FULL else "warning", seen, step)
    if found and not bad:
        free = min(disk.free_bytes for disk, _ in found)
        yield Check("disk", "ok", f"{size(free)} free or more for Ray's files")
    caches = {n.name: n.machine.cache_disk.free_bytes for n in nodes if n.machine and n.works}
    if cache_bytes and caches:
        step = "Free space, or set TMPDIR to a larger disk on the nodes: whole slides are fetched into it."
        yield from _least("slide cache", caches, cache_bytes, 0, " free", step)


def check_places(nodes: Sequence[Node]) -> Iterator[Check]:
    """The places that the flags name: whether every node could do there what the job does, and how fast."""
    tried = [(attempt, node.name) for node in nodes for attempt in node.attempts]
    for flag in dict.fromkeys(attempt.flag for attempt, _ in tried):
        mine = [pair for pair in tried if pair[0].flag == flag]
        title = flag.removeprefix("--")
        failed = [pair for pair in mine if pair[0].error]
        for (action, error), names in _grouped(((a.action, a.error), name) for a, name in failed):
            yield Check(title, "fault", f"{names}: {error}", NEXT_STEPS[action])
        if not failed:
            yield _speed(title, mine)


def check_privacy(sample: Sample | None) -> Iterator[Check]:
    """What may identify a patient in some of the inputs; no value is shown in full."""
    if sample is None:
        return
    searched = counted(sample.n_inputs, "input")
    if not sample.found:
        yield Check("privacy", "ok", f"nothing in names and metadata of {searched} identifies a patient")
        return
    first = some(identifiers.sentences(sample.found, len(sample.found)), separator="; ")
    seen = f"{identifiers.summed(sample.found)}, among {searched}; {first}"
    step = (
        "jobs/audit.py --identifiers-only lists all of them. Before results are shared, remove them or use "
        "--pseudonymise KEY."
    )
    yield Check("privacy", "warning", seen, step)


def _speed(title: str, tried: Sequence[tuple[Attempt, str]]) -> Check:
    slow = [(a, name) for a, name in tried if a.n_bytes >= RATED_BYTES and a.rate < WANTED_RATE]
    if slow:
        worst, name = min(slow, key=lambda pair: pair[0].rate)
        seen = f"{worst.uri}: {PAST[worst.action]} at {worst.rate / MIB:.2f} MiB/s only, on {name}"
        return Check(title, "warning", seen, "The job will wait for images: move storage and nodes closer.")
    slowest = {}
    for attempt, _ in sorted(tried, key=lambda pair: -pair[0].rate):
        slowest[attempt.action] = attempt
    words = listed([_done(slowest[action]) for action in PAST if action in slowest])
    return Check(title, "ok", f"{tried[0][0].uri}: {words}")


def _done(attempt: Attempt) -> str:
    past = PAST[attempt.action]
    if attempt.n_bytes >= RATED_BYTES and attempt.action != "load":
        return f"{past} at {attempt.rate / MIB:,.0f} MiB/s"
    return f"{past} in {attempt.seconds:.2f} s"


def _least(
    name: str, sizes: Mapping[str, int], wanted: int, least: int, what: str, step: str
) -> Iterator[Check]:
    """A warning for each node with less than wanted, a fault below the least; one line where all have it."""
    bad = {node: n for node, n in sizes.items() if n < wanted}
    for node, n in bad.items():
        seen = f"{node}: {size(n)}{what}, {size(wanted)} or more are recommended"
        yield Check(name, "fault" if n < least else "warning", seen, step)
    if sizes and not bad:
        yield Check(name, "ok", f"{size(min(sizes.values()))}{what} or more on every node")


def _grouped(pairs: Iterable[tuple[Key, str]]) -> list[tuple[Key, str]]:
    """Each key with its names, as one phrase."""
    groups: dict[Key, list[str]] = {}
    for key, name in pairs:
        groups.setdefault(key, []).append(name)
    return [(key, _names(list(dict.fromkeys(names)))) for key, names in groups.items()]


def _names(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return listed([*names[:NAMED], f"{more} more"] if more > 0 else names)


def _amounts(resources: Mapping[str, float]) -> str:
    """`16 CPUs and 4 GPUs`; 0 of a kind is left out, but for `0 CPUs`."""
    some = {kind: n for kind, n in resources.items() if n} or {"CPU": 0}
    return listed([f"{n:g} {kind}{'' if n == 1 else 's'}" for kind, n in some.items()])


def _free(has: Capacity) -> str:
    kinds = [kind for kind, n in has.there.items() if n]
    return listed([f"{has.free[kind]:g} of {has.there[kind]:g} {kind}s" for kind in kinds]) + " are free"


def table_lines(checks: Sequence[Check], width: int, coloured: bool) -> list[str]:
    """The table of checks for a terminal, within `width` characters where words allow."""
    first = max(len(word) for word in WORDS.values())
    second = max((len(check.name) for check in checks), default=0)
    indent = " " * (2 + first + 2 + second + 2)
    # URIs and commands are to be copied: they are not broken.
    wrap = partial(textwrap.wrap, initial_indent=indent, break_long_words=False, break_on_hyphens=False)
    width = max(NARROWEST, min(width, WIDEST))
    table = []
    for check in checks:
        word = WORDS[check.verdict].ljust(first)
        mark = f"{COLOURS[check.verdict]}{word}{PLAIN}" if coloured else word
        lines = wrap(check.seen, width, subsequent_indent=indent) or [""]
        table.append(f"  {mark}  {check.name.ljust(second)}  {lines[0].lstrip()}")
        table += lines[1:]
        if check.next_step:
            table += wrap(f"-> {check.next_step}", width, subsequent_indent=indent + "   ")
    return table


def verdict(checks: Sequence[Check], job: str) -> str:
    """One sentence over all checks: whether the job, such as `jobs/train.py`, can be started."""
    counts = Counter(check.verdict for check in checks)
    parts = [counted(counts[kind], kind) for kind in ("fault", "warning") if counts[kind]]
    if counts["fault"]:
        return f"{listed(parts)}: {job} should not be started here yet."
    return f"{listed(parts) or 'nothing found'}: {job} can start."
