"""What workers train on: streams of rows, and images from the nearest copy.

Images that fit are read once into Ray's object store, which the workers of a node share; each worker draws
the same order of rows and takes its share of them. Else Ray Data streams images, prepared ones or those of
the files.
"""

import logging
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pydantic import TypeAdapter
from ray.data import Dataset

from bcd import schema, storage, taxonomy, text
from bcd.config.options import OFF
from bcd.config.training import TrainConfig, TrainingConfig
from bcd.data import read
from bcd.errors import BcdError
from bcd.model.recipes.reference import Macenko, Reinhard, StainReference
from bcd.runtime import datasets, inspection, run_directory
from bcd.runtime.prepare import part_of
from bcd.split import balance
from bcd.taxonomy import TRAIN, VALIDATION, Target

logger = logging.getLogger(__name__)

# Of the object store of every node, images may occupy this share: Ray Data needs the rest.
SHARE_OF_STORE = 0.5
BLOCK_BYTES = 2**24
# Training images whose stains decide what all are normalised to.
N_STAINS = 128


@dataclass(frozen=True)
class Held:
    """Images uint8 (n, height, width, 3) in blocks of equal length, except for the last, and their ids."""

    blocks: tuple[ray.ObjectRef, ...]
    rows_per_block: int
    image_ids: pa.ChunkedArray


@dataclass(frozen=True)
class Listed:
    """Rows of a run whose images are held: by part, tables with `image_id`, `target` and `position`."""

    parts: dict[str, pa.Table]
    held: Held


@dataclass(frozen=True)
class Feed:
    """The number of balanced training rows, and the rows: as streams with images by part, or as a list; the
    weights of the classes where they are balanced by those, and the stain of `stain_of`.

    `validates` is False where there are no validation rows, and then no stream of them."""

    n_train: int
    streams: dict[str, Dataset]
    listed: Listed | None = None
    class_weights: tuple[float, ...] | None = None
    stain: Macenko | Reinhard | None = None
    validates: bool = True


def feed_of(
    config: TrainConfig,
    table: pa.Table,
    held: Held | None = None,
    stain: Macenko | Reinhard | None = None,
) -> Feed:
    """The training and validation rows of a split table; `held` are the images of these and perhaps others.

    Prepared images are used where `prepare.located` has placed them.
    """
    rows = table.filter(pc.is_in(table[schema.PART], pa.array([TRAIN, VALIDATION])))
    held = held or hold(config, rows)
    if held is not None:
        place = pc.index_in(rows[schema.IMAGE_ID], value_set=held.image_ids.combine_chunks())
        rows = rows.append_column(schema.POSITION, place)
    parts = {part: _with_target(part_of(rows, part), config.target) for part in (TRAIN, VALIDATION)}
    balanced = balance.upsample(parts[TRAIN], config.upsampled(), config.seed)
    weights = balance.class_weights(parts[TRAIN], config.target) if config.weighted_loss else None
    validates = len(parts[VALIDATION]) > 0
    keep = [schema.IMAGE_ID, schema.TARGET]
    if held is not None:
        columns = [*keep, schema.POSITION]
        listed = {TRAIN: balanced.select(columns), VALIDATION: parts[VALIDATION].select(columns)}
        return Feed(len(balanced), {}, Listed(listed, held), weights, stain, validates)
    streams = {TRAIN: datasets.shuffled(balanced, config.seed)}
    if validates:
        streams[VALIDATION] = datasets.row_dataset(parts[VALIDATION])
    size = config.input_size_px
    streams = {part: datasets.read_images(rows, *size, keep) for part, rows in streams.items()}
    return Feed(len(balanced), streams, None, weights, stain, validates)


