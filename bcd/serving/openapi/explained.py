"""What the OpenAPI document says besides the schemas: groups of routes, the errors of each, and examples.

Tests compare the errors with those that the code raises, and the examples with what the service answers.
The examples have no nulls: FastAPI leaves them out of the document.
"""

from collections.abc import Iterable
from typing import Any

from bcd.text import RESEARCH_ONLY

PREDICT, MODELS, SLIDES, HEALTH = "predictions", "models", "slides", "health"
TAGS = [
    {"name": PREDICT, "description": "Fields of view: probability, evidence and novelty."},
    {"name": MODELS, "description": "The models of this service: their cards and limits."},
    {"name": SLIDES, "description": "Whole slides, scored one after the other as the archive job does."},
    {"name": HEALTH, "description": "For load balancers; no token is needed."},
]

# Every error of a documented route: its status, and what it may say.
ERRORS: dict[str, tuple[int, str]] = {
    "disconnected": (400, "the client disconnected while sending"),
    "invalid_form": (400, "the form has 17 files; at most 16 in one form"),
    "unauthorized": (401, "the header `Authorization: Bearer TOKEN` is missing or its token is wrong"),
    "no_token_set": (403, "this service has no token (BCD_API_TOKEN), so it answers this machine only"),
    "unknown_host": (403, "without a token this service is asked by the names localhost and 127.0.0.1 only"),
    "not_found": (404, "Not Found; see /docs"),
    "no_model": (404, "this service has no model `b`; GET /v1/models lists them"),
    "no_slide": (404, "this service knows no slide of this id"),
    "no_slides": (
        404,
        "this service scores no slides: start it with --slides, or score them with jobs/score.py",
    ),
    "no_result": (404, "this slide has no result, or not yet"),
    "slow_upload": (408, "the body did not arrive within 30 s"),
    "body_too_large": (
        413,
        "the body is larger than 33,554,432 bytes; score whole slides with jobs/score.py",
    ),
    "too_large": (413, "decoding the image takes more than 4 GiB of memory"),
    "unsupported_format": (415, "it is JSON; send the bytes of the file itself, as the body"),
    "whole_slide": (415, "it is a whole slide, but this address accepts single fields of view"),
    "empty": (422, "the file is empty"),
    "truncated": (422, "the file is damaged or ends early"),
    "too_many_pixels": (422, "the image has more than 64 million pixels"),
    "too_slow": (422, "decoding the image takes more than 30 s"),
    "unreadable": (422, "the decoder crashed on this file"),
    "no_filename": (422, "the part has no filename, so it is text and not a file"),
    "no_picture": (422, "the form has no file in its field `file`, it is empty"),
    "unknown_field": (422, "the form also has `note`; expected `file` only, and options in the address"),
    "unknown_option": (422, "unknown option `overlai`; expected `overlay` and `preview`"),
    "invalid_request": (422, "the option `overlay` is 'perhaps'; expected true or false"),
    "no_name": (422, "the name of the file is missing; send it as POST /v1/slides?name=biopsy.svs"),
    "bad_name": (422, "the name must be that of a file, without folders, of at most 120 characters"),
    "no_archive": (422, "this service takes no slides by name; send the file as the body"),
    "not_finite": (500, "the model's logits are not finite numbers"),
    "internal": (500, "the service failed on this request"),
    "overloaded": (503, "all replicas are busy; try again in a second"),
    "replica_lost": (503, "the replica that computed the answer has ended; try again"),
    "unavailable": (503, "the decoder was killed; try again"),
    "no_room": (503, "the service cannot keep the slide, perhaps because its disk is full"),
    "not_ready": (503, "no forward pass has succeeded yet"),
    "timeout": (504, "no answer within 60 s; try again"),
}
# Of every route below /v1, of those with a body, with a form, with an image.
ANY = (
    *("unauthorized", "no_token_set", "unknown_host", "unknown_option", "invalid_request"),
    *("internal", "overloaded", "replica_lost", "timeout"),
)
BODY = ("disconnected", "slow_upload", "body_too_large")
FORM = ("invalid_form", "no_picture", "unknown_field", "unsupported_format")
IMAGE = (
    *("too_large", "unsupported_format", "whole_slide", "empty", "truncated", "too_many_pixels"),
    *("too_slow", "unreadable", "no_filename", "not_finite", "unavailable"),
)
# Of routes that name a model, a slide, a file of a slide.
ANY_MODEL = ("no_model",)
KNOWN_SLIDE = ("no_slide", "no_result", "unavailable")
SLIDE_FILE = (*KNOWN_SLIDE, "not_found")
SENT_SLIDE = (
    *(*BODY, "no_slides", "no_slide", "unsupported_format", "no_name", "bad_name"),
    *("no_archive", "no_room", "unavailable"),
)

