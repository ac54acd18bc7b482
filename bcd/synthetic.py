"""A small, deterministic tree of made-up pictures with BreaKHis's names and layout, for the demo and the tests.

Nothing here says anything about tissue: numbers made from it must be marked synthetic (see `MARKER`).

A picture is read off one map, the signed distance to the nearest gland border. Going outwards it crosses a
core (lumen or stroma), a rim of epithelium, a pale halo, and fibrous stroma; the eight subtypes differ only in
the shape of the glands and the widths of these zones. Nuclei are stamped on top: their size, variation,
irregularity and darkness rise with a grade, drawn per patient and field, higher on average in malignant
subtypes, with overlap. The stain is drawn per patient without regard to the class.

Lengths are in nuclear diameters unless a name says `_px`; points are complex numbers, x + iy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from scipy.spatial import cKDTree

from bcd.taxonomy import BENIGN, MAGNIFICATIONS, SUBTYPES

MARKER: Final = "SYNTHETIC.txt"
_NOTICE: Final = """\
These pictures are synthetic: drawn by bcd.synthetic from random numbers, with the names and layout of BreaKHis.
They show no tissue of anybody, and no number measured on them says anything about breast cancer.
"""

# The published ids are of the years 03 to 14 and below 30000: neither part can be taken for one of them.
_YEAR: Final = 99
_FIRST_ID: Final = 90001

# Diameter of a nucleus at 40X in a field 700 px wide. From 40X to 400X real ones grow tenfold, these by the
# square root of it, so that they outlive a resize to 96x144 px even at 40X.
_NUCLEUS_PX: Final = 22.0
_GROWTH: Final = 0.4
_GRID: Final = 4  # samples per nuclear diameter of the maps that shapes are computed on

Array = NDArray[np.float32]
Points = NDArray[np.complexfloating]


@dataclass(frozen=True)
class Plan:
    """How many pictures, and of which size; the default is 384 pictures of 32 patients."""

    patients_per_subtype: int = 4
    images_per_magnification: int = 3
    magnifications: tuple[int, ...] = MAGNIFICATIONS
    height_px: int = 460
    width_px: int = 700
    seed: int = 0


class _Glands(NamedTuple):
    """The architecture of a subtype."""

    spacing: float  # between the centres of neighbours
    radius: float  # short half axis
    aspect: float = 1.3  # long half axis / short half axis
    warp: float = 0.5  # how far the border wanders
    rim: float = 1.3  # width of the epithelium; `_SOLID` leaves no core
    halo: float = 0.0  # width of the pale space around a gland
    fill: float = 0.9  # share of the places that hold a gland
    cellularity: float = 1.0  # stromal nuclei, relative to plain collagen
    frond: bool = False  # the core is stroma instead of lumen


_SOLID: Final = 99.0
_GLANDS: Final[Mapping[str, _Glands]] = {
    "A": _Glands(spacing=5.5, radius=2.0),  # crowded small acini
    "F": _Glands(spacing=10, radius=1.7, aspect=4.5, warp=1.6, cellularity=2.0),  # slit-like clefts
    "PT": _Glands(spacing=15, radius=6.2, aspect=1.6, warp=1.6, halo=1.0, cellularity=2.5, frond=True),  # leaves
    "TA": _Glands(spacing=6.5, radius=2.4, aspect=1.1, warp=0.3, fill=0.95),  # round tubules
    "DC": _Glands(spacing=9, radius=2.7, warp=1.2, rim=_SOLID, halo=0.15, cellularity=1.5),  # solid nests
    "LC": _Glands(spacing=5, radius=0.55, aspect=9.0, warp=0.6, rim=_SOLID, halo=0.1),  # single file
    "MC": _Glands(spacing=11, radius=3.2, warp=0.9, rim=_SOLID, halo=2.5, fill=0.9),  # islands in mucin
    "PC": _Glands(spacing=7, radius=2.3, aspect=3.0, warp=1.2, halo=1.1, frond=True),  # finger-like fronds
}
_MEAN_DYES: Final = 0.25, 0.32
_FAT: Final = _Glands(spacing=3.6, radius=2.2, aspect=1.1, warp=0.3, fill=1.0)


def _stain(rng: np.random.Generator) -> Array:
    """Draw optical densities (3, RGB) of a unit of haematoxylin, of eosin, and of the lamp's own shade.

    The dyes lie around the vectors of Ruifrok and Johnston (2001), as laboratories and scanners vary.
    """
    dyes = np.array([[0.62, 0.72, 0.34], [0.12, 0.80, 0.35]]) + rng.normal(0, [0.035, 0.04, 0.045], (2, 3))
    strength = np.exp(rng.normal(0, 0.14, (2, 1)))
    shade = np.array([[0.05, 0.06, 0.065]]) + rng.normal(0, 0.01, (1, 3))
    return np.concatenate([dyes * strength, shade]).clip(0.02).astype(np.float32)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], cell: float) -> Array:
    """Smooth noise (H, W) of zero mean and unit deviation with features `cell` samples wide."""
    height, width = shape
    cell = max(cell, 1.5)
    coarse = rng.standard_normal((int(height / cell) + 4, int(width / cell) + 4), dtype=np.float32)
    box = (1.0, 1.0, 1.0 + width / cell, 1.0 + height / cell)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC, box))
    return (smooth - smooth.mean()) / (smooth.std() + 1e-6)


def _enlarge(field: Array, shape: tuple[int, int]) -> Array:
    """Interpolate a map (h, w) to pixels (H, W)."""
    return np.asarray(Image.fromarray(field).resize(shape[::-1], Image.Resampling.BICUBIC))


def _slope(field: Array) -> Points:
    """Gradient (h, w) of a map per nuclear diameter."""
    down, right = np.gradient(field, 1 / _GRID)
    return right + 1j * down


def _at(field: NDArray, points: Points) -> NDArray:
    """Values (N,) of a map at points."""
    row, column = (points.imag * _GRID).astype(int), (points.real * _GRID).astype(int)
    return field[row.clip(0, field.shape[0] - 1), column.clip(0, field.shape[1] - 1)]


def _scatter(rng: np.random.Generator, corner: complex, spacing: float) -> Points:
    """Jittered points (N,) about `spacing` apart, from the origin to `corner` and one row beyond."""
    x = np.arange(-1, corner.real / spacing + 2)
    y = np.arange(-1, corner.imag / spacing + 2)[:, None]
    jitter = rng.uniform(-0.3, 0.3, (2, len(y), len(x)))
    return (spacing * (x + 0.5 * (y % 2) + 1j * y + jitter[0] + 1j * jitter[1])).ravel()


def _apart(points: Points, spacing: float) -> Points:
    """The points that keep `spacing` from all those kept before them."""
    tree = cKDTree(np.stack([points.real, points.imag], axis=-1))
    keep = np.ones(len(points), bool)
    for first, second in sorted(tree.query_pairs(spacing)):
        keep[second] &= not keep[first]
    return points[keep]


def _border_distance(rng: np.random.Generator, glands: _Glands, place: Points, grain: complex) -> Array:
    """Signed distance (h, w) to the nearest gland border, negative inside, at the points `place` (h, w).

    Glands lie along the unit vector `grain`, more or less.
    """
    centres = _scatter(rng, place[-1, -1], glands.spacing)
    centres = centres[rng.random(len(centres)) < glands.fill]
    radii = glands.radius * np.exp(rng.normal(0, 0.2, len(centres)))
    turns = np.exp(1j * rng.normal(0, 0.35, len(centres))) / grain
    wander = _noise(rng, place.shape, 3.5 * _GRID) + 1j * _noise(rng, place.shape, 3.5 * _GRID)
    place = (place + glands.warp * wander).astype(np.complex64)
    first, second = np.full((2, *place.shape), np.inf, np.float32)
    for centre, radius, turn in zip(centres.tolist(), radii.tolist(), turns.tolist(), strict=True):
        offset = (place - centre) * turn
        distance = np.sqrt((offset.real / glands.aspect) ** 2 + offset.imag**2) - radius
        second = np.minimum(second, np.maximum(first, distance))
        first = np.minimum(first, distance)
    # Where two glands are equally near, neither is: crowded glands flatten against each other, never merge.
    return np.maximum(first, 0.5 * (first - second) + 0.2)


class _Nuclei(NamedTuple):
    """N nuclei: all fields are (N,)."""

    place: Points
    axis: Points  # unit vector along the long axis
    radius: NDArray[np.float64]  # of the circle of the same area
    aspect: NDArray[np.float64]
    darkness: NDArray[np.float64]  # haematoxylin, 1 in a common nucleus


def _epithelium(rng: np.random.Generator, glands: _Glands, distance: Array, grade: float) -> _Nuclei:
    """Nuclei in the rims of glands: in file and alike at grade 0, crowded, large and unlike at grade 1."""
    slope = _slope(distance)
    points = _scatter(rng, complex(*distance.shape[::-1]) / _GRID, 0.65)
    depth = _at(distance, points)
    inside = (depth < 0) & (depth > -glands.rim)
    points, depth = points[inside], depth[inside]
    uphill = _at(slope, points)
    steepness = np.abs(uphill).clip(0.5)
    points += (depth.clip(0.75 - glands.rim, -0.5) - depth) * uphill / steepness**2
    points = _apart(points, 0.74 + 0.3 * grade)
    count = len(points)
    return _Nuclei(
        place=points,
        axis=np.exp(1j * (np.angle(_at(slope, points)) + rng.normal(0, 0.15 + grade, count))),
        radius=(0.36 + 0.18 * grade) * np.exp(rng.normal(0, 0.05 + 0.27 * grade, count)),
        aspect=rng.uniform(1.1, 1.5, count),
        darkness=(0.55 + 0.8 * grade) * np.exp(rng.normal(0, 0.08 + 0.2 * grade, count)),
    )


def _fibroblasts(rng: np.random.Generator, glands: _Glands, distance: Array, flow: Array) -> _Nuclei:
    """Spindle nuclei of the stroma, along its fibres."""
    points = _scatter(rng, complex(*distance.shape[::-1]) / _GRID, 2.6 / glands.cellularity**0.5)
    depth = _at(distance, points)
    points = points[(depth > glands.halo + 0.4) | (glands.frond & (depth < -glands.rim - 0.3))]
    count = len(points)
    return _Nuclei(
        place=points,
        axis=1j * np.exp(1j * (np.angle(_at(_slope(flow), points)) + rng.normal(0, 0.25, count))),
        radius=0.27 * np.exp(rng.normal(0, 0.2, count)),
        aspect=rng.uniform(2.0, 5.0, count),
        darkness=rng.uniform(0.75, 1.1, count),
    )


def _stamp(nuclei: _Nuclei, nucleus_px: float, ragged: Array) -> Array:
    """Haematoxylin of nuclei (H, W): ellipses whose border `ragged` (H, W) shifts, paler inside."""
    canvas = np.zeros_like(ragged)
    rows, columns = (np.arange(n, dtype=np.float32) for n in canvas.shape)
    long_px = nuclei.radius * np.sqrt(nuclei.aspect) * nucleus_px
    short_px = long_px / nuclei.aspect
    # Inverse of the ellipse's matrix: xx x^2 + 2 xy x y + yy y^2 = 1 on its border.
    cos2, sin2 = nuclei.axis.real**2, nuclei.axis.imag**2
    xx, yy = cos2 / long_px**2 + sin2 / short_px**2, sin2 / long_px**2 + cos2 / short_px**2
    xy = nuclei.axis.real * nuclei.axis.imag * (long_px**-2 - short_px**-2)
    columns_of = (nuclei.place * nucleus_px, long_px, short_px, xx, xy, yy, nuclei.darkness)
    for at, long, short, a, b, c, dark in zip(*(column.tolist() for column in columns_of), strict=True):
        reach = 1.2 * long + 1
        box = tuple(slice(max(0, int(x - reach)), max(0, int(x + reach) + 2)) for x in (at.imag, at.real))
        y, x = rows[box[0], None] - at.imag, columns[box[1]] - at.real
        depth = ragged[box] + 1 - ((a * x) * x + y * (2 * b * x) + (c * y) * y)
        body = dark * np.minimum(depth * (0.4 * short), 1 - 0.3 * depth)
        np.maximum(canvas[box], body, out=canvas[box])
    return canvas


def _fat(rng: np.random.Generator, distance: Array, place: Points, halo: float) -> Array:
    """Depth (h, w) inside fat cells, negative outside: lobules of them in some of the fields, off the glands."""
    beyond = (rng.uniform(0.5, 2.5) - _noise(rng, distance.shape, 9 * _GRID)) * 2
    beyond = np.maximum(beyond, halo + 0.7 - distance)
    if beyond.min() > 0:
        return -beyond
    return -(_border_distance(rng, _FAT, place, 1.0) + beyond.clip(0))


def _fibres(rng: np.random.Generator, flow: Array, nucleus_px: float) -> Array:
    """Density (H, W) of collagen, zero mean: lamellae and fibrils that follow the contours of `flow` (H, W)."""
    lines = sum(w * gaussian_filter1d(rng.standard_normal(4096), w, mode="wrap") for w in (1.5, 4.0, 12.0))
    lines = (lines / np.std(lines)).astype(np.float32)
    return 0.8 * lines[(flow * 32).astype(np.int32) & 4095] + 0.45 * _noise(rng, flow.shape, nucleus_px)


def _paint(rng, glands, nucleus_px, distance, fat, fibres, nuclei):
    """Amounts (H, W, 3) of haematoxylin, eosin and shade."""
    shape = distance.shape
    grain = _noise(rng, shape, 0.13 * nucleus_px)

    def beyond(border: float) -> Array:
        return ((distance - border) * 8 + 0.5).clip(0, 1)

    core, outside, stroma = 1 - beyond(-glands.rim), beyond(0), beyond(glands.halo)
    rim, halo = 1 - core - outside, outside - stroma
    if glands.frond:
        stroma = stroma + core
    tear = (-1.5 - 1.5 * fibres).clip(0, 1)
    stroma = stroma * (1 - 0.9 * tear) * (1 - 0.97 * (fat * 6).clip(0, 1))
    cover = 1 - 0.7 * nuclei.clip(0, 1)
    texture = 0.05 * grain
    eosin = (stroma * (0.55 + 0.16 * fibres + texture) + rim * (0.42 + texture)) * cover
    haematoxylin = stroma * (0.07 - 0.015 * fibres) + rim * (0.15 + texture) + halo * (0.06 + 0.02 * fibres)
    haematoxylin = haematoxylin * cover + nuclei * (1 + 0.12 * grain)
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    shade = 1 + 0.5 * (x**2 + y[:, None] ** 2)
    # Every field takes up as much of either dye as any other, so that colour does not tell the class.
    haematoxylin *= (_MEAN_DYES[0] / haematoxylin.mean()) ** 0.5
    eosin *= (_MEAN_DYES[1] / eosin.mean()) ** 0.5
    return np.stack([haematoxylin, eosin, shade], axis=-1)


def image(subtype: str, patient_seed: int, magnification: int, sequence: int, plan: Plan) -> NDArray[np.uint8]:
    patient = np.random.default_rng([plan.seed, patient_seed])
    stain = _stain(patient)
    benign = SUBTYPES[subtype].tumor_class == BENIGN
    grade = (0.2 if benign else 0.8) + patient.normal(0, 0.06)
    rng = np.random.default_rng([plan.seed, patient_seed, magnification, sequence])
    grade = float(np.clip(grade + rng.normal(0, 0.12), 0, 1))
    glands = _GLANDS[subtype]
    shape = plan.height_px, plan.width_px
    nucleus_px = _NUCLEUS_PX * (magnification / 40) ** _GROWTH * plan.width_px / 700
    low = [max(8, round(n / nucleus_px * _GRID)) for n in shape]
    y, x = (np.arange(n) + 0.5 for n in low)
    place = (x + 1j * y[:, None]) / _GRID
    grain = np.exp(1j * rng.uniform(0, 2 * np.pi))
    distance = _border_distance(rng, glands, place, grain)
    flow = (place / grain).imag + 2 * _noise(rng, low, 8 * _GRID) + 0.5 * _noise(rng, low, 2.5 * _GRID) + 0.6 * distance.clip(-2, 2)
    flow = flow.astype(np.float32)
    nuclei = _Nuclei(*map(np.concatenate, zip(_epithelium(rng, glands, distance, grade), _fibroblasts(rng, glands, distance, flow), strict=True)))
    ragged = (0.1 + 0.3 * grade) * _noise(rng, shape, 0.45 * nucleus_px)
    dyes = _paint(rng, glands, nucleus_px, _enlarge(distance, shape), _enlarge(_fat(rng, distance, place, glands.halo), shape),
       _fibres(rng, _enlarge(flow, shape), nucleus_px), _stamp(nuclei, nucleus_px, ragged))
    return (255 * np.exp(dyes @ -stain)).astype(np.uint8)


def write_tree(root: str | Path, plan: Plan | None = None) -> list[Path]:
    """Write the pictures of a plan in the published layout, and return their paths, sorted."""
    plan = plan or Plan()
    top = Path(root) / "BreaKHis_v1"
    top.mkdir(parents=True, exist_ok=True)
    (top / MARKER).write_text(_NOTICE)
    paths = []
    for i, (code, subtype) in enumerate(SUBTYPES.items()):
        letter = "B" if subtype.tumor_class == BENIGN else "M"
        for p in range(plan.patients_per_subtype):
            number = _FIRST_ID + 8 * p + i
            slide = f"SOB_{letter}_{code}_{_YEAR}-{number}"
            folder = top / "histology_slides/breast" / subtype.tumor_class / "SOB" / subtype.name / slide
            for magnification in plan.magnifications:
                (folder / f"{magnification}X").mkdir(parents=True, exist_ok=True)
                for sequence in range(1, plan.images_per_magnification + 1):
                    name = f"SOB_{letter}_{code}-{_YEAR}-{number}-{magnification}-{sequence:03d}.png"
                    pixels = image(code, number, magnification, sequence, plan)
                    paths.append(folder / f"{magnification}X" / name)
                    Image.fromarray(pixels).save(paths[-1], compress_level=6)
    return sorted(paths)
