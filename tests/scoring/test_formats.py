"""Slides of each format, made with known pixels: planned, read tile by tile, and with a damaged tile."""

import uuid
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.data import archive, read
from bcd.imaging.image import ImageError
from bcd.scoring import tiling
from bcd.slides import slide, slide_cache
from tests import pictures, slide_files
from tests.slide_files import FORMATS

# No two tiles are alike, in red alone neither.
PIXELS = pictures.stained(384, 512)
PIXELS[..., 0] -= (25 * np.arange(384) / 384).astype(np.uint8)[:, None]
TILING = tiling.Tiling(tile_mpp=0.5, tile_width_px=128, tile_height_px=96, mpp=None, min_tissue=0.25)
HALF = replace(TILING, tile_mpp=1.0, tile_width_px=64, tile_height_px=48)
# A stored tile in the middle, and where it is.
DAMAGED, X_PX, Y_PX = 20, 256, 128


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setattr(slide_cache, "CACHE", tmp_path / "cache")
    slide_cache.open_staged.cache_clear()
    yield
    slide_cache.open_staged.cache_clear()


def planned(uri, plans, given):
    """The rows of an archive of one slide, and its plan."""
    inputs = archive.list_inputs(str(uri)).table
    (name,) = inputs[schema.IMAGE_ID].to_pylist()
    rows = pa.concat_tables(tiling.expand(inputs, given, str(plans), frozenset()))
    return rows, tiling.read_plan(str(plans), name)


def seen(rows, given):
    """Place, pixels and error of each tile."""
    places = [schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX]
    found = read.pixels(rows, given.tile_height_px, given.tile_width_px, places)
    columns = (*places, schema.IMAGE, schema.ERROR)
    return list(zip(*(found[name] for name in columns), strict=True))


def canvas(plan, corner_px):
    """All of level 0: the pixels on white."""
    whole = np.full((plan.height_px, plan.width_px, 3), 255, np.uint8)
    whole[corner_px:, corner_px:][: PIXELS.shape[0], : PIXELS.shape[1]] = PIXELS
    return whole


@pytest.mark.parametrize("name", FORMATS)
def test_tiles_have_the_pixels_that_were_written(tmp_path, name):
    made = FORMATS[name]
    made.write(tmp_path / "in", PIXELS)
    for number, given in enumerate((TILING, HALF)):
        slide_cache.open_staged.cache_clear()
        rows, plan = planned(tmp_path / "in", tmp_path / f"plans-{number}", given)
        assert (plan.mpp_x, plan.mpp_y, plan.reader) == (0.5, 0.5, made.reader)
        assert (plan.bounds_x_px, plan.bounds_y_px) == (made.corner_px,) * 2
        whole, step = canvas(plan, made.corner_px), 1 + number
        assert plan.tiles == len(rows) >= 16
        assert made.corner_px or plan.tiles == 16
        for x, y, pixels, error in seen(rows, given):
            expected = whole[y : y + 96 : step, x : x + 128 : step].astype(int)
            assert error == ""
            # The second level has more detail for JPEG.
            more = number * (made.tolerance > 0)
            assert np.abs(pixels - expected).max() <= made.tolerance + more


def damage(folder):
    """Overwrite a stored tile by zeros, in whatever way it is compressed; cut the file of one that is not."""
    tile = slide_files.tiles(PIXELS)[DAMAGED]
    planes = [slide_files.blosc(tile[..., 0].tobytes()), slide_files.deflated(tile[..., :1].copy())]
    stored = [slide_files.jpeg(tile), slide_files.jpeg2000(tile), slide_files.deflated(tile)]
    stored += [slide_files.lzw(tile)]
    stored += [*planes, slide_files.zstd(tile.transpose(2, 0, 1).tobytes())]
    for path in sorted(folder.rglob("*.*")) + sorted(folder.rglob("[0-9]")):
        content = path.read_bytes() if path.is_file() else b""
        for part in stored:
            if part in content:
                path.write_bytes(content.replace(part, bytes(len(part))))
                return
    raise AssertionError("no tile is stored in these ways")


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"DICOM", "NDPI", "tiled TIFF, uncompressed"}))
def test_a_damaged_tile_costs_itself(tmp_path, name):
    made = FORMATS[name]
    made.write(tmp_path / "in", PIXELS)
    damage(tmp_path / "in")
    rows, plan = planned(tmp_path / "in", tmp_path / "plans", TILING)
    whole, wrong = canvas(plan, made.corner_px), set()
    left, top = X_PX + made.corner_px, Y_PX + made.corner_px
    for x, y, pixels, error in seen(rows, TILING):
        if error:
            wrong.add((x, y, error))
        else:
            expected = whole[y : y + 96, x : x + 128].astype(int)
            assert np.abs(pixels - expected).max() <= made.tolerance
    touched = {
        (x, y, "unreadable")
        for x in rows[schema.X_LEVEL0_PX].to_pylist()
        for y in rows[schema.Y_LEVEL0_PX].to_pylist()
        if x < left + 64 and x + 128 > left and y < top + 64 and y + 96 > top
    }
    assert wrong == touched
    assert plan.tiles == len(rows) > len(wrong) > 0


