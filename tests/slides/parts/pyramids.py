"""Made slides in JPEG tiles: plain TIFF and as of Aperio."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from tests import pictures

SIDE = 64
RGB, YCBCR = 2, 6
APERIO = "Aperio Image Library v12.2.2\r\n{}x{} (64x64) JPEG/RGB Q=70|AppMag = 40|MPP = {}|Time = 09:59:15"
Page = tuple[pictures.Tags, list[bytes]]


def segments(stream: bytes) -> list[tuple[bytes, bytes]]:
    """Marker and whole segment of a JPEG's header; the last one is the scan."""
    found, at = [], 2
    while stream[at : at + 2] != b"\xff\xda":
        size = 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        found.append((stream[at : at + 2], stream[at : at + size]))
        at += size
    return [*found, (b"\xff\xda", stream[at:])]


def jpeg(pixels: np.ndarray, meaning: int = YCBCR, markers: bool = False) -> tuple[bytes, bytes]:
    """The tables of a tile, and its stream without them; with or without JFIF's or Adobe's marker."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90, keep_rgb=meaning == RGB)
    tables, rest = b"", b""
    for marker, content in segments(out.getvalue()):
        if marker in (b"\xff\xdb", b"\xff\xc4"):
            tables += content
        elif markers or marker not in (b"\xff\xe0", b"\xff\xee"):
            rest += content
    return b"\xff\xd8" + tables + b"\xff\xd9", b"\xff\xd8" + rest


def page(
    pixels: np.ndarray, meaning: int = YCBCR, markers: bool = False, side: int = SIDE, **changes: object
) -> Page:
    """A level in JPEG tiles, at 0.5 µm/px."""
    tags, tiles = pictures.tiled_page(pixels, 0.5, side, **{"t259": [7], "t262": [meaning], **changes})
    both = [jpeg(np.frombuffer(tile, np.uint8).reshape(side, side, 3), meaning, markers) for tile in tiles]
    return tags | {347: (1, both[0][0])}, [stream for _, stream in both]


def write(path: Path, *pages: Page, order: str = "<") -> Path:
    """The file with these pages."""
    path.write_bytes(pictures.tiff(*pages, order=order))
    return path


def tissue(height: int, width: int) -> np.ndarray:
    """Stained tissue with grain, which compresses as badly as that of scanners."""
    grain = np.random.default_rng(3).normal(0, 12, (height, width, 1))
    return np.clip(pictures.stained(height, width) + grain, 1, 254).astype(np.uint8)


def aperio(
    width: int, height: int, *smaller: tuple[int, int], mpp: str = "0.25", side: int = SIDE
) -> list[Page]:
    """Pages of an SVS: the first level, a thumbnail in strips, smaller levels, label and macro image."""
    whole = Image.fromarray(tissue(height, width))
    text = APERIO.format(width, height, mpp).encode() + b"\0"
    levels = [page(np.asarray(whole), RGB, side=side, t270=text)]
    # The nearest pixels keep the grain, and so the bytes that a pixel has.
    small = [np.asarray(whole.resize(size, Image.Resampling.NEAREST)) for size in smaller]
    levels += [page(pixels, RGB, side=side, t270=text) for pixels in small]
    thumbnail, label, macro = (pictures.gradient(40 + i, 60) for i in range(3))
    others = [
        pictures.tiff_page(thumbnail, t270=b"Aperio thumbnail\0"),
        pictures.tiff_page(label, t254=[1], t270=b"Aperio label 60x41\0"),
        pictures.tiff_page(macro, t254=[9], t270=b"Aperio macro 60x42\0"),
    ]
    return [levels[0], others[0], *levels[1:], *others[1:]]
