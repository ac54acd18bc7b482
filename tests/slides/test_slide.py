import struct

import numpy as np
import openslide
import pytest
from PIL import Image

from bcd.imaging import image
from bcd.slides import pixel_size, slide, tissue
from bcd.slides.readers.interface import Facts
from tests import pictures, slide_files
from tests.imaging.test_image import SWAPPED

NAME = "CMU-1-Small-Region.svs"
QUARTER = pixel_size.Given(fallback=0.25)


@pytest.fixture
def slides(real_data):
    return real_data / "slides"


def flattened(path, place, level, size):
    """What OpenSlide itself gives, over white."""
    with openslide.OpenSlide(path) as handle:
        region = handle.read_region(place, level, size)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", size, "white"), region).convert("RGB"))


def code_of(open_or_read):
    with pytest.raises(image.ImageError) as caught:
        open_or_read()
    return caught.value.code


class White:
    """A reader without a file: white, with a record of the sizes that were read."""

    facts = Facts(((1, 1),), (1.0,), {}, None, "white")

    def __init__(self):
        self.sizes = []

    def read(self, x_level0_px, y_level0_px, level, width_px, height_px):
        self.sizes.append((width_px, height_px))
        return np.full((height_px, width_px, 3), 255, np.uint8)

    def close(self):
        pass


def fake(width_px, height_px, mpp=(0.25, 0.25), downsamples=(1.0,)):
    """A white slide, and the sizes that were read."""
    reader = White()
    return slide.Slide(reader, width_px, height_px, *mpp, downsamples), reader.sizes


def one_tile(resolution_unit, x_resolution, y_resolution, side=16):
    """A TIFF of one black tile with its resolution, byte by byte: Pillow writes strips only."""
    pixels = bytes(side * side * 3)
    entries = [(256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 1), (262, 3, 2), (277, 3, 3)]
    entries += [(296, 3, resolution_unit), (322, 4, side), (323, 4, side), (324, 4, 8), (325, 4, len(pixels))]
    start = 8 + len(pixels)
    fractions = start + 2 + 12 * (len(entries) + 2) + 4
    entries += [(282, 5, fractions), (283, 5, fractions + 8)]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in sorted(entries))
    header = struct.pack("<2sHI", b"II", 42, start) + pixels + struct.pack("<H", len(entries))
    return header + directory + struct.pack("<IIIII", 0, x_resolution, 1, y_resolution, 1)


def test_a_slide_has_its_size_and_scale(slides):
    with slide.open_slide(slides / NAME) as opened:
        assert (opened.width_px, opened.height_px) == (2220, 2967)
        assert (opened.mpp_x, opened.mpp_y) == (0.499, 0.499)
        assert (opened.bounds_x_px, opened.bounds_y_px) == (0, 0)
        assert opened.downsamples == (1.0,)
    with slide.open_slide(slides / "tiny.svs") as opened:
        assert (opened.width_px, opened.height_px, opened.mpp_x) == (16, 16, 0.499)
        assert opened.thumbnail()[0].shape == (16, 16, 3)


def test_a_tile_is_what_openslide_reads(slides):
    with slide.open_slide(slides / NAME) as opened:
        pixels = opened.read(687, 903, 0, 687, 452)
    np.testing.assert_array_equal(pixels, flattened(slides / NAME, (687, 903), 0, (687, 452)))
    assert pixels.std() > 30


def test_beyond_the_slide_it_is_white(slides):
    with slide.open_slide(slides / NAME) as opened:
        pixels = opened.read(np.int64(2062), np.int64(2710), 0, 687, 452)
        inside = opened.read(2062, 2710, 0, 158, 257)
    np.testing.assert_array_equal(pixels[:257, :158], inside)
    assert (pixels[257:] == 255).all()
    assert (pixels[:, 158:] == 255).all()