MODEL_ID = "1c4c1301a22a0192"
ANSWER = {
    "predicted_class": "benign",
    "probability_malignant": 0.273,
    "probabilities": {"benign": 0.727, "malignant": 0.273},
    "log_odds": -0.98,
    "log_odds_sd": 0.21,
    "threshold": 0.5,
    "width_px": 700,
    "height_px": 460,
    "evidence": {
        "height": 2,
        "width": 2,
        "values": [[-0.5, -1.5], [-0.9, -0.98]],
        "bias": -0.01,
        "limit": 4.0,
        "explains": "malignant against benign",
        "covers": {"top": 0.0, "left": 0.0, "bottom": 1.0, "right": 1.0},
    },
    "novelty": 0.62,
    "novelty_cutoff": 1.39,
    "warnings": [],
    "sha256": "f9b2" + 60 * "0",
    "model_id": MODEL_ID,
    "version": "0.2.0",
    "notice": RESEARCH_ONLY,
}
BATCH = {
    "results": [
        {"name": "a.png", "answer": ANSWER},
        {"name": "b.png", "error": {"code": "truncated", "message": ERRORS["truncated"][1]}},
    ]
}
LISTED = {
    "models": [
        {"name": "default", "default": True, "predict": "/v1/models/default/predict"},
        {"name": "b", "default": False, "predict": "/v1/models/b/predict"},
    ]
}
MODEL = {
    "name": "default",
    "model_id": MODEL_ID,
    "version": "0.2.0",
    "card": {
        "target": "tumor_class",
        "classes": ["benign", "malignant"],
        "input_height_px": 224,
        "input_width_px": 352,
        "field_height_px": 460,
        "field_width_px": 700,
        "mpp": [0.49],
        "magnifications": [40],
        "protocol": "case",
        "seed": 0,
        "data_fingerprint": 64 * "d",
        "split_fingerprint": 64 * "5",
        "leaky": False,
        "synthetic": False,
        "training": {"name": "first", "data": "BreaKHis_v1", "weights": "imagenet"},
        "validation": {"epoch": 7},
        "versions": {"bcd": "0.2.0"},
        "git_commit": "97ffc04",
    },
    "limits": {"max_body_bytes": 33554432, "max_images": 16, "max_pixels": 64000000},
    "notice": RESEARCH_ONLY,
}
SLIDE = {
    "id": "0123456789abcdef0123456789abcdef",
    "name": "biopsy.svs",
    "since": "2026-11-30T08:00:00+00:00",
    "state": "running",
    "progress": {"message": "120 of 480 tiles", "rows": 120, "share": 0.25},
}


def errors(*groups: Iterable[str]) -> dict[int | str, dict[str, Any]]:
    """The answers of a route, by status, with an example for each of its codes."""
    found: dict[int | str, dict[str, Any]] = {}
    for code in sorted(
        {code for group in groups for code in group}, key=lambda code: (ERRORS[code][0], code)
    ):
        status, message = ERRORS[code]
        value = {"error": {"code": code, "message": message}}
        shown = found.setdefault(
            status, {"description": "", "content": {"application/json": {"examples": {}}}}
        )
        shown["description"] = ", ".join(filter(None, [shown["description"], f"`{code}`"]))
        shown["content"]["application/json"]["examples"][code] = {"value": value}
    return found


def shows(example: dict[str, Any], text: str, status: int = 200) -> dict[int | str, dict[str, Any]]:
    """The answer of a route that succeeds: what it is, and an example."""
    return {status: {"description": text, "content": {"application/json": {"example": example}}}}
