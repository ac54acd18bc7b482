"""The service's contract with the page, without a model: fake answers that depend on the bytes alone.

What a real service does only under stress (overload, an expired token, a proxy's own page) happens here to
images of certain heights: see `TRICKS`.
"""

import asyncio
import base64
import copy
import hashlib
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles

from bcd.imaging import image
from bcd.reports import overlay
from bcd.text import RESEARCH_ONLY
from tests.cluster import free_port, wait_for

VERSION, MODEL_ID = "0.2.0", "9f2c4e81a07b35d6"
INPUT_HEIGHT_PX, INPUT_WIDTH_PX = 224, 336
BIAS, CUTOFF = -0.12, 1.4
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
STATUS = {"unsupported_format": 415, "empty": 422, "truncated": 422, "too_many_pixels": 422}
# Height in pixels of an image, and the statuses of its first answers.
TRICKS: dict[int, list[int]] = {31: [503, 503], 32: [503] * 99, 33: [502], 34: [401]}

CARD: dict[str, Any] = {
    "format_version": 2,
    "architecture": "resnet50",
    "target": "tumor_class",
    "classes": ["benign", "malignant"],
    "input_height_px": INPUT_HEIGHT_PX,
    "input_width_px": INPUT_WIDTH_PX,
    "mean": list(image.IMAGENET_MEAN),
    "std": list(image.IMAGENET_STD),
    "field_height_px": 460,
    "field_width_px": 700,
    "mpp": [0.196, 0.49, 0.98, 1.96],
    "magnifications": [40, 100, 200, 400],
    "temperature": 1.0,
    "threshold": 0.5,
    "protocol": "case",
    "fold": None,
    "seed": 0,
    "data_fingerprint": "5b1f0c9e" * 8,
    "split_fingerprint": "c04d77aa" * 8,
    "leaky": False,
    "synthetic": True,
    "feature_statistics": None,
    "training": {"name": "mock", "data": "s3://bucket/BreaKHis_v1", "weights": None},
    "validation": {"epoch": 4, "balanced_accuracy": 0.93},
    "metrics": {
        "n_images": 96,
        "n_patients": 8,
        "n_errors": 0,
        "summary": [
            ["balanced accuracy", "91.7 %", "84.4 to 98.6 %"],
            ["sensitivity", "95.8 %", "89.6 to 100.0 %"],
            ["specificity", "87.5 %", "75.0 to 100.0 %"],
            ["AUC", "0.980", "0.951 to 1.000"],
            ["image recognition rate", "91.7 %", "84.4 to 98.6 %"],
            ["patient recognition rate", "91.7 %", "84.4 to 98.6 %"],
        ],
    },
    "versions": {"python": "3.12"},
    "git_commit": "0f88f89d1c5a",
}


def model_document() -> dict[str, Any]:
    """The body of /v1/model."""
    return {
        "name": "default",
        "model_id": MODEL_ID,
        "version": VERSION,
        "card": copy.deepcopy(CARD),
        "limits": {"max_body_bytes": 2**20 * 4, "max_images": 16, "max_pixels": image.MAX_PIXELS},
        "overlay": {
            "limit": overlay.LIMIT,
            "unit": "log-odds per cell",
            "against_colour": overlay.BLUE,
            "towards_colour": overlay.VERMILION,
            "opacity": overlay.OPACITY,
            "contrast": overlay.CONTRAST,
        },
        "notice": RESEARCH_ONLY,
    }


def evidence(pixels: np.ndarray) -> np.ndarray:
    """A map (7, 11) as of a model: dark, crowded places are evidence for malignant, pale ones against."""
    fitted = image.fit(pixels, INPUT_HEIGHT_PX, INPUT_WIDTH_PX).astype(float).mean(-1)
    rows, columns = (
        np.array_split(np.arange(INPUT_HEIGHT_PX), 7),
        np.array_split(np.arange(INPUT_WIDTH_PX), 11),
    )
    cells = np.array([[fitted[np.ix_(r, c)].mean() for c in columns] for r in rows])
    return np.clip((cells.mean() - cells) / 9 + (185 - cells.mean()) / 9, -9, 9)