def test_places_are_of_level_0_at_every_level(slides):
    with slide.open_slide(slides / "boxes.tiff", QUARTER) as opened:
        pixels = opened.read(40, 60, 1, 30, 20)
    np.testing.assert_array_equal(pixels, flattened(slides / "boxes.tiff", (40, 60), 1, (30, 20)))


def test_the_given_scale_is_used_only_where_the_slide_has_none(slides):
    with slide.open_slide(slides / NAME, QUARTER) as opened:
        assert opened.mpp_x == opened.mpp_y == 0.499
    # 72 dpi, which a program wrote that knew no scale: 353 µm a pixel would make the slide 10 cm wide
    assert code_of(lambda: slide.open_slide(slides / "boxes.tiff")) == "missing_mpp"
    with slide.open_slide(slides / "boxes.tiff", QUARTER) as opened:
        assert opened.mpp_x == opened.mpp_y == 0.25
        assert [round(d) for d in opened.downsamples] == [1, 2, 4, 8]


def test_a_tiled_tiff_brings_its_scale_on_each_axis(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(one_tile(3, 20_000, 25_000))  # pixels per cm
    with slide.open_slide(path) as opened:
        assert (opened.mpp_x, opened.mpp_y) == (0.5, 0.4)
        assert opened.level_for(0.41) == 0
        assert code_of(lambda: opened.level_for(0.39)) == "too_coarse"  # across it is coarser than down


@pytest.mark.parametrize(
    ("unit", "x_resolution", "mpp"), [(2, 50_800, 0.5), (3, 20_000, 0.5), (3, 200_000, 0.05)]
)
def test_a_resolution_is_of_inches_or_centimetres(tmp_path, unit, x_resolution, mpp):
    path = tmp_path / "a.tif"
    path.write_bytes(one_tile(unit, x_resolution, x_resolution))
    with slide.open_slide(path) as opened:
        assert (opened.mpp_x, opened.mpp_y) == (pytest.approx(mpp), pytest.approx(mpp))


def test_a_resolution_without_a_unit_is_no_scale(tmp_path):
    path = tmp_path / "a.tif"
    path.write_bytes(one_tile(1, 20_000, 20_000))
    assert code_of(lambda: slide.open_slide(path)) == "missing_mpp"


def test_an_ome_tiff_states_its_scale_in_its_description(tmp_path):
    path = tmp_path / "a.ome.tif"
    size = 'SizeX="70" SizeY="46" PhysicalSizeX="500" PhysicalSizeXUnit="nm" PhysicalSizeY="0.25"'
    space = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    ome = f'<OME xmlns="{space}"><Image><Pixels {size}/></Image></OME>'
    path.write_bytes(pictures.tiled_tiff(pictures.gradient(46, 70), None, t270=ome.encode() + b"\0"))
    with slide.open_slide(path) as opened:
        assert (opened.mpp_x, opened.mpp_y) == (0.5, 0.25)


@pytest.mark.parametrize(
    ("bounds", "corner"),
    [
        (("1000", "600", "1400", "920"), (1000, 600)),
        (("0", "0", "10", "10"), (0, 0)),
        (("1000", "600", None, None), (0, 0)),
        (("1000", "600", "wide", "920"), (0, 0)),
        ((None, None, None, None), (0, 0)),
    ],
)
def test_bounds_count_where_qupath_takes_them(bounds, corner):
    """QuPath asks for all four, as whole numbers."""
    names = (f"openslide.bounds-{side}" for side in ("x", "y", "width", "height"))
    properties = {name: value for name, value in zip(names, bounds, strict=True) if value is not None}
    assert slide._bounds(properties) == corner


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_cut_slide_is_unreadable_and_never_without_a_scale(slides, tmp_path, share):
    content = (slides / NAME).read_bytes()
    path = tmp_path / "half.svs"
    path.write_bytes(content[: int(share * len(content))])
    assert slide.is_slide(path)
    for given in (pixel_size.UNKNOWN, QUARTER):
        assert code_of(lambda given=given: slide.open_slide(path, given)) == "unreadable"


def test_what_is_no_slide_is_unreadable(tmp_path):
    (tmp_path / "text.svs").write_text("not a slide at all")
    assert code_of(lambda: slide.open_slide(tmp_path / "text.svs")) == "unreadable"
    assert code_of(lambda: slide.open_slide(tmp_path / "missing.svs")) == "unreadable"


def test_damage_inside_is_found_when_it_is_read(slides, tmp_path):
    content = bytearray((slides / NAME).read_bytes())
    content[200_000:600_000] = bytes(400_000)
    path = tmp_path / "damaged.svs"
    path.write_bytes(content)
    with slide.open_slide(path) as opened:
        assert code_of(lambda: opened.read(0, 0, 0, 2220, 2967)) == "unreadable"
        small, _ = opened.thumbnail()
    with slide.open_slide(slides / NAME) as opened:
        whole, _ = opened.thumbnail()
    # What is damaged is shown as tissue, so that its tiles are planned.
    unknown = (small == slide.UNKNOWN).all(-1)
    assert 0.05 < unknown.mean() < 0.6
    assert (small == whole)[~unknown].mean() > 0.99
    assert tissue.mask(small)[unknown].all()


class Damaged(White):
    """A reader of levels of which some are damaged, from a column on."""

    def __init__(self, bad_from, code="unreadable"):
        super().__init__()
        self.bad_from, self.code = bad_from, code

    def read(self, x_level0_px, y_level0_px, level, width_px, height_px):
        if x_level0_px + width_px * 4**level > self.bad_from[level]:
            raise image.ImageError(self.code, "why")
        return super().read(x_level0_px, y_level0_px, level, width_px, height_px)


def damaged(*bad_from, code="unreadable"):
    reader = Damaged(bad_from, code)
    return slide.Slide(reader, 8_192, 4_096, 0.25, 0.25, (1.0, 4.0)), reader


def test_a_damaged_place_of_a_thumbnail_has_the_colour_of_tissue():
    small, _ = damaged(9_000, 6_000)[0].thumbnail()
    unknown = (small == slide.UNKNOWN).all(-1)
    begin = unknown.any(0).argmax()
    assert unknown[:, begin:].all()
    assert 0 <= 6_000 / 4 - begin <= slide.LEAST_BLOCK_PX
    assert (small[:, :begin] == 255).all()


def test_of_a_level_that_is_damaged_the_finer_one_is_used():
    """A coarser one where level 0 is damaged, too."""
    for bad_from, max_side_px in (((9_000, 0), 2_048), ((0, 9_000), 4_096)):
        small, scale = damaged(*bad_from)[0].thumbnail(max_side_px)
        assert (small == 255).all()
        assert (small.shape[1], scale) == (max_side_px, max_side_px / 8_192)
    for code in ("unreadable", "too_slow"):
        assert code_of(damaged(0, 0, code=code)[0].thumbnail) == code


def test_failures_of_a_thumbnail_are_bounded(monkeypatch):
    monkeypatch.setattr(slide, "MOST_FAILURES", 7)
    assert code_of(damaged(0, 0)[0].thumbnail) == "unreadable"
    assert code_of(damaged(4_100, 4_100)[0].thumbnail) == "unreadable"


@pytest.mark.parametrize(
    ("mpp", "target_mpp", "level"),
    [
        (0.25, 0.25, 0),
        (0.25, 0.49, 0),
        (0.25, 0.5, 1),
        (0.2525, 0.5, 1),
        (0.25, 1.2, 2),
        (0.25, 9, 2),
        (0.6, 0.49, 0),
    ],
)
def test_the_level_is_the_smallest_that_holds_the_detail(mpp, target_mpp, level):
    assert fake(1000, 1000, (mpp, mpp), (1.0, 2.0, 4.0))[0].level_for(target_mpp) == level


def test_a_slide_that_would_have_to_be_enlarged_is_too_coarse(slides):
    with slide.open_slide(slides / NAME) as opened:
        assert opened.level_for(0.49) == opened.level_for(0.40) == 0
        assert code_of(lambda: opened.level_for(0.39)) == "too_coarse"


def test_a_thumbnail_is_the_whole_slide_reduced(slides):
    with slide.open_slide(slides / NAME) as opened:
        small, scale = opened.thumbnail(600)
        whole = opened.read(0, 0, 0, 2220, 2967)
    assert small.shape == (600, 449, 3)
    assert scale == 600 / 2967
    reduced = Image.fromarray(whole).resize((449, 600), Image.Resampling.BOX, (0, 0, 2220, 2967))
    assert np.abs(small - np.asarray(reduced, int)).mean() < 1
    assert np.corrcoef(small.ravel(), np.asarray(reduced).ravel())[0, 1] > 0.995


def test_blocks_meet_without_a_seam(slides, monkeypatch):
    with slide.open_slide(slides / NAME) as opened:
        whole, _ = opened.thumbnail(500)
        monkeypatch.setattr(slide, "BLOCK_PX", 250)
        apart = np.abs(opened.thumbnail(500)[0] - whole.astype(int))
    # a row of pixels just between two may go to either: no more than that, at the seams or elsewhere
    assert (apart > 1).mean() < 0.01
    assert apart.mean() < 0.1


def test_a_thumbnail_never_reads_a_large_slide_at_once():
    large, sizes = fake(15_000, 6_000)
    small, scale = large.thumbnail(1024)
    assert small.shape == (410, 1024, 3)
    assert (small == 255).all()
    assert scale == 1024 / 15_000
    assert max(side for size in sizes for side in size) <= slide.BLOCK_PX
    pyramid, sizes = fake(64_000, 32_000, downsamples=(1.0, 4.0, 16.0))
    pyramid.thumbnail(2000)
    assert sum(width * height for width, height in sizes) < 1.1 * 4000 * 2000


def test_a_small_slide_is_its_own_thumbnail(slides):
    with slide.open_slide(slides / "boxes.tiff", QUARTER) as opened:
        small, scale = opened.thumbnail()
    assert scale == 1
    np.testing.assert_array_equal(small, flattened(slides / "boxes.tiff", (0, 0), 0, (300, 250)))


def test_a_slide_is_known_by_name_and_a_tiff_by_content(slides, tmp_path):
    picture = tmp_path / "field.tif"
    picture.write_bytes(pictures.encode(pictures.gradient(), "TIFF"))
    assert not slide.is_slide(picture)
    assert not slide.is_slide(tmp_path / "field.png")
    assert slide.is_slide(slides / "boxes.tiff")
    assert slide.is_slide(tmp_path / "broken.NDPI")


@pytest.mark.parametrize(
    ("mpp", "given", "expected"),
    [
        (None, pixel_size.UNKNOWN, False),
        (352.8, pixel_size.UNKNOWN, False),
        (0.5, pixel_size.UNKNOWN, True),
        (0.003, pixel_size.UNKNOWN, True),  # a slide with a wrong scale
        ((0.5, 352.8), pixel_size.UNKNOWN, True),
        (None, pixel_size.Given(manifest=0.5), True),
        (None, pixel_size.Given(fallback=0.5), True),
        (None, pixel_size.Given(override=(0.5, 0.5)), True),
    ],
)
def test_a_tiled_tiff_is_a_slide_where_its_scale_is_stated(tmp_path, mpp, given, expected):
    path = tmp_path / "a.tif"
    path.write_bytes(pictures.tiled_tiff(pictures.gradient(), mpp))
    assert slide.is_slide(path, given) is expected


def test_a_smaller_copy_below_the_page_makes_a_slide(tmp_path):
    """Without a scale; whether it is found by the tags alone or not."""
    path, pages = tmp_path / "a.tif", slide_files.pyramid(pictures.stained(128, 256), slide_files.DEFLATE)
    for tags, _ in pages:
        tags.pop(296), tags.pop(282), tags.pop(283)
    for nested, n_pages in ((True, 2), (False, 2), (False, 1)):
        path.write_bytes(slide_files.tiff(pages[:n_pages], nested=nested))
        assert slide.is_slide(path) is slide.is_slide_by_tags(str(path)) is (n_pages == 2)


def test_a_mirax_slide_needs_its_folder():
    paths = ["a/b.mrxs", "a/b/Index.dat", "a/b/c/Data0.dat", "a/bb/Index.dat", "a/b.svs"]
    assert slide.companions(paths, "a/b.mrxs") == ["a/b/Index.dat", "a/b/c/Data0.dat"]
    assert slide.companions(paths, "a/bb.mrxs") == ["a/bb/Index.dat"]


def test_which_names_say_nothing():
    names = ["a", "d.x/IM0001", "1.2.840.113619", "a.", "a.7", "b.svs", "c.txt", "e.TIF", ".x.png"]
    assert [slide.is_unnamed(name) for name in names] == [True] * 5 + [False] * 4


def test_a_read_is_bounded_whatever_the_metadata_say():
    """At 0.003 µm/px a tile of the model would be 57,000 px wide."""
    opened, sizes = fake(100_000, 100_000, mpp=(0.003, 0.003))
    with pytest.raises(
        image.ImageError, match=r"57,000 x 38,000 px of the slide; at most 64,000,000"
    ) as caught:
        opened.read(0, 0, 0, 57_000, 38_000)
    assert caught.value.code == "too_many_pixels"
    assert sizes == []


def test_tiles_and_slides_that_cannot_be_are_refused(monkeypatch, tmp_path):
    path = tmp_path / "s.tif"
    path.write_bytes(pictures.tiled_tiff(pictures.gradient(), 0.5).replace(b"\x40\0\0\0", b"\0\0\x10\0"))
    assert code_of(lambda: slide.open_slide(path)) == "too_many_pixels"
    path.write_bytes(pictures.tiled_tiff(pictures.gradient(), 0.5))
    monkeypatch.setattr(slide, "MAX_SLIDE_PIXELS", 3_000)
    with pytest.raises(image.ImageError, match="a slide of 70 x 46 px is impossible"):
        slide.open_slide(path)


def test_a_slide_is_converted_from_its_profile(tmp_path):
    """Red and blue exchanged, as in the tests of `image`."""
    tags, tiles = pictures.tiff_page(pixels := pictures.gradient(64, 64), t322=[64], t323=[64])
    tags |= {282: (5, [20_000, 1]), 283: (5, [20_000, 1]), 296: (3, [3]), 34675: (1, SWAPPED)}
    path = tmp_path / "s.tif"
    path.write_bytes(pictures.tiff((tags, tiles)))
    with slide.open_slide(path) as opened:
        found = opened.read(0, 0, 0, 64, 64)
    assert np.abs(found[..., ::-1].astype(int) - pixels).max() <= 1


@pytest.mark.parametrize("tag", [325, 270], ids=["bytes of a tile", "length of a text"])
def test_claims_beyond_the_file_never_reach_openslide(tmp_path, tag):
    """GLib ends the process where it gets no 4 GiB: found by `benchmarks.fuzz_images`, seed 3179."""
    tags, tiles = pictures.tiff_page(pictures.gradient(64, 64), t322=[64], t323=[64], t270=b"x" * 9, t255=[1])
    content = bytearray(pictures.tiff((tags, tiles)))
    entry = content.index(struct.pack("<H", tag), len(tiles[0]))
    struct.pack_into("<I", content, entry + (8 if tag == 325 else 4), 2**32 - 1)
    path = tmp_path / "s.tif"
    path.write_bytes(content)
    assert code_of(lambda: slide.open_slide(path)) == "unreadable"
    assert not slide.is_slide(path)
