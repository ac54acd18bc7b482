"""Read every image of a data set once, on CPU workers: its hashes, and whether it can be used."""

import hashlib
import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from bcd import schema
from bcd.data import read
from bcd.errors import BcdError, DataError, StorageError
from bcd.imaging import decoder, image, prepared
from bcd.imaging.prepared import Store
from bcd.runtime import datasets
from bcd.text import counted, duration, some

logger = logging.getLogger(__name__)

# Number of progress lines.
PROGRESS_STEPS = 10


def inspect_images(
    table: pa.Table, store: Store | None = None, index: pa.Table | None = None
) -> tuple[pa.Table, dict[str, str], tuple[int, int]]:
    """Read and decode every image before a training run.

    Duplicates are found by content, and broken images are excluded before anything is split, balanced or
    counted. An image that is in the store (`index`, of `prepared.list_images`) is read, but not decoded; the
    others are put there. For a field of BreaKHis the perceptual hash, which identifies copies later, takes
    8 ms.

    Returns:
        The index without broken images, with `sha256`, `phash` and `tissue_fraction`; the fault of each
        broken image by id; and the most common height and width of the images in pixels.

    Raises:
        StorageError: see `require_given`.
    """
    known = None if index is None else ray.put(index.combine_chunks())
    result = checked(table, _inspect_batch, store=store, known=known)
    if n := pc.sum(result[_LOST]).as_py():
        logger.warning(f"{counted(n, 'prepared image')} could not be written")
    whole = pc.is_null(result[schema.ERROR])
    bad, good = result.filter(pc.invert(whole)), result.filter(whole)
    broken = dict(_pairs(bad, schema.IMAGE_ID, schema.ERROR))
    sizes = Counter(_pairs(good, schema.HEIGHT_PX, schema.WIDTH_PX))
    usual = max(sizes, key=lambda size: (sizes[size], size), default=(0, 0))
    form = schema.SPLIT if schema.PART in table.column_names else schema.INDEX
    return good.select(form.names).cast(form), broken, usual


def checked(table: pa.Table, check: Callable[..., pa.Table], **options: Any) -> pa.Table:
    """Apply `check`, which returns rows without pixels, to batches on CPU workers; sorted by image id."""
    dataset = datasets.row_dataset(table).map_batches(
        check, batch_size=None, batch_format="pyarrow", num_cpus=1, fn_kwargs=options
    )
    batches: list[pa.Table] = []
    done, step, started = 0, max(1, len(table) // PROGRESS_STEPS), time.monotonic()
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        require_given(batch[schema.IMAGE_ID].to_pylist(), batch[schema.ERROR].to_pylist())
        batches.append(batch)
        if (done + len(batch)) // step > done // step:
            logger.info(_progress(done + len(batch), len(table), time.monotonic() - started))
        done += len(batch)
    return pa.concat_tables(batches).sort_by(schema.IMAGE_ID)


def _progress(done: int, total: int, seconds: float) -> str:
    rate = done / max(seconds, 1e-3)
    left = f"; {duration((total - done) / rate)} left" if done < total else ""
    return f"checked {done:,} of {counted(total, 'image')}; {rate:,.0f} images/s{left}"


def _pairs(table: pa.Table, *names: str) -> Iterator[tuple[Any, ...]]:
    return zip(*(table[name].to_pylist() for name in names), strict=True)


# Whether an image could not be put into the store.
_LOST = "lost"
_INSPECTED = pa.schema(
    [
        (schema.SHA256, pa.string()),
        (schema.PHASH, pa.string()),
        (schema.TISSUE_FRACTION, pa.float32()),
        (schema.HEIGHT_PX, pa.int32()),
        (schema.WIDTH_PX, pa.int32()),
        (schema.ERROR, pa.string()),
        (_LOST, pa.bool_()),
    ]
)


def _inspect_batch(batch: pa.Table, store: Store | None, known: ray.ObjectRef | None) -> pa.Table:
    preparing = _Preparing(store, ray.get(known)) if store else None
    facts = [_inspected(content, preparing) for content in read.contents(batch[schema.URI].to_pylist())]
    if preparing:
        preparing.write()
    inspected = pa.Table.from_pylist(facts, schema=_INSPECTED)
    names = dict.fromkeys(batch.column_names + _INSPECTED.names)
    return pa.table({name: (inspected if name in _INSPECTED.names else batch)[name] for name in names})


class _Preparing:
    """Images of one batch: those in the store, by an index sorted by content, and those to write there."""

    def __init__(self, store: Store, index: pa.Table) -> None:
        self._store, self._index = store, index
        self._facts: list[dict[str, Any]] = []
        self._images: list[np.ndarray] = []

    def known(self, digest: str) -> dict[str, Any] | None:
        """Facts of an image whose prepared image is intact."""
        names = self._index[schema.SHA256]
        at = bisect_left(range(len(names)), digest, key=lambda i: names[i].as_py())
        if at == len(names) or names[at].as_py() != digest:
            return None
        (row,) = self._index.slice(at, 1).to_pylist()
        return None if prepared.read(row, self._store.height_px, self._store.width_px) is None else row

    def add(self, facts: dict[str, Any], pixels: np.ndarray) -> None:
        self._facts.append(facts)
        self._images.append(image.fit(pixels, self._store.height_px, self._store.width_px))
        if (len(self._images) + 1) * self._store.image_bytes > prepared.SHARD_BYTES:
            self.write()

    def write(self) -> None:
        """Write a shard. Where that fails the images are marked as lost, and are decoded when needed."""
        if self._images:
            try:
                prepared.write(self._store, self._facts, self._images)
            except StorageError:
                for facts in self._facts:
                    facts[_LOST] = True
        self._facts, self._images = [], []


def _inspected(content: bytes | image.ImageError, preparing: _Preparing | None) -> dict[str, Any]:
    try:
        data = read.require_bytes(content)
        digest = hashlib.sha256(data).hexdigest()
        if preparing and (facts := preparing.known(digest)):
            return facts
        pixels = decoder.decode_safely(data)
    except image.ImageError as error:
        return {schema.ERROR: f"{error.code}: {error.message}"}
    from bcd.imaging import appearance  # takes seconds, and no other worker needs it

    height, width, _ = pixels.shape
    size = {schema.HEIGHT_PX: height, schema.WIDTH_PX: width}
    facts = {schema.SHA256: digest, **size, **appearance.hashed(pixels)}
    if preparing:
        preparing.add(facts, pixels)
    return facts


def require_given(names: Sequence[str], errors: Sequence[str | None]) -> None:
    """Raises StorageError for images with a transient error: leaving them out would silently change numbers.

    `errors` holds the code of each image, with or without a message, or None.
    """
    codes = [error and error.partition(":")[0] for error in errors]
    if lost := [name for name, code in zip(names, codes, strict=True) if code == image.UNAVAILABLE]:
        raise StorageError(
            f"storage failed to deliver {lost[0]} (and {len(lost) - 1} more images); the image itself is not "
            "at fault"
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
