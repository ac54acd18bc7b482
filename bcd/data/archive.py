"""The inputs of a scoring job: a row per field of view and per whole slide, and a count of everything
else."""

import hashlib
import posixpath
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bcd import disk, schema, storage
from bcd.data import index, manifest
from bcd.errors import DataError, StorageError
from bcd.slides import dicom, slide
from bcd.storage import File, Listing

SUFFIXES = tuple(dict.fromkeys(index.IMAGE_SUFFIXES + slide.SLIDE_SUFFIXES))
# Entries that are no inputs and are not counted by suffix.
NO_SUFFIX, OTHER_DICOM = "without suffix", "DICOM without a slide"
# Largest number of kinds of entries that a sentence names.
MOST_KINDS = 8
UNREADABLE = "unreadable"
# PNG, JPEG, TIFF and BigTIFF.
IMAGE_STARTS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class Archive:
    """The inputs, one row each (schema `schema.INPUTS`, sorted by id), and a count of other entries by kind.

    `versions` has a text for each row that changes with its files, null if none can be read. `unclaimed` are
    files given for slides (`with_files`) that belong to none.
    """

    table: pa.Table
    versions: pa.Array
    passed: Counter[str] = field(default_factory=Counter)
    unclaimed: tuple[str, ...] = ()

    @property
    def ignored(self) -> int:
        """Number of entries that are no inputs."""
        return self.passed.total()


def list_inputs(uri: str) -> Archive:
    """List the inputs below a folder, of a manifest, or a single file.

    Files, and folders of OME-Zarr, are selected by suffix; files without one, or with a number for it, by
    their first bytes. DICOM files of one series in one folder are one slide. An unreadable entry, such as a
    broken link, is an input with an error. A manifest requires a column `uri`; `image_id`, `patient`, `case`,
    `slide` and `mpp` are kept.

    Raises:
        DataError: there is nothing to score.
        StorageError: the URI cannot be read.
    """
    if manifest.is_one(uri):
        table = _from_manifest(uri)
        places = table[schema.URI].combine_chunks().dictionary_encode()
        found = storage.file_versions(places.dictionary.to_pylist()).values()
        return Archive(table, pa.array(found, pa.string()).take(places.indices))
    single = storage.is_file(uri) or disk.is_folder_file(uri)
    listing = _alone(uri) if single else storage.list_folder(uri)
    kept, passed = _select(listing)
    if not kept and not listing.faults:
        kinds = (*SUFFIXES, *schema.MANIFEST_SUFFIXES) if single else SUFFIXES
        what = "unsupported file" if single else "no image or slide below it"
        there = f"; it contains {described(passed)}" if passed and not single else ""
        raise DataError(f"{uri}: {what}; expected {', '.join(kinds)} files{there}")
    rows: list[dict[str, Any]]
    rows = [{schema.IMAGE_ID: f.path, schema.URI: f.uri, schema.SIZE_BYTES: f.size_bytes} for f in kept]
    for path, why in listing.faults.items():
        place = {schema.IMAGE_ID: path, schema.URI: f"{storage.absolute(uri)}/{path}"}
        rows.append(place | {schema.ERROR: UNREADABLE, schema.ERROR_MESSAGE: why})
    table = pa.Table.from_pylist(rows, schema=schema.INPUTS).sort_by(schema.IMAGE_ID)
    versions = {file.path: file.version for file in kept}
    return Archive(
        table, pa.array(map(versions.get, table[schema.IMAGE_ID].to_pylist()), pa.string()), passed
    )


def with_files(found: Archive, flag: str, uri: str, suffix: str, column: str) -> Archive:
    """The same inputs with a column of the files below a folder that belong to them: a list of URIs for what
    may be a slide, null for others. Versions change with these files.

    A file is named after the id of its slide, with or without the slide's own suffix, unless another slide
    could claim it; of an id that is no path below a folder, the last part counts. One file alone is that of
    the only slide.

    Raises:
        DataError: it is one file and there are several slides.
        StorageError: the folder cannot be read.
    """
    ids, places = (found.table[name].to_pylist() for name in (schema.IMAGE_ID, schema.URI))
    is_field = [place.lower().endswith(slide.FIELD_SUFFIXES) for place in places]
    slides = [name for name, other in zip(ids, is_field, strict=True) if not other]
    if storage.is_file(uri):
        if len(slides) != 1:
            what = f"{flag} {uri} is one file, for one slide; the input may have {len(slides):,} slides"
            raise DataError(f"{what}: give a folder with a file NAME{suffix} for each")
        files = _alone(uri).files
        owned = {slides[0]: files}
    else:
        files = [file for file in storage.list_files(uri) if file.path.endswith(suffix)]
        owned = _owned(slides, {file.path.removesuffix(suffix): file for file in files})
    lists = [None if other else owned[name] for name, other in zip(ids, is_field, strict=True)]
    versions = [
        version and " ".join([version, *(file.version for file in beside or ())])
        for version, beside in zip(found.versions.to_pylist(), lists, strict=True)
    ]
    uris = [None if beside is None else [file.uri for file in beside] for beside in lists]
    claimed = {file.uri for beside in owned.values() for file in beside}
    return replace(
        found,
        table=found.table.append_column(column, pa.array(uris, pa.list_(pa.string()))),
        versions=pa.array(versions, pa.string()),
        unclaimed=(*found.unclaimed, *(file.path for file in files if file.uri not in claimed)),
    )


