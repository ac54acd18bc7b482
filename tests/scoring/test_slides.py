import gzip
import io
import json
import posixpath
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bcd import schema, storage
from bcd.data import archive
from bcd.errors import StorageError
from bcd.imaging import image
from bcd.metrics import top_tiles
from bcd.model.novelty import FeatureStatistics
from bcd.reports import heatmap
from bcd.scoring import ledger, pages, slides, tiling
from bcd.slides import slide_cache
from bcd.taxonomy import TUMOR_CLASSES, classes, malignant_mask
from tests import pictures
from tests.archives import claimed
from tests.model.test_bundle import card

NAME = "CMU-1-Small-Region.svs"
SYNTHETIC = tiling.Tiling(tile_mpp=0.5, tile_width_px=40, tile_height_px=30, mpp=None, min_tissue=0.25)
FIELD = tiling.Tiling(tile_mpp=0.49, tile_width_px=700, tile_height_px=460, mpp=None, min_tissue=0.25)
ORDER = list(schema.QUANTILES)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Ray's tasks as plain calls."""

    def remote(**options):
        return lambda function: SimpleNamespace(remote=function)

    monkeypatch.setattr(slides, "ray", SimpleNamespace(remote=remote, get=lambda results: results))
    yield
    slide_cache.open_staged.cache_clear()


def planned(folder, contents, tile_settings, generation=1):
    """Tiles and plans of an archive of slides, as the pipeline makes them."""
    for name, content in contents.items():
        storage.write_bytes(f"{folder}/in/{name}", content)
    ours = ledger.Ledger(claimed(f"{folder}/out"), "0", ("",) * (generation - 1))
    inputs = archive.list_inputs(f"{folder}/in").table
    inputs = inputs.filter(pa.array([name in contents for name in inputs[schema.IMAGE_ID].to_pylist()]))
    tiles = pa.concat_tables(tiling.expand(inputs, tile_settings, ours.plans_uri, frozenset()))
    return ours, tiles, [tiling.read_plan(ours.plans_uri, name) for name in contents]


def scored(ours, tiles, names=TUMOR_CLASSES):
    """A predictions table by hand, and its probabilities."""
    malignant = malignant_mask(names).index(True)
    rng = np.random.default_rng(0)
    log_odds = rng.normal(0, 2, len(tiles)).astype(np.float32)
    probability = 1 / (1 + np.exp(-log_odds))
    rows = [
        row
        | {
            schema.LOGIT: [float(odds) if i == malignant else 0.0 for i in range(len(names))],
            schema.PROBABILITY_MALIGNANT: float(p),
            schema.PREDICTED_CLASS: names[malignant if p >= 0.5 else 0],
            schema.MODEL_ID: "m",
            schema.BCD_VERSION: "1",
        }
        for row, odds, p in zip(tiles.to_pylist(), log_odds, probability, strict=True)
    ]
    write(ours, rows)
    return rows, np.array([row[schema.PROBABILITY_MALIGNANT] for row in rows], np.float32), log_odds


def write(ours, rows):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.predictions(2, 3)), buffer)
    storage.write_bytes(f"{ours.predictions_uri}/part-{ours.generation:04d}-00000.parquet", buffer.getvalue())


def none():
    return schema.predictions(2, 3).empty_table()


def features(ours, name):
    packed = storage.read_bytes(f"{slides.folder(ours.uri, name)}/tiles.geojson.gz")
    content = json.loads(gzip.decompress(packed))
    assert content["type"] == "FeatureCollection"
    return content["features"]


def stained():
    pixels = np.full((150, 200, 3), 243, np.uint8)
    pixels[:, :100] = 230, 150, 180
    return pictures.tiled_tiff(pixels, 0.5)


