"""The service as a cluster runs it: `serve deploy`, the HTTP proxy, replicas; and the door `jobs/serve.py`.

The two tests that change what is deployed are last.
"""

import asyncio
import contextlib
import gzip
import itertools
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
import yaml
from PIL import Image
from ray import serve as ray_serve
from ray.serve.schema import ServeDeploySchema

import bcd
from bcd import schema, storage
from bcd.config.serving import ServeConfig, ServiceConfig
from bcd.data import archive
from bcd.errors import BundleError, ConfigError, ResourceError
from bcd.model import bundle, predictor
from bcd.model.engines import choice
from bcd.runtime import predict
from bcd.scoring import tiling
from bcd.serving import front, middleware, serve
from bcd.serving.telemetry import signals
from bcd.serving.viewer import service as viewer_service
from tests import archives, pictures
from tests.cluster import BIN, PATIENCE_S, ROOT, free_port, kill, other_lines, wait_for
from tests.end_to_end import test_page, test_viewer
from tests.end_to_end.test_page import CHROMIUM, PATIENCE_MS, launch, probability, sync_api
from tests.model.test_bundle import card, untrained
from tests.service import LIMITS, SENT, TOKEN
from tests.serving.test_api import statistics
from tests.trained import scored

N_PICTURES = 40
AUTHORISED = {"Authorization": f"Bearer {TOKEN}"}
# All that a service prints where nothing is wrong.
LINES = (
    r"serving .* at http://127.0.0.1:\d+ \(stop with Ctrl-C\)",
    r"\x1b\[36m\(ProxyActor pid=\d+\)\x1b\[0m POST /\S* (200|401 unauthorized), .*; request .*",
    # From who asks too early.
    r"\x1b\[36m\(ProxyActor pid=\d+\)\x1b\[0m (warning: )?GET /readyz (404|503)( \w+)?, .*; request .*",
    r"finishing accepted requests",
)
REPLICA, VIEWER = r"ray::ServeReplica:bcd:Replica", r"ray::ServeReplica:bcd-viewer:ViewerReplica"
# The largest difference that rounding in bfloat16 may make to a probability, between batches of any shape.
BFLOAT16 = 0.02


class TestGate:
    """Without Ray: who is let through when."""

    def test_the_idle_are_not_kept_waiting(self):
        asyncio.run(asyncio.wait_for(serve.Gate(2).enter(), 1))

    def test_while_busy_all_wait_and_then_a_batch_comes_through(self):
        async def story():
            gate, through = serve.Gate(2), []

            async def come(name):
                await gate.enter()
                through.append(name)

            gate.close()
            tasks = [asyncio.create_task(come(i)) for i in range(5)]
            for expected in ([], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4]):
                for _ in range(5):
                    await asyncio.sleep(0)
                assert through == expected
                gate.open()
                gate.close() if len(through) < 3 else None
            await asyncio.gather(*tasks)

        asyncio.run(story())

    def test_who_gives_up_leaves_the_place_to_the_next(self):
        async def story():
            gate = serve.Gate(1)
            gate.close()
            first, second = (asyncio.create_task(gate.enter()) for _ in range(2))
            await asyncio.sleep(0)
            first.cancel()
            await asyncio.sleep(0)
            gate.open()
            await asyncio.wait_for(second, 1)
            assert first.cancelled()

        asyncio.run(story())


# The class below is the one that Ray Serve's decorator has wrapped.
class Unloaded(serve.Replica.__base__):
    """A replica's way from a request to the batch, with Ray Serve's own queue, and no model behind it."""

    def __init__(self, size):
        self._gate, self._record = serve.Gate(size), signals.silent
        self._forward.set_max_batch_size(size)
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()

    async def _predict(self, given):
        self.begun.set()
        await self.may_end.wait()
        return given


@pytest.fixture
def make_batch_queue(monkeypatch):
    """Makes a queue of `@serve.batch` outside a replica, for one event loop."""
    limits = SimpleNamespace(max_ongoing_requests=100)
    context = SimpleNamespace(_deployment_config=limits)
    monkeypatch.setattr(ray_serve, "get_replica_context", lambda: context)
    wrapper = serve.Replica._forward.set_max_batch_size.__self__
    monkeypatch.setattr(wrapper, "max_batch_size", wrapper.max_batch_size)
    return lambda: monkeypatch.setattr(wrapper, "_queue", None)


@pytest.mark.parametrize("size", [1, 4])
def test_clients_that_leave_at_any_moment_hold_up_nobody(make_batch_queue, size):
    """A batch that everyone has left before it begins is dropped by Ray, so that it never ends either."""

    async def story(turns):
        replica = Unloaded(size)
        first = asyncio.create_task(replica._in_batch(b"first"))
        await replica.begun.wait()
        leaving = [asyncio.create_task(replica._in_batch(b"leaves")) for _ in range(size)]
        staying = [asyncio.create_task(replica._in_batch(b"stays")) for _ in range(2 * size)]
        await asyncio.sleep(0)
        replica.may_end.set()
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
        answers = await asyncio.wait_for(asyncio.gather(first, *staying), 5)
        assert answers == [b"first", *[b"stays"] * len(staying)]
        return await asyncio.gather(*leaving, return_exceptions=True)

    for turns in range(100):
        make_batch_queue()
        left = asyncio.run(story(turns))
        if left == [b"leaves"] * size:  # too late: with their answers
            break
        assert {type(one) for one in left} == {asyncio.CancelledError}
    assert 5 < turns < 99


def contents():
    """Bytes of images by name: real ones where they are available."""
    found = {}
    if folder := os.environ.get("BCD_REAL_DATA"):
        files = sorted((Path(folder) / "breakhis").rglob("*.png"))[::4]
        found = {path.name: path.read_bytes() for path in files}
    drawn = archives.fields(N_PICTURES - len(found))
    return found | {name.replace("/", "-"): content for name, content in drawn.items()}


