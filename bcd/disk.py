"""The local disk: every entry below a folder, and files written whole or not at all.

Entries are files, unreadable ones, and counts of skipped ones. A link to a folder is followed once, and never
in a loop. Folders are listed before links, so that a file below both has its own path.
"""

import errno
import hashlib
import os
import re
import shutil
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePath, PurePosixPath
from typing import IO, BinaryIO

# Folders that count as one file, of OME-Zarr: what is in them, hidden or not, is a part of it;
# the first file that exists describes it.
FOLDER_SUFFIX, FOLDER_HEADS = ".zarr", ("zarr.json", ".zattrs")
# Reasons to skip an entry, besides its suffix.
HIDDEN, SPECIAL = "hidden", "no regular file"
LOOP, AGAIN = "link to a folder above it", "link to a folder that is listed already"
# Suffix of a file that is being written; one that a killed process left behind is unused.
ASIDE = ".part"
# How often a folder is made for one file, before its absence is an error.
MOST_FOLDERS = 10
HALF_WRITTEN = re.compile(rf"\.[0-9a-f]{{32}}{re.escape(ASIDE)}$")


@dataclass
class Entries:
    """Content of a folder: by path, sizes of files in bytes, their versions (`storage.version`), and faults;
    by reason, numbers of skipped entries."""

    sizes: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    passed: Counter[str] = field(default_factory=Counter)

    def add(self, path: str, size: int, version: str) -> None:
        """Add a file, or a part of a folder that counts as one, whose version changes with each of them."""
        one = _folder_of(path)
        if is_hidden(path):
            self.passed[HIDDEN] += 1
        elif one == path:
            self.sizes[path], self.versions[path] = size, version
        else:
            digest = hashlib.sha256(f"{path.removeprefix(one)} {version}".encode()).hexdigest()
            total = int(self.versions.get(one, "0"), 16) + int(digest, 16)  # in any order
            self.sizes[one], self.versions[one] = self.sizes.get(one, 0) + size, f"{total % 2**256:x}"


def is_folder_file(path: str | PurePath) -> bool:
    """Whether a path or URI is that of a folder that counts as one file."""
    return str(path).rstrip("/").lower().endswith(FOLDER_SUFFIX)


def is_hidden(path: str) -> bool:
    """Whether a path has a hidden part, outside of folders that count as one file."""
    return any(part.startswith(".") for part in _folder_of(path).split("/"))


def _folder_of(path: str) -> str:
    """The path up to the first folder that counts as one file: else the path itself."""
    end = path.lower().find(f"{FOLDER_SUFFIX}/")
    return path if end < 0 else path[: end + len(FOLDER_SUFFIX)]


def entries(root: str) -> Entries:
    """List a folder; raises OSError where the folder itself cannot be listed, or the disk fails."""
    found = Entries()
    seen = {_identity(root)}
    folders, links = [""], list[str]()
    while folders or links:
        # The shortest path to a folder first, and among equals the first by name.
        links.sort(key=lambda path: (path.count("/"), path), reverse=True)
        path = folders.pop() if folders else links.pop()
        try:
            if path and not _is_new(os.path.join(root, path), seen, found):
                continue
            below = _list(root, path, found)
        except FileNotFoundError:
            if not path:
                raise
            continue  # removed meanwhile
        folders += sorted(below[0], reverse=True)
        links += below[1]
    return found


