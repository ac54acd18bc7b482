"""The levels of a TIFF slide and what it states, from its tags alone.

Read are the layouts of which nothing has to be guessed, plain TIFF and Aperio with all levels in tiles of
RGB, and read as OpenSlide 4 does (openslide-vendor-generic-tiff.c, openslide-vendor-aperio.c). Smaller copies
below the first page, as of OME-TIFF, are levels, too; OpenSlide does not see them. All others are left to it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image

from bcd.errors import ImageError
from bcd.imaging import tiff
from bcd.imaging.image import to_srgb
from bcd.slides.parts.jpeg_tiles import jpeg_decoder
from bcd.slides.parts.level import Level
from bcd.slides.parts.packed_tiles import packed_decoder
from bcd.slides.readers.interface import MPP_X, MPP_Y

# OpenSlide's names of the layouts and of what a slide states.
APERIO, PLAIN = "aperio", "generic-tiff"
LAYOUT, DESCRIPTION = "openslide.vendor", "tiff.ImageDescription"
# Tags of other layouts: Ventana's XML, thumbnails and masks as of old, those of Argos and Hamamatsu.
OTHERS = {700, tiff.OLD_SUBFILE, 65_000, *range(65_420, 65_500)}
# Programs of Philips and Trestle, and makers, with layouts of their own; and the XML of Leica.
OWN_LAYOUTS, LEICA = (b"Philips", b"MedScan", b"Huron"), b"<scn"
# OME-TIFF with colours in pages of their own.
CHANNELS_OME = re.compile(rb'SizeC="(\d{1,9})"')
REDUCED, MASK = 1, 4
# Of one decoded tile: 48 MiB. Those of scanners have 240 to 1,024 px.
MAX_TILE_PIXELS = 2**24
# Tags of one value. OpenSlide ignores a page that is irregular, and for some faults those that follow.
SINGLE = {tiff.SUBFILE, tiff.WIDTH, tiff.HEIGHT, tiff.COMPRESSION, tiff.PHOTOMETRIC, tiff.SAMPLES}
SINGLE |= {tiff.PLANAR, tiff.TILE_WIDTH, tiff.TILE_HEIGHT, tiff.UNIT}
# µm of a unit of the resolution: inch, which TIFF has by default, and centimetre.
INCH, CENTIMETRE = 2, 3
UNITS_UM = {INCH: 25_400.0, CENTIMETRE: 10_000.0}


@dataclass(frozen=True)
class Pyramid:
    """Levels, the largest first, level-0 pixels per pixel of each, statements by OpenSlide's names, and the
    ICC profile, None for sRGB."""

    levels: Sequence[Level]
    downsamples: tuple[float, ...]
    properties: Mapping[str, str]
    profile: bytes | None


def read_pyramid(file: tiff.Readable, size_bytes: int) -> Pyramid | None:
    """Read the tags of a file; None for another layout. Raises ImageError for damaged tags, and any exception
    for text that is not UTF-8 or a damaged profile: OpenSlide judges them."""
    pages = list[tiff.Page]()
    for page in tiff.iterate_pages(file, size_bytes):
        if not _is_known(page):
            return None
        pages.append(page)
    if not pages or not _is_tiled(pages[0]) or _is_foreign(file, pages[0]):
        return None
    description = pages[0].description.split(b"\0")[0].decode()
    layout = APERIO if description.startswith("Aperio") else PLAIN
    if layout == PLAIN:
        pages += tiff.pages_below(file, pages[0], size_bytes)
        if any(_is_jpeg_2000(page) or not _is_known(page) for page in pages):
            return None
    levels = [read_level(file, page, size_bytes) for page in _levels(pages, layout)]
    found = [level for level in levels if level is not None]
    downsamples = _downsamples(found)
    if len(found) < len(levels) or downsamples is None:
        return None
    scale = _aperio_mpp(description) if layout == APERIO else _plain_mpp(file, pages[0])
    stated = {LAYOUT: layout} | ({DESCRIPTION: description} if description else {})
    profile = tiff.values(file, pages[0], tiff.PROFILE).tobytes() or None
    to_srgb(Image.new("RGB", (1, 1)), profile)
    return Pyramid(found, downsamples, stated | scale, profile)


def _is_known(page: tiff.Page) -> bool:
    """Whether a page could be of one of the two layouts, a level or another image."""
    is_flat = page.one(tiff.DEPTH, 1) == page.one(tiff.TILE_DEPTH, 1) == 1
    is_mask = page.one(tiff.SUBFILE) & MASK
    compression = page.one(tiff.COMPRESSION, tiff.UNCOMPRESSED)
    is_read = compression in tiff.COMPRESSIONS or _is_jpeg_2000(page)
    return is_flat and not is_mask and is_read and not page.present & OTHERS and _is_regular(page)


def _is_jpeg_2000(page: tiff.Page) -> bool:
    return page.one(tiff.COMPRESSION) in tiff.APERIO_JPEG_2000


def _is_regular(page: tiff.Page) -> bool:
    """Whether a page has the tags that each has to have, with as many values as they have to have."""
    bits, parts = page.tags.get(tiff.BITS, ()), (tiff.PART_PLACES, tiff.PART_BYTES)
    return (
        all(len(page.tags.get(tag, (0,))) == 1 for tag in SINGLE)
        and all(any(tag in page.long for tag in tags) for tags in parts)
        and (len(bits), len(set(bits))) == (page.one(tiff.SAMPLES, 1), 1)
        and min(page.size) > 0
    )


def _is_tiled(page: tiff.Page) -> bool:
    return tiff.TILE_WIDTH in page.present


def _is_foreign(file: tiff.Readable, page: tiff.Page) -> bool:
    names = (tiff.values(file, page, tag).tobytes() for tag in (tiff.SOFTWARE, tiff.MAKE))
    is_own = any(name.startswith(OWN_LAYOUTS) for name in names) or LEICA in page.description[:1_000]
    return is_own or any(int(n) > page.one(tiff.SAMPLES) for n in CHANNELS_OME.findall(page.description))


def _levels(pages: Sequence[tiff.Page], layout: str) -> list[tiff.Page]:
    """The first page, and the tiled ones among the others: of plain TIFF those that are marked as smaller."""
    others = [page for page in pages[1:] if _is_tiled(page)]
    if layout == PLAIN:
        others = sorted((p for p in others if p.one(tiff.SUBFILE) & REDUCED), key=lambda p: -p.size[0])
    return [pages[0], *others]


def read_level(file: tiff.Readable, page: tiff.Page, file_bytes: int) -> Level | None:
    """The level in a page, None where it is stored in another form or some of its tiles are missing. Raises
    ImageError for damaged tags."""
    across, down = page.one(tiff.TILE_WIDTH), page.one(tiff.TILE_HEIGHT)
    is_rgb = page.tags.get(tiff.BITS) == (8, 8, 8) and page.one(tiff.SAMPLES) == 3
    if not is_rgb or not 0 < across * down <= MAX_TILE_PIXELS or not math.prod(page.size) > 0:
        return None
    is_jpeg = page.one(tiff.COMPRESSION) == tiff.JPEG
    decode = jpeg_decoder(file, page) if is_jpeg else packed_decoder(page)
    if decode is None:
        return None
    places, n_bytes = (tiff.values(file, page, tag) for tag in (tiff.TILE_PLACES, tiff.TILE_BYTES))
    level = Level(*page.size, across, down, places, n_bytes, decode, file_bytes)
    n_parts = level.n_tiles * (3 if page.one(tiff.PLANAR, 1) == 2 else 1)
    return level if len(places) == len(n_bytes) == n_parts and n_bytes.all() else None


def _downsamples(levels: Sequence[Level]) -> tuple[float, ...] | None:
    """Of each level, as OpenSlide computes it; None where levels are not ordered by size."""
    if not levels or not all(before.width_px > after.width_px for before, after in pairwise(levels)):
        return None
    width, height = levels[0].width_px, levels[0].height_px
    smaller = [(height / level.height_px + width / level.width_px) / 2 for level in levels[1:]]
    found = (1.0, *smaller)
    return found if all(before <= after for before, after in pairwise(found)) else None


def _aperio_mpp(description: str) -> dict[str, str]:
    pairs = (part.partition("=") for part in description.split("|")[1:])
    values = {name.strip(): value.strip().replace(",", ".") for name, _, value in pairs}
    try:
        return dict.fromkeys((MPP_X, MPP_Y), repr(float(values["MPP"])))
    except (KeyError, ValueError):
        return {}


def _plain_mpp(file: tiff.Readable, page: tiff.Page) -> dict[str, str]:
    """Of both axes, or none: a page may lack the unit of length or the resolution of an axis."""
    unit, found = UNITS_UM.get(page.one(tiff.UNIT, INCH)), dict[str, str]()
    for name, tag in ((MPP_X, tiff.X_RESOLUTION), (MPP_Y, tiff.Y_RESOLUTION)):
        if unit is None or tag not in page.present:
            return {}
        if tag not in page.long or page.long[tag][1] != tiff.FRACTION:
            raise ImageError("unsupported_format", "its resolution is not a fraction")
        above, below = tiff.values(file, page, tag).tolist()  # ValueError for several
        if not above or not below:
            return {}
        found[name] = repr(unit / (above / below))
    return found