def check(ours, plan, tiles, row, probability, log_odds):
    """Compare the results of one slide with its tiles."""
    assert row[schema.SLIDE] == plan.slide
    assert row[schema.TILES] == plan.tiles == len(tiles)
    assert row[schema.BACKGROUND_TILES] == plan.background_tiles
    assert (row[schema.ERROR_TILES], row[schema.ERROR]) == (0, None)
    assert row[schema.MALIGNANT_TILE_SHARE] == np.mean(probability >= 0.5)
    expected = np.quantile(probability, [0.05, 0.25, 0.5, 0.75, 0.95])
    np.testing.assert_allclose([row[name] for name in ORDER], expected, rtol=1e-6)
    page = image.decode(storage.read_bytes(f"{slides.folder(ours.uri, plan.slide)}/heatmap.png"))
    thumbnail = tiling.read_thumbnail(ours.plans_uri, plan.slide)
    assert page.shape[0] > thumbnail.shape[0]
    assert page.shape[1] >= thumbnail.shape[1]
    found = features(ours, plan.slide)
    assert len(found) == len(tiles)
    for feature, tile, p, odds in zip(found, tiles, probability, log_odds, strict=True):
        x, y = tile[schema.X_LEVEL0_PX], tile[schema.Y_LEVEL0_PX]
        scale = tile[schema.MPP] / plan.mpp_x
        width, height = round(tile[schema.WIDTH_PX] * scale), round(tile[schema.HEIGHT_PX] * scale)
        (ring,) = feature["geometry"]["coordinates"]
        assert ring == [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
        assert feature["properties"]["name"] == tile[schema.IMAGE_ID]
        assert feature["properties"]["classification"]["name"] == ("malignant" if p >= 0.5 else "benign")
        measured = feature["properties"]["measurements"]
        given = {schema.TISSUE_SHARE: tile[schema.TISSUE_SHARE]} if schema.TISSUE_SHARE in tile else {}
        assert measured == pytest.approx(
            given | {schema.PROBABILITY_MALIGNANT: p, "log_odds": odds}, rel=1e-5
        )


def test_a_slide_is_described_by_its_tiles(tmp_path):
    ours, tiles, plans = planned(tmp_path, {"a/s.tif": stained()}, SYNTHETIC)
    rows, probability, log_odds = scored(ours, tiles)
    table = slides.write_slides(ours, plans, none(), card())
    assert table.schema == schema.SLIDES
    check(ours, plans[0], rows, *table.to_pylist(), probability, log_odds)
    assert pq.read_table(f"{ours.uri}/slides.parquet").equals(table)


def test_tiles_for_qupath_have_its_coordinates(tmp_path):
    """It crops a slide to its bounds: the table keeps level 0, and says so."""
    ours, tiles, plans = planned(tmp_path, {"s.tif": stained()}, SYNTHETIC)
    rows, _, _ = scored(ours, tiles)
    plans = [plans[0].model_copy(update={"bounds_x_px": 30, "bounds_y_px": 20})]
    (row,) = slides.write_slides(ours, plans, none(), card()).to_pylist()
    assert (row[schema.BOUNDS_X_LEVEL0_PX], row[schema.BOUNDS_Y_LEVEL0_PX]) == (30, 20)
    corners = [feature["geometry"]["coordinates"][0][0] for feature in features(ours, "s.tif")]
    assert corners == [[tile[schema.X_LEVEL0_PX] - 30, tile[schema.Y_LEVEL0_PX] - 20] for tile in rows]
    (part,) = storage.list_files(ours.predictions_uri)
    stored = pq.read_schema(part.uri).field(schema.X_LEVEL0_PX).metadata[b"description"].decode()
    assert "pixels of level 0 as OpenSlide counts them" in stored


def test_tissue_for_qupath_has_its_coordinates(tmp_path):
    """The left half of 200 x 150 px, and the same outline on an image of the slide."""
    ours, tiles, plans = planned(tmp_path, {"s.tif": stained()}, SYNTHETIC)
    scored(ours, tiles)
    plans = [plans[0].model_copy(update={"bounds_x_px": 30, "bounds_y_px": 20})]
    (row,) = slides.write_slides(ours, plans, none(), card()).to_pylist()
    assert (row[schema.TILES], row[schema.OUTSIDE_TILES]) == (15, 0)
    (tissue,) = json.loads(storage.read_bytes(f"{slides.folder(ours.uri, 's.tif')}/tissue.geojson"))[
        "features"
    ]
    ((ring,),) = tissue["geometry"]["coordinates"]
    (left, top), (right, bottom) = np.min(ring, 0), np.max(ring, 0)
    assert (left, top, right, bottom) == (-30, -20, 70, 130)
    outlined = image.decode(storage.read_bytes(f"{slides.folder(ours.uri, 's.tif')}/tissue.jpg"))
    assert outlined.shape == (150, 200, 3)
    assert outlined[75, 99, 0] < 100 < outlined[75, 50, 0]


def test_a_slide_that_an_older_version_planned_is_drawn(tmp_path):
    ours, tiles, plans = planned(tmp_path, {"s.tif": stained()}, SYNTHETIC)
    scored(ours, tiles)
    (mask,) = [file.uri for file in storage.list_files(ours.plans_uri) if file.path.endswith("mask.png")]
    before = tiling.read_masks(ours.plans_uri, "s.tif")
    storage.delete_file(mask)
    for one, other in zip(tiling.read_masks(ours.plans_uri, "s.tif"), before, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(slides.write_slides(ours, plans, none(), card())) == 1


def test_tiles_unlike_the_training_data_are_counted_hatched_and_measured(tmp_path, monkeypatch):
    ours, tiles, plans = planned(tmp_path, {"s.tif": stained()}, SYNTHETIC)
    rows, *_ = scored(ours, tiles)
    far = [i % 3 == 0 for i in range(len(rows))]
    codes = [["unlike_training_data"] if is_far else [] for is_far in far]
    rows = [
        row | {schema.NOVELTY: 1.0 + 2 * is_far, schema.NOVELTY_CUTOFF: 1.5, schema.WARNINGS: code}
        for row, is_far, code in zip(rows, far, codes, strict=True)
    ]
    write(ours, rows)
    drawn = []
    real = heatmap.draw_tiles
    monkeypatch.setattr(heatmap, "draw_tiles", lambda *given: drawn.append(given[-1]) or real(*given))
    statistics = FeatureStatistics(mean=(0.0,), spread=(1.0,), cutoff=1.5, n_training=1, n_validation=1)
    (told,) = slides.write_slides(ours, plans, none(), card(feature_statistics=statistics)).to_pylist()
    assert told[schema.WARNED_TILES] == sum(far) > 0
    assert drawn[0].tolist() == far
    measured = [feature["properties"]["measurements"] for feature in features(ours, "s.tif")]
    names = (schema.NOVELTY, schema.NOVELTY_CUTOFF, "unlike_training_data")
    assert [[one[name] for name in names] for one in measured] == [[1.0 + 2 * f, 1.5, float(f)] for f in far]


def test_tiles_have_the_size_of_each_axis(tmp_path):
    """0.5 µm/px across, 0.25 down: 40 x 30 px of a tile are 40 x 60 of the slide."""
    pixels = np.full((150, 200, 3), (230, 150, 180), np.uint8)
    ours, tiles, plans = planned(tmp_path, {"s.tif": pictures.tiled_tiff(pixels, (0.5, 0.25))}, SYNTHETIC)
    scored(ours, tiles)
    (row,) = slides.write_slides(ours, plans, none(), card()).to_pylist()
    assert (row[schema.MPP], row[schema.MPP_Y]) == (0.5, 0.25)
    assert row[schema.WARNED_TILES] is None  # not known
    (ring,) = features(ours, "s.tif")[-1]["geometry"]["coordinates"]
    assert ring == [[160, 120], [200, 120], [200, 180], [160, 180], [160, 120]]


def test_the_tissue_share_is_a_measurement_of_tables_that_have_it(tmp_path):
    ours, tiles, plans = planned(tmp_path, {"s.tif": stained()}, SYNTHETIC)
    scored(ours, tiles)
    (part,) = storage.list_files(ours.predictions_uri)
    share = np.linspace(0.25, 1, len(tiles), dtype=np.float32)
    table = storage.read_table(part.uri)
    table = table.select([name for name in table.column_names if name != schema.TISSUE_SHARE])
    storage.write_table(part.uri, table.append_column(schema.TISSUE_SHARE, pa.array(share)))
    slides.write_slides(ours, plans, none(), card())
    measured = [feature["properties"]["measurements"] for feature in features(ours, "s.tif")]
    assert [one[schema.TISSUE_SHARE] for one in measured] == share.tolist()


def test_tiles_are_read_and_written_by_row_group(tmp_path, monkeypatch):
    """Those of another slide in the same file are not read: groups are chosen by their statistics."""
    ours, tiles, plans = planned(tmp_path, {"a.tif": stained(), "b.tif": stained()}, SYNTHETIC)
    scored(ours, tiles)
    slides.write_slides(ours, plans, none(), card())
    whole = [features(ours, name) for name in ("a.tif", "b.tif")]
    (part,) = storage.list_files(ours.predictions_uri)
    storage.write_table(part.uri, storage.read_table(part.uri), row_group_size=4)
    blocks = []
    real = heatmap.tile_features
    monkeypatch.setattr(heatmap, "tile_features", lambda *given: blocks.append(len(given[0])) or real(*given))
    slides.write_slides(ours, plans, none(), card())
    assert blocks == [4, 4, 4, 3, 1, 4, 4, 4, 2]
    assert [features(ours, name) for name in ("a.tif", "b.tif")] == whole


def test_the_file_for_qupath_is_the_same_on_s3(tmp_path, s3):
    found = []
    for folder in (f"{tmp_path}/here", f"{s3}/{tmp_path.name}"):
        ours, tiles, plans = planned(folder, {"s.tif": stained()}, SYNTHETIC)
        scored(ours, tiles)
        slides.write_slides(ours, plans, none(), card())
        found.append(storage.read_bytes(f"{slides.folder(ours.uri, 's.tif')}/tiles.geojson.gz"))
    assert found[0] == found[1]


@pytest.mark.parametrize("remote", [False, pytest.param(True, marks=pytest.mark.process)])
def test_a_file_that_was_not_finished_is_not_there(tmp_path, remote, request, monkeypatch):
    folder = f"{request.getfixturevalue('s3')}/{tmp_path.name}" if remote else tmp_path
    ours, tiles, plans = planned(folder, {"s.tif": stained()}, SYNTHETIC)
    scored(ours, tiles)

    def cut(blocks):
        yield b"{"
        raise OSError("the disk is full")

    monkeypatch.setattr(heatmap, "geojson", cut)
    with pytest.raises(StorageError, match=r"s.tif/tiles.geojson.gz: cannot write it: the disk is full"):
        slides.write_slides(ours, plans, none(), card())
    names = {file.path.rpartition("/")[2] for file in storage.list_files(ours.uri)}
    assert "heatmap.png" in names
    assert not {name for name in names if "tiles" in name}


def test_the_file_of_an_older_version_is_replaced(tmp_path):
    """That of a slide of an earlier generation remains, and the gallery has its link."""
    ours, tiles, plans = planned(tmp_path, {"a.tif": stained(), "b.tif": stained()}, SYNTHETIC)
    scored(ours, tiles)
    table = slides.write_slides(ours, plans, none(), card())
    for name in ("a.tif", "b.tif"):
        storage.write_bytes(f"{slides.folder(ours.uri, name)}/tiles.geojson", b"old")
    slides.write_slides(ours, plans[:1], none(), card())
    linked = [slide.geojson for slide in pages._slides(ours, table.to_pylist())]
    assert linked == ["slides/a.tif/tiles.geojson.gz", "slides/b.tif/tiles.geojson"]


def test_a_slide_has_answers_of_its_top_tiles(tmp_path):
    """The whole slide is one square of tissue, so that there is no interval."""
    ours, tiles, plans = planned(tmp_path, {"s.tif": stained()}, SYNTHETIC)
    _, probability, _ = scored(ours, tiles)
    (row,) = slides.write_slides(ours, plans, none(), card()).to_pylist()
    top = np.sort(probability.astype(float))[-10:]
    assert row[schema.TOP_TILES] == 10
    assert row[schema.TOP_PROBABILITY] == pytest.approx(top.mean())
    assert row[schema.NOISY_OR] == pytest.approx(1 - np.prod(1 - top))
    assert [row[name] for name in top_tiles.LIMITS] == [None] * 4


PEAK = """
import json, sys
from types import SimpleNamespace
from bcd.lease import Lease
from bcd.scoring import ledger, slides, tiling
ours = ledger.Ledger(Lease(sys.argv[1]), "0", ())
card = SimpleNamespace(threshold=0.5, classes=("benign", "malignant"), feature_statistics=None)
plan = tiling.read_plan(ours.plans_uri, "s.svs")
if sys.argv[2] == "geojson":
    slides._write_geojson(ours, plan, slides._tiles(ours, plan).size, card)
else:
    slides.draw_slide(ours, plan, card)
print(1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]))
"""


def peak(ours, what):
    """Most memory in MB of a process that does this for a slide, with all that it imports, Ray too."""
    command = [sys.executable, "-c", PEAK, ours.uri, what]
    return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout) / 1e6


def large(output, side, group=16_384):
    """A slide of side x side tiles and its predictions, which are read from row groups."""
    ours = ledger.Ledger(claimed(output), "0", ())
    facts = {
        "slide": "s.svs",
        "uri": "/s.svs",
        "patient": None,
        "background_tiles": 0,
        "tissue_area_mm2": 1.0,
    }
    facts |= {"width_px": 224 * side, "height_px": 224 * side, "mpp_x": 0.5, "mpp_y": 0.5}
    plan = tiling.Plan(**facts, tiles=side**2, thumbnail_scale=2048 / (224 * side))
    thumbnail = image.encode_png(np.full((2048, 2048, 3), 230, np.uint8))
    for suffix, content in (("png", thumbnail), ("json", plan.model_dump_json().encode())):
        storage.write_bytes(tiling._uri(ours.plans_uri, plan.slide, suffix), content)
    form, rng = schema.predictions(7, 11), np.random.default_rng(0)
    Path(ours.predictions_uri).mkdir()
    with pq.ParquetWriter(f"{ours.predictions_uri}/part.parquet", form, compression="zstd") as file:
        for start in range(0, side**2, group):
            place = np.arange(start, min(start + group, side**2))
            x, y = place % side * 224, place // side * 224
            odds = rng.normal(-3, 2, len(place)).astype(np.float32)
            p = 1 / (1 + np.exp(-odds))
            constant = {schema.SLIDE: "s.svs", schema.URI: "/s.svs", schema.MPP: 0.5, schema.WIDTH_PX: 224}
            constant |= {schema.HEIGHT_PX: 224, schema.MODEL_ID: "m", schema.BCD_VERSION: "1"}
            constant |= {schema.NOVELTY_CUTOFF: 1.5}
            columns = {name: [value] * len(place) for name, value in constant.items()}
            columns |= {schema.IMAGE_ID: [f"s.svs#{a},{b},0.5" for a, b in zip(x, y, strict=True)]}
            columns |= {schema.X_LEVEL0_PX: x, schema.Y_LEVEL0_PX: y, schema.PROBABILITY_MALIGNANT: p}
            columns |= {schema.LOGIT: np.stack([np.zeros_like(odds), odds], 1).tolist()}
            columns |= {schema.PREDICTED_CLASS: np.where(p >= 0.5, "malignant", "benign")}
            columns |= {schema.NOVELTY: rng.normal(1, 0.2, len(place)).astype(np.float32)}
            columns |= {
                schema.WARNINGS: [
                    ["unlike_training_data"] if v > 1.5 else [] for v in columns[schema.NOVELTY]
                ]
            }
            evidence = pa.FixedSizeListArray.from_arrays(np.zeros(77 * len(place), np.float32), 77)
            columns |= {schema.EVIDENCE: evidence}
            file.write_table(schema.fill(pa.table(columns), form), group)
    return ours


@pytest.mark.trial
def test_a_million_tiles_need_300_mb(tmp_path):
    """In GeoJSON. Of the heat map, a hundred times the tiles need little more than its thumbnail."""
    few, many = large(f"{tmp_path}/few", 100), large(f"{tmp_path}/many", 1_000)
    found = {what: (peak(few, what), peak(many, what)) for what in ("geojson", "all")}
    print(*(f"{what}: {some:.0f} and {all_:.0f} MB" for what, (some, all_) in found.items()))
    assert found["geojson"][1] <= 300
    assert found["all"][1] - found["all"][0] <= 80
    with gzip.open(f"{slides.folder(many.uri, 's.svs')}/tiles.geojson.gz", "rt") as file:
        names = [json.loads(line.rstrip(",\n"))["properties"]["name"] for line in file if '"Feature"' in line]
    table = storage.dataset(many.predictions_uri).to_table([schema.IMAGE_ID])
    assert names == table[schema.IMAGE_ID].to_pylist()


@pytest.mark.real
def test_a_real_slide_is_described_by_its_tiles(tmp_path, real_data):
    content = (real_data / "slides" / NAME).read_bytes()
    ours, tiles, plans = planned(tmp_path, {NAME: content}, FIELD)
    rows, probability, log_odds = scored(ours, tiles)
    (row,) = slides.write_slides(ours, plans, none(), card()).to_pylist()
    check(ours, plans[0], rows, row, probability, log_odds)
    known = (schema.WIDTH_PX, schema.HEIGHT_PX, schema.TISSUE_AREA_MM2, schema.URI)
    uri = str(tmp_path / "in" / NAME)
    assert [row[name] for name in known] == [2220, 2967, plans[0].tissue_area_mm2, uri]
    assert row[schema.MPP] == pytest.approx(0.499)


@pytest.mark.parametrize("output", ["/data/out", "s3://b/out"])
def test_files_of_any_slide_id_are_inside_the_output(output):
    """In a manifest without ids, a slide is called by its URI."""
    names = ["a/s.svs", "s3://b/a/s.svs", "/a/s.svs", "../../a/s.svs", "./a/s.svs", "a//s.svs", "..", "/"]
    names += ["gs://b/a/s.svs", "b/a/s.svs"]
    found = [slides.folder(output, name) for name in names]
    assert found[0] == f"{output}/slides/a/s.svs"
    assert found[1].startswith(f"{output}/slides/b/a/s.svs-")
    assert all(posixpath.normpath(path.partition("://")[2] or path).find("out/slides/") > 0 for path in found)
    assert len(set(found)) == len(names)


@pytest.mark.parametrize("kind", ["absolute", "relative", pytest.param("remote", marks=pytest.mark.process)])
def test_slides_of_a_manifest_have_any_uri(tmp_path, kind, request):
    at = {"absolute": f"{tmp_path}/in", "relative": "../in"}
    at["remote"] = f"{request.getfixturevalue('s3')}/{tmp_path.name}" if kind == "remote" else ""
    storage.write_bytes(f"{at['remote'] or f'{tmp_path}/in'}/s.tif", stained())
    storage.write_bytes(f"{tmp_path}/lists/m.csv", f"uri\n{at[kind]}/s.tif\n".encode())
    ours = ledger.Ledger(claimed(f"{tmp_path}/out"), "0", ())
    inputs = archive.list_inputs(f"{tmp_path}/lists/m.csv").table
    tiles = pa.concat_tables(tiling.expand(inputs, SYNTHETIC, ours.plans_uri, frozenset()))
    plan = tiling.read_plan(ours.plans_uri, f"{at[kind]}/s.tif")
    rows, probability, log_odds = scored(ours, tiles)
    check(
        ours,
        plan,
        rows,
        *slides.write_slides(ours, [plan], none(), card()).to_pylist(),
        probability,
        log_odds,
    )
    written = [path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("heatmap.png")]
    assert written == [("out", "slides")]


def test_the_heat_map_covers_the_tissue(tmp_path):
    """White glass stays white; the first tile's colour is that of its probability."""
    ours, tiles, plans = planned(tmp_path, {"s.tif": stained()}, SYNTHETIC)
    rows, *_ = scored(ours, tiles)
    write(ours, [row | {schema.PROBABILITY_MALIGNANT: float(i > 0)} for i, row in enumerate(rows)])
    slides.write_slides(ours, plans, none(), card())
    page = image.decode(storage.read_bytes(f"{slides.folder(ours.uri, 's.tif')}/heatmap.png"))
    left = (page.shape[1] - 200) // 2
    first, second, glass = (page[15, left + x].astype(int) for x in (20, 60, 180))
    assert first[2] > first[0] + 50
    assert second[0] > second[2] + 50
    assert np.ptp(glass) <= 1


def test_tiles_in_error_are_counted_and_keep_their_place(tmp_path):
    ours, tiles, plans = planned(tmp_path, {"s.tif": stained()}, SYNTHETIC)
    rows, probability, _ = scored(ours, tiles)
    lost = [schema.LOGIT, schema.PROBABILITY_MALIGNANT, schema.PREDICTED_CLASS]
    lost += [schema.WIDTH_PX, schema.HEIGHT_PX]
    broken = [row | dict.fromkeys(lost) | {schema.ERROR: "unreadable"} for row in rows[:4]]
    write(ours, broken + rows[4:])
    (row,) = slides.write_slides(ours, plans, none(), card()).to_pylist()
    assert (row[schema.TILES], row[schema.ERROR_TILES]) == (15, 4)
    assert row[schema.MALIGNANT_TILE_SHARE] == pytest.approx(np.mean(probability[4:] >= 0.5))
    assert row[ORDER[2]] == pytest.approx(np.median(probability[4:]))
    found = features(ours, "s.tif")
    assert [set(feature["properties"]) for feature in found[:4]] == [
        {"objectType", "name", "measurements"}
    ] * 4
    assert found[1]["geometry"]["coordinates"][0][:3] == [[40, 0], [80, 0], [80, 30]]
    write(ours, [row | dict.fromkeys(lost) | {schema.ERROR: "unreadable"} for row in rows])
    (row,) = slides.write_slides(ours, plans, none(), card()).to_pylist()
    assert (row[schema.ERROR_TILES], row[schema.MALIGNANT_TILE_SHARE], row[ORDER[0]]) == (15, None, None)


def test_tiles_of_a_model_of_subtypes_have_its_classes_and_log_odds(tmp_path):
    ours, tiles, plans = planned(tmp_path, {"s.tif": stained()}, SYNTHETIC)
    _, _, odds = scored(ours, tiles, classes("subtype"))
    subtypes = card(target="subtype", classes=classes("subtype"))
    (row,) = slides.write_slides(ours, plans, none(), subtypes).to_pylist()
    found = Counter(feature["properties"]["classification"]["name"] for feature in features(ours, "s.tif"))
    assert found.keys() == {"A", "DC"}
    assert row[schema.MALIGNANT_TILE_SHARE] == pytest.approx(found["DC"] / 15)
    # Four benign and three malignant classes with logit 0 beside the one.
    written = [feature["properties"]["measurements"]["log_odds"] for feature in features(ours, "s.tif")]
    assert written == pytest.approx(np.logaddexp(odds, np.log(3)) - np.log(4), rel=1e-4)


def test_a_second_generation_keeps_the_rows_of_the_first(tmp_path):
    ours, tiles, plans = planned(tmp_path, {"s.tif": stained()}, SYNTHETIC)
    scored(ours, tiles)
    broken = {
        schema.IMAGE_ID: "t.svs",
        schema.SLIDE: "t.svs",
        schema.URI: "/t.svs",
        schema.ERROR: "too_coarse",
    }
    broken |= {schema.ERROR_MESSAGE: "m", schema.MODEL_ID: "m", schema.BCD_VERSION: "1"}
    failed = pa.Table.from_pylist([broken], schema=schema.predictions(2, 3))
    first = slides.write_slides(ours, plans, failed, card())
    assert first[schema.SLIDE].to_pylist() == ["s.tif", "t.svs"]
    assert first[schema.ERROR].to_pylist() == [None, "too_coarse"]
    assert first[schema.TILES].to_pylist() == [15, None]
    later, tiles, plans = planned(tmp_path, {"a.tif": stained()}, SYNTHETIC, generation=2)
    scored(later, tiles)
    both = slides.write_slides(later, plans, failed, card())
    assert both[schema.SLIDE].to_pylist() == ["a.tif", "s.tif", "t.svs"]
    assert both.slice(1).to_pylist() == first.to_pylist()
    assert slides.write_slides(later, plans, failed, card()).equals(both)
    assert Image.open(io.BytesIO(storage.read_bytes(f"{slides.folder(ours.uri, 's.tif')}/heatmap.png")))
