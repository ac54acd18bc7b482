"""Authentication, limits and uniform errors of the service, as pure ASGI.

The guard runs around the app in every replica, and in the cluster's HTTP proxy, which rejects a body that is
too large, too slow or without the token before it reaches a replica. The proxy imports it through a
variable of Ray Serve (`PROXY_VARIABLE`) that `jobs/serve.py` sets. No torch here: the proxy must stay small.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bcd.config import log
from bcd.serving import receive as receiving
from bcd.serving.receive import (
    CACHE_CONTROL,
    ERROR_CODE,
    MODELS,
    NO_STORE,
    SLIDES,
    Limits,
    RefusedError,
    overloaded,
)
from bcd.serving.telemetry import signals

logger = logging.getLogger(__name__)

TOKEN_VARIABLE, DIGEST_VARIABLE = "BCD_API_TOKEN", "BCD_API_TOKEN_SHA256"
# Names the function that Ray Serve calls when it starts an HTTP proxy.
PROXY_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
PROXY_CALLBACK = "bcd.serving.middleware:proxy_middlewares"
# The limits of the proxy as JSON, set by `jobs/serve.py`.
LIMITS_VARIABLE = "BCD_SERVE_LIMITS"
# `/-/healthz` of the proxy is for load balancers; its `/-/routes` lists applications and requires the token.
PUBLIC = ("/", "/healthz", "/readyz", "/docs", "/openapi.json", "/-/healthz", "/slides")
# Pages of the viewer have names in their addresses, and no data.
PUBLIC_FOLDERS = ("/page/", "/static-offline-docs/", "/slides/")
WORK = ("/v1/predict", "/v1/predict/batch", "/v1/model", MODELS, "/v1/view", SLIDES)
# Tiles of slides, of which a page requests hundreds, and what else the viewer shows.
PIXELS, VIEW = "/v1/view/pixels/", "/v1/view/"
# Slides that a process receives at a time.
MAX_SLIDES_AT_ONCE = 4
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# The id of a request, in its answer and its line of the log; Ray Serve calls it the same.
REQUEST_ID = b"x-request-id"
# The id of a slide that the guard has received, for the app behind it; callers cannot set it.
SENT_ID = b"x-bcd-slide"
# Headers by which Ray Serve lets a caller choose timeouts, replicas and the ids of requests; `-` and `_` are
# one to it. Of ray.serve._private.constants of Ray 2.60.
RAY_HEADERS = frozenset(
    {
        *(b"x-request-timeout-seconds", b"x-request-disconnect-disabled", REQUEST_ID, b"x-session-id"),
        b"serve-multiplexed-model-id",
    }
)


def digest(token: str) -> str:
    """SHA-256 of a token in hexadecimal digits; the token itself is not kept."""
    return hashlib.sha256(token.encode()).hexdigest()


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def proxy_middlewares() -> list[Middleware]:
    """The guard of Ray Serve's HTTP proxy, with token and limits from its environment."""
    from bcd.serving.telemetry.meter import RayMeter  # brings Ray, which the proxy has and the viewer lacks

    log.hand_on("serve")
    limits = Limits.model_validate_json(os.environ.get(LIMITS_VARIABLE, "{}"))
    token = os.environ.get(TOKEN_VARIABLE)
    known = os.environ.get(DIGEST_VARIABLE) or (digest(token) if token else None)
    return [*_cors(limits), Middleware(Guard, limits=limits, token_digest=known, record=RayMeter())]


def _cors(limits: Limits) -> list[Middleware]:
    """Before the guard: a browser asks without the token whether it may send one."""
    if not limits.cors_origins:
        return []
    headers = ["Authorization", "Content-Type"]
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=limits.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=headers,
            expose_headers=[REQUEST_ID.decode()],
        )
    ]


def guarded(
    app: ASGIApp, limits: Limits, token_digest: str | None, record: signals.Record = signals.silent
) -> ASGIApp:
    """The app of a replica behind its guard, which may be behind that of the proxy."""
    behind = PROXY_VARIABLE in os.environ
    guard: ASGIApp = Guard(app, limits, token_digest, loopback_only=True, behind_proxy=behind, record=record)
    for outer in _cors(limits):
        guard = outer.cls(guard, *outer.args, **outer.kwargs)
    return guard