@pytest.fixture(scope="module")
def files():
    return contents()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """URIs of two bundles."""
    uris = []
    for seed in (1, 2):
        network = untrained(seed=seed, std=5e-3)
        uris.append(str(tmp_path_factory.mktemp("model")))
        facts = card(feature_statistics=statistics(), seed=seed)
        predictor.save(network, facts, uris[-1])
    return uris


@pytest.fixture(scope="module")
def archived(files, models, tmp_path_factory):
    """Rows by model and name, from the worker of the archive job; the second model in bfloat16."""
    folder = tmp_path_factory.mktemp("archive")
    for name, content in files.items():
        (folder / name).write_bytes(content)
    listed = schema.fill(archive.list_inputs(str(folder)).table, schema.READING)
    rows = {}
    for uri, precision in zip(models, ("float32", "bfloat16"), strict=True):
        settings = predict.Settings(uri, bundle.identify(uri), precision)
        rows[uri] = {row[schema.IMAGE_ID]: row for row in scored(listed, settings).to_pylist()}
    return rows


def deploy(cluster, port, folder, model_uri, **arguments):
    """`serve deploy` of a file with a model and the viewer, and wait until it runs."""
    given = {"model": model_uri, "max_body_bytes": LIMITS.max_body_bytes, "slides": str(SENT)} | arguments
    places = {
        "bcd": ("/", "bcd.serving.serve:app"),
        viewer_service.NAME: (viewer_service.PREFIX, "bcd.serving.viewer.service:viewer"),
    }
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {"name": name, "import_path": path, "route_prefix": prefix, "args": given}
            for name, (prefix, path) in places.items()
        ],
    }
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [BIN / "serve", "deploy", f"--address={cluster.dashboard}", path]

    def accepted():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or "503" in done.stderr, done.stderr
        return done.returncode == 0

    wait_for(accepted, PATIENCE_S, "a deployment that is accepted")


class Service:
    """Where it listens, and a way to ask."""

    def __init__(self, port):
        self.url, self.port = f"http://127.0.0.1:{port}", port

    def ask(self, content, **options):
        return httpx.post(
            f"{self.url}/v1/predict", content=content, headers=AUTHORISED, timeout=300, **options
        )

    def model_id(self):
        answer = httpx.get(f"{self.url}/v1/model", headers=AUTHORISED, timeout=60)
        return answer.json().get("model_id")

    def view(self, **options):
        return httpx.get(f"{self.url}/v1/view", params=options, headers=AUTHORISED, timeout=300)

    def is_ready(self):
        try:
            return httpx.get(f"{self.url}/readyz", timeout=60).status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture(scope="module")
def service(cluster, archived, models, tmp_path_factory):
    port = free_port()
    running = Service(port)
    deploy(cluster, port, tmp_path_factory.mktemp("serve"), models[0])
    wait_for(running.is_ready, PATIENCE_S, "the service")
    wait_for(lambda: "no_scores" in running.view().text, PATIENCE_S, "the viewer")
    yield running
    ray_serve.shutdown()
    shutil.rmtree(SENT, ignore_errors=True)  # of a part of these tests, which may send no slide


def log_odds(row):
    return row[schema.LOGIT][1] - row[schema.LOGIT][0]


@pytest.mark.ray
@pytest.mark.parametrize("clients", [1, 16])
def test_the_service_answers_what_the_archive_holds(service, archived, models, files, clients):
    """Done when 1: alone, and in whatever batches sixteen clients make."""
    expected = archived[models[0]]
    assert len(expected) == len(files) == N_PICTURES
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(service.ask, files.values()))
    assert {answer.status_code for answer in answers} == {200}
    rows = [expected[name] for name in files]
    found = [answer.json() for answer in answers]
    wanted = [log_odds(row) for row in rows]
    assert np.std(wanted) > 1e-3
    np.testing.assert_allclose([answer["log_odds"] for answer in found], wanted, atol=1e-4)
    for answer, row in zip(found, rows, strict=True):
        assert answer["predicted_class"] == row[schema.PREDICTED_CLASS]
        assert answer["probability_malignant"] == pytest.approx(row[schema.PROBABILITY_MALIGNANT], abs=1e-5)
        assert answer["model_id"] == row[schema.MODEL_ID]
        assert answer["novelty"] == pytest.approx(row[schema.NOVELTY], rel=1e-4)
        np.testing.assert_allclose(np.ravel(answer["evidence"]["values"]), row[schema.EVIDENCE], atol=1e-3)


@pytest.mark.ray
def test_a_batch_request_has_the_same_numbers(service, archived, models, files):
    names = list(files)[:16]
    given = [("files", (name, files[name])) for name in names]
    answer = httpx.post(f"{service.url}/v1/predict/batch", files=given, headers=AUTHORISED, timeout=300)
    results = answer.json()["results"]
    assert [item["name"] for item in results] == names
    wanted = [log_odds(archived[models[0]][name]) for name in names]
    np.testing.assert_allclose([item["answer"]["log_odds"] for item in results], wanted, atol=1e-4)


