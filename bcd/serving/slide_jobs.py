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
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel

from bcd import schema, storage
from bcd.errors import MissingError
from bcd.scoring import ledger, slides
from bcd.serving.receive import SENT, SLIDES, RefusedError, overloaded

State = Literal["queued", "running", "done", "failed", "cancelled"]
RUNNER, WAITING, ABOUT, OUTPUT = "runner", "waiting", "slide.json", "output"
PROGRESS, CANCELLED, FAILED = "progress.json", "cancelled", "failed.json"
# Of a row of `slides.parquet`: what the caller does not need to know, and what is null.
HIDDEN = (schema.URI, schema.ERROR, schema.ERROR_MESSAGE)
# Results that are files, by their last path component in the address.
FILES = {slides.HEATMAP: "image/png", slides.GEOJSON: "application/gzip"}


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
        if not inside or not storage.is_file(uri):
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
        if re.fullmatch(r"[0-9a-f]{32}", job_id):
            try:
                return About.model_validate_json(storage.read_bytes(self.folder(job_id, ABOUT)))
            except MissingError:
                pass
        raise RefusedError(404, "no_slide", "this service knows no slide of this id")

    def state(self, job_id: str) -> State:
        """How far a slide is."""
        ends: dict[State, str] = {"failed": FAILED, "cancelled": CANCELLED, "running": PROGRESS}
        if storage.exists(self.folder(job_id, OUTPUT, ledger.SUMMARY)):
            return "done"
        return next((s for s, name in ends.items() if storage.exists(self.folder(job_id, name))), "queued")

    def note(self, job_id: str, name: str, content: dict[str, Any]) -> None:
        """Write `PROGRESS`, `FAILED` or `CANCELLED`."""
        storage.write_bytes(self.folder(job_id, name), json.dumps(content).encode(), whole=False)

    def fail(self, job_id: str, code: str, message: str) -> None:
        """A slide ends without a result."""
        self.note(job_id, FAILED, {"code": code, "message": message})

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
        (row,) = storage.read_table(storage.join(output, slides.TABLE)).to_pylist()
        facts = self._read(job_id, f"{OUTPUT}/{ledger.SUMMARY}")
        if row[schema.ERROR]:
            error = {"code": row[schema.ERROR], "message": row[schema.ERROR_MESSAGE]}
            return {schema.MODEL_ID: facts[schema.MODEL_ID], "error": error}
        known = {name: value for name, value in row.items() if name not in HIDDEN}
        links = {name: f"{SLIDES}/{job_id}/{name}" for name in FILES}
        return {schema.MODEL_ID: facts[schema.MODEL_ID], "slide": known, "files": links}

    def file(self, job_id: str, name: str) -> bytes:
        """One of `FILES` of a slide. Raises RefusedError where it has none."""
        about = self.about(job_id)
        place = slides.folder(self.folder(job_id, OUTPUT), PurePosixPath(about.name).name)
        try:
            return storage.read_bytes(storage.join(place, name))
        except MissingError:
            raise RefusedError(404, "no_result", "this slide has no result, or not yet") from None

    def remove(self, job_id: str) -> State:
        """Cancel a slide that has not ended, delete one that has; returns the state that it was in."""
        self.about(job_id)
        state = self.state(job_id)
        if state in ("queued", "running"):
            self.note(job_id, CANCELLED, {})
        else:
            storage.delete_folder(self.folder(job_id))
        return state


def new_id() -> str:
    """An id of a slide, which nobody guesses."""
    return uuid.uuid4().hex
