"""The model bundle: weights, a card that machines read, and a README that people read.

    <uri>/model.safetensors   float32 tensors, names of torchvision's resnet50
    <uri>/README.md           the card for people
    <uri>/card.json           written last: without it there is no bundle

What training decided (classes, input size, mean and std, threshold) stands in the card, so that training,
archives and the service cannot drift apart. Nothing in a bundle is ever unpickled.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torchvision.models import ResNet

from bcd import cam, image, model, novelty, storage, transform
from bcd.errors import BundleError
from bcd.novelty import FeatureStatistics
from bcd.taxonomy import Target

WEIGHTS, CARD, README = "model.safetensors", "card.json", "README.md"
FORMAT_VERSION = 1


class Card(BaseModel):
    """What is known about a model; everything that decides a prediction, and where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    format_version: int = FORMAT_VERSION
    architecture: str = model.ARCHITECTURE
    target: Target
    classes: tuple[str, ...]
    """Class names in the order of the logits."""
    input_height_px: int
    input_width_px: int
    mean: tuple[float, float, float] = image.IMAGENET_MEAN
    std: tuple[float, float, float] = image.IMAGENET_STD
    field_height_px: int
    """Height of the usual training field in its own pixels: slides are tiled alike."""
    field_width_px: int
    """Width of the usual training field in its own pixels."""
    mpp: tuple[float, ...]
    """µm per pixel of the fields seen in training, where known."""
    magnifications: tuple[int, ...]
    """BreaKHis magnifications seen in training, where known."""
    temperature: float = 1.0
    """Divides the logits of the weights, so that probabilities mean what they say; fitted on validation."""
    threshold: float = 0.5
    """Probability of malignancy from which a picture is called malignant; chosen on validation."""
    operating_point: dict[str, Any] = {}
    """How the threshold was chosen, and what it reaches on validation: see `bcd.decision.choose`."""
    calibration: dict[str, float] = {}
    """On validation, before and after the temperature: cross-entropy, Brier score, calibration error."""
    protocol: str
    fold: int | None = None
    seed: int
    data_fingerprint: str
    """Hash over the ids, sizes and classes of the images that the split was made from."""
    split_fingerprint: str
    """Hash over which image stands in which part."""
    leaky: bool
    """Whether patients may stand on two sides of the split: such numbers mislead."""
    synthetic: bool
    """Whether the training images are made up: such numbers say nothing about tissue."""
    feature_statistics: FeatureStatistics | None = None
    """Of the pooled features over the training pictures: they tell how unlike those a new picture is."""
    training: dict[str, Any]
    """All settings of the training run; an evaluation makes the split from them again."""
    validation: dict[str, float]
    """The best epoch, and what it reached on the validation part."""
    metrics: dict[str, Any] = {}
    """Measured on the test part, with intervals."""
    versions: dict[str, str]
    git_commit: str | None


@dataclass(frozen=True)
class Prediction:
    """What a model says about a batch; float32 arrays.

    logit (n, classes) and probability (n, classes) in card order, probability_malignant (n,),
    predicted_class (n,) names, evidence (n, h, w) and evidence_bias (n,) as in `bcd.cam`, novelty (n,) as in
    `bcd.novelty`, NaN where the card has no statistics for it.
    """

    logit: np.ndarray
    probability: np.ndarray
    probability_malignant: np.ndarray
    predicted_class: list[str]
    evidence: np.ndarray
    evidence_bias: np.ndarray
    novelty: np.ndarray

    def rows(self) -> list["Prediction"]:
        """One prediction for each picture, still as arrays of one row."""
        columns = [getattr(self, field.name) for field in fields(self)]
        return [Prediction(*(column[i : i + 1] for column in columns)) for i in range(len(self.logit))]


