"""Decode images so that a bad one affects only itself.

Plain PNGs that are not large are decoded here, by a decoder in Rust. Those for all other images are written
in C, and run in a child process (`bcd.imaging.child`).
"""

import numpy as np

from bcd.errors import ImageError
from bcd.imaging import child, image

PROGRAM = child.Program("from bcd.imaging import decoder; decoder.serve_parent()", "the decoder", "decoding")


def decode_safely(data: bytes, budget: child.Budget = child.ARCHIVE) -> np.ndarray:
    """`image.decode`, in a child process where the decoder is not memory-safe, or the image is large.

    Raises:
        ImageError: as `image.decode` and `child.call`.
    """
    pixels = image.decode_plain(data)
    if pixels is not None:
        return pixels
    answer = child.call(PROGRAM, {}, data, budget)
    if answer.printed:  # by libtiff, which prints errors only, and may decode the rest
        raise ImageError("truncated", f"the image cannot be decoded: {answer.printed}")
    return answer.data.reshape(answer.values["shape"])


def serve_parent() -> None:
    """The child process: decode what the parent sends."""
    child.serve(_answer)


def _answer(_: child.Arguments, data: bytes) -> tuple[child.Arguments, memoryview]:
    pixels = np.ascontiguousarray(image.decode(data))
    return {"shape": pixels.shape}, pixels.reshape(-1).data
