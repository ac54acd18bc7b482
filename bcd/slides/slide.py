"""Whole slides: which files they are, and their pixels at any place and level.

Coordinates are pixels of level 0, the largest picture of the pyramid, as in OpenSlide. A slide that cannot
be used raises `image.ImageError`, here with code `unreadable`, `missing_mpp`, `bad_mpp` or `too_coarse`.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

import numpy as np
import openslide
from PIL import Image

from bcd.imaging import container, pixel_size, tiff
from bcd.imaging.image import ImageError, boundary, to_srgb

# Formats of OpenSlide 4 whose suffix stands for nothing else. https://openslide.org/formats/
SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".dcm")
# Never a slide. All others, such as TIFF or files without a suffix, are one where OpenSlide knows the layout.
FIELD_SUFFIXES = (".png", ".jpg", ".jpeg")
MRXS, DICOM = ".mrxs", ".dcm"
# OpenSlide's word for what any software writes.
TILED_TIFF = "generic-tiff"
# A level up to 2 % too coarse counts as fitting, since scanners round: 0.499 serves for 0.49.
LEVEL_TOLERANCE = 1.02
# Beyond this, enlarging level 0 would invent detail that the network was taught to look for.
MAX_ENLARGING = 1.25
# Side of what is decoded at once for the thumbnail: 16 MiB of RGBA, however large the slide.
BLOCK_PX = 2048
# Of one region, and of one tile as the file stores it: 256 MB of RGBA, whatever the metadata ask for. Of a
# whole slide: the largest scans have a tenth of it.
MAX_READ_PIXELS, MAX_SLIDE_PIXELS = container.MAX_PIXELS, 10**12
# From here on NDPI, a TIFF otherwise, has longer addresses than TIFF.
NDPI_BYTES = 2**32
UNREADABLE = "unreadable", "the slide cannot be read"


@dataclass(frozen=True)
class Slide:
    """An open slide; as a context manager it closes itself.

    Attributes:
        handle: OpenSlide's own.
        width_px: of level 0.
        height_px: of level 0.
        mpp_x: µm per pixel of level 0 across.
        mpp_y: the same down; rarely another.
        downsamples: level-0 pixels per pixel of each level.
        profile: ICC profile of its pixels, None for sRGB.
        bounds_x_px: left edge at level 0 of what QuPath shows: it crops a slide to what was scanned.
        bounds_y_px: its upper edge.
    """

    handle: openslide.OpenSlide
    width_px: int
    height_px: int
    mpp_x: float
    mpp_y: float
    downsamples: tuple[float, ...]
    profile: bytes | None = None
    bounds_x_px: int = 0
    bounds_y_px: int = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.handle.close()

    def level_for(self, target_mpp: float) -> int:
        """The smallest level that still holds the detail of `target_mpp` µm/px, across and down.

        Raises:
            ImageError: `too_coarse` where even level 0 is far from it.
        """
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
        """Pixels of a rectangle, in sRGB, white where the slide has none.

        Args:
            x_level0_px: left edge, in pixels of level 0 at every level.
            y_level0_px: upper edge.
            level: of the pyramid.
            width_px: in pixels of that level.
            height_px: in pixels of that level.

        Returns:
            uint8 (height_px, width_px, 3) RGB.

        Raises:
            ImageError: `unreadable`, or `too_many_pixels` for one read.
        """
        place, size = (int(x_level0_px), int(y_level0_px)), (int(width_px), int(height_px))
        if size[0] * size[1] > MAX_READ_PIXELS:
            raise ImageError(
                "too_many_pixels",
                f"a tile needs {size[0]:,} x {size[1]:,} px of the slide; at most {MAX_READ_PIXELS:,} fit",
            )
        with boundary(*UNREADABLE):
            region = self.handle.read_region(place, level, size)
            paper = Image.new("RGB", size, "white")
            colors = to_srgb(region.convert("RGB"), self.profile) if self.profile else region
            paper.paste(colors, mask=region)
            return np.asarray(paper)

    def thumbnail(self, max_side_px: int = 2048) -> tuple[np.ndarray, float]:
        """The whole slide, small. Memory does not grow with the slide, even one without a pyramid.

        Returns:
            uint8 (h, w, 3) RGB and its scale in thumbnail pixels per level-0 pixel, at most 1.

        Raises:
            ImageError: `unreadable`.
        """
        scale = min(1.0, max_side_px / max(self.width_px, self.height_px))
        level = self.handle.get_best_level_for_downsample(1 / scale)
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

        The box has fractions of pixels, so that blocks meet without a seam.
        """
        x, y = math.floor(left * factor), math.floor(top * factor)
        box = left * factor - x, top * factor - y, (left + width) * factor - x, (top + height) * factor - y
        downsample = self.downsamples[level]
        pixels = self.read(
            round(x * downsample), round(y * downsample), level, math.ceil(box[2]), math.ceil(box[3])
        )
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX, box))


