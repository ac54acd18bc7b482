"""The viewer beside a model, without Ray: both applications in one process, behind what finds them as Ray
Serve's proxy does. `test_serve` has them on a cluster.
"""

import os
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import simplejpeg

from bcd import schema, storage
from bcd.config.serving import ServeConfig, ServiceConfig
from bcd.errors import ConfigError, DataError
from bcd.model import predictor
from bcd.serving import api, front, middleware, serve
from bcd.serving.slide_jobs import jobs_of
from bcd.serving.viewer import pixels, scored, service
from tests import pictures, viewed
from tests.model.test_bundle import card, untrained
from tests.service import TOKEN, LocalEngine, routed, serving
from tests.serving.viewer.test_packed import unpack

PIXELS = f"{service.PREFIX}/pixels/10/1_1"
PATHS = ("", "/inputs", "/input", "/tiles", "/image", "/heatmap", "/pixels/10/0_0")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("model"))
    predictor.save(untrained(), card(), uri)
    return LocalEngine(predictor.load(uri, device="cpu"))


@pytest.fixture(autouse=True)
def look_each_time(monkeypatch):
    monkeypatch.setattr(scored, "LOOK_S", 0)


@pytest.fixture
def config(tmp_path):
    return ServiceConfig(model="m", slides=str(tmp_path / "slides"))


@contextmanager
def client_of(config, engine):
    """A caller of a service, whose applications are those of its replicas."""
    digest, limits = middleware.digest(TOKEN), front.limits_of(config)
    model = middleware.guarded(api.create_app(engine, limits, 4, jobs_of(config)), limits, digest)
    viewer = service.ViewerReplica.__base__(config, digest).__serve_build_asgi_app__()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with (
        serving(routed({"/": model, service.PREFIX: viewer})) as url,
        httpx.Client(base_url=url, headers=headers, timeout=60) as opened,
    ):
        yield opened


def send(client):
    """A slide, as its sender does; its id."""
    return client.post("/v1/slides?name=a.tif", content=b"x").json()["id"]


def finish(config, job_id):
    """What the scoring job does."""
    jobs = jobs_of(config)
    return viewed.make(jobs.folder(job_id, "made"), output=jobs.folder(job_id, "output"))


def named(job_id):
    return {"name": viewed.SLIDE, "job": job_id}


def refusal(answer):
    return answer.status_code, answer.json()["error"]["code"]


def test_a_slide_that_was_sent_is_seen_from_when_it_is_done_until_it_is_deleted(config, engine):
    with client_of(config, engine) as client:
        job_id = send(client)
        assert refusal(client.get("/v1/view", params={"job": job_id})) == (404, "no_result")
        made = finish(config, job_id)
        assert client.get("/v1/view", params={"job": job_id}).json()["n_slides"] == 1
        listed = client.get("/v1/view/inputs", params={"job": job_id}).json()
        assert [row["name"] for row in listed["rows"]] == [viewed.SLIDE]
        found = client.get("/v1/view/tiles", params=named(job_id))
        expected = [row[schema.PROBABILITY_MALIGNANT] for row in made.tiles()]
        np.testing.assert_array_equal(unpack(found.content)[1]["probability"], np.float32(expected))
        tile = client.get(PIXELS, params=named(job_id))
        assert tile.headers["cache-control"] == "private, max-age=3600"
        seen = simplejpeg.decode_jpeg(tile.content, "RGB").astype(int)
        assert np.abs(seen - made.pixels[509:, 509:]).mean() < 3
        page = client.get(f"/slides/{quote(viewed.SLIDE, safe='')}?job={job_id}")
        assert page.headers["content-security-policy"] == front.PAGE_POLICY
        assert client.delete(f"/v1/slides/{job_id}").status_code == 204
        for path in ("", "/tiles", "/pixels/10/1_1"):
            answer = client.get(f"/v1/view{path}", params=named(job_id))
            assert refusal(answer) == (404, "no_slide"), path


def test_a_slide_that_was_just_deleted_is_unknown_and_not_damaged(config, engine, monkeypatch):
    monkeypatch.setattr(scored, "LOOK_S", 60)
    with client_of(config, engine) as client:
        job_id = send(client)
        finish(config, job_id)
        assert client.get("/v1/view", params={"job": job_id}).status_code == 200
        client.delete(f"/v1/slides/{job_id}")
        for path in ("/heatmap", "/pixels/10/1_1", ""):
            assert refusal(client.get(f"/v1/view{path}", params=named(job_id))) == (404, "no_slide"), path


