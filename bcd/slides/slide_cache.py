"""Slides on the local disk, where OpenSlide can open them: a cache of bounded size over object stores."""

import fcntl
import hashlib
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedRandom
from pathlib import Path

from bcd import disk, storage
from bcd.errors import StorageError
from bcd.slides import dicom, pixel_size, slide

# Shared by all processes of a machine. A large slide has 5 GB.
CACHE = Path(tempfile.gettempdir()) / f"bcd-slides-{os.getuid()}"
CACHE_BYTES = 20 * 2**30
# Open slides of one process. Tiles of one slide follow each other.
OPEN_SLIDES = 2
LOCK = ".lock"
# A process measures the cache each time it has fetched this fraction of its capacity: 1 / 64.
LOOKS_PER_CACHE = 64


@dataclass(frozen=True)
class Staged:
    """A file on the local disk. The cache keeps the file as long as this object exists."""

    path: Path
    lock: BufferedRandom | None


def open_at(uri: str, given: pixel_size.Given) -> tuple[slide.Slide, Staged | None]:
    """Open a slide at any URI, staged where it cannot be read in parts. Raises ImageError as
    `slide.open_slide` does, and StorageError where it cannot be read or fetched."""
    if opened := slide.open_parts(uri, given):
        return opened, None
    staged = stage(uri)
    if disk.is_folder_file(uri):
        return slide.open_slide(uri, given), staged
    return slide.open_slide(staged.path, given), staged


@lru_cache(maxsize=OPEN_SLIDES)
def open_staged(uri: str, given: pixel_size.Given) -> tuple[slide.Slide, Staged | None]:
    """`open_at`; the last ones stay open."""
    return open_at(uri, given)


def is_slide_at(uri: str, given: pixel_size.Given) -> bool:
    """`slide.is_slide` of a file at any URI, staged where its tags do not say it. Raises ImageError as that
    does, and StorageError."""
    found = slide.is_slide_by_tags(uri, given)
    return slide.is_slide(stage(uri).path, given) if found is None else found


def stage(uri: str) -> Staged:
    """Fetch a slide and its companion files to the local disk, once per machine, whole or not at all. Raises
    StorageError where it cannot be read."""
    if not storage.is_remote(uri) or disk.is_folder_file(uri):  # read where it is
        return Staged(Path(storage.absolute(uri)), None)
    # The version distinguishes a slide from one that it replaced under the same name.
    _require_private()
    folder = CACHE / hashlib.sha256(f"{uri} {storage.version(uri)}".encode()).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / LOCK).open("a+b")  # held as long as the slide is used
    target = folder / "slide" / uri.rpartition("/")[2]
    while True:
        # Many processes may use a slide. Fetching or removing it waits until none does.
        fcntl.flock(lock, fcntl.LOCK_SH)
        if target.exists():
            os.utime(folder)
            return Staged(target, lock)
        with _locked(lock):
            if not target.exists():
                _make_room()
                _fetch(uri, folder)
                _fetched["bytes"] += _size(folder)


def _require_private() -> None:
    """Make the cache, for this user alone, in a folder where others may have put something in its place."""
    with suppress(FileExistsError):
        CACHE.mkdir(mode=0o700, parents=True)
    status = CACHE.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise StorageError(f"{CACHE} is not a folder of this user: remove it, or set TMPDIR to another place")
    if status.st_mode & 0o077:
        CACHE.chmod(0o700)


@contextmanager
def _locked(lock: BufferedRandom) -> Iterator[None]:
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)


def _fetch(uri: str, folder: Path) -> None:
    temporary = folder / "aside"
    shutil.rmtree(temporary, ignore_errors=True)
    root, name = storage.parent(uri), uri.rpartition("/")[2]
    _download(root, name, temporary)
    for other in _companions(root, name, temporary / name):
        _download(root, other, temporary)
    temporary.rename(folder / "slide")


def _download(root: str, name: str, folder: Path) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    storage.download(storage.join(root, name), folder / name)


def _companions(root: str, name: str, fetched: Path) -> list[str]:
    """Files that a fetched one requires: its MIRAX folder, its DICOM series."""
    if name.lower().endswith(slide.MRXS):
        return slide.companions([file.path for file in storage.list_files(root)], name)
    with fetched.open("rb") as file:
        if not dicom.is_dicom(file.read(dicom.HEAD_BYTES)):
            return []
    beside = [file for file in storage.list_files(root) if "/" not in file.path]
    may_belong = (file.path.lower().endswith(slide.DICOM) or slide.is_unnamed(file.path) for file in beside)
    series = _series(tuple(file for file, may in zip(beside, may_belong, strict=True) if may))
    return [other for paths in series if name in paths for other in paths if other != name]


@lru_cache(maxsize=2)
def _series(files: tuple[storage.File, ...]) -> list[list[str]]:
    """The slides of one folder; cached, because each of them requires it."""
    return list(dicom.slides(dicom.headers(files)).values())


# By this process since it last measured the cache; unknown at first.
_fetched = {"bytes": math.inf}


def _make_room() -> None:
    """Remove the least recently used slides that no process uses, until the rest fits.

    Measuring a cache of many small files at each fetch would cost more than the fetch.
    """
    if _fetched["bytes"] <= CACHE_BYTES / LOOKS_PER_CACHE:
        return
    _fetched["bytes"] = 0
    folders = sorted(CACHE.iterdir(), key=lambda folder: folder.stat().st_mtime)
    sizes = [_size(folder) for folder in folders]
    total = sum(sizes)
    for folder, size in zip(folders, sizes, strict=True):
        if total > CACHE_BYTES and _remove_unused(folder):
            total -= size


def _size(folder: Path) -> int:
    paths = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
    total = 0
    for path in paths:
        with suppress(FileNotFoundError):  # moved or removed by another process
            total += os.path.getsize(path)
    return total


def _remove_unused(folder: Path) -> bool:
    with open(folder / LOCK, "a+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # The lock remains: another process may be waiting for it.
        for name in ("slide", "aside"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return True
