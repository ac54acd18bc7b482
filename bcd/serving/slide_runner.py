"""Score the slides that wait in `slide_jobs`, one after the other, by the archive job.

Every replica of the service has a runner. The one that holds the lease of the folder works; when its replica
is lost, another takes over and runs the same command again, which continues within the slide.
"""

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Any

from bcd import lease, storage
from bcd.errors import BusyError, StorageError
from bcd.lease import Lease
from bcd.serving.receive import SENT
from bcd.serving.slide_jobs import OUTPUT, PROGRESS, RUNNER, About, SlideJobs

logger = logging.getLogger(__name__)

# Between two looks for a slide that waits or is cancelled.
LOOK_S = 1.0
# Runs of a command that ends as if it could succeed later, as when storage is down.
MOST_RUNS = 3
# Until a cancelled job, asked to end, is made to.
END_S = 10.0
# The kernel ends the job with the replica that started it (PR_SET_PDEATHSIG): nobody else could cancel it.
PROGRAM = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)})
if os.getppid() == 1:
    sys.exit(1)
from bcd import cli
cli.console()
"""
COMMAND = (sys.executable, "-P", "-c", PROGRAM, "score")
# Of a line about progress, for callers: others may name files of the service.
TOLD = ("message", "rows", "share")
# Exit codes of jobs that a repetition does not help: settings are wrong.
FINAL_CODES = (2,)


@dataclass
class SlideRunner:
    """Runs `command` with the flags of each slide and the variables `environ`, in a thread."""

    jobs: SlideJobs
    flags: Sequence[str]
    environ: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = COMMAND

    def start(self) -> None:
        """Work until the process ends."""
        threading.Thread(target=self._work, name="slides", daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                if self.jobs.waiting():
                    self.run_all()
            except StorageError as error:
                logger.warning(f"slides wait for storage: {error}")
            except BusyError:  # another replica works
                pass
            time.sleep(LOOK_S)

    def run_all(self) -> None:
        """Score what waits. Raises BusyError where another runner does, or has taken over."""
        with lease.held(storage.join(self.jobs.uri, RUNNER)) as held:
            while waiting := self.jobs.waiting():
                self._run(waiting[0], held)

    def _run(self, job_id: str, held: Lease) -> None:
        """One slide to its end."""
        runs = 0
        while self.jobs.state(job_id) in ("queued", "running"):
            runs += 1
            code, said = self._once(self.jobs.about(job_id), held)
            if code and (runs >= MOST_RUNS or code in FINAL_CODES):
                logger.warning(f"a slide was not scored (exit code {code}): {said}")
                why = "the job that scores it failed; the log of the service says why"
                self.jobs.fail(job_id, "job_failed", why)
        if self.jobs.state(job_id) == "cancelled":
            # What a caller does not want is not kept: it may be a patient's.
            for part in (SENT, OUTPUT):
                storage.delete_folder(self.jobs.folder(job_id, part))
        held.require()
        self.jobs.forget_waiting(job_id)

    def _once(self, about: About, held: Lease) -> tuple[int, str]:
        """Run the job once; its exit code, 0 if it was cancelled, and what it said last."""
        self.jobs.note(about.id, PROGRESS, {"message": "starting"})
        scale = ["--mpp", f"{about.mpp}"] if about.mpp else []
        where = ["--input", about.uri, "--output", self.jobs.folder(about.id, OUTPUT)]
        # A job of a replica that was lost may still run: wait for it.
        process = subprocess.Popen(
            [*self.command, *self.flags, *where, *scale, "--wait", "--log-format", "json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self.environ},
            start_new_session=True,
        )
        assert process.stdout
        said = ""
        try:
            for line in _lines(process.stdout):
                if self.jobs.state(about.id) == "cancelled":
                    return 0, said
                record = _record(line)
                said = record.get("message", said)
                if "share" in record:
                    held.require()
                    self.jobs.note(about.id, PROGRESS, {name: record[name] for name in TOLD})
            return process.wait(), said
        finally:
            _end(process)


def _lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines as they come, and None each `LOOK_S` without one."""
    os.set_blocking(stream.fileno(), False)
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(LOOK_S):
                yield None
                continue
            if not (data := stream.read()):
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from lines


def _record(line: bytes | None) -> dict[str, Any]:
    """A line of the job; empty for those of Ray and its workers."""
    with suppress(ValueError):
        found = json.loads(line or b"")
        if isinstance(found, dict) and "message" in found and "process" not in found:
            return found
    return {}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the job, if it has not ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
    if process.stdout:
        process.stdout.close()
