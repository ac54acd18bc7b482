"""Slides that OpenSlide reads in a child process: a bad one affects only itself."""

import os
import weakref
from itertools import count
from pathlib import Path

import numpy as np

from bcd.imaging import child
from bcd.slides.readers.interface import Facts

PROGRAM = child.Program(
    "from bcd.slides.readers import openslide_server; openslide_server.serve_slides()",
    "the slide reader",
    "reading the slide",
)
_numbers = count()


class OpenSlideReader:
    """A slide on the local disk; see `interface.Reader`. The children that read it keep it open."""

    def __init__(self, path: Path, budget: child.Budget = child.ARCHIVE) -> None:
        """Raises ImageError `unreadable`, or as `child.call`."""
        self._budget = budget
        self._slide = {"path": os.path.abspath(path), "key": str(next(_numbers))}
        # However this object ends.
        closing = {"call": "close", "key": self._slide["key"]}
        self._close = weakref.finalize(self, child.post, PROGRAM, closing, budget, self._slide["key"])
        self._close.atexit = False
        found = self._call("facts")
        self.facts = Facts(
            sizes=tuple(map(tuple, found.values["sizes"])),
            downsamples=tuple(found.values["downsamples"]),
            properties=found.values["properties"],
            profile=found.data.tobytes() if found.values["has_profile"] else None,
            reader=found.values["reader"],
        )

    def _call(self, name: str, **arguments: int) -> child.Reply:
        given = self._slide | {"call": name} | arguments
        return child.call(PROGRAM, given, budget=self._budget, key=self._slide["key"])

    def read(
        self, x_level0_px: int, y_level0_px: int, level: int, width_px: int, height_px: int
    ) -> np.ndarray:
        """See `interface.Reader`. Raises ImageError as `__init__`."""
        answer = self._call(
            "read", x=x_level0_px, y=y_level0_px, level=level, width=width_px, height=height_px
        )
        return answer.data.reshape(height_px, width_px, 3)

    def close(self) -> None:
        """Close it in the children that do not read just now."""
        self._close()


def detect_layout(path: Path, budget: child.Budget = child.ARCHIVE) -> str | None:
    """OpenSlide's name of the layout of a file on the local disk, such as `aperio`, or None. Raises
    ImageError as `child.call`."""
    given = {"call": "layout", "path": os.path.abspath(path)}
    return child.call(PROGRAM, given, budget=budget).values["layout"]
