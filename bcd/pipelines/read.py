"""From rows to pixels: Ray Data reads, decodes and resizes images on CPU workers.

Index first, pixels last: everything that is shuffled, replicated or split is rows of text. No pixel passes
through the driver.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from PIL import Image
from ray.data import DataContext, Dataset, Datasource, RandomSeedConfig, ReadTask
from ray.data.block import BlockMetadata
from ray.train import DataConfig

from bcd import image, pixel_size, schema, storage
from bcd.errors import BcdError, DataError, StorageError, TooLargeError
from bcd.pipelines import staging
from bcd.slide import Slide, open_slide
from bcd.text import counted

TRAIN, VALIDATION = "train", "validation"
# So many images are decoded together and handed on as one block: a quarter of a second of work, so that a
# training epoch has its first batch soon; 4 MB of pixels at 224x336.
IMAGES_PER_BLOCK = 16
# One task makes so many blocks where all CPUs get several tasks: Ray Data looks after its tasks ten times a
# second, and until then the CPU of one that has ended waits. 16 CPUs read 424 images/s in tasks of 16 images,
# 587 in tasks of 64.
BLOCKS_PER_TASK = 4
TASKS_PER_CPU = 4
# An epoch is planned as at most so many tasks: each costs its planner a fraction of a millisecond.
MOST_TASKS = 10_000
# What to do where storage fails for a while.
ASK_AGAIN = "check the network and the credentials, and run the same command again"
# The largest share of the work between two progress lines.
PROGRESS_STEPS = 10


def rows(table: pa.Table, rows_per_block: int | None = None) -> Dataset:
    """A dataset of rows in blocks of bounded size; of `rows_per_task` where no other is named."""
    size = rows_per_block or rows_per_task(len(table))
    cuts = range(0, len(table), size)
    return ray.data.from_arrow([table.slice(start, size).combine_chunks() for start in cuts])


def rows_per_task(n: int) -> int:
    """How many of n rows one reading task takes: whole blocks, few enough that no CPU idles."""
    cpus = max(1, int(ray.cluster_resources().get("CPU", 0)))
    blocks = min(BLOCKS_PER_TASK, n // (IMAGES_PER_BLOCK * TASKS_PER_CPU * cpus))
    return IMAGES_PER_BLOCK * max(1, blocks, -(-n // (IMAGES_PER_BLOCK * MOST_TASKS)))


class Shuffled(Datasource):
    """Rows of a table in an order that is drawn anew at every pass over them, the same for the same seed.

    The table is an index, small enough for one process, so the order is drawn where the pass is planned: an
    all-to-all shuffle of blocks would make every epoch wait for its slowest task before the first image.
    """

    def __init__(self, table: pa.Table, seed: int) -> None:
        self._table = table.combine_chunks()
        self._seed = RandomSeedConfig(seed=seed, reseed_after_execution=True)

    def estimate_inmemory_data_size(self) -> int:
        """Bytes of the rows."""
        return self._table.nbytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """Tasks for one pass; the wanted parallelism does not count: pixels follow in the same task."""
        n = len(self._table)
        seed = self._seed.get_seed_tuple(data_context=data_context or DataContext.get_current())
        order = np.random.default_rng(seed.to_rng_args(0)).permutation(n)
        size = rows_per_task(n)
        shares = (self._table.take(pa.array(order[start : start + size])) for start in range(0, n, size))
        return [_read_task(share, per_task_row_limit) for share in shares]


def _read_task(share: pa.Table, limit: int | None) -> ReadTask:
    facts = BlockMetadata(num_rows=len(share), size_bytes=share.nbytes, input_files=None, exec_stats=None)
    return ReadTask(lambda: [share], facts, share.schema, limit)


def shuffled(table: pa.Table, seed: int) -> Dataset:
    """A dataset of `Shuffled` rows."""
    return ray.data.read_datasource(Shuffled(table, seed))


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
    """Read, decode and fit the image of every row, on CPU workers: see `pixels`."""
    dataset = dataset.map_batches(
        pixels,
        fn_kwargs={"height_px": height_px, "width_px": width_px, "keep": list(keep)},
        batch_size=IMAGES_PER_BLOCK,
        batch_format="pyarrow",
        num_cpus=1,
    )
    # A task hands on each block when it is there, and not all of them at its end.
    dataset.context.target_max_block_size = IMAGES_PER_BLOCK * height_px * width_px * 3
    return dataset


def pixels(
    batch: pa.Table,
    height_px: int,
    width_px: int,
    keep: Sequence[str],
    threads: int = 1,
) -> dict[str, Any]:
    """Read, decode and fit the picture of every row.

    Args:
        batch: rows with a `uri`; tiles also with the columns of `schema.READING`.
        height_px: of the network's input.
        width_px: of the network's input.
        keep: columns to carry along.
        threads: that decode.

    Returns:
        The kept columns, `image` uint8 (n, height, width, 3), `height_px` and `width_px` of the original,
        `sha256` of the file's bytes, empty where it was not read whole (a tile), and `error` and
        `error_message`, empty for a good picture. A broken one is black.
    """
    n = len(batch)
    images = np.zeros((n, height_px, width_px, 3), np.uint8)
    heights, widths = np.zeros(n, np.int32), np.zeros(n, np.int32)
    # Empty and not null for a good image: NumPy batches have no null for text.
    hashes, errors, messages = [""] * n, [""] * n, [""] * n
    found = _pictures(batch.to_pylist(), threads, (height_px, width_px))
    for i, (hashes[i], picture) in enumerate(found):
        if isinstance(picture, image.ImageError):
            errors[i], messages[i] = picture.code, picture.message
        else:
            images[i], heights[i], widths[i] = picture
    return {
        **{name: batch[name].to_numpy() for name in keep},
        schema.IMAGE: images,
        schema.HEIGHT_PX: heights,
        schema.WIDTH_PX: widths,
        schema.SHA256: np.array(hashes, object),
        schema.ERROR: np.array(errors, object),
        schema.ERROR_MESSAGE: np.array(messages, object),
    }


Picture = tuple[np.ndarray, int, int]


def _pictures(
    rows: list[dict[str, Any]], threads: int, size: tuple[int, int]
) -> Iterator[tuple[str, Picture | image.ImageError]]:
    """Hashes and fitted pictures in order; several requests are in flight while others are decoded."""
    with ThreadPoolExecutor(storage.READ_THREADS) as fetching, ThreadPoolExecutor(threads) as decoding:
        contents = [fetching.submit(_try_read, row[schema.URI]) if _is_file(row) else None for row in rows]
        yield from decoding.map(lambda row, content: _picture(row, content, size), rows, contents)


def _is_file(row: dict[str, Any]) -> bool:
    """Whether the picture is a whole file, and not a tile of a slide or known to be broken."""
    return row.get(schema.X_LEVEL0_PX) is None and row.get(schema.ERROR) is None


def _picture(
    row: dict[str, Any],
    content: "Future[bytes | image.ImageError] | None",
    size: tuple[int, int],
) -> tuple[str, Picture | image.ImageError]:
    read = content.result() if content else None
    digest = hashlib.sha256(read).hexdigest() if isinstance(read, bytes) else ""
    try:
        found = picture(row, read)
    except image.ImageError as error:
        return digest, error
    original = found.shape[:2] if _is_file(row) else (row[schema.HEIGHT_PX], row[schema.WIDTH_PX])
    return digest, (image.fit(found, *size), *original)


def picture(row: dict[str, Any], content: bytes | image.ImageError | None = None) -> np.ndarray:
    """The picture of a row as it was stored: uint8 (h, w, 3) RGB.

    Args:
        row: of `schema.READING`, or of the predictions table.
        content: of the file, where it has been read.

    Raises:
        ImageError: it cannot be used.
    """
    if error := row.get(schema.ERROR):
        raise image.ImageError(error, row[schema.ERROR_MESSAGE])
    if row.get(schema.X_LEVEL0_PX) is not None:
        return _tile(row)
    return image.decode(_bytes(_try_read(row[schema.URI]) if content is None else content))


def _tile(row: dict[str, Any]) -> np.ndarray:
    """The pixels of a tile, from the nearest better level of its slide."""
    across, down = row.get(schema.SLIDE_MPP_X), row.get(schema.SLIDE_MPP_Y)
    # As its slide was planned, whatever the file says by now.
    given = pixel_size.Given(override=(across, down) if across and down else None)
    try:
        slide, staged = staging.open_slide(row[schema.URI], given)
        try:
            return _cut(slide, row)
        except image.ImageError:
            # OpenSlide's handle is of no use after an error, its own or that of a tile read beside this one.
            staging.open_slide.cache_clear()
            with open_slide(staged.path, given) as fresh:
                return _cut(fresh, row)
    except StorageError as error:
        raise withheld(error) from error


def _cut(slide: Slide, row: dict[str, Any]) -> np.ndarray:
    level = slide.level_for(row[schema.MPP])
    tile_mpp, downsample = row[schema.MPP], slide.downsamples[level]
    factors = [tile_mpp / mpp / downsample for mpp in (slide.mpp_x, slide.mpp_y)]
    sizes = row[schema.WIDTH_PX], row[schema.HEIGHT_PX]
    width, height = (max(1, round(size * factor)) for size, factor in zip(sizes, factors, strict=True))
    pixels = slide.read(row[schema.X_LEVEL0_PX], row[schema.Y_LEVEL0_PX], level, width, height)
    # Where the axes differ, the finer one is reduced to the other: the network sees square pixels only.
    square = [max(1, round(size * min(factors))) for size in sizes]
    if square == [width, height]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(square, Image.Resampling.BILINEAR))


def _try_read(uri: str) -> bytes | image.ImageError:
    try:
        with image.boundary("unreadable", f"{uri}: cannot read it"):
            return storage.read_bytes(uri, image.MAX_FILE_BYTES)
    except StorageError as error:
        return withheld(error)
    except image.ImageError as error:
        return error


def _bytes(content: bytes | image.ImageError) -> bytes:
    if isinstance(content, image.ImageError):
        raise content
    return content


def withheld(error: StorageError) -> image.ImageError:
    """What it means for a picture that storage does not give it."""
    if isinstance(error, TooLargeError):
        return image.ImageError("too_large", str(error))
    return image.ImageError("unreadable" if error.lasting else image.UNAVAILABLE, str(error))


def inspect(table: pa.Table) -> tuple[pa.Table, dict[str, str], tuple[int, int]]:
    """Read and decode every image once before a training run: its hashes, and whether it is whole.

    Costs about as much as reading one epoch, and makes everything after it exact: duplicates are found by
    content, and broken images are out before anything is split, balanced or counted. Of a field of BreaKHis
    the perceptual hash, by which copies are known again later, takes 8 ms beside 13 ms for its decoding.

    Returns:
        The index without broken images, with `sha256`, `phash` and `tissue_fraction`; `{image_id: what is
        wrong}`; and the most common height and width of the images in pixels.

    Raises:
        StorageError: see `checked`.
    """
    result = checked(table, _inspect_batch)
    whole = pc.is_null(result[schema.ERROR])
    bad, good = result.filter(pc.invert(whole)), result.filter(whole)
    broken = dict(_pairs(bad, schema.IMAGE_ID, schema.ERROR))
    sizes = Counter(_pairs(good, schema.HEIGHT_PX, schema.WIDTH_PX))
    usual = max(sizes, key=lambda size: (sizes[size], size), default=(0, 0))
    form = schema.SPLIT if schema.PART in table.column_names else schema.INDEX
    return good.select(form.names).cast(form), broken, usual


def checked(table: pa.Table, check: Callable[[pa.Table], pa.Table]) -> pa.Table:
    """What `check` makes of every batch of rows, on CPU workers: rows without pixels, by image id.

    Raises:
        StorageError: storage did not give an image, and may give it later.
    """
    dataset = rows(table).map_batches(check, batch_size=None, batch_format="pyarrow", num_cpus=1)
    found: list[pa.Table] = []
    done, step = 0, max(1, len(table) // PROGRESS_STEPS)
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        require_given(batch[schema.IMAGE_ID].to_pylist(), batch[schema.ERROR].to_pylist())
        found.append(batch)
        if (done + len(batch)) // step > done // step:
            print(f"checked {done + len(batch):,} of {counted(len(table), 'image')}", flush=True)
        done += len(batch)
    return pa.concat_tables(found).sort_by(schema.IMAGE_ID)


def _pairs(table: pa.Table, *names: str) -> Iterator[tuple[Any, ...]]:
    return zip(*(table[name].to_pylist() for name in names), strict=True)


def _inspect_batch(batch: pa.Table) -> pa.Table:
    found = [_inspected(content) for content in contents(batch[schema.URI].to_pylist())]
    columns = pa.Table.from_pylist(found, schema=_INSPECTED)
    for field in _INSPECTED:
        position = batch.schema.get_field_index(field.name)
        if position < 0:
            batch = batch.append_column(field, columns[field.name])
        else:
            batch = batch.set_column(position, field, columns[field.name])
    return batch


_INSPECTED = pa.schema(
    [
        (schema.SHA256, pa.string()),
        (schema.PHASH, pa.string()),
        (schema.TISSUE_FRACTION, pa.float32()),
        (schema.HEIGHT_PX, pa.int32()),
        (schema.WIDTH_PX, pa.int32()),
        (schema.ERROR, pa.string()),
    ]
)


def _inspected(content: bytes | image.ImageError) -> dict[str, Any]:
    try:
        pixels = image.decode(data := _bytes(content))
    except image.ImageError as error:
        return {schema.ERROR: f"{error.code}: {error.message}"}
    from bcd import appearance  # takes seconds, and no other worker needs it

    height, width, _ = pixels.shape
    size = {schema.HEIGHT_PX: height, schema.WIDTH_PX: width}
    return {schema.SHA256: hashlib.sha256(data).hexdigest(), **size, **appearance.hashed(pixels)}


def contents(uris: list[str]) -> Iterator[bytes | image.ImageError]:
    """Contents in order; several requests are in flight while the caller decodes."""
    with ThreadPoolExecutor(storage.READ_THREADS) as pool:
        yield from pool.map(_try_read, uris)


def require_given(names: Sequence[str], errors: Sequence[str | None]) -> None:
    """Stop where storage did not give an image: left out, it would change every number without a word.

    Args:
        names: image ids.
        errors: the typed code of each image, whatever follows it; None for a good one.

    Raises:
        StorageError: names the first such image.
    """
    lost = [name for name, error in zip(names, errors, strict=True) if is_unavailable(error)]
    if lost:
        raise StorageError(
            f"storage did not give {lost[0]} (and {len(lost) - 1} more beside it), which is no fault of the "
            f"image: {ASK_AGAIN}"
        )


def is_unavailable(error: str | None) -> bool:
    """Whether a typed error, with or without its message, tells of storage and not of the image."""
    return error is not None and error.partition(":")[0] == image.UNAVAILABLE


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
    """Stop where an image that was whole when the run began is so no longer, or is not given any more.

    Raises:
        BcdError: names the first such image.
    """
    require_given(names.tolist(), errors.tolist())
    for name, error in zip(names, errors, strict=True):
        if error:
            raise BcdError(f"{name} became unusable after the run began: {error}")
