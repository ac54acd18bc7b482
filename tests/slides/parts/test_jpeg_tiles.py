"""Whatever the file, the pixels are those of OpenSlide, to the bit."""

import numpy as np
import pytest

from bcd.imaging import image
from bcd.slides import slide
from bcd.slides.parts import jpeg_tiles, tiff_reader
from tests import pictures
from tests.slides.parts.pyramids import RGB, SIDE, YCBCR, aperio, jpeg, page, write
from tests.slides.test_slide import QUARTER, flattened

SAMPLES = [
    ("slides/CMU-1-Small-Region.svs", True),
    ("slides/tiny.svs", True),
    ("cases/slides/yellowed_glass.tif", True),
    ("cases/slides/x0.5_y0.25.tif", True),
    ("slides/boxes.tiff", True),
    ("cases/slides/bounds.scn", False),
]


def rectangles(width: int, height: int, n: int = 12):
    """Inside, across every edge, of one pixel, and all."""
    rng = np.random.default_rng(5)
    yield from [(0, 0, width, height), (-7, -5, width + 20, height + 9), (width - 1, height - 1, 1, 1)]
    yield from [(width + 1, 0, 5, 5), (-20, -20, 10, 10)]
    for _ in range(n):
        x, y = (int(rng.integers(-20, side)) for side in (width, height))
        yield (x, y, int(rng.integers(1, 300)), int(rng.integers(1, 300)))


def require_equal(path, opened):
    for level, downsample in enumerate(opened.downsamples):
        size = opened.reader.facts.sizes[level]
        # Between two pixels OpenSlide interpolates.
        for x, y, width, height in rectangles(*size) if downsample.is_integer() else [(0, 0, *size)]:
            place = round(x * downsample), round(y * downsample)
            found = opened.read(*place, level, width, height)
            np.testing.assert_array_equal(found, flattened(path, place, level, (width, height)))


@pytest.mark.real
@pytest.mark.parametrize(("name", "fast"), SAMPLES)
def test_real_slides_have_openslides_pixels(real_data, name, fast):
    path = real_data / name
    with slide.open_slide(path, QUARTER) as opened:
        assert isinstance(opened.reader, tiff_reader.TiffReader) == fast
        require_equal(path, opened)


@pytest.mark.parametrize("meaning", [RGB, YCBCR])
@pytest.mark.parametrize("markers", [False, True])
def test_a_pyramid_of_any_colours_has_openslides_pixels(tmp_path, meaning, markers):
    """JFIF's and Adobe's markers in a stream change nothing: the tags say what its samples are."""
    pixels = pictures.stained(200, 312)
    levels = [page(pixels, meaning, markers), page(pixels[::2, ::2].copy(), meaning, markers, t254=[1])]
    path = write(tmp_path / "s.tif", *levels)
    with slide.open_slide(path) as opened:
        assert isinstance(opened.reader, tiff_reader.TiffReader)
        assert opened.downsamples == (1.0, 2.0)
        require_equal(path, opened)
    # OpenSlide 4.0.1 opens none of these.
    with slide.open_slide(write(tmp_path / "big_endian.tif", *levels, order=">")) as opened:
        require_equal(path, opened)


def test_an_aperio_pyramid_has_openslides_pixels(tmp_path):
    path = write(tmp_path / "s.svs", *aperio(400, 288, (200, 144), (100, 72)))
    with slide.open_slide(path) as opened:
        assert (opened.downsamples, isinstance(opened.reader, tiff_reader.TiffReader)) == (
            (1.0, 2.0, 4.0),
            True,
        )
        require_equal(path, opened)


def test_streams_may_be_whole_lack_an_end_or_be_padded(tmp_path):
    """As writers store them, in place of streams without tables. OpenSlide reads none without an end."""
    tags, tiles = page(pictures.stained(SIDE, 4 * SIDE))
    good = write(tmp_path / "good.tif", (tags, tiles))
    tables = tags[347][1]
    tags = {tag: value for tag, value in tags.items() if tag != 347}
    first, *others = (tables[:-2] + tile[2:] for tile in tiles)
    end = b"\xff\xd9"
    others = [others[0].removesuffix(end), others[1] + bytes(5), others[2].removesuffix(end) + bytes(3) + end]
    path = write(tmp_path / "s.tif", (tags, [first, *others]))
    with slide.open_slide(path) as opened:
        assert isinstance(opened.reader, tiff_reader.TiffReader)
        require_equal(good, opened)


