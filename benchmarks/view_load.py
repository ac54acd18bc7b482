"""Viewers of a scored archive at a time: how long their tiles take, beside clients on the same machine.

    python -m benchmarks.view_load OUTPUT [--viewers 40] [--seconds 30]

Each viewer looks at a place of its own of the largest slide, as the page does: six tiles at a time of the two
largest levels until what a screen shows is there, then a pause in which it is looked at, then a neighbouring
place. Prints latencies of tiles that were read for the first time and of those that were kept.
"""

import argparse
import asyncio
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from bcd.serving.viewer.deepzoom import TILE_PX

# Tiles of a screen of 1280 x 800 px, and requests of a page at a time.
ACROSS, DOWN, AT_A_TIME = 6, 4, 6
START_S = 60


@dataclass
class Load:
    """A slide of a viewer, and what its tiles took in ms."""

    url: str
    slide: dict[str, object]
    pause_s: float
    until: float
    taken: list[float] = field(default_factory=list)
    refused: int = 0

    async def view(self, client: httpx.AsyncClient, seed: int) -> None:
        """One viewer, from place to place until the time is over."""
        rng = random.Random(seed)
        limit = asyncio.Semaphore(AT_A_TIME)
        seen: set[str] = set()
        level = int(self.slide["deep_zoom"]["last"]) - rng.randrange(2)  # type: ignore[index]
        place = [rng.random(), rng.random()]
        while time.monotonic() < self.until:
            new = [path for path in self._screen(level, place) if path not in seen]
            seen.update(new)
            await asyncio.gather(*(self._tile(client, limit, path) for path in new))
            await asyncio.sleep(self.pause_s * rng.uniform(0.5, 1.5))
            place = [min(1, max(0, at + rng.uniform(-0.03, 0.03))) for at in place]

    def _screen(self, level: int, place: list[float]) -> Iterator[str]:
        shrink = 2 ** (int(self.slide["deep_zoom"]["last"]) - level)  # type: ignore[index]
        sides = (int(str(self.slide[name])) // shrink // TILE_PX for name in ("width_px", "height_px"))
        left, top = (int(at * max(0, side - 1)) for at, side in zip(place, sides, strict=True))
        for row in range(top, top + DOWN):
            yield from (f"/v1/view/pixels/{level}/{column}_{row}" for column in range(left, left + ACROSS))

    async def _tile(self, client: httpx.AsyncClient, limit: asyncio.Semaphore, path: str) -> None:
        async with limit:
            started = time.perf_counter()
            answer = await client.get(self.url + path, params={"name": str(self.slide["slide"])})
            if answer.status_code == 200:
                self.taken.append(1_000 * (time.perf_counter() - started))
            elif answer.status_code != 404:  # beyond the edge
                self.refused += 1


@contextmanager
def viewer(output: str) -> Iterator[str]:
    """URL of `bcd view` in a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = "from bcd import cli; cli.main('view')"
    process = subprocess.Popen([sys.executable, "-c", program, output, "--port", str(port)])
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + START_S
    try:
        while time.monotonic() < end:
            try:
                httpx.get(f"{url}/healthz")
                break
            except httpx.ConnectError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


async def measure(url: str, viewers: int, pause_s: float, seconds: float, seed: int) -> Load:
    """Latencies of so many viewers at a time."""
    limits = httpx.Limits(max_connections=viewers * AT_A_TIME)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        query = {"sort": "tiles", "descending": True, "limit": 1}
        found = (await client.get(f"{url}/v1/view/inputs", params=query)).json()["rows"][0]["name"]
        slide = (await client.get(f"{url}/v1/view/input", params={"name": found})).json()
        load = Load(url, slide, pause_s, time.monotonic() + seconds)
        await asyncio.gather(*(load.view(client, seed + n) for n in range(viewers)))
    return load


def main() -> None:
    """Measure and print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("output")
    parser.add_argument("--viewers", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--pause", type=float, default=2.0)
    given = parser.parse_args()
    with viewer(given.output) as url:
        for name, seed in (("read", 0), ("kept", 0)):
            load = asyncio.run(measure(url, given.viewers, given.pause, given.seconds, seed))
            p50, p95 = statistics.median(load.taken), statistics.quantiles(load.taken, n=20)[-1]
            rate = len(load.taken) / given.seconds
            print(
                f"{name}: {given.viewers} viewers, {len(load.taken)} tiles, {rate:.0f}/s, "
                f"p50 {p50:.0f} ms, p95 {p95:.0f} ms, refused {load.refused}"
            )


if __name__ == "__main__":
    main()
