"""How MLflow loads a model bundle: `mlflow.pyfunc.load_model(uri).predict(images)`, without Ray.

A logged model names this module as its loader; its data are the files of the bundle, as they were written.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from bcd import provenance, schema
from bcd.data import read
from bcd.errors import NOT_FINITE, NOT_FINITE_MESSAGE, ConfigError, ImageError
from bcd.imaging import decoder
from bcd.model import novelty

if TYPE_CHECKING:
    from bcd.model.predictor import Prediction, Predictor

BATCH = 32
# An image file: its path or URI, or its content.
Given = str | Path | bytes


class BundleModel:
    """The object behind MLflow's: a bundle, and the prediction of a table."""

    def __init__(self, loaded: "Predictor") -> None:
        self._loaded = loaded

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row with the columns of the predictions table (`schema.predictions`) for each image, in order.

        Args:
            model_input: PNG, JPEG or TIFF files: a list of paths, URIs or contents (bytes), or a DataFrame
                with them in the column `image`, or in its only one.
            params: of MLflow's interface; there are none.

        Raises:
            ConfigError: the input has another form. A broken image is a row with its `error`.
        """
        given = _images(model_input)
        rows = [row for at in range(0, len(given), BATCH) for row in self._rows(given[at : at + BATCH], at)]
        form = schema.predictions(*self._loaded.evidence_size())
        return pa.Table.from_pylist(rows, form).to_pandas()

    def _rows(self, given: Sequence[Given], first: int) -> Iterator[dict[str, Any]]:
        read_rows = list(_read(given, first))
        images = [self._loaded.fit(pixels) for _, pixels in read_rows if pixels is not None]
        answers = iter(self._loaded.predict(np.stack(images)).rows() if images else ())
        constant = {
            schema.MODEL_ID: self._loaded.model_id,
            schema.ENGINE: self._loaded.engine,
            schema.PRECISION: self._loaded.precision,
            schema.BCD_VERSION: provenance.own_version(),
        }
        for row, pixels in read_rows:
            yield row | constant | ({} if pixels is None else self._answer(next(answers)))

    def _answer(self, found: "Prediction") -> dict[str, Any]:
        if not found.finite[0]:
            return {schema.ERROR: NOT_FINITE, schema.ERROR_MESSAGE: NOT_FINITE_MESSAGE}
        statistics = self._loaded.card.feature_statistics
        cutoff = statistics.cutoff if statistics else None
        return {
            schema.LOGIT: found.logit[0],
            schema.PROBABILITY: found.probability[0],
            schema.PROBABILITY_MALIGNANT: found.probability_malignant[0],
            schema.PREDICTED_CLASS: found.predicted_class[0],
            schema.EVIDENCE: found.evidence[0].ravel(),
            schema.EVIDENCE_HEIGHT: found.evidence.shape[1],
            schema.EVIDENCE_WIDTH: found.evidence.shape[2],
            schema.EVIDENCE_BIAS: found.evidence_bias[0],
            schema.NOVELTY: found.novelty[0] if statistics else None,
            schema.NOVELTY_CUTOFF: cutoff,
            schema.WARNINGS: novelty.warning_codes(found.novelty[0], cutoff),
        }


def _load_pyfunc(path: str) -> BundleModel:
    """MLflow's entry, with the folder of a logged model's data. Raises BundleError."""
    import bcd  # which imports torch

    return BundleModel(bcd.load(path))


def _images(model_input: Any) -> list[Given]:
    if isinstance(model_input, pd.DataFrame):
        names = list(model_input.columns)
        if schema.IMAGE not in names and len(names) != 1:
            raise ConfigError(
                f"the table has the columns {names}: expected {schema.IMAGE!r}, with paths or bytes"
            )
        model_input = model_input[schema.IMAGE if schema.IMAGE in names else names[0]]
    given = [model_input] if isinstance(model_input, Given) else list(model_input)
    if wrong := [type(one).__name__ for one in given if not isinstance(one, Given)]:
        raise ConfigError(f"an image is of type {wrong[0]}: expected a path, a URI or the bytes of a file")
    return given


def _read(given: Sequence[Given], first: int) -> Iterator[tuple[dict[str, Any], np.ndarray | None]]:
    """What is known of each image without a model, and its pixels; None if it is broken."""
    contents = read.contents([str(one) for one in given if not isinstance(one, bytes)])
    for place, one in enumerate(given, first):
        uri = "" if isinstance(one, bytes) else str(one)
        row: dict[str, Any] = {schema.IMAGE_ID: uri or str(place), schema.URI: uri}
        pixels = None
        try:
            content = read.require_bytes(one if isinstance(one, bytes) else next(contents))
            row[schema.SHA256] = hashlib.sha256(content).hexdigest()
            pixels = decoder.decode_safely(content)
            row[schema.HEIGHT_PX], row[schema.WIDTH_PX] = pixels.shape[:2]
        except ImageError as error:
            row |= {schema.ERROR: error.code, schema.ERROR_MESSAGE: error.message}
        yield row, pixels