def _owned(slides: Sequence[str], files: Mapping[str, File]) -> dict[str, list[File]]:
    """The files, by path without suffix, of each slide: none and several are errors of the slide."""
    whole = {name: _below(name) for name in slides}
    short = {
        name: path if slide.is_unnamed(path) else str(PurePosixPath(path).with_suffix(""))
        for name, path in whole.items()
    }
    n_whole, n_short = Counter(whole.values()), Counter(short.values())
    owned: dict[str, list[File]] = {}
    for name in slides:
        keys = [whole[name]] if n_whole[whole[name]] == 1 else []
        keys += [short[name]] if n_short[short[name]] == 1 and not n_whole[short[name]] else []
        owned[name] = [files[key] for key in keys if key in files]
    return owned


def _below(name: str) -> str:
    """An id as a path below a folder."""
    is_path = posixpath.normpath(name) == name and "://" not in name and not name.startswith(("/", "../"))
    return name if is_path else name.rstrip("/").rpartition("/")[2]


def described(passed: Mapping[str, int]) -> str:
    """Kinds of entries, the most frequent first: `12 .bmp, 3 .czi and 4 others`."""
    kinds = sorted(passed.items(), key=lambda kind: (-kind[1], kind[0]))
    named = ", ".join(f"{n:,} {kind}" for kind, n in kinds[:MOST_KINDS])
    rest = sum(n for _, n in kinds[MOST_KINDS:])
    return f"{named} and {rest:,} others" if rest else named


def _alone(uri: str) -> Listing:
    place = storage.absolute(uri)
    size, version = storage.sizes([place])[0] or 0, storage.version(place)
    return Listing([File(place, place.rpartition("/")[2], size, version)])


def _select(listing: Listing) -> tuple[list[File], Counter[str]]:
    """Files that are inputs, and a count of other entries by kind."""
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
    found, others = _inspect([file for file in unsure if mirax.isdisjoint(paths[file.path].parents)])
    return _with_folders(kept, listing.files if mirax else []) + found, passed + others


def _with_folders(kept: Sequence[File], files: Sequence[File]) -> list[File]:
    """The same files, MIRAX slides with a version that covers their folder."""
    below: dict[PurePosixPath, list[File]] = defaultdict(list)
    for file in files:
        for folder in PurePosixPath(file.path).parents:
            below[folder].append(file)
    return [
        _joined([file, *below[PurePosixPath(file.path).with_suffix("")]])
        if file.path.lower().endswith(slide.MRXS)
        else file
        for file in kept
    ]


def _joined(parts: Sequence[File]) -> File:
    """The first file of a slide, with a version that changes with each of its files."""
    versions = sorted(f"{file.path} {file.version}" for file in parts)
    return replace(parts[0], version=hashlib.sha256("\n".join(versions).encode()).hexdigest())


def _inspect(files: Sequence[File]) -> tuple[list[File], Counter[str]]:
    """`_select` of files that may be DICOM, or whose names do not identify their format."""
    headers = dicom.headers(files)
    slides = dicom.slides(headers)
    unknown = [file for file in files if headers[file.path] is None]
    with ThreadPoolExecutor(storage.READ_THREADS) as pool:
        images = [file for file, good in zip(unknown, pool.map(_may_be_image, unknown), strict=True) if good]
    by_path = {file.path: file for file in files}
    firsts = [_joined([by_path[path] for path in slides[f.path]]) for f in files if f.path in slides]
    passed = Counter({NO_SUFFIX: len(unknown) - len(images)})
    passed[OTHER_DICOM] = sum(header is not None and not header.is_slide for header in headers.values())
    return firsts + images, +passed


def _may_be_image(file: File) -> bool:
    """Whether a file that is not DICOM begins like an image, or is named `.dcm` nevertheless."""
    if not slide.is_unnamed(file.path):
        return True
    try:
        return storage.read_start(file.uri, 8).startswith(IMAGE_STARTS)
    except StorageError as error:
        if not error.lasting:
            raise
        return True  # its row will have the error


def _from_manifest(uri: str) -> pa.Table:
    """Rows of a manifest, which may name one of the DICOM files of each slide."""
    found = manifest.read_manifest(uri)
    table = manifest.inputs(found, copies=True)
    is_dicom = pc.ends_with(pc.utf8_lower(table[schema.URI]), slide.DICOM)
    # Several rows may name one file.
    uris = table[schema.URI].filter(is_dicom).unique().to_pylist()
    files = [File(uri, uri, dicom.LONG_HEAD_BYTES) for uri in uris]
    for first, paths in dicom.slides(dicom.headers(files)).items():
        if len(paths) > 1:
            where = found.rows[pc.index(table[schema.URI], paths[1]).as_py()].where
            raise DataError(f"{where}: {paths[1]} is of the same slide as {first}; name one of them")
    return schema.fill(table, schema.INPUTS).sort_by(schema.IMAGE_ID)
