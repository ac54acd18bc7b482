"""Requests with every kind of mistake; the model is a fake."""

import base64
import gzip
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image

from bcd.imaging import image
from bcd.model.predictor import Prediction
from bcd.serving import api, receive, upload
from tests import pictures
from tests.model.test_bundle import card
from tests.service import serving

FIELD = pictures.encode(pictures.gradient(46, 70))
SLIDE = pictures.tiled_tiff(pictures.gradient(100, 130), 0.5)
BASE64 = base64.b64encode(FIELD)


class Engine:
    """Decodes, and predicts the same for every image."""

    card, model_id = card(), "m"

    async def look(self, content):
        half = np.full((1, 2), 0.5, np.float32)
        return image.decode(content), Prediction(
            *(0 * half, half, half[0, :1], ["malignant"], np.zeros((1, 2, 3)), np.zeros(1)),
            *(np.full(1, np.nan), np.zeros((1, 4), np.float32), np.full(1, np.nan)),
        )

    async def ready(self):
        return True


@pytest.fixture(scope="module")
def client():
    with (
        serving(api.create_app(Engine(), receive.Limits(), max_images=4)) as url,
        httpx.Client(base_url=url) as opened,
    ):
        yield opened


def refusal(answer):
    return answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["message"]


def form(*parts, boundary="x", end=True):
    """A form byte by byte: (headers of the disposition, content) of each part."""
    body = b""
    for disposition, content in parts:
        body += b"--x\r\nContent-Disposition: form-data; " + disposition + b"\r\n\r\n" + content + b"\r\n"
    return {
        "content": body + b"--x--\r\n" * end,
        "headers": {"Content-Type": f"multipart/form-data; boundary={boundary}"},
    }


@pytest.mark.parametrize(
    "kind", ["IMAGE/PNG", "image/png; x=1", "text/plain", "application/x-www-form-urlencoded", ""]
)
def test_the_content_and_not_its_type_says_what_a_body_is(client, kind):
    headers = {"Content-Type": kind} if kind else {}
    answer = client.post("/v1/predict", content=FIELD, headers=headers)
    assert (answer.status_code, answer.json()["width_px"]) == (200, 70)


@pytest.mark.parametrize(
    "kind",
    [
        "Multipart/Form-Data; Boundary=x",
        'MULTIPART/FORM-DATA;boundary="x"',
        "multipart/form-data ; BOUNDARY=x",
    ],
)
def test_content_types_are_case_insensitive(client, kind):
    for path, name in (("/v1/predict", b"file"), ("/v1/predict/batch", b"files")):
        body = form((b'name="%s"; filename="a.png"' % name, FIELD))["content"]
        answer = client.post(path, content=body, headers={"Content-Type": kind})
        assert answer.status_code == 200, answer.text
    picture = client.post("/v1/predict", content=FIELD, headers={"Accept": "Image/PNG"})
    assert picture.headers["content-type"] == "image/png"
    assert picture.headers["x-evidence-limit"] == "4"


