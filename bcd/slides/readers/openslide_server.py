"""OpenSlide, in a child process: the only module that imports it, and only children import this one.

It is written in C, as are the decoders and the parsers of databases and XML that it uses.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import openslide
from PIL import Image

from bcd.imaging import child
from bcd.imaging.image import boundary, to_srgb
from bcd.slides.readers.interface import UNREADABLE

# Of one child, each with a cache of decoded tiles of 32 MiB. Tiles of one slide follow each other.
OPEN_SLIDES = 4
READER = f"openslide {openslide.__library_version__}"
OPAQUE = 255

Found = tuple[child.Arguments, child.Content]
_open: OrderedDict[str, tuple[openslide.OpenSlide, bytes | None]] = OrderedDict()


def serve_slides() -> None:
    """The child process: answer what the parent asks for slides."""
    child.serve(answer_call)


def answer_call(arguments: child.Arguments, _: bytes = b"") -> Found | None:
    """Answer a call: the function to call by its name, and its arguments.

    Raises:
        ImageError: `unreadable`. The slide is opened again for the next call: after an error of one tile
            OpenSlide would read no other.
    """
    name, given = arguments["call"], {key: value for key, value in arguments.items() if key != "call"}
    with boundary(*UNREADABLE), ExitStack() as stack:
        stack.callback(_close, given.get("key", ""))
        answered = CALLS[name](**given)
        stack.pop_all()
        return answered


def _layout(path: str) -> Found:
    """OpenSlide's name of the layout of a file, None for a file of which it knows none."""
    return {"layout": openslide.OpenSlide.detect_format(path)}, b""


def _facts(path: str, key: str) -> Found:
    """Sizes, downsamples and properties; the bytes are those of the ICC profile."""
    handle, profile = _opened(path, key)
    values = {
        "sizes": handle.level_dimensions,
        "downsamples": handle.level_downsamples,
        "properties": dict(handle.properties),
        "reader": READER,
        "has_profile": profile is not None,
    }
    return values, profile or b""


def _read(path: str, key: str, x: int, y: int, level: int, width: int, height: int) -> Found:
    """A rectangle as in `interface.Reader`."""
    handle, profile = _opened(path, key)
    region = handle.read_region((x, y), level, (width, height))
    colors = to_srgb(region.convert("RGB"), profile) if profile else region.convert("RGB")
    if region.getchannel("A").getextrema()[0] != OPAQUE:
        paper = Image.new("RGB", region.size, "white")
        paper.paste(colors, mask=region)
        colors = paper
    return {}, np.asarray(colors).reshape(-1).data


def _close(key: str) -> None:
    """Close a slide, where it is open; the parent expects no answer."""
    if key in _open:
        _open.pop(key)[0].close()


CALLS: dict[str, Callable[..., Any]] = {"layout": _layout, "facts": _facts, "read": _read, "close": _close}


def _opened(path: str, key: str) -> tuple[openslide.OpenSlide, bytes | None]:
    """The slide that the parent opened under a key, and its profile."""
    if key not in _open:
        handle = openslide.OpenSlide(path)
        profile = handle.color_profile
        while len(_open) >= OPEN_SLIDES:
            _close(next(iter(_open)))
        _open[key] = handle, profile.tobytes() if profile else None
    _open.move_to_end(key)
    return _open[key]
