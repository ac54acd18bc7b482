"""What the tags state is what OpenSlide states of the same file, or the file is left to it."""

import io
import struct

import numpy as np
import openslide
import pytest
from PIL import ImageCms

from bcd.errors import ImageError
from bcd.imaging import tiff
from bcd.slides import slide
from bcd.slides.parts import pyramid
from bcd.slides.readers.interface import MPP_X, MPP_Y
from tests import pictures, slide_files
from tests.imaging.test_image import SWAPPED
from tests.slides.parts.pyramids import SIDE, aperio, page, write

NAMES = (pyramid.LAYOUT, pyramid.DESCRIPTION, MPP_X, MPP_Y)
REAL = ["slides/CMU-1-Small-Region.svs", "slides/tiny.svs"]
REAL += ["cases/slides/yellowed_glass.tif", "cases/slides/x0.5_y0.25.tif", "slides/boxes.tiff"]


def read(path):
    content = path.read_bytes()
    return pyramid.read_pyramid(io.BytesIO(content), len(content))


def require_openslides(path):
    """Compare every fact with OpenSlide's, and return ours."""
    found = read(path)
    with openslide.OpenSlide(path) as handle:
        sizes = [(level.width_px, level.height_px) for level in found.levels]
        assert (tuple(sizes), found.downsamples) == (handle.level_dimensions, handle.level_downsamples)
        theirs = {name: handle.properties[name] for name in NAMES if name in handle.properties}
        profile = handle.color_profile
    for name in (MPP_X, MPP_Y):
        assert float(found.properties.get(name, "nan")) == pytest.approx(
            float(theirs.pop(name, "nan")), rel=1e-15, nan_ok=True
        )
    assert {name: value for name, value in found.properties.items() if name in theirs} == theirs
    assert (found.profile is None) == (profile is None)
    return found


@pytest.mark.real
@pytest.mark.parametrize("name", REAL)
def test_real_slides_state_what_openslide_says(real_data, name):
    require_openslides(real_data / name)


@pytest.mark.real
def test_a_real_slide_of_another_layout_is_left_to_openslide(real_data):
    assert read(real_data / "cases/slides/bounds.scn") is None


def test_an_aperio_pyramid_has_the_levels_and_the_scale_of_openslide(tmp_path):
    """Neither thumbnail nor label nor macro image is a level; 401 px become 100."""
    path = write(tmp_path / "s.svs", *aperio(401, 303, (100, 75), (25, 18), mpp="0.2527"))
    found = require_openslides(path)
    assert found.downsamples == (1.0, (401 / 100 + 303 / 75) / 2, (401 / 25 + 303 / 18) / 2)
    assert [found.properties[name] for name in (pyramid.LAYOUT, MPP_X)] == ["aperio", "0.2527"]


@pytest.mark.parametrize("mpp", ["0,25", "no number", "", "1e-1", "0.25|MPP = 0.5"])
def test_a_scale_of_aperio_is_read_as_openslide_reads_it(tmp_path, mpp):
    require_openslides(write(tmp_path / "s.svs", *aperio(SIDE, SIDE, mpp=mpp)))


@pytest.mark.parametrize(
    ("unit", "x", "y"),
    [
        (2, (50_800, 1), (25_400, 1)),
        (3, (20_000, 1), (1e7, 300)),
        (3, (28_346_457, 1_000_000), (20_000, 1)),
        (1, (20_000, 1), (20_000, 1)),
        (None, (50_800, 1), (50_800, 1)),
        (3, (0, 1), (20_000, 1)),
        (3, (20_000, 0), (20_000, 1)),
    ],
)
def test_a_resolution_is_read_as_openslide_reads_it(tmp_path, unit, x, y):
    tags, tiles = page(pictures.stained(SIDE, SIDE))
    del tags[296]
    tags |= {282: (5, [int(n) for n in x]), 283: (5, [int(n) for n in y])}
    tags |= {296: (3, [unit])} if unit else {}
    require_openslides(write(tmp_path / "s.tif", (tags, tiles)))


def test_a_resolution_of_one_axis_is_none(tmp_path):
    tags, tiles = page(pictures.stained(SIDE, SIDE))
    del tags[283]
    found = require_openslides(write(tmp_path / "s.tif", (tags, tiles)))
    assert found.properties == {pyramid.LAYOUT: "generic-tiff"}


