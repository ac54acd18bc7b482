"""The door on a real socket: tokens, sizes, slowness, overload, and the framework's own errors as ours."""

import asyncio
import contextlib
import itertools
import socket
import threading
import time
import uuid

import httpx
import pytest
from starlette.responses import JSONResponse, PlainTextResponse

from bcd.serving import middleware
from bcd.serving.middleware import Guard
from bcd.serving.receive import Limits
from bcd.serving.telemetry.meter import RayMeter
from tests.service import TOKEN, serving

AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}
LIMITS = Limits(max_body_bytes=1_000, max_requests=2, upload_timeout_s=1, answer_timeout_s=1)


class Echo:
    """Answers with the size of the body; misbehaves by path."""

    def __init__(self):
        self.release = threading.Event()
        self.calls = 0

    async def __call__(self, scope, receive, send):
        self.calls += 1
        body = (await receive())["body"] if scope["method"] == "POST" else b""
        match scope["path"]:
            case "/v1/hang":
                await asyncio.sleep(3600)
            case "/v1/wait":
                await asyncio.to_thread(self.release.wait)
            case "/v1/silent":
                return None
            case "/v1/text":
                return await PlainTextResponse("secret trace", 500)(scope, receive, send)
            case "/v1/busy":
                return await PlainTextResponse("Backpressure", 503)(scope, receive, send)
            case "/v1/late":
                return await PlainTextResponse("timed out", 408)(scope, receive, send)
            case "/v1/none":
                return await PlainTextResponse("Path not found", 404)(scope, receive, send)
            case "/v1/headers":
                known = [[part.decode("latin-1") for part in pair] for pair in scope["headers"]]
                return await JSONResponse(dict(known))(scope, receive, send)
        return await JSONResponse({"size": len(body)})(scope, receive, send)


@pytest.fixture(scope="module")
def echo():
    return Echo()


@pytest.fixture(scope="module")
def url(echo):
    with serving(Guard(echo, LIMITS, middleware.digest(TOKEN))) as address:
        yield address


def code(answer):
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]["message"]
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": ""}],
)
def test_without_the_token_nothing_is_reached(url, echo, headers):
    before = echo.calls
    for path in ("/v1/x", "/v2", "//v1/x", "/V1/x", "/metrics", "/-/routes", "/-/healthz/"):
        answer = httpx.post(url + path, content=b"x" * 10, headers=headers)
        assert code(answer) == (401, "unauthorized")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert echo.calls == before


def test_with_the_token_or_on_public_paths_everything_is(url):
    assert httpx.post(url + "/v1/x", content=b"abc", headers=AUTHORISED).json() == {"size": 3}
    for path in (*middleware.PUBLIC, "/-/healthz", "/page/app.js"):
        assert httpx.get(url + path).status_code == 200


def test_public_addresses_read_no_body_and_take_no_slot(url, echo):
    """More callers than slots send a body that never ends, and wait for an answer."""
    before, address = (
        echo.calls,
        (url.rpartition(":")[0].removeprefix("http://"), int(url.rpartition(":")[2])),
    )
    with contextlib.ExitStack() as stack:
        for method, path in itertools.product(("POST", "PUT", "DELETE", "OPTIONS"), ("/healthz", "/page/x")):
            client = stack.enter_context(socket.create_connection(address, timeout=60))
            client.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n".encode())
            answer = client.recv(10_000)
            assert answer.startswith(b"HTTP/1.1 405")
            assert b"allow: GET, HEAD" in answer
        for path in ("/healthz", "/"):
            client = stack.enter_context(socket.create_connection(address, timeout=60))
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n".encode())
            assert client.recv(10_000).startswith(b"HTTP/1.1 200")
        assert httpx.post(url + "/v1/x", content=b"abc", headers=AUTHORISED).json() == {"size": 3}
    assert echo.calls == before + 3


def test_callers_do_not_steer_ray_serve(url):
    """By its headers, in each spelling; and bytes that it cannot decode do not reach it."""
    own = {name.decode(): "1" for name in middleware.RAY_HEADERS}
    given = (
        own | {name.replace("-", "_").upper(): "1" for name in own} | {"X-Kept": "a", "X-Bad": b"\xe9\xff"}
    )
    found = httpx.get(url + "/v1/headers", headers=AUTHORISED | given).json()
    assert {name for name in found if name.startswith(("x-", "serve"))} == {"x-kept", "x-request-id"}
    assert uuid.UUID(found["x-request-id"])
    assert httpx.get(url + "/v1/x", headers={"Authorization": b"Bearer \xe9"}).status_code == 401


