"""Prepared images: decoded and fitted once, stored as raw pixels, and found again by content.

A shard is two files. `ID.rgb` contains images one after another, each uint8 (height, width, 3) RGB.
`ID.parquet` has a row of `schema.PREPARED` for each of them, in the same order, and is written last: pixels
without it are not used. A shard is never changed, so that many jobs may read and write a folder at once.
"""

import re
import shutil
import time
import uuid
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema, storage
from bcd.errors import StorageError
from bcd.imaging import image

# A shard has at most this many bytes of pixels, which a process holds until it writes them.
SHARD_BYTES = 2**25
PIXELS, INDEX = ".rgb", ".parquet"
# Of a disk's free space, prepared images take at most this share.
SHARE_OF_DISK = 0.5


@dataclass(frozen=True)
class Store:
    """Prepared images of one size below a folder, a local path, s3:// or gs://."""

    uri: str
    height_px: int
    width_px: int

    @property
    def folder(self) -> str:
        """Folder of the shards: another size, or another version of decoding and fitting, has its own."""
        return storage.join(self.uri, f"{self.height_px}x{self.width_px}-v{image.DECODER_VERSION}")

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return self.height_px * self.width_px * 3

    def has_room(self, n_images: int) -> bool:
        """Whether so many images fit; an object store has no limit."""
        if storage.is_remote(self.uri):
            return True
        folder = Path(storage.absolute(self.uri))
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        return n_images * self.image_bytes <= SHARE_OF_DISK * shutil.disk_usage(existing).free


def write(store: Store, facts: Sequence[Mapping[str, Any]], images: Sequence[np.ndarray]) -> None:
    """Write one shard: images uint8 (height, width, 3), and the facts of each (`schema.PREPARED`, without
    its checksum). Raises StorageError; what was written by then is not used."""
    # Later shards sort after earlier ones.
    uri = storage.join(store.folder, f"{time.time_ns():016x}-{uuid.uuid4().hex[:12]}")
    sums = [{schema.CHECKSUM: zlib.crc32(pixels.tobytes())} for pixels in images]
    rows = [{**given, **own} for given, own in zip(facts, sums, strict=True)]
    storage.write_bytes(uri + PIXELS, np.stack(images).tobytes())
    storage.write_table(uri + INDEX, pa.Table.from_pylist(rows, schema=schema.PREPARED))


def list_images(store: Store) -> tuple[pa.Table, int]:
    """The images of a store, sorted by content: `schema.PREPARED` with the shard of each and its row there.

    Returns also the number of unusable shards: their index is damaged or of another kind, or their pixels are
    missing or incomplete. An image that is there several times is in the result once, the latest.
    """
    files = {file.path: file for file in storage.list_files_if_any(store.folder)}
    names = sorted(path.removesuffix(INDEX) for path in files if re.fullmatch(rf"[\w-]+{INDEX}", path))
    with ThreadPoolExecutor(storage.READ_THREADS) as pool:
        found = list(pool.map(lambda name: _shard(store, files.get(name + PIXELS), name), names))
    tables = [table for table in found if table is not None]
    table = pa.concat_tables([_EMPTY, *tables])
    latest_first = table.take(pa.array(np.arange(len(table))[::-1]))
    return _distinct(latest_first).sort_by(schema.SHA256), len(found) - len(tables)


_PLACE = pa.schema([(schema.SHARD, pa.string()), (schema.SHARD_ROW, pa.int32())])
_EMPTY = pa.schema([*schema.PREPARED, *_PLACE]).empty_table()


def _shard(store: Store, pixels: storage.File | None, name: str) -> pa.Table | None:
    try:
        table = storage.read_table(storage.join(store.folder, name + INDEX))
    except StorageError:
        return None
    is_whole = pixels is not None and pixels.size_bytes == len(table) * store.image_bytes
    if table.schema != schema.PREPARED or not is_whole or pixels is None:
        return None
    place = [pa.array([pixels.uri] * len(table)), pa.array(np.arange(len(table), dtype=np.int32))]
    return pa.table([*table.columns, *place], schema=_EMPTY.schema)


def _distinct(table: pa.Table) -> pa.Table:
    """The first row of each content."""
    first = pa.table({schema.SHA256: table[schema.SHA256], "at": np.arange(len(table))})
    kept = first.group_by(schema.SHA256, use_threads=False).aggregate([("at", "min")])
    return table.take(kept["at_min"])


def with_places(rows: pa.Table, index: pa.Table) -> pa.Table:
    """Rows with `sha256`, and with the columns by which `read` finds the prepared image of each: null where
    the index, from `list_images`, has none."""
    at = pc.index_in(rows[schema.SHA256], value_set=index[schema.SHA256].combine_chunks())
    columns = (schema.SHARD, schema.SHARD_ROW, schema.CHECKSUM, schema.HEIGHT_PX, schema.WIDTH_PX)
    for name in columns:
        rows = rows.append_column(_EMPTY.schema.field(name), index[name].take(at))
    return rows


def read(row: Mapping[str, Any], height_px: int, width_px: int) -> np.ndarray | None:
    """The prepared image of a row, uint8 (height, width, 3), or None where it has none, or its shard is no
    longer what it was."""
    if (shard := row.get(schema.SHARD)) is None:
        return None
    n_bytes = height_px * width_px * 3
    try:
        data = storage.read_range(shard, row[schema.SHARD_ROW] * n_bytes, n_bytes)
    except StorageError:
        return None
    if len(data) < n_bytes or zlib.crc32(data) != row[schema.CHECKSUM]:
        return None
    return np.frombuffer(data, np.uint8).reshape(height_px, width_px, 3)
