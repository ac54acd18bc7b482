"""What an archive holds: a row per field of view and per whole slide, without opening a single one."""

from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa

from bcd import index, manifest, schema, slide, storage
from bcd.errors import DataError

SUFFIXES = tuple(dict.fromkeys(index.IMAGE_SUFFIXES + slide.SLIDE_SUFFIXES))


@dataclass(frozen=True)
class Archive:
    """The inputs, one row each (schema `schema.INDEX`, sorted by id), and how many files are none."""

    table: pa.Table
    ignored: int


def read(uri: str) -> Archive:
    """List the inputs below a folder, or of a manifest.

    A file counts by its suffix; what it really holds is found out when it is read. Several DICOM files of
    one folder are one slide. A manifest needs a column `uri`; `image_id`, `patient`, `case`, `slide` and
    `mpp` are carried along.

    Raises:
        DataError: nothing is there to score.
        StorageError: the URI cannot be read.
    """
    if manifest.is_one(uri):
        return Archive(_from_manifest(uri), 0)
    files = storage.list_files(uri)
    kept = set(slide.primary([f.path for f in files if f.path.lower().endswith(SUFFIXES)]))
    if not kept:
        raise DataError(f"{uri}: no image or slide below it; expected {', '.join(SUFFIXES)} files")
    rows = [
        {schema.IMAGE_ID: f.path, schema.URI: f.uri, schema.SIZE_BYTES: f.size_bytes}
        for f in files
        if f.path in kept
    ]
    mirax = {PurePosixPath(path).with_suffix("") for path in kept if path.lower().endswith(slide.MRXS)}
    others = [PurePosixPath(f.path) for f in files if not f.path.lower().endswith(SUFFIXES)]
    ignored = sum(mirax.isdisjoint(other.parents) for other in others)
    return Archive(pa.Table.from_pylist(rows, schema=schema.INDEX), ignored)


def _from_manifest(uri: str) -> pa.Table:
    rows = manifest.inputs(manifest.read(uri), copies=True)
    rows.sort(key=lambda row: row[schema.IMAGE_ID])
    return pa.Table.from_pylist(rows, schema=schema.INDEX)
