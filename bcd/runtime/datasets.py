"""Streams of rows and images: Ray Data reads, decodes and resizes images on CPU workers.

What is shuffled, replicated or split is rows of an index; pixels come last and never pass through the driver.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Dataset, Datasource, RandomSeedConfig, ReadTask
from ray.data.block import BlockMetadata
from ray.train import DataConfig

from bcd import storage
from bcd.data import read
from bcd.taxonomy import TRAIN

# A block takes a quarter of a second to decode, so that an epoch has its first batch soon; 4 MB at 224x336.
IMAGES_PER_BLOCK = 16
# Where all CPUs get several tasks: Ray Data checks its tasks ten times a second, and the CPU of a finished
# one idles until then. 16 CPUs read 424 images/s in tasks of 16 images, 587 in tasks of 64.
BLOCKS_PER_TASK = 4
TASKS_PER_CPU = 4
# Of an epoch: each costs its planner a fraction of a millisecond.
MOST_TASKS = 10_000
# In the context of a dataset: number of epochs finished before its first pass.
FINISHED_EPOCHS = "bcd_finished_epochs"


def row_dataset(table: pa.Table, rows_per_block: int | None = None, **options: Any) -> Dataset:
    """A dataset of rows in blocks of `rows_per_block`, by default of `rows_per_task`.

    The options of Ray Data are for the tasks that hand on the rows, where other tasks or actors read them.
    """
    return _read(Rows(table, rows_per_block), options)


def shuffled(table: pa.Table, seed: int) -> Dataset:
    """A dataset of rows in another random order at every pass, determined by the seed."""
    return _read(Rows(table, seed=seed), {})


def _read(rows: "Rows", options: dict[str, Any]) -> Dataset:
    # Ray Data would divide few tasks into more blocks.
    return ray.data.read_datasource(rows, override_num_blocks=rows.n_tasks(), **options)


def rows_per_task(n: int) -> int:
    """How many of n rows one task reads: whole blocks, few enough that no CPU idles."""
    cpus = max(1, int(ray.cluster_resources().get("CPU", 0)))
    blocks = min(BLOCKS_PER_TASK, n // (IMAGES_PER_BLOCK * TASKS_PER_CPU * cpus))
    return IMAGES_PER_BLOCK * max(1, blocks, -(-n // (IMAGES_PER_BLOCK * MOST_TASKS)))


class Rows(Datasource):
    """Rows of a table, in its order or, with a seed, in another random order at every pass.

    The order is drawn where the pass is planned, because the index fits in one process: an all-to-all shuffle
    of blocks would make every epoch wait for its slowest task before the first image. Nor are the rows put
    into blocks before, which Ray Data would ask a task about, each.
    """

    def __init__(self, table: pa.Table, rows_per_block: int | None = None, seed: int | None = None) -> None:
        self._table = table.combine_chunks()
        self._rows_per_block = rows_per_block
        self._seed = RandomSeedConfig(seed=seed, reseed_after_execution=True) if seed is not None else None

    def estimate_inmemory_data_size(self) -> int:
        return self._table.nbytes

    def n_tasks(self) -> int:
        """Number of tasks of one pass."""
        return max(1, -(-len(self._table) // self._size()))

    def _size(self) -> int:
        return self._rows_per_block or rows_per_task(len(self._table))

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """Tasks for one pass; `parallelism` is ignored, because pixels follow in the same task."""
        n, size = len(self._table), self._size()
        order = np.arange(n)
        if self._seed is not None:
            context = data_context or DataContext.get_current()
            seed = self._seed.get_seed_tuple(data_context=context)
            # A resumed run counts its passes from 0 again.
            finished = (seed.execution_idx or 0) + context.get_config(FINISHED_EPOCHS, 0)
            order = shuffled_order(n, seed.seed, finished)
        shares = (self._table.take(pa.array(order[at : at + size])) for at in range(0, max(1, n), size))
        return [_read_task(share, per_task_row_limit) for share in shares]


def shuffled_order(n: int, seed: int, finished_epochs: int) -> np.ndarray:
    """The order of n rows in the epoch after so many."""
    # As Ray Data seeds its own random operations.
    return np.random.default_rng((0, finished_epochs, seed)).permutation(n)


def _read_task(share: pa.Table, limit: int | None) -> ReadTask:
    facts = BlockMetadata(num_rows=len(share), size_bytes=share.nbytes, input_files=None, exec_stats=None)
    return ReadTask(lambda: [share], facts, share.schema, limit)


class SplitData(DataConfig):
    """Equal shares of the training rows, so that workers take the same number of steps; validation rows are
    shared without dropping any, because metrics count them all.

    With `exposure_uri`, a folder with a file per finished epoch, a resumed run shuffles like any other.
    """

    def __init__(self, exposure_uri: str | None = None) -> None:
        super().__init__()
        self._exposure_uri = exposure_uri

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, Any]]:
        shards: list[dict[str, Any]] = [{} for _ in range(world_size)]
        uri = self._exposure_uri
        n_finished = len(storage.list_files_if_any(uri)) if uri else 0
        for name, dataset in datasets.items():
            dataset = dataset.copy(dataset)
            dataset.set_name(name)
            dataset.context.set_config(FINISHED_EPOCHS, n_finished)
            dataset.context.execution_options = self._resolve_execution_options(name)
            splits = dataset.streaming_split(world_size, equal=name == TRAIN)
            for shard, share in zip(shards, splits, strict=True):
                shard[name] = share
        return shards


def read_images(dataset: Dataset, height_px: int, width_px: int, keep: Sequence[str]) -> Dataset:
    """Read, decode and fit the image of every row, on CPU workers: see `read.pixels`."""
    dataset = dataset.map_batches(
        read.pixels,
        fn_kwargs={"height_px": height_px, "width_px": width_px, "keep": list(keep)},
        batch_size=IMAGES_PER_BLOCK,
        batch_format="pyarrow",
        num_cpus=1,
    )
    # A task yields each block when it is ready, and not all of them at its end.
    dataset.context.target_max_block_size = IMAGES_PER_BLOCK * height_px * width_px * 3
    return dataset
