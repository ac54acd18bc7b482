"""A bundle as an ONNX file, for programs of others: logits, pooled features and evidence of an image."""

import json
import logging
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bcd import provenance, schema, storage
from bcd.config.options import CLOSED_FORM
from bcd.config.signing import ExportConfig
from bcd.errors import BundleError, ConfigError
from bcd.imaging import image
from bcd.model import predictor, resnet
from bcd.model.card import Card
from bcd.model.predictor import Predictor
from bcd.text import RESEARCH_ONLY, size

logger = logging.getLogger(__name__)

# Runs in onnxruntime from 1.17 on.
OPSET = 20
INPUT = "image"
# The last two where the model has evidence in closed form.
OUTPUTS = (schema.LOGIT, schema.EMBEDDING, schema.EVIDENCE, schema.EVIDENCE_BIAS)
# Of the numbers of the canary image, or of the largest of an output where that is above 1.
MOST_DIFFERENCE = 1e-4
# A file of protobuf has less than 2 GiB; a part is for the graph.
MOST_BYTES = 2**31 - 2**24


def run(config: ExportConfig) -> str:
    """Export a bundle and return the URI of the file.

    Raises:
        ConfigError: a package is missing, the output exists, or the model has no form in ONNX.
        BundleError: there is no bundle, or the file does not give its numbers.
        StorageError: a URI cannot be read or written.
    """
    onnx = _library("onnx")
    _library("onnxscript")  # which torch needs
    storage.require_writable(config.output)
    if storage.exists(config.output):
        raise ConfigError(f"{config.output} exists: choose another name, or move it away")
    loaded = predictor.load(config.bundle, "cpu")
    model = exported(loaded)
    largest = _require_equal(onnx, model, loaded)
    content = model.SerializeToString()
    storage.write_bytes(config.output, content)
    logger.info(
        f"{config.output}: model {loaded.model_id}, opset {OPSET}, {size(len(content))}; {RESEARCH_ONLY} The "
        f"numbers of the canary image differ from torch's by at most {largest:.1e}"
    )
    return config.output


def exported(loaded: Predictor) -> Any:
    """The model as a protobuf of ONNX: of a batch of any size, with what its user has to know as metadata.

    Raises:
        ConfigError: the images' stain is normalised, for which ONNX has no operations, or it is too large.
    """
    card = loaded.card
    if card.stain:
        raise ConfigError(
            f"the model normalises the stain of each image ({card.stain.method}), for which ONNX has no "
            "operations: use bcd itself, or train without --stain-normalisation"
        )
    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in loaded.network.state_dict().values())
    if n_bytes > MOST_BYTES:
        raise ConfigError(
            f"the weights have {size(n_bytes)}, and a file of ONNX at most {size(MOST_BYTES)}: export the "
            "bundle of one fold"
        )
    program = torch.onnx.export(
        _Whole(loaded).eval(),
        (_canary(loaded).repeat(2, 1, 1, 1),),
        dynamo=True,
        input_names=[INPUT],
        output_names=list(_outputs(card)),
        dynamic_shapes=({0: torch.export.Dim("n")},),
        opset_version=OPSET,
        external_data=False,
        verbose=False,
    )
    assert program is not None
    return _described(program.model_proto, loaded)


class _Whole(nn.Module):
    """All that follows from the normalised images, as a module, which is what torch exports."""

    def __init__(self, loaded: Predictor) -> None:
        super().__init__()
        self.network, self._features = loaded.network, loaded.features

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = resnet.explained(self.network, self._features(image))
        every = found.logit, found.pooled, found.evidence, found.evidence_bias
        return tuple(one for one in every if one is not None)


def _outputs(card: Card) -> tuple[str, ...]:
    return OUTPUTS if card.evidence == CLOSED_FORM else OUTPUTS[:2]


def _canary(loaded: Predictor) -> Tensor:
    height, width = loaded.card.input_size_px
    pixels = torch.from_numpy(predictor.canary(height, width)).permute(2, 0, 1)[None]
    return resnet.normalise(pixels, loaded.card.mean, loaded.card.std)


def _require_equal(onnx: Any, model: Any, loaded: Predictor) -> float:
    """The largest difference between the file's numbers, by ONNX's own reference, and torch's."""
    onnx.checker.check_model(model, full_check=True)
    images, largest = _canary(loaded), 0.0
    with torch.inference_mode():
        expected = _Whole(loaded)(images)
    evaluator = import_module("onnx.reference").ReferenceEvaluator(model)
    found = evaluator.run(None, {INPUT: images.numpy()})
    for name, ours, theirs in zip(_outputs(loaded.card), expected, found, strict=True):
        difference = float(np.abs(ours.numpy() - theirs).max())
        if not difference <= MOST_DIFFERENCE * max(1.0, float(ours.abs().max())):  # NaN is no agreement
            raise BundleError(
                f"{name} of the canary image differs by {difference:.2g} between ONNX and torch, expected at "
                f"most {MOST_DIFFERENCE:g}: no file is written; try another version of torch or onnxscript"
            )
        largest = max(largest, difference)
    return largest


def _described(model: Any, loaded: Predictor) -> Any:
    """The model with its metadata, and without torch's, which name paths of this machine."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    card = loaded.card
    names = ("architecture", "target", "classes", "input_height_px", "input_width_px", "mean", "std", "mpp")
    facts = {name: json.dumps(getattr(card, name)) for name in (*names, "threshold")}
    facts |= {
        schema.MODEL_ID: loaded.model_id,
        "input": "float32 (n, 3, height, width): red, green and blue, each (value / 255 - mean) / std, of "
        f"the whole image, resized with its aspect ratio kept and centred on a ground of {image.FILL}",
        "use": RESEARCH_ONLY,
    }
    if license_id := card.bundle_license or (card.published and card.published.license):
        facts["license"] = license_id
    graph.name, model.doc_string = f"bcd model {loaded.model_id}", RESEARCH_ONLY
    model.producer_name, model.producer_version = "bcd", provenance.own_version()
    _library("onnx").helper.set_model_props(model, facts)
    return model


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"the export requires packages that are not installed ({error.name} is missing); run: "
            "pip install onnx onnxscript"
        ) from None