def test_slides_of_one_name_are_not_confused(config, engine):
    """Nor where the versions of their outputs are equal."""
    with client_of(config, engine) as client:
        made = {job_id: finish(config, job_id) for job_id in (send(client), send(client))}
        other = 255 - viewed.slide_pixels()
        jobs = jobs_of(config)
        storage.write_bytes(jobs.folder([*made][1], "made", "in", viewed.SLIDE), viewed.pyramid(other))
        for job_id, expected in zip(made, (viewed.slide_pixels(), other), strict=True):
            os.utime(jobs.folder(job_id, "output", "summary.json"), (1, 1))
            tile = client.get(PIXELS, params=named(job_id)).content
            seen = simplejpeg.decode_jpeg(tile, "RGB").astype(int)
            assert np.abs(seen - expected[509:, 509:]).mean() < 3


def test_without_an_id_the_scored_archive_is_shown(config, engine, tmp_path):
    made = viewed.make(str(tmp_path / "archive"))
    with client_of(config.model_copy(update={"scores": made.uri}), engine) as client:
        assert client.get("/v1/view").json()["n_images"] == viewed.FIELDS
        assert client.get(PIXELS, params={"name": viewed.SLIDE}).headers["content-type"] == "image/jpeg"
    with client_of(config, engine) as client:
        assert refusal(client.get("/v1/view")) == (404, "no_scores")


def test_nothing_is_found_by_another_id_or_without_the_token(config, engine):
    ids = (uuid.uuid4().hex, "", "..", "../slides", "runner", "s3://bucket/a", "A" * 32)
    with client_of(config, engine) as client:
        finish(config, send(client))
        for path in PATHS:
            for job_id in ids:
                options = {"job": job_id} | ({"name": viewed.SLIDE} if path != "/inputs" else {})
                answer = client.get(f"/v1/view{path}", params=options)
                assert refusal(answer) == (404, "no_slide"), (path, job_id)
            answer = client.get(f"/v1/view{path}", headers={"Authorization": "Bearer wrong"})
            assert refusal(answer) == (401, "unauthorized"), path


def test_slow_tiles_hold_up_no_prediction(config, engine, monkeypatch):
    """Not in one process and on one event loop either, which they share here and not on a cluster."""
    go, reading = threading.Event(), threading.Semaphore(0)
    read = pixels.deepzoom.read_tile

    def slow(*given):
        reading.release()
        assert go.wait(60)
        return read(*given)

    monkeypatch.setattr(pixels.deepzoom, "read_tile", slow)
    field = pictures.encode(pictures.gradient(92, 140))
    with client_of(config, engine) as client, ThreadPoolExecutor(12) as pool:
        job_id = send(client)
        finish(config, job_id)
        places = ["10/1_0", "10/0_1", "10/1_1", *(f"{level}/0_0" for level in range(2, 11))]
        paths = [f"/v1/view/pixels/{place}" for place in places]
        tiles = [pool.submit(client.get, path, params=named(job_id)) for path in paths]
        try:
            assert reading.acquire(timeout=60)
            assert client.post("/v1/predict", content=field).status_code == 200
            # Nor numbers.
            assert client.get("/v1/view/inputs", params={"job": job_id}).json()["total"] == 1
            assert not any(tile.done() for tile in tiles)
        finally:
            go.set()
        assert {tile.result().status_code for tile in tiles} == {200}


def test_the_application_is_one_of_its_own(config, monkeypatch, tmp_path):
    """With a queue of its own, no CPU of the models', and the token as a digest."""
    monkeypatch.setenv(middleware.TOKEN_VARIABLE, TOKEN)
    monkeypatch.chdir(tmp_path)
    bound = service.viewer(config.model_copy(update={"slides": "slides"}))._bound_deployment
    assert (bound.num_replicas, bound.ray_actor_options["num_cpus"]) == (1, 0)
    assert (bound.max_ongoing_requests, bound.max_queued_requests) == (512, 256)
    settings, digest = bound.init_args
    assert (settings.slides, digest) == (str(tmp_path / "slides"), middleware.digest(TOKEN))


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"slides": None}, ConfigError, "neither is given"),
        ({"scores": "/nothing/here"}, DataError, "expected the --output of a scoring job"),
    ],
)
def test_a_viewer_without_anything_to_show_is_an_error(config, settings, error, said):
    with pytest.raises(error, match=said):
        service.viewer(config.model_copy(update=settings))


@pytest.mark.parametrize(("settings", "names"), [({}, []), ({"slides": "slides"}, ["bcd-viewer"])])
def test_the_job_serves_it_where_there_are_slides(monkeypatch, settings, names):
    given = []
    monkeypatch.setattr(serve, "run", lambda config, beside: given.extend(beside))
    service.run(ServeConfig(model="m", **settings))
    assert [(one.name, one.route_prefix) for one in given] == [(name, "/v1/view") for name in names]


@pytest.mark.process
def test_its_process_does_without_torch():
    program = "import sys; import bcd.serving.viewer.service; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
