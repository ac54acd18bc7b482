"""µm per pixel of a whole slide: what its file states, what people state, and which of it counts.

A file states it in OpenSlide's properties, and an OME-TIFF in the XML of its description
(https://docs.openmicroscopy.org/ome-model/latest/ome-tiff/). Statements that cannot both be true give no
scale but an error, as does a value that no microscope gives.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

import openslide

from bcd.imaging.image import ImageError
from bcd.taxonomy import MAX_MPP, MIN_MPP

Pair = tuple[float, float]
# Two statements up to 2 % apart are one, since scanners round: 0.499 is a 0.5 and a 0.49.
TOLERANCE = 1.02
# µm of a unit of length, by its symbol in OME-XML; without one it is µm. µ has two code points.
UNITS_UM = {
    "nm": 1e-3,
    "µm": 1.0,
    "μm": 1.0,
    "um": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "Å": 1e-4,
    "in": 25_400,
}
SLIDE, OME, MANIFEST, FLAG = "the slide", "its OME-XML", "the manifest", "--mpp"
OVERRIDE = "--mpp-override says what is right"
DESCRIPTION = "tiff.ImageDescription"


@dataclass(frozen=True)
class Given:
    """What people say of a slide's µm per pixel at level 0.

    Attributes:
        manifest: of its row; counts, but has to agree with the file.
        fallback: where neither file nor manifest says it.
        override: across and down, whatever else is stated.
    """

    manifest: float | None = None
    fallback: float | None = None
    override: Pair | None = None


UNKNOWN = Given()


def level0_mpp(properties: Mapping[str, str], size: tuple[int, int], given: Given) -> Pair:
    """µm per pixel of level 0, across and down.

    Args:
        properties: OpenSlide's.
        size: width and height of level 0 in pixels, by which OME-XML's image is found.
        given: what people say.

    Raises:
        ImageError: `missing_mpp` where nobody says it, `bad_mpp` where it cannot be, or two say otherwise.
    """
    if given.override:
        return given.override
    stated = {SLIDE: _of_openslide(properties), OME: _of_ome(properties.get(DESCRIPTION, ""), size)}
    if given.manifest is not None:
        if not is_possible(given.manifest):
            raise ImageError(
                "bad_mpp", f"the manifest states {given.manifest:.4g} µm/px; {_possible()}; {OVERRIDE}"
            )
        stated[MANIFEST] = (given.manifest, given.manifest)
    known = {name: pair for name, pair in stated.items() if all(map(is_possible, pair))}
    if not known and given.fallback is None:
        raise _lack(stated)
    if not known and given.fallback is not None:
        known[FLAG] = stated[FLAG] = (given.fallback, given.fallback)
    _require_agreement(stated)
    return list(known.values())[-1]


def is_stated(properties: Mapping[str, str], size: tuple[int, int], given: Given) -> bool:
    """Whether anybody states a scale, if only a wrong one: arguments as of `level0_mpp`.

    What is coarser than any slide is the resolution for print that software writes by itself.
    """
    stated = (*_of_openslide(properties), *_of_ome(properties.get(DESCRIPTION, ""), size))
    return given != UNKNOWN or any(0 < mpp <= MAX_MPP for mpp in stated)


def is_possible(mpp: float) -> bool:
    """Whether a microscope gives so many µm per pixel; what is computed from a resolution may be rounded."""
    return math.isfinite(mpp) and MIN_MPP <= round(mpp, 6) <= MAX_MPP


def _possible() -> str:
    return f"between {MIN_MPP:g} and {MAX_MPP:g} are possible"


def _lack(stated: Mapping[str, Pair]) -> ImageError:
    """The error of a slide of which nobody states what can be."""
    remedy = "--mpp gives it"
    named = [(name, pair) for name, pair in stated.items() if any(map(math.isfinite, pair))]
    if not named:
        return ImageError("missing_mpp", f"the slide does not say how many µm a pixel has; {remedy}")
    name, pair = named[-1]
    code = "bad_mpp" if any(0 < mpp < MIN_MPP for mpp in pair) else "missing_mpp"
    across, down = (f"{mpp:.4g}" if math.isfinite(mpp) else "nothing" for mpp in pair)
    values = f"{across} µm/px" if across == down else f"{across} µm/px across and {down} down"
    return ImageError(code, f"{name} states {values}; {_possible()}; {remedy}")


def _require_agreement(stated: Mapping[str, Pair]) -> None:
    """What is possible may differ by the tolerance at most, on each axis."""
    for axis in (0, 1):
        values = {name: pair[axis] for name, pair in stated.items() if is_possible(pair[axis])}
        low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        if values[high] > TOLERANCE * values[low]:
            raise ImageError(
                "bad_mpp",
                f"{low} states {values[low]:.4g} µm/px {('across', 'down')[axis]}, {high} "
                f"{values[high]:.4g}; {OVERRIDE}",
            )


def _of_openslide(properties: Mapping[str, str]) -> Pair:
    names = openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y
    across, down = (_number(properties.get(name)) for name in names)
    return across, down


def _number(text: str | None) -> float:
    """A positive number, or NaN."""
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    return value if 0 < value < math.inf else math.nan


def _of_ome(description: str, size: tuple[int, int]) -> Pair:
    """PhysicalSizeX and Y of the image of this size; NaN where there is none."""
    for pixels in _ome_pixels(description):
        if (pixels.get("SizeX"), pixels.get("SizeY")) == tuple(map(str, size)):
            across, down = (
                _number(pixels.get(f"PhysicalSize{axis}"))
                * UNITS_UM.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"), math.nan)
                for axis in "XY"
            )
            return across, down
    return math.nan, math.nan


def _ome_pixels(description: str) -> Iterator[ElementTree.Element]:
    # No document type: entities are not expanded.
    if "<OME" not in description or "<!DOCTYPE" in description:
        return
    try:
        root = ElementTree.fromstring(description.strip())
    except (ElementTree.ParseError, ValueError):
        return
    yield from root.iterfind(".//{*}Pixels")