WRAPPED = {
    "JSON": (json.dumps({"image": BASE64.decode()}).encode(), "JSON"),
    "a list in JSON": (b'\xef\xbb\xbf  ["' + BASE64 + b'"]', "JSON"),
    "a string in JSON": (b'"' + BASE64 + b'"', "JSON"),
    "base64 of PNG": (BASE64, "an image in base64"),
    "base64 with line breaks": (b"\n" + base64.encodebytes(FIELD), "an image in base64"),
    "base64 of JPEG": (base64.b64encode(pictures.encode(pictures.gradient(), "JPEG")), "an image in base64"),
    "base64 for addresses": (base64.urlsafe_b64encode(b"\xff\xd8\xff\xe0"), "an image in base64"),
    "base64 of TIFF": (base64.b64encode(pictures.encode(pictures.gradient(), "TIFF")), "an image in base64"),
    "base64 of big-endian TIFF": (base64.b64encode(b"MM\0*" + bytes(9)), "an image in base64"),
    "a data URI": (b"data:image/png;base64," + BASE64, "a data URI"),
    "an address": (b"https://example.org/a.png", "an address, and the service fetches none"),
    "a file of a hub": (b"hf://owner/name/a.png", "an address, and the service fetches none"),
    "an object": (b"s3://bucket/a.png\n", "an address, and the service fetches none"),
    "gzip": (gzip.compress(FIELD), "a compressed file"),
    "ZIP": (b"PK\x03\x04" + FIELD, "a compressed file"),
    "URL encoding": (b"file=%89PNG%0D%0A", "a form in URL encoding"),
    "a form without its type": (
        form((b'name="file"; filename="a"', FIELD))["content"],
        "a form, but its Content-Type",
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_error_of_a_wrapped_image_names_what_to_send(client, name):
    content, what = WRAPPED[name]
    headers = {"Content-Type": "application/json" if "JSON" in name else "application/octet-stream"}
    status, code, message = refusal(client.post("/v1/predict", content=content, headers=headers))
    assert (status, code) == (415, "unsupported_format")
    assert message.startswith(f"it is {what}")
    assert "send the bytes of the file itself, as the body (curl --data-binary @field.png)" in message
    files = [("files", ("a", FIELD)), ("files", ("b", content))]
    good, bad = client.post("/v1/predict/batch", files=files).json()["results"]
    assert (good["error"], bad["error"]["code"], bad["error"]["message"]) == (None, code, message)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_no_image_is_mistaken_for_a_wrapped_one(client, kind):
    for mode in ("RGB", "L", "1", "CMYK"):
        if (kind, mode) != ("PNG", "CMYK"):
            buffer = io.BytesIO()
            Image.fromarray(pictures.gradient(46, 70)).convert(mode).save(buffer, kind)
            assert client.post("/v1/predict", content=buffer.getvalue()).status_code == 200


def test_a_packed_body_is_refused_by_its_header(client):
    for encoding in ("gzip", "BR", "gzip, identity"):
        answer = client.post(
            "/v1/predict", content=gzip.compress(FIELD), headers={"Content-Encoding": encoding}
        )
        assert refusal(answer)[:2] == (415, "unsupported_format")
        assert "Content-Encoding" in refusal(answer)[2]
    assert (
        client.post("/v1/predict", content=FIELD, headers={"Content-Encoding": "Identity"}).status_code == 200
    )


def test_a_whole_slide_is_refused_with_a_pointer(client):
    for request in ({"content": SLIDE}, {"files": {"file": ("a.png", SLIDE)}}):
        assert refusal(client.post("/v1/predict", **request)) == (
            415,
            "whole_slide",
            "it is a whole slide, but this address accepts single fields of view; score slides with "
            "jobs/score.py, or send one field as PNG, JPEG or TIFF",
        )


SIZE = b'SizeX="130" SizeY="100" PhysicalSizeX="0.5" PhysicalSizeY="0.5"'
OME = b'<OME xmlns="o"><Image><Pixels ' + SIZE + b"/></Image></OME>"
SLIDES = {
    "a scale": SLIDE,
    "a pyramid": pictures.tiff(
        pictures.tiled_page(pictures.gradient(100, 130), None),
        pictures.tiled_page(pictures.gradient(50, 65), None, t254=[1]),
    ),
    "OME-TIFF": pictures.tiled_tiff(pictures.gradient(100, 130), None, t270=OME + b"\0"),
    "Aperio": pictures.tiled_tiff(
        pictures.gradient(100, 130), None, t270=b"Aperio Image Library\r\n130x100\0"
    ),
}
FIELDS = {
    "tiles without a scale": pictures.tiled_tiff(pictures.gradient(100, 130), None),
    "dots per inch": pictures.tiled_tiff(pictures.gradient(100, 130), 25_400 / 300),
    "strips with a scale": pictures.encode(pictures.gradient(100, 130), "TIFF", dpi=(50_800, 50_800)),
}


@pytest.mark.parametrize("name", [*SLIDES, *FIELDS])
def test_the_content_says_what_is_a_slide_as_in_an_archive(client, name):
    answer = client.post("/v1/predict", content=(SLIDES | FIELDS)[name])
    if name in SLIDES:
        assert refusal(answer)[:2] == (415, "whole_slide")
    else:
        assert (answer.status_code, answer.json()["width_px"]) == (200, 130)


def test_a_slide_in_a_batch_leaves_the_others_their_answers(client):
    files = [("files", ("a.png", FIELD)), ("files", ("s.png", SLIDE)), ("files", ("thumbnail.MRXS", FIELD))]
    results = client.post("/v1/predict/batch", files=[*files, files[0]]).json()["results"]
    assert [item["name"] for item in results] == ["a.png", "s.png", "thumbnail.MRXS", "a.png"]
    assert [item["error"] and item["error"]["code"] for item in results] == [None, *["whole_slide"] * 2, None]
    assert results[0]["answer"] == results[3]["answer"]


@pytest.mark.real
@pytest.mark.parametrize("name", ["slides/CMU-1-Small-Region.svs", "slides/boxes.tiff", "cases/dicom/p1.dcm"])
def test_real_slides_are_refused(client, real_data, name):
    content = (real_data / name).read_bytes()
    assert refusal(client.post("/v1/predict", content=content))[:2] == (415, "whole_slide")


QUERIES = [
    (
        "/v1/predict?overlays=true",
        "unknown_option",
        "unknown option `overlays`; expected `overlay` and `preview`",
    ),
    ("/v1/predict?Overlay=true&a=1", "unknown_option", "unknown option `Overlay` and `a`"),
    (
        "/v1/predict?overlay=maybe",
        "invalid_request",
        "the option `overlay` is 'maybe'; expected true or false",
    ),
    ("/v1/predict?overlay=", "invalid_request", "the option `overlay` is ''; expected true or false"),
    (
        "/v1/predict?overlay=true&overlay=false",
        "invalid_request",
        "the option `overlay` is given more than once",
    ),
    (
        "/v1/predict?preview=true&preview=true",
        "invalid_request",
        "the option `preview` is given more than once",
    ),
    (
        "/v1/predict/batch?overlay=true",
        "unknown_option",
        "unknown option `overlay`; this address has no options",
    ),
]


@pytest.mark.parametrize(("path", "code", "message"), QUERIES)
def test_options_are_known_and_given_once(client, path, code, message):
    files = {"files" if "batch" in path else "file": ("a.png", FIELD)}
    found = refusal(client.post(path, files=files))
    assert found[:2] == (422, code)
    assert found[2].startswith(message)


def test_the_model_has_no_options(client):
    assert refusal(client.get("/v1/model?full=1"))[:2] == (422, "unknown_option")
    assert client.get("/v1/model").status_code == client.get("/healthz?now=1").status_code == 200


FILE = b'name="file"; filename="a.png"', FIELD
FORMS = [
    (
        form((b'name="image"; filename="a.png"', FIELD)),
        422,
        "no_picture",
        "no file in its field `file`, it has `image`",
    ),
    (form(FILE, (b'name="note"', b"text")), 422, "unknown_field", "also has `note`; expected `file` only"),
    (form(FILE, (b'name="files"; filename="b.png"', FIELD)), 422, "unknown_field", "also has `files`"),
    (form(FILE, (b'name="overlay"', b"true")), 422, "unknown_field", "options in the address"),
    (
        form(FILE, FILE),
        400,
        "invalid_form",
        "2 files, but this address accepts one; send several to /v1/predict/batch",
    ),
    (form((b'name="file"', FIELD)), 422, "no_filename", "no filename"),
    (form((b'name="file"', BASE64)), 422, "no_filename", "no filename"),
    (form((b'name="file"; filename=""', b"")), 422, "empty", "no bytes"),
    (form(), 422, "no_picture", "it is empty"),
    (form(FILE, end=False), 400, "invalid_form", "no end"),
    (form(FILE, boundary="y"), 400, "invalid_form", ""),
    (form((b'filename="a.png"', FIELD)), 400, "invalid_form", "name"),
]


@pytest.mark.parametrize(("request_", "status", "code", "message"), FORMS)
def test_the_error_of_a_form_names_what_is_wrong(client, request_, status, code, message):
    found = refusal(client.post("/v1/predict", **request_))
    assert found[:2] == (status, code)
    assert message in found[2]


def test_nothing_of_a_batch_is_dropped(client):
    big = b'name="files"', bytes(2 * 2**20)  # more than the parser takes for text by itself
    parts = [(b'name="files"; filename="a.png"', FIELD), (b'name="files"', FIELD), big]
    results = client.post("/v1/predict/batch", **form(*parts, (b'name="files"; filename=""', b""))).json()[
        "results"
    ]
    assert [item["error"] and item["error"]["code"] for item in results] == [
        None,
        "no_filename",
        "no_filename",
        "empty",
    ]
    cut = form(*parts[:1], (b'name="files"; filename="b.png"', FIELD), end=False)
    assert refusal(client.post("/v1/predict/batch", **cut))[:2] == (400, "invalid_form")
    wrong = form(*parts[:1], (b'name="file"; filename="b.png"', FIELD))
    assert refusal(client.post("/v1/predict/batch", **wrong))[:2] == (422, "unknown_field")
    five = refusal(client.post("/v1/predict/batch", **form(*parts[:1] * 5)))
    assert five == (400, "invalid_form", "the form has 5 files; at most 4 in one form")


@pytest.mark.parametrize("kind", ["image/png", "application/json", "multipart/mixed; boundary=x", ""])
def test_a_batch_is_a_form(client, kind):
    answer = client.post("/v1/predict/batch", content=FIELD, headers={"Content-Type": kind} if kind else {})
    assert refusal(answer)[:2] == (415, "unsupported_format")
    assert "multipart/form-data" in refusal(answer)[2]
    assert (
        client.post("/v1/predict", content=FIELD, headers={"Content-Type": "multipart/related"}).status_code
        == 415
    )


def test_names_of_callers_do_not_fill_the_answer(client):
    files = {f"{n:03}{'a' * 500}": ("a.png", FIELD) for n in range(50)}
    assert len(refusal(client.post("/v1/predict", files=files))[2]) < 500
    assert upload.MAX_PARTS >= 50
