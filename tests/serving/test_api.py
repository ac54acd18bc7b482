"""The interface around a bundle, without Ray: documents, errors, forms, and a run of schemathesis."""

import base64
import hashlib
import io
import json
import subprocess
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from bcd.config import log
from bcd.imaging import image
from bcd.model import novelty, predictor, weights
from bcd.model.card import Card
from bcd.reports import overlay
from bcd.serving import front, receive
from bcd.text import RESEARCH_ONLY
from tests import archives, pictures
from tests.cluster import BIN
from tests.model.test_bundle import card, untrained
from tests.service import TOKEN, LocalEngine, guarded, serving

# Those that say: no fault of ours, and every answer as the document promises.
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_headers_conformance,response_schema_conformance,ignored_auth"
)
FIELD = pictures.encode(pictures.gradient(92, 200))


def statistics(**changes):
    """Feature statistics around the images of the tests."""
    facts = {
        "mean": (0.0,) * 512,
        "spread": (1.0,) * 512,
        "cutoff": 1e9,
        "n_training": 3,
        "n_validation": 2,
    }
    return novelty.FeatureStatistics(**facts | changes)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("model"))
    predictor.save(untrained(), card(feature_statistics=statistics()), uri)
    return predictor.load(uri, device="cpu")


@pytest.fixture(scope="module")
def engine(loaded):
    return LocalEngine(loaded)


@pytest.fixture(scope="module")
def client(engine):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with serving(guarded(engine)) as url, httpx.Client(base_url=url, headers=headers, timeout=60) as opened:
        yield opened


def test_the_answer_is_what_the_bundle_says(client, loaded):
    expected = loaded.predict_files([FIELD])
    answer = client.post("/v1/predict", content=FIELD).json()
    assert answer["probability_malignant"] == pytest.approx(
        float(expected.probability_malignant[0]), abs=1e-6
    )
    assert answer["log_odds"] == pytest.approx(float(expected.logit[0, 1] - expected.logit[0, 0]), abs=1e-5)
    assert answer["predicted_class"] == expected.predicted_class[0]
    assert answer["probabilities"] == pytest.approx(
        dict(zip(loaded.card.classes, expected.probability[0].tolist(), strict=True)), abs=1e-6
    )
    evidence = answer["evidence"]
    np.testing.assert_allclose(evidence["values"], expected.evidence[0], atol=1e-5)
    assert (evidence["height"], evidence["width"]) == expected.evidence.shape[1:]
    assert np.mean(evidence["values"]) + evidence["bias"] == pytest.approx(answer["log_odds"], abs=1e-4)
    assert evidence["explains"] == "malignant against benign"
    assert evidence["limit"] == overlay.LIMIT == client.get("/v1/model").json()["overlay"]["limit"]
    assert (answer["width_px"], answer["height_px"]) == (200, 92)
    assert answer["novelty"] == pytest.approx(float(expected.novelty[0]), rel=1e-5)
    assert (answer["warnings"], answer["overlay_png"], answer["preview_png"]) == ([], None, None)
    assert (answer["model_id"], answer["notice"]) == (loaded.model_id, RESEARCH_ONLY)
    assert answer["sha256"] == hashlib.sha256(FIELD).hexdigest()


def test_the_map_covers_a_stated_part_of_the_image(client, loaded):
    """A field of 200 x 92 in an input of 96 x 64: bars of 10 px above and below."""
    answer = client.post("/v1/predict", content=FIELD).json()
    assert answer["evidence"]["covers"] == {"top": 10 / 64, "left": 0.0, "bottom": 54 / 64, "right": 1.0}


def test_a_form_gives_the_same_answer(client):
    raw = client.post("/v1/predict", content=FIELD).json()
    assert client.post("/v1/predict", files={"file": ("a.png", FIELD)}).json() == raw


def test_overlay_and_preview(client, loaded):
    expected = loaded.predict_files([FIELD])
    drawn = overlay.overlay(pictures.gradient(92, 200), expected.evidence[0], overlay.LIMIT, 64, 96)
    answer = client.post("/v1/predict?overlay=true&preview=true", content=FIELD).json()
    for found in (
        base64.b64decode(answer["overlay_png"]),
        client.post("/v1/predict", content=FIELD, headers={"Accept": "image/png"}).content,
    ):
        np.testing.assert_allclose(np.asarray(Image.open(io.BytesIO(found))), drawn, atol=1)
    preview = Image.open(io.BytesIO(base64.b64decode(answer["preview_png"])))
    np.testing.assert_array_equal(np.asarray(preview), pictures.gradient(92, 200))


