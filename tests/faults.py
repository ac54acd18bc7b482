"""An object store with bad days: passes requests on to the S3 server of the tests, late, or answers with an
error, or not at all."""

import http.client
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from threading import Thread

# What a store answers: HTTP status and error code. An expired token is 400 at AWS, 403 elsewhere.
DENIED, EXPIRED, SLOW_DOWN = (403, "AccessDenied"), (400, "ExpiredToken"), (503, "SlowDown")
Fault = tuple[int, str]
# The connection ends without an answer.
DROPPED: Fault = (0, "")
# Headers of a connection and not of what goes over it; a body is passed on whole.
HOP_BY_HOP = ("connection", "transfer-encoding", "expect")


@dataclass
class Store:
    """The store in front: where it listens, what it answers to METHOD and PATH, what it was asked, and the
    number of bytes of each answer."""

    endpoint: str = ""
    fault: Callable[[str, str], Fault | None] = lambda method, path: None
    delay_s: float = 0.0
    asked: list[tuple[str, str]] = field(default_factory=list)
    sent_bytes: list[int] = field(default_factory=list)

    @property
    def variables(self) -> dict[str, str]:
        """Environment of a job that, with all its workers, knows this store alone."""
        own = {"AWS_ENDPOINT_URL": self.endpoint}
        return own | {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": own}})}


def bad_day() -> Callable[[str, str], Fault | None]:
    """Every 20th request is put off, every 50th not answered."""
    numbers = count(1)

    def answer(method: str, path: str) -> Fault | None:
        number = next(numbers)
        if number % 50 == 0:
            return DROPPED
        return SLOW_DOWN if number % 20 == 0 else None

    return answer


@contextmanager
def store(behind: str) -> Iterator[Store]:
    """Listen in front of the S3 server at `behind` (http://HOST:PORT)."""
    found = Store()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            found.asked.append((self.command, self.path))
            sent = self.body()
            time.sleep(found.delay_s)
            if fault := found.fault(self.command, self.path):
                status, code = fault
                if fault == DROPPED:
                    self.close_connection = True
                    return
                content = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
                self.reply(status, {"Content-Type": "application/xml"}, content)
                return
            connection = http.client.HTTPConnection(behind.removeprefix("http://"))
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
            connection.request(self.command, self.path, sent, headers)
            response = connection.getresponse()
            self.reply(response.status, dict(response.getheaders()), response.read())
            connection.close()

        def body(self) -> bytes:
            if self.headers.get("transfer-encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("content-length", 0)))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers
            return b"".join(parts)

        def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
            if self.command != "HEAD":
                found.sent_bytes.append(len(content))
            length = {"content-length": str(len(content))}
            headers = {name.lower(): value for name, value in headers.items()}
            self.send_response_only(status)
            for name, value in (headers | (length if self.command != "HEAD" else {})).items():
                if name not in HOP_BY_HOP:
                    self.send_header(name, value)
            if self.command == "HEAD" and "content-length" not in headers:
                self.send_header("content-length", "0")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    found.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