@pytest.mark.ray
def test_a_slide_is_scored_as_in_an_archive_though_its_replica_is_lost(cluster, service, models, tmp_path):
    """The replica that runs the job is killed; the next one runs it again."""
    content = pictures.tiled_tiff(pictures.stained(920, 1400), 0.49, side=256)
    sent = httpx.post(f"{service.url}/v1/slides?name=a.tif", content=content, headers=AUTHORISED)
    assert sent.status_code == 202
    address = service.url + sent.headers["location"]

    def found(path=""):
        return httpx.get(address + path, headers=AUTHORISED, timeout=60)

    wait_for(lambda: found().json()["state"] == "running", PATIENCE_S, "work on the slide")
    (replica,) = map(psutil.Process, replicas(cluster))
    replica.kill()
    wait_for(
        lambda: found().status_code == 200 and found().json()["state"] == "done", PATIENCE_S, "its result"
    )
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tif").write_bytes(content)
    settings = predict.Settings(models[0], bundle.identify(models[0]))
    facts = card()
    size = {"tile_width_px": facts.field_width_px, "tile_height_px": facts.field_height_px}
    tiles = tiling.Tiling(tile_mpp=max(facts.mpp), **size, mpp=None, min_tissue=0.1)
    inputs = archive.list_inputs(str(tmp_path / "in")).table
    rows = pa.concat_tables(tiling.expand(inputs, tiles, str(tmp_path / "plans"), frozenset()))
    expected = scored(rows, settings)[schema.PROBABILITY_MALIGNANT].to_numpy()
    row = found().json()["slide"]
    assert (row["tiles"], row["error_tiles"], len(expected)) == (4, 0, 4)
    for name, share in schema.QUANTILES.items():
        assert row[name] == pytest.approx(np.quantile(expected, share), abs=1e-5)
    tiles = json.loads(gzip.decompress(found("/tiles.geojson.gz").content))
    assert len(tiles["features"]) == 4
    assert found("/heatmap.png").content.startswith(b"\x89PNG")
    assert httpx.delete(address, headers=AUTHORISED).status_code == 204
    assert found().status_code == 404


@pytest.mark.ray
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)")
def test_a_slide_is_dropped_on_the_page_and_seen_in_the_viewer(service):
    """From the drop to each tile's numbers, which are those of the job's table to the digit."""
    content = pictures.tiled_tiff(pictures.stained(920, 1400), 0.49, side=256)
    with sync_api.sync_playwright() as playwright:
        browser = launch(playwright)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE_MS)
        test_page.enter(page, service.url)
        # The service recognises it: its name may be that of a field.
        test_page.drop(page, "a.tif", content)
        sent = page.locator("#slides > li")
        sync_api.expect(sent).to_contain_text("being scored", timeout=PATIENCE_MS)
        sync_api.expect(page.get_by_role("link", name="Open in the viewer")).to_be_visible(
            timeout=1_000 * PATIENCE_S
        )
        viewer = test_viewer.open_sent(page)
        job_id = re.search(r"job=([0-9a-f]{32})", viewer.url)[1]
        rows = storage.dataset(str(SENT / job_id / "output" / "predictions")).to_table().to_pylist()
        assert len(rows) == 4
        for row in rows:
            place = row[schema.X_LEVEL0_PX] + 50, row[schema.Y_LEVEL0_PX] + 50
            test_viewer.check(test_viewer.read_tile(viewer, *place), row)
        with_map = test_viewer.pixels(viewer)
        viewer.locator("#opacity").fill("0")
        sync_api.expect(viewer.locator("#opacity-text")).to_have_text("0 %", timeout=PATIENCE_MS)
        plain = test_viewer.pixels(viewer)
        assert plain.std() > 5  # tissue
        assert np.abs(with_map.astype(int) - plain).max() > 20
        page.get_by_role("button", name="Delete").click()
        sync_api.expect(sent).to_have_count(0, timeout=PATIENCE_MS)
        wait_for(lambda: service.view(job=job_id).status_code == 404, PATIENCE_S, "the end of the slide")
        browser.close()


@pytest.mark.ray
def test_a_viewer_that_hangs_holds_up_no_prediction(service, cluster, files):
    """Its process is stopped, as by tiles that take for ever: more requests than the model has places."""
    (pid,) = [pid for pid, command in cluster.processes() if re.search(VIEWER, command)]
    viewer = psutil.Process(pid)
    with ThreadPoolExecutor(64) as pool:
        viewer.suspend()
        try:
            waiting = [pool.submit(service.view, job="f" * 32) for _ in range(64)]
            answers = [service.ask(content) for content in list(files.values())[:8]]
            assert {answer.status_code for answer in answers} == {200}
            assert not any(one.done() for one in waiting)
        finally:
            viewer.resume()
        assert {one.result().status_code for one in waiting} == {404}


@pytest.mark.ray
def test_a_load_balancer_sees_that_the_proxy_is_well(service):
    """Without the token; the list of applications requires it."""
    answer = httpx.get(f"{service.url}/-/healthz", timeout=60)
    assert (answer.status_code, answer.text) == (200, "success")
    assert httpx.get(f"{service.url}/-/routes", timeout=60).status_code == 401


@pytest.mark.ray
def test_batch_clients_that_hang_up_hold_up_nobody(service, files):
    """Eight at a time, each after another share of the time that an answer takes."""
    contents = list(files.values())[:16]
    given = [("files", (str(i), content)) for i, content in enumerate(contents)]

    def ask(patience_s):
        timeout = httpx.Timeout(300, read=patience_s)
        try:
            url = f"{service.url}/v1/predict/batch"
            return httpx.post(url, files=given, headers=AUTHORISED, timeout=timeout).status_code
        except httpx.ReadTimeout:
            return None

    started = time.monotonic()
    assert ask(300) == 200
    whole_s = time.monotonic() - started
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(ask, np.random.default_rng(0).uniform(0, 4 * whole_s, 40)))
        assert statuses.count(None) > 10
        assert set(statuses) <= {None, 200}
        answers = list(pool.map(service.ask, contents))
    assert {answer.status_code for answer in answers} == {200}