def test_an_image_unlike_the_training_data_has_a_warning(loaded):
    near = card(feature_statistics=statistics(cutoff=1e-9))
    strange = predictor.from_state(weights.build(2, seed=1, architecture="resnet18").state_dict(), near)
    with serving(guarded(LocalEngine(strange), token=None)) as url:
        answer = httpx.post(f"{url}/v1/predict", content=FIELD, timeout=60).json()
    assert [warning["code"] for warning in answer["warnings"]] == ["unlike_training_data"]
    assert answer["novelty"] > answer["novelty_cutoff"] == 1e-9


def test_without_statistics_there_is_no_novelty():
    bare = predictor.from_state(weights.build(2, seed=1, architecture="resnet18").state_dict(), card())
    with serving(guarded(LocalEngine(bare), token=None)) as url:
        answer = httpx.post(f"{url}/v1/predict", content=FIELD, timeout=60).json()
    assert (answer["novelty"], answer["novelty_cutoff"], answer["warnings"]) == (None, None, [])


@pytest.mark.parametrize("name", sorted(pictures.broken()))
def test_broken_images_have_the_archive_jobs_codes(client, name):
    content, code = pictures.broken()[name]
    answer = client.post("/v1/predict", content=content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (front.STATUS[code], code)
    assert answer.status_code == (415 if code == "unsupported_format" else 422)


def test_where_the_decoder_was_killed_the_caller_may_try_again(client, monkeypatch):
    def killed(content):
        raise image.ImageError(image.UNAVAILABLE, "the decoder was killed")

    monkeypatch.setattr(image, "decode", killed)
    answer = client.post("/v1/predict", content=FIELD)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "unavailable"


@pytest.mark.parametrize("name", sorted(archives.odd()))
def test_odd_images_are_answered(client, loaded, name):
    answer = client.post("/v1/predict", content=archives.odd()[name]).json()
    expected = loaded.predict_files([archives.odd()[name]])
    assert answer["probability_malignant"] == pytest.approx(
        float(expected.probability_malignant[0]), abs=1e-6
    )


def test_a_batch_has_an_answer_or_an_error_for_each(client):
    alone = client.post("/v1/predict", content=FIELD).json()
    files = [
        ("files", ("a.png", FIELD)),
        ("files", ("b.png", b"text")),
        ("files", ("c.png", FIELD[: len(FIELD) // 2])),
    ]
    results = client.post("/v1/predict/batch", files=files).json()["results"]
    assert [item["name"] for item in results] == ["a.png", "b.png", "c.png"]
    assert results[0]["answer"] == alone
    assert [item["error"] and item["error"]["code"] for item in results] == [
        None,
        "unsupported_format",
        "truncated",
    ]


def test_an_image_that_fails_is_found_by_its_hash_and_the_id_of_its_request(client, capsys):
    """Of a form, too; its name is in no line."""
    broken = FIELD[: len(FIELD) // 2]
    digest = hashlib.sha256(broken).hexdigest()
    log.start("serve", "json")
    for path, field in (("/v1/predict", "file"), ("/v1/predict/batch", "files")):
        answer = client.post(path, files={field: ("Name of a person.png", broken)})
        image_line, request_line = map(json.loads, capsys.readouterr().out.splitlines())
        assert (image_line["image_id"], image_line["code"]) == (digest, "truncated")
        ids = {line["request_id"] for line in (image_line, request_line)}
        assert ids == {answer.headers["x-request-id"]}
        assert (request_line["path"], request_line["status"]) == (path, answer.status_code)
        assert "person" not in f"{image_line} {request_line}"


@pytest.mark.parametrize(
    ("path", "request_", "expected"),
    [
        ("/v1/predict/batch", {"files": [("files", ("a", FIELD))] * 5}, (400, "invalid_form")),
        ("/v1/predict/batch", {"files": {"other": ("a", FIELD)}}, (422, "no_picture")),
        ("/v1/predict/batch", {"content": FIELD}, (415, "unsupported_format")),
        ("/v1/predict", {"files": {"other": ("a", FIELD)}}, (422, "no_picture")),
        ("/v1/predict", {"data": {"file": "text"}}, (415, "unsupported_format")),
        ("/v1/predict?overlay=perhaps", {"content": FIELD}, (422, "invalid_request")),
        ("/v1/nothing", {"content": FIELD}, (404, "not_found")),
        ("/v1/predict/", {"content": FIELD}, (404, "not_found")),
        ("/v1/model", {"content": FIELD}, (405, "method_not_allowed")),
    ],
)
def test_errors_name_what_is_wrong_with_a_request(client, path, request_, expected):
    answer = client.post(path, **request_)
    assert (answer.status_code, answer.json()["error"]["code"]) == expected
    assert answer.json()["error"]["message"]


def test_a_broken_form_is_refused(client):
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    for body in (b"no form", b"--x\r\nContent-Disposition: form-data\r\n\r\nx\r\n--x--\r\n"):
        answer = client.post("/v1/predict", content=body, headers=headers)
        assert answer.status_code in (400, 422)
        assert answer.json()["error"]["code"] in ("invalid_form", "no_picture")
    answer = client.post("/v1/predict", content=b"", headers={"Content-Type": "multipart/form-data"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_form")


def test_the_model_says_what_it_is(client, loaded):
    about = client.get("/v1/model").json()
    assert Card.model_validate(about["card"]) == loaded.card.model_copy(update={"feature_statistics": None})
    assert about["limits"] == {
        "max_body_bytes": receive.Limits().max_body_bytes,
        "max_images": 4,
        "max_pixels": image.MAX_PIXELS,
    }
    assert about["overlay"]["limit"] == overlay.LIMIT
    assert (about["overlay"]["against_colour"], about["overlay"]["towards_colour"]) == ("#0072b2", "#d55e00")


def test_health(client, engine):
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/readyz").json() == {"status": "ready"}
    engine.works = False
    answer = client.get("/readyz")
    engine.works = True
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")


def test_no_numbers_no_answer(loaded):
    """Logits that are not finite: an error for one image, for its overlay, and in a batch."""

    def features(batch):
        return torch.full((len(batch), 512, 2, 3), torch.nan)

    broken = LocalEngine(replace(loaded, features=features))
    with serving(guarded(broken, token=None)) as url:
        alone = httpx.post(f"{url}/v1/predict", content=FIELD, timeout=60)
        drawn = httpx.post(f"{url}/v1/predict", content=FIELD, headers={"Accept": "image/png"}, timeout=60)
        batch = httpx.post(f"{url}/v1/predict/batch", files={"files": ("a.png", FIELD)}, timeout=60)
    for answer in (alone, drawn):
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "not_finite")
    item = batch.json()["results"][0]
    assert (item["answer"], item["error"]["code"]) == (None, "not_finite")


def test_page_and_documentation_load_nothing_from_elsewhere(client):
    page = client.get("/", headers={"Authorization": ""})
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "Research use only" in page.text
    assert client.get("/redoc").status_code == 404  # whose script asks a CDN
    documentation = client.get("/docs", headers={"Authorization": ""})
    policy = documentation.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self' 'sha256-" in policy
    text = documentation.text
    sources = [part.split('"')[0] for part in text.split('src="')[1:] + text.split('href="')[1:]]
    assert len(sources) == 3
    assert all(source.startswith("/") for source in sources), sources
    assert all(client.get(source).status_code == 200 for source in sources)


@pytest.mark.process
def test_requests_that_a_machine_thinks_up(client, tmp_path):
    """Schemathesis, from the OpenAPI document: no 5xx, and every answer as documented."""
    command = [
        BIN / "schemathesis",
        "run",
        f"{client.base_url}/openapi.json",
        "--seed=1",
        "--max-examples=30",
    ]
    command += [
        "--header",
        f"Authorization: Bearer {TOKEN}",
        "--generation-database=none",
        f"--checks={CHECKS}",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5_000:] + done.stderr[-2_000:]
    assert "No issues found" in done.stdout, done.stdout[-2_000:]