def lines(capsys):
    """The text of each line about a request, and its id."""
    return [line.rpartition("; request ")[::2] for line in capsys.readouterr().out.splitlines()]


def test_each_request_has_an_id_in_its_answer_and_its_line(url, capsys):
    """Those that fetch something public have no line, and no line repeats what a caller chose."""
    answers = [
        httpx.get(url + "/v1/model", headers=AUTHORISED | {"X-Request-Id": str(uuid.uuid4())}),
        httpx.get(url + "/v1/secret?token=secret"),
        httpx.get(url + "/healthz"),
        httpx.post(url + "/page/secret"),
        httpx.post(url + "/v1/predict", content=b"x" * 2_000, headers=AUTHORISED),
        httpx.request("TRACE", url + "/v1/text", headers=AUTHORISED),
    ]
    told = lines(capsys)
    ids = [answer.headers.get_list("x-request-id") for answer in answers]
    assert [[name] for _, name in told] == ids[:2] + ids[3:]
    assert len({*map(tuple, ids)}) == len(answers)
    assert [text.rpartition(", ")[0] for text, _ in told] == [
        "GET /v1/model 200",
        "GET another address 401 unauthorized",
        "POST /page/ 405 method_not_allowed",
        "POST /v1/predict 413 body_too_large",
        "warning: another method another address 500 internal",
    ]


@pytest.mark.parametrize("is_ours", [True, False])
def test_behind_the_proxy_its_id_is_kept_and_no_line_written(echo, capsys, is_ours):
    given = str(uuid.uuid4()) if is_ours else "a	text"
    with serving(Guard(echo, LIMITS, behind_proxy=True)) as address:
        answer = httpx.get(address + "/v1/headers", headers={"X-Request-Id": given})
    assert answer.headers["x-request-id"] == answer.json()["x-request-id"]
    assert (answer.json()["x-request-id"] == given) is is_ours
    assert lines(capsys) == []


def test_ray_serve_has_the_headers_that_are_taken_away():
    """Of the installed release: a new one may add others."""
    from ray.serve._private import constants

    known = {
        value.encode().replace(b"_", b"-")
        for name, value in vars(constants).items()
        if name.startswith("SERVE_HTTP_") and name.endswith("_HEADER")
    }
    known |= {constants.SERVE_SESSION_ID.encode(), constants.SERVE_MULTIPLEXED_MODEL_ID.encode()}
    assert {name.replace(b"_", b"-") for name in known} == middleware.RAY_HEADERS


def test_answers_about_images_stay_out_of_caches(url):
    for path in ("/v1/x", "/v1/text"):
        answer = httpx.post(url + path, content=b"x", headers=AUTHORISED)
        assert answer.headers.get_list("cache-control") == ["no-store"]
    assert httpx.post(url + "/v1/x").headers["cache-control"] == "no-store"
    assert "cache-control" not in httpx.get(url + "/").headers


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("evil.example", False),
        ("localhost.evil.example:8000", False),
        ("10.0.0.7", False),
        ("", False),
    ],
)
def test_without_a_token_a_page_from_elsewhere_is_not_answered(host, allowed):
    """Whose name resolves to this machine."""
    with serving(Guard(Echo(), LIMITS, None, loopback_only=True)) as address:
        answer = httpx.get(address + "/v1/x", headers={"Host": host})
        assert answer.status_code == (200 if allowed else 403)
        assert allowed or code(answer) == (403, "unknown_host")
        assert httpx.get(address + "/healthz", headers={"Host": host}).status_code == 200


def test_pages_of_named_origins_may_ask_and_others_not():
    limits = Limits(cors_origins=("https://viewer.example",))
    with serving(middleware.guarded(Echo(), limits, middleware.digest(TOKEN))) as address:
        for origin in ("https://viewer.example", "https://evil.example"):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            asked |= {"Access-Control-Request-Headers": "authorization"}
            allowed = httpx.options(address + "/v1/x", headers=asked).headers
            answer = httpx.post(address + "/v1/x", content=b"x", headers=AUTHORISED | {"Origin": origin})
            is_named = origin == "https://viewer.example"
            expected = origin if is_named else None
            assert allowed.get("access-control-allow-origin") == expected
            assert answer.headers.get("access-control-allow-origin") == expected
        assert code(httpx.post(address + "/v1/x", headers={"Origin": origin})) == (401, "unauthorized")


