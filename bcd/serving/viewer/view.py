"""The job of `jobs/view.py`: a viewer of a scored archive, on one machine, without a cluster or a model."""

import logging
import re
import signal
import threading
from urllib.parse import quote

import pyarrow.compute as pc
import uvicorn

from bcd import schema
from bcd.config.serving import ViewConfig
from bcd.errors import DataError, ResourceError
from bcd.serving import front
from bcd.serving.middleware import Guard, Limits
from bcd.serving.viewer import packed, scored
from bcd.serving.viewer.app import create_viewer
from bcd.serving.viewer.scored import Outputs, Scored

logger = logging.getLogger(__name__)

# Connections at a time, and bodies, of which the viewer reads none.
MOST_CONNECTIONS, BODY_BYTES = 512, 2**16


def run(config: ViewConfig) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        ConfigError: other machines reach the address, and there is no token.
        DataError: there is no output of a finished scoring job, or it has no such image.
        ResourceError: the port is not free.
        StorageError: the output cannot be read.
    """
    token_digest = front.read_digest(config.token_file, config.host)
    output = scored.open_scored(config.output)
    front.require_free(config.host, config.port)
    limits = Limits(max_body_bytes=BODY_BYTES)
    guard = Guard(create_viewer(Outputs(output.uri)), limits, token_digest, loopback_only=True)
    settings = uvicorn.Config(
        guard,
        host=config.host,
        port=config.port,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
    )
    address = f"http://{config.host}:{config.port}{page_of(output, config.at)}"
    _serve(uvicorn.Server(settings), f"viewing {config.output} at {address} (stop with Ctrl-C)")


def page_of(output: Scored, name: str | None) -> str:
    """The page of a slide, field or tile by its id, or of the list; raises DataError where there is none."""
    if name is None:
        return "/slides"
    if output.slide(name) or output.field(name):
        return f"/slides/{quote(name, safe='')}"
    for slide_name in [name[: match.start()] for match in re.finditer("#", name)]:
        row, tiles = output.slide(slide_name), output.tiles(slide_name)
        found = tiles.filter(pc.equal(tiles[schema.IMAGE_ID], name)).to_pylist()
        if row and found:
            width, height = packed.tile_size(tiles, (row[schema.MPP], row[schema.MPP_Y]))
            x, y = found[0][schema.X_LEVEL0_PX] + width // 2, found[0][schema.Y_LEVEL0_PX] + height // 2
            return f"/slides/{quote(slide_name, safe='')}#{x},{y},1"
    raise DataError(f"{output.uri} has no slide, field or tile {name!r}; expected an image_id of its table")


def _serve(server: uvicorn.Server, line: str) -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    # In a thread, where uvicorn sets no handlers of its own, which end the process by the signal.
    thread = threading.Thread(target=server.run)
    thread.start()
    logger.info(line)
    while thread.is_alive() and not stop.wait(1):
        pass
    server.should_exit = True
    thread.join()
    if not stop.is_set():
        raise ResourceError("the server has ended by itself: is its address still this machine's?")
