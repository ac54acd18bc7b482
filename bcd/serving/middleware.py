"""Authentication, limits and uniform errors of the service, as pure ASGI.

The guard runs around the app in every replica, and in the cluster's HTTP proxy, which rejects a body that is
too large, too slow or without the token before it reaches a replica. The proxy imports it through a
variable of Ray Serve (`PROXY_VARIABLE`) that `jobs/serve.py` sets. No torch here: the proxy must stay small.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN_VARIABLE, DIGEST_VARIABLE = "BCD_API_TOKEN", "BCD_API_TOKEN_SHA256"
# Names the function that Ray Serve calls when it starts an HTTP proxy.
PROXY_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
PROXY_CALLBACK = "bcd.serving.middleware:proxy_middlewares"
# The limits of the proxy as JSON, set by `jobs/serve.py`.
LIMITS_VARIABLE = "BCD_SERVE_LIMITS"
# `/-/healthz` of the proxy is for load balancers; its `/-/routes` lists applications and requires the token.
PUBLIC = ("/", "/healthz", "/readyz", "/docs", "/redoc", "/openapi.json", "/-/healthz")
PUBLIC_FOLDERS = ("/page/", "/static-offline-docs/")


class RefusedError(Exception):
    """An error answer: its HTTP status, a stable code for programs, and a sentence."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message, self.headers = status, code, message, dict(headers or {})

    def document(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": {"code": self.code, "message": self.message}}

    async def send(self, send: Send) -> None:
        """Send the answer as ASGI messages."""
        body = json.dumps(self.document()).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body))} | self.headers
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": pairs})
        await send({"type": "http.response.body", "body": body})


def overloaded(why: str) -> RefusedError:
    """The error of a service at its limit of requests."""
    return RefusedError(503, "overloaded", f"{why}; try again in a second", {"Retry-After": "1"})


@dataclass(frozen=True)
class Limits:
    """Limits of requests, as in `bcd.config.serving.ServiceConfig`."""

    max_body_bytes: int = 32 * 2**20
    max_requests: int = 64
    upload_timeout_s: float = 30.0
    answer_timeout_s: float = 60.0


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
    limits = Limits(**json.loads(os.environ.get(LIMITS_VARIABLE, "{}")))
    token = os.environ.get(TOKEN_VARIABLE)
    known = os.environ.get(DIGEST_VARIABLE) or (digest(token) if token else None)
    return [Middleware(Guard, limits=limits, token_digest=known)]


@dataclass
class _Answer:
    """Sends an answer, with plain-text errors of the framework replaced by ours."""

    send: Send
    started: bool = False
    replaced: RefusedError | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.replaced = _translate(message)
            if self.replaced:
                return await self.replaced.send(self.send)
        if not self.replaced:
            await self.send(message)
        return None


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
    """

    app: ASGIApp
    limits: Limits = field(default_factory=Limits)
    token_digest: str | None = None
    loopback_only: bool = False
    _open: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        answer = _Answer(send)
        try:
            self._authenticate(scope)
            if self._open >= self.limits.max_requests and scope["method"] == "POST":
                raise overloaded(f"{self._open} requests are being answered")
            self._open += 1
            try:
                await self._answered(scope, receive, answer)
            finally:
                self._open -= 1
        except RefusedError as refused:
            # An answer that has begun cannot be replaced; the client sees that it is cut off.
            if not answer.started:
                await refused.send(send)
        return None

    def _authenticate(self, scope: Scope) -> None:
        path = scope["path"]
        if path in PUBLIC or path.startswith(PUBLIC_FOLDERS):
            return
        if self.token_digest is None:
            host = (scope.get("server") or (None,))[0]
            if self.loopback_only and not is_loopback(host):
                why = f"this service has no token ({TOKEN_VARIABLE}), so it answers this machine only"
                raise RefusedError(403, "no_token_set", why)
            return
        headers = dict(scope["headers"])
        kind, _, given = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        # Digests of equal length, compared in constant time: timing reveals nothing about the token.
        if kind.lower() != "bearer" or not hmac.compare_digest(digest(given.strip()), self.token_digest):
            why = "the header `Authorization: Bearer TOKEN` is missing or its token is wrong"
            raise RefusedError(401, "unauthorized", why, {"WWW-Authenticate": "Bearer"})

    async def _answered(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        body = await self._body(scope, receive) if scope["method"] in ("POST", "PUT", "PATCH") else b""
        try:
            async with asyncio.timeout(self.limits.answer_timeout_s):
                await self.app(scope, _replay(body, receive), answer)
        except TimeoutError:
            why = f"no answer within {self.limits.answer_timeout_s:g} s; try again"
            raise RefusedError(504, "timeout", why) from None
        if not answer.started:
            # Ray Serve sends nothing where the replica died during the request.
            why = "the replica that computed the answer has ended; try again"
            raise RefusedError(503, "replica_lost", why, {"Retry-After": "1"})

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, counted while it is read: memory never holds more than allowed."""
        most = self.limits.max_body_bytes
        # The connection stays open: the server drops the rest, and the client sees the answer, not a reset.
        why = f"the body is larger than {most:,} bytes; score whole slides with jobs/score.py"
        refused = RefusedError(413, "body_too_large", why)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > most:
            raise refused
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.limits.upload_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RefusedError(400, "disconnected", "the client disconnected while sending")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise refused
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            why = f"the body did not arrive within {self.limits.upload_timeout_s:g} s"
            raise RefusedError(408, "slow_upload", why, {"Connection": "close"}) from None


def _replay(body: bytes, receive: Receive) -> Callable[[], Any]:
    """A `receive` that returns a body that was read before, then the later messages."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay
