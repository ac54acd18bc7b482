"""The OpenAPI document against the code and a running app, and a client that is generated from it."""

import importlib
import io
import json
import math
import re
from pathlib import Path

import httpx
import numpy as np
import openapi_spec_validator
import pytest

from bcd.model import predictor
from bcd.serving import api, documents, front, receive
from bcd.serving.openapi import explained
from bcd.serving.slide_jobs import SlideJobs
from tests import pictures
from tests.model.test_bundle import card, untrained
from tests.service import TOKEN, LocalEngine, guarded, serving

ROOT = Path(__file__).parent.parent.parent.parent
FIELD = pictures.encode(pictures.gradient(92, 200))


@pytest.fixture(scope="module")
def engine():
    return LocalEngine(predictor.from_state(untrained().state_dict(), card()))


@pytest.fixture(scope="module")
def document(engine, tmp_path_factory):
    """Of a service with slides."""
    slides = SlideJobs(str(tmp_path_factory.mktemp("slides")), None, 4)
    return api.create_app(engine, receive.Limits(), 4, slides).openapi()


@pytest.fixture(scope="module")
def url(engine):
    with serving(guarded(engine)) as address:
        yield address


@pytest.fixture
def client(url):
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as opened:
        yield opened


def operations(document):
    """Everything that can be asked for: method and path, and what the document says about it."""
    paths = document["paths"].items()
    return {f"{method} {path}": about for path, methods in paths for method, about in methods.items()}


def test_the_document_is_valid_openapi(document):
    openapi_spec_validator.validate(document)
    assert document["openapi"].startswith("3.1")


def test_every_route_has_an_id_a_summary_a_text_a_group_and_examples(document):
    found = operations(document)
    ids = [about["operationId"] for about in found.values()]
    assert len(set(ids)) == len(ids) == 13
    assert all(re.fullmatch("[a-z_]+", name) for name in ids)
    groups = {tag["name"] for tag in document["tags"]}
    for name, about in found.items():
        assert about["summary"], name
        assert about["description"], name
        assert set(about["tags"]) <= groups, name
        assert all(each["description"] for each in about.get("parameters", []) if each["in"] == "path"), name
        for status, answer in about["responses"].items():
            assert answer["description"], (name, status)
            shown = answer.get("content", {}).get("application/json", {})
            files = (status == "200" and "heatmap" in about["description"]) or name.endswith("{name}")
            assert status == "204" or files or "example" in shown or shown["examples"], (name, status)


def test_examples_are_documents_that_the_service_could_send(document):
    """As the document has them, which is without nulls."""
    models = {
        "post /v1/predict": documents.Answer,
        "post /v1/predict/batch": documents.BatchAnswer,
        "post /v1/models/{name}/predict": documents.Answer,
        "post /v1/models/{name}/predict/batch": documents.BatchAnswer,
        "post /v1/slides": documents.SlideDocument,
        "get /v1/slides/{job_id}": documents.SlideDocument,
        "get /v1/model": documents.ModelDocument,
        "get /v1/models/{name}": documents.ModelDocument,
        "get /v1/models": documents.ModelList,
        "get /healthz": documents.Health,
        "get /readyz": documents.Health,
    }
    found = {}
    for name, about in operations(document).items():
        for answer in about["responses"].values():
            shown = answer.get("content", {}).get("application/json", {})
            if "example" in shown:
                found[name] = models[name].model_validate(shown["example"])
    assert found.keys() == models.keys()
    answer = found["post /v1/predict"]
    assert np.mean(answer.evidence.values) + answer.evidence.bias == pytest.approx(answer.log_odds)
    assert answer.probability_malignant == pytest.approx(1 / (1 + math.exp(-answer.log_odds)), abs=1e-3)
    assert [item.error and item.error.code for item in found["post /v1/predict/batch"].results] == [
        None,
        "truncated",
    ]


def raised():
    """Status and code of every error that the code of the service raises."""
    found = {(status, code) for code, status in front.STATUS.items()}
    for path in (ROOT / "bcd/serving").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        found |= {(int(s), c) for s, c in re.findall(r'RefusedError\(\s*(\d+),\s*"(\w+)"', text)}
    # Of images that the decoder gives; of the framework, by its status.
    images = {(422, code) for code in ("too_slow", "unreadable", "no_filename")}
    return found | images | {(404, "not_found"), (500, "internal"), (422, "invalid_request")}


