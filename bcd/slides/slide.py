"""Whole slides: which files they are, and their pixels at any place and level.

Coordinates are pixels of level 0, the largest image of the pyramid, as in OpenSlide. A slide that cannot be
used raises `ImageError` with code `unreadable`, `missing_mpp`, `bad_mpp`, `too_coarse` or `too_many_pixels`.
"""

import math
import struct
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Self

import numpy as np
from PIL import Image

from bcd import disk
from bcd.imaging import child, container, tiff
from bcd.imaging.image import ImageError, boundary
from bcd.slides import pixel_size
from bcd.slides.parts import pyramid, tiff_reader
from bcd.slides.readers import openslide_client, zarr
from bcd.slides.readers.interface import UNREADABLE, Facts, Reader

# Suffixes that only formats of OpenSlide 4 have (https://openslide.org/formats/), and that of OME-Zarr.
SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".dcm", disk.FOLDER_SUFFIX)
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
# A block with a damaged place is halved down to this side. What remains has a colour of stained tissue: tiles
# there are planned, and have the error. A level is given up after so many failures.
LEAST_BLOCK_PX, UNKNOWN, MOST_FAILURES = 256, (200, 120, 170), 500
# Of one region, and of one stored tile: 256 MB of RGBA. Of a whole slide: ten times the largest scans.
MAX_READ_PIXELS, MAX_SLIDE_PIXELS = container.MAX_PIXELS, 10**12
# From this size, NDPI has longer addresses than TIFF, which it is otherwise.
NDPI_BYTES = 2**32
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Slide:
    """An open slide, and a context manager that closes it.

    Size and µm per pixel (across and down) are those of level 0, `downsamples` are level-0 pixels per pixel
    of each level, and the bounds are the upper left corner at level 0 of the scanned region, to which QuPath
    crops a slide.
    """

    reader: Reader
    width_px: int
    height_px: int
    mpp_x: float
    mpp_y: float
    downsamples: tuple[float, ...]
    bounds_x_px: int = 0
    bounds_y_px: int = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.reader.close()

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
            return self.reader.read(*place, level, *size)

    def request(self, rectangles: Iterable[tiff_reader.Rectangle]) -> None:
        """Request from a store, in few requests, what `read` will need for rectangles; returns at once."""
        if isinstance(self.reader, tiff_reader.TiffReader):
            self.reader.request(rectangles)

    def thumbnail(self, max_side_px: int = 2048) -> tuple[np.ndarray, float]:
        """The whole slide as uint8 (h, w, 3) RGB, and its scale in pixels per level-0 pixel, at most 1.

        Memory does not grow with the slide, even without a pyramid. What is damaged has the colour `UNKNOWN`.
        Raises ImageError `unreadable` where nothing can be read, or as `child.call`.
        """
        scale = min(1.0, max_side_px / max(self.width_px, self.height_px))
        best = max((i for i, d in enumerate(self.downsamples) if d <= 1 / scale), default=0)
        # Where all of a level is damaged, a finer one; coarser ones come last.
        levels = [*range(best, -1, -1), *range(best + 1, len(self.downsamples))]
        for level in levels:
            try:
                return self._from_level(level, scale), scale
            except ImageError as error:
                if level == levels[-1] or error.code != UNREADABLE[0]:
                    raise
        raise AssertionError("the last level returns or raises")

    def _from_level(self, level: int, scale: float) -> np.ndarray:
        """The thumbnail from one level. Raises ImageError where nothing of it can be read."""
        factor = 1 / (scale * self.downsamples[level])
        height, width = (max(1, round(side * scale)) for side in (self.height_px, self.width_px))
        result = np.empty((height, width, 3), np.uint8)
        step, least = max(1, int(BLOCK_PX / factor) - 1), max(1, int(LEAST_BLOCK_PX / factor))
        corners = product(range(0, height, step), range(0, width, step))
        blocks = deque((x, y, min(step, width - x), min(step, height - y)) for y, x in corners)
        good = failed = 0
        while blocks:
            left, top, across, down = blocks.popleft()
            block = result[top : top + down, left : left + across]
            try:
                block[:] = self._reduced(left, top, across, down, level, factor)
                good += 1
            except ImageError as error:
                failed += 1
                block[:] = UNKNOWN
                is_crash = isinstance(error, child.CrashError)
                blocks += [] if is_crash else _halves(left, top, across, down, least)
                if error.code != UNREADABLE[0] or failed > MOST_FAILURES or not (good or blocks):
                    raise
        return result

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


def _halves(left: int, top: int, width: int, height: int, least: int) -> list[Box]:
    """Halves of a rectangle of thumbnail pixels; none where its sides have `least`."""
    if max(width, height) <= least:
        return []
    if width >= height:
        half = width // 2
        return [(left, top, half, height), (left + half, top, width - half, height)]
    half = height // 2
    return [(left, top, width, half), (left, top + half, width, height - half)]


