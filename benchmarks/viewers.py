"""Viewers of the service at a time, beside its idle model: how long their tiles take.

    python -m benchmarks.viewers MODEL OUTPUT [--viewers 40] [--seconds 30]

As `view_load`, through Ray Serve: `jobs/serve.py --scores OUTPUT` in a process of its own, whose proxy hands
each request on to the process of the viewer. The goal is a p95 of at most 200 ms on two cores.
"""

import time
from urllib.parse import urlsplit

import httpx

from benchmarks import serve_load, view_load


def main() -> None:
    """Measure and print."""
    given = view_load.arguments(__doc__, "model", "output")
    with serve_load.service(given.model, "--scores", given.output) as (url, _):
        end = time.monotonic() + serve_load.START_S
        # The model may be ready before the viewer.
        while httpx.get(f"{url}/v1/view", timeout=60).status_code != 200:
            if time.monotonic() > end:
                raise SystemExit("the viewer did not start")
            time.sleep(0.5)
        view_load.print_loads(urlsplit(url).port or 80, given)


if __name__ == "__main__":
    main()
