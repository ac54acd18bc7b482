"""The JSON documents of the service; that of an image has the values of the archive job for equal bytes."""

import base64
import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from bcd import provenance
from bcd.config.options import CLOSED_FORM
from bcd.imaging import image
from bcd.metrics import calibration
from bcd.model import novelty
from bcd.model.card import Card
from bcd.model.predictor import Prediction
from bcd.reports import overlay
from bcd.taxonomy import MAX_MPP, MIN_MPP
from bcd.text import RESEARCH_ONLY

# Longest side of the image for browsers that cannot decode the file.
PREVIEW_PX = 1024


class ErrorBody(BaseModel):
    """A stable code for programs, and a sentence."""

    code: str
    message: str


class ErrorDocument(BaseModel):
    """The body of every error."""

    error: ErrorBody


class SlideProgress(BaseModel):
    """How far a slide is: the last line of its job, tiles done, and the share of the work."""

    message: str
    rows: int = 0
    share: float = 0.0


class SlideDocument(BaseModel):
    """A slide: its state, how many are before it, its progress, or its result.

    `slide` is its row of `slides.parquet`, `files` the addresses of its heat map and of its tiles.
    """

    id: str
    name: str
    since: str
    mpp: float | None = None
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    before: int | None = None
    progress: SlideProgress | None = None
    error: ErrorBody | None = None
    model_id: str | None = None
    slide: Mapping[str, Any] | None = None
    files: Mapping[str, str] | None = None


class NamedSlide(BaseModel):
    """A slide of the service's archive, by its path there; `mpp` in µm per pixel if it states none."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=1_024)
    mpp: float | None = Field(default=None, ge=MIN_MPP, le=MAX_MPP)


class Covers(BaseModel):
    """The part of a map that covers the image, as fractions; the rest covers the padding."""

    top: float
    left: float
    bottom: float
    right: float


class Evidence(BaseModel):
    """The evidence map in log-odds per cell: the mean of all values plus the bias is the log-odds.

    Drawn at full colour from `limit`. Without a bias the values are Grad-CAM, in its own units, and the
    limit is that of this image.
    """

    height: int
    width: int
    values: list[list[float]]
    bias: float | None
    limit: float = overlay.LIMIT
    explains: str
    covers: Covers


class Warn(BaseModel):
    """A reason not to trust the answer."""

    code: str
    message: str


class Answer(BaseModel):
    """The prediction for one image."""

    predicted_class: str
    probability_malignant: float
    probabilities: dict[str, float]
    log_odds: float
    log_odds_sd: float | None
    threshold: float
    width_px: int
    height_px: int
    evidence: Evidence
    novelty: float | None
    novelty_cutoff: float | None
    warnings: list[Warn]
    overlay_png: str | None = None
    preview_png: str | None = None
    sha256: str
    model_id: str
    version: str
    notice: str = RESEARCH_ONLY


class BatchItem(BaseModel):
    """One image of a batch: an answer or an error."""

    name: str
    answer: Answer | None = None
    error: ErrorBody | None = None


class BatchAnswer(BaseModel):
    """The images of a batch, in the order of the request."""

    results: list[BatchItem]


class Scale(BaseModel):
    """How evidence is drawn: one scale for all images."""

    limit: float = overlay.LIMIT
    unit: str = "log-odds per cell"
    against_colour: str = overlay.BLUE
    towards_colour: str = overlay.VERMILION
    opacity: float = overlay.OPACITY
    contrast: float = overlay.CONTRAST


class ListedModel(BaseModel):
    """A model of the service, and where it predicts; the default one does at `/v1/predict`, too."""

    name: str
    default: bool
    predict: str


class ModelList(BaseModel):
    """The models of the service, the default one first."""

    models: list[ListedModel]


class ModelDocument(BaseModel):
    """The model, its card, and the limits of requests."""

    name: str
    model_id: str
    version: str
    card: Card
    limits: dict[str, int]
    overlay: Scale = Scale()
    notice: str = RESEARCH_ONLY


class Health(BaseModel):
    """The state of the service."""

    status: str


def answer(
    card: Card,
    model_id: str,
    content: bytes,
    pixels: np.ndarray,
    prediction: Prediction,
    with_overlay: bool = False,
    with_preview: bool = False,
) -> Answer:
    """The document of one image: its bytes, its pixels, uint8 (h, w, 3) RGB, and its prediction of one row.

    With the overlay it includes the image under its evidence, with the preview the image itself, for clients
    that cannot decode the file.

    Raises:
        ImageError: the logits are not finite.
    """
    prediction.require_finite()
    distance = float(prediction.novelty[0])
    cutoff = card.feature_statistics.cutoff if card.feature_statistics else None
    overlay_png = drawn(card, pixels, prediction) if with_overlay else None
    preview_png = image.encode_png(image.shrink(pixels, PREVIEW_PX, PREVIEW_PX)) if with_preview else None
    return Answer(
        predicted_class=str(prediction.predicted_class[0]),
        probability_malignant=float(prediction.probability_malignant[0]),
        probabilities=dict(zip(card.classes, prediction.probability[0].tolist(), strict=True)),
        log_odds=float(calibration.log_odds(prediction.logit, card.classes)[0]),
        log_odds_sd=float(prediction.log_odds_sd[0]) if card.n_members > 1 else None,
        threshold=card.threshold,
        width_px=pixels.shape[1],
        height_px=pixels.shape[0],
        evidence=_evidence(card, pixels, prediction),
        novelty=None if cutoff is None else distance,
        novelty_cutoff=cutoff,
        warnings=[
            Warn(code=code, message=novelty.warning_text(distance, cutoff))
            for code in novelty.warning_codes(distance, cutoff)
            if cutoff is not None
        ],
        overlay_png=_base64(overlay_png),
        preview_png=_base64(preview_png),
        sha256=hashlib.sha256(content).hexdigest(),
        model_id=model_id,
        version=provenance.own_version(),
    )


def _base64(content: bytes | None) -> str | None:
    return base64.b64encode(content).decode() if content else None


def drawn(card: Card, pixels: np.ndarray, prediction: Prediction) -> bytes:
    """A PNG of the image with its evidence drawn over it.

    Raises:
        ImageError: the logits are not finite.
    """
    prediction.require_finite()
    size = {"input_height_px": card.input_height_px, "input_width_px": card.input_width_px}
    return image.encode_png(overlay.overlay(pixels, prediction.evidence[0], drawn_limit(prediction), **size))


def scale_of(card: Card) -> Scale:
    """How the evidence of a model is drawn."""
    return Scale() if card.evidence == CLOSED_FORM else Scale(unit="Grad-CAM, each image on its own scale")


def drawn_limit(prediction: Prediction) -> float:
    """The value of the map of one image at full colour."""
    return overlay.limit_of(prediction.evidence[0], float(prediction.evidence_bias[0]))


def _evidence(card: Card, pixels: np.ndarray, prediction: Prediction) -> Evidence:
    values, bias = prediction.evidence[0], float(prediction.evidence_bias[0])
    first, *others = card.classes
    explains = (
        f"{others[0]} against {first}"
        if len(others) == 1
        else f"{prediction.predicted_class[0]} against the rest"
    )
    size = *pixels.shape[:2], *card.input_size_px
    return Evidence(
        height=values.shape[0],
        width=values.shape[1],
        values=values.tolist(),
        bias=bias if math.isfinite(bias) else None,
        limit=overlay.limit_of(values, bias),
        explains=explains,
        covers=Covers(**overlay.covers(*size)),
    )
