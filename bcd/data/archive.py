"""What an archive holds: a row per field of view and per whole slide, and a count of everything else."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from bcd import schema, storage
from bcd.data import index, manifest
from bcd.errors import DataError, StorageError
from bcd.slides import dicom, slide
from bcd.storage import File, Listing

SUFFIXES = tuple(dict.fromkeys(index.IMAGE_SUFFIXES + slide.SLIDE_SUFFIXES))
# What is no input and not counted by its suffix.
NO_SUFFIX, OTHER_DICOM = "without suffix", "DICOM without a slide"
# So many kinds are named in a sentence.
MOST_KINDS = 8
UNREADABLE = "unreadable"
# PNG, JPEG, TIFF and BigTIFF.
IMAGE_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class Archive:
    """The inputs, one row each (schema `schema.INPUTS`, sorted by id), and other entries by kind.

    `versions` has a text for each id that changes with its files, None where none can be looked at.
    """

    table: pa.Table
    passed: Counter[str] = field(default_factory=Counter)
    versions: dict[str, str | None] = field(default_factory=dict)

    @property
    def ignored(self) -> int:
        """How many entries are no inputs."""
        return self.passed.total()


def list_inputs(uri: str) -> Archive:
    """List the inputs below a folder, or of a manifest; or one file.

    A file counts by its suffix; what it really holds is found out when it is read. One without a suffix, or
    with a number for it, counts by its first bytes. DICOM files of one series in one folder are one slide.
    What cannot be read, such as a link to nothing, is an input with an error. A manifest needs a column
    `uri`; `image_id`, `patient`, `case`, `slide` and `mpp` are carried along.

    Raises:
        DataError: nothing is there to score.
        StorageError: the URI cannot be read.
    """
    if manifest.is_one(uri):
        table = _from_manifest(uri)
        ids, uris = (table[name].to_pylist() for name in (schema.IMAGE_ID, schema.URI))
        seen = storage.file_versions(uris)
        return Archive(table, versions={name: seen[place] for name, place in zip(ids, uris, strict=True)})
    single = storage.is_file(uri)
    listing = _alone(uri) if single else storage.list_folder(uri)
    kept, passed = _sort_out(listing)
    if not kept and not listing.faults:
        kinds = (*SUFFIXES, *schema.MANIFEST_SUFFIXES) if single else SUFFIXES
        what = "is a file of another kind" if single else "no image or slide below it"
        there = f"; it holds {described(passed)}" if passed and not single else ""
        raise DataError(f"{uri}: {what}; expected {', '.join(kinds)} files{there}")
    rows = [{schema.IMAGE_ID: f.path, schema.URI: f.uri, schema.SIZE_BYTES: f.size_bytes} for f in kept]
    rows += [_fault(uri, path, why) for path, why in listing.faults.items()]
    rows.sort(key=lambda row: str(row[schema.IMAGE_ID]))
    versions: dict[str, str | None] = {file.path: file.version for file in kept}
    return Archive(pa.Table.from_pylist(rows, schema=schema.INPUTS), passed, versions)


def described(passed: Mapping[str, int]) -> str:
    """Kinds of entries for a sentence, the most frequent first: `12 .bmp, 3 .czi and 4 others`."""
    kinds = sorted(passed.items(), key=lambda kind: (-kind[1], kind[0]))
    named = ", ".join(f"{n:,} {kind}" for kind, n in kinds[:MOST_KINDS])
    rest = sum(n for _, n in kinds[MOST_KINDS:])
    return f"{named} and {rest:,} others" if rest else named


def _alone(uri: str) -> Listing:
    place = storage.absolute(uri)
    size, version = storage.sizes([place])[0] or 0, storage.version(place)
    return Listing([File(place, place.rpartition("/")[2], size, version)])


def _fault(root: str, path: str, why: str) -> dict[str, Any]:
    place = f"{storage.absolute(root)}/{path}"
    return {schema.IMAGE_ID: path, schema.URI: place, schema.ERROR: UNREADABLE, schema.ERROR_MESSAGE: why}


def _sort_out(listing: Listing) -> tuple[list[File], Counter[str]]:
    """Files that are inputs, and how many entries are none, by kind."""
    passed = listing.passed.copy()
    paths = {file.path: PurePosixPath(file.path) for file in listing.files}
    mirax = {paths[path].with_suffix("") for path in paths if path.lower().endswith(slide.MRXS)}
    kept: list[File] = []
    unsure: list[File] = []
    for file in listing.files:
        if slide.is_unnamed(file.path) or file.path.lower().endswith(slide.DICOM):
            unsure.append(file)
        elif file.path.lower().endswith(SUFFIXES):
            kept.append(file)
        elif not mirax or mirax.isdisjoint(paths[file.path].parents):
            passed[paths[file.path].suffix.lower()] += 1
    found, others = _look_into([file for file in unsure if mirax.isdisjoint(paths[file.path].parents)])
    return _with_folders(kept, listing.files if mirax else []) + found, passed + others


def _with_folders(kept: Sequence[File], files: Sequence[File]) -> list[File]:
    """The same files, those of MIRAX slides with the version of their folder."""
    below: dict[PurePosixPath, list[File]] = defaultdict(list)
    for file in files:
        for folder in PurePosixPath(file.path).parents:
            below[folder].append(file)
    folders = {path: PurePosixPath(path).with_suffix("") for path in (file.path for file in kept)}
    return [
        _together([file, *below[folders[file.path]]]) if file.path.lower().endswith(slide.MRXS) else file
        for file in kept
    ]


def _together(parts: Sequence[File]) -> File:
    """The first of the files of a slide, with a version that changes with each of them."""
    told = sorted(f"{file.path} {file.version}" for file in parts)
    return replace(parts[0], version=hashlib.sha256("\n".join(told).encode()).hexdigest())


def _look_into(files: Sequence[File]) -> tuple[list[File], Counter[str]]:
    """The same for files that may be DICOM, or whose names do not say what they are."""
    headers = dicom.headers(files)
    slides = dicom.slides(headers)
    unknown = [file for file in files if headers[file.path] is None]
    with ThreadPoolExecutor(storage.READ_THREADS) as pool:
        images = [file for file, good in zip(unknown, pool.map(_may_be_image, unknown), strict=True) if good]
    by_path = {file.path: file for file in files}
    firsts = [_together([by_path[path] for path in slides[f.path]]) for f in files if f.path in slides]
    passed = Counter({NO_SUFFIX: len(unknown) - len(images)})
    passed[OTHER_DICOM] = sum(header is not None and not header.is_slide for header in headers.values())
    return firsts + images, +passed


def _may_be_image(file: File) -> bool:
    """Whether a file that is no DICOM begins like an image, or is called `.dcm` all the same."""
    if not slide.is_unnamed(file.path):
        return True
    try:
        return storage.read_start(file.uri, 8).startswith(IMAGE_STARTS)
    except StorageError as error:
        if not error.lasting:
            raise
        return True  # its row will say why it cannot be read


def _from_manifest(uri: str) -> pa.Table:
    found = manifest.read_manifest(uri)
    rows = manifest.inputs(found, copies=True)
    _require_whole_slides(rows, [row.where for row in found.rows])
    rows.sort(key=lambda row: row[schema.IMAGE_ID])
    return pa.Table.from_pylist(rows, schema=schema.INPUTS)


def _require_whole_slides(rows: Sequence[Mapping[str, Any]], wheres: Sequence[str]) -> None:
    """Of the DICOM files of one slide, a manifest may name one."""
    named = {row[schema.URI]: where for row, where in zip(rows, wheres, strict=True)}
    files = [File(uri, uri, dicom.LONG_HEAD_BYTES) for uri in named if uri.lower().endswith(slide.DICOM)]
    for first, paths in dicom.slides(dicom.headers(files)).items():
        if len(paths) > 1:
            raise DataError(
                f"{named[paths[1]]}: {paths[1]} is of the same slide as {first}; name one of them"
            )