def test_the_errors_are_those_that_the_code_raises():
    named = {(status, code) for code, (status, _) in explained.ERRORS.items()}
    assert named - raised() == set()
    # Of the wrong method, which OpenAPI does not describe.
    assert raised() - named == {(405, "method_not_allowed")}
    groups = explained.ANY, explained.BODY, explained.FORM, explained.IMAGE, explained.ANY_MODEL
    used = {code for codes in groups for code in codes}
    used |= {*explained.SENT_SLIDE, *explained.SLIDE_FILE, "not_ready"}
    assert used == explained.ERRORS.keys()


@pytest.mark.parametrize(
    ("path", "request_", "code"),
    [
        ("/v1/predict", {"content": b""}, "empty"),
        ("/v1/predict", {"content": FIELD[:100]}, "truncated"),
        ("/v1/predict", {"content": b'{"image": "..."}'}, "unsupported_format"),
        ("/v1/predict", {"files": {"other": ("a", FIELD)}}, "no_picture"),
        ("/v1/predict", {"files": {"file": ("a", FIELD), "note": ("b", b"x")}}, "unknown_field"),
        ("/v1/predict?overlai=true", {"content": FIELD}, "unknown_option"),
        ("/v1/predict?overlay=perhaps", {"content": FIELD}, "invalid_request"),
        ("/v1/predict", {"content": FIELD, "headers": {"Authorization": "Bearer x"}}, "unauthorized"),
        ("/v1/predict/batch", {"files": 5 * [("files", ("a", FIELD))]}, "invalid_form"),
        ("/v1/models/b/predict", {"content": FIELD}, "no_model"),
    ],
)
def test_errors_are_answered_as_the_document_shows(client, document, path, request_, code):
    answer = client.post(path, **request_)
    known = path.partition("?")[0].replace("/b/", "/{name}/")
    shown = document["paths"][known]["post"]["responses"][str(answer.status_code)]
    example = shown["content"]["application/json"]["examples"][code]["value"]["error"]
    found = answer.json()["error"]
    assert found.keys() == example.keys()
    assert found["code"] == example["code"] == answer.headers["x-error-code"] == code
    assert f"`{code}`" in shown["description"]


def test_answers_have_the_fields_that_the_document_shows(client):
    answer = client.post("/v1/predict", content=FIELD).json()
    assert answer.keys() == explained.ANSWER.keys() | {"overlay_png", "preview_png"}
    assert answer["evidence"].keys() == explained.ANSWER["evidence"].keys()
    assert client.get("/v1/model").json().keys() == explained.MODEL.keys() | {"overlay"}
    assert client.get("/v1/models").json() == {"models": explained.LISTED["models"][:1]}


@pytest.fixture
def generated(document, tmp_path, monkeypatch):
    """The folder of a client of attrs and httpx, which openapi-python-client writes."""
    cli = pytest.importorskip("openapi_python_client.cli")
    (tmp_path / "openapi.json").write_text(json.dumps(document))
    (tmp_path / "settings.yaml").write_text("post_hooks: []\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    command = ["generate", "--path=openapi.json", "--meta=none", "--output-path=bcd_client"]
    with pytest.raises(SystemExit) as ended:
        cli.app([*command, "--config=settings.yaml"])
    assert not ended.value.code
    return "bcd_client"


# As written, before a formatter: `2and`.
@pytest.mark.filterwarnings("ignore:invalid decimal literal:SyntaxWarning")
def test_a_client_that_is_generated_from_the_document_works(generated, url, client):
    def module(name):
        return importlib.import_module(f"{generated}.{name}")

    def sent():
        return module("types").File(payload=io.BytesIO(FIELD), file_name="a.png", mime_type="image/png")

    caller = module("client").AuthenticatedClient(base_url=url, token=TOKEN)
    expected = client.post("/v1/predict?overlay=true", content=FIELD).json()
    answer = module("api.predictions.predict").sync(client=caller, body=sent(), overlay=True)
    assert answer.to_dict() == expected
    form = module("models.predict_batch_body").PredictBatchBody(files=[sent(), sent()])
    batch = module("api.predictions.predict_batch").sync(client=caller, body=form)
    assert [(item.name, item.answer.log_odds) for item in batch.results] == 2 * [
        ("a.png", expected["log_odds"])
    ]
    listed = module("api.models.list_models").sync(client=caller)
    assert [each.predict for each in listed.models] == ["/v1/models/default/predict"]
    about = module("api.models.get_named_model")
    assert about.sync(client=caller, name="default").card.classes == ["benign", "malignant"]
    refused = about.sync_detailed(client=caller, name="b")
    assert (refused.status_code, refused.parsed.error.code) == (404, "no_model")
