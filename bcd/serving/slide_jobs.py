"""Slides that callers send or name: a folder with a subfolder for each, which says how far it is.

    runner/            the lease of the replica that scores them, one after the other
    waiting/TIME-ID    a slide that has no result yet; oldest first
    ID/slide.json      its name, URI and µm/px, and when it came
    ID/slide/NAME      the slide itself, if it was sent
    ID/progress.json   since it is being scored: what the job said last
    ID/cancelled       a caller does not want it any more
    ID/failed.json     why it has no result
    ID/output/         what `jobs/score.py` writes, its summary last

Nothing else is kept, so any replica answers for any slide, and one that starts continues with what it finds.
"""

import json
import logging
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import IO, Any, Literal

from pydantic import BaseModel, ValidationError

from bcd import lease, schema, storage
from bcd.config.serving import ServiceConfig
from bcd.errors import BusyError, MissingError, StorageError
from bcd.lease import Lease
from bcd.scoring import ledger
from bcd.serving.receive import SENT, SLIDES, RefusedError, new_id, overloaded

logger = logging.getLogger(__name__)

State = Literal["queued", "running", "done", "failed", "cancelled"]
RUNNER, WAITING, ABOUT, OUTPUT = "runner", "waiting", "slide.json", "output"
PROGRESS, CANCELLED, FAILED = "progress.json", "cancelled", "failed.json"
# Of a row of `slides.parquet`: what the caller does not need to know, and what is null.
HIDDEN = (schema.URI, schema.ERROR, schema.ERROR_MESSAGE)
# Results that are files, by their last path component in the address.
FILES = {ledger.HEATMAP: "image/png", ledger.GEOJSON: "application/gzip"}

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


def no_result() -> RefusedError:
    """The error of a slide that is not done."""
    return RefusedError(404, "no_result", "this slide has no result, or not yet")


class About(BaseModel):
    """A slide to score: its name, where it is, µm per pixel if the caller states them, and when it came."""

    id: str
    name: str
    uri: str
    mpp: float | None = None
    since: str


