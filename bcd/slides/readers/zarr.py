"""OME-Zarr: a folder with a pyramid as compressed chunks, read where it is, from the disk or a store.

Versions 0.4 and 0.5 (Zarr v2 and v3): https://ngff.openmicroscopy.org/0.5/index.html. The first image of the
folder counts, as in what bioformats2raw writes. Only the chunks of a rectangle are fetched.
"""

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

from bcd import disk, storage
from bcd.errors import MissingError
from bcd.imaging.container import MAX_PIXELS
from bcd.imaging.image import ImageError, boundary
from bcd.slides.readers import codecs
from bcd.slides.readers.interface import MPP_X, MPP_Y, UNREADABLE, Facts

ARRAYS = ("zarr.json", ".zarray")
MAX_METADATA_BYTES, MAX_LEVELS = 2**24, 100
# Of a chunk, before and after it is decompressed; of decompressed chunks that are kept.
MAX_CHUNK_BYTES, CACHE_BYTES = 3 * MAX_PIXELS, 2**26
# A rectangle of chunks with fewer pixels would need thousands of requests.
LEAST_CHUNK_PX = 64 * 64
# µm of a unit of length. https://ngff.openmicroscopy.org/0.5/index.html#axes-md
UNITS_UM = {"angstrom": 1e-4, "nanometer": 1e-3, "micrometer": 1, "millimeter": 1e3, "centimeter": 1e4}
UNITS_UM |= {"meter": 1e6, "inch": 25_400}
READER, COLOURS = "zarr", 3
# The same type in v2 and v3; the folder of the first image in one of several.
BYTES, FIRST = ("|u1", "uint8"), "/0"
# Axes of an image, in the order in which they are read.
IN_PLANE = ("y", "x", "c")


@dataclass(frozen=True)
class Array:
    """A level: where its chunks are, their keys before and between numbers, shape and chunks along y, x and
    c, places of these axes, the number of axes, the value of missing chunks, and what
    decompresses them."""

    uri: str
    prefix: str
    separator: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    axes: tuple[int, ...]
    n_axes: int
    fill: int
    decompress: codecs.Decompress

    def chunk(self, *numbers: int) -> np.ndarray:
        """Fetch and decompress a chunk by its numbers along y, x and c: uint8 (h, w, channels). Raises
        ImageError for a damaged one, StorageError for one that cannot be fetched."""
        places = [0] * self.n_axes
        for axis, number in zip(self.axes, numbers, strict=True):
            places[axis] = number
        key = self.prefix + self.separator.join(map(str, places))
        try:
            data = storage.read_bytes(storage.join(self.uri, key), MAX_CHUNK_BYTES)
        except MissingError:
            return np.full(self.chunks, self.fill, np.uint8)
        n_bytes = math.prod(self.chunks)
        with boundary(*UNREADABLE):
            data = self.decompress(data, n_bytes)
            if len(data) != n_bytes:
                raise ImageError("unreadable", f"chunk {key} has {len(data):,} bytes; expected {n_bytes:,}")
            order = sorted(range(len(IN_PLANE)), key=lambda axis: self.axes[axis])
            stored = np.frombuffer(data, np.uint8).reshape([self.chunks[axis] for axis in order])
            return stored.transpose(np.argsort(order))


