"""Regions of interest, read from GeoJSON, and the outline of a tissue mask, written as GeoJSON.

GeoJSON has the frame of QuPath, pixels of level 0 from the slide's bounds on; here polygons are in pixels of
level 0 from the upper left of the whole slide. What cannot be used raises ImageError `bad_regions`.

A polygon is filled line by line, four lines to a pixel of the thumbnail: between two of its vertices the
share of a pixel is exact, since a straight edge crosses the middle of a line where it does on average.
"""

import json
import math
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from bcd.errors import ImageError
from bcd.slides import tissue

# A region drawn by hand has some hundred positions. These take 0.2 GB of memory to read.
MAX_BYTES = 2**25
# Of scan lines and edges.
MAX_CROSSINGS = 10_000_000
LINES_PER_PX = 4
# A position outside of the slide by up to this was rounded.
MARGIN_PX = 1.0
# Share of a polygon's area that it may enclose twice, or the wrong way round, for rounded positions.
MAX_FOLDED = 0.001
# QuPath's class for what is not to be used.
EXCLUDED = "Ignore*"
NO_REGIONS = {"detection", "cell", "tile"}
TISSUE, TISSUE_RGB = "Tissue", [0, 158, 115]

# The exterior ring of a polygon and its holes, each float (n, 2), closed.
Polygon = list[np.ndarray]


