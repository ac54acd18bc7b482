"""Whatever the file, the pixels are those of OpenSlide, to the bit."""

import io
import struct
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from bcd.imaging import image
from bcd.slides import slide
from tests import pictures
from tests.slides.test_slide import QUARTER, flattened

SIDE = 64
RGB, YCBCR = 2, 6
SAMPLES = [
    ("slides/CMU-1-Small-Region.svs", True),
    ("slides/tiny.svs", True),
    ("cases/slides/yellowed_glass.tif", True),
    ("cases/slides/x0.5_y0.25.tif", True),
    ("slides/boxes.tiff", False),
    ("cases/slides/bounds.scn", False),
]


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


def page(pixels: np.ndarray, meaning: int = YCBCR, markers: bool = False, **changes):
    tags, tiles = pictures.tiled_page(pixels, 0.5, SIDE, **{"t259": [7], "t262": [meaning], **changes})
    both = [jpeg(np.frombuffer(tile, np.uint8).reshape(SIDE, SIDE, 3), meaning, markers) for tile in tiles]
    return tags | {347: (1, both[0][0])}, [stream for _, stream in both]


def write(path: Path, *pages) -> Path:
    path.write_bytes(pictures.tiff(*pages))
    return path


def rectangles(width: int, height: int, n: int = 12):
    """Inside, across every edge, of one pixel, and all."""
    rng = np.random.default_rng(5)
    yield from [(0, 0, width, height), (-7, -5, width + 20, height + 9), (width - 1, height - 1, 1, 1)]
    for _ in range(n):
        x, y = (int(rng.integers(-20, side)) for side in (width, height))
        yield (x, y, int(rng.integers(1, 300)), int(rng.integers(1, 300)))


def require_equal(path: Path, opened: slide.Slide) -> None:
    for level, downsample in enumerate(opened.downsamples):
        size = round(opened.width_px / downsample), round(opened.height_px / downsample)
        for x, y, width, height in rectangles(*size):
            place = round(x * downsample), round(y * downsample)
            found = opened.read(*place, level, width, height)
            np.testing.assert_array_equal(found, flattened(path, place, level, (width, height)))


@pytest.mark.parametrize(("name", "fast"), SAMPLES)
def test_real_slides_have_openslides_pixels(real_data, name, fast):
    path = real_data / name
    with slide.open_slide(path, QUARTER) as opened:
        assert bool(opened.tiles) == fast
        require_equal(path, opened)


@pytest.mark.parametrize("meaning", [RGB, YCBCR])
@pytest.mark.parametrize("markers", [False, True])
def test_a_pyramid_of_any_colours_has_openslides_pixels(tmp_path, meaning, markers):
    pixels = pictures.stained(200, 312)
    levels = [page(pixels, meaning, markers), page(pixels[::2, ::2].copy(), meaning, markers, t254=[1])]
    path = write(tmp_path / "s.tif", *levels)
    with slide.open_slide(path) as opened:
        assert opened.downsamples == (1.0, 2.0)
        # Markers that say what the tags say, or cannot be overruled.
        assert (opened.tiles.read(3, 5, 1, 90, 80) is None) == (markers and meaning == RGB)
        require_equal(path, opened)
        # Between two pixels of a level OpenSlide interpolates.
        found = opened.read(31, 20, 1, 50, 40)
    np.testing.assert_array_equal(found, flattened(path, (31, 20), 1, (50, 40)))


def damaged(tiles: list[bytes], kind: str) -> list[bytes]:
    other = pictures.stained(2 * SIDE, SIDE)
    new = {
        "missing": b"",
        "cut": tiles[1][: len(tiles[1]) // 2],
        "zeros": tiles[1][:-200] + bytes(200),
        "of another size": jpeg(other)[1],
        "no JPEG": b"\x89PNG" + tiles[1],
    }[kind]
    return [tiles[0], new, *tiles[2:]]


@pytest.mark.parametrize("kind", ["missing", "cut", "zeros", "of another size", "no JPEG"])
def test_a_damaged_tile_is_left_to_openslide(tmp_path, kind):
    pixels = np.random.default_rng(1).integers(0, 256, (2 * SIDE, 3 * SIDE, 3), np.uint8)
    tags, tiles = page(pixels)
    path = write(tmp_path / "s.tif", (tags, damaged(tiles, kind)))
    with slide.open_slide(path) as opened:
        assert opened.tiles.read(0, 0, 0, SIDE + 1, SIDE) is None
        assert opened.tiles.read(0, 0, 0, SIDE, SIDE) is not None
        try:
            expected = flattened(path, (0, 0), 0, (2 * SIDE, SIDE))
        except openslide.OpenSlideError:
            with pytest.raises(image.ImageError, match="cannot be read"):
                opened.read(0, 0, 0, 2 * SIDE, SIDE)
        else:
            np.testing.assert_array_equal(opened.read(0, 0, 0, 2 * SIDE, SIDE), expected)


def test_a_tile_of_several_scans_is_left_to_openslide(tmp_path):
    """Of 50 kB, thousands of scans would keep libjpeg busy for minutes, and here nothing ends it."""
    pixels, out = pictures.stained(SIDE, 2 * SIDE), io.BytesIO()
    Image.fromarray(pixels[:, SIDE:]).save(out, "JPEG", progressive=True)
    tags, tiles = page(pixels)
    path = write(tmp_path / "s.tif", (tags, [tiles[0], out.getvalue()]))
    with slide.open_slide(path) as opened:
        assert opened.tiles.read(0, 0, 0, SIDE, SIDE) is not None
        assert opened.tiles.read(SIDE, 0, 0, SIDE, SIDE) is None
        require_equal(path, opened)


@pytest.mark.parametrize("tag", [324, 347], ids=["places", "tables"])
def test_damaged_tags_are_left_to_openslide(tmp_path, tag):
    path = write(tmp_path / "s.tif", page(pictures.stained(2 * SIDE, 3 * SIDE)))
    content = bytearray(path.read_bytes())
    entry = content.rindex(struct.pack("<HH", tag, 4 if tag == 324 else 1))
    struct.pack_into("<I", content, entry + 8, len(content) - 2)
    path.write_bytes(content)
    assert slide.jpeg_tiles.open_tiles(path, [(3 * SIDE, 2 * SIDE)]) is None


def test_neighbours_are_decoded_once_and_memory_is_bounded(tmp_path, monkeypatch):
    decoded = []
    once = slide.jpeg_tiles.simplejpeg.decode_jpeg
    monkeypatch.setattr(
        slide.jpeg_tiles.simplejpeg, "decode_jpeg", lambda *given: decoded.append(1) or once(*given)
    )
    monkeypatch.setattr(slide.jpeg_tiles, "CACHE_BYTES", 6 * SIDE * SIDE * 3)
    path = write(tmp_path / "s.tif", page(pictures.stained(4 * SIDE, 4 * SIDE)))
    with slide.open_slide(path) as opened:
        for x in range(0, 2 * SIDE, 16):
            opened.read(x, 0, 0, SIDE, 2 * SIDE)
        assert len(decoded) == 6
        opened.read(0, 0, 0, 4 * SIDE, 4 * SIDE)
        assert opened.tiles.decoded.cache_info().currsize == 6
