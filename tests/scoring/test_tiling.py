import json
import math
import uuid
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.data import archive, read
from bcd.errors import StorageError
from bcd.scoring import tiling
from bcd.slides import slide, slide_cache, tile
from bcd.slides.parts import tiff_reader
from tests import pictures
from tests.injected import CRASH, set_fault
from tests.slides.test_dicom import dicom_file

TILING = tiling.Tiling(tile_mpp=0.5, tile_width_px=40, tile_height_px=30, mpp=None, min_tissue=0.25)
# A BreaKHis field at 40X.
FIELD = tiling.Tiling(tile_mpp=0.49, tile_width_px=700, tile_height_px=460, mpp=None, min_tissue=0.25)
NAME = "CMU-1-Small-Region.svs"
NOTHING = frozenset()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setattr(slide_cache, "CACHE", tmp_path / "cache")
    yield
    slide_cache.open_staged.cache_clear()


def stained(width=100, mpp=0.5, **changes):
    """A slide of 200 x 150 px: tissue at the left, glass at the right."""
    pixels = np.full((150, 200, 3), 243, np.uint8)
    pixels[:, :width] = 230, 150, 180
    return pictures.tiled_tiff(pixels, mpp, **changes)


def expanded(folder, tile_settings=TILING, done=NOTHING):
    """The rows for the archive in FOLDER/in; plans go to FOLDER/plans."""
    inputs = archive.list_inputs(f"{folder}/in").table
    return pa.concat_tables(tiling.expand(inputs, tile_settings, f"{folder}/plans", done))


def write(folder, contents):
    for name, content in contents.items():
        storage.write_bytes(f"{folder}/in/{name}", content)
    return folder


def test_a_slide_becomes_its_tiles_with_tissue(tmp_path):
    """5 x 5 tiles of 40 x 30 px; of the third column half has tissue."""
    table = expanded(write(tmp_path, {"s.tif": stained()}))
    assert table.schema == schema.READING
    # Neighbours follow each other.
    places = [(0, 0), (40, 0), (0, 30), (40, 30), (80, 0), (80, 30), (0, 60), (40, 60), (0, 90), (40, 90)]
    places += [(80, 60), (80, 90), (0, 120), (40, 120), (80, 120)]
    nothing = dict.fromkeys(schema.READING.names)
    assert table.to_pylist() == [
        nothing
        | {
            schema.IMAGE_ID: f"s.tif#{x},{y},0.5",
            schema.URI: str(tmp_path / "in/s.tif"),
            schema.SLIDE: "s.tif",
            schema.X_LEVEL0_PX: x,
            schema.Y_LEVEL0_PX: y,
            schema.TISSUE_SHARE: 0.5 if x == 80 else 1.0,
            schema.SLIDE_MPP_X: 0.5,
            schema.SLIDE_MPP_Y: 0.5,
            schema.MPP: 0.5,
            schema.WIDTH_PX: 40,
            schema.HEIGHT_PX: 30,
        }
        for x, y in places
    ]
    assert tiling.read_plan(str(tmp_path / "plans"), "s.tif") == tiling.Plan(
        slide="s.tif",
        uri=str(tmp_path / "in/s.tif"),
        patient=None,
        width_px=200,
        height_px=150,
        mpp_x=0.5,
        mpp_y=0.5,
        tiles=15,
        background_tiles=10,
        tissue_area_mm2=100 * 150 * 0.0005**2,
        thumbnail_scale=1.0,
        reader=tiff_reader.READER,
    )
    thumbnail = tiling.read_thumbnail(str(tmp_path / "plans"), "s.tif")
    assert thumbnail.shape == (150, 200, 3)
    assert (thumbnail[:, :100] == (230, 150, 180)).all()
    assert (thumbnail[:, 100:] == 243).all()
    assert tiling.read_plan(str(tmp_path / "plans"), "t.tif") is None


