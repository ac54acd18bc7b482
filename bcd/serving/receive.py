"""The body of a request: counted while it arrives, kept in memory or, of a whole slide, in a file.

No torch and no pyarrow at the top: the cluster's HTTP proxy imports this, and must stay small.
"""

import asyncio
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from starlette.types import Receive, Scope, Send

from bcd.config.serving import RequestConfig
from bcd.errors import StorageError

logger = logging.getLogger(__name__)

# An answer about a patient's image belongs into no cache, unless it says itself into which.
CACHE_CONTROL = b"cache-control"
NO_STORE = (CACHE_CONTROL, b"no-store")
# The code of an error, for who reads no bodies: proxies, and the guard that counts requests.
ERROR_CODE = b"x-error-code"
# Where slides are sent, and the folder of one below that of its id.
SLIDES, SENT = "/v1/slides", "slide"
# Where the models of the service are listed, and the folder of each.
MODELS = "/v1/models"
# Formats of one file: a MIRAX slide is a folder, and most DICOM slides are several files.
SUFFIXES = (".svs", ".ndpi", ".scn", ".bif", ".svslide", ".dcm", ".tif", ".tiff")
MAX_NAME = 120


class RefusedError(Exception):
    """An error answer: its HTTP status, a stable code for programs, and a sentence."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message
        self.headers = {ERROR_CODE.decode(): code, **(headers or {})}

    def document(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": {"code": self.code, "message": self.message}}

    async def send(self, send: Send) -> None:
        """Send the answer as ASGI messages."""
        body = json.dumps(self.document()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))} | self.headers
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()] + [NO_STORE]
        await send({"type": "http.response.start", "status": self.status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})


def overloaded(why: str) -> RefusedError:
    """The error of a service at its limit of requests."""
    return RefusedError(503, "overloaded", f"{why}; try again in a second", {"Retry-After": "1"})


class Limits(RequestConfig):
    """Limits of requests to a whole service."""

    max_requests: int = 64
    """Requests with a body that a process answers at a time, of all models together."""


async def chunks(receive: Receive, scope: Scope, most: int, advice: str) -> AsyncIterator[bytes]:
    """The body piece by piece.

    Raises:
        RefusedError: 413 as soon as it is known that there are more than `most` bytes; 400 where the client
            leaves before the end.
    """
    # The connection stays open: the server drops the rest, and the client sees the answer, not a reset.
    refused = RefusedError(413, "body_too_large", f"the body is larger than {most:,} bytes; {advice}")
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > most:
        raise refused
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "disconnected", "the client disconnected while sending")
        piece, more = message.get("body", b""), message.get("more_body", False)
        size += len(piece)
        if size > most:
            raise refused
        yield piece


async def body(scope: Scope, receive: Receive, limits: Limits) -> bytes:
    """The whole body; memory never holds more than allowed. Raises RefusedError as `chunks`, and 408 where it
    has not arrived in time."""
    advice = f"send whole slides to {SLIDES}" if limits.slides else "score whole slides with jobs/score.py"
    try:
        async with asyncio.timeout(limits.upload_timeout_s):
            return b"".join([piece async for piece in chunks(receive, scope, limits.max_body_bytes, advice)])
    except TimeoutError:
        why = f"the body did not arrive within {limits.upload_timeout_s:g} s"
        raise RefusedError(408, "slow_upload", why, {"Connection": "close"}) from None


def new_id() -> str:
    """An id of a slide, which nobody guesses."""
    return uuid.uuid4().hex


async def slide_file(scope: Scope, receive: Receive, limits: Limits, name: str) -> str:
    """Put the body, a slide, into the folder of a new id, which is returned.

    Memory holds a piece at a time; each must arrive within the time for a whole body.
    """
    from bcd import storage  # brings pyarrow, which other requests do without

    assert limits.slides
    job_id = new_id()
    target = storage.join(limits.slides, job_id, SENT, name)
    remote = storage.is_remote(target)
    folder = Path(tempfile.mkdtemp() if remote else storage.join(limits.slides, job_id))
    path, whole = folder / SENT / name, False
    try:
        path.parent.mkdir(parents=True)
        pieces = chunks(receive, scope, limits.max_slide_bytes, "this service takes no larger slides")
        await _write(path, pieces, limits)
        if remote:
            await asyncio.to_thread(storage.upload, path, target)
        whole = True
    except (OSError, StorageError) as error:
        logger.warning(f"a slide cannot be kept: {error}")
        why = "the service cannot keep the slide, perhaps because its disk is full"
        raise RefusedError(503, "no_room", why, {"Retry-After": "60"}) from None
    finally:
        if remote or not whole:
            await asyncio.to_thread(shutil.rmtree, folder, True)
        if remote and not whole:
            await asyncio.to_thread(storage.delete_folder, storage.parent(target))
    return job_id


async def _write(path: Path, pieces: AsyncIterator[bytes], limits: Limits) -> None:
    with path.open("xb") as file:
        while True:
            try:
                async with asyncio.timeout(limits.upload_timeout_s):
                    piece = await anext(pieces, None)
            except TimeoutError:
                why = f"nothing more of the slide arrived within {limits.upload_timeout_s:g} s"
                raise RefusedError(408, "slow_upload", why, {"Connection": "close"}) from None
            if piece is None:
                break
            await asyncio.to_thread(file.write, piece)
        file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())


def require_name(name: str | None) -> str:
    """The name of a slide that is sent. Raises RefusedError for one that cannot be that of a slide's file."""
    example = f"POST {SLIDES}?name=biopsy.svs"
    if not name:
        raise RefusedError(422, "no_name", f"the name of the file is missing; send it as {example}")
    if not re.fullmatch(rf"[^/\\]{{1,{MAX_NAME}}}", name) or not name.isprintable() or name.startswith("."):
        why = f"the name must be that of a file, without folders, of at most {MAX_NAME} characters: {example}"
        raise RefusedError(422, "bad_name", why)
    if not name.lower().endswith(SUFFIXES):
        why = f"the name ends in none of {', '.join(SUFFIXES)}; slides of several files are scored by name"
        raise RefusedError(415, "unsupported_format", why)
    return name
