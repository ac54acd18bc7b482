"""The job: a publisher's file of weights and statements to a bundle, without its code."""

import hashlib
import logging
from typing import Any

from torch import Tensor

from bcd import provenance, storage, taxonomy
from bcd.config.signing import ImportConfig
from bcd.errors import BundleError, ConfigError
from bcd.model import card, predictor, weights
from bcd.model.card import Card
from bcd.model.published import sources
from bcd.model.published.sources import BILINEAR, Classifier
from bcd.text import counted, without_folders

logger = logging.getLogger(__name__)


def run(config: ImportConfig) -> str:
    """Import a published classifier and return the `model_id` of its bundle.

    Raises:
        ConfigError: flags are missing or contradict the publisher's files, or the output is not empty.
        BundleError: the weights are not those of the architecture, or need what a bundle does not have.
        StorageError: a URI cannot be read or written.
    """
    source = sources.read_source(config)
    if storage.list_files_if_any(config.output):
        raise ConfigError(f"--output {config.output} is not empty: choose another, or move its files away")
    uri, size_px = storage.absolute(config.weights), (source.input_px, source.input_px)
    known = _card(config, source, hashlib.sha256(storage.read_bytes(uri)).hexdigest())
    state = weights.pretrained(uri, source.architecture, size_px)
    assert state is not None  # that is of a word, and an absolute path is none
    made = (source.architecture, size_px)
    n_features = weights.skeleton(2, *made).fc.in_features
    state = _with_head(state, source, n_features, uri)
    network = weights.build(len(known.classes), state, 0, *made).eval()
    identity = predictor.save(network, known, config.output)
    scale = f" at {source.mpp:g} µm/px" if source.mpp else ""
    logger.info(
        f"model {identity}: {source.architecture}, {', '.join(known.classes)}; tiles of {source.tile_px} px"
        f"{scale}: {config.output}"
    )
    logger.info(f"licence: {source.license}; to cite: {source.citation}")
    return identity


def _with_head(state: dict[str, Tensor], source: Classifier, n_features: int, uri: str) -> dict[str, Tensor]:
    """The tensors with the last layer in the order of the card. Of a network with one logit, whose
    probability is its sigmoid, the other class gets the logit 0: their softmax is the same."""
    n = len(source.classes)
    for name, shape in (("fc.weight", (n, n_features)), ("fc.bias", (n,))):
        found = state.get(name)
        if found is None or tuple(found.shape) != shape:
            have = "no such tensor" if found is None else f"shape {tuple(found.shape)}"
            raise BundleError(
                f"{uri}: {name} of the last layer: {have}; expected {shape}, of a {source.architecture} with "
                f"{counted(n, 'class', 'classes')}. Give the whole classifier, and the names of its classes"
            )
    head = {name: state[name] for name in ("fc.weight", "fc.bias")}
    if n == 1:
        head = {name: _against_zero(tensor) for name, tensor in head.items()}
    if n == 2 and source.classes[0] in source.malignant:
        head = {name: tensor.flip(0) for name, tensor in head.items()}
    return state | head


def _against_zero(tensor: Tensor) -> Tensor:
    paired = tensor.new_zeros((2, *tensor.shape[1:]))
    paired[1] = tensor[0]
    return paired


def _classes(source: Classifier) -> tuple[taxonomy.Target | str, tuple[str, ...]]:
    """Target and class names for the card."""
    if len(source.classes) <= 2:
        return "tumor_class", taxonomy.TUMOR_CLASSES
    names = (taxonomy.published_class(name, name in source.malignant) for name in source.classes)
    return taxonomy.PUBLISHED, tuple(names)


def _card(config: ImportConfig, source: Classifier, file_sha256: str) -> Card:
    target, classes = _classes(source)
    sides = {"input_height_px": source.input_px, "input_width_px": source.input_px}
    warnings = [
        "This model was trained by others: which images and patients it has seen is not known here, and "
        "images have no novelty"
    ]
    if source.interpolation != BILINEAR:
        warnings.append(
            f"Images of other sizes than {source.input_px} x {source.input_px} px are resized by {BILINEAR} "
            f"interpolation; its publisher uses {source.interpolation}"
        )
    settings = {"name": source.name, "data": source.trained_on, "weights": source.source}
    return card.make(
        architecture=source.architecture,
        target=target,
        classes=classes,
        **sides,
        mean=source.mean,
        std=source.std,
        field_height_px=source.tile_px,
        field_width_px=source.tile_px,
        mpp=(source.mpp,) if source.mpp else (),
        magnifications=(),
        leaky=False,
        synthetic=False,
        warnings=tuple(warnings),
        published=_statements(config, source, file_sha256),
        training=settings | sides | {"architecture": source.architecture},
        validation={},
        versions=provenance.versions(),
        git_commit=provenance.git_commit(),
    )


def _statements(config: ImportConfig, source: Classifier, file_sha256: str) -> dict[str, Any]:
    stated = [tuple(part.strip() for part in pair.split("=", 1)) for pair in config.stated]
    if bad := [pair for pair, parts in zip(config.stated, stated, strict=True) if len(parts) < 2]:
        raise ConfigError(f"--stated {bad[0]}: expected NAME=VALUE")
    words = {name: getattr(source, name) for name in (*sources.WORDS, "classes")}
    return words | {
        "file_sha256": file_sha256,
        "stated": tuple(stated),
        "stated_on": config.stated_on and without_folders(config.stated_on),
    }
