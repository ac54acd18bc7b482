"""One job at a time writes into an output: the claims in its folder `.lease`.

    .lease/ID.json    the claim of one job: who and since when, renewed every `BEAT_S`

A job writes its claim, and then lists the folder. Object stores and disks list what was written before, so of
two jobs the one that lists later sees the claim of the other: never do both find themselves alone. This
needs no conditional writes, which pyarrow does not offer (decision 8).

A claim that has not changed for `EXPIRES_S` while another job watched it, or whose process on the same host
is gone, is deleted, and the output taken over. A job that has not written its claim for half of this time, or
does not find it, has lost the lease, and deletes and publishes nothing more: see `Lease.require`.
"""

import json
import logging
import os
import random
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

from bcd import disk, storage
from bcd.errors import BusyError, MissingError, StorageError

logger = logging.getLogger(__name__)

FOLDER = ".lease"
# Of a claim: renewed, and expired without that.
BEAT_S, EXPIRES_S = 5.0, 60.0
# Between two looks at the claims of other jobs.
LOOK_S = 1.0


@dataclass
class Lease:
    """The claim of this job to an output."""

    uri: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    since: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))
    _written: float = field(default=0.0, compare=False)
    _lost: bool = field(default=False, compare=False)
    _lock: Lock = field(default_factory=lambda: Lock(), compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process cannot renew the claim: its `require` fails."""
        return Lease, (self.uri, self.id, self.since)

    @property
    def claim_uri(self) -> str:
        """The file of the claim, which exists while the lease is held."""
        return storage.join(self.uri, FOLDER, f"{self.id}.json")

    def claim(self) -> None:
        """Write the claim."""
        started = _now()
        content = {"since": self.since, "host": socket.gethostname(), "pid": os.getpid(), "place": _place()}
        storage.write_bytes(self.claim_uri, json.dumps(content).encode(), whole=False)
        self._written = started

    def require(self) -> None:
        """Renew the claim: directly before anything is deleted or replaced, after all that is read for
        it, because a job may pause while it reads.

        Raises:
            BusyError: the lease is lost, because this job was not seen for a while.
            StorageError: the output cannot be read or written.
        """
        with self._lock:
            before = self._written
            self._lost = self._lost or not storage.exists(self.claim_uri)
            if not self._lost:
                self.claim()
                self._lost = _now() - before > EXPIRES_S / 2
            if self._lost:
                self._delete()  # it may have been renewed too late
                raise BusyError(
                    f"{self.uri} may belong to another job by now: this one could not write there for "
                    f"{EXPIRES_S / 2:.0f} s. Nothing is lost: run the same command again to resume"
                )

    def release(self) -> None:
        """Delete the claim."""
        with self._lock:
            self._lost = True
            self._delete()

    def _delete(self) -> None:
        # Where another job took over, it is deleted already.
        with suppress(StorageError):
            storage.delete_file(self.claim_uri)


@contextmanager
def held(uri: str, wait: bool = False) -> Iterator[Lease]:
    """Hold the lease of an output folder.

    Args:
        uri: of the folder; made where there is none.
        wait: until another job that holds it has ended.

    Raises:
        BusyError: another job holds it, and `wait` is false.
        StorageError: the folder cannot be read or written.
    """
    is_new = not storage.exists(uri)
    lease = _acquired(storage.absolute(uri), wait)
    ended = Event()
    beating = Thread(target=_beat, args=(lease, ended), name="bcd-lease", daemon=True)
    beating.start()
    try:
        if not storage.is_remote(uri):
            disk.finish_writes(storage.absolute(uri))  # what is left of jobs that ended while they wrote
        yield lease
    finally:
        ended.set()
        beating.join()
        lease.release()
        if is_new and not storage.is_remote(uri):
            disk.delete_empty_folder(storage.absolute(uri), FOLDER)


def _beat(lease: Lease, ended: Event) -> None:
    """Keep the claim alive. Whether that succeeded is for `Lease.require` to say."""
    while not ended.wait(BEAT_S):
        with suppress(StorageError):  # a store with a bad day
            try:
                lease.require()
            except BusyError:
                return


@dataclass
class _Claim:
    """The claim of another job, as this one sees it; times by the clock of this one."""

    uri: str
    version: str
    content: dict[str, Any]
    seen: float = field(default_factory=lambda: _watched_time())
    is_live: bool = False

    @property
    def is_dead(self) -> bool:
        """Whether its job has ended without a word."""
        return _is_gone(self.content) or _watched_time() - self.seen > EXPIRES_S

    @property
    def owner(self) -> str:
        """The job, as a sentence names it."""
        known = {name: self.content.get(name, "?") for name in ("pid", "host", "since")}
        return "another job (process {pid} on {host}, since {since})".format(**known)


def _acquired(uri: str, wait: bool) -> Lease:
    known, said = dict[str, _Claim](), False
    while True:
        known = {claim.uri: claim for claim in _looked(uri, known)}
        if not known:
            if lease := _claimed(uri):
                return lease
            # Two jobs came at once, and neither has begun.
            _sleep(random.uniform(0, LOOK_S))
            continue
        if not wait and (live := [claim for claim in known.values() if claim.is_live]):
            raise BusyError(f"{uri} is being written by {live[0].owner}: --wait waits for its end")
        if not said:
            said = True
            first = next(iter(known.values()))
            logger.info(f"{uri} is claimed by {first.owner}: looking whether it is alive")
        _sleep(LOOK_S)


def _claimed(uri: str) -> Lease | None:
    """The lease, if no other claim is there once ours is."""
    lease, is_alone = Lease(uri), False
    try:
        lease.claim()
        claims = storage.list_files_if_any(storage.join(uri, FOLDER))
        is_alone = [claim.uri for claim in claims] == [lease.claim_uri]
    finally:
        if not is_alone:
            lease.release()
    return lease if is_alone else None


def _looked(uri: str, known: dict[str, _Claim]) -> Iterator[_Claim]:
    """The claims of others; those of dead jobs are deleted."""
    for file in storage.list_files_if_any(storage.join(uri, FOLDER)):
        claim = known.get(file.uri)
        if claim is None or claim.version != file.version:
            if (content := _content(file.uri)) is None:
                continue
            claim = _Claim(file.uri, file.version, content, is_live=claim is not None)
        if claim.is_dead:
            with suppress(MissingError):
                storage.delete_file(file.uri)
        else:
            yield claim


def _content(uri: str) -> dict[str, Any] | None:
    """What a claim says; None where it was deleted meanwhile."""
    try:
        found = json.loads(storage.read_bytes(uri))
    except ValueError:
        return {}
    except MissingError:
        return None
    return found if isinstance(found, dict) else {}


def _place() -> str | None:
    """Where process ids are those of this process: the kernel since its start, and the namespace."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _is_gone(content: dict[str, Any]) -> bool:
    """Whether the process of a claim ran here, and has ended."""
    if content.get("place") is None or content["place"] != _place():
        return False
    try:
        status = Path(f"/proc/{content.get('pid')}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status.rpartition(")")[2].split()[0] in ("Z", "X")


def _now() -> float:
    """Seconds that passed for others, too, while this computer slept."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _watched_time() -> float:
    """Seconds in which this process could look: a job on the same computer slept with it."""
    return time.monotonic()


_sleep = time.sleep