def test_overlapping_tiles_are_rows_of_their_own(tmp_path):
    """At half a side, 9 x 9 tiles; those from x = 120 on have no tissue, that at 100 none and at 80 half."""
    table = expanded(write(tmp_path, {"s.tif": stained()}), replace(TILING, tile_overlap=0.5))
    rows = table.to_pylist()
    assert len({row[schema.IMAGE_ID] for row in rows}) == len(rows) == 5 * 9
    shares = {row[schema.X_LEVEL0_PX]: row[schema.TISSUE_SHARE] for row in rows}
    assert shares == {0: 1, 20: 1, 40: 1, 60: 1, 80: 0.5}
    assert sorted({row[schema.Y_LEVEL0_PX] for row in rows}) == list(range(0, 121, 15))
    plan = tiling.read_plan(str(tmp_path / "plans"), "s.tif")
    assert (plan.tiles, plan.background_tiles, plan.outside_tiles) == (45, 9 * 9 - 45, 0)
    # The tissue itself is counted once.
    assert plan.tissue_area_mm2 == 100 * 150 * 0.0005**2
    seen = read.pixels(table.slice(3, 1), 30, 40, [])[schema.IMAGE]
    assert seen.shape == (1, 30, 40, 3)


def test_too_many_tiles_are_an_error_of_the_slide(tmp_path, monkeypatch):
    monkeypatch.setattr(tile, "MAX_TILES", 80)
    settings = replace(TILING, tile_overlap=0.5)
    (row,) = expanded(write(tmp_path, {"s.tif": stained()}), settings).to_pylist()
    assert (row[schema.ERROR], row[schema.X_LEVEL0_PX]) == ("too_many_tiles", None)


# ---- regions and masks


def polygon(left, top, right, bottom, name=None):
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "geometry": geometry, "properties": {"name": name}}


def drawn(*features):
    return json.dumps({"type": "FeatureCollection", "features": features}).encode()


def with_files(folder, contents, tile_settings=TILING, column=schema.REGION_FILES):
    """The rows for the archive in FOLDER/in, whose slides have files in FOLDER/files."""
    for name, content in ({".keep": b""} | contents).items():
        storage.write_bytes(f"{folder}/files/{name}", content)
    inputs = archive.list_inputs(f"{folder}/in")
    suffix = {schema.REGION_FILES: ".geojson", schema.MASK_FILES: ".png"}[column]
    inputs = archive.with_files(inputs, "--flag", f"{folder}/files", suffix, column)
    plans = f"{folder}/{uuid.uuid4().hex}"
    table = pa.concat_tables(tiling.expand(inputs.table, tile_settings, plans, NOTHING))
    return table, plans


def places_of(table):
    return {(row[schema.X_LEVEL0_PX], row[schema.Y_LEVEL0_PX]) for row in table.to_pylist()}


def test_only_tiles_in_a_region_are_scored(tmp_path):
    """Two by two tiles whole, a third of the next column; glass in a region stays glass."""
    write(tmp_path, {"s.tif": stained()})
    regions = drawn(polygon(0, 30, 93, 90, "left"), polygon(160, 0, 200, 30, "glass"))
    table, plans = with_files(tmp_path, {"s.geojson": regions})
    assert places_of(table) == {(0, 30), (40, 30), (0, 60), (40, 60)}
    assert set(table[schema.REGION].to_pylist()) == {"left"}
    plan = tiling.read_plan(plans, "s.tif")
    assert (plan.tiles, plan.background_tiles, plan.outside_tiles) == (4, 1, 20)
    assert plan.tissue_area_mm2 == pytest.approx(93 * 60 * 0.0005**2)
    tissue, inside = tiling.read_masks(plans, "s.tif")
    assert (tissue.sum(), inside.sum()) == (100 * 150, 93 * 60 + 40 * 30)
    table, _ = with_files(tmp_path, {}, replace(TILING, min_region=0.3))
    assert places_of(table) == {(x, y) for x in (0, 40, 80) for y in (30, 60)}
    table, _ = with_files(tmp_path, {}, replace(TILING, min_region=0.0))
    assert places_of(table) == {(x, y) for x in (0, 40, 80) for y in (30, 60)}
    table, _ = with_files(tmp_path, {}, replace(TILING, hides_uris=True))
    assert table[schema.REGION].null_count == 4


