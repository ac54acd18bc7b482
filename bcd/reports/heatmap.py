"""Predictions over a whole slide: a heat map as PNG, and tiles for QuPath.

Boxes are x, y, width and height in pixels of level 0, as from `tile.Grid.boxes`.
"""

import io
import json
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from bcd.reports.plots import CLASS_COLOR, STYLE, WIDTH_IN
from bcd.reports.style import BLUE, GREEN, GREY, INK, SOFT, VERMILION
from bcd.taxonomy import tumor_class_of

# White, the middle of an odd number of colours, is at the threshold, where the class changes.
COLORS = LinearSegmentedColormap.from_list("probability", [BLUE, "#ffffff", VERMILION], N=257)
# Share of full colour, and of the tissue's own contrast: structure and probability stay legible.
STRENGTH, CONTRAST = 0.85, 0.6
# Tiles of at least this size have an edge, which distinguishes a white tile from glass that was not scored.
EDGED_PX, EDGE = 8, 0.86
# Distance of the stripes over tiles unlike the training data, and their shade.
HATCH_PX, HATCH = 6, 0.45
# Outlines: share of the longer side of the image, and colours, both far from those of stains.
OUTLINE_SHARE, TISSUE_COLOR, REGION_COLOR = 0.002, GREEN, BLUE
JPEG_QUALITY = 85
FOOTER_IN = 0.62
MIN_WIDTH_PX = 720
# Tiles that are added to a heat map at a time: a slide may have a million.
BLOCK = 2**16


class Legend(NamedTuple):
    """What colours mean: a title, labels at places from 0 to 1, and that of the middle, at the threshold."""

    title: str
    labels: tuple[tuple[float, str], ...]
    middle: str | None = None


PROBABILITY = Legend("probability of malignancy", ((0, "0"), (1, "1")))


def draw_tiles(
    thumbnail: np.ndarray,
    scale: float,
    boxes: np.ndarray,
    probability: np.ndarray,
    threshold: float,
    unlike: np.ndarray | None = None,
) -> np.ndarray:
    """Colour tiles over the slide in grey, blue below and vermilion above the threshold: uint8 (h, w, 3) RGB.

    Where tiles overlap, the colour is that of their mean probability, and hatched where at least half of them
    are unlike the training data.

    Args:
        thumbnail: uint8 (h, w, 3) RGB.
        scale: thumbnail pixels per level-0 pixel.
        boxes: float (n, 4), level-0 pixels.
        probability: float (n,) of malignancy; a tile with NaN has no colour.
        threshold: probability from which a tile is called malignant.
        unlike: bool (n,), tiles unlike the training data, which are hatched: their colour may mean nothing.
    """
    grey = np.asarray(Image.fromarray(thumbnail).convert("L"), np.float32) / 255
    known = np.isfinite(probability)
    hatched = np.zeros(known.shape, bool) if unlike is None else unlike
    edges = _edges(scale, boxes[known])
    # A tile that is too small for an edge is all inside.
    has_edge = (edges[:, 2:] - edges[:, :2]).min(1, initial=EDGED_PX) >= EDGED_PX
    inside = edges + np.outer(has_edge, [1, 1, -1, -1]).astype(np.int32)
    one, shape = np.ones(len(edges)), grey.shape
    count = _over(edges, one, shape)
    mean = _over(edges, probability[known], shape) / np.maximum(count, 1)
    color = np.minimum((_place(mean, threshold) * COLORS.N).astype(np.int16), COLORS.N - 1)
    tint = _tint(np.arange(COLORS.N)).astype(np.float32)[color]
    tint[_over(inside, one, shape) == 0] *= EDGE
    stripes = np.add.outer(*map(np.arange, shape)) % HATCH_PX < HATCH_PX // 3
    tint[stripes & (2 * _over(edges, hatched[known], shape) >= count)] *= HATCH
    tint[count == 0] = 1
    tint *= 255 * (1 - CONTRAST * (1 - grey[..., None]))  # on the paper
    return tint.round(out=tint).astype(np.uint8)


