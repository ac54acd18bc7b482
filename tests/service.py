"""A service without Ray: the same app around a bundle in this process, on a real socket."""

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from bcd.imaging import image
from bcd.model import predictor
from bcd.serving import api, front, middleware, receive
from tests.cluster import free_port, wait_for

TOKEN = "a-token-for-tests"
# Of the service on the tests' cluster, and where that keeps slides.
SENT = Path(tempfile.gettempdir(), f"bcd-sent-{os.getpid()}")
LIMITS = receive.Limits(max_body_bytes=8 * 2**20, upload_timeout_s=3, slides=str(SENT))


class LocalEngine:
    """An `api.Engine` that computes where it is asked."""

    def __init__(self, loaded: predictor.Predictor) -> None:
        self._predictor = loaded
        self.card, self.model_id = loaded.card, loaded.model_id
        self.works = True

    async def look(self, content: bytes) -> tuple[np.ndarray, predictor.Prediction]:
        pixels = image.decode(content)
        return pixels, self._predictor.predict(self._predictor.fit(pixels)[None])

    async def ready(self) -> bool:
        return self.works


def guarded(
    engine: api.Engine,
    limits: receive.Limits | None = None,
    token: str | None = TOKEN,
    named: api.Named | None = None,
) -> ASGIApp:
    """The app as a replica builds it."""
    limits, named = limits or receive.Limits(), named or api.Named()
    app = front.whole_addresses(api.create_app(engine, limits, max_images=4, named=named))
    return middleware.guarded(app, limits, middleware.digest(token) if token else None, named.record)


def routed(apps: Mapping[str, ASGIApp]) -> ASGIApp:
    """Applications by their prefixes as Ray Serve's proxy finds them (2.60): that of the longest which fits,
    and which it states as the root path."""

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        fits = [prefix for prefix in apps if f"{scope['path']}/".startswith(prefix.rstrip("/") + "/")]
        prefix = max(fits, key=len)
        scope = {**scope, "root_path": "" if prefix == "/" else prefix}
        await apps[prefix](scope, receive, send)

    return proxy


@contextlib.contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """URL of an app served in a thread, by the server that Ray Serve's proxy uses."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started, 60, "the server")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
