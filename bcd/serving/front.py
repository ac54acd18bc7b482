"""What the service and the viewer have in front: the token, a free port, headers of pages, errors of images.

No torch and no Ray here: the viewer starts without both.
"""

import os
import re
import socket
from collections.abc import Callable
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from bcd import storage
from bcd.config.serving import RequestConfig, ServiceConfig
from bcd.errors import NOT_FINITE, ConfigError, ResourceError
from bcd.imaging import image
from bcd.serving.middleware import TOKEN_VARIABLE, digest, is_loopback
from bcd.serving.receive import Limits, RefusedError

# HTTP statuses of the codes of `ImageError`; 422 of others.
STATUS = {
    "unsupported_format": 415,
    "whole_slide": 415,
    "empty": 422,
    "truncated": 422,
    "too_many_pixels": 422,
    NOT_FINITE: 500,
    "too_large": 413,
    image.UNAVAILABLE: 503,
}
# A page loads nothing from other hosts, and sends nothing to them.
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_HEADERS = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
# Pages of the viewer: without data, which are below `/v1/view`.
VIEWER_PAGES = {"/slides": "list.html", "/slides/{name:path}": "slide.html"}
# Settings that are URIs, which replicas on other nodes use.
PLACES = ("model", "slides", "archive", "scores")


def refusal(error: image.ImageError) -> RefusedError:
    """The answer for an image that cannot be used."""
    status = STATUS.get(error.code, 422)
    headers = {"Retry-After": "1"} if status == 503 else None
    return RefusedError(status, error.code, error.message, headers)


def read_digest(token_file: str | None, host: str | None) -> str | None:
    """`middleware.digest` of the token in a file, or else of the variable's; None without either.

    Raises:
        ConfigError: the token is empty or no header can carry it, or there is none and other machines reach
            the address, which is None where it is not known yet.
    """
    token = os.environ.get(TOKEN_VARIABLE, "").strip()
    if token_file:
        token = storage.read_bytes(token_file).decode().strip()
        if not token:
            raise ConfigError(f"--token-file {token_file} is empty")
    if not re.fullmatch(r"[!-~]*", token):  # what a header can carry
        raise ConfigError(
            "the token may contain only letters, digits and punctuation of ASCII, and no spaces"
        )
    if not token and host is not None and not is_loopback(host):
        raise ConfigError(
            f"listening on {host} requires a token, because other machines reach it: set the variable "
            f"{TOKEN_VARIABLE} or --token-file, or listen on 127.0.0.1"
        )
    return digest(token) if token else None


def placed(config: ServiceConfig) -> ServiceConfig:
    """The settings as replicas need them: of the service alone, with URIs that hold on every node."""
    settings = config.model_dump(include=set(ServiceConfig.model_fields))
    places = {name: storage.absolute(uri) for name in PLACES if (uri := settings[name])}
    return ServiceConfig(**settings | places)


def limits_of(config: ServiceConfig) -> Limits:
    """The limits that the settings state, for all models of the service together."""
    each = 2 * config.max_batch_size * config.max_replicas + config.max_queued
    stated = placed(config).model_dump(include=RequestConfig.names())
    return Limits(**stated, max_requests=(1 + len(config.models)) * each)


def whole_addresses(app: ASGIApp) -> ASGIApp:
    """Ray Serve states the prefix of an application, which its routes then would do without."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "root_path": ""}, receive, send)

    return answer


def viewer_pages() -> list[Route]:
    """Routes of `VIEWER_PAGES`."""
    return [Route(path, _page_at(file)) for path, file in VIEWER_PAGES.items()]


def _page_at(file: str) -> Callable[[Request], Response]:
    page = files("bcd.serving").joinpath("page/slides", file).read_text(encoding="utf-8")

    def answer(_: Request) -> Response:
        return Response(page, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    return answer


def require_free(host: str, port: int) -> None:
    """Raises ResourceError where nothing can listen at an address."""
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ResourceError(
            f"cannot listen on --host {host} --port {port}: {error}; choose another host or port"
        ) from None