@dataclass(frozen=True)
class Bundle:
    """A model ready to predict: `load` makes one. Batch norms are folded into the convolutions, and the
    temperature into the last layer."""

    card: Card
    model_id: str
    network: ResNet
    features: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device
    precision: str

    def evidence_size(self, layer: str = cam.LAYERS[-1]) -> tuple[int, int]:
        """Height and width in cells of the maps over a layer's features."""
        stride = cam.STRIDE_PX >> (len(cam.LAYERS) - 1 - cam.LAYERS.index(layer))
        return -(-self.card.input_height_px // stride), -(-self.card.input_width_px // stride)

    def fit(self, pixels: np.ndarray) -> np.ndarray:
        """Bring a decoded picture (h, w, 3) into the input size (height, width, 3); both uint8 RGB."""
        return image.fit(pixels, self.card.input_height_px, self.card.input_width_px)

    @torch.inference_mode()
    def predict(
        self, images: np.ndarray, method: str = cam.CLOSED_FORM, layer: str = cam.LAYERS[-1]
    ) -> Prediction:
        """Predict a batch.

        Args:
            images: uint8 (n, height, width, 3) RGB from `fit`.
            method: of the evidence: the closed form, or one of `cam.METHODS`; with these `evidence_bias` is
                NaN, because their maps do not add up to the log-odds.
            layer: whose features a method of `cam.METHODS` explains.
        """
        batch = self._normalised(images)
        output = self._output(batch)
        evidence, bias = output.evidence.cpu(), output.evidence_bias.cpu()
        if method != cam.CLOSED_FORM:
            evidence = cam.explain(self.network, batch, method, layer, output.logit.argmax(1))
            bias = torch.full_like(bias, torch.nan)
        logit = output.logit.cpu()
        probability = model.probability(logit)
        malignant = model.probability_malignant(probability, self.card.classes)
        return Prediction(
            logit.numpy(),
            probability.numpy(),
            malignant.numpy(),
            self._decide(probability, malignant),
            evidence.numpy(),
            bias.numpy(),
            self._novelty(output.pooled),
        )

    def predict_files(self, contents: Sequence[bytes]) -> Prediction:
        """Predict encoded pictures (PNG, JPEG, TIFF), as one batch.

        Raises:
            ImageError: one of them cannot be decoded.
        """
        return self.predict(np.stack([self.fit(image.decode(content)) for content in contents]))

    @torch.inference_mode()
    def pooled(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pooled features (n, channels) and logits (n, classes), float32, of a batch as in `predict`."""
        output = self._output(self._normalised(images))
        return output.pooled.cpu().numpy(), output.logit.cpu().numpy()

    def _normalised(self, images: np.ndarray) -> torch.Tensor:
        batch = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)
        batch = transform.normalise(batch, self.card.mean, self.card.std)
        return batch.contiguous(memory_format=torch.channels_last)

    def _output(self, batch: torch.Tensor) -> model.Output:
        with model.autocast(self.device, self.precision):
            return model.explained(self.network, self.features(batch))

    def _novelty(self, pooled: torch.Tensor) -> np.ndarray:
        statistics = self.card.feature_statistics
        if statistics is None:
            return np.full(len(pooled), np.nan, np.float32)
        return novelty.distance(pooled.cpu().numpy(), statistics.mean, statistics.spread)

    def _decide(self, probability: torch.Tensor, malignant: torch.Tensor) -> list[str]:
        # The operating threshold belongs to the two-class decision; among subtypes the likeliest wins.
        if self.card.target == "tumor_class":
            chosen = (malignant >= self.card.threshold).long()
        else:
            chosen = probability.argmax(1)
        return [self.card.classes[i] for i in chosen.tolist()]


def save(network: ResNet, card: Card, uri: str) -> str:
    """Write a bundle and return its `model_id`."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    weights = save_safetensors(state)
    storage.write_bytes(storage.join(uri, WEIGHTS), weights)
    write_card(card, uri, identity := model_id(weights, card))
    return identity


def write_card(card: Card, uri: str, identity: str) -> None:
    """Write the card for people, then the one for machines, which makes the bundle complete."""
    storage.write_bytes(storage.join(uri, README), _readme(card, identity).encode())
    storage.write_bytes(storage.join(uri, CARD), card.model_dump_json(indent=2).encode())


def is_complete(uri: str) -> bool:
    """Whether a whole bundle stands at the URI."""
    return storage.exists(storage.join(uri, CARD))


def load(
    uri: str, device: str | torch.device | None = None, precision: str = "float32", compiled: bool = False
) -> Bundle:
    """Load a bundle from a local folder, s3:// or gs://, ready to predict.

    Args:
        uri: of the bundle.
        device: by default the GPU where there is one.
        precision: `float32` (the same numbers everywhere), `bfloat16`, or `auto`.
        compiled: spend a minute on compiling, at the first batch, for batches of one size.

    Raises:
        BundleError: no bundle is there, or it is damaged.
        StorageError: the URI cannot be read.
    """
    card = read_card(uri)
    weights = storage.read_bytes(storage.join(uri, WEIGHTS))
    try:
        network = model.build(len(card.classes))
        network.load_state_dict(load_safetensors(weights))
    except (SafetensorError, RuntimeError) as error:
        raise BundleError(f"{uri}: {WEIGHTS} is damaged or of another model: {error}") from error
    return _ready(network, card, model_id(weights, card), device, precision, compiled)


def from_state(state: model.State, card: Card) -> Bundle:
    """A bundle from weights in memory, in float32; it has no identity."""
    return _ready(model.build(len(card.classes), state), card, "", None, "float32", False)


def _ready(
    network: ResNet,
    card: Card,
    identity: str,
    device: str | torch.device | None,
    precision: str,
    compiled: bool,
) -> Bundle:
    model.set_precision(precision)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = model.temper(model.fold(network), card.temperature).requires_grad_(False)
    network = network.to(where).to(memory_format=torch.channels_last)
    features = model.compiled_features(network) if compiled else partial(model.features, network)
    return Bundle(card, identity, network, features, where, precision)


def read_card(uri: str) -> Card:
    """Read and validate `card.json`.

    Raises:
        BundleError: no bundle is there, it has no valid card, or one of a newer format.
    """
    if not is_complete(uri):
        raise BundleError(f"{uri}: no model bundle there; expected {CARD}, {WEIGHTS} and {README}")
    try:
        content = json.loads(storage.read_bytes(storage.join(uri, CARD)))
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise BundleError(f"{uri}: card format {version}; this version reads {FORMAT_VERSION}")
        return Card.model_validate(content)
    except (json.JSONDecodeError, ValidationError, AttributeError) as error:
        raise BundleError(f"{uri}: {CARD} is not a valid model card: {error}") from error


def identify(uri: str) -> str:
    """The `model_id` of the bundle at a URI.

    Raises:
        BundleError: no bundle is there, or it is damaged.
    """
    card = read_card(uri)
    return model_id(storage.read_bytes(storage.join(uri, WEIGHTS)), card)


def model_id(weights: bytes, card: Card) -> str:
    """Hash over the weights and the card, without the metrics, which are measured later."""
    facts = card.model_dump_json(exclude={"metrics"})
    return hashlib.sha256(hashlib.sha256(weights).digest() + facts.encode()).hexdigest()[:16]


def _readme(card: Card, identity: str) -> str:
    template = files("bcd").joinpath("templates", "model_card.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(card=card, model_id=identity)
