"""Viewers of a scored archive at a time: how long their tiles take, with clients on the same machine.

    python -m benchmarks.view_load OUTPUT [--viewers 40] [--seconds 30]

Each viewer comes within the first five seconds and looks at a place of its own of the slide with most
tiles, as the page does: six connections, the tiles of a screen, then a pause in which it is looked at, then a
place beside it. Prints the latency of tiles that were read for the first time, while the viewers come and
once all are there, then of the same tiles once they are kept.
"""

import argparse
import asyncio
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

from bcd.serving.viewer.deepzoom import TILE_PX, DeepZoom

# Pixels of a screen, and connections of a page.
WIDTH_PX, HEIGHT_PX, CONNECTIONS = 1280, 800, 6
# Seconds until the viewer answers, in which the first places are opened, and after which these are read.
START_S, COME_S, THERE_S = 60, 5, 9


class Connection:
    """One kept connection to the viewer; a client of a library would use more CPU time than the viewer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of an answer."""
        self._writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        size = int(head.partition("content-length:")[2].partition("\r\n")[0])
        return int(head.split()[1]), await self._reader.readexactly(size)


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    """An open connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()


@dataclass
class Load:
    """A slide of a viewer, and for each tile the second in which it was sent and the milliseconds it took."""

    port: int
    slide: str
    levels: DeepZoom
    pause_s: float
    seconds: float
    taken: list[tuple[float, float]] = field(default_factory=list)
    refused: int = 0
    begun: float = field(default_factory=time.perf_counter)

    async def view(self, seed: int) -> None:
        """One viewer, from place to place until the time is over."""
        rng, end = random.Random(seed), time.monotonic() + self.seconds
        await asyncio.sleep(rng.uniform(0, COME_S))
        level, place = self.levels.last - rng.randrange(2), [rng.random(), rng.random()]
        seen = set[str]()
        while time.monotonic() < end:
            new = [path for path in self._screen(level, place) if path not in seen]
            seen.update(new)
            waiting = iter(new)
            await asyncio.gather(*(self._fetch(waiting) for _ in range(CONNECTIONS)))
            await asyncio.sleep(self.pause_s * rng.uniform(0.5, 1.5))
            place = [min(1, max(0, at + rng.uniform(-0.02, 0.02))) for at in place]

    def _screen(self, level: int, place: list[float]) -> Iterator[str]:
        sides = zip(place, self.levels.size(level), (WIDTH_PX, HEIGHT_PX), strict=True)
        columns, rows = (
            _covering(int(at * max(0, size - seen)), min(seen, size)) for at, size, seen in sides
        )
        for row in rows:
            for column in columns:
                yield f"/v1/view/pixels/{level}/{column}_{row}?name={quote(self.slide, safe='')}"

    async def _fetch(self, waiting: Iterator[str]) -> None:
        async with connected(self.port) as connection:
            for path in waiting:
                started = time.perf_counter()
                status, _ = await connection.get(path)
                if status == 200:
                    now = time.perf_counter()
                    self.taken.append((now - self.begun, 1_000 * (now - started)))
                else:
                    self.refused += 1


def _covering(first_px: int, n_px: int) -> range:
    """The tiles on which these pixels of a side lie."""
    return range(first_px // TILE_PX, (first_px + n_px - 1) // TILE_PX + 1)


@contextmanager
def viewer(output: str) -> Iterator[int]:
    """The port of `bcd view` in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = "from bcd import cli; cli.main('view')"
    command = [sys.executable, "-c", program, output, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    end = time.monotonic() + START_S
    try:
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


async def measure(port: int, viewers: int, pause_s: float, seconds: float) -> Load:
    """Latencies of so many viewers at a time."""

    async def asked(path: str, **options: Any) -> Any:
        async with connected(port) as connection:
            return json.loads((await connection.get(f"/v1/view/{path}?{urlencode(options)}"))[1])

    name = (await asked("inputs", sort="tiles", descending=True, limit=1))["rows"][0]["name"]
    slide = await asked("input", name=name)
    load = Load(port, name, DeepZoom(slide["width_px"], slide["height_px"]), pause_s, seconds)
    await asyncio.gather(*(load.view(seed) for seed in range(viewers)))
    return load


def arguments(doc: str | None, *names: str) -> argparse.Namespace:
    """What a caller asks for: positional arguments of these names, and the load."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    for name in names:
        parser.add_argument(name)
    parser.add_argument("--viewers", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--pause", type=float, default=2.0)
    return parser.parse_args()


def print_loads(port: int, given: argparse.Namespace) -> None:
    """Measure tiles that are read for the first time, then the same ones, and print both: in `THERE_S` and
    after it."""
    for name in ("read", "kept"):
        load = asyncio.run(measure(port, given.viewers, given.pause, given.seconds))
        print(f"{name}: {given.viewers} viewers, refused {load.refused}")
        for phase, start, end in (("coming", 0, THERE_S), ("there", THERE_S, given.seconds)):
            taken = [ms for second, ms in load.taken if start <= second < end]
            p50, p95 = statistics.median(taken), statistics.quantiles(taken, n=20)[-1]
            print(f"  {phase}: {len(taken) / (end - start):.0f} tiles/s, p50 {p50:.0f} ms, p95 {p95:.0f} ms")


def main() -> None:
    """Measure and print."""
    given = arguments(__doc__, "output")
    with viewer(given.output) as port:
        print_loads(port, given)


if __name__ == "__main__":
    main()
