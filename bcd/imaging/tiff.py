"""What a TIFF file says of its pages: which one is the image, and what its samples mean.

Read from the file's own tags before a decoder sees it. Memory is bounded by the size of the file, whatever
the tags claim. https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf
"""

import io
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from bcd.errors import ImageError
from bcd.imaging.container import require_size

# First bytes of a file: byte order, and classic or BigTIFF.
STARTS = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}
# Bytes of one value by type, and its letter for `struct`.
_TYPES = {1: (1, 2, 6, 7), 2: (3, 8), 4: (4, 9, 11, 13), 8: (5, 10, 12, 16, 17, 18)}
SIZES = {kind: n_bytes for n_bytes, kinds in _TYPES.items() for kind in kinds}
LETTERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
# Bytes of each strip, and of each tile.
PART_BYTES = (279, 325)
# Real files have some dozens of tags and, where their pages are focus planes or frames, hundreds of pages.
MAX_TAGS, MAX_PAGES = 4_096, 1_000
# Of numbers that are read of a tag, one for each sample of a pixel; a palette has red, green and blue.
MAX_NUMBERS, PALETTE_NUMBERS = 64, 3 * 256

SUBFILE, OLD_SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 255, 256, 257, 258, 259, 262
DESCRIPTION, SAMPLES, MAX_SAMPLE, PLANAR, PALETTE, TILE_WIDTH, TILE_HEIGHT = 270, 277, 281, 284, 320, 322, 323
ORIENTATION, EXTRA, FORMAT, SUBSAMPLING, IMAGEJ = 274, 338, 339, 530, 50839
NUMBERS = {SUBFILE, OLD_SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, MAX_SAMPLE, PLANAR}
NUMBERS |= {PALETTE, TILE_WIDTH, TILE_HEIGHT, ORIENTATION, EXTRA, FORMAT, SUBSAMPLING}
# Others are left out: not every build of libtiff has them, fax decoders go on after damage as if nothing were
# and tell of every line, and what old-style JPEG means was never written down.
UNCOMPRESSED = 1
COMPRESSIONS = {UNCOMPRESSED, 5, 7, 8, 32773, 32946, 34925, 50000}
NAMES = {
    2: "CCITT fax",
    3: "CCITT fax",
    4: "CCITT fax",
    6: "old-style JPEG",
    32809: "ThunderScan",
    33003: "Aperio JPEG 2000",
    33005: "Aperio JPEG 2000",
    34661: "JBIG",
    34676: "SGI LogLuv",
    34712: "JPEG 2000",
    34887: "LERC",
    50001: "WebP",
    50002: "JPEG XL",
}
WHITE_IS_ZERO, GREY, RGB, PALETTED, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
# Samples of a pixel before extra ones, by what they mean.
CHANNELS = {WHITE_IS_ZERO: 1, GREY: 1, RGB: 3, PALETTED: 1, CMYK: 4, YCBCR: 3, LAB: 3}
UNSIGNED = 1
FORMATS = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
# Bits of a reduced-resolution image and of a mask in SUBFILE; the same in OLD_SUBFILE.
REDUCED_OR_MASK, OLD_REDUCED = 5, 2
# What OME and ImageJ write into the description.
DEPTH_OME, PLANES_OME = re.compile(rb'SignificantBits="(\d+)"'), re.compile(rb'Size[CZT]="(\d+)"')
IMAGEJ_START, PLANES_IMAGEJ = b"ImageJ=", re.compile(rb"^images=(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """One page: its place in the file, from 0, numbers by tag, and of the first one the description.

    `largest_part_bytes` is what its largest strip or tile claims to have.
    """

    number: int
    tags: Mapping[int, tuple[int, ...]]
    description: bytes
    has_lookup_tables: bool
    largest_part_bytes: int

    def one(self, tag: int, default: int = 0) -> int:
        """The first number of a tag."""
        return self.tags.get(tag, (default,))[0]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.one(WIDTH), self.one(HEIGHT)

    @property
    def bits(self) -> int:
        """Of one sample."""
        return self.one(BITS, 1)


def pages(file: BinaryIO, size_bytes: int) -> list[Page]:
    """The pages of a file in their order, at least one.

    Raises:
        ImageError: `truncated` where tags lie outside the file or over each other, `unsupported_format`.
    """
    found = list(iterate_pages(file, size_bytes))
    if not found:
        raise ImageError("truncated", "the file has no page")
    return found


def iterate_pages(file: BinaryIO, size_bytes: int) -> Iterator[Page]:
    """The same one by one, and none where the file is no TIFF."""
    order, is_big = STARTS.get(file.read(4), ("", False))
    if not order:
        return
    file.seek(8 if is_big else 4)
    place, seen = _number(file, order, "Q" if is_big else "I"), set[int]()
    while place:
        if place in seen or place >= size_bytes:
            raise ImageError("truncated", "its pages form a circle or lie outside the file")
        if len(seen) == MAX_PAGES:
            raise ImageError("unsupported_format", f"a TIFF of more than {MAX_PAGES:,} pages")
        seen.add(place)
        file.seek(place)
        yield _page(file, order, is_big, size_bytes, len(seen) - 1)
        file.seek(place)
        n = _number(file, order, "Q" if is_big else "H")
        file.seek(place + (8 + 20 * n if is_big else 2 + 12 * n))
        place = _number(file, order, "Q" if is_big else "I")


def _number(file: BinaryIO, order: str, letter: str) -> int:
    content = file.read(struct.calcsize(order + letter))
    return int(struct.unpack(order + letter, content)[0])


def _page(file: BinaryIO, order: str, is_big: bool, size_bytes: int, number: int) -> Page:
    n = _number(file, order, "Q" if is_big else "H")
    if n > MAX_TAGS:
        raise ImageError("truncated", f"page {number + 1} claims {n:,} tags")
    form = order + ("HHQ8s" if is_big else "HHI4s")
    entries = list(struct.iter_unpack(form, file.read(n * struct.calcsize(form))))
    if len(entries) < n:
        raise ImageError("truncated", "the file ends within its table of tags")
    _require_apart(entries, size_bytes)
    tags, description, largest = dict[int, tuple[int, ...]](), b"", 0
    for tag, kind, count, value in entries:
        if tag in NUMBERS and kind in LETTERS:
            n_read = min(count, PALETTE_NUMBERS if tag == PALETTE else MAX_NUMBERS)
            content = _value(file, order, kind, count, n_read, value)
            tags.setdefault(tag, struct.unpack(f"{order}{n_read}{LETTERS[kind]}", content))
        elif tag == DESCRIPTION and kind in (1, 2, 7) and number == 0:
            description = _value(file, order, kind, count, count, value)
        elif tag in PART_BYTES and kind in LETTERS and count:
            content = _value(file, order, kind, count, count, value)
            largest = max(largest, int(np.frombuffer(content, order + LETTERS[kind]).max()))
    tags = {tag: values for tag, values in tags.items() if values}
    has_lookup_tables = any(entry[0] == IMAGEJ for entry in entries)
    return Page(number, tags, description, has_lookup_tables, largest)


def _require_apart(entries: Sequence[tuple[int, int, int, bytes]], size_bytes: int) -> None:
    """Values of tags lie beside each other: those that claim more than the file has would fill memory."""
    if sum(SIZES.get(kind, 1) * count for _, kind, count, _ in entries) > size_bytes:
        raise ImageError("truncated", "its tags claim more bytes than the file has")


def _value(file: BinaryIO, order: str, kind: int, count: int, n_read: int, value: bytes) -> bytes:
    """The first values of a tag: in the table where all of them fit there, else where that points to."""
    if SIZES[kind] * count <= len(value):
        return value[: SIZES[kind] * n_read]
    place = struct.unpack(order + ("Q" if len(value) == 8 else "I"), value)[0]
    file.seek(min(place, 2**62))
    found = file.read(SIZES[kind] * n_read)
    if len(found) < SIZES[kind] * n_read:
        raise ImageError("truncated", "a tag points outside the file")
    return found


def main_page(found: Sequence[Page]) -> Page:
    """The page that is the image: the only one that is no thumbnail, mask or smaller copy.

    Raises:
        ImageError: `unsupported_format` where several could be it.
    """
    whole = [page for page in found if not _is_marked_reduced(page)]
    if not whole:
        raise ImageError("unsupported_format", "its pages are thumbnails or masks only; save the image alone")
    largest = max(whole, key=lambda page: (page.size, -page.number))
    if not all(page is largest or _is_copy(page, largest) for page in whole):
        raise ImageError(
            "unsupported_format",
            f"the file has {len(whole)} pages and does not say which one is the image; save it alone",
        )
    return largest


def _is_marked_reduced(page: Page) -> bool:
    return bool(page.one(SUBFILE) & REDUCED_OR_MASK) or page.one(OLD_SUBFILE) == OLD_REDUCED


def _is_copy(page: Page, largest: Page) -> bool:
    """Whether a page has the shape of a smaller copy, as in pyramids that mark nothing; up to 2 px."""
    (width, height), (full_width, full_height) = page.size, largest.size
    return width < full_width and abs(height - width * full_height / full_width) <= 2


def composite(found: Sequence[Page]) -> Sequence[Page]:
    """The pages that are red, green and blue of one image as ImageJ stores a composite; else none.

    Without lookup tables of its own, ImageJ shows the channels of a composite in these colours.
    https://imagej.net/ij/docs/guide/146-28.html#sub:Make-Composite
    """
    lines = found[0].description.split(b"\n")
    is_composite = b"mode=composite" in lines and b"channels=3" in lines and b"images=3" in lines
    alike = {(page.size, page.bits, page.one(PHOTOMETRIC), page.one(SAMPLES, 1)) for page in found}
    if is_composite and len(found) == 3 and len(alike) == 1 and not found[0].has_lookup_tables:
        return found if alike.pop()[2:] == (GREY, 1) else ()
    return ()


def require_read(page: Page, n_pages: int) -> None:
    """Refuse what the decoder reads wrongly or not at all, by its name.

    Raises:
        ImageError: `unsupported_format`, `truncated` or `too_many_pixels`.
    """
    require_size(*page.size)
    fault = _fault(page) or _fault_of_samples(page) or _fault_of_planes(page, n_pages)
    if fault:
        raise ImageError("unsupported_format", f"{fault}; save it as an ordinary 8-bit TIFF or PNG")


def _fault(page: Page) -> str | None:
    if (compression := page.one(COMPRESSION, UNCOMPRESSED)) not in COMPRESSIONS:
        return f"TIFF compression {compression} ({NAMES.get(compression, 'unknown')}) is not read"
    if (meaning := page.one(PHOTOMETRIC, -1)) not in CHANNELS:
        return f"photometric interpretation {'is missing' if meaning < 0 else f'{meaning} is not read'}"
    if page.one(FORMAT, UNSIGNED) in FORMATS or len(set(page.tags.get(FORMAT, (UNSIGNED,)))) > 1:
        return f"{FORMATS.get(page.one(FORMAT), 'mixed')} samples have no fixed scale"
    if page.bits > 16 or len(set(page.tags.get(BITS, (1,)))) > 1:
        return f"samples of {page.tags[BITS]} bits have no fixed scale"
    return None


def _fault_of_samples(page: Page) -> str | None:
    meaning, samples = page.one(PHOTOMETRIC), page.one(SAMPLES, 1)
    extra = samples - CHANNELS[meaning]
    if extra > 0 and len(page.tags.get(EXTRA, ())) != extra:
        return f"{samples} samples a pixel, and it does not say what the last {extra} of them are"
    is_raw = page.one(COMPRESSION, UNCOMPRESSED) == UNCOMPRESSED
    if is_raw and page.bits == 16 and page.one(PLANAR, 1) != 1:
        return "uncompressed 16-bit samples in separate planes are not read"
    if is_raw and meaning == YCBCR and page.tags.get(SUBSAMPLING) != (1, 1):
        return "uncompressed YCbCr with subsampling is not read"
    if meaning == PALETTED and 0 < max(page.tags.get(PALETTE, (0,))) < 256:
        return "its palette has 8 bits where TIFF has 16"
    return None


def _fault_of_planes(page: Page, n_pages: int) -> str | None:
    """Channels or slices that OME or ImageJ tell of and that no page holds."""
    planes = 1
    if page.description.startswith(IMAGEJ_START):
        planes = int(b"".join(PLANES_IMAGEJ.findall(page.description)[:1]) or 1)
    elif b"<OME" in page.description[:1_000]:
        for size in PLANES_OME.findall(page.description.partition(b"</Pixels>")[0]):
            planes *= int(size)
        planes = planes // max(1, page.one(SAMPLES, 1)) or 1
    return f"it tells of {planes} planes and has {n_pages}" if planes > n_pages else None


def orientation(exif: bytes) -> int:
    """What EXIF data, a small TIFF, say of it: 1 to 8, or 0 where they say nothing or are broken."""
    try:
        page = next(iterate_pages(io.BytesIO(exif), len(exif)), None)
    except (ImageError, struct.error):
        return 0
    return page.one(ORIENTATION) if page else 0


def describe_samples(page: Page) -> str:
    """Its samples, for people."""
    bits = "+".join(map(str, page.tags.get(BITS, (1,))))
    return (
        f"{page.one(SAMPLES, 1)} samples of {bits} bits, photometric interpretation {page.one(PHOTOMETRIC)}"
    )


def significant_bits(page: Page) -> int | None:
    """How many bits of a 16-bit sample are in use, where the file says so.

    OME's SignificantBits, or a largest sample that is 2^k - 1. Any other largest sample is a statistic of
    the image, by the specification, and ImageJ's `max` is how somebody set the display.
    """
    if page.bits != 16:
        return page.bits
    if b"<OME" in page.description[:1_000] and (found := DEPTH_OME.search(page.description)):
        return int(found[1])
    largest = set(page.tags.get(MAX_SAMPLE, ()))
    depths = [bits for bits in range(9, 16) if largest == {2**bits - 1}]
    return depths[0] if depths else None
