"""Every image of a data set read once, on CPU workers: its hashes, and whether it can be used."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema
from bcd.data import read
from bcd.errors import BcdError, DataError, StorageError
from bcd.imaging import image
from bcd.runtime import datasets
from bcd.text import counted

# What to do where storage fails for a while.
ASK_AGAIN = "check the network and the credentials, and run the same command again"
# The largest share of the work between two progress lines.
PROGRESS_STEPS = 10


def inspect_images(table: pa.Table) -> tuple[pa.Table, dict[str, str], tuple[int, int]]:
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
    dataset = datasets.row_dataset(table).map_batches(
        check, batch_size=None, batch_format="pyarrow", num_cpus=1
    )
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
    found = [_inspected(content) for content in read.contents(batch[schema.URI].to_pylist())]
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
        pixels = image.decode(data := read.require_bytes(content))
    except image.ImageError as error:
        return {schema.ERROR: f"{error.code}: {error.message}"}
    from bcd.imaging import appearance  # takes seconds, and no other worker needs it

    height, width, _ = pixels.shape
    size = {schema.HEIGHT_PX: height, schema.WIDTH_PX: width}
    return {schema.SHA256: hashlib.sha256(data).hexdigest(), **size, **appearance.hashed(pixels)}


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
