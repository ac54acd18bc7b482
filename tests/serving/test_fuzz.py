"""The app without Ray, asked by a machine: tens of thousands of damaged requests, and what its log says."""

import asyncio
import collections
import json
import logging
import random
import time

import pytest

from bcd.config import log
from bcd.model import predictor
from tests import archives, pictures
from tests.model.test_bundle import card, untrained
from tests.service import TOKEN, LocalEngine, guarded

N_REQUESTS, AT_ONCE, PATIENCE_S = 50_000, 4, 60
# In the names and the bytes of images, in paths, options, headers and methods.
SECRET = "PatientZebra42"
METHODS = ("POST",) * 12 + ("GET", "HEAD", "PUT", "OPTIONS", f"{SECRET}")
PATHS = ("/v1/predict",) * 8 + ("/v1/predict/batch",) * 8
PATHS += ("/v1/model", "/", "/docs", "/healthz", "/page/index.html", f"/v1/{SECRET}", "/page/../v1/model")
PATHS += (
    "//v1/predict",
    "/v1/predict/",
    "/v1/predict\x00",
    f"/v1/{TOKEN}\nfaked line",
    "/v1/µ",
    "/" + "x" * 9_000,
)
OPTIONS = (b"",) * 8 + (
    b"overlay=true",
    b"preview=1",
    b"overlay=perhaps",
    b"overlay=1&overlay=1",
    b"%ff=%00&&=",
)
OPTIONS += (f"{SECRET}={TOKEN}".encode(), b"\xff\xfe=\x00", b"overlay=" + b"1" * 5_000)
TYPES = (b"image/png", b"image/tiff", b"application/octet-stream", b"application/json", b"text/\xff", b"")
BOUNDARY = b"b" * 20


