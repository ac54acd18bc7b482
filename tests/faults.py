"""An object store with bad days: passes reads on to the S3 server of the tests, or answers with an error."""

import http.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

# What a store answers: HTTP status and error code. An expired token is 400 at AWS, 403 elsewhere.
DENIED, EXPIRED, SLOW_DOWN = (403, "AccessDenied"), (400, "ExpiredToken"), (503, "SlowDown")
Fault = tuple[int, str]


@dataclass
class Store:
    """The store in front: where it listens, what it answers to METHOD and PATH, and what it was asked."""

    endpoint: str = ""
    fault: Callable[[str, str], Fault | None] = lambda method, path: None
    asked: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def store(behind: str) -> Iterator[Store]:
    """Listen in front of the S3 server at `behind` (http://HOST:PORT)."""
    found = Store()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            found.asked.append((self.command, self.path))
            if fault := found.fault(self.command, self.path):
                status, code = fault
                content = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
                self.reply(status, {"Content-Type": "application/xml"}, content)
                return
            connection = http.client.HTTPConnection(behind.removeprefix("http://"))
            connection.request(self.command, self.path, headers=dict(self.headers))
            response = connection.getresponse()
            self.reply(response.status, dict(response.getheaders()), response.read())
            connection.close()

        def reply(self, status: int, headers: dict[str, str], content: bytes) -> None:
            length = {"content-length": str(len(content))}
            headers = {name.lower(): value for name, value in headers.items()}
            self.send_response_only(status)
            for name, value in (headers | (length if self.command != "HEAD" else {})).items():
                if name not in ("connection", "transfer-encoding"):
                    self.send_header(name, value)
            if self.command == "HEAD" and "content-length" not in headers:
                self.send_header("content-length", "0")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = answer  # noqa: N815

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
