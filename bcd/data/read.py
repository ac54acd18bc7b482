"""Read and decode the image of a row, a whole file or a tile of a slide."""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image

from bcd import schema, storage
from bcd.errors import StorageError, TooLargeError
from bcd.imaging import appearance, decoder, image, prepared
from bcd.slides import pixel_size, slide_cache
from bcd.slides.slide import Slide

# An image fitted into the network's input, and its original height and width.
Picture = tuple[np.ndarray, int, int]
# Of a row that is a file: its prepared image, or its bytes; None where these are read in their turn.
Content = np.ndarray | bytes | image.ImageError | None
# Files that are fetched before they are needed, together at most 128 MiB; larger ones are read in their turn.
AHEAD, AHEAD_BYTES = storage.READ_THREADS, 2**24
Given = TypeVar("Given")
Fetched = TypeVar("Fetched")


def pixels(
    batch: pa.Table, height_px: int, width_px: int, keep: Sequence[str], stain: bool = False
) -> dict[str, Any]:
    """Read, decode and fit the image of every row into the network's input.

    Rows have a `uri`; tiles, and prepared images, also the other columns of `schema.READING`. Returns the
    columns `keep`, `image` uint8 (n, height, width, 3), black if broken, `height_px` and `width_px` of the
    original, `sha256` of the file's bytes, empty for a tile, and `error` and `error_message`, empty for a
    good image; with `stain` also the columns `schema.STAIN` of the fitted image, NaN where unknown.
    """
    n = len(batch)
    images = np.zeros((n, height_px, width_px, 3), np.uint8)
    heights, widths = np.zeros(n, np.int32), np.zeros(n, np.int32)
    # Empty and not null for a good image: NumPy batches have no null for text.
    hashes, errors, messages = [""] * n, [""] * n, [""] * n
    results = _fitted(batch.to_pylist(), (height_px, width_px))
    for i, (hashes[i], result) in enumerate(results):
        if isinstance(result, image.ImageError):
            errors[i], messages[i] = result.code, result.message
        else:
            images[i], heights[i], widths[i] = result
    return {
        **{name: batch[name].to_numpy() for name in keep},
        **(_stains(images, errors) if stain else {}),
        schema.IMAGE: images,
        schema.HEIGHT_PX: heights,
        schema.WIDTH_PX: widths,
        schema.SHA256: np.array(hashes, object),
        schema.ERROR: np.array(errors, object),
        schema.ERROR_MESSAGE: np.array(messages, object),
    }


def _stains(images: np.ndarray, errors: Sequence[str]) -> dict[str, np.ndarray]:
    broken = [math.nan] * len(schema.STAIN)
    pairs = zip(images, errors, strict=True)
    measured = [broken if error else appearance.measure_stain(one) for one, error in pairs]
    values = np.reshape(np.array(measured, np.float32), (-1, len(schema.STAIN)))
    return dict(zip(schema.STAIN, values.T, strict=True))


def _fitted(
    rows: list[dict[str, Any]], size: tuple[int, int]
) -> Iterator[tuple[str, Picture | image.ImageError]]:
    """Hashes and fitted images in order; files are fetched while others are decoded."""
    contents = _ahead(lambda row: _fetched(row, size), rows)
    for row, content in zip(_with_tiles(rows), contents, strict=True):
        yield _fit(row, content, size)