def test_a_stream_has_so_many_scans_at_most(tmp_path, monkeypatch):
    """Of 50 kB, thousands of scans would keep libjpeg busy for minutes, and here nothing ends it."""
    pixels = pictures.stained(SIDE, 2 * SIDE)
    tags, tiles = page(pixels)
    progressive = pictures.encode(pixels[:, SIDE:], "JPEG", progressive=True)
    path = write(tmp_path / "s.tif", (tags, [tiles[0], progressive]))
    with slide.open_slide(path) as opened:
        require_equal(path, opened)
    monkeypatch.setattr(jpeg_tiles, "MOST_SCANS", 5)
    with slide.open_slide(path) as opened:
        assert opened.read(0, 0, 0, SIDE, SIDE).shape == (SIDE, SIDE, 3)
        with pytest.raises(image.ImageError, match="a JPEG of 10 scans; at most 5 are read"):
            opened.read(0, 0, 0, SIDE + 1, SIDE)


def damaged(tiles: list[bytes], kind: str) -> list[bytes]:
    other = pictures.stained(2 * SIDE, SIDE)
    new = {
        "cut": tiles[1][: len(tiles[1]) // 2],
        "zeros": tiles[1][:-200] + bytes(200),
        "of another size": jpeg(other)[1],
        "no JPEG": b"\x89PNG" + tiles[1],
        "long": tiles[1] + bytes(6 * SIDE**2 + 2**16),
    }[kind]
    return [tiles[0], new, *tiles[2:]]


@pytest.mark.parametrize("kind", ["cut", "zeros", "of another size", "no JPEG", "long"])
def test_a_damaged_tile_costs_what_it_covers(tmp_path, kind):
    """OpenSlide reads the one with zeros, too, and what is decoded from them."""
    pixels = np.random.default_rng(1).integers(0, 256, (2 * SIDE, 3 * SIDE, 3), np.uint8)
    tags, tiles = page(pixels)
    path = write(tmp_path / "s.tif", (tags, damaged(tiles, kind)))
    with slide.open_slide(path) as opened:
        for _ in range(2):
            with pytest.raises(image.ImageError, match="a damaged tile") as caught:
                opened.read(0, 0, 0, SIDE + 1, SIDE)
            assert caught.value.code == "unreadable"
            found = opened.read(0, 0, 0, SIDE, SIDE)
    np.testing.assert_array_equal(found, flattened(path, (0, 0), 0, (SIDE, SIDE)))


def test_a_tile_outside_the_file_costs_what_it_covers(tmp_path):
    """As where the end of a slide is missing and its tags are at the start."""
    tags, tiles = page(pictures.stained(SIDE, 2 * SIDE))
    content = bytearray(pictures.tiff((tags, tiles)))
    places = np.array([8, 8 + len(tiles[0])], "<u4").tobytes()
    at = content.index(places)
    content[at + 4 : at + 8] = (len(content) - 100).to_bytes(4, "little")
    (tmp_path / "s.tif").write_bytes(content)
    with slide.open_slide(tmp_path / "s.tif") as opened:
        assert opened.read(0, 0, 0, SIDE, SIDE).shape == (SIDE, SIDE, 3)
        with pytest.raises(image.ImageError, match=r"a damaged tile: [\d,]+ bytes at [\d,]+ of a file"):
            opened.read(0, 0, 0, SIDE + 1, SIDE)


def test_missing_tiles_are_left_to_openslide(tmp_path):
    """Which knows what Aperio means by them."""
    tags, tiles = page(pictures.stained(SIDE, 2 * SIDE))
    path = write(tmp_path / "s.tif", (tags, [tiles[0], b""]))
    assert tiff_reader.open_reader(str(path)) is None