class ZarrReader:
    """A slide at any URI; see `interface.Reader`."""

    def __init__(self, uri: str) -> None:
        """Raises ImageError `unreadable` or `unsupported_format`, StorageError where the store fails."""
        with boundary(*UNREADABLE):
            levels, properties = _levels(uri)
            sizes = tuple((level.shape[1], level.shape[0]) for level in levels)
            width, height = sizes[0]
            ratios = tuple((width / across + height / down) / 2 for across, down in sizes)
        self.facts = Facts(sizes, ratios, properties, None, READER)
        self._levels = levels
        largest = max(math.prod(level.chunks) for level in levels)
        self._chunk = lru_cache(max(4, CACHE_BYTES // largest))(self._decoded)
        # One after another on a disk; a store is slow to answer and answers many at a time.
        self._is_remote = storage.is_remote(uri)

    def _decoded(self, level: int, *numbers: int) -> np.ndarray:
        return self._levels[level].chunk(*numbers)

    def read(
        self, x_level0_px: int, y_level0_px: int, level: int, width_px: int, height_px: int
    ) -> np.ndarray:
        """See `interface.Reader`; a place between pixels of a level is rounded. Raises ImageError as
        `Array.chunk`."""
        grid, downsample = self._levels[level], self.facts.downsamples[level]
        top, left = round(y_level0_px / downsample), round(x_level0_px / downsample)
        begins = (max(0, top), max(0, left), 0)
        wanted = (top + height_px, left + width_px, COLOURS)
        ends = tuple(map(min, wanted, grid.shape))
        numbers = [
            range(begin // step, -(-end // step)) if begin < end else range(0)
            for begin, end, step in zip(begins, ends, grid.chunks, strict=True)
        ]
        pixels = np.full((height_px, width_px, COLOURS), 255, np.uint8)
        with ThreadPoolExecutor(storage.READ_THREADS) if self._is_remote else nullcontext() as pool:
            found = (pool.map if pool else map)(lambda place: self._chunk(level, *place), product(*numbers))
            for place, chunk in zip(product(*numbers), found, strict=True):
                start = [number * step for number, step in zip(place, grid.chunks, strict=True)]
                first = [max(a, b) for a, b in zip(start, begins, strict=True)]
                part = chunk[tuple(slice(f - s, e - s) for f, s, e in zip(first, start, ends, strict=True))]
                y, x, c = first[0] - top, first[1] - left, first[2]
                pixels[y:, x:, c:][: part.shape[0], : part.shape[1], : part.shape[2]] = part
        return pixels

    def close(self) -> None:
        """Forget the chunks; no file is open."""
        self._chunk.cache_clear()


def _metadata(uri: str, names: Sequence[str]) -> Any:
    """Content of the first of these files."""
    for name in names:
        try:
            return json.loads(storage.read_bytes(storage.join(uri, name), MAX_METADATA_BYTES))
        except MissingError:
            continue
    raise ImageError("unreadable", f"{uri} has no {' or '.join(names)}")


def _image(uri: str) -> tuple[str, Mapping[str, Any]]:
    """The first image of a folder: where it is, and its description."""
    found = _metadata(uri, disk.FOLDER_HEADS)
    attributes = found.get("attributes", found)
    attributes = attributes.get("ome", attributes)
    if "multiscales" in attributes:
        return uri, attributes["multiscales"][0]
    if uri.endswith(FIRST):
        raise ImageError("unreadable", f"{uri} describes no image; expected an OME-Zarr")
    return _image(uri + FIRST)


def _levels(uri: str) -> tuple[list[Array], Mapping[str, str]]:
    """The levels of a folder, the largest first, and the properties that state µm per pixel."""
    root, image = _image(uri)
    names = [axis["name"] for axis in image["axes"]]
    levels = image["datasets"]
    if not 0 < len(levels) <= MAX_LEVELS:
        raise ImageError("unreadable", f"it has {len(levels)} levels")
    paths = [str(level["path"]) for level in levels]
    if any(".." in path.split("/") or path.startswith("/") or "://" in path for path in paths):
        raise ImageError("unreadable", "it names arrays outside of its folder")
    scales = [_scale(part, len(names)) for part in (image, levels[0])]
    properties = {}
    for axis, name in (("x", MPP_X), ("y", MPP_Y)):
        place = names.index(axis)
        if unit := UNITS_UM.get(image["axes"][place].get("unit", "")):
            properties[name] = repr(unit * math.prod(scale[place] for scale in scales))
    return [_array(storage.join(root, path), names) for path in paths], properties


def _scale(part: Mapping[str, Any], n_axes: int) -> Sequence[float]:
    """The factors by which pixels of a part are scaled along each axis."""
    given = [one["scale"] for one in part.get("coordinateTransformations", ()) if one["type"] == "scale"]
    return [float(value) for value in given[0]] if given else [1.0] * n_axes


def _array(uri: str, names: Sequence[str]) -> Array:
    """An array of an image with axes of these names. Raises ImageError `unsupported_format` where it is no
    RGB of 8 bits in one plane, or stored in another way than is read."""
    found = _metadata(uri, ARRAYS)
    shape, is_v2 = found["shape"], found["zarr_format"] == 2
    axes = _axes(found["dtype" if is_v2 else "data_type"], names, shape)
    chunks = found["chunks"] if is_v2 else found["chunk_grid"]["configuration"]["chunk_shape"]
    prefix, separator = ("", found.get("dimension_separator", ".")) if is_v2 else _keys(found)
    array = Array(
        uri=uri,
        prefix=prefix,
        separator=separator,
        shape=tuple(shape[axis] for axis in axes),
        chunks=tuple(chunks[axis] for axis in axes),
        axes=axes,
        n_axes=len(names),
        fill=int(np.uint8(found["fill_value"] or 0)),
        decompress=codecs.find_codec(found),
    )
    height, width, channels = array.chunks
    is_read = min(LEAST_CHUNK_PX, array.shape[0] * array.shape[1]) <= height * width <= MAX_PIXELS
    if not is_read or channels > COLOURS or min(*array.chunks, *array.shape) < 1:
        raise ImageError("unsupported_format", f"an OME-Zarr in chunks of {width:,} x {height:,} px")
    return array


def _axes(kind: str, names: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
    """Places of y, x and c among the axes."""
    if kind in BYTES and set(IN_PLANE) <= set(names):
        axes = tuple(map(names.index, IN_PLANE))
        if shape[axes[2]] == COLOURS == math.prod(shape) // math.prod(shape[axis] for axis in axes[:2]):
            return axes
    sizes = ", ".join(f"{name} {size}" for name, size in zip(names, shape, strict=True))
    raise ImageError(
        "unsupported_format", f"an OME-Zarr of {kind}, {sizes}; expected uint8, c {COLOURS}, 1 plane"
    )


def _keys(array: Mapping[str, Any]) -> tuple[str, str]:
    """What is before and between the numbers in the key of a chunk of Zarr v3."""
    encoding = array["chunk_key_encoding"]
    is_default = encoding["name"] == "default"
    separator = encoding.get("configuration", {}).get("separator", "/" if is_default else ".")
    return f"c{separator}" if is_default else "", separator