def stain_of(config: TrainConfig, run_uri: str, table: pa.Table) -> Macenko | Reinhard | None:
    """The stain that the images of a run are normalised to: measured once on training images, then read back.
    None where they are not.

    Raises:
        DataError: no training image has stained tissue.
    """
    if (method := config.stain_normalisation) is None:
        return None
    if not storage.exists(storage.join(run_uri, run_directory.STAIN)):
        rows = part_of(table, TRAIN)
        chosen = np.random.default_rng(config.seed).permutation(len(rows))[:N_STAINS]
        ready = schema.fill(rows.take(pa.array(chosen)), schema.READING).combine_chunks()
        error, images = _read.remote(ready, *config.input_size_px)
        found = ray.get(error) or ray.get(_measure_stain.remote(images, method))
        if isinstance(found, BcdError):
            raise found
        run_directory.write_json(run_uri, run_directory.STAIN, found.model_dump())
    return TypeAdapter(StainReference).validate_python(
        run_directory.read_json(run_uri, run_directory.STAIN), strict=False
    )


@ray.remote(num_cpus=1)
def _measure_stain(images: np.ndarray, method: str) -> Macenko | Reinhard | BcdError:
    # Not at the top: a job starts without torch.
    import torch

    from bcd.model.recipes import stain

    try:
        return stain.fit_reference(torch.tensor(images).permute(0, 3, 1, 2), method)
    except BcdError as error:  # of Ray it would be another
        return error


def _with_target(table: pa.Table, target: Target) -> pa.Table:
    classes = taxonomy.classes(target)
    indices = [classes.index(name) for name in table[target].to_pylist()]
    return table.append_column(schema.TARGET, pa.array(indices, pa.int64()))


def hold(config: TrainingConfig, rows: pa.Table) -> Held | None:
    """Read the image of every row (see `feed_of`) into memory, on CPU workers; None where they do not fit,
    or images are not to be kept.

    The blocks are results of tasks, so that Ray reads those of a lost node again.

    Raises:
        BcdError: an image became unusable after it was inspected.
        StorageError: storage failed to deliver one.
    """
    height, width = config.input_size_px
    image_bytes = height * width * 3
    if config.prepared == OFF or not _fits(len(rows) * image_bytes):
        return None
    total = text.size(len(rows) * image_bytes)
    logger.info(f"reading {text.counted(len(rows), 'image')} into memory: {total} on every node")
    ready = schema.fill(rows, schema.READING)
    n = min(max(1, BLOCK_BYTES // image_bytes), datasets.rows_per_task(len(rows)))
    shares = [ready.slice(start, n).combine_chunks() for start in range(0, len(rows), n)]
    results = [_read.remote(share, height, width) for share in shares]
    for error, _ in results:
        if (found := ray.get(error)) is not None:
            raise found
    return Held(tuple(block for _, block in results), n, rows[schema.IMAGE_ID])


def _fits(n_bytes: int) -> bool:
    """Whether every node that reads or trains has room for so many bytes of images."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    stores = [found.get("object_store_memory", 0) for found in nodes if found.get("CPU") or found.get("GPU")]
    return n_bytes <= SHARE_OF_STORE * min(stores, default=0)


@ray.remote(num_cpus=1, num_returns=2)
def _read(rows: pa.Table, height_px: int, width_px: int) -> tuple[BcdError | None, np.ndarray]:
    batch = read.pixels(rows, height_px, width_px, [schema.IMAGE_ID])
    try:
        inspection.require_whole(batch[schema.ERROR], batch[schema.IMAGE_ID])
    except BcdError as error:
        return error, batch[schema.IMAGE][:0]
    return None, batch[schema.IMAGE]


class HeldImages:
    """Blocks of `Held` in the memory of this node, shared by all processes there."""

    def __init__(self, held: Held) -> None:
        self.blocks: list[np.ndarray] = ray.get(list(held.blocks))
        self._rows_per_block = held.rows_per_block

    @property
    def n_bytes(self) -> int:
        """Bytes of all images."""
        return sum(block.nbytes for block in self.blocks)

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Copies of the images at these places among the ids, uint8 (n, height, width, 3)."""
        taken = np.empty((len(positions), *self.blocks[0].shape[1:]), np.uint8)
        for i, (block, row) in enumerate(zip(*np.divmod(positions, self._rows_per_block), strict=True)):
            taken[i] = self.blocks[block][row]
        return taken