@dataclass
class _Answer:
    """Sends an answer with the request's id, and plain-text errors of the framework replaced by ours."""

    send: Send
    private: bool
    request_id: bytes
    status: int | None = None
    code: str | None = None
    replaced: bool = False

    @property
    def started(self) -> bool:
        """Whether the client has the head of an answer."""
        return self.status is not None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and (error := _translate(message)):
            return await self.refuse(error)
        if not self.replaced:
            await self._send(message)
        return None

    async def refuse(self, error: RefusedError) -> None:
        """Send an error in place of any other answer."""
        self.replaced = True
        await error.send(self._send)

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.code = dict(message["headers"]).get(ERROR_CODE, b"").decode() or None
            # Ray Serve adds the id as well.
            headers = [pair for pair in message["headers"] if pair[0].lower() != REQUEST_ID]
            headers.append((REQUEST_ID, self.request_id))
            if self.private and not any(name.lower() == CACHE_CONTROL for name, _ in headers):
                headers.append(NO_STORE)
            message = {**message, "headers": headers}
        await self.send(message)


def _translate(message: Message) -> RefusedError | None:
    """Our error for a plain-text one of Ray Serve or of a fault."""
    headers = {name.lower(): value for name, value in message["headers"]}
    status = message["status"]
    if status < 400 or headers.get(b"content-type", b"").startswith(b"application/json"):
        return None
    if status == 404:
        return RefusedError(404, "not_found", "there is nothing at this address; see /docs")
    if status == 408:
        return RefusedError(504, "timeout", "no answer in time; try again")
    if status in (429, 503):
        return overloaded("all replicas are busy")
    return RefusedError(status, "internal", "the service failed on this request")