def document(content: bytes, with_overlay: bool, with_preview: bool) -> dict[str, Any]:
    """The answer for an image; raises ImageError as the service's decoder does."""
    pixels = image.decode(content)
    height, width = pixels.shape[:2]
    values = evidence(pixels)
    log_odds = float(values.mean() + BIAS)
    malignant = float(1 / (1 + np.exp(-log_odds)))
    into = INPUT_HEIGHT_PX, INPUT_WIDTH_PX
    top, left, inner_height, inner_width = image.placement(height, width, *into)
    novelty = 0.8 + (len(content) % 97) / 120
    strange = f"This image does not resemble the training data (distance {novelty:.2f})."
    return {
        "predicted_class": "malignant" if malignant >= CARD["threshold"] else "benign",
        "probability_malignant": malignant,
        "probabilities": {"benign": 1 - malignant, "malignant": malignant},
        "log_odds": log_odds,
        "log_odds_sd": None,
        "threshold": CARD["threshold"],
        "width_px": width,
        "height_px": height,
        "sha256": hashlib.sha256(content).hexdigest(),
        "evidence": {
            "height": 7,
            "width": 11,
            "values": values.tolist(),
            "bias": BIAS,
            "limit": overlay.LIMIT,
            "explains": "malignant against benign",
            "covers": {
                "top": top / into[0],
                "left": left / into[1],
                "bottom": (top + inner_height) / into[0],
                "right": (left + inner_width) / into[1],
            },
        },
        "novelty": novelty,
        "novelty_cutoff": CUTOFF,
        "warnings": [{"code": "unlike_training_data", "message": strange}] if novelty > CUTOFF else [],
        "overlay_png": _png(overlay.overlay(pixels, values, overlay.LIMIT, *into)) if with_overlay else None,
        "preview_png": _png(image.shrink(pixels, 1024, 1024)) if with_preview else None,
        "model_id": MODEL_ID,
        "version": VERSION,
        "notice": RESEARCH_ONLY,
    }


def _png(pixels: np.ndarray) -> str:
    return base64.b64encode(image.encode_png(pixels)).decode()


def _error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"code": code, "message": message}}, status, headers)


@dataclass
class Mock:
    """A running mock: its URL, its token, and the requests that it received."""

    url: str = ""
    token: str | None = None
    about: dict[str, Any] = field(default_factory=lambda: model_document())
    asked: list[str] = field(default_factory=list)
    most_at_once: int = 0
    # Cleared to hold answers, so that a test sees what the page does meanwhile.
    gate: threading.Event = field(default_factory=threading.Event)
    _open: int = 0
    _tricks: Counter[int] = field(default_factory=Counter)

    async def predict(self, request: Request) -> Response:
        """POST /v1/predict."""
        content = await request.body()
        try:
            flags = [request.query_params.get(name) == "true" for name in ("overlay", "preview")]
            answer = await asyncio.to_thread(document, content, *flags)
        except image.ImageError as error:
            return _error(STATUS[error.code], error.code, error.message)
        return self._trick(answer["height_px"]) or JSONResponse(answer)

    def _trick(self, height: int) -> Response | None:
        played, self._tricks[height] = self._tricks[height], self._tricks[height] + 1
        match TRICKS.get(height, [])[played : played + 1]:
            case [503]:
                wait = {"Retry-After": "0" if height == 32 else "1"}
                return _error(
                    503, "overloaded", "64 requests are being answered; try again in a second", wait
                )
            case [502]:
                return PlainTextResponse("<h1>Bad gateway</h1>", 502)
            case [401]:
                return _error(401, "unauthorized", "the token is wrong")
        return None

    def app(self) -> FastAPI:
        """The mock as an app."""
        app = FastAPI(openapi_url=None)
        folder = files("bcd.serving").joinpath("page")

        @app.middleware("http")
        async def guard(request: Request, follow: Any) -> Response:
            self.asked.append(f"{request.method} {request.url}")
            if not request.url.path.startswith("/v1/"):
                return await follow(request)
            if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
                return _error(401, "unauthorized", "the token is missing or wrong")
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
            try:
                while request.method == "POST" and not self.gate.is_set():
                    await asyncio.sleep(0.02)
                return await follow(request)
            finally:
                self._open -= 1

        @app.get("/")
        async def index() -> Response:
            page = folder.joinpath("index.html").read_text(encoding="utf-8")
            return Response(
                page, media_type="text/html; charset=utf-8", headers={"Content-Security-Policy": POLICY}
            )

        @app.get("/v1/model")
        async def about() -> dict[str, Any]:
            return self.about

        app.post("/v1/predict")(self.predict)
        app.mount("/page", StaticFiles(directory=str(folder)), name="page")
        return app


@contextmanager
def running(token: str | None = None) -> Iterator[Mock]:
    """A mock that answers on a free port of loopback until the end of the block."""
    mock = Mock(token=token)
    mock.gate.set()
    port = free_port()
    mock.url = f"http://127.0.0.1:{port}"
    server = uvicorn.Server(uvicorn.Config(mock.app(), "127.0.0.1", port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started, 60, "the mock of the service")
        yield mock
    finally:
        mock.gate.set()
        server.should_exit = True
        thread.join()