def test_regions_count_from_the_bounds_of_a_slide(tmp_path, monkeypatch):
    """As QuPath shows it; the same regions 40 px to the right and 60 down."""
    monkeypatch.setattr(slide, "_bounds", lambda properties: (40, 60))
    write(tmp_path, {"s.tif": stained()})
    table, plans = with_files(tmp_path, {"s.geojson": drawn(polygon(0, 0, 40, 30))})
    assert places_of(table) == {(40, 60)}
    assert tiling.read_plan(plans, "s.tif").bounds_x_px == 40


def test_regions_on_a_slide_whose_axes_differ(tmp_path):
    """Polygons are in its pixels: 40 across and 60 down are one tile."""
    write(tmp_path, {"s.tif": pictures.tiled_tiff(pictures.stained(150, 200), (0.5, 0.25))})
    table, _ = with_files(tmp_path, {"s.geojson": drawn(polygon(80, 60, 120, 120))})
    assert places_of(table) == {(80, 60)}
    assert table[schema.TISSUE_SHARE].to_pylist() == [1]


def test_regions_on_a_reduced_thumbnail(tmp_path):
    """2,500 x 100 px, whose thumbnail has 2,048 x 82."""
    pixels = np.full((100, 2500, 3), (230, 150, 180), np.uint8)
    pixels[:, 2400:] = 243
    write(tmp_path, {"s.tif": pictures.tiled_tiff(pixels, 0.5)})
    table, plans = with_files(tmp_path, {"s.geojson": drawn(polygon(1200, 30, 1280, 90))})
    assert tiling.read_plan(plans, "s.tif").thumbnail_scale == 2048 / 2500
    assert places_of(table) == {(1200, 30), (1240, 30), (1200, 60), (1240, 60)}


@pytest.mark.parametrize(
    ("column", "files", "code", "message"),
    [
        (schema.REGION_FILES, {}, "no_regions", "--regions has no file with the name of this slide"),
        (schema.MASK_FILES, {"t.png": b""}, "no_mask", "--masks has no file with the name of this slide"),
        (schema.REGION_FILES, {"s.geojson": b"[]", "s.tif.geojson": b"[]"}, "bad_regions", "several files"),
        (schema.REGION_FILES, {"s.geojson": b"[]"}, "bad_regions", "s.geojson: it has no region"),
        (schema.REGION_FILES, {"s.geojson": b"{"}, "bad_regions", "s.geojson: it is no JSON"),
        (schema.MASK_FILES, {"s.png": b"GIF"}, "bad_mask", "s.png: expected a PNG"),
        (schema.REGION_FILES, {"s.geojson": drawn(polygon(0, 0, 9, 9))}, "no_regions", "none of 25 tiles is"),
        (
            schema.REGION_FILES,
            {"s.geojson": drawn(polygon(120, 0, 200, 30))},
            "no_tissue",
            "in 2 tiles; --min",
        ),
        (
            schema.MASK_FILES,
            {"s.png": pictures.encode(np.zeros((15, 20), np.uint8))},
            "no_tissue",
            "in 25 til",
        ),
    ],
)
def test_a_slide_without_an_answer_from_the_files_beside_it_is_an_error(
    tmp_path, column, files, code, message
):
    write(tmp_path, {"s.tif": stained(), "f.png": pictures.encode(pictures.gradient())})
    table, plans = with_files(tmp_path, files, column=column)
    field, row = table.sort_by(schema.IMAGE_ID).to_pylist()
    assert (field[schema.IMAGE_ID], field[schema.ERROR], field[schema.TISSUE_SHARE]) == ("f.png", None, None)
    assert (row[schema.ERROR], row[schema.SLIDE]) == (code, "s.tif")
    assert message in row[schema.ERROR_MESSAGE]
    assert tiling.read_plan(plans, "s.tif") is None