def seeds() -> list[bytes]:
    """Images good, odd and broken; none takes long to decode or to compute."""
    found = [pictures.encode(pictures.gradient(30, 40)), *archives.odd().values()]
    found += [content for content, _ in archives.broken().values()] + [
        content for content, _ in pictures.broken().values()
    ]
    return [content for content in found if len(content) < 200_000]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Some bytes of it changed, cut out, repeated or put in."""
    content = bytearray(content)
    for _ in range(draw.choice((0, 1, 1, 2, 8))):
        at, n = draw.randrange(len(content) + 1), draw.choice((1, 2, 4, 64, 2_000))
        match draw.randrange(4):
            case 0:
                content[at : at + n] = draw.randbytes(n)
            case 1:
                del content[at : at + n]
            case 2:
                content[at:at] = content[at : at + n]
            case 3:
                content[at:at] = SECRET.encode()
    return bytes(content)


def form(images: list[bytes], draw: random.Random) -> bytes:
    """A form with these files, as `BOUNDARY` divides it."""
    parts = []
    for content in images:
        name = draw.choice((b"file", b"files", b"files", b"other", b'"', b"\xff"))
        head = (
            b'Content-Disposition: form-data; name="' + name + b'"; filename="' + SECRET.encode() + b'.png"'
        )
        parts.append(b"--" + BOUNDARY + b"\r\n" + head + b"\r\n\r\n" + content + b"\r\n")
    return b"".join([*parts, b"--", BOUNDARY, draw.choice((b"--\r\n", b"--", b""))])


def request(images: list[bytes], draw: random.Random) -> tuple[dict, list[dict]]:
    """A scope and the messages of its body."""
    kind, body = draw.choice(TYPES), damaged(draw.choice(images), draw)
    if draw.random() < 0.5:
        body = form([damaged(draw.choice(images), draw) for _ in range(draw.choice((0, 1, 1, 2, 6)))], draw)
        body = damaged(body, draw) if draw.random() < 0.3 else body
        kind = b"multipart/form-data; boundary=" + draw.choice((BOUNDARY,) * 6 + (b"", b'"', b"x" * 300))
    secret = f"{SECRET} {TOKEN}".encode()
    token = f"Bearer {TOKEN}".encode()
    headers = [
        (b"host", draw.choice((b"localhost", b"localhost:8000", b"[::1]", b"[", b"", secret))),
        (b"content-type", kind),
        (
            b"authorization",
            draw.choice((token,) * 30 + (b"", b"Bearer \xff", secret, f"Basic {TOKEN}".encode())),
        ),
        (b"accept", draw.choice((b"*/*", b"image/png", b"\xff"))),
        (b"x-request-id", secret),
        (secret.replace(b" ", b"-"), secret),
    ]
    if draw.random() < 0.1:
        headers.append((b"content-length", draw.choice((b"0", b"-1", b"9" * 30, b"x"))))
    path = draw.choice(PATHS)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": draw.choice(METHODS),
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": draw.choice(OPTIONS),
        "root_path": "",
        "headers": draw.sample(headers, len(headers)),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    cut = draw.randrange(len(body) + 1)
    messages = [
        {"type": "http.request", "body": part, "more_body": True} for part in (body[:cut], body[cut:])
    ]
    last = {"type": "http.disconnect"} if draw.random() < 0.02 else {"type": "http.request", "body": b""}
    return scope, [*messages, last]


async def answer_to(app, scope, messages) -> tuple[int, dict[bytes, bytes], bytes]:
    """Status, headers and body; raises what a server would answer with 500, and TimeoutError."""
    sent, waiting = [], iter(messages)

    async def receive():
        return next(waiting, {"type": "http.disconnect"})

    async def send(message):
        sent.append(message)

    await asyncio.wait_for(app(scope, receive, send), PATIENCE_S)
    body = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), body


def check(scope, answer) -> str:
    """What is wrong with an answer; nothing where it is as the documentation says."""
    status, headers, body = answer
    if status >= 500:
        return f"{status} {body[:200]!r}"
    if b"x-request-id" not in headers:
        return "no id"
    if status >= 400 and scope["method"] != "HEAD" and not json.loads(body)["error"]["code"]:
        return "no code"
    return ""


@pytest.mark.trial
def test_no_request_breaks_the_service_or_shows_in_its_log(tmp_path, capfd):
    """Done when: 50,000 requests, no 5xx, no hang, and of token and images nothing is logged."""
    log.start("serve", "json")
    said = logging.FileHandler(tmp_path / "log")
    said.setFormatter(logging.Formatter("%(name)s %(message)s %(request_id)s", defaults={"request_id": ""}))
    loggers = [logging.getLogger(name) for name in (None, "bcd", "uvicorn.error", "asyncio")]
    for logger in loggers:
        logger.addHandler(said)
    app = guarded(LocalEngine(predictor.from_state(untrained().state_dict(), card())))
    images, draw, faults, statuses = seeds(), random.Random(1), [], collections.Counter()

    async def ask(n):
        for _ in range(n):
            scope, messages = request(images, draw)
            answer = await answer_to(app, scope, messages)
            statuses[answer[0]] += 1
            if fault := check(scope, answer):
                faults.append(f"{scope['method']} {scope['path'][:40]!r}: {fault}")

    async def story():
        await asyncio.gather(*(ask(N_REQUESTS // AT_ONCE) for _ in range(AT_ONCE)))

    started = time.monotonic()
    try:
        asyncio.run(story())
    finally:
        for logger in loggers:
            logger.removeHandler(said)
    text = (tmp_path / "log").read_text() + "".join(capfd.readouterr())
    with capfd.disabled():
        print(f"\n{statuses.total():,} requests, {time.monotonic() - started:.0f} s: {dict(statuses)}")
    assert not faults, faults[:10]
    assert statuses.total() == N_REQUESTS
    assert min(statuses[status] for status in (200, 401, 404, 405, 415, 422)) > 100
    assert text.count("POST /v1/predict ") > N_REQUESTS / 10
    for secret in (TOKEN, SECRET, "faked line", "x89PNG", "\ufffd", "iVBORw0K", "%ff", "xxxxx", "multipart"):
        assert secret not in text, secret
