"""Statistics of a new model's features over its training pictures, for `bcd.novelty`."""

from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Dataset
from torchvision.models import ResNet

from bcd import bundle, novelty, schema
from bcd.novelty import FeatureStatistics
from bcd.pipelines import cluster, predict, read

N, TOTAL, SQUARES, DISTANCE = "n", "total", "squares", "distance"


def statistics(
    network: ResNet, card: bundle.Card, train: pa.Table, validation: pa.Table
) -> FeatureStatistics:
    """Mean and spread of the pooled features over the training pictures, the cut-off from the validation's.

    Args:
        network: from `bcd.model.build`, trained; is left as it was.
        card: its card, without statistics.
        train: rows with a `uri`, each picture once.
        validation: likewise.
    """
    shared = ray.put((network.state_dict(), card))
    sums = _pooled(train, shared, None).to_pandas()
    n = int(sums[N].sum())
    mean, spread = novelty.spread(n, np.sum(sums[TOTAL].tolist(), 0), np.sum(sums[SQUARES].tolist(), 0))
    moments = ray.put((mean, spread))
    distances = np.concatenate(_pooled(validation, shared, moments).to_pandas()[DISTANCE].tolist())
    return FeatureStatistics(
        mean=tuple(mean.astype(np.float32).tolist()),
        spread=tuple(spread.astype(np.float32).tolist()),
        cutoff=novelty.cutoff(distances),
        n_training=n,
        n_validation=len(distances),
    )


def _pooled(rows: pa.Table, shared: ray.ObjectRef, moments: ray.ObjectRef | None) -> Dataset:
    """A row for each batch of pictures: sums, or distances where the moments are known."""
    pool = cluster.model_workers()
    return read.rows(schema.fill(rows, schema.READING), predict.Settings.batch_size).map_batches(
        _Pooler,
        fn_constructor_args=(shared, moments, pool.threads),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=pool.size, initial_size=pool.ready),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        runtime_env=cluster.KEEP_MEMORY,
    )


class _Pooler:
    """An actor that holds the network and reads what it looks at."""

    def __init__(self, shared: ray.ObjectRef, moments: ray.ObjectRef | None, threads: int) -> None:
        state, card = ray.get(shared)
        self._bundle = bundle.from_state(state, card)
        self._moments = ray.get(moments) if moments is not None else None
        self._threads = threads
        cluster.use_threads(threads)

    def __call__(self, batch: pa.Table) -> dict[str, Any]:
        card = self._bundle.card
        size = (card.input_height_px, card.input_width_px)
        found = read.pixels(batch, *size, [schema.IMAGE_ID], self._threads)
        read.require_whole(found[schema.ERROR], found[schema.IMAGE_ID])
        pooled = self._bundle.pooled(found[schema.IMAGE]).astype(np.float64)
        if self._moments is not None:
            return {DISTANCE: [novelty.distance(pooled, *self._moments)]}
        return {N: [len(pooled)], TOTAL: [pooled.sum(0)], SQUARES: [(pooled**2).sum(0)]}
