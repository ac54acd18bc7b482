import io
import json
import uuid

import jsonschema
import numpy as np
import pytest
from PIL import Image

from bcd.imaging import image
from bcd.reports import heatmap
from bcd.slides import slide, tile
from tests import pictures

NUMBERS = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
COLOR = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": 255},
    "minItems": 3,
    "maxItems": 3,
}
# What QuPath's PathObjectTypeAdapter reads (qupath-core, since 0.4), and GeoJSON asks (RFC 7946, 3.1.6).
QUPATH = {
    "type": "object",
    "required": ["type", "features"],
    "properties": {
        "type": {"const": "FeatureCollection"},
        "features": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "id", "geometry", "properties"],
                "additionalProperties": False,
                "properties": {
                    "type": {"const": "Feature"},
                    "id": {"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"},
                    "geometry": {
                        "type": "object",
                        "required": ["type", "coordinates"],
                        "properties": {
                            "type": {"const": "Polygon"},
                            "coordinates": {
                                "type": "array",
                                "minItems": 1,
                                "maxItems": 1,
                                "items": {"type": "array", "items": NUMBERS, "minItems": 4},
                            },
                        },
                    },
                    "properties": {
                        "type": "object",
                        "required": ["objectType", "name", "measurements"],
                        "additionalProperties": False,
                        "properties": {
                            "objectType": {"enum": ["tile", "detection", "annotation"]},
                            "name": {"type": "string"},
                            "classification": {
                                "type": "object",
                                "required": ["name", "color"],
                                "additionalProperties": False,
                                "properties": {"name": {"type": "string", "minLength": 1}, "color": COLOR},
                            },
                            "measurements": {
                                "type": "object",
                                "additionalProperties": {"type": "number"},
                            },
                        },
                    },
                },
            },
        },
    },
}
WHITE = np.full((100, 200, 3), 255, np.uint8)


def test_colour_says_the_class_and_its_strength_the_certainty():
    boxes = np.array([[0, 0, 40, 40], [40, 0, 40, 40], [80, 0, 40, 40], [120, 0, 40, 40], [160, 0, 40, 40]])
    drawn = heatmap.draw_tiles(WHITE, 1.0, boxes, np.array([0.0, 0.3, 0.5, 0.7, 1.0]), 0.5).astype(int)
    red_less_blue = [int(drawn[20, x, 0] - drawn[20, x, 2]) for x in (20, 60, 100, 140, 180)]
    assert red_less_blue == sorted(red_less_blue)
    assert red_less_blue[0] < -100
    assert abs(red_less_blue[2]) <= 2
    assert red_less_blue[4] > 100


@pytest.mark.parametrize("threshold", [0.02, 0.3, 0.5, 0.93])
def test_the_colours_part_where_the_classes_do(threshold):
    """A tile just below the threshold is no redder than blue, one just above no bluer than red."""
    probability = np.array([0, threshold - 0.01, threshold, threshold + 0.01, 1])
    boxes = np.array([[40 * i, 0, 40, 40] for i in range(5)])
    drawn = heatmap.draw_tiles(WHITE, 1.0, boxes, probability, threshold).astype(int)
    red_less_blue = [int(drawn[20, x, 0] - drawn[20, x, 2]) for x in (20, 60, 100, 140, 180)]
    assert [np.sign(value) for value in red_less_blue] == [-1, -1, 0, 1, 1]
    ends = heatmap.draw_tiles(WHITE, 1.0, boxes, probability, 0.5)
    np.testing.assert_array_equal(drawn[20, [20, 180]], ends[20, [20, 180]])


@pytest.mark.parametrize(("threshold", "signs"), [(0.0, [0, 1, 1]), (1.0, [-1, -1, 0])])
def test_a_threshold_at_an_end_leaves_one_colour(threshold, signs):
    place = heatmap._place(np.array([0.0, 0.5, 1.0]), threshold)
    assert [np.sign(value) for value in place - 0.5] == signs
    assert place.min() >= 0
    assert place.max() <= 1


@pytest.mark.parametrize("threshold", [0.004, 0.31, 0.5, 0.996])
def test_the_legend_states_the_threshold(threshold):
    """The bar is white at the threshold, and with a dark line; the words stay on the page."""
    strip = np.asarray(heatmap._footer(2000, 0.01, threshold).convert("RGB")).astype(int)
    bar = strip[int(strip.shape[0] * 0.46)]
    left, right = 0.03 * 2000, 0.33 * 2000
    dark = np.flatnonzero((bar.sum(1) < 200) & (np.abs(np.arange(2000) - (left + right) / 2) < 305))
    inside = dark[(dark > left + 6) & (dark < right - 6)]
    if 0.05 < threshold < 0.95:
        assert inside.mean() == pytest.approx(left + threshold * (right - left), abs=4)
    assert (strip[:, [0, -1]] == 255).all()


