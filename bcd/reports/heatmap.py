"""Predictions over a whole slide: a heat map as PNG, and tiles for QuPath.

Boxes are x, y, width and height in pixels of level 0, as from `tile.Grid.boxes`.
"""

import io
import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from bcd.reports.plots import CLASS_COLOR, STYLE, WIDTH_IN
from bcd.reports.style import BLUE, GREY, INK, SOFT, VERMILION
from bcd.taxonomy import SUBTYPES

# White, the middle of an odd number of colours, is at the threshold, where the class changes.
COLORS = LinearSegmentedColormap.from_list("probability", [BLUE, "#ffffff", VERMILION], N=257)
# Share of full colour, and of the tissue's own contrast: structure and probability stay legible.
STRENGTH, CONTRAST = 0.85, 0.6
# Tiles of at least this size have an edge, which distinguishes a white tile from glass that was not scored.
EDGED_PX, EDGE = 8, 0.86
# Distance of the stripes over tiles unlike the training data, and their shade.
HATCH_PX, HATCH = 6, 0.45
FOOTER_IN = 0.62
MIN_WIDTH_PX = 720


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

    Args:
        thumbnail: uint8 (h, w, 3) RGB.
        scale: thumbnail pixels per level-0 pixel.
        boxes: float (n, 4), level-0 pixels.
        probability: float (n,) of malignancy; a tile with NaN has no colour.
        threshold: probability from which a tile is called malignant.
        unlike: bool (n,), tiles unlike the training data, which are hatched: their colour may mean nothing.
    """
    grey = np.asarray(Image.fromarray(thumbnail).convert("L"), np.float32) / 255
    tint = np.ones(thumbnail.shape, np.float32)
    known = np.isfinite(probability)
    hatched = np.zeros(known.shape, bool) if unlike is None else unlike
    stripes = np.add.outer(*map(np.arange, grey.shape)) % HATCH_PX < HATCH_PX // 3
    colors = _tint(probability[known], threshold)
    edges = _edges(scale, boxes[known])
    for (left, top, right, bottom), color, is_hatched in zip(edges, colors, hatched[known], strict=True):
        tile = tint[top:bottom, left:right]
        tile[:] = color
        if min(tile.shape[:2]) >= EDGED_PX:
            tile[[0, -1]] = tile[:, [0, -1]] = EDGE * color
        if is_hatched:
            tile[stripes[top:bottom, left:right]] *= HATCH
    paper = 1 - CONTRAST * (1 - grey[..., None])
    return (255 * paper * tint).round().astype(np.uint8)


def _tint(probability: np.ndarray, threshold: float) -> np.ndarray:
    """Colour of white paper below a tint, float (n, 3), 0 to 1."""
    return 1 - STRENGTH * (1 - COLORS(_place(probability, threshold))[..., :3])


def _place(probability: np.ndarray, threshold: float) -> np.ndarray:
    """Position of probabilities on the colour map, 0 to 1, with the threshold at one half."""
    below = probability / (threshold or 1)
    above = 1 + (probability - threshold) / ((1 - threshold) or 1)
    return np.where(probability < threshold, below, above) / 2


def _edges(scale: float, boxes: np.ndarray) -> list[list[int]]:
    """Left, top, right and bottom in whole pixels of the thumbnail, at least one pixel apart."""
    start, size = boxes[:, :2], boxes[:, 2:]
    first = (start * scale).round()
    return np.hstack([first, np.maximum(((start + size) * scale).round(), first + 1)]).astype(int).tolist()


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
    axes.imshow(_tint(np.linspace(0, 1, 512)[None], threshold), aspect="auto", extent=(0, 1, 0, 1))
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


def geojson(
    tile_ids: Sequence[str],
    boxes: np.ndarray,
    predicted: Sequence[str | None],
    measurements: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Tiles as a GeoJSON FeatureCollection, which QuPath (0.4 and later) opens by drag and drop.

    Args:
        tile_ids: n `image_id`s; equal ids give equal UUIDs.
        boxes: float (n, 4), level-0 pixels from the slide's bounds, which are QuPath's origin.
        predicted: n class names; None gives a tile without a class.
        measurements: float (n,) by name; NaN is left out, since JSON has none.
    """
    values = pd.DataFrame(measurements, index=range(len(tile_ids)), dtype=float).to_dict("records")
    tiles = zip(tile_ids, boxes.tolist(), predicted, values, strict=True)
    return {"type": "FeatureCollection", "features": [_feature(*tile) for tile in tiles]}


def _feature(tile_id: str, box: list[float], name: str | None, values: Mapping[Any, float]) -> dict[str, Any]:
    left, top, width, height = box
    right, bottom = left + width, top + height
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    properties: dict[str, Any] = {"objectType": "tile"}
    if name is not None:
        tumor_class = SUBTYPES[name].tumor_class if name in SUBTYPES else name
        color = [round(255 * part) for part in to_rgb(CLASS_COLOR.get(tumor_class, GREY))]
        properties["classification"] = {"name": name, "color": color}
    properties["measurements"] = {key: value for key, value in values.items() if math.isfinite(value)}
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, tile_id)),
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": properties,
    }