@dataclass(frozen=True)
class SlideJobs:
    """The folder of slides: `uri`; `archive` has those that callers may name; at most `most` wait."""

    uri: str
    archive: str | None
    most: int

    def folder(self, job_id: str, *parts: str) -> str:
        """URI of, or within, the subfolder of a slide."""
        return storage.join(self.uri, job_id, *parts)

    def add_sent(self, job_id: str, name: str, mpp: float | None) -> About:
        """Queue a slide whose file is in its subfolder already, or delete it where too many wait."""
        try:
            self._require_room()
        except RefusedError:
            storage.delete_folder(self.folder(job_id))
            raise
        return self._add(job_id, name, self.folder(job_id, SENT, name), mpp)

    def add_named(self, name: str, mpp: float | None) -> About:
        """Queue a slide of the archive. Raises RefusedError where there is none of that name."""
        if self.archive is None:
            why = "this service takes no slides by name; send the file as the body"
            raise RefusedError(422, "no_archive", why)
        path = PurePosixPath(name)
        inside = (
            not path.is_absolute() and ".." not in path.parts and "://" not in name and name.isprintable()
        )
        uri = storage.join(self.archive, name)
        listed = name.lower().endswith(schema.MANIFEST_SUFFIXES)  # what it names would be read
        if not inside or listed or not storage.is_file(uri):
            raise RefusedError(404, "no_slide", "the archive of this service has no file of this name")
        self._require_room()
        return self._add(new_id(), name, uri, mpp)

    def _add(self, job_id: str, name: str, uri: str, mpp: float | None) -> About:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        about = About(id=job_id, name=name, uri=uri, mpp=mpp, since=since)
        storage.write_bytes(self.folder(job_id, ABOUT), about.model_dump_json().encode())
        storage.write_bytes(storage.join(self.uri, WAITING, f"{time.time_ns():020d}-{job_id}"), b"")
        return about

    def _require_room(self) -> None:
        if len(self.waiting()) >= self.most:
            raise overloaded(f"{self.most} slides are waiting")

    def waiting(self) -> list[str]:
        """Ids of the slides that have no result yet, the oldest first."""
        files = storage.list_files_if_any(storage.join(self.uri, WAITING))
        return [file.path.rpartition("-")[2] for file in sorted(files, key=lambda file: file.path)]

    def forget_waiting(self, job_id: str) -> None:
        """A slide waits no longer, because it has ended."""
        for file in storage.list_files_if_any(storage.join(self.uri, WAITING)):
            if file.path.endswith(job_id):
                storage.delete_file(file.uri)

    def about(self, job_id: str) -> About:
        """The slide of an id. Raises RefusedError if there is none."""
        if found := self.known(job_id):
            return found
        raise RefusedError(404, "no_slide", "this service knows no slide of this id")

    def known(self, job_id: str) -> About | None:
        """The slide of an id; None if there is none, or no longer."""
        if re.fullmatch(r"[0-9a-f]{32}", job_id):
            with suppress(MissingError, ValidationError):
                return About.model_validate_json(storage.read_bytes(self.folder(job_id, ABOUT)))
        return None

    def state(self, job_id: str) -> State:
        """How far a slide is."""
        # What was cancelled stays so, also where the job ended before it noticed.
        signs: dict[State, tuple[str, ...]] = {
            "cancelled": (CANCELLED,),
            "done": (OUTPUT, ledger.SUMMARY),
            "failed": (FAILED,),
            "running": (PROGRESS,),
        }
        return next((s for s, sign in signs.items() if storage.exists(self.folder(job_id, *sign))), "queued")

    def note(self, job_id: str, name: str, content: dict[str, Any]) -> None:
        """Write `PROGRESS`, `FAILED` or `CANCELLED`."""
        storage.write_bytes(self.folder(job_id, name), json.dumps(content).encode())

    def fail(self, job_id: str, code: str, message: str) -> None:
        """A slide ends without a result."""
        self.note(job_id, FAILED, {"code": code, "message": message})

    def output(self, job_id: str) -> str:
        """URI of what the job has written about a slide. Raises RefusedError where it is not done."""
        self.about(job_id)
        if self.state(job_id) != "done":
            raise no_result()
        return self.folder(job_id, OUTPUT)

    def document(self, job_id: str) -> dict[str, Any]:
        """The answer about a slide: its state and what belongs to it."""
        about, state = self.about(job_id), self.state(job_id)
        document: dict[str, Any] = {**about.model_dump(exclude={"uri"}), "state": state}
        more: dict[State, Callable[[str], dict[str, Any]]] = {
            "queued": self._place,
            "running": lambda job_id: {"progress": self._read(job_id, PROGRESS)},
            "failed": lambda job_id: {"error": self._read(job_id, FAILED)},
            "done": self._result,
        }
        return document | more.get(state, lambda _: {})(job_id)

    def _place(self, job_id: str) -> dict[str, Any]:
        waiting = self.waiting()
        return {"before": waiting.index(job_id) if job_id in waiting else 0}

    def _read(self, job_id: str, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(storage.read_bytes(self.folder(job_id, name)))
        return content

    def _result(self, job_id: str) -> dict[str, Any]:
        """The row of the slide, or its error, and the addresses of its files."""
        output = self.folder(job_id, OUTPUT)
        rows = storage.read_table(storage.join(output, ledger.SLIDES)).to_pylist()
        facts = self._read(job_id, f"{OUTPUT}/{ledger.SUMMARY}")
        if not rows:
            why = "the file is no whole slide but one image; send it to /v1/predict"
            return {"error": {"code": "not_a_slide", "message": why}}
        row = rows[0]
        if row[schema.ERROR]:
            error = {"code": row[schema.ERROR], "message": row[schema.ERROR_MESSAGE]}
            return {schema.MODEL_ID: facts[schema.MODEL_ID], "error": error}
        known = {name: value for name, value in row.items() if name not in HIDDEN}
        links = {name: f"{SLIDES}/{job_id}/{name}" for name in FILES}
        return {schema.MODEL_ID: facts[schema.MODEL_ID], "slide": known, "files": links}

    def file(self, job_id: str, name: str) -> bytes:
        """One of `FILES` of a slide. Raises RefusedError where it has none."""
        about = self.about(job_id)
        place = self.folder(job_id, OUTPUT, ledger.slide_folder(PurePosixPath(about.name).name))
        try:
            return storage.read_bytes(storage.join(place, name))
        except MissingError:
            raise no_result() from None

    def remove(self, job_id: str) -> State:
        """Cancel a slide that has not ended, delete one that has; returns the state that it was in."""
        self.about(job_id)
        state = self.state(job_id)
        if state in ("queued", "running"):
            self.note(job_id, CANCELLED, {})
            if job_id in self.waiting():  # its runner deletes the rest
                return state
        storage.delete_folder(self.folder(job_id))
        return state


def jobs_of(config: ServiceConfig) -> SlideJobs | None:
    """The folder of slides that the settings name, if any."""
    if config.slides is None:
        return None
    archive = storage.absolute(config.archive) if config.archive else None
    return SlideJobs(storage.absolute(config.slides), archive, config.max_slides)


@dataclass
class SlideRunner:
    """Scores the slides that wait, one after the other, in a thread: runs `command` with the flags of each
    and the variables `environ`.

    Every replica of the service has a runner. The one that holds the lease of the folder works; when its
    replica is lost, another takes over and runs the same command again, which continues within the slide.
    """

    jobs: SlideJobs
    flags: Sequence[str]
    environ: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = COMMAND

    def start(self) -> threading.Thread:
        """Work until the process ends, in the returned thread."""
        worker = threading.Thread(target=self._work, name="slides", daemon=True)
        worker.start()
        return worker

    def _work(self) -> None:
        while True:
            try:
                if self.jobs.waiting():
                    self.run_all()
            except (StorageError, OSError) as error:  # of storage, or no process can be started now
                logger.warning(f"slides wait: {error}")
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
        while (about := self.jobs.known(job_id)) and self.jobs.state(job_id) in ("queued", "running"):
            runs += 1
            code, said = self._once(about, held)
            if code and (runs >= MOST_RUNS or code in FINAL_CODES):
                logger.warning(f"a slide was not scored (exit code {code}): {said}")
                why = "the job that scores it failed; the log of the service says why"
                self.jobs.fail(job_id, "job_failed", why)
        # What a caller does not want is not kept: it may be a patient's.
        if not self.jobs.known(job_id):  # deleted while the job ended
            storage.delete_folder(self.jobs.folder(job_id))
        elif self.jobs.state(job_id) == "cancelled":
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
