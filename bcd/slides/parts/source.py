"""Parts of a file on a disk or in a store, in few requests: those of a slide's tags and of its tiles."""

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

import pyarrow as pa

from bcd import storage
from bcd.errors import ImageError, StorageError

# Tags are read in blocks of this size. Each page of a TIFF has its own, far from those of the others.
BLOCK_BYTES = 2**14
# All tags of a slide of 10^11 pixels have 24 MB.
MAX_TAG_BYTES = 2**28
# Of one request, and what it may have of bytes that nobody asked for, as a share of the others.
MOST_BYTES, MOST_GAPS = 2**22, 1 / 8
# Parts of one slide in memory: those that were requested before they are needed, and those last used.
CACHE_BYTES = 2**25
# Seconds of use after which it is checked that the file is still the one that was opened.
CHECK_S = 5.0

# Offset and number of bytes.
Part = tuple[int, int]


class Source:
    """One version of a file, opened to read parts of it; threads may share it.

    Opening is one request to a store, each read another one, and after `CHECK_S` one more for the version.
    """

    def __init__(self, uri: str) -> None:
        """Raises StorageError where the file cannot be opened."""
        self.uri = uri
        self._file = storage.open_file(uri)
        self.size_bytes = int(self._file.size())
        self._version, self._checked, self._is_other = _version(self._file, uri), time.monotonic(), False

    def read(self, part: Part) -> bytes:
        """The bytes of a part that is within the file. Raises StorageError, too, where the file was replaced
        or the store sent less."""
        try:
            content = storage.read_at(self._file, self.uri, *part)
            if len(content) < part[1]:
                message = f"{self.uri}: cannot read it: {len(content):,} of {part[1]:,} bytes were sent"
                raise StorageError(message)
        except StorageError:
            self.require_same(within_s=0)
            raise
        self.require_same()
        return content

    def require_same(self, within_s: float | None = None) -> None:
        """Require that the file is the one that was opened, as it was `within_s` seconds ago at the longest.
        Raises StorageError."""
        longest_s = CHECK_S if within_s is None else within_s
        if not self._is_other and time.monotonic() - self._checked >= longest_s:
            self._checked = time.monotonic()
            with storage.open_file(self.uri) as now:
                self._is_other = _version(now, self.uri) != self._version
        if self._is_other:
            raise StorageError(f"{self.uri}: it was replaced while it was read; run the same command again")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _version(file: pa.NativeFile, uri: str) -> str:
    """What differs between two files of one name: a store's ETag, as it stated it on opening, else size and
    time of the last change."""
    stated = {name.lower(): value for name, value in (file.metadata() or {}).items()}
    return str(stated.get("etag") or storage.version(uri))


class Blocks:
    """A source as a file for `tiff.iterate_pages`: blocks of it, each requested once."""

    def __init__(self, source: Source) -> None:
        self._source, self._place, self._held = source, 0, dict[int, bytes]()

    def seek(self, place: int, /) -> int:
        """Read from this byte on."""
        self._place = place
        return place

    def read(self, n_bytes: int, /) -> bytes:
        """The next bytes, fewer where the file ends. Raises ImageError `too_large`, and StorageError."""
        start, end = self._place, min(self._place + n_bytes, self._source.size_bytes)
        if start >= end:
            return b""
        numbers = range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES))
        if (len(self._held) + len(numbers)) * BLOCK_BYTES > MAX_TAG_BYTES:
            raise ImageError("too_large", f"a TIFF with more than {MAX_TAG_BYTES:,} bytes of tags")
        missing = [number for number in numbers if number not in self._held]
        if missing:
            self._request(range(missing[0], missing[-1] + 1))
        self._place = end
        content = b"".join(self._held[number] for number in numbers)
        return content[start - numbers[0] * BLOCK_BYTES : end - numbers[0] * BLOCK_BYTES]

    def _request(self, numbers: range) -> None:
        start = numbers[0] * BLOCK_BYTES
        end = min(numbers.stop * BLOCK_BYTES, self._source.size_bytes)
        content = self._source.read((start, end - start))
        for number in numbers:
            self._held[number] = content[number * BLOCK_BYTES - start :][:BLOCK_BYTES]


class Parts:
    """Parts of a source in a store: requested together, several requests at a time, and kept in memory."""

    def __init__(self, source: Source) -> None:
        self._source, self._lock = source, Lock()
        # A part and the request that brings it: the contents of the parts that it covers.
        self._held = OrderedDict[Part, Future[dict[Part, bytes]]]()
        self._held_bytes = 0
        self._pool = ThreadPoolExecutor(storage.READ_THREADS)

    def request(self, parts: Iterable[Part]) -> None:
        """Request those of the parts that are not in memory; returns at once."""
        with self._lock:
            new = set[Part]()
            for part in parts:
                if part in self._held:
                    self._held.move_to_end(part)
                else:
                    new.add(part)
            for together in spans(sorted(new)):
                request = self._pool.submit(self._fetched, together)
                self._held.update(dict.fromkeys(together, request))
                self._held_bytes += sum(n_bytes for _, n_bytes in together)
            while self._held_bytes > CACHE_BYTES and len(self._held) > len(new):
                self._forget(next(iter(self._held)))

    def read(self, part: Part) -> bytes:
        """The bytes of a part. Raises StorageError; then the next call requests it again."""
        while True:
            with self._lock:
                request = self._held.get(part)
            if request is None:
                self.request([part])
                continue
            if (error := request.exception()) is not None:
                self._give_up(part, request)
                raise error
            if (content := request.result().get(part)) is not None:  # else forgotten meanwhile
                return content

    def _give_up(self, part: Part, request: Future[dict[Part, bytes]]) -> None:
        with self._lock:
            if self._held.get(part) is request:
                self._forget(part)

    def _fetched(self, parts: Sequence[Part]) -> dict[Part, bytes]:
        start, end = parts[0][0], max(map(sum, parts))
        content = memoryview(self._source.read((start, end - start)))
        # Copies, so that each can be forgotten.
        return {(place, n): bytes(content[place - start : place - start + n]) for place, n in parts}

    def _forget(self, part: Part) -> None:
        request = self._held.pop(part)
        self._held_bytes -= part[1]
        if request.done() and not request.exception():
            request.result().pop(part, None)

    def close(self) -> None:
        """Request nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def spans(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Sorted parts, grouped to be requested together: near each other, and of bounded size."""
    together, wanted, gaps = list[Part](), 0, 0
    for part in parts:
        if together:
            gap = part[0] - sum(together[-1])
            fits = part[0] + part[1] - together[0][0] <= MOST_BYTES
            if not (fits and gap >= 0 and gaps + gap <= MOST_GAPS * (wanted + part[1])):
                yield together
                together, wanted, gaps, gap = [], 0, 0, 0
            gaps += gap
        together.append(part)
        wanted += part[1]
    if together:
        yield together


def within(parts: Iterable[Part], most_bytes: int) -> Iterator[Part]:
    """The first distinct parts that have so many bytes together."""
    for part in dict.fromkeys(parts):
        most_bytes -= part[1]
        if most_bytes < 0:
            return
        yield part
