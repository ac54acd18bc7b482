"""Rows to predictions: one forward pass gives probability and evidence; one row out for each row in."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import torch
from ray.data import ActorPoolStrategy, Dataset

from bcd import bundle, provenance, schema, storage
from bcd.pipelines import cluster, read

CARRIED = (schema.IMAGE_ID, schema.URI, schema.SLIDE, schema.PATIENT, schema.MPP)


def predictions(
    table: pa.Table, model_uri: str, card: bundle.Card, batch_size: int, precision: str
) -> Dataset:
    """Score every row of an index.

    Args:
        table: schema `schema.INDEX`; order does not matter.
        model_uri: of the bundle.
        card: of the same bundle.
        batch_size: images per forward pass.
        precision: `float32`, `bfloat16` or `auto`.

    Returns:
        A dataset with schema `schema.predictions`, one row for each of the table: a result or an error.
    """
    pixels = read.images(read.rows(table), card.input_height_px, card.input_width_px, CARRIED)
    have = cluster.capacity()
    gpus = int(have["GPU"])
    actors = max(1, gpus or int(have["CPU"]) // 4)
    return pixels.map_batches(
        Scorer,
        fn_constructor_args=(model_uri, precision),
        batch_size=batch_size,
        batch_format="numpy",
        compute=ActorPoolStrategy(min_size=1, max_size=actors),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )


class Scorer:
    """An actor that holds one model and scores batch after batch."""

    def __init__(self, model_uri: str, precision: str) -> None:
        if not torch.cuda.is_available():
            cluster.share_cores(1)
        self._bundle = bundle.load(model_uri, precision=precision)
        self._version = provenance.own_version()
        self._schema = schema.predictions(*self._bundle.evidence_size)

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        """Pictures (n, height, width, 3) with their rows to n rows of the predictions table."""
        good = batch[schema.ERROR] == ""
        n = len(good)
        columns = {name: pa.array(batch[name], from_pandas=True) for name in CARRIED}
        for name in (schema.HEIGHT_PX, schema.WIDTH_PX):
            columns[name] = pa.array(batch[name], mask=~good)
        for name in (schema.ERROR, schema.ERROR_MESSAGE):
            columns[name] = pa.array(batch[name], pa.string(), mask=good)
        columns[schema.MODEL_ID] = pa.array([self._bundle.model_id] * n)
        columns[schema.BCD_VERSION] = pa.array([self._version] * n)
        if good.any():
            columns |= self._results(batch[schema.IMAGE][good], good)
        full = [columns.get(f.name, pa.nulls(n, f.type)).cast(f.type) for f in self._schema]
        return pa.Table.from_arrays(full, schema=self._schema)

    def _results(self, images: np.ndarray, good: np.ndarray) -> dict[str, pa.Array]:
        prediction = self._bundle.predict(images)
        maps = prediction.evidence.reshape(len(images), -1)
        height, width = prediction.evidence.shape[1:]
        n = len(images)
        results = {
            schema.LOGIT: pa.array(list(prediction.logit), pa.list_(pa.float32())),
            schema.PROBABILITY: pa.array(list(prediction.probability), pa.list_(pa.float32())),
            schema.PROBABILITY_MALIGNANT: pa.array(prediction.probability_malignant),
            schema.PREDICTED_CLASS: pa.array(prediction.predicted_class),
            schema.EVIDENCE: pa.array(list(maps), pa.list_(pa.float32(), height * width)),
            schema.EVIDENCE_HEIGHT: pa.array([height] * n, pa.int16()),
            schema.EVIDENCE_WIDTH: pa.array([width] * n, pa.int16()),
            schema.EVIDENCE_BIAS: pa.array(prediction.evidence_bias),
        }
        # Back to the rows of the batch: a null where the picture could not be read.
        place = pa.array(np.cumsum(good) - 1, mask=~good)
        return {name: values.take(place) for name, values in results.items()}


def write(dataset: Dataset, uri: str) -> None:
    """Write a predictions table as Parquet, in place of what stood there."""
    storage.delete_folder(uri)
    filesystem, path = storage.resolve(uri)
    dataset.write_parquet(path, filesystem=filesystem, compression="zstd")


def read_back(uri: str, columns: list[str]) -> pa.Table:
    """Some columns of a predictions table, sorted by image."""
    filesystem, path = storage.resolve(uri)
    table = pads.dataset(path, filesystem=filesystem, format="parquet").to_table(columns=columns)
    return table.sort_by(schema.IMAGE_ID)
