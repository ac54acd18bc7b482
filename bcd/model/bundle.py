"""The model bundle: weights, a card that machines read, and a README that people read.

    <uri>/model.safetensors   float32 tensors, names of torchvision's network
    <uri>/README.md           the card for people
    <uri>/card.json           written last: without it there is no bundle

What training decided (classes, input size, mean and std, threshold) stands in the card, so that training,
archives and the service cannot drift apart. Nothing in a bundle is ever unpickled.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib.resources import files

import jinja2
import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from bcd import storage
from bcd.errors import BundleError
from bcd.imaging import image
from bcd.model import cam, novelty, resnet, weights
from bcd.model.card import STRIDE_PX, Card, dump, model_id, parse_card
from bcd.model.network import ResNet, normalise

WEIGHTS, CARD, README = "model.safetensors", "card.json", "README.md"
NOT_FINITE = "not_finite"
NOT_FINITE_MESSAGE = (
    "the model's logits are not finite numbers, so there is no answer; use --precision float32, or another "
    "model"
)
# The canary's logits may differ from those in the card by this share of their summands' size: a thousand
# times what kernels, threads, folding and compiling differ by on CPUs, and a third of what bfloat16 does.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Prediction:
    """What a model says about a batch; float32 arrays.

    logit (n, classes) and probability (n, classes) in card order, probability_malignant (n,),
    predicted_class (n,) names, evidence (n, h, w) and evidence_bias (n,) as in `bcd.model.cam`, novelty (n,)
    as in `bcd.model.novelty`, NaN where the card has no statistics for it. Where a logit is not finite there
    is no class.
    """

    logit: np.ndarray
    probability: np.ndarray
    probability_malignant: np.ndarray
    predicted_class: list[str | None]
    evidence: np.ndarray
    evidence_bias: np.ndarray
    novelty: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """Bool (n,): whether all logits of a picture are numbers; without that there is no answer."""
        return np.isfinite(self.logit).all(1)

    def require_finite(self) -> None:
        """Raises ImageError `not_finite` unless every picture has an answer."""
        if not self.finite.all():
            raise image.ImageError(NOT_FINITE, NOT_FINITE_MESSAGE)

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
        stride = STRIDE_PX >> (len(cam.LAYERS) - 1 - cam.LAYERS.index(layer))
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
        probability = resnet.probability(logit)
        malignant = resnet.malignant_share(probability, self.card.classes)
        return Prediction(
            logit.numpy(),
            probability.numpy(),
            malignant.numpy(),
            self._decide(logit, probability, malignant),
            evidence.numpy(),
            bias.numpy(),
            self._novelty(output.pooled),
        )

    def predict_files(self, contents: Sequence[bytes]) -> Prediction:
        """Predict encoded pictures (PNG, JPEG, TIFF), as one batch.

        Raises:
            ImageError: one of them cannot be decoded; the message says which.
        """
        return self.predict(np.stack([self.fit(one) for one in _decoded(contents)]))

    @torch.inference_mode()
    def pooled(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pooled features (n, channels) and logits (n, classes), float32, of a batch as in `predict`."""
        output = self._output(self._normalised(images))
        return output.pooled.cpu().numpy(), output.logit.cpu().numpy()

    def _normalised(self, images: np.ndarray) -> torch.Tensor:
        batch = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)
        batch = normalise(batch, self.card.mean, self.card.std)
        return batch.contiguous(memory_format=torch.channels_last)

    def _output(self, batch: torch.Tensor) -> resnet.Output:
        with resnet.autocast(self.device, self.precision):
            return resnet.explained(self.network, self.features(batch))

    def _novelty(self, pooled: torch.Tensor) -> np.ndarray:
        statistics = self.card.feature_statistics
        if statistics is None:
            return np.full(len(pooled), np.nan, np.float32)
        return novelty.distance(pooled.cpu().numpy(), statistics.mean, statistics.spread)

    def _decide(
        self, logit: torch.Tensor, probability: torch.Tensor, malignant: torch.Tensor
    ) -> list[str | None]:
        # The operating threshold belongs to the two-class decision; among subtypes the likeliest wins.
        if self.card.target == "tumor_class":
            chosen = (malignant >= self.card.threshold).long()
        else:
            chosen = probability.argmax(1)
        known = logit.isfinite().all(1).tolist()
        return [self.card.classes[i] if ok else None for i, ok in zip(chosen.tolist(), known, strict=True)]

    @torch.inference_mode()
    def _canary(self) -> tuple[np.ndarray, float]:
        """Logits (classes,) of `canary` in float32, and the largest sum of their summands' sizes."""
        with torch.backends.cudnn.flags(allow_tf32=False):
            output = resnet.forward(self.network, self._normalised(canary()[None]))
        summand = (output.pooled.abs() @ self.network.fc.weight.abs().T).max()
        return output.logit[0].cpu().numpy(), float(summand)


