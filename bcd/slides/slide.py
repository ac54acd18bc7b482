"""Whole slides: which files they are, and their pixels at any place and level.

Coordinates are pixels of level 0, the largest image of the pyramid, as in OpenSlide. A slide that cannot be
used raises `ImageError` with code `unreadable`, `missing_mpp`, `bad_mpp`, `too_coarse` or `too_many_pixels`.
"""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
import openslide
from PIL import Image

from bcd.imaging import container, pixel_size, tiff
from bcd.imaging.image import ImageError, boundary, to_srgb
from bcd.slides.parts import pyramid, tiff_reader

# Suffixes that only formats of OpenSlide 4 have. https://openslide.org/formats/
SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".dcm")
# Never a slide. Others, such as TIFF or files without a suffix, are slides where OpenSlide knows the layout.
FIELD_SUFFIXES = (".png", ".jpg", ".jpeg")
MRXS, DICOM = ".mrxs", ".dcm"
# OpenSlide's name for TIFF from no known scanner.
TILED_TIFF = "generic-tiff"
# A level may be up to 2 % too coarse, since scanners round: 0.499 is used for 0.49.
LEVEL_TOLERANCE = 1.02
# Enlarging level 0 by more would invent detail that the network was trained to look for.
MAX_ENLARGING = 1.25
# Side of a block of the slide that is decoded at once for the thumbnail: 16 MiB of RGBA.
BLOCK_PX = 2048
# Of one region, and of one stored tile: 256 MB of RGBA. Of a whole slide: ten times the largest scans.
MAX_READ_PIXELS, MAX_SLIDE_PIXELS = container.MAX_PIXELS, 10**12
# From this size, NDPI has longer addresses than TIFF, which it is otherwise.
NDPI_BYTES = 2**32
UNREADABLE = "unreadable", "the slide cannot be read"
OPAQUE = 255


@dataclass(frozen=True)
class Slide:
    """An open slide, and a context manager that closes it.

    Size and µm per pixel (across and down) are those of level 0, `downsamples` are level-0 pixels per pixel
    of each level, the ICC profile is None for sRGB, and the bounds are the upper left corner at level 0 of
    the scanned region, to which QuPath crops a slide. It is read by `reader`, or else by OpenSlide's handle.
    """

    handle: openslide.OpenSlide | None
    width_px: int
    height_px: int
    mpp_x: float
    mpp_y: float
    downsamples: tuple[float, ...]
    profile: bytes | None = None
    bounds_x_px: int = 0
    bounds_y_px: int = 0
    reader: tiff_reader.TiffReader | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for opened in (self.handle, self.reader):
            if opened:
                opened.close()

    def level_for(self, target_mpp: float) -> int:
        """The smallest level that has the detail of `target_mpp` µm/px, across and down. Raises ImageError
        `too_coarse` where even level 0 is much coarser."""
        coarser = max(self.mpp_x, self.mpp_y)
        if coarser > MAX_ENLARGING * target_mpp:
            raise ImageError(
                "too_coarse",
                f"the slide has {coarser:.3g} µm/px; the model needs {target_mpp:.3g} or finer; where the "
                "first is wrong, --mpp-override says what is right",
            )
        fitting = (d for d in self.downsamples if coarser * d <= LEVEL_TOLERANCE * target_mpp)
        return self.downsamples.index(max(fitting, default=self.downsamples[0]))

    def read(
        self, x_level0_px: int, y_level0_px: int, level: int, width_px: int, height_px: int
    ) -> np.ndarray:
        """Read a rectangle as uint8 (height_px, width_px, 3) sRGB, white where the slide has no pixels.

        Left and upper edge are in pixels of level 0 at every level, width and height in pixels of `level`.
        Raises ImageError `unreadable`, or `too_many_pixels` for one read, and StorageError.
        """
        place, size = (int(x_level0_px), int(y_level0_px)), (int(width_px), int(height_px))
        if size[0] * size[1] > MAX_READ_PIXELS:
            needed = f"a tile needs {size[0]:,} x {size[1]:,} px of the slide"
            raise ImageError("too_many_pixels", f"{needed}; at most {MAX_READ_PIXELS:,} fit")
        with boundary(*UNREADABLE):
            if self.reader:
                return self.reader.read(*place, level, *size)
            assert self.handle
            region = self.handle.read_region(place, level, size)
            colors = self._in_srgb(region.convert("RGB"))
            if region.getchannel("A").getextrema()[0] != OPAQUE:
                paper = Image.new("RGB", size, "white")
                paper.paste(colors, mask=region)
                return np.asarray(paper)
            return np.asarray(colors)

    def request(self, rectangles: Iterable[tiff_reader.Rectangle]) -> None:
        """Request from a store, in few requests, what `read` will need for rectangles; returns at once."""
        if self.reader:
            self.reader.request(rectangles)

    def _in_srgb(self, colors: Image.Image) -> Image.Image:
        return to_srgb(colors, self.profile) if self.profile else colors

    def thumbnail(self, max_side_px: int = 2048) -> tuple[np.ndarray, float]:
        """The whole slide as uint8 (h, w, 3) RGB, and its scale in pixels per level-0 pixel, at most 1.

        Memory does not grow with the slide, even without a pyramid. Raises ImageError `unreadable`.
        """
        scale = min(1.0, max_side_px / max(self.width_px, self.height_px))
        level = max(number for number, d in enumerate(self.downsamples) if number == 0 or d * scale <= 1)
        factor = 1 / (scale * self.downsamples[level])
        height, width = (max(1, round(side * scale)) for side in (self.height_px, self.width_px))
        result = np.empty((height, width, 3), np.uint8)
        step = max(1, int(BLOCK_PX / factor) - 1)
        for top in range(0, height, step):
            for left in range(0, width, step):
                block = result[top : top + step, left : left + step]
                block[:] = self._reduced(left, top, block.shape[1], block.shape[0], level, factor)
        return result, scale

    def _reduced(self, left: int, top: int, width: int, height: int, level: int, factor: float) -> np.ndarray:
        """One block of the thumbnail; a pixel is the mean of about `factor` x `factor` pixels of the level.

        The box has fractions of pixels, so that blocks join without a seam.
        """
        x, y = math.floor(left * factor), math.floor(top * factor)
        box = left * factor - x, top * factor - y, (left + width) * factor - x, (top + height) * factor - y
        downsample = self.downsamples[level]
        pixels = self.read(
            round(x * downsample), round(y * downsample), level, math.ceil(box[2]), math.ceil(box[3])
        )
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX, box))