def _with_tiles(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows; before the first of several tiles of a slide, a store is asked for the parts that all of them
    need, those of neighbours together."""
    for slide_of_rows, same in groupby(rows, _slide_of):
        tiles = list(same)
        # Errors are those of the rows, when they are read.
        with suppress(image.ImageError, StorageError):
            if slide_of_rows:
                slide, _ = slide_cache.open_staged(*slide_of_rows)
                slide.request([_rectangle(slide, row)[0] for row in tiles])
        yield from tiles


def _slide_of(row: dict[str, Any]) -> tuple[str, pixel_size.Given] | None:
    """The slide of a tile that can be read."""
    is_tile = row.get(schema.X_LEVEL0_PX) is not None and not row.get(schema.ERROR)
    return (row[schema.URI], _given(row)) if is_tile else None


def _ahead(fetch: Callable[[Given], Fetched], given: Iterable[Given]) -> Iterator[Fetched]:
    """Results in order; some are fetched while the caller uses those before."""
    with ThreadPoolExecutor(storage.READ_THREADS) as pool:
        waiting = deque[Future[Fetched]]()
        for one in given:
            waiting.append(pool.submit(fetch, one))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _is_file(row: dict[str, Any]) -> bool:
    """Whether the image is a whole file, neither a tile of a slide nor known to be broken."""
    return row.get(schema.X_LEVEL0_PX) is None and row.get(schema.ERROR) is None


def _fetched(row: dict[str, Any], size: tuple[int, int]) -> Content:
    if not _is_file(row):
        return None
    found = prepared.read(row, *size)
    return _try_read_ahead(row[schema.URI]) if found is None else found


def _fit(
    row: dict[str, Any], content: Content, size: tuple[int, int]
) -> tuple[str, Picture | image.ImageError]:
    read = _try_read(row[schema.URI]) if content is None and _is_file(row) else content
    if isinstance(read, np.ndarray):
        return row[schema.SHA256], (read, row[schema.HEIGHT_PX], row[schema.WIDTH_PX])
    digest = hashlib.sha256(read).hexdigest() if isinstance(read, bytes) else ""
    if digest and row.get(schema.SHA256) not in (None, digest):
        return digest, image.ImageError("changed", "the file is another one than when it was inspected")
    try:
        found = picture(row, read)
    except image.ImageError as error:
        return digest, error
    original = found.shape[:2] if _is_file(row) else (row[schema.HEIGHT_PX], row[schema.WIDTH_PX])
    return digest, (image.fit(found, *size), *original)


def picture(row: dict[str, Any], content: bytes | image.ImageError | None = None) -> np.ndarray:
    """The image of a row as stored: uint8 (h, w, 3) RGB; raises `ImageError` if it cannot be used.

    The row is of `schema.READING` or of the predictions table; `content` is that of its file, if it has been
    read.
    """
    if error := row.get(schema.ERROR):
        raise image.ImageError(error, row[schema.ERROR_MESSAGE])
    if row.get(schema.X_LEVEL0_PX) is not None:
        return _tile(row)
    return decoder.decode_safely(require_bytes(_try_read(row[schema.URI]) if content is None else content))


def _tile(row: dict[str, Any]) -> np.ndarray:
    """The pixels of a tile, from the nearest finer level of its slide."""
    given = _given(row)
    try:
        slide, _ = slide_cache.open_staged(row[schema.URI], given)
        try:
            return _cut(slide, row)
        except StorageError:
            # It may have been replaced: the next tile opens it again.
            slide_cache.open_staged.cache_clear()
            raise
    except StorageError as error:
        raise withheld(error) from error


def _given(row: dict[str, Any]) -> pixel_size.Given:
    """The scale with which the slide of a tile was planned, even if the file now states another."""
    across, down = row.get(schema.SLIDE_MPP_X), row.get(schema.SLIDE_MPP_Y)
    return pixel_size.Given(override=(across, down) if across and down else None)


def _cut(slide: Slide, row: dict[str, Any]) -> np.ndarray:
    rectangle, square = _rectangle(slide, row)
    pixels = slide.read(*rectangle)
    if square == rectangle[3:]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(square, Image.Resampling.BILINEAR))


def _rectangle(slide: Slide, row: dict[str, Any]) -> tuple[tuple[int, int, int, int, int], tuple[int, int]]:
    """Left and upper edge at level 0, level, width and height there of a tile; and width and height in square
    pixels, which the network expects: if the axes differ, the finer one is reduced to the other."""
    level = slide.level_for(row[schema.MPP])
    tile_mpp, downsample = row[schema.MPP], slide.downsamples[level]
    factors = [tile_mpp / mpp / downsample for mpp in (slide.mpp_x, slide.mpp_y)]
    sizes = row[schema.WIDTH_PX], row[schema.HEIGHT_PX]
    width, height = (max(1, round(size * factor)) for size, factor in zip(sizes, factors, strict=True))
    across, down = (max(1, round(size * min(factors))) for size in sizes)
    place = row[schema.X_LEVEL0_PX], row[schema.Y_LEVEL0_PX]
    return (*place, level, width, height), (across, down)


def _try_read_ahead(uri: str) -> bytes | image.ImageError | None:
    found = _try_read(uri, min(AHEAD_BYTES, image.MAX_FILE_BYTES))
    is_large = isinstance(found, image.ImageError) and found.code == "too_large"
    return None if is_large else found


def _try_read(uri: str, most_bytes: int | None = None) -> bytes | image.ImageError:
    try:
        with image.boundary("unreadable", f"{uri}: cannot read it"):
            return storage.read_bytes(uri, most_bytes or image.MAX_FILE_BYTES)
    except StorageError as error:
        return withheld(error)
    except image.ImageError as error:
        return error


def require_bytes(content: bytes | image.ImageError) -> bytes:
    """The bytes of a file; raises the `ImageError` given in their place."""
    if isinstance(content, image.ImageError):
        raise content
    return content


def withheld(error: StorageError) -> image.ImageError:
    """The error of an image whose file storage could not read: permanent or transient."""
    if isinstance(error, TooLargeError):
        return image.ImageError("too_large", str(error))
    return image.ImageError("unreadable" if error.lasting else image.UNAVAILABLE, str(error))


def contents(uris: list[str]) -> Iterator[bytes | image.ImageError]:
    """Contents in order; files are fetched while the caller decodes."""
    for uri, content in zip(uris, _ahead(_try_read_ahead, uris), strict=True):
        yield _try_read(uri) if content is None else content
