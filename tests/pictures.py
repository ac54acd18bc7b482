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


def tiled_tiff(pixels: np.ndarray, mpp: float | None, side: int = 64) -> bytes:
    """A slide as OpenSlide reads it, in tiles and of one level; byte by byte, since Pillow writes strips."""
    rows, columns = (-(-size // side) for size in pixels.shape[:2])
    padded = np.full((rows * side, columns * side, 3), 255, np.uint8)
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels
    tiles = padded.reshape(rows, side, columns, side, 3).swapaxes(1, 2).tobytes()
    n, size = rows * columns, side * side * 3
    # Tag -> type (3: 16 bits, 4: 32 bits, 5: fraction) and values; 296 says pixels per cm.
    tags = {256: (4, [pixels.shape[1]]), 257: (4, [pixels.shape[0]]), 258: (3, [8]), 259: (3, [1])}
    tags |= {262: (3, [2]), 277: (3, [3]), 282: (5, [round(1e7 / (mpp or 1)), 1_000])}
    tags |= {283: tags[282], 296: (3, [3 if mpp else 1]), 322: (4, [side]), 323: (4, [side])}
    tags |= {324: (4, [8 + i * size for i in range(n)]), 325: (4, [size] * n)}
    start = 8 + len(tiles)
    directory, extra, after = struct.pack("<H", len(tags)), b"", start + 2 + 12 * len(tags) + 4
    for tag, (kind, values) in tags.items():
        packed = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        where = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", after + len(extra))
        extra += packed if len(packed) > 4 else b""
        directory += struct.pack("<HHI", tag, kind, len(values) // (2 if kind == 5 else 1)) + where
    return struct.pack("<2sHI", b"II", 42, start) + tiles + directory + bytes(4) + extra