def test_the_legend_of_other_values_is_at_their_places():
    """A bar from 0 to 1 with a tick below each label."""
    legend = heatmap.Legend("attention", ((0.2, "1/4"), (0.8, "4")), "1")
    strip = np.asarray(heatmap._footer(2000, 0.01, 0.5, legend=legend).convert("L")).astype(int)
    plain = np.asarray(heatmap._footer(2000, 0.01, 0.5).convert("L")).astype(int)
    changed = np.flatnonzero((strip != plain).any(0))
    assert changed.max() < 0.35 * 2000  # the rest of the footer is as always
    below = strip[int(strip.shape[0] * 0.57)]
    ticks = np.flatnonzero(below < 200)
    for place in (0.2, 0.8):
        assert np.abs(ticks - 2000 * (0.03 + 0.3 * place)).min() <= 2


def test_a_tile_colours_its_own_pixels_only():
    drawn = heatmap.draw_tiles(WHITE, 0.5, np.array([[100, 60, 80, 40]]), np.array([0.9]), 0.5)
    coloured = (drawn != 255).any(-1)
    expected = np.zeros((100, 200), bool)
    expected[30:50, 50:90] = True
    np.testing.assert_array_equal(coloured, expected)


def test_overlapping_tiles_give_the_colour_of_their_mean():
    """Three tiles of 40 px, 20 px apart: each part has the colour that one tile of the mean has."""
    boxes, probability = np.array([[20 * i, 10, 40, 40] for i in range(3)]), np.array([0.1, 0.7, 0.4])
    drawn = heatmap.draw_tiles(WHITE, 1.0, boxes, probability, 0.5)
    alone = np.array([[40 * i, 10, 40, 40] for i in range(4)])
    means = heatmap.draw_tiles(WHITE, 1.0, alone, np.array([0.1, 0.4, 0.55, 0.4]), 0.5)
    np.testing.assert_array_equal(drawn[30, [10, 30, 50, 70]], means[30, [20, 60, 100, 140]])
    # The edge is that of the whole, not of each tile: only the first and last row and column.
    line = drawn[30, :80].astype(int)
    assert [x for x in range(1, 80) if (line[x] != line[x - 1]).any()] == [1, 20, 40, 60, 79]
    assert (drawn[:10] == 255).all()
    assert (drawn[:, 80:] == 255).all()


def test_overlapping_tiles_are_hatched_where_half_are_unlike():
    boxes = np.array([[0, 0, 40, 40], [0, 0, 40, 40], [40, 0, 40, 40], [40, 0, 40, 40], [40, 0, 40, 40]])
    unlike = np.array([True, False, True, False, False])
    arguments = WHITE, 1.0, boxes, np.full(5, 0.9), 0.5
    changed = (heatmap.draw_tiles(*arguments, unlike) != heatmap.draw_tiles(*arguments)).any(-1)
    assert changed[:40, :40].mean() == pytest.approx(1 / 3, abs=0.02)
    assert not changed[:, 40:].any()


def test_many_tiles_are_drawn_at_once():
    """As the mean over tiles one by one, within rounding of a colour."""
    rng = np.random.default_rng(0)
    boxes = np.column_stack([rng.integers(-20, 200, 500), rng.integers(-20, 100, 500), *[[30] * 500] * 2])
    probability = rng.random(500)
    count, total = np.zeros((100, 200)), np.zeros((100, 200))
    for (x, y, w, h), p in zip(boxes, probability, strict=True):
        part = slice(max(0, y), max(0, y + h)), slice(max(0, x), max(0, x + w))
        count[part] += 1
        total[part] += p
    edges = heatmap._edges(1.0, boxes)
    np.testing.assert_array_equal(heatmap._over(edges, np.ones(500), count.shape), count)
    np.testing.assert_allclose(heatmap._over(edges, probability, count.shape), total, atol=1e-9)


def test_outlines_are_on_the_edge_of_tissue_and_regions():
    tissue, regions = np.zeros((100, 200), bool), np.zeros((100, 200), bool)
    tissue[20:60, :80] = True
    regions[30:90, 40:150] = True
    drawn = image.decode(heatmap.outlined_jpeg(WHITE, tissue, regions)).astype(int)
    green, blue = drawn[20, 30], drawn[60, 149]
    assert green[1] > green[0] + 60
    assert blue[2] > blue[0] + 60
    assert (drawn[40, [10, 60, 100, 180]] > 240).all()
    assert (drawn[40, 0] > 200).all()  # the edge of the slide is none