def test_a_damaged_level_costs_its_tiles(tmp_path):
    """Those of another level are read from that."""
    FORMATS["SVS, JPEG"].write(tmp_path / "in", PIXELS)
    content = (tmp_path / "in/s.svs").read_bytes()
    for tile in slide_files.tiles(slide_files.halved(PIXELS)):
        stored = slide_files.jpeg(tile)
        content = content.replace(stored, bytes(len(stored)))
    (tmp_path / "in/s.svs").write_bytes(content)
    for given, expected in ((TILING, ""), (HALF, "unreadable")):
        slide_cache.open_staged.cache_clear()
        rows, plan = planned(tmp_path / "in", tmp_path / f"plans-{given.tile_mpp}", given)
        assert plan.tiles == 16
        assert {error for *_, error in seen(rows, given)} == {expected}


def test_damage_in_ndpi_costs_the_level(tmp_path):
    """It is one JPEG, which here has no places to begin within."""
    FORMATS["NDPI"].write(tmp_path / "in", PIXELS)
    content, stored = (tmp_path / "in/s.ndpi").read_bytes(), slide_files.jpeg(PIXELS)
    middle = content.index(stored) + len(stored) // 2
    (tmp_path / "in/s.ndpi").write_bytes(content[:middle] + bytes(300) + content[middle + 300 :])
    for given, expected in ((TILING, "unreadable"), (HALF, "")):
        slide_cache.open_staged.cache_clear()
        rows, _ = planned(tmp_path / "in", tmp_path / f"plans-{given.tile_mpp}", given)
        assert [error for *_, error in seen(rows, given)] == [expected] * 16


def test_a_cut_dicom_file_costs_its_tiles_or_its_slide(tmp_path):
    """Uncompressed, it has no other damage that shows."""
    FORMATS["DICOM"].write(tmp_path / "in", PIXELS)
    content = (tmp_path / "in/0.dcm").read_bytes()
    (tmp_path / "in/0.dcm").write_bytes(content[: len(content) // 2])
    rows, _ = planned(tmp_path / "in", tmp_path / "plans", TILING)
    errors = [error for *_, error in seen(rows, TILING)]
    assert "unreadable" in errors


def test_an_ome_tiff_with_a_page_for_each_colour_is_rejected(tmp_path):
    """OpenSlide would show its red as grey."""
    slide_files.ome_pages(tmp_path / "in", PIXELS)
    rows, _ = planned(tmp_path / "in", tmp_path / "plans", TILING)
    (error,) = read.pixels(rows, 96, 128, [])[schema.ERROR].tolist()
    assert error == "unsupported_format"
    named = slide_files.put(tmp_path / "s.svs", (tmp_path / "in/s.ome.tif").read_bytes())
    with pytest.raises(ImageError, match="3 channels in pages of their own"):
        slide.open_slide(named)


def test_a_zarr_on_s3_gives_the_same_tiles(tmp_path, s3):
    FORMATS["OME-Zarr 0.4"].write(tmp_path / "in", PIXELS)
    remote = f"{s3}/{uuid.uuid4().hex}"
    storage.upload_folder(tmp_path / "in", f"{remote}/in")
    here, there = (planned(f"{folder}/in", f"{folder}/plans", TILING)[0] for folder in (tmp_path, remote))
    assert here.drop_columns(schema.URI).equals(there.drop_columns(schema.URI))
    for one, two in zip(seen(here, TILING), seen(there, TILING), strict=True):
        np.testing.assert_array_equal(one[2], two[2])
