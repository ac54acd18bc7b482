import json

import numpy as np
import pytest
import shapely

from bcd.errors import ImageError
from bcd.slides import regions, tissue

SIZE, SHAPE, SCALE = (2000, 1800), (180, 200), 0.1


def square(x, y, side=400, other=None):
    """A closed ring."""
    right, bottom = x + side, y + (other or side)
    return [[x, y], [right, y], [right, bottom], [x, bottom], [x, y]]


def feature(*rings, kind="Polygon", **properties):
    coordinates = list(rings) if kind != "MultiPolygon" else [[ring] for ring in rings]
    geometry = {"type": kind, "coordinates": coordinates}
    return {"type": "Feature", "id": "a", "geometry": geometry, "properties": properties}


def read(*features, bounds=(0, 0), document=None):
    whole = {"type": "FeatureCollection", "features": list(features)}
    content = json.dumps(whole if document is None else document).encode()
    return regions.read_regions(content, SIZE, bounds, SHAPE, SCALE)


def area(found):
    """Pixels of level 0 within the regions."""
    return found.mask().sum() / SCALE**2


@pytest.mark.parametrize("turned", [False, True])
def test_the_area_of_a_polygon_with_a_hole_is_exact(turned):
    rings = [square(205, 305, 400, 200), square(300, 350, 100, 50)]
    rings = [ring[::-1] for ring in rings] if turned else rings
    found = read(feature(*rings))
    assert area(found) == pytest.approx(400 * 200 - 100 * 50)
    mask = found.mask()
    assert mask.shape == SHAPE
    # Its edge divides pixels: x from 20.5 to 60.5, y from 30.5 to 50.5.
    assert [mask[40, x] for x in (19, 20, 21, 60, 61)] == [0, 0.5, 1, 0.5, 0]
    assert [mask[y, 25] for y in (29, 30, 31, 50, 51)] == [0, 0.5, 1, 0.5, 0]
    assert mask[36, 35] == 0


def test_slanted_edges_give_exact_shares():
    """A triangle below a diagonal, of which a box at the diagonal has half."""
    found = read(feature([[0, 0], [1800, 1800], [0, 1800], [0, 0]]))
    assert area(found) == pytest.approx(1800**2 / 2, rel=1e-6)
    boxes = SCALE * np.array([[500, 500, 300, 300], [0, 900, 300, 200], [1200, 100, 300, 300]])
    np.testing.assert_allclose(tissue.fraction(found.mask(), boxes), [0.5, 1, 0], atol=1e-6)


def test_regions_add_up_and_no_place_counts_twice():
    apart = read(feature(square(0, 0), square(1000, 1000), kind="MultiPolygon"), feature(square(0, 400)))
    assert area(apart) == pytest.approx(3 * 400**2)
    assert area(read(feature(square(0, 0)), feature(square(200, 0)))) == pytest.approx(600 * 400)


def test_shares_agree_with_another_library():
    rng = np.random.default_rng(0)
    angle, radius = np.sort(rng.uniform(0, 2 * np.pi, 40)), rng.uniform(300, 900, 40)
    ring = np.column_stack([1000 + radius * np.cos(angle), 900 + radius * np.sin(angle)])
    hole = [[900, 800], [1100, 820], [1050, 1000], [900, 800]]
    found = read(feature([*ring.tolist(), ring[0].tolist()], hole))
    polygon = shapely.Polygon(ring, [hole])
    assert area(found) == pytest.approx(polygon.area, rel=1e-4)
    boxes = np.array([[x, y, 233, 177] for x in range(0, 2000, 133) for y in range(0, 1800, 99)], float)
    shares = [polygon.intersection(shapely.box(x, y, x + w, y + h)).area / (w * h) for x, y, w, h in boxes]
    np.testing.assert_allclose(tissue.fraction(found.mask(), SCALE * boxes), shares, atol=0.01)


def test_coordinates_count_from_the_bounds():
    found = read(feature(square(0, 0)), bounds=(300, 200)).mask()
    rows, columns = np.nonzero(found)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (30, 20, 69, 59)


def test_the_class_of_qupath_for_what_not_to_use_is_cut_out():
    ignored = feature(square(100, 100, 200), classification={"name": "Ignore*"})
    assert area(read(feature(square(0, 0)), ignored)) == pytest.approx(400**2 - 200**2)
    with pytest.raises(ImageError, match="it has no region; draw one"):
        read(ignored)


def test_tiles_have_the_name_of_the_region_that_covers_most():
    found = read(
        feature(square(0, 0), name="one", classification={"name": "Tumor"}),
        feature(square(400, 0), classification={"name": "Stroma"}),
        feature(square(800, 0)),
    )
    boxes = SCALE * np.array([[0, 0, 100, 100], [350, 0, 80, 100], [380, 0, 80, 100], [900, 0, 9, 9]])
    boxes = np.vstack([boxes, SCALE * np.array([[1500, 1500, 100, 100]])])
    assert found.names_of(boxes) == ["one", "one", "Stroma", None, None]


@pytest.mark.parametrize("form", ["collection", "list", "one"])
def test_what_qupath_exports_is_read(form):
    one = feature(square(0, 0), objectType="annotation", isLocked=True)
    one["geometry"]["coordinates"][0] = [[*place, 0] for place in square(0, 0)]
    document = {"collection": {"type": "FeatureCollection", "features": [one]}, "list": [one], "one": one}
    assert area(read(document=document[form])) == pytest.approx(400**2)