def test_a_file_beside_a_slide_that_cannot_be_read_now_is_not_called_bad(tmp_path, monkeypatch):
    write(tmp_path, {"s.tif": stained()})

    def fails(uri, most_bytes):
        raise StorageError(f"{uri}: throttled")

    monkeypatch.setattr(storage, "read_bytes", fails)
    table, _ = with_files(tmp_path, {"s.geojson": b"[]"})
    assert table[schema.ERROR].to_pylist() == ["unavailable"]


def test_a_given_mask_takes_the_place_of_the_rule(tmp_path):
    """At a tenth of the scale; its right half is glass to the rule."""
    write(tmp_path, {"s.tif": stained()})
    labels = np.zeros((15, 20), np.uint8)
    labels[:6, 8:] = 1
    table, plans = with_files(tmp_path, {"s.png": pictures.encode(labels)}, column=schema.MASK_FILES)
    assert places_of(table) == {(x, y) for x in (80, 120, 160) for y in (0, 30)}
    assert set(table[schema.TISSUE_SHARE].to_pylist()) == {1}
    assert tiling.read_plan(plans, "s.tif").tissue_area_mm2 == pytest.approx(120 * 60 * 0.0005**2)


@pytest.mark.real
def test_regions_lie_on_the_tissue_of_a_real_layout_with_bounds(tmp_path, real_data):
    """All tissue is within the bounds, from 1,000 and 600 on, 1,400 x 920 px: QuPath shows nothing else."""
    write(tmp_path, {"s.scn": (real_data / "cases/slides/bounds.scn").read_bytes()})
    settings = replace(FIELD, tile_mpp=0.5, tile_width_px=200, tile_height_px=100)
    whole = places_of(expanded(tmp_path, settings))
    table, _ = with_files(tmp_path, {"s.geojson": drawn(polygon(0, 0, 1400, 1000))}, settings)
    assert places_of(table) == whole
    table, _ = with_files(tmp_path, {"s.geojson": drawn(polygon(200, 300, 600, 600))}, settings)
    assert places_of(table) == {(x, y) for x in (1200, 1400) for y in (900, 1000, 1100)}


@pytest.mark.parametrize(("least", "tiles"), [(0.0, 15), (0.5, 15), (0.51, 10), (1.0, 10)])
def test_min_tissue_decides_and_glass_is_never_scored(tmp_path, least, tiles):
    assert len(expanded(write(tmp_path, {"s.tif": stained()}), replace(TILING, min_tissue=least))) == tiles


def test_tiles_that_are_done_are_left_out_of_the_rows_and_not_of_the_plan(tmp_path):
    write(tmp_path, {"s.tif": stained()})
    ids = expanded(tmp_path)[schema.IMAGE_ID].to_pylist()
    rest = expanded(tmp_path, done=frozenset({*ids[::2], "other.png"}))
    assert rest[schema.IMAGE_ID].to_pylist() == ids[1::2]
    assert tiling.read_plan(str(tmp_path / "plans"), "s.tif").tiles == len(ids) == 15
    assert len(expanded(tmp_path, done=frozenset(ids))) == 0