def open_slide(path: str | Path, given: pixel_size.Given = pixel_size.UNKNOWN) -> Slide:
    """Open a slide on the local disk.

    Args:
        path: of the file; for `.mrxs` and `.dcm` its `companions` lie where they lay in the archive.
        given: what people say of its µm per pixel.

    Raises:
        ImageError: `unreadable`, or `missing_mpp` and `bad_mpp` as `pixel_size.level0_mpp` has it.
    """
    with boundary(*UNREADABLE):
        if fault := _fault(Path(path)):
            raise fault
        handle = openslide.OpenSlide(path)
        (width, height), properties = handle.dimensions, dict(handle.properties)
        downsamples = tuple(handle.level_downsamples)
        profile = handle.color_profile
    if width * height > MAX_SLIDE_PIXELS:
        handle.close()
        raise ImageError("too_many_pixels", f"a slide of {width:,} x {height:,} px cannot be")
    icc = profile.tobytes() if profile else None
    try:
        with boundary(*UNREADABLE):
            mpp = pixel_size.level0_mpp(properties, (width, height), given)
    except ImageError:
        handle.close()
        raise
    return Slide(handle, width, height, *mpp, downsamples, icc, *_bounds(properties))


def _bounds(properties: Mapping[str, str]) -> tuple[int, int]:
    """Where at level 0 the picture begins that QuPath shows: as there, four whole numbers count or none.

    https://github.com/qupath/qupath, OpenslideImageServer.java
    """
    try:
        x, y, _, _ = (int(properties[f"openslide.bounds-{side}"]) for side in ("x", "y", "width", "height"))
    except (KeyError, ValueError):
        return 0, 0
    return x, y


def _fault(path: Path) -> ImageError | None:
    """What forbids to give a file to OpenSlide.

    It takes as much memory as tags and tiles claim to have, and ends the process where it gets none.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        try:
            for page in tiff.iterate_pages(file, size_bytes):
                _require_tiles(page, size_bytes)
        except ImageError as error:
            is_damage, message = error.code == "truncated", error.message
            fault = ImageError("unreadable", f"{UNREADABLE[1]}: {message}") if is_damage else error
        except struct.error:
            is_damage, fault = True, ImageError("unreadable", f"{UNREADABLE[1]}: it ends within its tags")
        else:
            return None
    return None if is_damage and size_bytes >= NDPI_BYTES else fault


def _require_tiles(page: tiff.Page, size_bytes: int) -> None:
    if page.largest_part_bytes > size_bytes:
        raise ImageError("truncated", "a tile claims more bytes than the file has")
    width, height = page.one(tiff.TILE_WIDTH), page.one(tiff.TILE_HEIGHT)
    if width * height > MAX_READ_PIXELS:
        raise ImageError("too_many_pixels", f"a slide stored in tiles of {width:,} x {height:,} px")


def is_slide(path: str | Path, given: pixel_size.Given = pixel_size.UNKNOWN) -> bool:
    """Whether a file on the local disk is a whole slide, to be opened here and not by `image.decode`.

    Its name decides, so that a broken `.svs` is a broken slide; where that does not say, its content does.

    Args:
        path: of the file.
        given: what people say of its µm per pixel.

    Raises:
        ImageError: `unreadable`.
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
    """Whether a TIFF in tiles, of no known scanner, has a pyramid or a scale: else it is a field."""
    with openslide.OpenSlide(path) as handle:
        return handle.level_count > 1 or pixel_size.is_stated(handle.properties, handle.dimensions, given)


def is_unnamed(path: str) -> bool:
    """Whether a name says nothing of the content: no suffix, or a number, as in the UID of a DICOM object."""
    suffix = PurePosixPath(path).suffix
    return not suffix or suffix[1:].isdigit()


def companions(paths: Sequence[str], path: str) -> list[str]:
    """The listed paths without which a MIRAX slide cannot be opened: all below the folder of its name."""
    folder = PurePosixPath(path).with_suffix("")
    return [other for other in paths if folder in PurePosixPath(other).parents]
