"""Slides that callers send, through the guard into a file, and the routes about them."""

import contextlib
import errno
import os
import socket
import uuid

import httpx
import pytest

from bcd import storage
from bcd.errors import StorageError
from bcd.serving import api, middleware
from bcd.serving.receive import SLIDES, Limits
from bcd.serving.slide_jobs import SlideJobs
from tests.model.test_bundle import card
from tests.service import TOKEN, serving

AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}
MOST_BYTES, MOST_SLIDES = 3 * 2**20, 2
CONTENT = os.urandom(2 * 2**20)


class NoEngine:
    """These routes compute nothing."""

    card, model_id = card(), "0" * 16


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.process)])
def jobs(request, tmp_path):
    """An empty folder of slides, and an archive with one."""
    uri = str(tmp_path / "slides")
    if request.param == "s3":
        uri = f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"
    archive = tmp_path / "archive"
    (archive / "2026").mkdir(parents=True)
    (archive / "2026" / "a.svs").write_bytes(b"pixels")
    (archive / "list.CSV").write_bytes(b"uri\nhttps://host/a.svs\n")
    (tmp_path / "secret.svs").write_bytes(b"secret")
    return SlideJobs(uri, str(archive), MOST_SLIDES)


@pytest.fixture
def url(jobs):
    limits = Limits(max_body_bytes=1_000, upload_timeout_s=1, slides=jobs.uri, max_slide_bytes=MOST_BYTES)
    app = api.create_app(NoEngine(), limits, 4, jobs)
    with serving(middleware.guarded(app, limits, middleware.digest(TOKEN))) as address:
        yield address + SLIDES


def post(url, name="a.svs", **options):
    return httpx.post(url, params={"name": name} if name else {}, headers=AUTHORISED, **options)


def refusal(answer):
    return answer.status_code, answer.json()["error"]["code"]


def stored(jobs):
    return sorted(file.path for file in storage.list_files_if_any(jobs.uri))


def test_a_slide_that_is_sent_waits_and_is_whole(url, jobs):
    answer = post(url, content=[CONTENT[: 2**16]] * 32)
    assert answer.status_code == 202
    job_id = answer.json()["id"]
    assert answer.headers["location"] == f"{SLIDES}/{job_id}"
    assert httpx.get(f"{url}/{job_id}", headers=AUTHORISED).json() == answer.json()
    assert answer.json() | {"since": ""} == {
        "id": job_id, "name": "a.svs", "since": "", "state": "queued", "before": 0,
    }  # fmt: skip
    assert storage.read_bytes(jobs.about(job_id).uri) == CONTENT[: 2**16] * 32
    assert jobs.waiting() == [job_id]


def test_a_slide_of_the_archive_is_named(url, jobs):
    answer = httpx.post(url, json={"name": "2026/a.svs", "mpp": 0.5}, headers=AUTHORISED)
    about = jobs.about(answer.json()["id"])
    assert (answer.status_code, about.mpp) == (202, 0.5)
    assert storage.read_bytes(about.uri) == b"pixels"


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.svs", "2026/../../secret.svs", "/etc/passwd", "s3://bucket/a.svs", "hf://o/n/a.svs"),
        *("2026", "b.svs", "a\n", "list.CSV"),
    ],
)
def test_nothing_else_can_be_named(url, jobs, name):
    answer = httpx.post(url, json={"name": name}, headers=AUTHORISED)
    assert refusal(answer) == (404, "no_slide")
    assert stored(jobs) == []


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (None, {"content": b"x"}, (422, "no_name")),
        ("../a.svs", {"content": b"x"}, (422, "bad_name")),
        (".a.svs", {"content": b"x"}, (422, "bad_name")),
        ("a.png", {"content": b"x"}, (415, "unsupported_format")),
        ("a.mrxs", {"content": b"x"}, (415, "unsupported_format")),
        ("a.svs", {"files": {"file": b"x"}}, (415, "unsupported_format")),
        ("a.svs", {"content": b"x" * (MOST_BYTES + 1)}, (413, "body_too_large")),
        ("a.svs", {"content": [b"x" * 2**16] * 60}, (413, "body_too_large")),
        ("a.svs", {"json": {"name": "2026/a.svs"}}, (422, "unknown_option")),
        (None, {"json": {"nom": "2026/a.svs"}}, (422, "invalid_request")),
    ],
)
def test_what_cannot_be_a_slide_is_refused_and_leaves_nothing(url, jobs, name, options, expected):
    assert refusal(post(url, name, **options)) == expected
    assert stored(jobs) == []


