"""URIs: local paths, `s3://` and `gs://`, through pyarrow's filesystems; others through fsspec, to read only.

Credentials, region and endpoint of S3 are those of the AWS SDK (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`,
...), so MinIO and other S3-compatible stores need no other setting; one that requires BUCKET.HOST needs
`AWS_S3_ADDRESSING_STYLE=virtual` or the same in AWS's config file. Every function turns an operating system
or network error into a `StorageError` that names the URI.
"""

import io
import os
import posixpath
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from errno import ENAMETOOLONG
from functools import wraps
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from pyarrow import fs

from bcd import disk
from bcd.data.stores import buckets, schemes
from bcd.errors import MissingError, StorageError, TooLargeError

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
# The standard allows one slash, too.
FILE_SCHEME = re.compile(r"file:/", re.IGNORECASE)
# Concurrent requests per process, which hide the latency of an object store; more where nothing is read.
READ_THREADS, LOOK_THREADS = 8, 32
# A file of unknown size is read in pieces of this size.
PIECE_BYTES = 2**16
# The AWS SDK does not retry where the text of an error did not fit into the buffer of a small file.
OVERFULL = "Failed to flush response stream"
# Errors of a store where a file must not be read, and also where a token has expired.
DENIED = ("ACCESS_DENIED", "PERMISSION_DENIED")
# Exceptions of clients for what no repetition helps: files, paths and settings (pyarrow's are ValueErrors), a
# package that is not installed.
LASTING = (ValueError, NotImplementedError, ImportError)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class File:
    """One stored file: its URI, path below the listed root, size and `version`."""

    uri: str
    path: str
    size_bytes: int
    version: str = field(default="", compare=False)


def is_remote(uri: str) -> bool:
    """Whether the URI names an object store, not a local file."""
    return SCHEME.match(uri) is not None and not FILE_SCHEME.match(uri)


def absolute(uri: str) -> str:
    """The URI without a trailing slash; a local path becomes absolute, so that workers can use it, too."""
    return uri.rstrip("/") if is_remote(uri) else os.path.realpath(_local(uri))


def _local(uri: str) -> str:
    """A local path without `file://` (percent-encoded, as RFC 8089 says) and `~`."""
    if FILE_SCHEME.match(uri):
        host, _, path = uri[len("file:") :].removeprefix("//").partition("/")
        if host not in ("", "localhost"):
            raise StorageError(f"{uri}: cannot read files of {host!r}; expected file:///PATH", True)
        return unquote(f"/{path}")
    return str(Path.home() / uri[1:].lstrip("/")) if uri == "~" or uri.startswith("~/") else uri


def absolute_uri(uri: str, root: str) -> str:
    """The absolute form of a URI in a table; a relative one is below the table's folder `root`, an `absolute`
    URI. Raises StorageError where it is on another machine."""
    # The folder is resolved once, not for each of a million rows.
    return uri if is_remote(uri) else posixpath.join(root, _local(uri))


def join(uri: str, *parts: str) -> str:
    """The URI of something below another."""
    return posixpath.join(absolute(uri), *parts)


