"""The batches of a worker: its share of the rows, and their images from the nearest copy."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import ray.train
import torch

from bcd import schema
from bcd.model import train_step
from bcd.runtime import datasets, inspection
from bcd.taxonomy import TRAIN, VALIDATION
from bcd.training.feed import Held, HeldImages, Listed

# Batches that are made before a step asks for them.
AHEAD = 2
# Of a GPU's free memory, images may occupy this share: the network needs the rest.
SHARE_OF_GPU = 0.5
# Where images come from.
FROM_GPU, FROM_MEMORY, FROM_STREAM = "GPU memory", "host memory", "storage"
# Of rows.
Columns = Mapping[str, np.ndarray]
Item = TypeVar("Item")


class Batch(NamedTuple):
    """Images uint8 (n, height, width, 3) with their targets int64 (n,), and the ids of their rows."""

    image_ids: list[str]
    targets: list[int]
    images: torch.Tensor
    target: torch.Tensor


class Pixels:
    """Images of streamed rows as tensors, which another thread than the training's makes."""

    def __init__(self, held: Held | None, device: torch.device) -> None:
        self._images = HeldImages(held) if held else None
        self._device = device
        self._resident: torch.Tensor | None = None
        if self._images and _fits(self._images.n_bytes, device):
            self._resident, self._images = _moved(self._images.blocks, device), None

    @property
    def source(self) -> str:
        """Where the images come from."""
        if self._resident is not None:
            return FROM_GPU
        return FROM_MEMORY if self._images else FROM_STREAM

    def batch(self, rows: Columns) -> Batch:
        """The images of some rows, with `image` or, where all are held in memory, with `position`."""
        targets = rows[schema.TARGET]
        return Batch(
            rows[schema.IMAGE_ID].tolist(), targets.tolist(), self._tensor(rows), self._copied(targets)
        )

    def _tensor(self, rows: Columns) -> torch.Tensor:
        if self._resident is not None:
            return self._resident[torch.tensor(rows[schema.POSITION], device=self._device)]
        if self._images is not None:
            return self._pinned(torch.from_numpy(self._images.take(rows[schema.POSITION])))
        inspection.require_whole(rows[schema.ERROR], rows[schema.IMAGE_ID])
        return self._copied(rows[schema.IMAGE])

    def _copied(self, array: np.ndarray) -> torch.Tensor:
        """A copy, because Ray returns read-only views of its object store."""
        return self._pinned(torch.tensor(array))

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory from which a GPU copies while it computes."""
        return tensor.pin_memory() if self._device.type == "cuda" else tensor


def _fits(n_bytes: int, device: torch.device) -> bool:
    return device.type == "cuda" and n_bytes <= SHARE_OF_GPU * torch.cuda.mem_get_info(device)[0]


def _moved(blocks: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """All images on the device, a block at a time: its memory has room for them once."""
    n = sum(map(len, blocks))
    moved = torch.empty((n, *blocks[0].shape[1:]), dtype=torch.uint8, device=device)
    for part, block in zip(moved.split([len(block) for block in blocks]), blocks, strict=True):
        part.copy_(torch.tensor(block))
    return moved


class Streamed:
    """This worker's share of the rows of a part, with images, from Ray Data."""

    def __init__(self, part: str) -> None:
        self._shard = ray.train.get_dataset_shard(part)

    def batches(self, batch_size: int, finished_epochs: int) -> Iterator[Columns]:
        """One pass; Ray Data counts the epochs itself."""
        return self._shard.iter_batches(batch_size=batch_size, batch_format="numpy", prefetch_batches=2)


class Drawn:
    """This worker's share of a list of rows: every worker draws the same order."""

    def __init__(self, rows: pa.Table, seed: int | None) -> None:
        self._rows, self._seed = rows, seed

    def batches(self, batch_size: int, finished_epochs: int) -> Iterator[Columns]:
        """One pass; without a seed in the order of the list."""
        order = np.arange(len(self._rows))
        if self._seed is not None:
            order = datasets.shuffled_order(len(order), self._seed, finished_epochs)
        context = ray.train.get_context()
        share = share_of(order, context.get_world_rank(), context.get_world_size(), self._seed is not None)
        for start in range(0, len(share), batch_size):
            taken = self._rows.take(pa.array(share[start : start + batch_size]))
            yield {name: taken[name].to_numpy() for name in taken.column_names}


def share_of(order: np.ndarray, rank: int, world: int, is_equal: bool) -> np.ndarray:
    """The share of one of `world` workers; equal shares leave out what does not divide."""
    share = order[rank::world]
    return share[: len(order) // world] if is_equal else share


class Stream:
    """Passes over this worker's share of the rows of a part, which can begin before they are needed.

    The first batch of a stream of Ray Data takes one to three seconds, in which a GPU trains on a thousand
    images.
    """

    def __init__(self, part: str, batch_size: int, pixels: Pixels, source: Streamed | Drawn) -> None:
        self.batch_size = batch_size
        self._pixels, self._source = pixels, source
        # Only a step of training needs several images: see `even_tail`.
        self._is_evened = part == TRAIN
        self._begun: Iterator[Batch] | None = None

    @property
    def images_from(self) -> str:
        """Where the images come from."""
        return self._pixels.source

    def begin(self, finished_epochs: int) -> None:
        """Begin the pass of the epoch after so many."""
        rows = self._source.batches(self.batch_size, finished_epochs)
        evened = train_step.even_tail(rows, self.batch_size) if self._is_evened else rows
        self._begun = ahead(map(self._pixels.batch, evened))

    def batches(self, finished_epochs: int) -> Iterator[Batch]:
        """Batches of that pass, which may have begun."""
        if self._begun is None:
            self.begin(finished_epochs)
        begun, self._begun = self._begun, None
        assert begun is not None
        return begun


def streams_of(
    listed: Listed | None, seed: int, sizes: tuple[int, int], device: torch.device, validates: bool = True
) -> tuple[Stream, Stream]:
    """The streams of training and validation, with batches of these sizes; the latter is empty unless there
    are rows to validate on."""
    pixels = Pixels(listed.held if listed else None, device)
    streams = []
    for part, size in zip((TRAIN, VALIDATION), sizes, strict=True):
        drawn = Drawn(listed.parts[part], seed if part == TRAIN else None) if listed else None
        if part == VALIDATION and not validates:
            drawn = Drawn(pa.table({schema.IMAGE_ID: []}), None)
        streams.append(Stream(part, size, pixels, drawn or Streamed(part)))
    return streams[0], streams[1]


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items in order, which another thread makes, at most `AHEAD` before they are asked for; it
    begins at once."""
    pool = ThreadPoolExecutor(1, "stream")
    waiting = deque(pool.submit(next, items, None) for _ in range(AHEAD))

    def made() -> Iterator[Item]:
        try:
            while (item := waiting.popleft().result()) is not None:
                waiting.append(pool.submit(next, items, None))
                yield item
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return made()