def bodies():
    """100 bad bodies of every kind."""
    good = pictures.encode(pictures.gradient(92, 140))
    jpeg, tiff = (pictures.encode(pictures.gradient(92, 140), kind) for kind in ("JPEG", "TIFF"))
    rng = np.random.default_rng(0)
    found = [(content, {}) for content, _ in pictures.broken().values()]
    found += [(rng.bytes(int(size)), {}) for size in rng.integers(1, 5_000, 20)]
    for whole in (good, jpeg, tiff):
        found += [(whole[: int(cut * len(whole))], {}) for cut in np.linspace(0.01, 0.9, 8)]
        for _ in range(6):
            damaged = bytearray(whole)
            for place in rng.integers(8, len(whole), 40):
                damaged[place] = rng.integers(256)
            found.append((bytes(damaged), {}))
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    parts = [
        b"",
        b"--b",
        b"--b--",
        b"--b\r\n\r\n\r\n--b--",
        b"--b\r\nContent-Disposition: x\r\n\r\ny\r\n--b--\r\n",
    ]
    found += [(part, form) for part in parts] + [(rng.bytes(200), form) for _ in range(8)]
    odd = [
        {"Content-Type": "application/json"},
        {"Content-Type": "image/gif; q"},
        {"Content-Encoding": "gzip"},
    ]
    found += [(b'{"url": "http://127.0.0.1/"}', headers) for headers in odd]
    found += [(b"http://127.0.0.1/a.png", {}), (b"<svg/>", {}), (b"%PDF-1.4", {}), (b"PK\x03\x04", {})]
    endless = itertools.cycle([b"\x00" * 100, b"GIF89a", b"RIFF....WEBP", b"\xff\xd8\xff"])
    return found + [(next(endless), {}) for _ in range(100 - len(found))]


@pytest.mark.ray
def test_bad_bodies_of_every_kind_do_no_harm(service, cluster, files):
    """Done when 3: codes of the client's fault, no crash, no growth."""
    given = bodies()
    assert len(given) == 100
    before = replicas(cluster)

    def ask(pair):
        content, headers = pair
        return httpx.post(
            f"{service.url}/v1/predict", content=content, headers=AUTHORISED | headers, timeout=300
        )

    def memory():
        return sum(psutil.Process(pid).memory_info().rss for pid in before) / 2**20

    def once():
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(ask, given))

    once()
    settled = memory()
    for answer in once():
        # Some damage leaves a complete image: it is answered.
        assert answer.status_code in (200, 400, 415, 422), answer.text
        assert answer.status_code == 200 or answer.json()["error"]["code"]
    assert memory() - settled < 100
    assert replicas(cluster) == before
    assert service.ask(next(iter(files.values()))).status_code == 200


def replicas(cluster):
    """Ids of the processes that hold the model."""
    return sorted(pid for pid, command in cluster.processes() if re.search(REPLICA, command))


def proxies(cluster):
    return [pid for pid, command in cluster.processes() if "ray::ProxyActor" in command]


@pytest.mark.ray
def test_a_gigabyte_is_refused_and_not_kept(service, cluster, files):
    """Done when 3: without a declared length, so that only counting finds it."""
    most = []

    def chunks():
        block = bytes(2**20)
        for i in range(1_024):
            if i % 64 == 0:
                most.append(sum(psutil.Process(pid).memory_info().rss for pid in proxies(cluster)) / 2**20)
            yield block

    answer = httpx.post(f"{service.url}/v1/predict", content=chunks(), headers=AUTHORISED, timeout=300)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert max(most) - most[0] < 3 * LIMITS.max_body_bytes / 2**20
    assert service.ask(next(iter(files.values()))).status_code == 200


@pytest.mark.ray
def test_slow_clients_end_and_hold_up_nobody(service, files):
    """Done when 3: thirty that send a byte now and then, while others are answered."""
    head = ["POST /v1/predict HTTP/1.1", "Host: x", f"Authorization: Bearer {TOKEN}", "Content-Length: 9999"]
    started = time.monotonic()
    slow = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(30)]
    for client in slow:
        client.sendall("\r\n".join([*head, "", ""]).encode())
        client.settimeout(0.05)
    assert service.ask(next(iter(files.values()))).status_code == 200
    answers = dict.fromkeys(slow, b"")
    deadline = started + PATIENCE_S
    while waiting := [client for client in slow if b"slow_upload" not in answers[client]]:
        assert time.monotonic() < deadline
        for client in waiting:
            # Not up to the end: bytes that cross the answer would reset the connection.
            if time.monotonic() < started + LIMITS.upload_timeout_s / 2:
                client.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                answers[client] += client.recv(10_000)
    assert all(answer.startswith(b"HTTP/1.1 408") for answer in answers.values())
    for client in slow:
        client.close()


@pytest.mark.ray
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt install chromium)")
def test_the_page_works_with_the_services_token(service, archived, models, files):
    """Done when 5: from the token to the probability, through the cluster's proxy."""
    name, content = next(iter(files.items()))
    row = archived[models[0]][name]
    with sync_api.sync_playwright() as playwright:
        browser = launch(playwright)
        page = browser.new_page()
        page.set_default_timeout(PATIENCE_MS)
        test_page.enter(page, service.url)
        page.set_input_files("#files", [{"name": name, "mimeType": "image/png", "buffer": content}])
        verdict = page.locator("#verdict")
        shown = probability(row[schema.PROBABILITY_MALIGNANT])
        sync_api.expect(verdict.locator(".number")).to_have_text(shown, timeout=PATIENCE_MS)
        sync_api.expect(verdict.locator(".chip")).to_have_text(row[schema.PREDICTED_CLASS])
        assert TOKEN not in page.url
        browser.close()


@contextlib.contextmanager
def load(service, files, clients=3):
    """Clients that ask without pause; yields their answers so far, as (time begun, answer)."""
    answers, ended = [], threading.Event()
    endless = itertools.cycle(files.values())

    def client():
        while not ended.is_set():
            begun = time.monotonic()
            answers.append((begun, service.ask(next(endless))))

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        try:
            wait_for(
                lambda: len(answers) >= 2 * clients or any(r.done() for r in running), PATIENCE_S, "load"
            )
            yield answers
        finally:
            ended.set()
        for task in running:
            task.result()


