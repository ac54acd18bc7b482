"""Read every image of a data set once, on CPU workers: its hashes, and whether it can be used."""

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
from bcd.text import counted, some

# What to do after a transient error of storage.
ASK_AGAIN = "check the network and the credentials, and run the same command again"
# Number of progress lines.
PROGRESS_STEPS = 10


def inspect_images(table: pa.Table) -> tuple[pa.Table, dict[str, str], tuple[int, int]]:
    """Read and decode every image before a training run.

    Costs about as much as reading one epoch, but duplicates are found by content, and broken images are
    excluded before anything is split, balanced or counted. For a field of BreaKHis the perceptual hash, which
    identifies copies later, takes 8 ms and decoding 13 ms.

    Returns:
        The index without broken images, with `sha256`, `phash` and `tissue_fraction`; the fault of each
        broken image by id; and the most common height and width of the images in pixels.

    Raises:
        StorageError: see `require_given`.
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
    """Apply `check`, which returns rows without pixels, to batches on CPU workers; sorted by image id."""
    dataset = datasets.row_dataset(table).map_batches(
        check, batch_size=None, batch_format="pyarrow", num_cpus=1
    )
    batches: list[pa.Table] = []
    done, step = 0, max(1, len(table) // PROGRESS_STEPS)
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        require_given(batch[schema.IMAGE_ID].to_pylist(), batch[schema.ERROR].to_pylist())
        batches.append(batch)
        if (done + len(batch)) // step > done // step:
            print(f"checked {done + len(batch):,} of {counted(len(table), 'image')}", flush=True)
        done += len(batch)
    return pa.concat_tables(batches).sort_by(schema.IMAGE_ID)


def _pairs(table: pa.Table, *names: str) -> Iterator[tuple[Any, ...]]:
    return zip(*(table[name].to_pylist() for name in names), strict=True)


def _inspect_batch(batch: pa.Table) -> pa.Table:
    facts = [_inspected(content) for content in read.contents(batch[schema.URI].to_pylist())]
    inspected = pa.Table.from_pylist(facts, schema=_INSPECTED)
    names = dict.fromkeys(batch.column_names + _INSPECTED.names)
    return pa.table({name: (inspected if name in _INSPECTED.names else batch)[name] for name in names})


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
    """Raises StorageError for images with a transient error: leaving them out would silently change numbers.

    `errors` holds the code of each image, with or without a message, or None.
    """
    codes = [error and error.partition(":")[0] for error in errors]
    if lost := [name for name, code in zip(names, codes, strict=True) if code == image.UNAVAILABLE]:
        raise StorageError(
            f"storage failed to deliver {lost[0]} (and {len(lost) - 1} more images); the image itself is not "
            f"at fault: {ASK_AGAIN}"
        )


def check_bad_fraction(broken: dict[str, str], total: int, allowed: float) -> list[str]:
    """One line per broken image; raises DataError if more than the allowed fraction is broken."""
    named = [f"{name}: {reason}" for name, reason in sorted(broken.items())]
    if len(broken) > allowed * total:
        raise DataError(
            f"{len(broken)} of {total} images are broken, more than --max-bad-fraction {allowed:g} allows: "
            f"{some(named, 5, '; ')}"
        )
    return named


def require_whole(errors: np.ndarray, names: np.ndarray) -> None:
    """Raises BcdError or StorageError for the first image that became unusable after the run began."""
    require_given(names.tolist(), errors.tolist())
    for name, error in zip(names, errors, strict=True):
        if error:
            raise BcdError(f"{name} became unusable after the run began: {error}")