def open_slide(path: str | Path, given: pixel_size.Given = pixel_size.UNKNOWN) -> Slide:
    """Open a slide on the local disk, with the user's statements of its µm per pixel.

    `.mrxs` and `.dcm` require their `companions` where they were in the archive. Raises ImageError
    `unreadable`, `too_many_pixels`, or `missing_mpp` and `bad_mpp` of `level0_mpp`, and StorageError.
    """
    with boundary(*UNREADABLE), ExitStack() as stack:
        if Path(path).is_file() and (opened := open_parts(str(path), given)):
            return opened
        if fault := _fault(Path(path)):
            raise fault
        handle = openslide.OpenSlide(path)
        stack.callback(handle.close)
        size, properties, profile = handle.dimensions, dict(handle.properties), handle.color_profile
        mpp = _require_scale(properties, size, given)
        downsamples = tuple(handle.level_downsamples)
        stack.pop_all()
    icc = profile.tobytes() if profile else None
    return Slide(handle, *size, *mpp, downsamples, icc, *_bounds(properties))


def open_parts(uri: str, given: pixel_size.Given = pixel_size.UNKNOWN) -> Slide | None:
    """Open a slide at any URI, of which only the parts that are needed are read; None for a file that has to
    be on the local disk, for `open_slide`. Raises ImageError as that does, and StorageError."""
    with ExitStack() as stack:
        reader = tiff_reader.open_reader(uri)
        if reader is None:
            return None
        stack.callback(reader.close)
        facts = reader.facts
        mpp = _require_scale(facts.properties, facts.sizes[0], given)
        stack.pop_all()
    return Slide(None, *facts.sizes[0], *mpp, facts.downsamples, facts.profile, reader=reader)


