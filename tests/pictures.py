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


def stained(height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3): all tissue, in the colours of a stain, no two places alike."""
    y, x = np.mgrid[0:height, 0:width]
    falling = [230 - 40 * x / width, 150 - 40 * y / height, 190 - 20 * x / width]
    return np.stack(falling, -1).round().astype(np.uint8)


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


Tags = dict[int, tuple[int, list[int] | bytes]]
# TIFF's types -> size in bytes, and letter for `struct`; 2 is text, 5 a fraction of two numbers.
TIFF_TYPES = {1: (1, "B"), 2: (1, "s"), 3: (2, "H"), 4: (4, "I"), 5: (8, "I")}


def tiff(*pages: tuple[Tags, list[bytes]], order: str = "<") -> bytes:
    """A TIFF byte by byte, since Pillow writes few kinds: of each page its tags and its strips or tiles."""
    content = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 0)
    pointer = 4
    for tags, parts in pages:
        places = [len(content) + sum(map(len, parts[:i])) for i in range(len(parts))]
        offsets, counts = (324, 325) if 322 in tags else (273, 279)
        full = tags | {offsets: (4, places), counts: (4, [len(part) for part in parts])}
        content += b"".join(parts)
        content += b"\0" * (len(content) % 2)
        start = struct.pack(order + "I", len(content))
        content = content[:pointer] + start + content[pointer + 4 :]
        pointer = len(content) + 2 + 12 * len(full)
        content += _directory(full, len(content), order)
    return content


def _directory(tags: Tags, start: int, order: str) -> bytes:
    table, extra = struct.pack(order + "H", len(tags)), b""
    for tag, (kind, values) in sorted(tags.items()):
        size, letter = TIFF_TYPES[kind]
        packed = (
            values if isinstance(values, bytes) else struct.pack(f"{order}{len(values)}{letter}", *values)
        )
        table += struct.pack(order + "HHI", tag, kind, len(packed) // size)
        after = start + 2 + 12 * len(tags) + 4 + len(extra)
        table += packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(order + "I", after)
        extra += packed if len(packed) > 4 else b""
    return table + bytes(4) + extra


def tiff_page(samples: np.ndarray, meaning: int = 2, **changes: object) -> tuple[Tags, list[bytes]]:
    """A page of samples (h, w[, channels]) in one strip; `t270=b"text"` or `t262=[0]` sets a tag."""
    channels = samples.shape[2] if samples.ndim == 3 else 1
    tags: Tags = {256: (4, [samples.shape[1]]), 257: (4, [samples.shape[0]]), 259: (3, [1])}
    tags |= {258: (3, [8 * samples.itemsize] * channels), 262: (3, [meaning]), 277: (3, [channels])}
    tags |= {278: (4, [samples.shape[0]])}
    for name, value in changes.items():
        tags[int(name[1:])] = (2 if isinstance(value, bytes) else 3, value)  # type: ignore[assignment]
    return tags, [samples.tobytes()]


def tiled_tiff(
    pixels: np.ndarray, mpp: float | tuple[float, float] | None, side: int = 64, **changes: object
) -> bytes:
    """A slide as OpenSlide reads it, in tiles and of one level."""
    return tiff(tiled_page(pixels, mpp, side, **changes))


# A mark as of old, for which a slide is left to OpenSlide.
UNUSUAL = {"t255": [1]}


def tiled_page(
    pixels: np.ndarray, mpp: float | tuple[float, float] | None, side: int = 64, **changes: object
) -> tuple[Tags, list[bytes]]:
    """One level of a slide; the ones after the first need `t254=[1]`."""
    across, down = mpp if isinstance(mpp, tuple) else (mpp or 1, mpp or 1)
    rows, columns = (-(-size // side) for size in pixels.shape[:2])
    padded = np.full((rows * side, columns * side, 3), 255, np.uint8)
    padded[: pixels.shape[0], : pixels.shape[1]] = pixels
    tiles = padded.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(rows * columns, -1)
    tags, _ = tiff_page(pixels, **changes)
    del tags[278]
    # 296 says pixels per cm.
    tags |= {282: (5, [round(1e7 / across), 1_000]), 296: (3, [3 if mpp else 1])}
    tags |= {283: (5, [round(1e7 / down), 1_000]), 322: (4, [side]), 323: (4, [side])}
    return tags, [tile.tobytes() for tile in tiles]
