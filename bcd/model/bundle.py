"""The files of a model bundle: weights, a machine-readable card, the same card as a README, and origin.

    <uri>/model.safetensors   float32 tensors, names of torchvision's network or timm's
    <uri>/sbom.cdx.json       the packages of the environment that wrote it (CycloneDX)
    <uri>/provenance.json     data, code, command and settings that made the weights (in-toto, SLSA)
    <uri>/README.md           the card as text
    <uri>/card.json           written last: without it there is no bundle
    <uri>/model.sig           of a signed bundle, see `bcd.preflight.signing`

Bundles of version 0.2.0 have neither of the documents about their origin; nothing reads them.

The card contains what training decided (classes, input size, mean and std, threshold), so that training,
archives and the service cannot diverge. Nothing in a bundle is ever unpickled. This module needs no torch.
"""

import hashlib
import json
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any, Literal

import jinja2

from bcd import provenance, storage
from bcd.errors import BundleError
from bcd.model.card import Card, dump, model_id, parse_card
from bcd.text import as_code, as_yaml, in_markdown

WEIGHTS, CARD, README = "model.safetensors", "card.json", "README.md"
MATERIALS, ORIGIN, SIGNATURE = "sbom.cdx.json", "provenance.json", "model.sig"
# For those who search the hub.
TAGS = ["histopathology", "breast-cancer", "research-use-only", "bcd"]
FILES = (WEIGHTS, CARD, README, MATERIALS, ORIGIN, SIGNATURE)


def write_bundle(weights: bytes, card: Card, uri: str) -> None:
    """Write all files of a bundle, in place of another; its signature is deleted first."""
    if is_signed(uri):
        storage.delete_file(storage.join(uri, SIGNATURE))
    storage.write_bytes(storage.join(uri, WEIGHTS), weights)
    file, now = (WEIGHTS, hashlib.sha256(weights).hexdigest()), datetime.now(UTC)
    prints = {"data_fingerprint": card.data_fingerprint, "split_fingerprint": card.split_fingerprint}
    if card.published:
        prints = {"published_sha256": card.published.file_sha256}
    known = {name: value for name, value in prints.items() if value}
    job: Literal["train", "import"] = "import" if card.published else "train"
    origin = provenance.statement(*file, card.training, known, card.git_commit, now, job)
    for name, document in ((MATERIALS, provenance.bill_of_materials(*file, now)), (ORIGIN, origin)):
        storage.write_bytes(storage.join(uri, name), json.dumps(document, indent=2).encode())
    write_card(card, uri)


def is_signed(uri: str) -> bool:
    """Whether the bundle at the URI has a signature, valid or not."""
    return storage.exists(storage.join(uri, SIGNATURE))


def write_card(card: Card, uri: str) -> None:
    """Write the README, then the card, which makes the bundle complete."""
    storage.write_bytes(storage.join(uri, README), _readme(card).encode())
    storage.write_bytes(storage.join(uri, CARD), dump(card))


def is_complete(uri: str) -> bool:
    """Whether there is a complete bundle at the URI."""
    return storage.exists(storage.join(uri, CARD))


def read_card(uri: str, card_sha256: str | None = None) -> Card:
    """Read and validate `card.json`. Raises BundleError where there is no bundle, it has no valid card of
    this format, or its bytes have another SHA-256 than the given one, which is that of a verified card."""
    if not is_complete(uri):
        raise BundleError(f"{uri}: no model bundle there; expected {CARD}, {WEIGHTS} and {README}")
    content = storage.read_bytes(storage.join(uri, CARD))
    if card_sha256 not in (None, hashlib.sha256(content).hexdigest()):
        raise BundleError(
            f"{uri}: {CARD} is no longer the one whose signature was verified when the job started. Restore "
            "the signed bundle, or have the new one signed, and run the same command again"
        )
    card = parse_card(content, uri)
    if not (card.weights_sha256 and card.canary_logit):
        raise BundleError(f"{uri}: the model card lacks the hash of the weights or the canary's logits")
    return card


def identify(uri: str, card_sha256: str | None = None) -> str:
    """The `model_id` of the bundle at a URI, after a check of card and weights. Raises BundleError where
    there is no bundle, or it is damaged, or not the verified one (see `read_card`)."""
    card = read_card(uri, card_sha256)
    read_weights_of(uri, card)
    return model_id(card)


def read_same(uri: str, identity: str, card_sha256: str | None = None) -> Card:
    """The card at a URI; raises BundleError where it is no longer that of the given `model_id`, or not the
    verified one (see `read_card`)."""
    card = read_card(uri, card_sha256)
    require_same(uri, identity, model_id(card))
    return card


def require_same(uri: str, began: str, now: str) -> None:
    """Raise BundleError where the model at the URI is no longer the one that a job began with."""
    if now != began:
        raise BundleError(
            f"{uri} has changed since the start: the model was {began}, now it is {now}. Restore the first "
            "and run the same command again, or start again (a scoring job with another --output)"
        )


def read_weights_of(uri: str, card: Card) -> bytes:
    """The file of weights, as bytes. Raises BundleError where it is missing or not the card's."""
    if not storage.exists(storage.join(uri, WEIGHTS)):
        raise BundleError(f"{uri}: the bundle has no {WEIGHTS}. Copy it again")
    content = storage.read_bytes(storage.join(uri, WEIGHTS))
    if hashlib.sha256(content).hexdigest() != card.weights_sha256:
        raise BundleError(
            f"{uri}: {WEIGHTS} ({len(content):,} bytes) is not the file that {CARD} was written for: "
            "its SHA-256 differs. Copy the bundle again, or run the command of its training again, which "
            "writes a new one"
        )
    return content


def _readme(card: Card) -> str:
    template = files("bcd").joinpath("reports", "templates", "model_card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=in_markdown
    )
    page = environment.from_string(template).render(card=card, model_id=model_id(card), as_code=as_code)
    lines = [f"{name}: {as_yaml(value)}" for name, value in _front_matter(card).items()]
    return "\n".join(["---", *lines, "---", "", page])


def _front_matter(card: Card) -> dict[str, Any]:
    """What the hub reads. Metrics of a leaky split or of synthetic data are not in it, because it compares
    them with those of others."""
    facts: dict[str, Any] = {"license": card.bundle_license} if card.bundle_license else {}
    facts |= {"library_name": "bcd", "pipeline_tag": "image-classification", "tags": TAGS}
    pooled = card.metrics.get("pooled")
    if pooled is None or card.leaky or card.synthetic:
        return facts
    patients = "" if card.metrics["n_patients"] is None else f" of {card.metrics['n_patients']} patients"
    tested = {"type": "test-part", "name": f"test part, {card.metrics['n_images']} images{patients}"}
    metrics = [_metric(name, pooled) for name in pooled["intervals"] if pooled[name] is not None]
    result = {"task": {"type": "image-classification"}, "dataset": tested, "metrics": metrics}
    return facts | {"model-index": [{"name": card.training["name"], "results": [result]}]}


def _metric(name: str, pooled: dict[str, Any]) -> dict[str, Any]:
    """A metric in the form of the hub, which has no place for intervals but name and arguments."""
    metric = {"type": name, "value": round(pooled[name], 4), "name": name.replace("_", " ")}
    interval = pooled["intervals"][name]
    if interval is None:
        return metric
    low, high = (round(end, 4) for end in interval)
    metric["name"] += f", 95 % interval over patients {low} to {high}"
    return metric | {"args": {"interval": [low, high]}}