def canary() -> np.ndarray:
    """An image, uint8 (64, 96, 3) RGB, of whole numbers by a formula: the same everywhere and always."""
    y, x, channel = np.ogrid[:64, :96, :3]
    return ((3 * y + 2 * x + (7 * channel + 5) * (x * y // 16)) % 256).astype(np.uint8)


def _decoded(contents: Sequence[bytes]) -> Iterator[np.ndarray]:
    for i, content in enumerate(contents):
        try:
            yield image.decode(content)
        except image.ImageError as error:
            message = f"image {i + 1} of {len(contents)}: {error.message}"
            raise image.ImageError(error.code, message) from error


def save(network: ResNet, card: Card, uri: str) -> str:
    """Write a bundle and return its `model_id`.

    Raises:
        BundleError: it could not be loaded again: weights or logits are not finite, or the card says what
            cannot be.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    content = save_safetensors(state)
    logit, _ = from_state(state, card)._canary()
    if not np.isfinite(logit).all():
        raise BundleError(f"{uri}: no bundle is written, because the model gives the logits {logit.tolist()}")
    facts = {"weights_sha256": hashlib.sha256(content).hexdigest(), "canary_logit": tuple(logit.tolist())}
    card = card.model_copy(update=facts)
    dump(card)  # before anything is written
    storage.write_bytes(storage.join(uri, WEIGHTS), content)
    write_card(card, uri)
    return model_id(card)


def write_card(card: Card, uri: str) -> None:
    """Write the card for people, then the one for machines, which makes the bundle complete."""
    storage.write_bytes(storage.join(uri, README), _readme(card).encode())
    storage.write_bytes(storage.join(uri, CARD), dump(card))


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
        BundleError: no bundle is there, it is not as it was written, or this machine does not compute with
            it what the machine did that wrote it.
        StorageError: the URI cannot be read.
    """
    card = read_card(uri)
    content = _read_weights(uri, card)
    try:
        state = weights.read_weights(content, WEIGHTS)
        network = resnet.assembled(len(card.classes), state, card.architecture)
    except BundleError as error:
        raise BundleError(f"{uri}: {error}") from error
    loaded = _ready(network, card, model_id(card), device, precision, compiled)
    _require_canary(loaded, uri)
    return loaded


def _require_canary(loaded: Bundle, uri: str) -> None:
    logit, summand = loaded._canary()
    expected = np.array(loaded.card.canary_logit)
    difference = float(np.abs(logit - expected).max())
    if not difference <= TOLERANCE * summand:  # NaN is no agreement
        raise BundleError(
            f"{uri}: for the bundle's canary image this machine computes the logits {logit.tolist()}, "
            f"expected {expected.tolist()} to within {TOLERANCE * summand:.2g}; try another device or "
            "another version of torch"
        )


def from_state(state: weights.State, card: Card) -> Bundle:
    """A bundle from weights in memory, in float32; it has no identity."""
    return _ready(
        resnet.assembled(len(card.classes), state, card.architecture), card, "", None, "float32", False
    )


def _ready(
    network: ResNet,
    card: Card,
    identity: str,
    device: str | torch.device | None,
    precision: str,
    compiled: bool,
) -> Bundle:
    resnet.set_precision(precision)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = resnet.temper(resnet.fold(network), card.temperature).requires_grad_(False)
    network = network.to(where).to(memory_format=torch.channels_last)
    features = resnet.compiled_features(network) if compiled else partial(resnet.features, network)
    return Bundle(card, identity, network, features, where, precision)


def read_card(uri: str) -> Card:
    """Read and validate `card.json`.

    Raises:
        BundleError: no bundle is there, or it has no valid card of this format.
    """
    if not is_complete(uri):
        raise BundleError(f"{uri}: no model bundle there; expected {CARD}, {WEIGHTS} and {README}")
    card = parse_card(storage.read_bytes(storage.join(uri, CARD)), uri)
    if not (card.weights_sha256 and card.canary_logit):
        raise BundleError(f"{uri}: the model card lacks the hash of the weights or the canary's logits")
    return card


def identify(uri: str) -> str:
    """The `model_id` of the bundle at a URI, whose card and weights are as they were written.

    Raises:
        BundleError: no bundle is there, or it is damaged.
    """
    card = read_card(uri)
    _read_weights(uri, card)
    return model_id(card)


def read_same(uri: str, identity: str) -> Card:
    """The card of the bundle that a job began with.

    Raises:
        BundleError: the URI contains another model now.
    """
    card = read_card(uri)
    require_same(uri, identity, model_id(card))
    return card


def require_same(uri: str, began: str, now: str) -> None:
    """Raises BundleError where the model that a job began with is no longer the one at the URI."""
    if now != began:
        raise BundleError(
            f"{uri} has changed since the start: the model was {began}, now it is {now}. Restore the first "
            "and run the same command again, or start again (a scoring job with another --output)"
        )


def _read_weights(uri: str, card: Card) -> bytes:
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
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(card=card, model_id=model_id(card))
