"""From rows to pixels: Ray Data reads, decodes and resizes images on CPU workers.

Index first, pixels last: everything that is shuffled, replicated or split is rows of text. No pixel passes
through the driver.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import Dataset, RandomSeedConfig
from ray.train import DataConfig

from bcd import image, schema, storage
from bcd.errors import BcdError, DataError, StorageError

TRAIN, VALIDATION = "train", "validation"
# One reading task decodes this many images: a quarter of a second of work, so that a training epoch has its
# first batch soon; 4 MB of pixels at 224x336.
ROWS_PER_TASK = 16
# Shuffling is all-to-all over blocks. A million index rows are a few hundred MB: few blocks, cheap shuffle.
ROWS_PER_SHUFFLE_BLOCK = 100_000
# The largest share of the work between two progress lines.
PROGRESS_STEPS = 10


def rows(table: pa.Table, rows_per_block: int = ROWS_PER_TASK) -> Dataset:
    """A dataset of rows in blocks of bounded size."""
    cuts = range(0, len(table), rows_per_block)
    return ray.data.from_arrow([table.slice(start, rows_per_block).combine_chunks() for start in cuts])


def shuffled(table: pa.Table, seed: int) -> Dataset:
    """Rows in an order that is drawn anew at every pass over the dataset, the same for the same seed."""
    dataset = rows(table, ROWS_PER_SHUFFLE_BLOCK)
    dataset = dataset.random_shuffle(seed=RandomSeedConfig(seed=seed, reseed_after_execution=True))
    return dataset.repartition(-(-len(table) // ROWS_PER_TASK))


class SplitData(DataConfig):
    """Equal shares of the training rows, so that workers take the same number of steps; of the validation
    rows every single one, because a metric must not lose a tail."""

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, *args: Any, **kwargs: Any
    ) -> list[dict[str, Any]]:
        """One dict of shards per worker."""
        shards: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset = dataset.copy(dataset)
            dataset.set_name(name)
            dataset.context.execution_options = self._resolve_execution_options(name)
            splits = dataset.streaming_split(world_size, equal=name == TRAIN)
            for shard, share in zip(shards, splits, strict=True):
                shard[name] = share
        return shards


def images(dataset: Dataset, height_px: int, width_px: int, keep: Sequence[str]) -> Dataset:
    """Read, decode and fit the image of every row.

    Args:
        dataset: rows with a `uri`.
        height_px: of the network's input.
        width_px: of the network's input.
        keep: columns to carry along.

    Returns:
        A dataset with the kept columns, `image` uint8 (height, width, 3), `height_px` and `width_px` of
        the original, and `error` and `error_message`, empty for a good image. A broken image is black.
    """
    return dataset.map_batches(
        _read_batch,
        fn_kwargs={"height_px": height_px, "width_px": width_px, "keep": list(keep)},
        batch_size=ROWS_PER_TASK,
        batch_format="pyarrow",
        num_cpus=1,
    )


def _read_batch(batch: pa.Table, height_px: int, width_px: int, keep: list[str]) -> dict[str, Any]:
    pixels = np.zeros((len(batch), height_px, width_px, 3), np.uint8)
    heights, widths = np.zeros(len(batch), np.int32), np.zeros(len(batch), np.int32)
    # Empty and not null for a good image: NumPy batches have no null for text.
    errors, messages = [""] * len(batch), [""] * len(batch)
    for i, content in enumerate(_contents(batch[schema.URI].to_pylist())):
        try:
            decoded = image.decode(_bytes(content))
        except image.ImageError as error:
            errors[i], messages[i] = error.code, error.message
            continue
        heights[i], widths[i] = decoded.shape[:2]
        pixels[i] = image.fit(decoded, height_px, width_px)
    return {
        **{name: batch[name].to_numpy() for name in keep},
        schema.IMAGE: pixels,
        schema.HEIGHT_PX: heights,
        schema.WIDTH_PX: widths,
        schema.ERROR: np.array(errors, object),
        schema.ERROR_MESSAGE: np.array(messages, object),
    }


def _contents(uris: list[str]) -> Iterator[bytes | StorageError]:
    """Contents in order; several requests are in flight while the caller decodes."""
    with ThreadPoolExecutor(storage.READ_THREADS) as pool:
        yield from pool.map(_try_read, uris)


def _try_read(uri: str) -> bytes | StorageError:
    try:
        return storage.read_bytes(uri)
    except StorageError as error:
        return error


def _bytes(content: bytes | StorageError) -> bytes:
    if isinstance(content, StorageError):
        raise image.ImageError("unreadable", str(content)) from content
    return content


def inspect(table: pa.Table) -> tuple[pa.Table, dict[str, str]]:
    """Read and decode every image once before a training run: its content hash, and whether it is whole.

    Costs about as much as reading one epoch, and makes everything after it exact: duplicates are found by
    content, and broken images are out before anything is split, balanced or counted.

    Returns:
        The index without broken images and with `sha256`, and `{image_id: what is wrong}`.

    Raises:
        DataError: every image is broken.
    """
    dataset = rows(table).map_batches(
        _inspect_batch, batch_size=ROWS_PER_TASK, batch_format="pyarrow", num_cpus=1
    )
    found: list[pa.Table] = []
    done, step = 0, max(ROWS_PER_TASK, len(table) // PROGRESS_STEPS)
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        found.append(batch)
        if (done + len(batch)) // step > done // step:
            print(f"checked {done + len(batch):,} of {len(table):,} images", flush=True)
        done += len(batch)
    result = pa.concat_tables(found).sort_by(schema.IMAGE_ID)
    good = pc.is_null(result[schema.ERROR])
    bad = result.filter(pc.invert(good))
    broken = dict(zip(*(bad[name].to_pylist() for name in (schema.IMAGE_ID, schema.ERROR)), strict=True))
    return result.filter(good).select(schema.INDEX.names).cast(schema.INDEX), broken


def _inspect_batch(batch: pa.Table) -> pa.Table:
    hashes: list[str | None] = []
    errors: list[str | None] = []
    for content in _contents(batch[schema.URI].to_pylist()):
        hashes.append(hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else None)
        errors.append(_fault(content))
    position = batch.schema.get_field_index(schema.SHA256)
    batch = batch.set_column(position, schema.SHA256, pa.array(hashes, pa.string()))
    return batch.append_column(schema.ERROR, pa.array(errors, pa.string()))


def _fault(content: bytes | StorageError) -> str | None:
    try:
        image.decode(_bytes(content))
    except image.ImageError as error:
        return f"{error.code}: {error.message}"
    return None


def check_bad_fraction(broken: dict[str, str], total: int, allowed: float) -> list[str]:
    """Sentences that name the broken images, or the end of the run where there are too many.

    Raises:
        DataError: more than the allowed fraction is broken.
    """
    named = [f"{name}: {reason}" for name, reason in sorted(broken.items())]
    if len(broken) > allowed * total:
        raise DataError(
            f"{len(broken)} of {total} images are broken, more than --max-bad-fraction {allowed:g} allows: "
            + "; ".join(named[:5])
            + (f"; and {len(named) - 5} more" if len(named) > 5 else "")
        )
    return named


def require_whole(errors: np.ndarray, names: np.ndarray) -> None:
    """Stop where an image that was whole when the run began is so no longer.

    Raises:
        BcdError: names the first such image.
    """
    for name, error in zip(names, errors, strict=True):
        if error:
            raise BcdError(f"{name} became unusable after the run began: {error}")