@pytest.mark.ray
def test_a_killed_replica_costs_only_what_was_in_flight(service, cluster, files):
    """Done when 4: a 5xx that says retry, and the next succeed."""
    clients = 3
    with load(service, files, clients) as answers:
        victims = replicas(cluster)
        killed = time.monotonic()
        assert kill(cluster.processes(), REPLICA) == 1
        wait_for(lambda: set(replicas(cluster)) - set(victims), PATIENCE_S, "a new replica")
        wait_for(service.is_ready, PATIENCE_S, "the service")
        back = time.monotonic()
        wait_for(
            lambda: sum(begun > back for begun, _ in answers) > clients or None, PATIENCE_S, "answers again"
        )
    lost = [(begun, answer) for begun, answer in answers if answer.status_code != 200]
    for _, answer in lost:
        assert answer.status_code == 503, answer.text
        assert answer.headers["retry-after"]
        assert answer.json()["error"]["code"] in ("replica_lost", "overloaded")
    in_flight = [begun for begun, _ in lost if begun <= killed]
    assert len(in_flight) <= clients
    assert all(answer.status_code == 200 for begun, answer in answers if begun > back)


def bombs():
    """Small bodies by what they cost: 64 million pixels, scans, streams that libtiff complains of."""
    black = Image.new("RGB", (8_000, 8_000))
    few = pictures.encode(pictures.gradient(), "JPEG", progressive=True)
    tiff = pictures.encode(pictures.stained(256, 256), "TIFF", compression="jpeg")
    scan = few[few.rindex(b"\xff\xda") : -2]
    rows = zlib.compress(bytes(8_000 * (6 * 8_000 + 1)), 1)
    header = struct.pack(">IIBBBBB", 8_000, 8_000, 16, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"tRNS", bytes(6))]
    parts += [(b"IDAT", rows[i : i + 2**20]) for i in range(0, len(rows), 2**20)] + [(b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    ]
    return {
        "progressive JPEG": pictures.encode(black, "JPEG", progressive=True),
        "JPEG of 500 scans": few[:-2] + 500 * scan + few[-2:],
        "PNG": pictures.encode(black),
        "PNG of 16 bits": b"\x89PNG\r\n\x1a\n" + b"".join(chunks),
        "TIFF, LZW": pictures.encode(black, "TIFF", compression="tiff_lzw"),
        "TIFF, damaged": tiff[:1_000] + b"\xff\xf0" + tiff[1_002:],
    }


@pytest.mark.trial
@pytest.mark.ray
def test_bombs_among_the_images_hold_up_nobody(cluster, service, files, capsys):
    """One in fifty, for BCD_SOAK_MINUTES: the other answers take at most twice their usual time."""
    minutes = float(os.environ.get("BCD_SOAK_MINUTES", "10"))
    given, slow = itertools.cycle(bombs().items()), []

    def answers(pool, seconds, with_bombs):
        """Seconds of each answer of four clients; bombs are sent beside."""
        times, until = [], time.monotonic() + seconds
        for n, content in enumerate(itertools.cycle(files.values())):
            if time.monotonic() > until:
                return times
            if with_bombs and n % 50 == 49:
                name, bomb = next(given)
                slow.append((name, pool.submit(service.ask, bomb)))
            begun = time.monotonic()
            assert service.ask(content).status_code == 200
            times.append(time.monotonic() - begun)
        return times

    (replica,) = map(psutil.Process, replicas(cluster))
    with ThreadPoolExecutor(100) as pool, ThreadPoolExecutor(4) as clients:
        alone, beside = (
            [clients.submit(answers, pool, *how) for _ in range(4)]
            for how in ((30, False), (60 * minutes, True))
        )
        usual, tested = (np.concatenate([one.result() for one in running]) for running in (alone, beside))
        largest = max(p.memory_info().rss for p in [replica, *replica.children(recursive=True)])
        statuses = Counter((name, one.result().status_code) for name, one in slow)
    with capsys.disabled():
        for name, times in (("usual", usual), ("with bombs", tested)):
            print(f"\n{name}: {len(times)} answers, p50, p95 and longest (s):", end=" ")
            print(*np.round(np.quantile(times, [0.5, 0.95, 1]), 3), end=" ")
        print(f"\nbombs: {dict(statuses)}\nlargest process at the end: {largest / 2**20:.0f} MiB")
    assert {status for _, status in statuses} <= {200, 415, 422, 503, 504}
    assert np.median(tested) <= 2 * np.median(usual)
    assert len(slow) > 5
    assert {p.pid for p in psutil.process_iter()} >= {replica.pid}


@pytest.mark.trial
@pytest.mark.ray
def test_a_second_bundle_under_load_loses_no_request(
    service, cluster, models, files, archived, tmp_path, capsys
):
    """Done when 4, and the bfloat16 part of 1: the second bundle computes in bfloat16."""
    names = [bundle.identify(uri) for uri in models]
    with load(service, files) as answers:
        deploy(cluster, service.port, tmp_path, models[1], precision="bfloat16")
        wait_for(lambda: answers[-1][1].json().get("model_id") == names[1], PATIENCE_S, "the second model")
        n = len(answers)
        wait_for(lambda: len(answers) > n + 20, PATIENCE_S, "answers of the second model")
    assert {answer.status_code for _, answer in answers} == {200}
    assert {answer.json()["model_id"] for _, answer in answers} == set(names)
    expected = archived[models[1]]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda content: service.ask(content).json(), files.values()))
    pairs = [
        [answer["probability_malignant"], expected[name][schema.PROBABILITY_MALIGNANT]]
        for name, answer in zip(files, found, strict=True)
    ]
    served, archived = np.array(pairs).T
    assert archived.std() > 1e-3
    most = np.abs(served - archived).max()
    with capsys.disabled():
        print(f"\nlargest difference of a probability in bfloat16, service to archive: {most:.2e}")
    assert most < BFLOAT16


