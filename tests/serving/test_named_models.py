"""Several models in one service, without Ray: their applications behind what finds them as Ray Serve's proxy
does. `test_serve` has them on a cluster.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from bcd.model import predictor
from bcd.serving import api
from bcd.serving.receive import Limits
from tests import pictures
from tests.model.test_bundle import card, untrained
from tests.service import TOKEN, LocalEngine, guarded, routed, serving

IMPATIENT = Limits(answer_timeout_s=0.5)
FIELD = pictures.encode(pictures.gradient(92, 200))


class Hanging(LocalEngine):
    """A replica that never answers."""

    async def look(self, content):
        await asyncio.sleep(3600)


@pytest.fixture(scope="module")
def engines():
    """Of two models."""
    return [
        LocalEngine(predictor.from_state(untrained(seed=seed, std=5e-3).state_dict(), card(seed=seed)))
        for seed in (1, 2)
    ]


@pytest.fixture(scope="module")
def client(engines):
    first, second = engines
    apps = {
        "/": guarded(first, named=api.Named("default", ("b", "c"))),
        "/v1/models/b": guarded(second, named=api.Named("b")),
        "/v1/models/c": guarded(Hanging(second._predictor), IMPATIENT, named=api.Named("c")),
    }
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with serving(routed(apps)) as url, httpx.Client(base_url=url, headers=headers, timeout=60) as opened:
        yield opened


def refusal(answer):
    return answer.status_code, answer.json()["error"]["code"], answer.headers["x-error-code"]


def test_each_model_answers_at_its_name(client, engines):
    expected = [
        float(engine._predictor.predict_files([FIELD]).probability_malignant[0]) for engine in engines
    ]
    assert abs(expected[0] - expected[1]) > 1e-3
    for path, n in (("predict", 0), ("models/default/predict", 0), ("models/b/predict", 1)):
        answer = client.post(f"/v1/{path}", content=FIELD)
        assert answer.json()["probability_malignant"] == pytest.approx(expected[n], abs=1e-6)
        assert answer.json()["model_id"] == engines[n].model_id
        batch = client.post(f"/v1/{path}/batch", files=[("files", ("a.png", FIELD))]).json()["results"]
        assert batch == [{"name": "a.png", "answer": answer.json(), "error": None}]


def test_options_and_images_are_those_of_the_default_route(client):
    answer = client.post("/v1/models/b/predict", content=FIELD, headers={"Accept": "image/png"})
    assert answer.headers["content-type"] == "image/png"
    assert client.post("/v1/models/b/predict?overlay=true", content=FIELD).json()["overlay_png"]
    assert refusal(client.post("/v1/models/b/predict?x=1", content=FIELD))[:2] == (422, "unknown_option")


def test_the_models_are_listed(client, engines):
    listed = client.get("/v1/models").json()["models"]
    assert [(each["name"], each["default"]) for each in listed] == [
        ("default", True),
        ("b", False),
        ("c", False),
    ]
    assert client.post(listed[1]["predict"], content=FIELD).json()["model_id"] == engines[1].model_id
    for name, engine in zip(("default", "b"), engines, strict=True):
        about = client.get(f"/v1/models/{name}").json()
        assert (about["name"], about["model_id"]) == (name, engine.model_id)
    assert client.get("/v1/model").json() == client.get("/v1/models/default").json()


def test_an_unknown_model_is_an_error_with_a_code(client):
    for answer in (
        client.post("/v1/models/d/predict", content=FIELD),
        client.post("/v1/models/d/predict/batch", files={"files": ("a.png", FIELD)}),
        client.get("/v1/models/bb"),
    ):
        assert refusal(answer) == (404, "no_model", "no_model")
        assert answer.headers["cache-control"] == "no-store"
    assert refusal(client.get("/v1/models/b/healthz")) == (404, "not_found", "not_found")


def test_names_of_models_need_the_token_too(client):
    for path in ("/v1/models", "/v1/models/b", "/v1/models/d"):
        answer = client.get(path, headers={"Authorization": "Bearer wrong"})
        assert refusal(answer) == (401, "unauthorized", "unauthorized")


def test_one_that_hangs_leaves_the_others_alone(client):
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(client.post, "/v1/models/c/predict", content=FIELD)
        for path in ("/v1/models/b/predict", "/v1/predict"):
            assert client.post(path, content=FIELD).status_code == 200
        assert refusal(hanging.result()) == (504, "timeout", "timeout")
