"""Feature statistics of the training images and logits of the validation images, from a new model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import Dataset

from bcd import schema
from bcd.metrics.drift import stain
from bcd.model import novelty
from bcd.model.card import Card
from bcd.model.novelty import FeatureStatistics
from bcd.runtime import cluster, datasets, inspection, predict
from bcd.taxonomy import TRAIN, VALIDATION

if TYPE_CHECKING:
    from bcd.model.resnet import Network

KEEP = (schema.IMAGE_ID, schema.PART, schema.PATIENT, schema.SLIDE)
N, TOTAL, SQUARES, POOLED = "n", "total", "squares", "pooled"
OWNERS, STAINS = "owners", "stains"
# A row per batch: sums over its training images; ids, logits and features, one after another, of the others;
# whose image each of both is, and its stain.
SUMS = pa.schema(
    [
        (N, pa.int64()),
        (TOTAL, pa.list_(pa.float64())),
        (SQUARES, pa.list_(pa.float64())),
        (schema.IMAGE_ID, pa.list_(pa.string())),
        (schema.LOGIT, pa.list_(pa.float32())),
        (POOLED, pa.list_(pa.float32())),
        (OWNERS, pa.list_(pa.string())),
        (STAINS, pa.list_(pa.float32())),
    ]
)


def compute_statistics(
    network: "Network", card: Card, train: pa.Table, validation: pa.Table
) -> tuple[FeatureStatistics, np.ndarray]:
    """Mean and spread of the pooled features over the training images, and the validation images' results.

    One pass: features of validation images wait in Ray's object store for mean and spread.

    Args:
        network: trained; not changed.
        card: its card, without statistics.
        train: rows with a `uri`, each image once.
        validation: likewise.

    Returns:
        The statistics, with the cut-off from the validation images, and their logits (n, classes) in the
        order of the rows.
    """
    shared = ray.put((network.state_dict(), card))
    batches = _pooled({TRAIN: train, VALIDATION: validation}, card, shared)
    n, total, squares, waiting = 0, np.zeros(1), np.zeros(1), []
    owners: list[str] = []
    stains: list[np.ndarray] = []
    for block in batches.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in _rows(block.select([N, TOTAL, SQUARES, OWNERS, STAINS])):
            n, total, squares = n + row[N], total + row[TOTAL], squares + row[SQUARES]
            owners += row[OWNERS].tolist()
            stains.append(np.reshape(row[STAINS], (-1, len(schema.STAIN))))
        waiting.append(ray.put(block.select([schema.IMAGE_ID, schema.LOGIT, POOLED])))
    mean, spread = novelty.spread(n, total, squares)
    distances: list[np.ndarray] = []
    logit: dict[str, np.ndarray] = {}
    for row in (row for block in waiting for row in _rows(ray.get(block))):
        # Batches come back in any order.
        logits = np.reshape(row[schema.LOGIT], (-1, len(card.classes)))
        logit |= zip(row[schema.IMAGE_ID], logits, strict=True)
        features = np.reshape(row[POOLED], (-1, len(mean))).astype(np.float64)
        distances.append(novelty.distance(features, mean, spread))
    statistics = FeatureStatistics(
        mean=tuple(mean.astype(np.float32).tolist()),
        spread=tuple(spread.astype(np.float32).tolist()),
        cutoff=novelty.cutoff(np.concatenate(distances)),
        n_training=n,
        n_validation=len(logit),
        stain=stain.statistics_of(owners, np.concatenate(stains)),
    )
    return statistics, np.stack([logit[name] for name in validation[schema.IMAGE_ID].to_pylist()])


def _rows(block: pa.Table) -> list[dict[str, Any]]:
    return block.to_pandas().to_dict("records")


def _pooled(parts: Mapping[str, pa.Table], card: Card, shared: ray.ObjectRef) -> Dataset:
    """A row of `SUMS` for every batch; no block has images of two parts."""
    size = predict.Settings.batch_size
    tables = [_listed(rows, part) for part, rows in parts.items()]
    beside = cluster.beside_models()
    first, *others = [datasets.row_dataset(table, size, **beside) for table in tables]
    options = predict.reading_options(card, KEEP)
    return predict.on_models(first.union(*others), _Pooler, (shared,), options, size)


def _listed(rows: pa.Table, part: str) -> pa.Table:
    """The rows to read, marked with their part."""
    return schema.fill(rows, schema.READING).append_column(schema.PART, pa.array([part] * len(rows)))


class _Pooler:
    """An actor that holds the network; a worker of `predict.on_models`."""

    def __init__(self, shared: ray.ObjectRef, threads: int) -> None:
        # Not at the top: see `predict.Scorer`.
        from bcd.model import predictor

        state, card = ray.get(shared)
        self._predictor = predictor.from_state(state, card)
        cluster.use_threads(threads)

    def __call__(self, batch: dict[str, Any]) -> pa.Table:
        inspection.require_whole(batch[schema.ERROR], batch[schema.IMAGE_ID])
        # Copied, because a batch from another worker is a read-only view of Ray's object store.
        pooled, logit = self._predictor.pooled(np.array(batch[schema.IMAGE]))
        is_train = batch[schema.PART] == TRAIN
        names = zip(*(batch[name] for name in (schema.PATIENT, schema.SLIDE, schema.IMAGE_ID)), strict=True)
        trained = pooled[is_train].astype(np.float64)
        row = {
            N: len(trained),
            TOTAL: trained.sum(0),
            SQUARES: (trained**2).sum(0),
            schema.IMAGE_ID: batch[schema.IMAGE_ID][~is_train],
            schema.LOGIT: logit[~is_train].ravel(),
            POOLED: pooled[~is_train].ravel(),
            OWNERS: [stain.observation_of(*name) for name in names],
            STAINS: np.stack([batch[name] for name in schema.STAIN], 1).ravel(),
        }
        return pa.table({name: pa.array([value], SUMS.field(name).type) for name, value in row.items()})