def test_a_slide_that_fails_after_some_tiles_keeps_its_plan(tmp_path):
    """Its other tiles become errors, so that they balance; a rerun plans nothing again."""
    write(tmp_path, {"s.tif": stained()})
    before = expanded(tmp_path)
    write(tmp_path, {"s.tif": b"dead"})
    slide_cache.open_staged.cache_clear()
    ids = before[schema.IMAGE_ID].to_pylist()
    rest = expanded(tmp_path, done=frozenset(ids[:4]))
    assert rest.equals(before.slice(4))
    assert read.pixels(rest, 30, 40, [])[schema.ERROR].tolist() == ["unreadable"] * 11
    (tmp_path / "in/s.tif").unlink()
    slide_cache.open_staged.cache_clear()
    inputs = pa.Table.from_pylist([{schema.IMAGE_ID: "s.tif", schema.URI: str(tmp_path / "in/s.tif")}])
    (again,) = tiling.expand(schema.fill(inputs, schema.INDEX), TILING, f"{tmp_path}/plans", NOTHING)
    assert again.equals(before)


def test_a_finer_slide_gives_tiles_that_cover_more_pixels(tmp_path):
    """200 x 150 px at 0.25 µm/px: tiles of 80 x 60 px of level 0; an eighth of the last has tissue."""
    table = expanded(write(tmp_path, {"s.tif": stained(mpp=0.25)}))
    places = {(row[schema.X_LEVEL0_PX], row[schema.Y_LEVEL0_PX]) for row in table.to_pylist()}
    assert places == {(0, 0), (80, 0), (0, 60), (80, 60), (0, 120)}
    assert set(table[schema.WIDTH_PX].to_pylist()) == {40}


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("s.tif", stained(mpp=(0.5, 30.0)), "missing_mpp"),
        ("s.tif", stained(mpp=2.0), "too_coarse"),
        ("s.tif", stained(mpp=0.003), "bad_mpp"),
        ("s.tif", stained(width=0), "no_tissue"),
        ("s.svs", b"no slide at all", "unreadable"),
        ("s.ndpi", b"", "unreadable"),
        ("s.svs", stained()[:9_000], "unreadable"),
    ],
)
def test_a_slide_that_cannot_be_used_is_one_row_with_its_error(tmp_path, name, content, code):
    (row,) = expanded(write(tmp_path, {name: content})).to_pylist()
    assert (row[schema.IMAGE_ID], row[schema.SLIDE], row[schema.ERROR]) == (name, name, code)
    assert row[schema.ERROR_MESSAGE]
    assert row[schema.X_LEVEL0_PX] is None
    assert not (tmp_path / "plans").exists()


def test_a_slide_without_tissue_says_which_setting_decides(tmp_path):
    (row,) = expanded(write(tmp_path, {"s.tif": stained(width=0)})).to_pylist()
    assert (
        row[schema.ERROR_MESSAGE] == f"no tissue to score in 25 tiles; --min-tissue is {TILING.min_tissue:g}"
    )


def test_a_slide_without_scale_takes_that_of_the_flag(tmp_path):
    write(tmp_path, {"s.tif": stained(mpp=None)})
    assert expanded(tmp_path, replace(TILING, mpp=0.9))[schema.ERROR].to_pylist() == ["too_coarse"]
    slide_cache.open_staged.cache_clear()
    assert len(expanded(tmp_path, replace(TILING, mpp=0.5))) == 15


@pytest.mark.parametrize("mpp", [None, 30.0, 352.8])
def test_a_tiled_tiff_without_scale_is_a_field(tmp_path, mpp):
    """72 dpi are no scale. It is read whole, and has no plan."""
    (row,) = expanded(
        write(
            tmp_path,
            {
                "s.tif": stained(mpp=mpp),
            },
        )
    ).to_pylist()
    assert [row[name] for name in (schema.SLIDE, schema.ERROR, schema.X_LEVEL0_PX)] == [None] * 3
    assert read.picture(row).shape == (150, 200, 3)
    assert not (tmp_path / "plans").exists()


