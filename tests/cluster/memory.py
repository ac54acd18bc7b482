"""Memory of many processes that share much of it.

    private   sum of Pss_Anon: heap and stacks
    mapped    sum of Pss_File: libraries, each page shared out among all who map it
    store     pages behind open files in /dev/shm, each file once: Ray's object store, with the pages that no
              process maps just now

Shared memory within PSS (Pss_Shmem) is that same store and left out. Page cache that nobody maps, such as
that of the pictures read and the table written, is no process's and does not count.
"""

import contextlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = "/dev/shm/"
PSS = re.compile(r"^Pss_(Anon|File): +(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Memory:
    """At one moment, in bytes; `processes` are (private, title), largest first."""

    private: int
    mapped: int
    store: int
    processes: tuple[tuple[int, str], ...]

    @property
    def own(self) -> int:
        """What does not depend on who else runs."""
        return self.private + self.store

    @property
    def total(self) -> int:
        """All three."""
        return self.own + self.mapped


def memory(processes: Iterable[tuple[int, str]]) -> Memory:
    """Memory of processes, given by id and title, now."""
    private: list[tuple[int, str]] = []
    mapped = 0
    store: dict[tuple[int, int], int] = {}
    for pid, command in processes:
        with contextlib.suppress(OSError):  # it may end meanwhile
            pss = dict(PSS.findall(Path(f"/proc/{pid}/smaps_rollup").read_text()))
            private.append((int(pss["Anon"]) * 1024, command.strip()))
            mapped += int(pss["File"]) * 1024
            store |= _shared_files(pid)
    private.sort(reverse=True)
    return Memory(sum(size for size, _ in private), mapped, sum(store.values()), tuple(private))


def _shared_files(pid: int) -> dict[tuple[int, int], int]:
    """Bytes allocated behind each file in shared memory that a process holds open, deleted ones too."""
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # it may be closed meanwhile
            if os.readlink(link).startswith(SHARED_MEMORY):
                facts = link.stat()
                found[facts.st_dev, facts.st_ino] = facts.st_blocks * 512
    return found