def _is_new(path: str, seen: set[tuple[int, int]], found: Entries) -> bool:
    """Whether a folder was not listed before; counts it otherwise."""
    real, holder = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    if os.path.islink(path) and PurePosixPath(holder).is_relative_to(real):
        found.passed[LOOP] += 1
        return False
    identity = _identity(path)
    if identity in seen:
        found.passed[AGAIN] += 1
        return False
    seen.add(identity)
    return True


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _list(root: str, folder: str, found: Entries) -> tuple[list[str], list[str]]:
    """Folders in one folder, and links to folders; adds other entries to `found`."""
    folders, links = list[str](), list[str]()
    try:
        entries = list(os.scandir(os.path.join(root, folder)))
    except PermissionError as error:
        if not folder:
            raise
        found.faults[folder] = f"the folder cannot be listed: {error.strerror}"
        return folders, links
    for entry in entries:
        path = f"{folder}/{entry.name}" if folder else entry.name
        if entry.name.startswith(".") and is_hidden(path):
            found.passed[HIDDEN] += 1
        elif (text := _text(path)) != path:
            found.faults[text] = "the name is not in UTF-8; rename it"
        elif _is_folder(entry, path, found):
            (links if entry.is_symlink() else folders).append(path)
    return folders, links


def _is_folder(entry: "os.DirEntry[str]", path: str, found: Entries) -> bool:
    """Whether an entry is a folder, or a link to one; adds others to `found`."""
    try:
        status = entry.stat()
        if entry.is_file():
            found.add(path, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")
        elif not entry.is_dir():
            found.passed[SPECIAL] += 1
        return entry.is_dir()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP, errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise
        if entry.is_symlink():
            target = _text(os.readlink(entry.path))
            found.faults[path] = f"a link to {target}: {error.strerror}"
        elif error.errno == errno.EACCES:
            found.faults[path] = f"it cannot be read: {error.strerror}"
        return False  # also without a fault, where it was removed meanwhile


def _text(name: str) -> str:
    """A name as text, with escapes for bytes that are not UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")


def put(data: bytes | BinaryIO, target: IO[bytes]) -> None:
    """Write all of some data, those of an open file in pieces: it may be larger than memory."""
    if isinstance(data, bytes):
        target.write(data)
    else:
        shutil.copyfileobj(data, target, 2**20)


def write_in_place(path: str, data: bytes | BinaryIO) -> None:
    """Write a file that may be found half-written; makes its folder."""
    with _new_file(path, "wb") as file:
        put(data, file)


def write_aside(path: str, data: bytes | BinaryIO, private: bool = False) -> None:
    """Write a file whole or not at all, in a power cut too; makes its folder."""
    folder, name = os.path.split(path)
    # Hidden, so that those who read all files of a folder as one table pass over it.
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}{ASIDE}")
    try:
        with _new_file(temporary, "xb") as file:
            if private:
                os.fchmod(file.fileno(), 0o600)  # before it has content
            put(data, file)
            file.flush()
            os.fsync(file.fileno())  # else the new name may have nothing in it
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)
    sync_folder(os.path.dirname(path))


def _new_file(path: str, mode: str) -> IO[bytes]:
    """Open a file in a folder that is made, and made again where a job that ends has just deleted it."""
    for _ in range(MOST_FOLDERS):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with suppress(FileNotFoundError):
            return open(path, mode)
    return open(path, mode)


def write_private(path: str, data: bytes | BinaryIO) -> None:
    """Write a file, likewise, that only its owner can read."""
    write_aside(path, data, private=True)


def delete_for_good(path: str) -> None:
    """Delete a file for good: a power cut does not bring it back."""
    os.remove(path)
    sync_folder(os.path.dirname(path))


def sync_folder(folder: str) -> None:
    """Make the names in a folder last, before what depends on them is changed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network drives cannot
            raise
    finally:
        os.close(handle)


def finish_writes(root: str) -> None:
    """Make the files last that ended processes left below a folder, and delete those that are half-written.
    Nobody else may write there.

    A process may have ended between its rename and the synchronisation of the folder. The next one finds that
    file and deletes others for it; without this, a power cut could then take this one, too.
    """
    for folder, _, names in os.walk(root):
        for name in filter(HALF_WRITTEN.search, names):
            os.remove(os.path.join(folder, name))
        sync_folder(folder)


def delete_empty_folder(path: str, name: str) -> None:
    """Delete a folder that has one entry, which is the empty folder `name`."""
    with suppress(OSError):
        if os.listdir(path) == [name]:
            os.rmdir(os.path.join(path, name))
            os.rmdir(path)