@dataclass
class Guard:
    """ASGI middleware with authentication and limits.

    Args:
        app: the guarded app.
        limits: of requests.
        token_digest: `digest` of the token that `/v1/*` requires; None requires none.
        loopback_only: without a token, reject requests that arrive at another address than loopback.
        behind_proxy: keep the id that the proxy's guard gave a request, and leave it to that to log and count
            the request.
        record: of requests.
    """

    app: ASGIApp
    limits: Limits = field(default_factory=Limits)
    token_digest: str | None = None
    loopback_only: bool = False
    behind_proxy: bool = False
    record: signals.Record = signals.silent
    _open: int = 0
    _slides: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request_id = self._identify(scope["headers"])
        own = _own_headers(scope["headers"], self.behind_proxy)
        scope = {**scope, "headers": [*own, (REQUEST_ID, request_id)]}
        answer = _Answer(send, private=not _is_public(scope["path"]), request_id=request_id)
        started = time.monotonic()
        try:
            self._authenticate(scope)
            if scope["method"] in ("GET", "HEAD"):
                await self._answered(scope, _replay(b"", receive), answer)
            elif self._is_slide(scope):
                await self._received(scope, receive, answer)
            else:
                await self._worked(scope, receive, answer)
        except RefusedError as refused:
            # An answer that has begun cannot be replaced; the client sees that it is cut off.
            if not answer.started:
                await answer.refuse(refused)
        finally:
            if not self.behind_proxy:
                self._finished(scope, answer, time.monotonic() - started)
        return None

    def _finished(self, scope: Scope, answer: _Answer, seconds: float) -> None:
        _log(scope, answer, seconds)
        route, status = _route(scope["path"]), str(answer.status or "left")
        self.record(signals.REQUESTS, route=route, status=status, code=answer.code or "none")
        self.record(signals.REQUEST_SECONDS, seconds, route=route)

    def _identify(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        given = dict(headers).get(REQUEST_ID, b"")
        is_ours = self.behind_proxy and re.fullmatch(rb"[0-9a-f-]{36}", given)
        return given if is_ours else str(uuid.uuid4()).encode()

    async def _worked(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        """A request with a body, from a caller who may send one: only these count against the limit."""
        if self._open >= self.limits.max_requests:
            raise overloaded(f"{self._open} requests are being answered")
        self._open += 1
        try:
            body = await receiving.body(scope, receive, self.limits)
            await self._answered(scope, _replay(body, receive), answer)
        finally:
            self._open -= 1

    def _is_slide(self, scope: Scope) -> bool:
        """Whether the body is a slide, for a file, unless the proxy's guard has received it already."""
        headers = dict(scope["headers"])
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["path"] != SLIDES or scope["method"] != "POST" or kind == b"application/json":
            return False
        if self.limits.slides is None:
            why = "this service scores no slides: start it with --slides, or score them with jobs/score.py"
            raise RefusedError(404, "no_slides", why)
        if kind.startswith(b"multipart/"):
            why = f"a slide is the body itself, not a form: curl -X POST -T a.svs '...{SLIDES}?name=a.svs'"
            raise RefusedError(415, "unsupported_format", why)
        return SENT_ID not in headers

    async def _received(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        """A slide: received into a file, whose id takes the place of the body."""
        if self._slides >= MAX_SLIDES_AT_ONCE:
            raise overloaded(f"{self._slides} slides are being received")
        query = parse_qs(scope["query_string"].decode("ascii", "replace"))
        name = receiving.require_name(query.get("name", [None])[-1])
        self._slides += 1
        try:
            job_id = await receiving.slide_file(scope, receive, self.limits, name)
        finally:
            self._slides -= 1
        scope = {**scope, "headers": [*scope["headers"], (SENT_ID, job_id.encode())]}
        await self._answered(scope, _replay(b"", receive), answer)

    def _authenticate(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if _is_public(scope["path"]):
            if scope["method"] not in ("GET", "HEAD"):
                why = "this address answers GET and HEAD only; see /docs"
                raise RefusedError(405, "method_not_allowed", why, {"Allow": "GET, HEAD"})
            return
        if self.token_digest is None:
            host = (scope.get("server") or (None,))[0]
            if self.loopback_only and not is_loopback(host):
                why = f"this service has no token ({TOKEN_VARIABLE}), so it answers this machine only"
                raise RefusedError(403, "no_token_set", why)
            if not is_loopback(_host_name(headers.get(b"host", b"localhost"))):
                # A page from elsewhere whose name was made to resolve to this machine (DNS rebinding).
                why = "without a token this service is asked by the names localhost and 127.0.0.1 only"
                raise RefusedError(403, "unknown_host", why)
            return
        kind, _, given = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        # Digests of equal length, compared in constant time: timing reveals nothing about the token.
        if kind.lower() != "bearer" or not hmac.compare_digest(digest(given.strip()), self.token_digest):
            why = "the header `Authorization: Bearer TOKEN` is missing or its token is wrong"
            raise RefusedError(401, "unauthorized", why, {"WWW-Authenticate": "Bearer"})

    async def _answered(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        try:
            async with asyncio.timeout(self.limits.answer_timeout_s):
                await self.app(scope, receive, answer)
        except TimeoutError:
            why = f"no answer within {self.limits.answer_timeout_s:g} s; try again"
            raise RefusedError(504, "timeout", why) from None
        if not answer.started:
            # Ray Serve sends nothing where the replica died during the request.
            why = "the replica that computed the answer has ended; try again"
            raise RefusedError(503, "replica_lost", why, {"Retry-After": "1"})


def _log(scope: Scope, answer: _Answer, seconds: float) -> None:
    """A line about a request, unless it fetched something public or a tile. What a caller chose is not
    repeated: a path or a method may contain a token."""
    status, path = answer.status, scope["path"]
    if (_is_public(path) or path.startswith(PIXELS)) and (status or 500) < 400:
        return
    facts = {
        "method": scope["method"] if scope["method"] in METHODS else "another method",
        "path": _route(path),
        "status": status,
        "code": answer.code,
        "seconds": round(seconds, 3),
        "request_id": answer.request_id.decode(),
    }
    # Without a status the caller has left.
    words = facts["method"], facts["path"], status or "no answer", facts["code"]
    level = logging.WARNING if status and status >= 500 else logging.INFO
    logger.log(level, f"{' '.join(str(word) for word in words if word)}, {seconds:.3f} s", extra=facts)


def _route(path: str) -> str:
    """The route of a path, without names and ids that a caller chose: one of few."""
    if path in PUBLIC + WORK:
        return path
    if match := re.fullmatch(rf"{MODELS}/[^/]+(/predict(?:/batch)?)?", path):
        return f"{MODELS}/NAME{match[1] or ''}"
    folders = (*PUBLIC_FOLDERS, PIXELS, VIEW, f"{SLIDES}/")
    return next((folder for folder in folders if path.startswith(folder)), "another address")


def _is_public(path: str) -> bool:
    return path in PUBLIC or path.startswith(PUBLIC_FOLDERS)


def _own_headers(headers: Iterable[tuple[bytes, bytes]], behind_proxy: bool) -> list[tuple[bytes, bytes]]:
    """Without those that Ray Serve obeys, those that it cannot decode, and what only our proxy sets."""
    dropped = RAY_HEADERS if behind_proxy else RAY_HEADERS | {SENT_ID}
    return [
        (name, value)
        for name, value in headers
        if name.lower().replace(b"_", b"-") not in dropped and (name + value).isascii()
    ]


def _host_name(header: bytes) -> str:
    """The name or address in a header `Host`, without port."""
    host = header.decode("ascii")
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _replay(body: bytes, receive: Receive) -> Callable[[], Any]:
    """A `receive` that returns a body that was read before, then the later messages."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
