"""Pixels for the viewer: tiles of slides and whole fields as JPEG, read in threads with a bounded queue."""

import asyncio
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import numpy as np
import simplejpeg

from bcd import schema
from bcd.data import read
from bcd.errors import StorageError
from bcd.imaging import image
from bcd.serving.receive import RefusedError, overloaded
from bcd.serving.viewer import deepzoom
from bcd.slides import pixel_size, slide, slide_cache

QUALITY = 85
# Longest side of a field in the browser.
FIELD_PX = 4096
# Of encoded tiles in memory, 80 kB each: those that several look at, and neighbours of what is shown.
CACHE_BYTES = 2**27
# Open slides, of which each may hold 32 MiB of decoded tiles.
OPEN_SLIDES = 8
# Requests that read or wait; a page has six at a time.
MOST_WAITING = 256
# Seconds without a tile after which nothing is kept: files that were deleted meanwhile would take room.
IDLE_S = 300
# Slides that are fetched from a store at a time: they must not hold up tiles of those that are here.
FETCHERS = 2

# URI and scale of a slide; and one that is open, whose file the cache keeps as long as this exists.
Place = tuple[str, pixel_size.Given]
Opened = tuple[slide.Slide, slide_cache.Staged | None]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class BoundedThreads:
    """Threads for one kind of work, nicer than the process by `niceness`, as are child processes that they
    start. Raises RefusedError `overloaded` beyond so many that work or wait."""

    def __init__(self, name: str, threads: int, most: int = MOST_WAITING, niceness: int = 0) -> None:
        # On Linux, a thread has a niceness of its own.
        self._threads = ThreadPoolExecutor(threads, name, os.nice, (niceness,))
        self._most, self._places = most, threading.BoundedSemaphore(most)

    async def run(
        self, work: Callable[Arguments, Result], *given: Arguments.args, **more: Arguments.kwargs
    ) -> Result:
        """Call a function in a thread."""
        if not self._places.acquire(blocking=False):
            raise overloaded(f"{self._most} requests are waiting")
        future = self._threads.submit(work, *given, **more)
        # One that is given up leaves the queue, too.
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)


class PixelReader:
    """Reads slides and fields by their rows. One event loop calls it.

    Args:
        threads: that decode and encode, by default one for each core that this process may use.
        niceness: of what reads and fetches, above that of this process.
    """

    def __init__(self, threads: int | None = None, niceness: int = 0) -> None:
        threads = threads or len(os.sched_getaffinity(0))
        self._readers = BoundedThreads("read", threads, niceness=niceness)
        self._fetchers = BoundedThreads("fetch", FETCHERS, niceness=niceness)
        self._resting: asyncio.TimerHandle | None = None
        self._slides = OrderedDict[Place, asyncio.Task[Opened]]()
        self._encoded = OrderedDict[tuple[Any, ...], bytes]()
        self._encoded_bytes = 0
        self._coming: dict[tuple[Any, ...], asyncio.Task[bytes]] = {}

    async def tile(self, row: Mapping[str, Any], version: str, level: int, column: int, number: int) -> bytes:
        """A tile of a slide (a row of `schema.SLIDES`) as JPEG: its level, column and number of its row.

        Raises:
            RefusedError: there is no such tile, or too many are waiting.
            ImageError: the slide cannot be read.
        """
        levels = deepzoom.DeepZoom(row[schema.WIDTH_PX], row[schema.HEIGHT_PX])
        box = levels.box(level, column, number)
        if box is None:
            raise RefusedError(404, "not_found", "the slide has no such tile")
        # Outputs may have slides of one name.
        key = version, row[schema.URI], level, column, number
        self._rest_later()
        if key in self._encoded:
            self._encoded.move_to_end(key)
            return self._encoded[key]
        # Several who look at one place wait for the same reading, which ends even if one of them leaves.
        if key not in self._coming:
            self._coming[key] = asyncio.create_task(self._read(row, levels.downsample(level), box))
            self._coming[key].add_done_callback(lambda task: self._keep(key, task))
        return await asyncio.shield(self._coming[key])

    async def field(self, row: Mapping[str, Any]) -> bytes:
        """A field (a row of the table) as JPEG, its longest side at most `FIELD_PX`; raises ImageError where
        it cannot be read, and RefusedError where too many are waiting."""
        return await self._readers.run(_field, row)

    def _rest_later(self) -> None:
        if self._resting:
            self._resting.cancel()
        self._resting = asyncio.get_running_loop().call_later(IDLE_S, self._rest)

    def _rest(self) -> None:
        self._slides.clear()
        self._encoded.clear()
        self._encoded_bytes = 0

    async def _read(self, row: Mapping[str, Any], downsample: int, box: deepzoom.Box) -> bytes:
        place = row[schema.URI], pixel_size.Given(override=(row[schema.MPP], row[schema.MPP_Y]))
        opened = await self._slide(place)
        try:
            return await self._readers.run(_tile, opened, downsample, box)
        except image.ImageError:
            # The slide may have been replaced.
            if place in self._slides and self._slides[place].done():
                del self._slides[place]
            return await self._readers.run(_tile, await self._slide(place), downsample, box)

    async def _slide(self, place: Place) -> Opened:
        """An open slide; the last ones stay open, and others are closed when nothing reads them."""
        if place not in self._slides:
            self._slides[place] = asyncio.create_task(self._fetchers.run(_open, *place))
            while len(self._slides) > OPEN_SLIDES:
                self._slides.popitem(last=False)
        self._slides.move_to_end(place)
        try:
            return await asyncio.shield(self._slides[place])
        except (image.ImageError, RefusedError):
            self._slides.pop(place, None)
            raise

    def _keep(self, key: tuple[Any, ...], task: asyncio.Task[bytes]) -> None:
        del self._coming[key]
        if task.cancelled() or task.exception():
            return
        self._encoded[key] = task.result()
        self._encoded_bytes += len(task.result())
        while self._encoded_bytes > CACHE_BYTES:
            self._encoded_bytes -= len(self._encoded.popitem(last=False)[1])


def _open(uri: str, given: pixel_size.Given) -> Opened:
    """Open a slide at any URI: the only place of the viewer that does."""
    try:
        return slide_cache.open_at(uri, given)
    except StorageError as error:
        raise read.withheld(error) from error


def _tile(opened: Opened, downsample: int, box: deepzoom.Box) -> bytes:
    return _jpeg(deepzoom.read_tile(opened[0], downsample, box))


def _field(row: Mapping[str, Any]) -> bytes:
    return _jpeg(image.shrink(read.picture(dict(row)), FIELD_PX, FIELD_PX))


def _jpeg(pixels: np.ndarray) -> bytes:
    """Encode uint8 (h, w, 3) RGB."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), QUALITY, "RGB", "420")
