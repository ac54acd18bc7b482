"""The files of a model that answers for slides: weights of its attention, and a card.

    <uri>/model.safetensors   weights
    <uri>/card.json           written last: without it there is no model

Both are checked when they are read, and nothing is unpickled. The model fits the embeddings of one other
model, whose `model_id` is in the card.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bcd import storage
from bcd.errors import BundleError
from bcd.model.bundle import CARD, WEIGHTS
from bcd.model.card import CHECKSUM, Digest, Share, seal


@dataclass(frozen=True)
class Fitted:
    """The weights of the best epoch, as the bytes of a safetensors file, and a record per epoch."""

    weights: bytes
    history: list[dict[str, float]]
    epoch: int


class PoolCard(BaseModel):
    """Everything that an answer for a slide depends on, and its provenance."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    format_version: Literal[1] = 1
    kind: Literal["gated_attention"] = "gated_attention"
    weights_sha256: Digest
    encoder: str
    """`model_id` of the bundle whose embeddings it pools."""
    embedding: int = Field(ge=1, le=100_000)
    """Length of an embedding."""
    classes: tuple[str, ...]
    """Class names in the order of the logits."""
    temperature: float = Field(ge=0.01, le=100)
    """Divisor of the logits that calibrates the probabilities; fitted on validation."""
    threshold: Share
    """Probability from which a slide is called malignant; chosen on validation."""
    operating_point: dict[str, Any]
    """How the threshold was chosen, and its metrics on validation: `decision.choose_threshold`."""
    calibration: dict[str, float]
    """On validation, before and after the temperature: cross-entropy, Brier score, calibration error."""
    epoch: int = Field(ge=1)
    """The best epoch, whose weights these are."""
    slides: dict[str, int]
    """Number of slides in each part of the split."""
    split_fingerprint: Digest
    """Hash over the part of every slide."""
    training: dict[str, Any]
    """All settings of the training."""
    warnings: tuple[str, ...]
    """What is doubtful about the labels and their split."""
    versions: dict[str, str]
    git_commit: str | None


def make_card(content: bytes, **facts: Any) -> PoolCard:
    """The card of these weights; raises BundleError for invalid fields."""
    try:
        return PoolCard(weights_sha256=hashlib.sha256(content).hexdigest(), **facts)
    except ValidationError as error:
        raise BundleError(f"no card can be written: {error.errors()[0]['msg']}") from None


def identity_of(card: PoolCard) -> str:
    """Hash over everything that an answer depends on, with the hash of the weights."""
    return hashlib.sha256(card.model_dump_json(exclude={"warnings"}).encode()).hexdigest()[:16]


def write_model(content: bytes, card: PoolCard, uri: str) -> None:
    """Write weights, then the card, which makes the model complete."""
    storage.write_bytes(storage.join(uri, WEIGHTS), content)
    facts = json.loads(card.model_dump_json())
    sealed = json.dumps(facts | {CHECKSUM: seal(facts)}, indent=2)
    storage.write_bytes(storage.join(uri, CARD), sealed.encode())


def read_model(uri: str) -> tuple[bytes, PoolCard]:
    """Weights and card. Raises BundleError where there is no model of slides, or it was changed."""
    if not storage.exists(storage.join(uri, CARD)):
        raise BundleError(
            f"{uri}: no model of slides there; expected {CARD} and {WEIGHTS}, from jobs/pool.py"
        )
    try:
        facts = json.loads(storage.read_bytes(storage.join(uri, CARD)))
        if not isinstance(facts, dict) or facts.get("kind") != "gated_attention":
            raise BundleError(f"{uri} is no model of slides; expected OUTPUT/NAME/model of jobs/pool.py")
        if facts.pop(CHECKSUM, None) != seal(facts):
            raise BundleError(
                f"{uri}: the card is not as it was written: its checksum differs. Copy it again"
            )
        card = PoolCard.model_validate_json(json.dumps(facts), strict=True)
    except ValidationError as error:
        raise BundleError(f"{uri}: not a valid card: {error.errors()[0]['msg']}") from None
    except ValueError as error:
        raise BundleError(f"{uri}: not a valid card: {error}") from error
    content = storage.read_bytes(storage.join(uri, WEIGHTS))
    if hashlib.sha256(content).hexdigest() != card.weights_sha256:
        raise BundleError(f"{uri}: {WEIGHTS} is not the file that {CARD} was written for. Copy it again")
    return content, card
