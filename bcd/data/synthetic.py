"""Deterministic synthetic images in the layout of BreaKHis, for the demo and tests.

They are no evidence about tissue: numbers from them must be marked synthetic (see `MARKER`).

An image derives from one map, the signed distance to the nearest gland border: from inside out a core (lumen
or stroma), a rim of epithelium, a pale halo, and fibrous stroma. The eight subtypes differ only in the shape
of the glands and the widths of these zones. Nuclei are stamped on top; their size, its variation, their
irregularity and darkness rise with a grade, drawn per patient and field: higher on average in malignant
subtypes, with overlap. The stain is drawn per patient, independently of the class.

Lengths are in nuclear diameters unless a name says `_px`; points are complex numbers, x + iy; maps (h, w)
have `_GRID` samples per nuclear diameter, images (H, W) have pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import scipy
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from PIL import Image

from bcd.taxonomy import BENIGN, MAGNIFICATIONS, MALIGNANT, SUBTYPES

MARKER: Final = "SYNTHETIC.txt"
_NOTICE: Final = """\
These images are synthetic: drawn by bcd from random numbers, named and laid out like BreaKHis.
They show no tissue of anybody, and no number measured on them says anything about breast cancer.
"""

# Published slide ids have the years 14 and 15 and numbers below 30000, so these are distinct.
_YEAR: Final = 99
_FIRST_ID: Final = 90001

# Diameter of a nucleus at 40X in a field 700 px wide, and its growth as a power of the magnification. Real
# nuclei grow with the first power, tenfold from 40X to 400X; these must survive a resize to 96x144 at 40X.
_NUCLEUS_PX: Final = 22.0
_GROWTH: Final = 0.4
_GRID: Final = 4

# Grades spread by 0.13 around these means: tuned so that minutes of training from scratch classify most
# fields of unseen patients, but mean colour hardly better than chance.
_MEAN_GRADE: Final = {BENIGN: 0.2, MALIGNANT: 0.8}
_MEAN_HAEMATOXYLIN: Final = 0.25
_MEAN_EOSIN: Final = 0.32

Array = NDArray[np.float32]
Points = NDArray[np.complexfloating]
Shape = tuple[int, int]


@dataclass(frozen=True)
class PatientPlan:
    """Number and size of the images; by default 384 images of 32 patients."""

    patients_per_subtype: int = 4
    images_per_magnification: int = 3
    magnifications: tuple[int, ...] = MAGNIFICATIONS
    height_px: int = 460
    width_px: int = 700
    seed: int = 0


_DEFAULT: Final = PatientPlan()


class _Glands(NamedTuple):
    """The architecture of a subtype."""

    spacing: float  # between the centres of neighbours
    radius: float  # short half axis
    aspect: float  # long half axis / short half axis
    warp: float  # amplitude of the border's deviations
    rim: float  # width of the epithelium; `_SOLID` leaves no core
    halo: float  # width of the pale space around a gland
    cellularity: float  # nuclei of the stroma, relative to plain collagen
    frond: bool  # the core is stroma instead of lumen


_SOLID: Final = 99.0
# fmt: off
_GLANDS: Final[Mapping[str, _Glands]] = {
    #         spacing  radius  aspect  warp     rim  halo  cellularity  frond
    "A":  _Glands(5.0,   2.00,    1.3,  0.5,    1.3, 0.00,         1.0, False),  # crowded small acini
    "F":  _Glands(10.,   1.70,    4.5,  1.6,    1.3, 0.00,         2.0, False),  # slit-like clefts
    "PT": _Glands(15.,   6.20,    1.6,  1.6,    1.3, 1.00,         2.5,  True),  # leaves
    "TA": _Glands(6.0,   2.40,    1.1,  0.3,    1.3, 0.00,         1.0, False),  # round tubules
    "DC": _Glands(9.0,   2.70,    1.3,  1.2, _SOLID, 0.15,         1.5, False),  # solid nests
    "LC": _Glands(5.0,   0.55,    9.0,  0.6, _SOLID, 0.10,         1.0, False),  # cells in single file
    "MC": _Glands(11.,   3.20,    1.3,  0.9, _SOLID, 2.00,         1.0, False),  # islands in pools of mucin
    "PC": _Glands(8.5,   2.30,    3.0,  1.2,    1.0, 1.00,         1.0,  True),  # fronds
}
_FAT: Final = _Glands(3.6, 2.20,    1.1,  0.3, _SOLID, 0.00,         0.0, False)  # a cell, not a gland
# fmt: on


class _Nuclei(NamedTuple):
    """N nuclei; every field is (N,)."""

    place: Points
    axis: Points  # unit vector along the long axis
    radius: NDArray[np.float64]  # of the circle of the same area
    aspect: NDArray[np.float64]
    darkness: NDArray[np.float64]  # haematoxylin, about 1


def write_tree(root: str | Path, plan: PatientPlan = _DEFAULT) -> list[Path]:
    """Write `<root>/BreaKHis_v1` in the published layout, with the notice `MARKER`; returns sorted image
    paths.

    A plan gives the same bytes with the same versions of NumPy, SciPy and Pillow; an image does not depend on
    the number of others.
    """
    top = Path(root) / "BreaKHis_v1"
    top.mkdir(parents=True, exist_ok=True)
    (top / MARKER).write_text(_NOTICE, encoding="utf-8")
    paths = []
    for number in range(len(SUBTYPES) * plan.patients_per_subtype):
        subtype = tuple(SUBTYPES)[number % len(SUBTYPES)]
        paths += _write_patient(top, subtype, _FIRST_ID + number, plan)
    return sorted(paths)


def _write_patient(top: Path, subtype: str, patient: int, plan: PatientPlan) -> list[Path]:
    """Write the fields of one patient and return their paths."""
    tumor_class = SUBTYPES[subtype].tumor_class
    prefix = f"SOB_{tumor_class[0].upper()}_{subtype}"
    slides = top / "histology_slides" / "breast" / tumor_class / "SOB" / SUBTYPES[subtype].name
    paths = []
    for magnification in plan.magnifications:
        folder = slides / f"{prefix}_{_YEAR}-{patient}" / f"{magnification}X"
        folder.mkdir(parents=True, exist_ok=True)
        for sequence in range(1, plan.images_per_magnification + 1):
            path = folder / f"{prefix}-{_YEAR}-{patient}-{magnification}-{sequence:03}.png"
            pixels = image(subtype, patient, magnification, sequence, plan)
            Image.fromarray(pixels).save(path, format="PNG", compress_level=2)
            paths.append(path)
    return paths


def image(
    subtype: str, patient_seed: int, magnification: int, sequence: int, plan: PatientPlan
) -> NDArray[np.uint8]:
    """Draw one field: uint8 (height_px, width_px, 3) RGB, of the size and seed of the plan.

    Args:
        subtype: code, as in `taxonomy.SUBTYPES`.
        patient_seed: determines the stain and the patient's mean grade.
        magnification: 40 to 400, the label.
        sequence: number of the field among its patient's at this magnification.
        plan: size and seed.
    """
    patient = default_rng([plan.seed, patient_seed])
    field = default_rng([plan.seed, patient_seed, magnification, sequence])
    stain = _stain(patient)
    grade = _MEAN_GRADE[SUBTYPES[subtype].tumor_class] + patient.normal(0, 0.06) + field.normal(0, 0.12)
    nucleus_px = _NUCLEUS_PX * (magnification / 40) ** _GROWTH * plan.width_px / 700
    shape = plan.height_px, plan.width_px
    dyes = _tissue(field, _GLANDS[subtype], min(max(grade, 0.0), 1.0), nucleus_px, shape)
    return (255 * np.exp(-dyes @ stain)).astype(np.uint8)


def _stain(rng: Generator) -> Array:
    """Draw optical densities (3, RGB) of a unit of haematoxylin, of eosin, and of the lamp's shade.

    The dyes vary around the vectors of Ruifrok and Johnston (2001), as between laboratories and scanners.
    """
    dyes = np.array([[0.62, 0.72, 0.34], [0.12, 0.80, 0.35]]) + rng.normal(0, [0.035, 0.04, 0.045], (2, 3))
    strength = np.exp(rng.normal(0, 0.15, (2, 1)))
    shade = np.array([[0.05, 0.06, 0.065]]) + rng.normal(0, 0.01, (1, 3))
    return np.concatenate([dyes * strength, shade]).clip(0.02).astype(np.float32)


def _tissue(rng: Generator, glands: _Glands, grade: float, nucleus_px: float, shape: Shape) -> Array:
    """Amounts (H, W, 3) of haematoxylin, eosin and shade in a field of `shape` pixels."""
    y, x = ((np.arange(round(n / nucleus_px * _GRID)) + 0.5) / _GRID for n in shape)
    place = x + 1j * y[:, None]
    grain = np.exp(2j * np.pi * rng.random())
    distance = _border_distance(rng, glands, place, grain)
    fat = _fat_depth(rng, distance, place, glands.halo)
    # Fibres are the contours of this map: along the grain, wavy, and wrapped around the glands.
    waves = 2 * _noise(rng, place.shape, 8 * _GRID) + 0.5 * _noise(rng, place.shape, 2.5 * _GRID)
    flow = ((place / grain).imag + waves + 0.6 * distance.clip(-2, 2)).astype(np.float32)
    stroma = (distance > glands.halo) & (fat < 0)
    if glands.frond:
        stroma |= distance < -glands.rim
    groups = _epithelial_nuclei(rng, glands, distance, grade), _stromal_nuclei(rng, glands, stroma, flow)
    nuclei = _Nuclei(*(np.concatenate(column) for column in zip(*groups, strict=True)))
    ragged = (0.1 + 0.3 * grade) * _noise(rng, shape, 0.45 * nucleus_px)
    return _dye(
        rng,
        glands,
        nucleus_px,
        distance=_enlarge(distance, shape),
        fat=_enlarge(fat, shape),
        fibres=_fibres(rng, _enlarge(flow, shape), nucleus_px),
        nuclei=_stamp(nuclei, nucleus_px, ragged),
    )


def _border_distance(rng: Generator, glands: _Glands, place: Points, grain: complex) -> Array:
    """Signed distance (h, w) to the nearest gland border, negative inside, at the points `place` (h, w).

    The glands are roughly aligned with the unit vector `grain`.
    """
    centres = _scatter(rng, place[-1, -1], glands.spacing)
    centres = centres[rng.random(len(centres)) < 0.9]
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
    # Points equally near to two glands are outside both: crowded glands flatten each other and never merge.
    return np.maximum(first, 0.5 * (first - second) + 0.2)


def _fat_depth(rng: Generator, distance: Array, place: Points, halo: float) -> Array:
    """Depth (h, w) inside fat cells, negative outside: lobules in some fields, away from the glands."""
    beyond = (rng.uniform(0.5, 2.5) - _noise(rng, distance.shape, 9 * _GRID)) * 2
    beyond = np.maximum(beyond, halo + 0.7 - distance).astype(np.float32)
    if beyond.min() > 0:
        return -beyond
    return -(_border_distance(rng, _FAT, place, 1.0) + beyond.clip(0))


def _epithelial_nuclei(rng: Generator, glands: _Glands, distance: Array, grade: float) -> _Nuclei:
    """Nuclei in the rims of glands: small, regular, aligned at grade 0; large, dark, irregular at grade 1."""
    slope = _slope(distance)
    points = _scatter(rng, complex(*distance.shape[::-1]) / _GRID, 0.65)
    depth = _at(distance, points)
    inside = (depth < 0) & (depth > -glands.rim)
    points, depth = points[inside], depth[inside]
    # Moved off both borders along the slope, which aligns the nuclei of a thin rim.
    step = depth.clip(0.75 - glands.rim, -0.5) - depth
    uphill = _at(slope, points)
    points = _apart(points + step * uphill / np.abs(uphill).clip(0.5) ** 2, 0.74 + 0.3 * grade)
    n = len(points)
    return _Nuclei(
        place=points,
        axis=np.exp(1j * (np.angle(_at(slope, points)) + rng.normal(0, 0.15 + grade, n))),
        radius=(0.36 + 0.18 * grade) * np.exp(rng.normal(0, 0.05 + 0.27 * grade, n)),
        aspect=rng.uniform(1.1, 1.5, n),
        darkness=(0.6 + 0.7 * grade) * np.exp(rng.normal(0, 0.08 + 0.2 * grade, n)),
    )


def _stromal_nuclei(rng: Generator, glands: _Glands, stroma: NDArray[np.bool_], flow: Array) -> _Nuclei:
    """Spindle-shaped nuclei where `stroma` (h, w) is, along the fibres."""
    points = _scatter(rng, complex(*flow.shape[::-1]) / _GRID, 2.6 / glands.cellularity**0.5)
    points = points[_at(stroma, points)]
    n = len(points)
    return _Nuclei(
        place=points,
        axis=1j * np.exp(1j * (np.angle(_at(_slope(flow), points)) + rng.normal(0, 0.25, n))),
        radius=0.27 * np.exp(rng.normal(0, 0.2, n)),
        aspect=rng.uniform(2.0, 5.0, n),
        darkness=rng.uniform(0.75, 1.1, n),
    )


def _stamp(nuclei: _Nuclei, nucleus_px: float, ragged: Array) -> Array:
    """Haematoxylin of the nuclei (H, W): ellipses, paler inside, whose borders `ragged` (H, W) shifts."""
    canvas = np.zeros_like(ragged)
    rows, columns = (np.arange(n, dtype=np.float32) for n in canvas.shape)
    long_px = nuclei.radius * np.sqrt(nuclei.aspect) * nucleus_px
    short_px = long_px / nuclei.aspect
    # On the border of the ellipse xx x² + 2 xy x y + yy y² = 1.
    cos, sin = nuclei.axis.real, nuclei.axis.imag
    xx = (cos / long_px) ** 2 + (sin / short_px) ** 2
    yy = (sin / long_px) ** 2 + (cos / short_px) ** 2
    xy = cos * sin * (long_px**-2 - short_px**-2)
    fields = (nuclei.place * nucleus_px, long_px, short_px, xx, xy, yy, nuclei.darkness)
    for centre, long, short, a, b, c, dark in zip(*(f.tolist() for f in fields), strict=True):
        down, across = (_around(v, 1.25 * long + 1) for v in (centre.imag, centre.real))
        y, x = rows[down, None] - centre.imag, columns[across] - centre.real
        depth = 1 + ragged[down, across] - (a * x * x + y * (2 * b * x) + c * y * y)
        body = dark * np.minimum(0.4 * short * depth, 1 - 0.3 * depth)
        np.maximum(canvas[down, across], body, out=canvas[down, across])
    return canvas


def _fibres(rng: Generator, flow: Array, nucleus_px: float) -> Array:
    """Density of collagen (H, W), zero mean: lamellae and fibrils along the contours of `flow` (H, W)."""
    lines = np.sum([cell**0.4 * _noise(rng, (1, 4096), cell)[0] for cell in (3.0, 9.0, 28.0)], axis=0)
    lines /= lines.std()
    return 0.8 * lines[(flow * 32).astype(np.int32) % len(lines)] + 0.45 * _noise(rng, flow.shape, nucleus_px)


def _dye(
    rng: Generator,
    glands: _Glands,
    nucleus_px: float,
    *,
    distance: Array,
    fat: Array,
    fibres: Array,
    nuclei: Array,
) -> Array:
    """Amounts (H, W, 3) of haematoxylin, eosin and shade, from images (H, W) of the tissues."""

    def beyond(border: float) -> Array:
        return ((distance - border) * 8 + 0.5).clip(0, 1)

    core, outside, stroma = 1 - beyond(-glands.rim), beyond(0), beyond(glands.halo)
    rim, halo = 1 - core - outside, outside - stroma
    if glands.frond:
        stroma = stroma + core
    torn = (-1.5 - 1.5 * fibres).clip(0, 1)
    stroma = stroma * (1 - 0.9 * torn) * (1 - (6 * fat).clip(0, 0.97))
    grain = 0.05 * _noise(rng, distance.shape, 0.13 * nucleus_px)
    cover = 1 - 0.7 * nuclei.clip(0, 1)
    haematoxylin = stroma * (0.07 - 0.015 * fibres) + rim * (0.15 + grain) + halo * (0.06 + 0.02 * fibres)
    haematoxylin = haematoxylin * cover + nuclei * (1 + 2.4 * grain)
    eosin = (stroma * (0.55 + 0.16 * fibres + grain) + rim * (0.42 + grain)) * cover
    y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in distance.shape)
    shade = 1 + 0.5 * (x**2 + y[:, None] ** 2)
    # Most of the way to equal mean amounts in every field, so that colour alone does not reveal the class.
    haematoxylin *= (_MEAN_HAEMATOXYLIN / haematoxylin.mean()) ** 0.5
    eosin *= (_MEAN_EOSIN / eosin.mean()) ** 0.8
    return np.stack([haematoxylin, eosin, shade], axis=-1).clip(0)


def _noise(rng: Generator, shape: Shape, cell: float) -> Array:
    """Smooth noise of `shape`, zero mean, unit deviation, with features `cell` samples wide."""
    height, width = shape
    cell = max(cell, 1.5)
    coarse = rng.standard_normal((int(height / cell) + 4, int(width / cell) + 4), dtype=np.float32)
    box = (1.0, 1.0, 1.0 + width / cell, 1.0 + height / cell)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC, box))
    return (smooth - smooth.mean()) / (smooth.std() + 1e-6)


def _enlarge(field: Array, shape: Shape) -> Array:
    """Interpolate a map (h, w) to an image of `shape`."""
    return np.asarray(Image.fromarray(field).resize(shape[::-1], Image.Resampling.BICUBIC))


def _slope(field: Array) -> Points:
    """Gradient (h, w) of a map, per nuclear diameter."""
    down, right = (np.asarray(np.gradient(field, 1 / _GRID, axis=axis)) for axis in (0, 1))
    return right + 1j * down


def _at(field: NDArray, points: Points) -> NDArray:
    """Values (N,) of a map at points (N,); beyond its edges, those on the edge."""
    row, column = (points.imag * _GRID).astype(int), (points.real * _GRID).astype(int)
    return field[row.clip(0, field.shape[0] - 1), column.clip(0, field.shape[1] - 1)]


def _around(centre: float, reach: float) -> slice:
    """The indices within `reach` of `centre`, none below 0."""
    return slice(max(0, int(centre - reach)), max(0, int(centre + reach) + 2))


def _scatter(rng: Generator, corner: complex, spacing: float) -> Points:
    """Jittered points (N,) about `spacing` apart, from the origin to `corner` and one row beyond."""
    x = np.arange(-1, corner.real / spacing + 2)
    y = np.arange(-1, corner.imag / spacing + 2)[:, None]
    right, down = rng.uniform(-0.3, 0.3, (2, len(y), len(x)))
    return (spacing * (x + 0.5 * (y % 2) + right + 1j * (y + down))).ravel()


def _apart(points: Points, spacing: float) -> Points:
    """The points that are at least `spacing` from all points kept before them."""
    tree = scipy.spatial.KDTree(np.stack([points.real, points.imag], axis=-1))
    keep = np.ones(len(points), bool)
    for first, second in sorted(tree.query_pairs(spacing)):
        keep[second] &= not keep[first]
    return points[keep]