def test_a_client_that_stops_sending_leaves_nothing(url, jobs):
    host, _, port = url.removeprefix("http://").removesuffix(SLIDES).rpartition(":")
    head = f"POST {SLIDES}?name=a.svs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    with contextlib.closing(socket.create_connection((host, int(port)), timeout=60)) as client:
        client.sendall(f"{head}Content-Length: 100000\r\n\r\nsome".encode())
        assert client.recv(10_000).startswith(b"HTTP/1.1 408")
    assert stored(jobs) == []


def test_a_disk_that_is_full_is_said_and_leaves_nothing(url, jobs, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert refusal(post(url, content=b"x")) == (503, "no_room")
    monkeypatch.undo()
    assert stored(jobs) == []


def test_a_store_that_fails_is_no_fault_of_the_service(url, monkeypatch):
    def down(_):
        raise StorageError("s3://bucket/secret: cannot read it: 500")

    job_id = post(url, content=b"x").json()["id"]
    monkeypatch.setattr(storage, "exists", down)
    answer = httpx.get(f"{url}/{job_id}", headers=AUTHORISED)
    assert refusal(answer) == (503, "unavailable")
    assert "secret" not in answer.text


def test_without_the_token_nothing_is_received(url, jobs):
    for method in ("GET", "POST", "DELETE"):
        assert httpx.request(method, url, params={"name": "a.svs"}).status_code == 401
    assert stored(jobs) == []


def test_nobody_names_the_id_of_a_slide(url, jobs):
    """The header by which the guard hands one on is taken from callers."""
    answer = httpx.post(url, json={"name": "2026/a.svs"}, headers=AUTHORISED | {"X-Bcd-Slide": "0" * 32})
    assert answer.json()["id"] != "0" * 32
    assert jobs.about(answer.json()["id"]).uri.endswith("2026/a.svs")


def test_no_more_slides_wait_than_may(url, jobs):
    for _ in range(MOST_SLIDES):
        assert post(url, content=b"x").status_code == 202
    before = stored(jobs)
    assert refusal(post(url, content=b"x")) == (503, "overloaded")
    assert stored(jobs) == before


def test_removing_one_cancels_it_and_then_deletes_it(url, jobs):
    address = f"{url}/{post(url, content=b'x').json()['id']}"
    assert httpx.delete(address, headers=AUTHORISED).status_code == 204
    assert httpx.get(address, headers=AUTHORISED).json()["state"] == "cancelled"
    assert httpx.delete(address, headers=AUTHORISED).status_code == 204
    for method in ("GET", "DELETE"):
        assert refusal(httpx.request(method, address, headers=AUTHORISED)) == (404, "no_slide")


def test_files_and_ids_are_those_that_exist(url):
    job_id = post(url, content=b"x").json()["id"]
    known = {"heatmap.png": "no_result", "slide.json": "not_found", "..%2Fslide.json": "not_found"}
    for name, code in known.items():
        assert refusal(httpx.get(f"{url}/{job_id}/{name}", headers=AUTHORISED)) == (404, code)
    for other in ("0" * 32, "runner", "..", "A" * 32):
        assert httpx.get(f"{url}/{other}/heatmap.png", headers=AUTHORISED).status_code == 404


def test_a_service_without_slides_says_so(jobs):
    limits = Limits(max_body_bytes=1_000)
    with serving(middleware.guarded(api.create_app(NoEngine(), limits, 4), limits, None)) as address:
        assert refusal(httpx.post(address + SLIDES, content=b"x" * 2_000)) == (404, "no_slides")