def test_a_resolution_of_another_type_is_left_to_openslide(tmp_path):
    tags, tiles = page(pictures.stained(SIDE, SIDE))
    with pytest.raises(ImageError, match="is not a fraction"):
        read(write(tmp_path / "s.tif", (tags | {282: (4, [20_000])}, tiles)))


def test_levels_are_the_first_page_and_the_smaller_copies_in_tiles(tmp_path):
    """In any order; focus planes and strips are none."""
    whole, half, quarter = (pictures.stained(256 // n, 320 // n) for n in (1, 2, 4))
    pages = [page(whole), page(quarter, t254=[1]), page(whole), page(half, t254=[1])]
    pages.append(pictures.tiff_page(half, t254=[1]))
    found = require_openslides(write(tmp_path / "s.tif", *pages))
    assert found.downsamples == (1.0, 2.0, 4.0)


def ome(nested, big=False, changes=()):
    """Three levels of OME-TIFF, below its first page or after it."""
    pixels = pictures.stained(256, 512)
    planes = [slide_files.page(pixels[:: 2**n, :: 2**n].copy(), slide_files.DEFLATE) for n in range(3)]
    pages = [(tags | {254: (3, [int(n > 0)])}, tiles) for n, (tags, tiles) in enumerate(planes)]
    pages[0][0][270] = (2, slide_files.ome(pixels))
    pages[2][0].update(changes)
    return slide_files.tiff(pages, big=big, nested=nested)


@pytest.mark.parametrize("big", [False, True])
def test_pages_below_the_first_are_levels(tmp_path, big):
    """OpenSlide does not see them, and gives the same where they are after it."""
    paths = [tmp_path / "nested.tif", tmp_path / "chain.tif"]
    for path, nested in zip(paths, (True, False), strict=True):
        path.write_bytes(ome(nested, big))
    require_openslides(paths[1])
    ours, theirs = map(read, paths)
    assert (ours.downsamples, ours.properties) == ((1.0, 2.0, 4.0), theirs.properties)
    with openslide.OpenSlide(paths[0]) as handle:
        assert handle.level_count == 1
    with slide.open_slide(paths[0]) as nested, slide.open_slide(paths[1]) as chain:
        for level in range(3):
            size = nested.reader.facts.sizes[level]
            found = [opened.read(0, 0, level, *size) for opened in (nested, chain)]
            np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    "changes", [{259: (3, [32_773])}, {254: (3, [4])}, {256: (4, [256])}, {277: (3, [4])}]
)
def test_pages_below_that_are_no_such_levels_leave_all_to_openslide(tmp_path, changes):
    """Another compression, a mask, the size of another level, an irregular page."""
    content = ome(nested=True, changes=changes)
    assert pyramid.read_pyramid(io.BytesIO(content), len(content)) is None


def test_pages_below_are_few_and_within_the_file(monkeypatch):
    content = bytearray(ome(nested=True))
    (first,) = tiff.iterate_pages(io.BytesIO(content), len(content))
    assert len(tiff.pages_below(io.BytesIO(content), first, len(content))) == 2
    places = tiff.values(io.BytesIO(content), first, tiff.SUB_PAGES).astype("<u4").tobytes()
    at = content.index(places)
    for wrong in (places[:4] * 2, places[:4] + b"\xff\xff\xff\x7f"):
        content[at : at + 8] = wrong
        with pytest.raises((ImageError, struct.error)):
            tiff.pages_below(io.BytesIO(content), first, len(content))
    monkeypatch.setattr(tiff, "MAX_PAGES", 1)
    content[at : at + 8] = places
    with pytest.raises(ImageError, match="claims 2 pages below it"):
        tiff.pages_below(io.BytesIO(content), first, len(content))


def test_a_profile_and_an_ome_text_are_kept(tmp_path):
    text = '<OME xmlns="x"><Image><Pixels SizeX="64" SizeY="64" PhysicalSizeX="0.5"/></Image></OME>'
    tags, tiles = page(pictures.stained(SIDE, SIDE), t270=text.encode() + b"\0")
    found = require_openslides(write(tmp_path / "s.tif", (tags | {34675: (1, SWAPPED)}, tiles)))
    assert (found.profile, found.properties[pyramid.DESCRIPTION]) == (SWAPPED, text)
    assert ImageCms.ImageCmsProfile(io.BytesIO(found.profile))


def other(kind):
    """Pages of a layout that is left to OpenSlide."""
    pixels, small = pictures.stained(128, 192), pictures.stained(64, 96)
    first = page(pixels)
    return {
        "strips": [pictures.tiff_page(pixels)],
        "PackBits": [pictures.tiled_page(pixels, 0.5, t259=[32_773])],
        "a level in PackBits": [first, pictures.tiled_page(small, 1, t254=[1], t259=[32_773])],
        "JPEG 2000, but not of Aperio": [page(pixels, t259=[33003])],
        "grey": [page(pixels, t277=[1], t258=[8])],
        "planes": [page(pixels, t284=[2])],
        "Ventana": [page(pixels, t700=b"<iScan/>")],
        "Philips": [page(pixels, t305=b"Philips DP v1.0\0")],
        "Trestle": [page(pixels, t305=b"MedScan 1\0")],
        "Leica": [page(pixels, t270=b'<?xml version="1.0"?><scn xmlns="x"></scn>\0')],
        "Hamamatsu": [page(pixels, t65421=[1])],
        "Argos": [page(pixels, t65000=b"<Argos.Scan.Metadata/>")],
        "Huron": [page(pixels, t271=b"Huron Technologies\0")],
        "a stack": [page(pixels, t32997=[2])],
        "a mask": [first, page(small, t254=[5])],
        "an old mark": [first, page(small, t255=[2])],
        "two of one size": [first, page(small, t254=[1]), page(small, t254=[1])],
        "the first is smaller": [page(small), page(pixels, t254=[1])],
        "another number of tiles": [page(pixels, t256=[999])],
        "enormous tiles": [(first[0] | {322: (4, [60_000]), 323: (4, [60_000])}, first[1])],
        "no tiles": [(first[0] | {322: (4, [0])}, first[1])],
    }[kind]


KINDS = """strips; PackBits; a level in PackBits; JPEG 2000, but not of Aperio; grey; planes; Ventana;
Philips; Trestle; Leica; Hamamatsu; Argos; Huron; a stack; a mask; an old mark; two of one size;
the first is smaller; another number of tiles; enormous tiles; no tiles"""


@pytest.mark.parametrize("kind", KINDS.replace("\n", " ").split("; "))
def test_other_layouts_are_left_to_openslide(tmp_path, kind):
    assert read(write(tmp_path / "s.tif", *other(kind))) is None


@pytest.mark.parametrize("change", [{254: (3, [1, 1])}, {258: (3, [8, 8])}, {256: (4, [0])}, {277: (3, [2])}])
def test_an_irregular_page_beside_the_levels_is_left_to_openslide(tmp_path, change):
    """Which reads no page after some of them, so that levels are missing."""
    first, thumbnail, *others = aperio(256, 192, (64, 48))
    pages = [first, (thumbnail[0] | change, thumbnail[1]), *others]
    assert read(write(tmp_path / "s.svs", *pages)) is None


def test_smaller_levels_of_aperio_are_in_order(tmp_path):
    pages = aperio(256, 192, (64, 48), (128, 96))
    assert read(write(tmp_path / "s.svs", *pages)) is None
    with pytest.raises(openslide.OpenSlideError):
        openslide.OpenSlide(tmp_path / "s.svs")


@pytest.mark.parametrize("kind", ["cut", "text", "profile", "tables", "no TIFF"])
def test_what_is_damaged_is_left_to_openslide(tmp_path, kind):
    tags, tiles = page(pictures.stained(SIDE, SIDE), t270=b"caf\xe9\0" if kind == "text" else b"text\0")
    tags |= {34675: (1, b"no profile at all")} if kind == "profile" else {}
    tags |= {347: (1, b"no tables")} if kind == "tables" else {}
    content = pictures.tiff((tags, tiles))
    content = {"cut": content[:-300], "no TIFF": b"\x89PNG" + content[4:]}.get(kind, content)
    if kind in ("tables", "no TIFF"):
        assert pyramid.read_pyramid(io.BytesIO(content), len(content)) is None
        return
    with pytest.raises((ImageError, UnicodeDecodeError)):
        pyramid.read_pyramid(io.BytesIO(content), len(content))


def test_a_fraction_is_two_numbers():
    tags, tiles = page(pictures.stained(SIDE, SIDE))
    content = io.BytesIO(pictures.tiff((tags, tiles)))
    (found,) = tiff.pages(content, len(content.getvalue()))
    assert tiff.values(content, found, tiff.X_RESOLUTION).tolist() == [20_000_000, 1_000]
    assert tiff.values(content, found, tiff.PROFILE).tolist() == []
    assert np.array_equal(tiff.values(content, found, tiff.TILE_BYTES), [len(tiles[0])])