def _over(edges: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """For each pixel, float64 (h, w), the sum of the values of the rectangles over it."""
    height, width = shape
    sums = np.zeros((height + 1) * (width + 1))
    for some in _blocks(len(edges)):
        left, top, right, bottom = np.clip(edges[some], 0, [width, height, width, height]).T
        # Summed up in both directions, four corners are a rectangle.
        corners = np.concatenate([top, bottom, top, bottom]) * (width + 1)
        corners += np.concatenate([left, right, right, left])
        changes = np.concatenate([values[some], values[some], -1 * values[some], -1 * values[some]])
        sums += np.bincount(corners, changes, len(sums))
    total = sums.reshape(height + 1, width + 1)
    for axis in (0, 1):
        np.cumsum(total, axis, out=total)
    return total[:height, :width]


def _tint(place: np.ndarray) -> np.ndarray:
    """Colour of white paper below a tint, float (n, 3), 0 to 1, from places on the colour map."""
    return 1 - STRENGTH * (1 - COLORS(place)[..., :3])


def _place(probability: np.ndarray, threshold: float) -> np.ndarray:
    """Position of probabilities on the colour map, 0 to 1, with the threshold at one half."""
    below = probability / (threshold or 1)
    above = 1 + (probability - threshold) / ((1 - threshold) or 1)
    return np.where(probability < threshold, below, above) / 2


def _edges(scale: float, boxes: np.ndarray) -> np.ndarray:
    """int32 (n, 4): left, top, right and bottom in pixels of the thumbnail, at least one pixel apart."""
    edges = np.empty((len(boxes), 4), np.int32)
    for some in _blocks(len(boxes)):
        start, size = boxes[some, :2], boxes[some, 2:]
        edges[some, :2] = first = (start * scale).round()
        edges[some, 2:] = np.maximum(((start + size) * scale).round(), first + 1)
    return edges


def _blocks(n: int) -> list[slice]:
    """Parts of a range."""
    return [slice(start, start + BLOCK) for start in range(0, n, BLOCK)]


def outlined_jpeg(thumbnail: np.ndarray, tissue: np.ndarray, regions: np.ndarray) -> bytes:
    """A JPEG file of a slide with the outlines of its tissue and of the regions of interest, bool (h, w)."""
    from scipy import ndimage

    drawn = thumbnail.copy()
    width = max(1, round(OUTLINE_SHARE * max(tissue.shape)))
    for area, color in ((tissue, TISSUE_COLOR), (regions, REGION_COLOR)):
        # The edge of the slide is no outline.
        inner = ndimage.binary_erosion(area, iterations=width, border_value=1)
        drawn[area & ~inner] = [round(255 * part) for part in to_rgb(color)]
    file = io.BytesIO()
    Image.fromarray(drawn).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def heatmap_png(
    coloured: np.ndarray,
    scale: float,
    mpp: float,
    threshold: float,
    hatched: bool = False,
    legend: Legend = PROBABILITY,
) -> bytes:
    """A PNG file of the coloured slide with a legend and a scale bar below it.

    Args:
        coloured: uint8 (h, w, 3) from `draw_tiles`; kept pixel for pixel, centred on a wider page.
        scale: its pixels per level-0 pixel.
        mpp: horizontal µm per level-0 pixel.
        threshold: as in `draw_tiles`.
        hatched: whether some tiles are hatched.
        legend: of values that are no probability.
    """
    height, width = coloured.shape[:2]
    with matplotlib.rc_context(STYLE):
        footer = _footer(max(width, MIN_WIDTH_PX), mpp / scale / 1000, threshold, hatched, legend)
    page = Image.new("RGB", (footer.width, height + footer.height), "white")
    page.paste(Image.fromarray(coloured), ((footer.width - width) // 2, 0))
    page.paste(footer, (0, height))
    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue()


def _footer(
    width_px: int, mm_per_px: float, threshold: float, hatched: bool = False, legend: Legend = PROBABILITY
) -> Image.Image:
    figure = Figure(figsize=(WIDTH_IN, FOOTER_IN), dpi=width_px / WIDTH_IN)
    _legend(figure.add_axes((0.03, 0.46, 0.30, 0.16)), threshold, legend)
    _scale_bar(figure.add_axes((0, 0, 1, 1), frameon=False), width_px, mm_per_px)
    notes = ["research use only", "uncoloured: not scored", "hatched: unlike the training data"]
    for i, note in enumerate(notes[: 3 if hatched else 2]):
        figure.text(0.97, 0.74 - 0.22 * i, note, size=7, ha="right", va="center", color=SOFT if i else INK)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _legend(axes: Axes, threshold: float, legend: Legend) -> None:
    axes.imshow(_tint(_place(np.linspace(0, 1, 512)[None], threshold)), aspect="auto", extent=(0, 1, 0, 1))
    axes.axvline(threshold, color=INK, lw=1)
    places, labels = zip(*legend.labels, strict=True)
    axes.set(yticks=[], xticks=places, xticklabels=labels, xlim=(0, 1))
    axes.set_title(legend.title, size=7.5, pad=3, weight="normal")
    axes.tick_params(length=2, pad=2, labelsize=7)
    axes.spines[:].set(visible=True, linewidth=0.5)
    # The label is wider than the tick and stays between the ends.
    middle = min(0.7, max(0.3, threshold))
    axes.text(middle, -0.3, legend.middle or f"threshold {threshold:.3g}", size=7, ha="center", va="top")


def _scale_bar(axes: Axes, width_px: int, mm_per_px: float) -> None:
    """A bar in the middle of the footer, as long as a round number of mm on the slide."""
    length_mm = _round_length(0.25 * width_px * mm_per_px)
    half_px = length_mm / mm_per_px / 2
    axes.set(xlim=(0, width_px), ylim=(0, 1), xticks=[], yticks=[])
    middle = 0.55 * width_px
    axes.plot([middle - half_px, middle + half_px], [0.6, 0.6], color=INK, lw=2, solid_capstyle="butt")
    axes.text(middle, 0.48, f"{length_mm:g} mm", size=7.5, ha="center", va="top")


def _round_length(limit: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten up to a limit."""
    power = 10.0 ** math.floor(math.log10(limit))
    return max(step * power for step in (1, 2, 5) if step * power <= limit)


def geojson(blocks: Iterable[Sequence[str]]) -> Iterator[bytes]:
    """A GeoJSON FeatureCollection of blocks of `tile_features`, in pieces, a feature on a line.

    QuPath (0.4 and later) imports it, compressed by gzip too.
    """
    yield b'{"type":"FeatureCollection","features":[\n'
    between = ""
    for block in filter(len, blocks):
        yield (between + ",\n".join(block)).encode()
        between = ",\n"
    yield b"\n]}\n"


def tile_features(
    tile_ids: Sequence[str],
    boxes: np.ndarray,
    predicted: Sequence[str | None],
    measurements: Mapping[str, np.ndarray],
) -> list[str]:
    """Tiles as features of GeoJSON, in the terms of QuPath.

    Args:
        tile_ids: n `image_id`s, the names of the tiles; equal ids give equal UUIDs.
        boxes: float (n, 4), whole level-0 pixels from the slide's bounds, which are QuPath's origin.
        predicted: n class names; None gives a tile without a class.
        measurements: float (n,) by name; NaN is left out, since JSON has none.
    """
    classes = {name: _classification(name) for name in set(predicted)}
    keys = [json.dumps(name) for name in measurements]
    values = np.array(list(measurements.values()), float).reshape(len(keys), len(tile_ids)).T.tolist()
    whole = np.rint(boxes).astype(int).tolist()
    found = []
    for tile_id, (left, top, width, height), name, row in zip(
        tile_ids, whole, predicted, values, strict=True
    ):
        right, bottom = left + width, top + height
        given = zip(keys, row, strict=True)
        known = ",".join(f"{key}:{value}" for key, value in given if math.isfinite(value))
        found.append(
            f'{{"type":"Feature","id":"{uuid.uuid5(uuid.NAMESPACE_URL, tile_id)}",'
            f'"geometry":{{"type":"Polygon","coordinates":[[[{left},{top}],[{right},{top}],'
            f"[{right},{bottom}],[{left},{bottom}],[{left},{top}]]]}},"
            f'"properties":{{"objectType":"tile","name":{json.dumps(tile_id)}{classes[name]},'
            f'"measurements":{{{known}}}}}}}'
        )
    return found


def _classification(name: str | None) -> str:
    """The property of a tile of a class, with the comma before it; nothing without a class."""
    if name is None:
        return ""
    color = [round(255 * part) for part in to_rgb(CLASS_COLOR.get(tumor_class_of(name), GREY))]
    return ',"classification":' + json.dumps({"name": name, "color": color}, separators=(",", ":"))
