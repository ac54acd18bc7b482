"""Schemes for which pyarrow has no client, as `hf://`, `az://` and `https://`: read through fsspec.

Nothing is written there. An output needs files that appear whole or not at all, and listings that show at
once what other processes wrote (see `bcd.lease`): fsspec promises neither.
"""

import hashlib
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from pyarrow import PythonFile, fs

HUB, WEB = "hf://", ("http://", "https://")
READ_ONLY = "outputs are on a local path, s3:// or gs://; other schemes are only read"
# Exceptions of clients that are no OSError, by the module that has them.
FAILURES = (
    *(("aiohttp", "ClientError"), ("httpx", "HTTPError"), ("httpx2", "HTTPError")),
    ("azure.core.exceptions", "AzureError"),
)
# What servers answer where there is nothing.
GONE = (404, 410)
# What clients know of a file that changes with its content, the surest first.
MARKS = ("blob_id", "etag", "ETag", "Content-MD5", "mtime", "last_modified", "Last-Modified", "created")
# Git's own file, which the hub writes into every repository.
GIT_FILE = "/.gitattributes"
# One client for all threads: fsspec itself has one for each, with connections of its own.
_clients: dict[str, Any] = {}


def reader(uri: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's view of the store of a URI, which it can only read, and the path within it.

    Raises:
        ImportError: the package for the scheme is not installed.
        ValueError: the scheme is unknown, or lacks settings.
    """
    from fsspec.core import url_to_fs  # not needed for disks and buckets

    scheme, _, place = uri.partition("://")
    scheme = scheme.lower()
    if "::" in place:
        raise ValueError("'::' would open a store within another; expected one scheme")
    try:
        with _installed(scheme):
            client, path = url_to_fs(f"{scheme}://{place}")
    except (ValueError, TypeError) as error:
        expected = "a local path, s3://, gs:// or a scheme of fsspec such as hf://, az:// or https://"
        raise ValueError(f"expected {expected} ({error})") from error
    client = _clients.setdefault(f"{scheme} {client.storage_options}", client)
    return fs.PyFileSystem(_Reader(client)), path


@contextmanager
def _installed(scheme: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None) or str(error)
        raise ImportError(
            f"{scheme}:// requires a package that is not installed; run: pip install {missing.split('.')[0]}"
        ) from None


def failures() -> tuple[type[Exception], ...]:
    """Exceptions of the clients that are in use, besides OSError."""
    loaded = ((sys.modules.get(module), name) for module, name in FAILURES)
    return tuple(getattr(module, name) for module, name in loaded if module)


def require_listing(uri: str) -> None:
    """Raise ValueError for a web address."""
    if uri.lower().startswith(WEB):
        raise ValueError("a web server has no listing of its files: name them in a manifest")


def pinned_revision(uri: str) -> str:
    """The URI of a file or folder on the hub with the commit that its revision names now; others as they are.

    Raises:
        FileNotFoundError: there is no such repository or revision.
        ImportError: the package is not installed.
    """
    if not uri.lower().startswith(HUB):
        return uri
    with _installed("hf"):
        from huggingface_hub import HfApi, HfFileSystem
        from huggingface_hub.hf_file_system import HfFileSystemResolvedRepositoryPath
    try:
        found = HfFileSystem(skip_instance_cache=True).resolve_path(uri[len(HUB) :])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "there is no such repository or revision, or it is not public: set HF_TOKEN to read a private one"
        ) from error
    if not isinstance(found, HfFileSystemResolvedRepositoryPath):  # a bucket
        return uri
    commit = HfApi().repo_info(found.repo_id, repo_type=found.repo_type, revision=found.revision).sha
    kind = "" if found.repo_type == "model" else f"{found.repo_type}s/"
    return f"{HUB}{kind}{found.repo_id}@{commit}/{found.path_in_repo}".rstrip("/")


class _Reader(fs.FSSpecHandler):
    """pyarrow's adapter to fsspec, with versions of files, without writing, and strict where fsspec's client
    for the web takes a server that fails for one without the file."""

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [self._look(path) for path in paths]

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        depth = None if selector.recursive else 1
        found = self.fs.find(selector.base_dir, maxdepth=depth, withdirs=True, detail=True)
        root = selector.base_dir.strip("/")
        kept = (path for path in found if path.strip("/") != root and not path.endswith(GIT_FILE))
        return [_facts(path, found[path]) for path in kept]

    def open_input_file(self, path: str) -> PythonFile:
        return self._open(path, cache_type="none")  # each read is one request of its size

    def open_input_stream(self, path: str) -> PythonFile:
        return self._open(path)

    def _refuse(self, *_: Any) -> None:
        raise PermissionError(READ_ONLY)

    create_dir = delete_dir = delete_dir_contents = delete_root_dir_contents = delete_file = _refuse
    move = copy_file = open_output_stream = open_append_stream = _refuse

    def _look(self, path: str) -> fs.FileInfo:
        try:
            return _facts(path, self.fs.info(path))
        except (FileNotFoundError, ValueError) as error:  # no file, and no path that could be of one
            cause = error.__cause__
            if path.lower().startswith(WEB) and getattr(cause, "status", None) not in GONE:
                raise OSError(f"{cause or error}") from error
            return fs.FileInfo(path, fs.FileType.NotFound)

    def _open(self, path: str, **options: Any) -> PythonFile:
        found = self._look(path)
        if found.type != fs.FileType.File:
            raise FileNotFoundError(path)
        if not found.size:
            return PythonFile(io.BytesIO(), mode="r")
        known = {"size": found.size} if path.lower().startswith(WEB) else {}  # or it is asked for once more
        return PythonFile(self.fs.open(path, "rb", **options, **known), mode="r")


def _facts(path: str, info: dict[str, Any]) -> fs.FileInfo:
    """What pyarrow knows of a file; in place of its time, a number that changes with its content."""
    if info["type"] != "file":
        return fs.FileInfo(path, fs.FileType.Directory)
    if info["size"] is None:
        raise OSError("the server does not state its size")
    mark = next((info[name] for name in MARKS if info.get(name)), "")
    mark = mark.timestamp() if isinstance(mark, datetime) else mark  # a client may have both forms
    stamp = int.from_bytes(hashlib.sha256(str(mark).encode()).digest()[:6], "big")
    return fs.FileInfo(path, fs.FileType.File, size=info["size"], mtime_ns=stamp)