def parent(uri: str) -> str:
    """The URI of the folder above."""
    return posixpath.dirname(absolute(uri))


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The pyarrow filesystem of a URI and the path within it."""
    if not is_remote(uri):
        return fs.LocalFileSystem(), absolute(uri)
    scheme, _, path = absolute(uri).partition("://")
    with _naming(uri, "open it"):
        own = buckets.bucket_client(scheme.lower())
        return (own, path) if own else schemes.reader(absolute(uri))


def is_writable(uri: str) -> bool:
    """Whether outputs may be there: on a disk, `s3://` and `gs://`; what has another scheme is read only."""
    return not is_remote(uri) or uri.partition("://")[0].lower() in buckets.SCHEMES


def require_writable(uri: str) -> None:
    """Raise StorageError where no output may be."""
    if not is_writable(uri):
        raise StorageError(f"{uri}: cannot write there: {schemes.READ_ONLY}", True)


def pinned(uri: str) -> str:
    """The URI with the commit that it names now; only `hf://` has any. Raises StorageError where there is
    none, or its package is not installed."""
    with _naming(uri, "open it"):
        return schemes.pinned_revision(uri) if is_remote(uri) else uri


@contextmanager
def _naming(uri: str, action: str) -> Iterator[None]:
    """Convert exceptions of clients into a StorageError that names the URI."""
    try:
        yield
    except UnicodeError as error:
        raise StorageError(f"{uri}: a name there is not in UTF-8; rename it", True) from error
    except _failures() as error:
        raise failure(uri, action, error) from error


def _failures() -> tuple[type[Exception], ...]:
    return (OSError, *LASTING, *schemes.failures())


def failure(uri: str, action: str, error: Exception) -> StorageError:
    """An exception of a client as a sentence that names the URI and the failed action."""
    reason = " ".join(str(error).split("; Details")[0].split()) or type(error).__name__
    message = f"{uri}: cannot {action}: {reason}"
    if isinstance(error, FileNotFoundError):
        return MissingError(message)
    return StorageError(message, _is_permanent(uri, error))


def _is_permanent(uri: str, error: Exception) -> bool:
    """Whether an error is caused by this file, and not by the network, the store, the disk or our token."""
    if isinstance(error, (NotADirectoryError, PermissionError, *LASTING)):
        return True
    if not is_remote(uri):
        return getattr(error, "errno", None) == ENAMETOOLONG or Path(absolute(uri)).is_dir()
    return any(code in str(error) for code in DENIED) and _may_list_bucket(uri)


def _may_list_bucket(uri: str) -> bool:
    """Whether the store still permits access to the bucket: then access to this file alone is denied."""
    filesystem, path = resolve(uri)
    with suppress(OSError):
        return filesystem.get_file_info(path.partition("/")[0]).type == fs.FileType.Directory
    return False


def _persistent(read: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Retry with the number and pauses of the AWS SDK where the client does not."""

    @wraps(read)
    def retried(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        for attempt in range(1, buckets.ATTEMPTS):
            try:
                return read(*arguments, **options)
            except StorageError as error:
                uri = next((each for each in arguments if isinstance(each, str)), "")
                if OVERFULL not in str(error) and (error.lasting or is_writable(uri)):
                    raise
            time.sleep(0.5 * 2**attempt * random.random())
        return read(*arguments, **options)

    return retried


def exists(uri: str) -> bool:
    """Whether there is a file or folder at the URI."""
    return _info(uri).type != fs.FileType.NotFound


def is_file(uri: str) -> bool:
    """Whether there is a file at the URI."""
    return _info(uri).type == fs.FileType.File


def is_folder(uri: str) -> bool:
    """Whether there is a folder at the URI."""
    return _info(uri).type == fs.FileType.Directory


@dataclass(frozen=True)
class Listing:
    """Content of a folder: files sorted by path, faults of unreadable entries, and counts of skipped ones."""

    files: list[File]
    faults: dict[str, str] = field(default_factory=dict)
    passed: Counter[str] = field(default_factory=Counter)


@_persistent
def list_folder(uri: str) -> Listing:
    """List every entry below a folder; hidden files and folders are only counted. Raises StorageError where
    the folder does not exist or cannot be read."""
    filesystem, root = resolve(uri)
    with _naming(uri, "list it"):
        _require_folder(filesystem, uri, root)
        found = _walk_store(filesystem, root) if is_remote(uri) else disk.entries(root)
    below = absolute(uri).rstrip("/")
    sizes = sorted(found.sizes.items())
    files = [File(f"{below}/{path}", path, size, found.versions[path]) for path, size in sizes]
    return Listing(files, dict(sorted(found.faults.items())), found.passed)


def _walk_store(filesystem: fs.FileSystem, root: str) -> disk.Entries:
    found = disk.Entries()
    for info in filesystem.get_file_info(fs.FileSelector(root, recursive=True)):
        # Not normalised: to an object store, a//b and a/b are two names.
        path = info.path.removeprefix(root.rstrip("/") + "/")
        if info.type != fs.FileType.File:
            continue
        found.add(path, info.size, _version(info))
    return found


def list_files(uri: str) -> list[File]:
    """The files of `list_folder`; raises StorageError where an entry cannot be read, too."""
    found = list_folder(uri)
    for path, fault in found.faults.items():
        raise StorageError(f"{join(uri, path)}: {fault}", True)
    return found.files


def _require_folder(filesystem: fs.FileSystem, uri: str, path: str) -> None:
    schemes.require_listing(uri)
    found = filesystem.get_file_info(path).type
    if found == fs.FileType.File:
        raise MissingError(f"{uri} is a file; expected a folder")
    if found != fs.FileType.Directory:
        raise MissingError(f"{uri}: there is no such folder; check the path or bucket name")


def list_files_if_any(uri: str) -> list[File]:
    """The files of `list_folder`, none where there is no such folder."""
    with suppress(MissingError):  # not a look first: it may go in between
        return list_files(uri)
    return []


def first_files(uri: str, suffixes: tuple[str, ...]) -> Iterator[File]:
    """Yield the files below a folder whose names end with one of the suffixes, without listing all of them.
    Raises StorageError where the folder does not exist or cannot be read."""
    filesystem, root = resolve(uri)
    with _naming(uri, "list it"):
        _require_folder(filesystem, uri, root)
        folders, listed = [root], set[str]()
        while folders:  # depth first: few folders of a tree are opened
            folder = folders.pop()
            real = folder if is_remote(uri) else os.path.realpath(folder)
            if real in listed:
                continue  # a link to a folder above
            listed.add(real)
            infos = filesystem.get_file_info(fs.FileSelector(folder))
            infos.sort(key=lambda info: info.path)
            seen = [info for info in infos if not info.base_name.startswith(".")]
            files = [info for info in seen if info.type == fs.FileType.File]
            found = [info for info in files if info.base_name.lower().endswith(suffixes)]
            for info in found:
                path = posixpath.relpath(info.path, root)
                yield File(join(uri, path), path, info.size)
            folders += [info.path for info in seen if info.type == fs.FileType.Directory]


def sizes(uris: Sequence[str]) -> list[int | None]:
    """Size of each file in bytes, None where there is no file."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        infos = pool.map(_info, uris)
        return [info.size if info.type == fs.FileType.File else None for info in infos]


@_persistent
def _info(uri: str) -> fs.FileInfo:
    filesystem, path = resolve(uri)
    with _naming(uri, "access it"):
        return filesystem.get_file_info(path)


def version(uri: str) -> str:
    """Size and time of the last change of one file, as text that changes with its content; of a folder that
    counts as one, of what describes it. Raises StorageError where it does not exist or is not accessible."""
    places = [join(uri, name) for name in disk.FOLDER_HEADS] if disk.is_folder_file(uri) else [uri]
    infos = [info for info in map(_info, places) if info.type == fs.FileType.File]
    if not infos:
        raise MissingError(f"{uri}: cannot read it: there is no such file")
    return _version(infos[0])


def _version(info: fs.FileInfo) -> str:
    return f"{info.size}-{info.mtime_ns}"


def file_versions(uris: Iterable[str]) -> dict[str, str | None]:
    """`version` of each file, None where there is no file or no access to it."""
    distinct = list(dict.fromkeys(uris))
    with ThreadPoolExecutor(LOOK_THREADS) as pool:
        return dict(zip(distinct, pool.map(_version_if_any, distinct), strict=True))


def _version_if_any(uri: str) -> str | None:
    with suppress(StorageError):
        return version(uri)
    return None


@_persistent
def read_bytes(uri: str, most_bytes: int | None = None) -> bytes:
    """The whole content of one file, which may be a pipe. Raises TooLargeError where it has more than
    `most_bytes`; of a regular file nothing has been read."""
    filesystem, path = resolve(uri)
    with _naming(uri, "read it"):
        # A stream requests 16 KiB at a time from a store, a file all of it at once.
        file = filesystem.open_input_file(path) if is_remote(uri) else _stream(filesystem, path)
        with file:
            return file.read() if most_bytes is None else _limited(file, uri, path, most_bytes)


def _limited(file: pa.NativeFile, uri: str, path: str, most_bytes: int) -> bytes:
    """The content, in pieces where the size is not known: a device has no end."""
    size_bytes = file.size() if is_remote(uri) else os.stat(path).st_size
    pieces, left = list[bytes](), most_bytes - size_bytes
    if left >= 0:
        left = most_bytes
        while left >= 0 and (piece := file.read(max(size_bytes + 1, PIECE_BYTES))):
            pieces.append(piece)
            left -= len(piece)
    if left < 0:
        raise TooLargeError(f"{uri}: has more than {most_bytes:,} bytes, the most that are read", True)
    return b"".join(pieces)


def _stream(filesystem: fs.FileSystem, path: str) -> pa.NativeFile:
    """A stream of a file's own bytes: by default pyarrow decompresses files named `.gz`."""
    return filesystem.open_input_stream(path, compression=None)


@_persistent
def read_start(uri: str, n_bytes: int) -> bytes:
    """The first bytes of one file, fewer where it is shorter."""
    filesystem, path = resolve(uri)
    with _naming(uri, "read it"), _stream(filesystem, path) as stream:
        return stream.read(n_bytes)


@_persistent
def open_file(uri: str) -> pa.NativeFile:
    """Open one file for `read_at` by any number of threads; of a store this is one request."""
    filesystem, path = resolve(uri)
    with _naming(uri, "read it"):
        return filesystem.open_input_file(path)


@_persistent
def read_at(file: pa.NativeFile, uri: str, offset: int, n_bytes: int) -> bytes:
    """`n_bytes` of an open file from an offset on, in one request, fewer where it ends before."""
    with _naming(uri, "read it"):
        return file.read_at(n_bytes, offset)


def read_range(uri: str, offset: int, n_bytes: int) -> bytes:
    """`n_bytes` of one file from an offset on, fewer where it ends before."""
    with open_file(uri) as file:
        return read_at(file, uri, offset, n_bytes)


@_persistent
def download(uri: str, path: Path) -> None:
    """Copy one file to the local disk, in pieces: a slide may be larger than memory."""
    filesystem, source = resolve(uri)
    with _naming(uri, "read it"), _stream(filesystem, source) as stream, path.open("wb") as target:
        shutil.copyfileobj(stream, target, 2**22)


def write_bytes(uri: str, data: bytes | BinaryIO, whole: bool = True, private: bool = False) -> None:
    """Write one file, whole or not at all: on a disk aside, synchronised and renamed, unless it need not be
    `whole`; there a `private` one is closed to other users. Of an open file, the rest is copied."""
    filesystem, path = resolve(uri)
    with _naming(uri, "write it"):
        if not is_remote(uri):
            write = disk.write_private if private else disk.write_aside if whole else disk.write_in_place
            write(path, data)
            return
        with ThreadPoolExecutor(1) as pool:
            pool.submit(_write_to_store, filesystem, path, data).result()


def _write_to_store(filesystem: fs.FileSystem, path: str, data: bytes | BinaryIO) -> None:
    """Write an object, in a thread: an exception between opening and writing, as a signal raises it in the
    main thread (SIGTERM, Ctrl-C), closes the stream, which makes an empty object of it."""
    with filesystem.open_output_stream(path, compression=None) as stream:
        disk.put(data, stream)


def write_table(uri: str, table: pa.Table, private: bool = False, **options: Any) -> None:
    """Write one Parquet file, whole or not at all; `private` as above, options of `pq.write_table`."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", **options)
    write_bytes(uri, buffer.getvalue(), private=private)


@_persistent
def read_table(uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One Parquet file, or some of its columns."""
    with open_file(uri) as file, _naming(uri, "read it"):
        return pq.read_table(file, columns=columns)


def dataset(uri: str) -> pads.Dataset:
    """The Parquet files below a folder as one table, read lazily."""
    filesystem, path = resolve(uri)
    with _naming(uri, "read it"):
        return pads.dataset(path, filesystem=filesystem, format="parquet")


def upload(path: Path, uri: str) -> None:
    """Copy one local file to a store, in pieces; after an error there may be a part of it."""
    filesystem, target = resolve(uri)
    with _naming(uri, "write it"), path.open("rb") as source, filesystem.open_output_stream(target) as to:
        shutil.copyfileobj(source, to, 2**22)


def upload_folder(folder: Path, uri: str, last: str | None = None) -> None:
    """Copy every file below a local folder; that at the path `last`, the success marker, is the last."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in sorted(paths, key=lambda path: path.relative_to(folder).as_posix() == last):
        write_bytes(join(uri, path.relative_to(folder).as_posix()), path.read_bytes())


def delete_folder(uri: str) -> None:
    """Delete a folder and everything below it, if it exists."""
    filesystem, path = resolve(uri)
    with _naming(uri, "delete it"):
        if filesystem.get_file_info(path).type == fs.FileType.Directory:
            filesystem.delete_dir(path)


def delete_files(uri: str, pattern: str, before: Callable[[], None] = lambda: None) -> None:
    """Delete the files below a folder, if it exists, whose relative path matches a regular expression as a
    whole, and the folders that are then empty. `before` is called when they are listed, and may raise."""
    found = [file.uri for file in list_files_if_any(uri) if re.fullmatch(pattern, file.path)]
    before()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        list(pool.map(delete_file, found))
    if not is_remote(uri):
        for folder, _, _ in os.walk(absolute(uri), topdown=False):
            with suppress(OSError):  # not empty
                os.rmdir(folder)


def delete_file(uri: str) -> None:
    """Delete one file, for good: on a disk, a power cut does not bring it back."""
    filesystem, path = resolve(uri)
    with _naming(uri, "delete it"):
        if is_remote(uri):
            filesystem.delete_file(path)
        else:
            disk.delete_for_good(path)
