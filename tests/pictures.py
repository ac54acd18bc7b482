"""Small pictures for tests, good and bad, made in memory."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def gradient(height: int = 46, width: int = 70) -> np.ndarray:
    """uint8 (height, width, 3): red rises to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / (width - 1), 255 * y / (height - 1), 0 * x + 90], -1).round().astype(np.uint8)


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """An encoded picture."""
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size in its header and has no pixels."""
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + body
    header = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 1_000) + b"IDAT"


def broken() -> dict[str, tuple[bytes, str]]:
    """Name -> (bytes, code that the decoder must give)."""
    good = encode(gradient(200, 300))
    return {
        "zero bytes": (b"", "empty"),
        "truncated png": (good[: len(good) // 2], "truncated"),
        "truncated jpeg": (encode(gradient(200, 300), "JPEG")[:900], "truncated"),
        "header only": (png_header(70, 46), "truncated"),
        "damaged": (good[:60] + bytes(40) + good[100:], "truncated"),
        "enormous": (png_header(30_000, 30_000), "too_many_pixels"),
        "large": (png_header(9_000, 9_000), "too_many_pixels"),
        "text": (b"not a picture at all", "unsupported_format"),
        "gif": (encode(Image.new("P", (9, 9)), "GIF"), "unsupported_format"),
        "float tiff": (encode(Image.new("F", (9, 9)), "TIFF"), "unsupported_format"),
    }
