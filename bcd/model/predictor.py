"""A model ready to predict: the network of a bundle, from image to probability, evidence and novelty."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from bcd import storage
from bcd.config.options import CLOSED_FORM, Engine
from bcd.errors import NOT_FINITE, NOT_FINITE_MESSAGE, BundleError, ImageError
from bcd.imaging import decoder, image
from bcd.model import bundle, cam, novelty, resnet, weights
from bcd.model.card import GRADCAM, LAST_LAYER, STRIDE_PX, Card, dump, model_id
from bcd.model.engines.choice import COMPILED, OPENVINO, TORCH, choose_engine
from bcd.model.engines.openvino_engine import OpenVinoFeatures
from bcd.model.networks.backbone import Backbone
from bcd.model.networks.ensemble import Ensemble
from bcd.model.recipes import stain, symmetries
from bcd.model.resnet import Network, normalise
from bcd.taxonomy import malignant_mask

# The canary's logits may differ from those in the card by this share of their summands' size: a thousand
# times the differences of kernels, threads, folding and compiling on CPUs, a third of that of bfloat16.
TOLERANCE = 1e-4
# The same for an engine in bfloat16: ten times the most that was seen.
TOLERANCE_BFLOAT16 = 1e-2
CANARY_PX = (64, 96)


@dataclass(frozen=True)
class Prediction:
    """The prediction for a batch; float32 arrays.

    logit (n, classes) and probability (n, classes) in card order, probability_malignant (n,),
    predicted_class (n,) names, None where a logit is not finite, evidence (n, h, w) and evidence_bias (n,) as
    in `bcd.model.cam`, the bias NaN where mean and bias do not add up to the log-odds, novelty (n,) as in
    `bcd.model.novelty`, NaN where the card has no statistics for it, pooled (n, channels), the features that
    enter the last layer, log_odds_sd (n,), the standard deviation over the members of an ensemble of their
    log-odds of malignancy, NaN for a single network.
    """

    logit: np.ndarray
    probability: np.ndarray
    probability_malignant: np.ndarray
    predicted_class: list[str | None]
    evidence: np.ndarray
    evidence_bias: np.ndarray
    novelty: np.ndarray
    pooled: np.ndarray
    log_odds_sd: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """Bool (n,): whether all logits of an image are finite."""
        return np.isfinite(self.logit).all(1)

    def require_finite(self) -> None:
        """Raise ImageError `not_finite` unless all logits are finite."""
        if not self.finite.all():
            raise ImageError(NOT_FINITE, NOT_FINITE_MESSAGE)

    def rows(self) -> list["Prediction"]:
        """One prediction for each image, as arrays of one row."""
        columns = [getattr(self, field.name) for field in fields(self)]
        return [Prediction(*(column[i : i + 1] for column in columns)) for i in range(len(self.logit))]


@dataclass(frozen=True)
class Predictor:
    """A model ready to predict, from `load`. Batch norms are folded into the convolutions, and the
    temperature into the last layer. `engine` is the value of that column."""

    card: Card
    model_id: str
    network: Network
    features: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device
    precision: str
    engine: str = TORCH

    def evidence_size(self, layer: str = LAST_LAYER) -> tuple[int, int]:
        """Height and width, in cells, of the maps over a layer's features."""
        if isinstance(self.network, Backbone):
            return self.network.layout.height, self.network.layout.width
        stride = STRIDE_PX >> (len(cam.LAYERS) - 1 - cam.LAYERS.index(layer))
        return -(-self.card.input_height_px // stride), -(-self.card.input_width_px // stride)

    def fit(self, pixels: np.ndarray) -> np.ndarray:
        """Fit a decoded image (h, w, 3) into the input size (height, width, 3); both uint8 RGB."""
        return image.fit(pixels, *self.card.input_size_px)

    def stage(self, n: int) -> np.ndarray:
        """Memory for a batch of n images (n, height, width, 3), uint8, from which a GPU copies by itself."""
        shape = (n, *self.card.input_size_px, 3)
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda").numpy()

    @torch.inference_mode()
    def predict(self, images: np.ndarray, method: str = CLOSED_FORM, layer: str = LAST_LAYER) -> Prediction:
        """Predict a batch of uint8 (n, height, width, 3) RGB from `fit`.

        `method` of the evidence is the closed form, or one of `cam.METHODS`: these explain the features of
        `layer`, and `evidence_bias` is NaN, because their maps do not add up to the log-odds. A network
        without a closed form has Grad-CAM in its place, see `Card.evidence`. Raises ConfigError for a method
        that the model does not have, see `Card.cam`.
        """
        method = self.card.cam(method, layer)
        batch = self._normalised(images)
        output = self._output(batch)
        maps = output.logit.new_zeros(0), output.logit.new_full((len(images),), torch.nan)
        if method == CLOSED_FORM and output.evidence is not None and output.evidence_bias is not None:
            maps = output.evidence, output.evidence_bias
        deviation = self._log_odds_sd(output)
        logit, pooled, deviation, evidence, bias = _on_cpu(output.logit, output.pooled, deviation, *maps)
        if method != CLOSED_FORM:
            layer = self.network.layout.layer if isinstance(self.network, Backbone) else layer
            evidence = cam.explain(self.network, batch, method, layer, output.logit.argmax(1))
        probability = probabilities(logit)
        malignant = malignant_share(probability, self.card.classes)
        return Prediction(
            logit.numpy(),
            probability.numpy(),
            malignant.numpy(),
            self._decide(logit, probability, malignant),
            evidence.numpy(),
            bias.numpy(),
            self._novelty(pooled.numpy()),
            pooled.numpy(),
            deviation.numpy(),
        )

    def predict_files(self, contents: Sequence[bytes]) -> Prediction:
        """Predict encoded images (PNG, JPEG, TIFF), as one batch. Raises ImageError where one of them cannot
        be decoded; the message says which."""
        return self.predict(np.stack([self.fit(one) for one in _decoded(contents)]))

    @torch.inference_mode()
    def pooled(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pooled features (n, channels) and logits (n, classes), float32, of a batch as in `predict`."""
        output = self._output(self._normalised(images))
        return output.pooled.cpu().numpy(), output.logit.cpu().numpy()

    def _normalised(self, images: np.ndarray, is_stained: bool = True) -> torch.Tensor:
        batch = torch.from_numpy(images).to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        batch = stain.transform(batch, self.card.stain if is_stained else None)
        batch = normalise(batch, self.card.mean, self.card.std)
        return batch.contiguous(memory_format=torch.channels_last)

    def _output(self, batch: torch.Tensor) -> resnet.Output:
        with resnet.autocast(self.device, self.precision):
            return resnet.explained(self.network, self.features(batch))

    def _log_odds_sd(self, output: resnet.Output) -> torch.Tensor:
        if not isinstance(self.network, Ensemble):
            return torch.full_like(output.logit[:, 0], torch.nan)
        logit, malignant = self.network.logits(output.pooled), malignant_mask(self.card.classes)
        benign = [not each for each in malignant]
        return (logit[..., malignant].logsumexp(-1) - logit[..., benign].logsumexp(-1)).std(1)

    def _novelty(self, pooled: np.ndarray) -> np.ndarray:
        statistics = self.card.feature_statistics
        if statistics is None:
            return np.full(len(pooled), np.nan, np.float32)
        return novelty.distance(pooled, statistics.mean, statistics.spread)

    def _decide(
        self, logit: torch.Tensor, probability: torch.Tensor, malignant: torch.Tensor
    ) -> list[str | None]:
        # The threshold is for two classes; of the subtypes the most probable is predicted.
        is_binary = self.card.target == "tumor_class"
        chosen = (malignant >= self.card.threshold).long() if is_binary else probability.argmax(1)
        known = logit.isfinite().all(1).tolist()
        return [self.card.classes[i] if ok else None for i, ok in zip(chosen.tolist(), known, strict=True)]

    @torch.inference_mode()
    def _canary(self) -> tuple[np.ndarray, float]:
        """Logits (classes,) of `canary` in float32, and the largest sum of their absolute summands.

        Raises BundleError where a map in closed form does not add up.
        """
        first = self.network.members[0] if isinstance(self.network, Ensemble) else self.network
        size = first.size_px if isinstance(first, Backbone) else CANARY_PX
        batch = self._normalised(canary(*size)[None], is_stained=False)
        with torch.backends.cudnn.flags(allow_tf32=False):
            output = resnet.forward(self.network, batch)
            # The network's own forward pass, which knows nothing of maps.
            direct: Callable[[torch.Tensor], torch.Tensor] = self.network
            if isinstance(self.network, Backbone):
                direct = self.network.direct
            explained = cam.quantity(direct(batch)[0], int(output.logit.argmax()))
        summand = self._summand(output)
        if output.evidence is not None and output.evidence_bias is not None:
            total = output.evidence.mean() + output.evidence_bias[0]
            if abs(float(total - explained)) > 2 * TOLERANCE * summand:
                raise BundleError(
                    f"{self.card.architecture}: mean and bias of the evidence map of the canary image are "
                    f"{float(total):.6g}, expected its log-odds, {float(explained):.6g}"
                )
        return output.logit[0].cpu().numpy(), summand

    def _summand(self, output: resnet.Output) -> float:
        return float((output.pooled.abs() @ self.network.fc.weight.abs().T).max())

    @property
    def kind_of_evidence(self) -> str:
        """What `Card.evidence` states, as the network is."""
        return CLOSED_FORM if resnet.has_closed_form(self.network) else GRADCAM


def _on_cpu(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copies of tensors of one type, in one transfer, for which a GPU is waited for once."""
    sizes = [tensor.numel() for tensor in tensors]
    parts = torch.cat([tensor.flatten() for tensor in tensors]).cpu().split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def probabilities(logit: torch.Tensor) -> torch.Tensor:
    """Logits (n, classes) to probabilities (n, classes)."""
    return logit.softmax(1)


def malignant_share(given: torch.Tensor, class_names: tuple[str, ...]) -> torch.Tensor:
    """Probability of malignancy (n,): that of the class, or the sum over malignant subtypes."""
    return given[:, torch.tensor(malignant_mask(class_names))].sum(1)


def canary(height: int = CANARY_PX[0], width: int = CANARY_PX[1]) -> np.ndarray:
    """A test image, uint8 (height, width, 3) RGB, from an integer formula: the same on every machine.

    Networks of timm may have a fixed size of their input, which it then has.
    """
    y, x, channel = np.ogrid[:height, :width, :3]
    return ((3 * y + 2 * x + (7 * channel + 5) * (x * y // 16)) % 256).astype(np.uint8)


def _decoded(contents: Sequence[bytes]) -> Iterator[np.ndarray]:
    for i, content in enumerate(contents):
        try:
            yield decoder.decode_safely(content)
        except ImageError as error:
            raise ImageError(error.code, f"image {i + 1} of {len(contents)}: {error.message}") from error


def save(network: Network, card: Card, uri: str) -> str:
    """Write a bundle and return its `model_id`. Raises BundleError where it could not be loaded again:
    weights or logits are not finite, or the card is invalid."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    content = save_safetensors(state)
    made = from_state(state, card)
    logit, _ = made._canary()
    if not np.isfinite(logit).all():
        raise BundleError(f"{uri}: no bundle is written, because the model gives the logits {logit.tolist()}")
    facts = {"weights_sha256": hashlib.sha256(content).hexdigest(), "canary_logit": tuple(logit.tolist())}
    card = card.model_copy(update=facts | {"evidence": made.card.evidence})
    dump(card)  # before anything is written
    bundle.write_bundle(content, card, uri)
    return model_id(card)


def load(
    uri: str,
    device: str | torch.device | None = None,
    precision: str = "float32",
    compiled: bool = False,
    card_sha256: str | None = None,
    engine: Engine = TORCH,
) -> Predictor:
    """Load a bundle from a local folder, s3://, gs:// or hf://OWNER/NAME[@REVISION], ready to predict.

    Args:
        uri: of the bundle.
        device: by default the GPU where there is one.
        precision: `float32` (the same numbers on every machine), `bfloat16`, or `auto`.
        compiled: compile for batches of one size, which takes a minute at the first batch.
        card_sha256: of the card of a verified bundle, from `bcd.preflight.signing.verify`: any other bundle
            is rejected before its weights are read.
        engine: `torch`, or `openvino`, which computes on CPUs whatever the device; `auto` is the latter where
            it can be, without a GPU, see `choose_engine`.

    Raises:
        BundleError: there is no bundle, it was changed, or this machine or engine computes other logits than
            the machine that wrote it.
        ConfigError: the engine is not installed, or cannot compute this network.
        StorageError: the URI cannot be read.
    """
    uri = storage.pinned(uri)
    card = bundle.read_card(uri, card_sha256)
    content = bundle.read_weights_of(uri, card)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    by_openvino = choose_engine(engine, card.architecture, card.evidence, where.type == "cuda") == OPENVINO
    try:
        state = weights.read_weights(content, bundle.WEIGHTS)
        given = "cpu" if by_openvino else where, precision, compiled and not by_openvino
        loaded = _ready(_network(state, card), card, model_id(card), *given)
        _require_canary(loaded)
        loaded = _by_openvino(loaded) if by_openvino else loaded
    except BundleError as error:
        raise BundleError(f"{uri}: {error}") from error
    return loaded


def _require_canary(loaded: Predictor) -> None:
    if loaded.kind_of_evidence != loaded.card.evidence:
        raise BundleError(
            f"the card states {loaded.card.evidence!r} as evidence, but {loaded.card.architecture} has "
            f"{loaded.kind_of_evidence!r}"
        )
    logit, summand = loaded._canary()
    expected = np.array(loaded.card.canary_logit)
    if not np.abs(logit - expected).max() <= TOLERANCE * summand:  # NaN is no agreement
        raise BundleError(
            f"for the bundle's canary image this machine computes the logits {logit.tolist()}, "
            f"expected {expected.tolist()} to within {TOLERANCE * summand:.2g}; try another device or "
            "another version of torch"
        )


@torch.inference_mode()
def _by_openvino(loaded: Predictor) -> Predictor:
    """The predictor with features by OpenVINO, if these give torch's logits of a canary image of the size of
    the network's input; torch's logits are known to be those of the card."""
    card, network = loaded.card, loaded.network
    precision = resnet.effective_precision(loaded.device, loaded.precision)
    features = OpenVinoFeatures(network, precision)
    batch = loaded._normalised(canary(*card.input_size_px)[None], is_stained=False)
    expected, found = (
        resnet.explained(network, each(batch)) for each in (partial(resnet.features, network), features)
    )
    limit = (TOLERANCE if precision == "float32" else TOLERANCE_BFLOAT16) * loaded._summand(expected)
    if not (found.logit - expected.logit).abs().max() <= limit:
        raise BundleError(
            f"for a canary image --engine {OPENVINO} computes the logits {found.logit[0].tolist()} in "
            f"{precision}, expected {expected.logit[0].tolist()} to within {limit:.2g}; use --engine {TORCH}"
        )
    averaged = symmetries.averaged(features) if card.symmetries else features
    return replace(loaded, features=averaged, engine=OPENVINO)


def from_state(state: weights.State, card: Card) -> Predictor:
    """A predictor from weights in memory, in float32, without a `model_id`."""
    made = _ready(_network(state, card), card)
    return replace(made, card=card.model_copy(update={"evidence": made.kind_of_evidence}))


def _network(state: weights.State, card: Card) -> Network:
    size = card.input_size_px
    network = weights.assembled(len(card.classes), state, card.architecture, size, card.n_members)
    known = card.feature_statistics
    if known and len(known.mean) != network.fc.in_features:
        n = network.fc.in_features
        raise BundleError(f"the model card has statistics of {len(known.mean)} features, expected {n}")
    return network


def _ready(
    network: Network,
    card: Card,
    identity: str = "",
    device: str | torch.device | None = None,
    precision: str = "float32",
    compiled: bool = False,
) -> Predictor:
    resnet.set_precision(precision)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = resnet.temper(resnet.fold(network), card.temperature).requires_grad_(False)
    network = network.to(where).to(memory_format=torch.channels_last)
    # Found before the network is compiled or shared by threads.
    if not resnet.has_closed_form(network) and card.symmetries:
        raise BundleError(
            f"{card.architecture}: orientations are averaged over maps in closed form, and it has none"
        )
    features = resnet.compiled_features(network) if compiled else partial(resnet.features, network)
    features = symmetries.averaged(features) if card.symmetries else features
    return Predictor(card, identity, network, features, where, precision, COMPILED if compiled else TORCH)
