"""Feature statistics of the training images and logits of the validation images, from a new model."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import Dataset

from bcd import schema
from bcd.data import read
from bcd.model import novelty
from bcd.model.card import Card
from bcd.model.novelty import FeatureStatistics
from bcd.runtime import cluster, datasets, inspection, predict

if TYPE_CHECKING:
    from bcd.model.resnet import ResNet

KEEP = (schema.IMAGE_ID,)
N, TOTAL, SQUARES, DISTANCE = "n", "total", "squares", "distance"


def compute_statistics(
    network: "ResNet", card: Card, train: pa.Table, validation: pa.Table
) -> tuple[FeatureStatistics, np.ndarray]:
    """Mean and spread of the pooled features over the training images, and the validation images' results.

    Args:
        network: trained, from `bcd.model.weights.build`; not changed.
        card: its card, without statistics.
        train: rows with a `uri`, each image once.
        validation: likewise.

    Returns:
        The statistics, with the cut-off from the validation images, and their logits (n, classes) in the
        order of the rows.
    """
    shared = ray.put((network.state_dict(), card))
    sums = _pooled(train, card, shared, None).to_pandas()
    n = int(sums[N].sum())
    mean, spread = novelty.spread(n, np.sum(sums[TOTAL].tolist(), 0), np.sum(sums[SQUARES].tolist(), 0))
    moments = ray.put((mean, spread))
    seen = _pooled(validation, card, shared, moments).to_pandas()
    distances = np.concatenate(seen[DISTANCE].tolist())
    # Batches come back in any order.
    ids = np.concatenate(seen[schema.IMAGE_ID].tolist()).tolist()
    logit = dict(zip(ids, np.concatenate([np.stack(rows) for rows in seen[schema.LOGIT]]), strict=True))
    statistics = FeatureStatistics(
        mean=tuple(mean.astype(np.float32).tolist()),
        spread=tuple(spread.astype(np.float32).tolist()),
        cutoff=novelty.cutoff(distances),
        n_training=n,
        n_validation=len(distances),
    )
    return statistics, np.stack([logit[name] for name in validation[schema.IMAGE_ID].to_pylist()])


def _pooled(rows: pa.Table, card: Card, shared: ray.ObjectRef, moments: ray.ObjectRef | None) -> Dataset:
    """A row per batch of images: sums, or ids, distances and logits where the moments are known."""
    size = predict.Settings.batch_size
    dataset = datasets.row_dataset(schema.fill(rows, schema.READING), size)
    options = predict.reading_options(card, KEEP)
    return predict.on_models(dataset, _Pooler, (shared, moments), options, size)


class _Pooler:
    """An actor that holds the network; a worker of `predict.on_models`."""

    def __init__(self, shared: ray.ObjectRef, moments: ray.ObjectRef | None, threads: int) -> None:
        # Not at the top: see `predict.Scorer`.
        from bcd.model import predictor

        state, card = ray.get(shared)
        self._predictor = predictor.from_state(state, card)
        self._moments = ray.get(moments) if moments is not None else None
        self._threads = threads
        if threads:
            cluster.use_threads(threads)

    def __call__(self, batch: Any) -> dict[str, Any]:
        if self._threads:
            options = predict.reading_options(self._predictor.card, KEEP)
            batch = read.pixels(batch, **options, threads=self._threads)
        inspection.require_whole(batch[schema.ERROR], batch[schema.IMAGE_ID])
        # Copied, because a batch from another worker is a read-only view of Ray's object store.
        features, logit = self._predictor.pooled(np.array(batch[schema.IMAGE]))
        pooled = features.astype(np.float64)
        if self._moments is not None:
            distance = novelty.distance(pooled, *self._moments)
            ids = batch[schema.IMAGE_ID].tolist()
            return {schema.IMAGE_ID: [ids], DISTANCE: [distance], schema.LOGIT: [logit]}
        return {N: [len(pooled)], TOTAL: [pooled.sum(0)], SQUARES: [(pooled**2).sum(0)]}