def test_the_mpp_of_a_manifest_row_is_that_of_its_slide(tmp_path):
    """A flag fills in where a row says nothing; a row that contradicts its file is an error."""
    sources = {"a.tif": stained(mpp=None), "b.tif": stained(mpp=None), "c.tif": stained(mpp=0.25)}
    write(tmp_path, sources | {"d.tif": stained(mpp=0.003)})
    (tmp_path / "m.csv").write_text("uri,mpp\nin/a.tif,0.5\nin/b.tif,\nin/c.tif,0.5\nin/d.tif,0.5")
    inputs = archive.list_inputs(str(tmp_path / "m.csv")).table

    def found(tile_settings):
        slide_cache.open_staged.cache_clear()
        plans = f"{tmp_path}/{uuid.uuid4().hex}"
        tables = tiling.expand(inputs, tile_settings, plans, NOTHING)
        return [table[schema.ERROR][0].as_py() or len(table) for table in tables]

    assert found(TILING) == [15, 1, "bad_mpp", 15]
    assert found(replace(TILING, mpp=0.25)) == [15, 5, "bad_mpp", 15]
    assert found(replace(TILING, mpp_override=0.25)) == [5, 5, 5, 5]


def test_axes_that_differ_give_tiles_of_the_same_size_in_um(tmp_path):
    """0.5 µm/px across, 0.25 down: a tile covers 40 x 60 px, and the network sees 40 x 30."""
    pixels = pictures.stained(150, 200)
    write(tmp_path, {"s.tif": pictures.tiled_tiff(pixels, (0.5, 0.25))})
    table = expanded(tmp_path)
    places = {(row[schema.X_LEVEL0_PX], row[schema.Y_LEVEL0_PX]) for row in table.to_pylist()}
    assert places == {(x, y) for x in range(0, 200, 40) for y in (0, 60, 120)}
    plan = tiling.read_plan(str(tmp_path / "plans"), "s.tif")
    assert (plan.mpp_x, plan.mpp_y) == (0.5, 0.25)
    seen = read.pixels(table, 30, 40, [])[schema.IMAGE].astype(int)
    halved = pixels[:60, :40].reshape(30, 2, 40, 3).mean(1)
    assert np.abs(seen[0] - halved).max() <= 2


def test_the_area_of_tissue_counts_each_axis(tmp_path):
    expanded(write(tmp_path, {"s.tif": stained(100, (0.5, 0.25))}))
    plan = tiling.read_plan(str(tmp_path / "plans"), "s.tif")
    assert plan.tissue_area_mm2 == pytest.approx(100 * 150 * 0.0005 * 0.00025, rel=0.01)


def test_a_model_without_scale_needs_the_flag(tmp_path):
    table = expanded(write(tmp_path, {"s.tif": stained()}), replace(TILING, tile_mpp=None))
    assert table[schema.ERROR].to_pylist() == ["missing_mpp"]
    assert "--tile-mpp gives it" in table[schema.ERROR_MESSAGE][0].as_py()


def test_fields_stay_one_row_and_keep_what_is_known(tmp_path):
    for kind in ("png", "jpg", "tiff"):
        content = pictures.encode(pictures.gradient(), {"jpg": "JPEG"}.get(kind, kind.upper()))
        write(tmp_path, {f"f.{kind}": content})
    rows = ["uri,patient,slide,mpp", "in/f.png,7,s,0.5", "in/f.tiff,,,", "in/f.jpg,,,", "no.tif,,,"]
    (tmp_path / "m.csv").write_text("\n".join(rows))
    inputs = archive.list_inputs(str(tmp_path / "m.csv")).table
    rows = pa.concat_tables(tiling.expand(inputs, TILING, str(tmp_path / "plans"), NOTHING)).to_pylist()
    found = {row[schema.IMAGE_ID]: row for row in rows}
    assert {name: row[schema.ERROR] for name, row in found.items() if row[schema.ERROR]} == {
        "no.tif": "unreadable"
    }
    known = (schema.PATIENT, schema.SLIDE, schema.MPP, schema.X_LEVEL0_PX)
    assert [found["in/f.png"][name] for name in known] == ["7", "s", 0.5, None]
    assert [found["in/f.tiff"][name] for name in known] == [None] * 4


