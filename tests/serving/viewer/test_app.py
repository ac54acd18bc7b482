"""The viewer's interface behind its guard, on a real socket."""

import io
import json
from contextlib import contextmanager
from urllib.parse import quote

import httpx
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from bcd import schema
from bcd.config import log
from bcd.metrics import calibration
from bcd.reports import heatmap, overlay
from bcd.serving import front, middleware
from bcd.serving.viewer import scored
from bcd.serving.viewer.app import create_viewer
from bcd.taxonomy import TUMOR_CLASSES
from tests import viewed
from tests.service import TOKEN, serving
from tests.serving.viewer.test_packed import unpack

NAME = {"name": viewed.SLIDE}
PIXELS = "/v1/view/pixels/10/1_1"
DATA = ("", "/inputs", "/input", "/tiles", "/image", "/heatmap", "/pixels/10/0_0")


@contextmanager
def client_of(made, **headers):
    app = create_viewer(scored.Outputs(made.uri))
    guard = middleware.Guard(app, token_digest=middleware.digest(TOKEN))
    headers = {"Authorization": f"Bearer {TOKEN}"} | headers
    with serving(guard) as url, httpx.Client(base_url=url, headers=headers, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return viewed.make(str(tmp_path_factory.mktemp("viewed")))


@pytest.fixture(scope="module")
def client(made):
    with client_of(made) as opened:
        yield opened


@pytest.fixture(scope="module")
def hidden(tmp_path_factory):
    with client_of(viewed.make(str(tmp_path_factory.mktemp("hidden")), hidden=True)) as opened:
        yield opened


def test_the_viewer_says_what_the_output_is(client):
    about = client.get("/v1/view").json()
    assert (about["threshold"], about["n_slides"], about["n_images"]) == (viewed.THRESHOLD, 2, viewed.FIELDS)
    assert (about["hidden"], about["errors"]) == (None, {"unreadable": 1, "truncated": 1})
    colors = about["map"]["colors"]
    assert (colors[0], colors[128], colors[256]) == ("#0072b2", "#ffffff", "#d55e00")
    assert (about["map"]["strength"], about["map"]["contrast"]) == (heatmap.STRENGTH, heatmap.CONTRAST)
    assert (about["overlay"]["limit"], about["overlay"]["against_colour"]) == (overlay.LIMIT, "#0072b2")


def test_inputs_are_listed(client):
    found = client.get("/v1/view/inputs?kind=fields&sort=probability&descending=true&limit=3").json()
    assert found["total"] == viewed.FIELDS
    probabilities = [row["probability"] for row in found["rows"]]
    assert probabilities == sorted(probabilities, reverse=True)
    assert set(found["rows"][0]) == {
        "name",
        "patient",
        "probability",
        "novelty",
        "error",
        "predicted",
        "warnings",
    }
    assert [row["name"] for row in client.get("/v1/view/inputs").json()["rows"]] == [
        viewed.BROKEN,
        viewed.SLIDE,
    ]


def test_a_slide_has_its_facts_and_tiles(client, made):
    row = client.get("/v1/view/input", params=NAME).json()
    assert (row["kind"], row["width_px"], row["mpp"]) == ("slide", viewed.WIDTH_PX, viewed.MPP)
    assert row["deep_zoom"] == {"tile": 510, "overlap": 1, "last": 10}
    header, columns = unpack(client.get("/v1/view/tiles", params=NAME).content)
    assert header["tiles"] == len(columns["x"]) == len(made.tiles())
    broken = client.get("/v1/view/input", params={"name": viewed.BROKEN}).json()
    assert (broken["error"], broken["error_message"], broken["width_px"]) == ("unreadable", "damaged", None)


def test_a_field_has_its_numbers_and_its_evidence(client, made):
    row, expected = (
        client.get("/v1/view/input", params={"name": "field 1.png"}).json(),
        made.rows["field 1.png"],
    )
    for name in (schema.PROBABILITY_MALIGNANT, schema.NOVELTY, schema.NOVELTY_CUTOFF, schema.PREDICTED_CLASS):
        assert row[name] == expected[name]
    explained = row["explained"]
    assert np.ravel(explained["values"]).tolist() == expected[schema.EVIDENCE]
    assert explained["log_odds"] == calibration.log_odds([expected[schema.LOGIT]], TUMOR_CLASSES)[0]
    assert (explained["bias"], explained["limit"]) == (expected[schema.EVIDENCE_BIAS], overlay.LIMIT)
    # 101 x 64 px in an input of 96 x 64: a bar of a pixel above, and of two below.
    assert explained["covers"] == {"top": 1 / 64, "left": 0, "bottom": 62 / 64, "right": 1}
    assert client.get("/v1/view/input", params={"name": "field 3.png"}).json()["explained"] is None


def test_nothing_states_where_a_file_is(client, made):
    for name in (viewed.SLIDE, viewed.BROKEN, "field 1.png", "field 3.png"):
        for path in DATA:
            answer = client.get(
                f"/v1/view{path}", params={"name": name} if path not in ("", "/inputs") else {}
            )
            assert made.uri.removesuffix("/out").encode() not in answer.content


def test_pixels_of_a_slide_may_be_kept_by_the_callers_browser(client):
    answer = client.get(PIXELS, params=NAME | {"v": "1"})
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.headers.get_list("cache-control") == ["private, max-age=3600"]
    assert answer.headers["vary"] == "Authorization"
    found = simplejpeg.decode_jpeg(answer.content, "RGB").astype(int)
    assert np.abs(found - viewed.slide_pixels()[509:, 509:]).mean() < 3
    # Numbers are in no cache.
    assert client.get("/v1/view/tiles", params=NAME).headers["cache-control"] == "no-store"


def test_pixels_of_a_field(client):
    content = client.get("/v1/view/image", params={"name": "field 2.png"}).content
    assert simplejpeg.decode_jpeg(content, "RGB").shape == (64, 102, 3)
    answer = client.get("/v1/view/image", params={"name": "field 3.png"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (front.STATUS["truncated"], "truncated")


@pytest.mark.parametrize(
    "name",
    [
        *("", "nothing", "../in/field 1.png", "/etc/passwd", "file:///etc/passwd", "s3://bucket/in/a.svs"),
        *("field 1.png/../field 2.png", "%2e%2e/in", "case 7/../case 7/a+b #1.tif", "field 1.png\x00", "'"),
    ],
)
def test_only_inputs_of_the_table_are_opened(client, name, monkeypatch):
    def refuse(*given):
        raise AssertionError("a file was opened")

    monkeypatch.setattr("bcd.slides.slide_cache.open_at", refuse)
    monkeypatch.setattr("bcd.data.read.picture", refuse)
    for path in DATA[2:]:
        answer = client.get(f"/v1/view{path}", params={"name": name})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path


@pytest.mark.parametrize(
    "path", ["11/0_0", "10/4_0", "10/0_99999999999999999999", "10/-1_0", "x/0_0", "10/0"]
)
def test_there_are_no_other_tiles(client, path):
    answer = client.get(f"/v1/view/pixels/{path}", params=NAME)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize(
    "path",
    [
        *("inputs?kind=x", "inputs?limit=0", "inputs?uri=1", "inputs?text=a&text=b", "inputs?least=nan"),
        *("input", "input?name=a&name=b", "tiles", "inputs?offset=100000"),
    ],
)
def test_options_that_do_not_fit_are_rejected(client, path):
    answer = client.get(f"/v1/view/{path}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_request")


def test_data_require_the_token_and_pages_do_not(made):
    with client_of(made, Authorization="Bearer wrong") as client:
        for path in DATA:
            assert client.get(f"/v1/view{path}", params=NAME).status_code == 401
        for path in (
            "/slides",
            f"/slides/{quote(viewed.SLIDE, safe='')}",
            "/page/slides/slide.js",
            "/healthz",
        ):
            assert client.get(path).status_code == 200
        assert client.get("/").headers["location"] == "/slides"
        assert client.post("/v1/view/inputs").status_code == 401


def test_pages_load_nothing_from_elsewhere(client):
    for path in ("/slides", "/slides/a%2Fb"):
        answer = client.get(path)
        assert answer.headers["content-security-policy"] == front.PAGE_POLICY
        assert "Research use only" in answer.text
        assert "//" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "<style" not in answer.text
        assert " style=" not in answer.text
        for source in [part.split('"')[0] for part in answer.text.split('src="')[1:]]:
            assert client.get("/" + source.removeprefix("../")).status_code == 200
    for path in ("/page/slides/openseadragon.min.js", "/page/slides/openseadragon.LICENSE.txt"):
        assert client.get(path).status_code == 200


def test_a_pseudonymised_output_shows_maps_and_says_why_there_are_no_pixels(hidden):
    assert "pseudonymised" in hidden.get("/v1/view").json()["hidden"]
    assert unpack(hidden.get("/v1/view/tiles", params=NAME).content)[0]["tiles"] > 0
    for path, name in ((PIXELS, viewed.SLIDE), ("/v1/view/image", "field 1.png")):
        answer = hidden.get(path, params={"name": name})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_pixels")
        assert "pseudonymised" in answer.json()["error"]["message"]
    drawing = hidden.get("/v1/view/heatmap", params=NAME)
    assert Image.open(io.BytesIO(drawing.content)).size == (90, 70)


def test_the_log_names_no_input(client, capsys):
    log.start("view", "json")
    client.get(PIXELS, params=NAME)
    client.get("/v1/view/input", params=NAME)
    client.get("/v1/view/input", params={"name": "Name of a person"})
    client.get("/v1/view/image", params={"name": "field 3.png"})
    client.get("/slides/Name%20of%20a%20person")
    said = capsys.readouterr().out
    assert "person" not in said
    assert "field" not in said
    assert viewed.SLIDE not in said
    # A line for each request, and one for an image; not for tiles and pages.
    lines = list(map(json.loads, said.splitlines()))
    assert [line.get("status") for line in lines] == [200, 404, None, 422]
    assert {line["path"] for line in lines if "path" in line} == {"/v1/view/"}


def test_an_output_in_a_store(s3):
    with client_of(viewed.make(f"{s3}/viewed")) as client:
        assert client.get("/v1/view/inputs?kind=fields").json()["total"] == viewed.FIELDS
        assert client.get("/v1/view/tiles", params=NAME).status_code == 200
        assert client.get(PIXELS, params=NAME).headers["content-type"] == "image/jpeg"
        answer = client.get("/v1/view/pixels/10/0_0", params={"name": viewed.BROKEN})
        assert "s3://" not in answer.text
