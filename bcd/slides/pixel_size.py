"""µm per pixel of a whole slide: stated by its file or by the user, and which of them is used.

A file states it in OpenSlide's properties, and an OME-TIFF in the XML of its description
(https://docs.openmicroscopy.org/ome-model/latest/ome-tiff/). Contradictory statements are an error, and so is
a value that no microscope has.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

from bcd.imaging.image import ImageError
from bcd.slides.readers.interface import MPP_X, MPP_Y
from bcd.taxonomy import MAX_MPP, MIN_MPP

Pair = tuple[float, float]
# Statements up to 2 % apart agree, since scanners round: 0.499 agrees with 0.5 and with 0.49.
TOLERANCE = 1.02
# µm of a unit of length, by its symbol in OME-XML; µm is the default. µ has two code points.
UNITS_UM = {"nm": 1e-3, "µm": 1, "μm": 1, "um": 1, "mm": 1e3, "cm": 1e4, "m": 1e6, "Å": 1e-4, "in": 25_400}
SLIDE, OME, MANIFEST, FLAG = "the slide", "its OME-XML", "the manifest", "--mpp"
OVERRIDE = "--mpp-override says what is right"
DESCRIPTION = "tiff.ImageDescription"


@dataclass(frozen=True)
class Given:
    """The user's statements of a slide's µm per pixel at level 0: that of its row, which has to agree with
    the file; one for slides without any; and one, across and down, that overrides all."""

    manifest: float | None = None
    fallback: float | None = None
    override: Pair | None = None


UNKNOWN = Given()


def level0_mpp(properties: Mapping[str, str], size: tuple[int, int], given: Given) -> Pair:
    """µm per pixel of level 0, across and down, from OpenSlide's properties and the user's statements.

    Width and height of level 0 identify the image in OME-XML. Raises ImageError `missing_mpp` where none is
    stated, `bad_mpp` for an impossible one or a contradiction.
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
    """Whether file or user state a scale, even a wrong one; arguments as of `level0_mpp`.

    A value coarser than any slide is a print resolution that software writes by default.
    """
    stated = (*_of_openslide(properties), *_of_ome(properties.get(DESCRIPTION, ""), size))
    return given != UNKNOWN or any(0 < mpp <= MAX_MPP for mpp in stated)


def is_possible(mpp: float) -> bool:
    """Whether a microscope has this many µm per pixel, up to the rounding of a stated resolution."""
    return math.isfinite(mpp) and MIN_MPP <= round(mpp, 6) <= MAX_MPP


def _possible() -> str:
    return f"between {MIN_MPP:g} and {MAX_MPP:g} are possible"


def _lack(stated: Mapping[str, Pair]) -> ImageError:
    """The error of a slide without a possible statement."""
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
    """Require that on each axis the possible statements differ by the tolerance at most."""
    for axis, direction in enumerate(("across", "down")):
        values = {name: pair[axis] for name, pair in stated.items() if is_possible(pair[axis])}
        low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
        if values[high] > TOLERANCE * values[low]:
            both = f"{low} states {values[low]:.4g} µm/px {direction}, {high} {values[high]:.4g}"
            raise ImageError("bad_mpp", f"{both}; {OVERRIDE}")


def _of_openslide(properties: Mapping[str, str]) -> Pair:
    return _number(properties.get(MPP_X)), _number(properties.get(MPP_Y))


def _number(text: str | None) -> float:
    """A positive number, or NaN."""
    try:
        value = float(text or "nan")
    except ValueError:
        return math.nan
    return value if 0 < value < math.inf else math.nan


def _of_ome(description: str, size: tuple[int, int]) -> Pair:
    """PhysicalSizeX and Y of the image of this size; NaN where there is none."""
    # Without a document type no entity is expanded.
    if "<OME" not in description or "<!DOCTYPE" in description:
        return math.nan, math.nan
    try:
        root = ElementTree.fromstring(description.strip())
    except (ElementTree.ParseError, ValueError):
        return math.nan, math.nan
    for pixels in root.iterfind(".//{*}Pixels"):
        if (pixels.get("SizeX"), pixels.get("SizeY")) == tuple(map(str, size)):
            return _physical_size_um(pixels, "X"), _physical_size_um(pixels, "Y")
    return math.nan, math.nan


def _physical_size_um(pixels: ElementTree.Element, axis: str) -> float:
    unit = pixels.get(f"PhysicalSize{axis}Unit", "µm")
    return _number(pixels.get(f"PhysicalSize{axis}")) * UNITS_UM.get(unit, math.nan)