def test_which_files_have_to_be_opened():
    names = ["a.PNG", "b.jpeg", "c.svs", "d.TIFF", "e.dcm", "f", "1.2.840"]
    assert [tiling.may_be_slide(f"s3://b/{name}") for name in names] == [False] * 2 + [True] * 5


def test_a_slide_is_known_by_its_content_whatever_its_name(tmp_path):
    field = pictures.encode(pictures.gradient())
    write(tmp_path, {"s": stained(), "1.2.840": stained(), "f": field, "g.7": field})
    found = expanded(tmp_path)[schema.SLIDE].to_pylist()
    assert [found.count(name) for name in ("s", "1.2.840", None)] == [15, 15, 2]


def test_an_entry_that_cannot_be_read_is_a_row_with_its_reason(tmp_path):
    write(tmp_path, {"a.png": b"any", "b.svs": b"text"})
    for name in ("c.png", "d.svs"):
        (tmp_path / "in" / name).symlink_to("/nowhere")
    rows = expanded(tmp_path).to_pylist()
    found = {row[schema.IMAGE_ID]: (row[schema.ERROR], row[schema.ERROR_MESSAGE]) for row in rows}
    gone = ("unreadable", "a link to /nowhere: No such file or directory")
    assert (found["a.png"], found["c.png"], found["d.svs"]) == ((None, None), gone, gone)


def test_a_slide_on_s3_gives_the_same_rows(tmp_path, s3):
    remote = f"{s3}/{uuid.uuid4().hex}"
    contents = {"s.tif": stained(), "t.svs": stained(), "b.svs": b"text", "f.png": b"any"}
    here, there = (expanded(write(folder, contents)) for folder in (tmp_path, remote))
    assert len(here) == 15 + 15 + 1 + 1
    drop = [schema.URI, schema.ERROR_MESSAGE]
    assert here.drop_columns(drop).equals(there.drop_columns(drop))
    plans = [tiling.read_plan(f"{f}/plans", "s.tif") for f in (tmp_path, remote)]
    assert plans[0].model_copy(update={"uri": plans[1].uri}) == plans[1]


def test_tiles_are_read_where_they_were_laid(tmp_path):
    """What comes out here is what `read` reads: the tile's pixels, whole."""
    pixels = pictures.stained(150, 200)
    write(tmp_path, {"s.tif": pictures.tiled_tiff(pixels, 0.5)})
    table = expanded(tmp_path)
    seen = read.pixels(table, 30, 40, [schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX])
    assert len(table) == 25
    for x, y, picture in zip(
        seen[schema.X_LEVEL0_PX], seen[schema.Y_LEVEL0_PX], seen[schema.IMAGE], strict=True
    ):
        np.testing.assert_array_equal(picture, pixels[y : y + 30, x : x + 40])


@pytest.mark.real
def test_the_real_slide_has_the_grid_worked_out_by_hand(tmp_path, real_data):
    """2220 x 2967 px at 0.499 µm/px; a tile is 700 x 460 px at 0.49, 687.4 x 451.7 of level 0."""
    content = (real_data / "slides" / NAME).read_bytes()
    columns, rows = math.ceil(2220 / (700 * 0.49 / 0.499)), math.ceil(2967 / (460 * 0.49 / 0.499))
    table = expanded(write(tmp_path, {NAME: content}), FIELD)
    plan = tiling.read_plan(str(tmp_path / "plans"), NAME)
    assert (columns, rows) == (4, 7)
    assert plan.tiles + plan.background_tiles == columns * rows == 28
    assert plan.tiles == len(table)
    assert plan.background_tiles > 0
    assert 0.3 < plan.tissue_area_mm2 < 2.22 * 0.499 * 2.967 * 0.499
    for row in table.to_pylist():
        assert row[schema.X_LEVEL0_PX] in [round(i * 700 * 0.49 / 0.499) for i in range(4)]
        assert row[schema.Y_LEVEL0_PX] in [round(i * 460 * 0.49 / 0.499) for i in range(7)]
    again = expanded(tmp_path, FIELD, frozenset(table[schema.IMAGE_ID].to_pylist()[3:]))
    assert again.to_pylist() == table.to_pylist()[:3]
    with slide.open_slide(real_data / "slides" / NAME) as opened:
        assert tiling.read_thumbnail(str(tmp_path / "plans"), NAME).shape == opened.thumbnail()[0].shape


