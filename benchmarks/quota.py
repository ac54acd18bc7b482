"""Hold processes to a share of a CPU, by Linux's control groups: version 1, or 2, which has not been run.
Needs root.

Hosts that are pinned to a core each share those cores with whatever else the machine runs. Held to less than
a core they leave room for it, and are as fast, or slow, alone as together.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
# The kernel takes the CPU away until the next period when the share of one is used up, and workers that wait
# for each other a hundred times a step wait that long, too: so a fifth of what is usual.
PERIOD_US = 20_000


@contextmanager
def quota(name: str, share: float) -> Iterator[list[str]]:
    """A group of processes that together have so much of a CPU.

    Args:
        name: of the group, new.
        share: of one CPU, e.g. 0.75.

    Yields:
        What to put before a command, so that it and all that it starts belong to the group.
    """
    runtime_us = round(share * PERIOD_US)
    if (ROOT / "cgroup.controllers").exists():
        (ROOT / "cgroup.subtree_control").write_text("+cpu")
        group, limits = ROOT / name, {"cpu.max": f"{runtime_us} {PERIOD_US}"}
    else:
        group = ROOT / "cpu" / name
        limits = {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": str(runtime_us)}
    group.mkdir()
    try:
        for file, limit in limits.items():
            (group / file).write_text(limit)
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        group.rmdir()