def test_tiles_without_a_probability_keep_no_colour():
    picture = pictures.gradient(100, 200)
    nothing = heatmap.draw_tiles(picture, 1.0, np.empty((0, 4)), np.empty(0), 0.5)
    unknown = heatmap.draw_tiles(picture, 1.0, np.array([[0, 0, 50, 50]]), np.array([np.nan]), 0.5)
    np.testing.assert_array_equal(nothing, unknown)
    assert (nothing[..., 0] == nothing[..., 2]).all()


def test_a_tile_at_one_half_is_seen_by_its_edge():
    drawn = heatmap.draw_tiles(WHITE, 1.0, np.array([[20, 20, 40, 40]]), np.array([0.5]), 0.5)
    assert (drawn[20, 20:60] < 230).all()
    assert (drawn[30:50, 30:50] >= 254).all()


@pytest.mark.parametrize(
    "box", [(190, 90, 40, 40), (300, 0, 40, 40), (199.9, 99.9, 0.1, 0.1), (0, 0, 0.2, 0.2)]
)
def test_tiles_at_the_edge_and_tiny_ones_are_no_error(box):
    assert heatmap.draw_tiles(WHITE, 1.0, np.array([box]), np.array([0.9]), 0.5).shape == WHITE.shape


def test_tiles_lie_on_the_thumbnail_of_the_real_slide(real_data):
    with slide.open_slide(real_data / "slides/CMU-1-Small-Region.svs") as opened:
        thumbnail, scale = opened.thumbnail(1000)
        grid = tile.grid(opened.width_px, opened.height_px, (opened.mpp_x, opened.mpp_y), 0.49, 700, 460)
        boxes = grid.boxes()[9:10]
        x, y, width, height = (int(value) for value in boxes[0])
        read = opened.read(x, y, 0, width, height)
        page = Image.open(io.BytesIO(heatmap.heatmap_png(thumbnail, scale, opened.mpp_x, 0.5)))
    assert (x, y) == (687, 903)
    grey = heatmap.draw_tiles(thumbnail, scale, np.empty((0, 4)), np.empty(0), 0.5)
    drawn = heatmap.draw_tiles(thumbnail, scale, boxes, np.array([0.9]), 0.5)
    rows, columns = np.nonzero((drawn != grey).any(-1))
    left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    ends = np.array([x, y, x + width, y + height]) * scale
    np.testing.assert_allclose([left, top, right, bottom], ends, atol=0.5)
    # what was read for the tile is what the thumbnail shows below its colour
    small = np.asarray(Image.fromarray(read).resize((right - left, bottom - top), Image.Resampling.BOX), int)
    shown = thumbnail[top:bottom, left:right].astype(int)
    assert np.corrcoef(small.ravel(), shown.ravel())[0, 1] > 0.97
    # the page keeps the thumbnail pixel for pixel
    np.testing.assert_array_equal(np.asarray(page)[:1000, : thumbnail.shape[1]], thumbnail)
    # the polygon in QuPath is the tile that was read
    (feature,) = heatmap.tile_features(["a"], boxes, ["benign"], {})
    (ring,) = json.loads(feature)["geometry"]["coordinates"]
    assert ring == [[687, 903], [1374, 903], [1374, 1355], [687, 1355], [687, 903]]


def test_a_narrow_slide_is_centred_on_a_page_wide_enough_to_read():
    picture = pictures.gradient(400, 100)
    page = np.asarray(Image.open(io.BytesIO(heatmap.heatmap_png(picture, 0.05, 0.25, 0.5))))
    left = (heatmap.MIN_WIDTH_PX - 100) // 2
    assert page.shape[1] == heatmap.MIN_WIDTH_PX
    np.testing.assert_array_equal(page[:400, left : left + 100], picture)
    assert (page[:400, :left] == 255).all()
    assert (page[400:] < 100).any()


@pytest.mark.parametrize(
    ("limit", "length"), [(0.35, 0.2), (0.2, 0.2), (1.0, 1), (4.9, 2), (7.3, 5), (0.06, 0.05), (12, 10)]
)
def test_the_scale_bar_is_a_round_number_of_mm(limit, length):
    assert heatmap._round_length(limit) == pytest.approx(length)


@pytest.mark.parametrize("mpp", [0.25, 0.499])
def test_the_scale_bar_is_as_long_as_it_says(mpp):
    footer = np.asarray(heatmap._footer(2000, mpp / 0.1 / 1000, 0.5).convert("L"))
    # the longest dark run right of the legend
    dark = (footer[:, 700:1600] < 80).sum(1).max()
    length_mm = heatmap._round_length(0.25 * 2000 * mpp / 0.1 / 1000)
    assert dark * mpp / 0.1 / 1000 == pytest.approx(length_mm, rel=0.01)