@pytest.mark.real
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_real_slide_cut_short_is_unreadable(tmp_path, real_data, share):
    content = (real_data / "slides" / NAME).read_bytes()
    write(tmp_path, {"s.svs": content[: int(share * len(content))]})
    (row,) = expanded(tmp_path, FIELD).to_pylist()
    assert (row[schema.IMAGE_ID], row[schema.SLIDE], row[schema.ERROR]) == ("s.svs", "s.svs", "unreadable")


@pytest.mark.real
@pytest.mark.parametrize(("name", "code"), [("boxes.tiff", "missing_mpp"), ("tiny.svs", "no_tissue")])
def test_other_real_slides(tmp_path, real_data, name, code):
    table = expanded(write(tmp_path, {name: (real_data / "slides" / name).read_bytes()}), FIELD)
    assert (len(table), table[schema.ERROR][0].as_py()) == (1, code)


@pytest.mark.parametrize(("lasting", "code"), [(True, "unreadable"), (False, "unavailable")])
def test_a_slide_that_cannot_be_fetched_now_is_not_called_unreadable(tmp_path, monkeypatch, lasting, code):
    def fails(uri):
        raise StorageError(f"{uri}: no", lasting)

    write(tmp_path, {"s.tif": stained(**pictures.UNUSUAL)})
    monkeypatch.setattr(slide_cache, "stage", fails)
    (row,) = expanded(tmp_path).to_pylist()
    assert (row[schema.ERROR], row[schema.ERROR_MESSAGE]) == (code, f"{tmp_path}/in/s.tif: no")


@pytest.mark.parametrize("name", ["facts", "read"])
def test_a_slide_that_crashes_its_reader_is_one_row(tmp_path, monkeypatch, name):
    """When it is opened, and when its thumbnail is read; the others are planned."""
    set_fault(monkeypatch, name, CRASH)
    write(tmp_path, {"bad.svs": stained(**pictures.UNUSUAL), "good.tif": stained()})
    if name == "facts":
        write(tmp_path, {"bad.dcm": dicom_file("1.1")})
    table = expanded(tmp_path)
    broken = [row for row in table.to_pylist() if row[schema.ERROR]]
    assert [row[schema.IMAGE_ID] for row in broken] == ["bad.dcm", "bad.svs"][name == "read" :]
    for row in broken:
        assert row[schema.ERROR] == "unreadable"
        assert row[schema.ERROR_MESSAGE] == "the slide reader crashes: Segmentation fault"
    assert table[schema.SLIDE].to_pylist().count("good.tif") == 15 == len(table) - len(broken)


def test_a_tile_that_crashes_the_reader_is_one_error(tmp_path, monkeypatch):
    set_fault(monkeypatch, "read", f"(given['x'], given['y']) == (40, 30) and {CRASH}")
    table = expanded(write(tmp_path, {"bad.tif": stained(**pictures.UNUSUAL)}))
    seen = read.pixels(table, 30, 40, [schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX])
    places = zip(seen[schema.X_LEVEL0_PX], seen[schema.Y_LEVEL0_PX], seen[schema.ERROR], strict=True)
    assert [(x, y, code) for x, y, code in places if code] == [(40, 30, "unreadable")]
    assert len(table) == 15