def busy_s(children):
    """Seconds that the replica among the processes has computed."""
    times = [child.cpu_times() for child in children if "ServeReplica" in "".join(child.cmdline())]
    return sum(time.user + time.system for time in times)


@contextlib.contextmanager
def door(model_uri, port, folder, *arguments):
    """`jobs/serve.py` as a process of its own, on a cluster of its own."""
    command = [sys.executable, "jobs/serve.py", "--model", model_uri, "--port", str(port), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    log = (folder / "log").open("w+")
    job = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        yield job, lambda: (folder / "log").read_text()
    finally:
        job.kill()
        job.wait()
        log.close()


@pytest.mark.trial
@pytest.mark.ray
def test_the_door_serves_with_a_token_and_ends_on_sigterm(models, files, tmp_path):
    """What was accepted is finished, and nothing is left running."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    port = free_port()
    running, content = Service(port), next(iter(files.values()))
    with door(models[0], port, tmp_path, "--token-file", str(tmp_path / "token")) as (job, log):
        wait_for(lambda: running.is_ready() or job.poll() is not None, PATIENCE_S, "the service")
        assert job.poll() is None, log()
        wait_for(lambda: "serving" in log() and f"http://127.0.0.1:{port}" in log(), 60, "its address")
        assert httpx.post(f"{running.url}/v1/predict", content=content).status_code == 401
        assert running.ask(content).status_code == 200
        children = psutil.Process(job.pid).children(recursive=True)
        large = pictures.encode(pictures.gradient(2_000, 3_000))
        given = [("files", (str(i), large)) for i in range(16)]
        with ThreadPoolExecutor(1) as pool:
            before = busy_s(children)
            accepted = pool.submit(
                httpx.post, f"{running.url}/v1/predict/batch", files=given, headers=AUTHORISED, timeout=300
            )
            wait_for(lambda: busy_s(children) > before + 0.2, PATIENCE_S, "the replica at work")
            assert not accepted.done()
            job.send_signal(signal.SIGTERM)
            results = accepted.result().json()["results"]
        assert [item["error"] for item in results] == [None] * 16
        assert job.wait(PATIENCE_S) == 0, log()
        assert not other_lines(log(), LINES)
        assert "finishing accepted requests" in log()
        assert len(re.findall(r" 200, .*; request ", log())) == 2
        assert TOKEN not in log()
    psutil.wait_procs(children, timeout=60)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.ray
def test_several_models_and_their_metrics_at_a_port(models, files, tmp_path):
    """What only Ray Serve shows: prefixes, processes, the exporter. One is killed, the other answers."""
    port, metrics, content = free_port(), free_port(), next(iter(files.values()))
    running = Service(port)
    settings = ["--models", f"b={models[1]}", "--metrics-port", str(metrics)]
    with door(models[0], port, tmp_path, *settings) as (job, log):
        wait_for(lambda: running.is_ready() or job.poll() is not None, PATIENCE_S, "the service")
        assert job.poll() is None, log()
        for name, uri in (("default", models[0]), ("b", models[1])):
            answer = httpx.post(f"{running.url}/v1/models/{name}/predict", content=content, timeout=300)
            assert (answer.status_code, answer.json()["model_id"]) == (200, bundle.identify(uri))
        assert running.ask(b"").status_code == 422

        expected = [signal.exported for signal in signals.SIGNALS if signal != signals.WARNINGS]
        expected += [
            f'{signals.PREDICTIONS.exported}{{.*model="b"',
            f'{signals.REQUESTS.exported}{{.*code="empty"',
        ]

        def exported():
            """Each process exports its own, now and then."""
            text = httpx.get(f"http://127.0.0.1:{metrics}/metrics", timeout=60).text
            return all(re.search(f"^{line}", text, re.M) for line in expected)

        wait_for(exported, PATIENCE_S, "the metrics")
        (other,) = [
            process
            for process in psutil.Process(job.pid).children(recursive=True)
            if "ServeReplica:bcd-model-b:" in "".join(process.cmdline())
        ]
        other.kill()
        assert all(running.ask(content).status_code == 200 for content in list(files.values())[:5])


@pytest.mark.trial
@pytest.mark.ray
def test_with_openvino_it_answers_what_python_does(openvino, models, files, tmp_path):
    """Alone, and in whatever batches eight clients make."""
    port = free_port()
    running, contents = Service(port), list(files.values())
    with door(models[0], port, tmp_path, "--engine", "openvino") as (job, log):
        wait_for(lambda: running.is_ready() or job.poll() is not None, PATIENCE_S, "the service")
        assert job.poll() is None, log()
        assert any(
            "openvino" in mapped.path
            for process in psutil.Process(job.pid).children(recursive=True)
            if "ServeReplica:" in "".join(process.cmdline())
            for mapped in process.memory_maps()
        )
        with ThreadPoolExecutor(8) as pool:
            answers = [answer.json() for answer in pool.map(running.ask, contents)]
    expected = bcd.load(models[0], engine="openvino").predict_files(contents)
    wanted = expected.logit[:, 1] - expected.logit[:, 0]
    np.testing.assert_allclose([answer["log_odds"] for answer in answers], wanted, atol=1e-6)
    evidence = [answer["evidence"]["values"] for answer in answers]
    np.testing.assert_allclose(evidence, expected.evidence, atol=1e-6)


def test_without_a_token_only_loopback(models, monkeypatch):
    monkeypatch.delenv(middleware.TOKEN_VARIABLE, raising=False)
    with pytest.raises(
        ConfigError, match=r"listening on 0.0.0.0 requires a token.*: set the variable BCD_API_TOKEN"
    ):
        serve.run(ServeConfig(model=models[0], host="0.0.0.0", port=free_port()))


def test_an_empty_token_file_is_no_token(models, tmp_path):
    (tmp_path / "token").write_text("\n")
    config = ServiceConfig(model=models[0], token_file=str(tmp_path / "token"))
    with pytest.raises(ConfigError, match="is empty"):
        serve.create_application(config, None)
    (tmp_path / "token").write_text("two words")
    with pytest.raises(ConfigError, match="no spaces"):
        serve.create_application(config, None)


def test_the_token_is_bound_as_a_digest(models, tmp_path, monkeypatch):
    """What Ray keeps of an application can be read by who can read the cluster."""
    monkeypatch.setenv(middleware.TOKEN_VARIABLE, TOKEN)
    application = serve.create_application(ServiceConfig(model=models[0]), "0.0.0.0")
    bound = repr(application._bound_deployment.init_args)
    assert middleware.digest(TOKEN) in bound
    assert TOKEN not in bound


def test_replicas_are_as_many_and_as_large_as_asked_for(models):
    def deployed(**settings):
        return serve.create_application(ServiceConfig(model=models[0], **settings), None)._bound_deployment

    fixed, elastic = deployed(min_replicas=2, max_replicas=2), deployed(max_replicas=3, num_gpus=0.25)
    assert fixed.num_replicas == 2
    bounds = elastic._deployment_config.autoscaling_config
    assert (bounds.min_replicas, bounds.max_replicas, bounds.target_ongoing_requests) == (1, 3, 8)
    assert elastic.ray_actor_options["num_gpus"] == 0.25
    assert (elastic.max_ongoing_requests, elastic.max_queued_requests) == (16, 16)


def test_replicas_have_the_engine_that_the_model_was_deployed_with(models, monkeypatch):
    """Not each the one that its node has; and the job that scores slides chooses for itself."""

    def bound(**settings):
        config = ServiceConfig(model=models[0], **settings)
        return serve.create_application(config, None)._bound_deployment.init_args

    monkeypatch.setattr(choice, "find_spec", lambda name: name)
    assert [bound(**given)[-1] for given in ({}, {"num_gpus": 1}, {"engine": "torch"})] == [
        "openvino",
        "torch",
        "torch",
    ]
    assert bound()[0].engine == "auto"
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    assert bound()[-1] == "torch"
    with pytest.raises(ConfigError, match="openvino is missing"):
        bound(engine="openvino")


@pytest.mark.parametrize(
    ("num_gpus", "engine", "expected"), [(0, "torch", 2), (0, "openvino", 1), (0.5, "torch", 8)]
)
def test_a_batch_has_no_more_images_than_help(models, monkeypatch, num_gpus, engine, expected):
    """Each replica computes one of the largest size when it starts."""
    sizes = []

    def predict(images):
        sizes.append(len(images))
        return SimpleNamespace(finite=np.array([True]))

    known = bundle.read_card(models[0])
    fake = SimpleNamespace(card=known, model_id=bundle.identify(models[0]), predict=predict)
    monkeypatch.setattr(predictor, "load", lambda *_, **given: fake)
    config = ServiceConfig(model=models[0], num_gpus=num_gpus)
    replica = serve.Replica.__base__(config, None, fake.model_id, engine=engine)
    assert (replica._gate._size, max(sizes)) == (expected, expected)


@pytest.fixture
def started(models, monkeypatch):
    """Starts a replica in this process, as on a machine of 4 cores; gives what it uses."""
    used = {}

    def load(uri, device, precision, card_sha256, engine):
        used["device"] = device
        return loaded(uri, "cpu", precision, card_sha256=card_sha256)

    loaded = predictor.load
    monkeypatch.setattr(predictor, "load", load)
    monkeypatch.setattr(serve.cluster, "cores", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: used.update(threads=n))

    def start(n_models=1, **settings):
        config = ServiceConfig(model=models[0], max_batch_size=1, **settings)
        replica = serve.Replica.__base__(config, None, bundle.identify(models[0]), None, n_models)
        return used | {"decoders": replica._decoders._max_workers}

    return start


@pytest.mark.parametrize(
    ("settings", "device", "threads"),
    [
        ({}, "cpu", 4),
        ({"num_cpus": 2}, "cpu", 4),
        ({"max_replicas": 4}, "cpu", 1),
        ({"max_replicas": 2, "num_cpus": 2}, "cpu", 2),
        ({"max_replicas": 8, "num_cpus": 0.5, "num_gpus": 0.25}, None, 1),
    ],
)
def test_a_replica_keeps_to_what_it_reserves(settings, device, threads, started):
    assert started(**settings) == {"device": device, "threads": threads, "decoders": threads}


def test_a_replica_answers_with_no_other_model(models):
    """As one that starts after the bundle was replaced."""
    config = ServiceConfig(model=models[0], max_batch_size=1)
    with pytest.raises(BundleError, match="has changed since the start: the model was 0123456789abcdef"):
        serve.Replica.__base__(config, None, "0123456789abcdef")


def test_a_replica_without_numbers_is_not_ready(models, monkeypatch):
    loaded = predictor.load(models[0], "cpu")
    replica, predicted = Unloaded(1), serve.Replica.__base__._predict
    replica._predictor, replica._computer, replica._succeeded = loaded, ThreadPoolExecutor(1), 0.0
    pictures = [np.zeros((64, 96, 3), np.uint8)]
    kept = []
    replica._record = lambda signal, value: kept.append((signal.name, value))
    asyncio.run(predicted(replica, pictures))
    assert replica._succeeded > 0
    assert [name for name, _ in kept] == ["bcd_batch_seconds", "bcd_batch_images"]
    assert kept[1][1] == 1
    broken = replace(loaded, features=lambda batch: torch.full((len(batch), 512, 4, 6), torch.nan))
    replica._predictor = broken
    (prediction,) = asyncio.run(predicted(replica, pictures))
    assert prediction.predicted_class == [None]
    assert replica._succeeded == -serve.READY_FOR_S
    replica.look = lambda content: predicted(replica, pictures)
    replica._canary = b""
    assert not asyncio.run(replica.ready())
    # Nor does one start.
    monkeypatch.setattr(predictor, "load", lambda *_, **__: broken)
    with pytest.raises(BundleError, match="the model's logits are not finite numbers"):
        serve.Replica.__base__(ServiceConfig(model=models[0], max_batch_size=1), None, broken.model_id)


def test_a_replica_that_scores_no_slides_any_more_is_replaced():
    replica, worker = Unloaded(1), threading.Thread(target=lambda: None)
    replica._slides, check = None, serve.Replica.__base__.check_health
    check(replica)
    replica._slides = worker
    worker.start()
    worker.join()
    with pytest.raises(RuntimeError, match="the thread that scores slides has ended"):
        check(replica)


def test_a_port_in_use_and_a_missing_model_are_errors(models, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"cannot listen on --host 127.0.0.1 --port {port}"):
            serve.run(ServeConfig(model=models[0], port=port))
    with pytest.raises(BundleError, match="no model bundle there"):
        serve.run(ServeConfig(model=str(tmp_path)))


def test_what_is_beside_the_model_starts_and_ends_with_it(models, monkeypatch):
    said = []
    monkeypatch.setattr(serve.os, "environ", {})
    monkeypatch.setattr(serve.signal, "signal", lambda *_: None)
    monkeypatch.setattr(serve.threading, "Event", lambda: SimpleNamespace(wait=lambda: said.append("stop")))
    monkeypatch.setattr(serve.cluster, "connect", lambda **_: None)
    monkeypatch.setattr(serve, "_require_capacity", lambda _: None)
    monkeypatch.setattr(ray_serve, "start", lambda **_: None)
    monkeypatch.setattr(ray_serve, "run_many", lambda targets: said.extend(targets))
    monkeypatch.setattr(ray_serve, "delete", said.append)
    beside = ray_serve.RunTarget(None, "other", "/other")
    serve.run(ServeConfig(model=models[0], port=free_port()), [beside])
    assert [(one.name, one.route_prefix) for one in said[:2]] == [("bcd", "/"), ("other", "/other")]
    assert said[2:] == ["stop", "bcd", "other"]


def test_each_model_is_an_application_of_its_own(models):
    """With a queue and replicas of its own, at its own address, without the slides of the default one."""
    settings = {"slides": "slides", "max_queued": 3, "min_replicas": 2, "max_replicas": 2}
    config = ServeConfig(model=models[0], models=(f"b={models[1]}", f"c={models[0]}"), **settings)
    targets = serve.beside_default(config)
    assert [(one.name, one.route_prefix) for one in targets] == [
        ("bcd-model-b", "/v1/models/b"),
        ("bcd-model-c", "/v1/models/c"),
    ]
    bound = targets[0].target._bound_deployment
    assert (bound.num_replicas, bound.max_queued_requests) == (2, 3)
    placed, _, identity, _, n_models, _ = bound.init_args
    assert (placed.name, placed.model, identity) == ("b", models[1], bundle.identify(models[1]))
    assert (placed.models, placed.slides, n_models) == ((), None, 3)
    with pytest.raises(BundleError, match="no model bundle there"):
        serve.beside_default(ServeConfig(model=models[0], models=("b=/nothing/here",)))


def test_models_must_fit_together(monkeypatch):
    monkeypatch.setattr(serve.cluster, "total_resources", lambda: {"CPU": 2.0, "GPU": 0.0})
    two = ServeConfig(model="m", models=("b=n",))
    serve._require_capacity(two)
    with pytest.raises(ResourceError, match="of 1 CPU each for each of 3 models do not fit"):
        serve._require_capacity(two.model_copy(update={"models": ("b=n", "c=n")}))


def test_models_share_the_cores_and_the_limit_of_requests(started):
    assert started(n_models=2)["threads"] == 1
    assert front.limits_of(ServiceConfig(model="m", models=("b=n",))).max_requests == 2 * (2 * 8 + 16)


def test_the_port_of_metrics_is_that_of_a_cluster_of_our_own(models, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match="nodes with ray start --metrics-export-port"):
        serve.run(ServeConfig(model=models[0], metrics_port=8080))


def test_the_queue_and_the_batches_are_measured(make_batch_queue):
    """Two images wait while one is computed, and come as one batch."""
    make_batch_queue()
    kept = []

    async def story():
        replica = Unloaded(4)
        replica._record = lambda signal, value: kept.append((signal.name, value))
        first = asyncio.create_task(replica._in_batch(b"first"))
        await replica.begun.wait()
        waiting = [asyncio.create_task(replica._in_batch(b"waits")) for _ in range(2)]
        await asyncio.sleep(0)
        replica.may_end.set()
        await asyncio.gather(first, *waiting)

    asyncio.run(story())
    lengths = [value for name, value in kept if name == "bcd_queue_images"]
    assert lengths == [1, 0, 1, 2, 0, 0]
    assert [0 <= value < 60 for name, value in kept if name == "bcd_queue_seconds"] == [True] * 3


def test_the_example_for_clusters_is_valid():
    """serve.yaml at the top."""
    checked = ServeDeploySchema(**yaml.safe_load((ROOT / "serve.yaml").read_text()))
    assert checked.applications[0].import_path == "bcd.serving.serve:app"
    assert ServiceConfig(**checked.applications[0].args).num_gpus == 0.25


@pytest.mark.parametrize("name", serve.OTHER_MODES)
def test_modes_of_ray_serve_that_pass_by_our_limits_are_refused(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=f"{name} is set.*unset it"):
        serve.run(ServeConfig(model="m"))