def _require_scale(
    properties: Mapping[str, str], size: tuple[int, int], given: pixel_size.Given
) -> pixel_size.Pair:
    if size[0] * size[1] > MAX_SLIDE_PIXELS:
        raise ImageError("too_many_pixels", f"a slide of {size[0]:,} x {size[1]:,} px is impossible")
    return pixel_size.level0_mpp(properties, size, given)


def _bounds(properties: Mapping[str, str]) -> tuple[int, int]:
    """Upper left corner at level 0 of the region that QuPath shows: as there, all four numbers count or none.

    https://github.com/qupath/qupath, OpenslideImageServer.java
    """
    try:
        x, y, _, _ = (int(properties[f"openslide.bounds-{side}"]) for side in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return 0, 0
    return x, y


def _fault(path: Path) -> ImageError | None:
    """The reason not to open a file with OpenSlide, which ends the process where it cannot allocate as much
    memory as tags and tiles claim."""
    size_bytes = path.stat().st_size
    try:
        with path.open("rb") as file:
            for page in tiff.iterate_pages(file, size_bytes):
                _require_tiles(page, size_bytes)
        return None
    except ImageError as error:
        if error.code != "truncated":
            return error
        damage = error.message
    except struct.error:
        damage = "it ends within its tags"
    if size_bytes >= NDPI_BYTES:
        return None
    return ImageError("unreadable", f"{UNREADABLE[1]}: {damage}")


def _require_tiles(page: tiff.Page, size_bytes: int) -> None:
    if page.largest_part_bytes > size_bytes:
        raise ImageError("truncated", "a tile claims more bytes than the file has")
    width, height = page.one(tiff.TILE_WIDTH), page.one(tiff.TILE_HEIGHT)
    if width * height > MAX_READ_PIXELS:
        raise ImageError("too_many_pixels", f"a slide stored in tiles of {width:,} x {height:,} px")


def is_slide(path: str | Path, given: pixel_size.Given = pixel_size.UNKNOWN) -> bool:
    """Whether a file on the local disk is a whole slide, and not an image for `decoder.decode_safely`.

    The suffix decides, so that a damaged `.svs` is a damaged slide; for other suffixes, the content, and
    `given`, the user's statements of its µm per pixel. Raises ImageError `unreadable`.
    """
    name = str(path).lower()
    if name.endswith(SLIDE_SUFFIXES + FIELD_SUFFIXES):
        return name.endswith(SLIDE_SUFFIXES)
    with boundary(*UNREADABLE):
        if _fault(Path(path)):
            return False
        layout = openslide.OpenSlide.detect_format(path)
        return layout is not None and (layout != TILED_TIFF or _is_more_than_tiled(Path(path), given))


def _is_more_than_tiled(path: Path, given: pixel_size.Given) -> bool:
    with openslide.OpenSlide(path) as handle:
        return _has_levels_or_scale(handle.level_dimensions, handle.properties, given)


def _has_levels_or_scale(
    sizes: Sequence[tuple[int, int]], properties: Mapping[str, str], given: pixel_size.Given
) -> bool:
    """Whether a tiled TIFF from no known scanner has a pyramid or a scale: otherwise it is a field."""
    return len(sizes) > 1 or pixel_size.is_stated(properties, sizes[0], given)


def is_slide_by_tags(uri: str, given: pixel_size.Given = pixel_size.UNKNOWN) -> bool | None:
    """`is_slide` of a file at any URI by what is read of it in parts; None where that does not say. Raises
    StorageError."""
    if uri.lower().endswith(SLIDE_SUFFIXES + FIELD_SUFFIXES):
        return is_slide(uri, given)
    reader = tiff_reader.open_reader(uri)
    if reader is None:
        return None
    reader.close()
    sizes, properties = reader.facts.sizes, reader.facts.properties
    return properties[pyramid.LAYOUT] != TILED_TIFF or _has_levels_or_scale(sizes, properties, given)


def is_unnamed(path: str) -> bool:
    """Whether a name has no suffix, or a number for one, as in the UID of a DICOM object."""
    suffix = PurePosixPath(path).suffix
    return not suffix or suffix[1:].isdigit()


def companions(paths: Sequence[str], path: str) -> list[str]:
    """The listed paths that a MIRAX slide requires: all below the folder of its name."""
    folder = PurePosixPath(path).with_suffix("")
    return [other for other in paths if folder in PurePosixPath(other).parents]