def test_by_default_no_page_from_elsewhere_may_ask(url):
    headers = AUTHORISED | {"Origin": "https://viewer.example"}
    assert "access-control-allow-origin" not in httpx.get(url + "/v1/x", headers=headers).headers


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused_while_it_is_read(url, echo, chunked):
    before, sent = echo.calls, 0

    def chunks():
        nonlocal sent
        for _ in range(1_000):
            sent += 1_000
            yield bytes(1_000)

    answer = httpx.post(url + "/v1/x", content=chunks() if chunked else bytes(10**6), headers=AUTHORISED)
    assert code(answer) == (413, "body_too_large")
    assert echo.calls == before
    assert httpx.post(url + "/v1/x", content=bytes(1_000), headers=AUTHORISED).json() == {"size": 1_000}


def test_a_slow_body_ends(url, echo):
    """Slow loris: a byte now and then."""
    before = echo.calls
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = ["POST /v1/x HTTP/1.1", "Host: x", f"Authorization: Bearer {TOKEN}", "Content-Length: 900"]
        client.sendall("\r\n".join([*head, "", ""]).encode())
        started = time.monotonic()
        client.settimeout(0.05)
        answer = b""
        while b"slow_upload" not in answer:
            assert time.monotonic() - started < 60
            # Not up to the end: bytes that cross the answer would reset the connection.
            if time.monotonic() < started + LIMITS.upload_timeout_s / 2:
                client.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                answer += client.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408")
    assert echo.calls == before


@pytest.mark.parametrize(
    ("path", "expected", "retry"),
    [
        ("/v1/hang", (504, "timeout"), None),
        ("/v1/silent", (503, "replica_lost"), "1"),
        ("/v1/text", (500, "internal"), None),
        ("/v1/busy", (503, "overloaded"), "1"),
        ("/v1/late", (504, "timeout"), None),
        ("/v1/none", (404, "not_found"), None),
    ],
)
def test_every_failure_is_json_with_a_code(url, path, expected, retry):
    answer = httpx.post(url + path, content=b"x", headers=AUTHORISED)
    assert code(answer) == expected
    assert answer.headers.get("retry-after") == retry
    assert "secret" not in answer.text


def test_more_requests_than_allowed_are_asked_to_retry():
    waiting = Echo()
    with serving(Guard(waiting, Limits(max_requests=2, answer_timeout_s=60))) as address:

        def ask():
            answers.append(httpx.post(address + "/v1/wait", content=b"x", timeout=60))

        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while waiting.calls < 2:
            assert time.monotonic() < deadline
        refused = httpx.post(address + "/v1/x", content=b"x")
        assert code(refused) == (503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        assert httpx.get(address + "/healthz").status_code == 200
        waiting.release.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200, 200]
        assert httpx.post(address + "/v1/x", content=b"x").status_code == 200


@pytest.mark.parametrize(
    ("server", "allowed"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("10.0.0.7", False),
        ("0.0.0.0", False),
        (None, False),
    ],
)
def test_without_a_token_only_this_machine_is_answered(server, allowed):
    scope = {"type": "http", "method": "GET", "path": "/v1/x", "headers": []}
    scope["server"] = (server, 80) if server else None
    sent = []

    async def send(message):
        sent.append(message)

    door = Guard(Echo(), LIMITS, None, loopback_only=True)
    asyncio.run(door(scope, lambda: None, send))
    assert sent[0]["status"] == (200 if allowed else 403)


def test_the_proxy_takes_token_and_limits_from_its_environment(monkeypatch):
    monkeypatch.delenv(middleware.TOKEN_VARIABLE, raising=False)
    made = middleware.proxy_middlewares()[0].kwargs
    assert isinstance(made.pop("record"), RayMeter)
    assert made == {"limits": Limits(), "token_digest": None}
    monkeypatch.setenv(middleware.TOKEN_VARIABLE, TOKEN)
    monkeypatch.setenv(middleware.LIMITS_VARIABLE, '{"max_body_bytes": 7}')
    made = middleware.proxy_middlewares()[0].kwargs
    del made["record"]
    assert made == {"limits": Limits(max_body_bytes=7), "token_digest": middleware.digest(TOKEN)}


def test_names_of_this_machine():
    assert [middleware.is_loopback(host) for host in ("localhost", "127.0.0.1", "::1")] == [True] * 3
    assert [middleware.is_loopback(host) for host in ("0.0.0.0", "", None, "example.org")] == [False] * 4