def open_slide(
    path: str | Path, given: pixel_size.Given = pixel_size.UNKNOWN, budget: child.Budget = child.ARCHIVE
) -> Slide:
    """Open a slide on the local disk, an OME-Zarr at any URI, with the user's statements of its µm per pixel.

    `.mrxs` and `.dcm` require their `companions` where they were in the archive. The budget is that of each
    read. Raises ImageError `unreadable`, `too_many_pixels`, `unsupported_format`, `missing_mpp` and `bad_mpp`
    of `level0_mpp`, or as `child.call`; so does a read.
    """
    return _open(_open_reader(path, budget), given)


def open_parts(uri: str, given: pixel_size.Given = pixel_size.UNKNOWN) -> Slide | None:
    """Open a slide at any URI, of which only the parts that are needed are read; None for a file that has to
    be on the local disk, for `open_slide`. Raises ImageError as that does, and StorageError."""
    if disk.is_folder_file(uri) or (reader := tiff_reader.open_reader(uri)) is None:
        return None
    return _open(reader, given)


def _open(reader: Reader, given: pixel_size.Given) -> Slide:
    with ExitStack() as stack:
        stack.callback(reader.close)
        facts = reader.facts
        width, height = facts.sizes[0]
        if width * height > MAX_SLIDE_PIXELS:
            raise ImageError("too_many_pixels", f"a slide of {width:,} x {height:,} px is impossible")
        mpp = pixel_size.level0_mpp(facts.properties, (width, height), given)
        stack.pop_all()
    return Slide(reader, width, height, *mpp, facts.downsamples, *_bounds(facts.properties))


def _open_reader(path: str | Path, budget: child.Budget) -> Reader:
    if disk.is_folder_file(path):
        return zarr.ZarrReader(str(path))
    if Path(path).is_file() and (reader := tiff_reader.open_reader(str(path))) is not None:
        return reader
    with boundary(*UNREADABLE):
        if fault := _fault(Path(path)):
            raise fault
    return openslide_client.OpenSlideReader(Path(path), budget)


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
    """The reason not to open a file with OpenSlide, in words that its user understands."""
    size_bytes = path.stat().st_size
    try:
        with path.open("rb") as file:
            for page in tiff.iterate_pages(file, size_bytes):
                _require_tiles(page, size_bytes)
                _require_colours(page)
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


def _require_colours(page: tiff.Page) -> None:
    """Reject an OME-TIFF with a page for each colour, of which OpenSlide would show the first as grey."""
    channels = pyramid.CHANNELS_OME.search(page.description) if b"<OME" in page.description[:1_000] else None
    if channels and page.one(tiff.SAMPLES, 1) < int(channels[1]):
        message = f"an OME-TIFF with {int(channels[1])} channels in pages of their own; expected RGB in one"
        raise ImageError("unsupported_format", message)


def is_slide(
    path: str | Path, given: pixel_size.Given = pixel_size.UNKNOWN, budget: child.Budget = child.ARCHIVE
) -> bool:
    """Whether a file on the local disk is a whole slide, and not an image for `decoder.decode_safely`.

    The suffix decides, so that a damaged `.svs` is a damaged slide; for other suffixes, the content, and
    `given`, the user's statements of its µm per pixel. Raises ImageError `unreadable`, or as `child.call`.
    """
    name = str(path).lower()
    if name.endswith(SLIDE_SUFFIXES + FIELD_SUFFIXES):
        return name.endswith(SLIDE_SUFFIXES)
    with boundary(*UNREADABLE):
        if _fault(Path(path)):
            return False
    layout = openslide_client.detect_layout(Path(path), budget)
    if layout != TILED_TIFF:
        return layout is not None
    with closing(_open_reader(path, budget)) as reader:
        return _has_levels_or_scale(reader.facts, given)


def _has_levels_or_scale(facts: Facts, given: pixel_size.Given) -> bool:
    """Whether a tiled TIFF from no known scanner has a pyramid or a scale: otherwise it is a field."""
    return len(facts.sizes) > 1 or pixel_size.is_stated(facts.properties, facts.sizes[0], given)


def is_slide_by_tags(uri: str, given: pixel_size.Given = pixel_size.UNKNOWN) -> bool | None:
    """`is_slide` of a file at any URI by what is read of it in parts; None where that does not say. Raises
    StorageError."""
    if uri.lower().endswith(SLIDE_SUFFIXES + FIELD_SUFFIXES):
        return is_slide(uri, given)
    reader = tiff_reader.open_reader(uri)
    if reader is None:
        return None
    with closing(reader):
        is_scanner = reader.facts.properties[pyramid.LAYOUT] != TILED_TIFF
        return is_scanner or _has_levels_or_scale(reader.facts, given)


def is_unnamed(path: str) -> bool:
    """Whether a name has no suffix, or a number for one, as in the UID of a DICOM object."""
    suffix = PurePosixPath(path).suffix
    return not suffix or suffix[1:].isdigit()


def companions(paths: Sequence[str], path: str) -> list[str]:
    """The listed paths that a MIRAX slide requires: all below the folder of its name."""
    folder = PurePosixPath(path).with_suffix("")
    return [other for other in paths if folder in PurePosixPath(other).parents]
