"""The documents of the service: what it says about a picture, and what it says where it cannot.

The document of a picture holds what the archive job would write for the same bytes.
"""

import base64

import numpy as np
from pydantic import BaseModel

from bcd import provenance
from bcd.imaging import image
from bcd.metrics import calibration
from bcd.model import novelty
from bcd.model.bundle import Card, Prediction
from bcd.reports import overlay

NOTICE = "Research use only. Not a medical device, and not for diagnosis."
# Longest side of the picture that a browser is given where it cannot decode the file itself.
PREVIEW_PX = 1024


class ErrorBody(BaseModel):
    """Code for programs, sentence for people."""

    code: str
    message: str


class ErrorDocument(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorBody


class Covers(BaseModel):
    """The part of a map that lies on the picture, as fractions; what is beside it covers the padding."""

    top: float
    left: float
    bottom: float
    right: float


class Evidence(BaseModel):
    """The evidence map: log-odds per cell; the mean of all values plus the bias is the log-odds.

    Wherever it is drawn, the colour is full at `limit`.
    """

    height: int
    width: int
    values: list[list[float]]
    bias: float
    limit: float = overlay.LIMIT
    explains: str
    covers: Covers


class Warn(BaseModel):
    """Something to know before this answer is believed."""

    code: str
    message: str


class Answer(BaseModel):
    """What the model says about one picture."""

    predicted_class: str
    probability_malignant: float
    probabilities: dict[str, float]
    log_odds: float
    threshold: float
    width_px: int
    height_px: int
    evidence: Evidence
    novelty: float | None
    novelty_cutoff: float | None
    warnings: list[Warn]
    overlay_png: str | None = None
    preview_png: str | None = None
    model_id: str
    version: str
    notice: str = NOTICE


class BatchItem(BaseModel):
    """One picture of a batch: an answer or an error."""

    name: str
    answer: Answer | None = None
    error: ErrorBody | None = None


class BatchAnswer(BaseModel):
    """The pictures of a batch, in the order in which they came."""

    results: list[BatchItem]


class Scale(BaseModel):
    """How evidence is drawn: one scale for all pictures."""

    limit: float = overlay.LIMIT
    unit: str = "log-odds per cell"
    against_colour: str = overlay.BLUE
    towards_colour: str = overlay.VERMILION
    opacity: float = overlay.OPACITY
    contrast: float = overlay.CONTRAST


class ModelDocument(BaseModel):
    """Which model answers, what it was trained on, and what may be sent."""

    model_id: str
    version: str
    card: Card
    limits: dict[str, int]
    overlay: Scale = Scale()
    notice: str = NOTICE


class Health(BaseModel):
    """A word about the service."""

    status: str


def answer(
    card: Card,
    model_id: str,
    pixels: np.ndarray,
    prediction: Prediction,
    with_overlay: bool = False,
    with_preview: bool = False,
) -> Answer:
    """What the model says about one picture.

    Args:
        card: of the model.
        model_id: of the model.
        pixels: uint8 (h, w, 3) RGB, the picture as decoded.
        prediction: of one row.
        with_overlay: the picture with its evidence laid over it as well.
        with_preview: the picture as well, for those who cannot decode the file.

    Raises:
        ImageError: the model gives no finite numbers for it.
    """
    prediction.require_finite()
    malignant = float(prediction.probability_malignant[0])
    distance = float(prediction.novelty[0])
    cutoff = card.feature_statistics.cutoff if card.feature_statistics else None
    return Answer(
        predicted_class=str(prediction.predicted_class[0]),
        probability_malignant=malignant,
        probabilities=dict(zip(card.classes, prediction.probability[0].tolist(), strict=True)),
        log_odds=float(calibration.log_odds(prediction.logit, card.classes)[0]),
        threshold=card.threshold,
        width_px=pixels.shape[1],
        height_px=pixels.shape[0],
        evidence=_evidence(card, pixels, prediction),
        novelty=None if cutoff is None else distance,
        novelty_cutoff=cutoff,
        warnings=_warnings(distance, cutoff),
        overlay_png=_base64(drawn(card, pixels, prediction)) if with_overlay else None,
        preview_png=_base64(_preview(pixels)) if with_preview else None,
        model_id=model_id,
        version=provenance.own_version(),
    )


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _preview(pixels: np.ndarray) -> bytes:
    return image.encode_png(image.shrink(pixels, PREVIEW_PX, PREVIEW_PX))


def drawn(card: Card, pixels: np.ndarray, prediction: Prediction) -> bytes:
    """A PNG of the picture with its evidence laid over it.

    Raises:
        ImageError: the model gives no finite numbers for it.
    """
    prediction.require_finite()
    size = {"input_height_px": card.input_height_px, "input_width_px": card.input_width_px}
    return image.encode_png(overlay.overlay(pixels, prediction.evidence[0], **size))


def _evidence(card: Card, pixels: np.ndarray, prediction: Prediction) -> Evidence:
    values = prediction.evidence[0]
    two = len(card.classes) == 2
    explained = prediction.predicted_class[0]
    return Evidence(
        height=values.shape[0],
        width=values.shape[1],
        values=values.tolist(),
        bias=float(prediction.evidence_bias[0]),
        explains=f"{card.classes[1]} against {card.classes[0]}" if two else f"{explained} against the rest",
        covers=_covers(card, *pixels.shape[:2]),
    )


def _covers(card: Card, height_px: int, width_px: int) -> Covers:
    into = card.input_height_px, card.input_width_px
    top, left, height, width = image.placement(height_px, width_px, *into)
    return Covers(
        top=top / into[0],
        left=left / into[1],
        bottom=(top + height) / into[0],
        right=(left + width) / into[1],
    )


def _warnings(distance: float, cutoff: float | None) -> list[Warn]:
    sentence = novelty.warning_text(distance, cutoff) if cutoff is not None else ""
    return [Warn(code=code, message=sentence) for code in novelty.warning_codes(distance, cutoff)]