def read(*blocks):
    """What a reader of JSON finds; like many, and unlike Python's by default, it rejects NaN."""
    content = b"".join(heatmap.geojson(blocks))
    return json.loads(content, parse_constant=lambda name: pytest.fail(name))


def collection():
    grid = tile.grid(2220, 2967, (0.499, 0.499), 0.49, 700, 460)
    ids = [tile.tile_id("a.svs", x, y, 0.49) for x, y in zip(grid.x_level0_px, grid.y_level0_px, strict=True)]
    probability = np.linspace(0, 1, len(grid), dtype=np.float32)
    probability[0] = np.nan
    predicted = [None, *("malignant" if p >= 0.5 else "benign" for p in probability[1:])]
    measurements = {"probability_malignant": probability, "log_odds": 8 * probability - 4}
    found = heatmap.tile_features(ids, grid.boxes(), predicted, measurements)
    return ids, grid, read(found[:3], [], found[3:])


def test_qupath_can_read_the_tiles():
    ids, grid, written = collection()
    jsonschema.validate(written, QUPATH)
    assert len(written["features"]) == len(grid)
    last = written["features"][-1]
    assert last["properties"] == {
        "objectType": "tile",
        "name": ids[-1],
        "classification": {"name": "malignant", "color": [213, 94, 0]},
        "measurements": {"probability_malignant": 1.0, "log_odds": 4.0},
    }
    assert last["id"] == str(uuid.uuid5(uuid.NAMESPACE_URL, ids[-1]))
    assert len({feature["id"] for feature in written["features"]}) == len(grid)
    for feature in written["features"]:
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
        assert len(ring) == 5


def test_what_is_not_known_is_left_out():
    ids, _, written = collection()
    assert written["features"][0]["properties"] == {"objectType": "tile", "name": ids[0], "measurements": {}}
    assert read() == read([]) == {"type": "FeatureCollection", "features": []}


def test_names_and_numbers_are_read_as_they_were_written():
    """Names with all that JSON escapes, and numbers to the last bit."""
    name, value = 'a "b"\\/ü\n.svs#0,0,0.49', float(np.float32(0.1)) / 3e7
    feature = read(heatmap.tile_features([name], np.array([[0, 1, 2, 3]]), ['"'], {"ü": np.array([value])}))
    (properties,) = [one["properties"] for one in feature["features"]]
    assert (properties["name"], properties["classification"]["name"]) == (name, '"')
    assert properties["measurements"] == {"ü": value}


def test_rings_turn_as_the_standard_says():
    """Counterclockwise (RFC 7946, 3.1.6), in the frame of the numbers."""
    (feature,) = read(heatmap.tile_features(["a"], np.array([[10, 20, 30, 40]]), [None], {}))["features"]
    x, y = np.array(feature["geometry"]["coordinates"][0]).T
    assert (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2 == 30 * 40


def test_subtypes_have_the_colour_of_their_tumour_class():
    boxes = np.array([[0, 0, 1, 1]] * 4)
    found = read(heatmap.tile_features(list("abcd"), boxes, ["malignant", "DC", "benign", "F"], {}))
    colors = [feature["properties"]["classification"]["color"] for feature in found["features"]]
    assert colors[0] == colors[1] != colors[2] == colors[3] == [0, 114, 178]


def test_tiles_unlike_the_training_data_are_hatched_and_no_others() -> None:
    """One in three pixels is darker, along diagonals that continue from tile to tile; small tiles too."""
    thumbnail = np.full((40, 60, 3), 255, np.uint8)
    boxes = np.array([[0, 0, 20, 20], [20, 0, 20, 20], [40, 0, 3, 3]])
    plain = heatmap.draw_tiles(thumbnail, 1, boxes, np.array([0.9, 0.9, 0.1]), 0.5)
    hatched = heatmap.draw_tiles(
        thumbnail, 1, boxes, np.array([0.9, 0.9, 0.1]), 0.5, np.array([True, False, True])
    )
    darker = (hatched.astype(int) - plain).sum(2) < 0
    assert darker[:20, :20].mean() == pytest.approx(1 / 3, abs=0.02)
    assert 0 < darker[:3, 40:43].mean() < 1
    darker[:20, :20] = darker[:3, 40:43] = False
    assert not darker.any()
    unscored = heatmap.draw_tiles(thumbnail, 1, boxes, np.array([np.nan] * 3), 0.5, np.array([True] * 3))
    assert (unscored == 255).all()
    legends = [heatmap.heatmap_png(hatched, 1, 0.5, 0.5, some) for some in (True, False)]
    assert legends[0] != legends[1]