@dataclass(frozen=True)
class Lines:
    """Crossings of scan lines with polygons, sorted by polygon, line and x.

    `step` is 1 where a line enters the polygon, and -1 where it leaves; a polygon is that of region `owner`.
    """

    polygon: np.ndarray
    line: np.ndarray
    x: np.ndarray
    step: np.ndarray
    owner: np.ndarray

    def coverage(self, chosen: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
        """Share of each pixel that the chosen regions, bool (regions,), cover, float64 (h, w), in the box
        around them on a thumbnail of a shape; and the left and upper edge of the box."""
        used = chosen[self.owner[self.polygon]]
        row, x = self.line[used] // LINES_PER_PX, np.clip(self.x[used], 0, shape[1])
        if not len(x):
            return np.zeros((0, 0)), (0, 0)
        left, top = int(x.min()), int(row.min())
        width, height = math.ceil(x.max()) - left, int(row.max()) - top + 1
        # Each crossing changes all pixels to its right, and the one that it divides in part.
        column = np.floor(x).astype(np.int64)
        part, place = x - column, (row - top) * (width + 2) + column - left
        places, shares = np.concatenate([place, place + 1]), np.concatenate([1 - part, part])
        changes = np.tile(self.step[used] / LINES_PER_PX, 2) * shares
        total = np.bincount(places, changes, minlength=height * (width + 2)).reshape(height, width + 2)
        return np.clip(total.cumsum(1)[:, :width].round(9), 0, 1), (left, top)


@dataclass(frozen=True)
class Regions:
    """Regions of a slide on its thumbnail: names, which of them are excluded, and their scan lines."""

    names: tuple[str | None, ...]
    excluded: np.ndarray
    lines: Lines
    shape: tuple[int, int]

    def mask(self) -> np.ndarray:
        """Share of each pixel of the thumbnail within a region, float64 (h, w)."""
        return self._whole(~self.excluded) * (1 - self._whole(self.excluded))

    def _whole(self, chosen: np.ndarray) -> np.ndarray:
        found = np.zeros(self.shape)
        part, (left, top) = self.lines.coverage(chosen, self.shape)
        found[top : top + part.shape[0], left : left + part.shape[1]] = part
        return found

    def names_of(self, boxes: np.ndarray) -> list[str | None]:
        """The name of the region that covers most of each box, (n, 4) in pixels of the thumbnail."""
        best, found = np.zeros(len(boxes)), np.full(len(boxes), None, object)
        for name in dict.fromkeys(self.names):
            same = np.array([other == name for other in self.names]) & ~self.excluded
            part, corner = self.lines.coverage(same, self.shape)
            starts, ends = boxes[:, :2] - corner, boxes[:, :2] + boxes[:, 2:] - corner
            near = np.flatnonzero(((starts < part.shape[::-1]) & (ends > 0)).all(1))
            share = tissue.fraction(part, boxes[near] - [*corner, 0, 0])
            found[near[share > best[near]]] = name
            best[near] = np.maximum(best[near], share)
        return found.tolist()


def read_regions(
    content: bytes, size_px: tuple[int, int], bounds_px: tuple[int, int], shape: tuple[int, int], scale: float
) -> Regions:
    """The regions of a slide in a file of GeoJSON.

    Args:
        content: a FeatureCollection, a list of Features, or one Feature.
        size_px: width and height of level 0.
        bounds_px: upper left corner of what QuPath shows of it.
        shape: height and width of the thumbnail.
        scale: its pixels per level-0 pixel.
    """
    names, excluded, polygons, owner = list[str | None](), list[bool](), list[Polygon](), list[int]()
    for number, feature in enumerate(_features(content), 1):
        try:
            found = _polygons(feature)
            for ring in (ring for polygon in found for ring in polygon):
                ring += bounds_px
                _require_inside(ring, size_px, bounds_px)
        except ValueError as fault:
            raise _fault(f"feature {number}: {fault}") from None
        name, kind = _name(feature)
        names.append(name or kind)
        excluded.append(kind == EXCLUDED)
        polygons += found
        owner += [number - 1] * len(found)
    if all(excluded):
        raise _fault("it has no region; draw one, or score without --regions")
    lines = _lines([[ring * scale for ring in polygon] for polygon in polygons], owner, shape)
    _require_simple(lines)
    return Regions(tuple(names), np.array(excluded), lines, shape)


def _fault(message: str) -> ImageError:
    return ImageError("bad_regions", message)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _features(content: bytes) -> list[dict[str, Any]]:
    try:
        document = json.loads(content, parse_constant=_refuse)
    except RecursionError:
        raise _fault("it is nested too deeply for GeoJSON") from None
    except ValueError as fault:
        raise _fault(f"it is no JSON: {fault}") from None
    if isinstance(document, dict) and document.get("type") == "FeatureCollection":
        document = document.get("features")
    features = [document] if isinstance(document, dict) else document
    if not isinstance(features, list):
        raise _fault("expected a FeatureCollection or a list of Features, as QuPath exports annotations")
    return features


def _polygons(feature: Any) -> list[Polygon]:
    """The polygons of a Feature; raises ValueError."""
    if not isinstance(feature, dict) or feature.get("type") != "Feature":
        raise ValueError("expected a Feature")
    kind = _properties(feature).get("objectType")
    if kind in NO_REGIONS:
        raise ValueError(f"a {kind} is no region: export annotations only")
    geometry = feature.get("geometry")
    form = geometry.get("type") if isinstance(geometry, dict) else None
    if not isinstance(geometry, dict) or form not in ("Polygon", "MultiPolygon"):
        raise ValueError(f"its geometry is {form}; expected Polygon or MultiPolygon, so draw an area")
    coordinates = geometry.get("coordinates")
    parts = [coordinates] if form == "Polygon" else coordinates
    if not isinstance(parts, list) or not parts or not all(isinstance(p, list) and p for p in parts):
        raise ValueError("its coordinates are no lists of rings")
    return [[_ring(ring) for ring in part] for part in parts]


def _ring(positions: Any) -> np.ndarray:
    try:
        ring = np.array(positions)
    except ValueError:
        ring = np.array(None)
    if ring.dtype.kind not in "iuf" or ring.ndim != 2 or not 2 <= ring.shape[1] <= 3:
        raise ValueError("its coordinates are no lists of positions [x, y]")
    ring = ring[:, :2].astype(float)
    if len(ring) < 4 or (ring[0] != ring[-1]).any():
        raise ValueError("a ring is not closed: its last position must be its first, after three others")
    if not np.isfinite(ring).all():
        raise ValueError("a position is not finite")
    return ring


def _require_inside(ring: np.ndarray, size_px: tuple[int, int], bounds_px: tuple[int, int]) -> None:
    outside = (ring < -MARGIN_PX) | (ring > np.add(size_px, MARGIN_PX))
    if outside.any():
        x, y = ring[outside.any(1)][0] - bounds_px
        width, height = np.subtract(size_px, bounds_px)
        raise ValueError(
            f"position ({x:g}, {y:g}) is outside of the slide, which ends at ({width}, {height}); expected "
            "pixels of level 0, x first, as QuPath shows this slide: is it the file of another one?"
        )


def _properties(feature: dict[str, Any]) -> dict[str, Any]:
    found = feature.get("properties")
    return found if isinstance(found, dict) else {}


def _name(feature: dict[str, Any]) -> tuple[str | None, str | None]:
    """The name of a region and of its class."""
    properties = _properties(feature)
    kind = properties.get("classification")
    found = [properties.get("name"), kind.get("name") if isinstance(kind, dict) else None]
    name, kind = [one if isinstance(one, str) and one.strip() else None for one in found]
    return name, kind


def _lines(polygons: Sequence[Polygon], owner: Sequence[int], shape: tuple[int, int]) -> Lines:
    """Scan lines over polygons in pixels of the thumbnail."""
    ends, polygon, way = [], [], []
    for number, rings in enumerate(polygons):
        for i, ring in enumerate(rings):
            ends.append(np.hstack([ring[:-1], ring[1:]]))
            polygon += [number] * len(ends[-1])
            way += [_turn(ring) * (-1 if i else 1)] * len(ends[-1])
    edges, numbers, ways = np.concatenate(ends), np.array(polygon), np.array(way)
    y = edges[:, [1, 3]] * LINES_PER_PX - 0.5
    n_lines = shape[0] * LINES_PER_PX
    first = np.clip(np.ceil(y.min(1)), 0, n_lines).astype(np.int64)
    counts = np.clip(np.ceil(y.max(1)), 0, n_lines).astype(np.int64) - first
    if counts.sum() > MAX_CROSSINGS:
        raise _fault("the regions have too much detail; simplify them")
    edge = np.repeat(np.arange(len(edges)), counts)
    line = np.arange(len(edge)) - np.repeat(counts.cumsum() - counts, counts) + first[edge]
    x0, y0, x1, y1 = edges[edge].T
    x = x0 + ((line + 0.5) / LINES_PER_PX - y0) * (x1 - x0) / (y1 - y0)
    step = -np.sign(y1 - y0) * ways[edge]
    order = np.lexsort((x, line, numbers[edge]))
    return Lines(numbers[edge][order], line[order], x[order], step[order], np.array(owner))


def _turn(ring: np.ndarray) -> int:
    """Sign of the area of a ring, by the trapezoid formula; 1 for none."""
    x, y = (ring - ring[0]).T
    return 1 if (x[:-1] * y[1:] - x[1:] * y[:-1]).sum() >= 0 else -1


def _require_simple(lines: Lines) -> None:
    """Refuse polygons whose edges cross, or whose holes are not within them: their inside is not defined."""
    depth = lines.step.cumsum()[:-1]
    width = np.where(depth == 0, 0, np.diff(lines.x))  # 0 between lines, and between polygons
    polygon, n = lines.polygon[:-1], len(lines.owner)
    right, all_ = (np.bincount(polygon[at], width[at], n) for at in (depth == 1, depth != 0))
    wrong = np.flatnonzero(all_ - right > MAX_FOLDED * all_)
    if len(wrong):
        raise _fault(
            f"feature {lines.owner[wrong[0]] + 1}: its edges cross, or a hole is not within it; draw it "
            "again, or repair it by Simplify shape or Split annotations in QuPath"
        )


def tissue_geojson(slide_id: str, mask: np.ndarray, scale: float, bounds_px: tuple[int, int]) -> bytes:
    """The outline of a tissue mask, bool (h, w) of `scale` pixels per level-0 pixel, as one annotation for
    QuPath, in its frame."""
    polygons = [
        [((ring + 0.5) / scale - bounds_px).round(1).tolist() for ring in rings] for rings in outlines(mask)
    ]
    feature = {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{slide_id}#{TISSUE}")),
        "geometry": {"type": "MultiPolygon", "coordinates": polygons},
        "properties": {
            "objectType": "annotation",
            "name": TISSUE,
            "classification": {"name": TISSUE, "color": TISSUE_RGB},
        },
    }
    document = {"type": "FeatureCollection", "features": [feature]}
    return json.dumps(document, separators=(",", ":")).encode()


def outlines(mask: np.ndarray) -> Iterator[Polygon]:
    """Polygons around the True pixels of a mask, with their holes: the first ring goes round the outside. A
    position is in pixels, whole numbers at their centres; corners are cut by an eighth of a pixel."""
    from contourpy import FillType, contour_generator  # drivers need none of it

    padded = np.pad(mask, 1).astype(np.float32)
    traced = contour_generator(z=padded, fill_type=FillType.OuterOffset).filled(0.5, np.inf)
    for points, offsets in zip(*traced, strict=True):
        yield [_straightened(points[a:b] - 1) for a, b in pairwise(offsets)]


def _straightened(ring: np.ndarray) -> np.ndarray:
    """Without the positions on a straight line between their neighbours."""
    at = ring[:-1]
    (x0, y0), (x1, y1) = (at - np.roll(at, 1, 0)).T, (np.roll(at, -1, 0) - at).T
    kept = at[x0 * y1 != x1 * y0]
    return np.vstack([kept, kept[:1]])