BOW_TIE = [[0, 0], [400, 400], [400, 0], [0, 400], [0, 0]]
TWICE = [*square(0, 0), [300, 100], [300, 300], [100, 300], [100, 100], [300, 100], [0, 0]]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([feature([[1, 1], [9, 9]], kind="LineString")], "feature 1: its geometry is LineString; expected"),
        ([feature(square(0, 0)), {"type": "Feature", "geometry": None}], "feature 2: its geometry is None"),
        ([{"type": "Polygon", "coordinates": [square(0, 0)]}], "feature 1: expected a Feature"),
        ([7], "feature 1: expected a Feature"),
        ([feature(square(0, 0), objectType="cell")], "feature 1: a cell is no region: export annotations"),
        ([feature()], "its coordinates are no lists of rings"),
        ([feature(kind="MultiPolygon")], "its coordinates are no lists of rings"),
        ([feature([["0", "0"]] * 4)], "no lists of positions"),
        ([feature([[0], [1], [1, 2], [0]])], "no lists of positions"),
        ([feature(square(0, 0)[:-1])], "a ring is not closed"),
        ([feature([[0, 0], [1, 1], [0, 0]])], "a ring is not closed"),
        ([feature(square(0, 0)), feature(BOW_TIE)], "feature 2: its edges cross"),
        ([feature(TWICE)], "feature 1: its edges cross"),
        ([feature(square(0, 0), square(300, 300))], "or a hole is not within it"),
        (
            [feature(square(1700, 0))],
            r"position \(2100, 0\) is outside of the slide, which ends at \(2000, 1",
        ),
        ([feature(square(-9, 0))], r"position \(-9, 0\) is outside"),
        ([], "it has no region"),
    ],
)
def test_what_says_nothing_or_two_things_is_refused(features, message):
    with pytest.raises(ImageError, match=message) as found:
        read(*features)
    assert found.value.code == "bad_regions"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is no JSON"),
        (b"\xff\x00", "it is no JSON"),
        (b'{"type": "FeatureCollection"}', "expected a FeatureCollection or a list"),
        (b'"text"', "expected a FeatureCollection or a list"),
        (b"[" * 100_000, "nested too deeply"),
        (b'[{"type": "Feature", "geometry": NaN}]', "NaN is no number of JSON"),
        (json.dumps([feature(square(0, 0))]).replace("400", "1e999").encode(), "a position is not finite"),
    ],
)
def test_what_is_no_geojson_is_refused(content, message):
    with pytest.raises(ImageError, match=message) as found:
        regions.read_regions(content, SIZE, (0, 0), SHAPE, SCALE)
    assert found.value.code == "bad_regions"


def test_rounded_positions_are_no_crossing():
    """A spike of one pixel, back and forth on itself, and a position given twice."""
    ring = [[0, 0], [400, 0], [400, 200], [600, 200], [400, 201], [400, 400], [400, 400], [0, 400], [0, 0]]
    assert area(read(feature(ring))) == pytest.approx(400**2, rel=0.01)


def test_detail_is_bounded(monkeypatch):
    monkeypatch.setattr(regions, "MAX_CROSSINGS", 319)
    with pytest.raises(ImageError, match="too much detail; simplify"):
        read(feature(square(0, 0)))  # two edges of 40 pixels, four lines each: 320
    monkeypatch.setattr(regions, "MAX_CROSSINGS", 320)
    read(feature(square(0, 0)))


def test_the_outline_of_tissue_is_read_back_as_it_was():
    mask = np.zeros(SHAPE, bool)
    mask[20:120, 30:150] = True
    mask[50:70, 60:90] = False
    mask[130:150, 130:190] = True
    mask[120, 150] = True  # touches the first by a corner
    content = regions.tissue_geojson("s.svs", mask, SCALE, (70, 30))
    (found,) = json.loads(content)["features"]
    assert found["properties"]["objectType"] == "annotation"
    assert found["properties"]["classification"]["name"] == "Tissue"
    polygons = found["geometry"]["coordinates"]
    assert sorted(map(len, polygons)) == [1, 1, 2]
    assert all(ring[0] == ring[-1] for polygon in polygons for ring in polygon)
    again = regions.read_regions(content, SIZE, (70, 30), SHAPE, SCALE).mask()
    # Corners are cut by an eighth of a pixel.
    assert np.abs(again - mask).max() <= 0.5
    assert again.sum() == pytest.approx(mask.sum(), rel=0.001)
    assert (np.abs(again - mask) > 0.01).sum() < 20


def test_outlines_are_valid_polygons():
    mask = np.random.default_rng(0).random((60, 80)) > 0.4
    found = [shapely.Polygon(rings[0], rings[1:]) for rings in regions.outlines(mask)]
    assert all(polygon.is_valid for polygon in found)
    assert shapely.MultiPolygon(found).is_valid
    assert sum(polygon.area for polygon in found) == pytest.approx(mask.sum(), rel=0.05)


def test_an_empty_mask_has_no_outline():
    assert list(regions.outlines(np.zeros((9, 9), bool))) == []
    (ring,) = next(regions.outlines(np.ones((9, 9), bool)))
    assert (ring.min(), ring.max()) == (-0.5, 8.5)
