"""The pages of a TIFF file: which one is the image, and what its samples mean.

Read from the file's tags before a decoder sees it. Memory is bounded by the size of the file, whatever the
tags claim. https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf
"""

import io
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bcd.errors import ImageError
from bcd.imaging.container import require_size, require_whole_stream

# First bytes of a file: byte order, and classic or BigTIFF.
STARTS = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}
# Bytes of one value by type, and its letter for `struct`.
_TYPES = {1: (1, 2, 6, 7), 2: (3, 8), 4: (4, 9, 11, 13), 8: (5, 10, 12, 16, 17, 18)}
SIZES = {kind: n_bytes for n_bytes, kinds in _TYPES.items() for kind in kinds}
LETTERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
TEXT, FRACTION, BYTES = 2, 5, 7
# Tags: where each strip or tile begins, and its bytes; what its JPEG streams share.
TILE_PLACES, TILE_BYTES, JPEG_TABLES = 324, 325, 347
PART_PLACES, PART_BYTES = (273, TILE_PLACES), (279, TILE_BYTES)
# Maker of the scanner, program, pixels in a unit of length, colour profile.
MAKE, SOFTWARE, X_RESOLUTION, Y_RESOLUTION, PROFILE = 271, 305, 282, 283, 34675
# Pages below a page, in OME-TIFF its smaller copies.
SUB_PAGES = 330
LONG = {*PART_PLACES, *PART_BYTES, JPEG_TABLES, MAKE, SOFTWARE, X_RESOLUTION, Y_RESOLUTION, PROFILE}
LONG |= {SUB_PAGES}
# Real files have some dozens of tags and, where their pages are focus planes or frames, hundreds of pages.
MAX_TAGS, MAX_PAGES = 4_096, 1_000
# Numbers read from a tag, one for each sample of a pixel; a palette has red, green and blue.
MAX_NUMBERS, PALETTE_NUMBERS = 64, 3 * 256

SUBFILE, OLD_SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 255, 256, 257, 258, 259, 262
DESCRIPTION, SAMPLES, MAX_SAMPLE, PLANAR, PALETTE, TILE_WIDTH, TILE_HEIGHT = 270, 277, 281, 284, 320, 322, 323
ORIENTATION, EXTRA, FORMAT, SUBSAMPLING, IMAGEJ = 274, 338, 339, 530, 50839
UNIT, DEPTH, TILE_DEPTH, FILL_ORDER, PREDICTOR = 296, 32997, 32998, 266, 317
NUMBERS = {SUBFILE, OLD_SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, MAX_SAMPLE, PLANAR}
NUMBERS |= {PALETTE, TILE_WIDTH, TILE_HEIGHT, ORIENTATION, EXTRA, FORMAT, SUBSAMPLING, UNIT, DEPTH}
NUMBERS |= {TILE_DEPTH, FILL_ORDER, PREDICTOR}
# Others are rejected: not every build of libtiff has them, fax decoders ignore damage and print a message for
# every line, and old-style JPEG was never specified.
UNCOMPRESSED, LZW, JPEG, DEFLATE, APERIO_JPEG_2000 = 1, 5, 7, (8, 32946), (33003, 33005)
COMPRESSIONS = {UNCOMPRESSED, LZW, JPEG, *DEFLATE, 32773, 34925, 50000}
NAMES = dict.fromkeys((2, 3, 4), "CCITT fax") | dict.fromkeys(APERIO_JPEG_2000, "Aperio JPEG 2000")
NAMES |= {6: "old-style JPEG", 32809: "ThunderScan", 34661: "JBIG", 34676: "SGI LogLuv", 34712: "JPEG 2000"}
NAMES |= {34887: "LERC", 50001: "WebP", 50002: "JPEG XL"}
WHITE_IS_ZERO, GREY, RGB, PALETTED, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
# Samples of a pixel, without extra ones, by photometric interpretation.
CHANNELS = {WHITE_IS_ZERO: 1, GREY: 1, RGB: 3, PALETTED: 1, CMYK: 4, YCBCR: 3, LAB: 3}
UNSIGNED = 1
FORMATS = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
# A reduced-resolution image or a mask in SUBFILE (bits), and the former in OLD_SUBFILE (value).
REDUCED_OR_MASK, OLD_REDUCED = 5, 2
# Descriptions by OME and ImageJ.
DEPTH_OME, PLANES_OME = re.compile(rb'SignificantBits="(\d+)"'), re.compile(rb'Size[CZT]="(\d+)"')
IMAGEJ_START, PLANES_IMAGEJ = b"ImageJ=", re.compile(rb"^images=(\d+)", re.MULTILINE)


class Readable(Protocol):
    """What pages are read from: a binary file, or parts of one in a store."""

    def seek(self, place: int, /) -> int:
        """Read from this byte on."""

    def read(self, n_bytes: int, /) -> bytes:
        """The next bytes, fewer where the file ends."""


@dataclass(frozen=True)
class Page:
    """One page: its index in the file, numbers by tag, description (first page only), all its tags, the
    claimed size of its largest strip or tile, and of the tags that `values` reads byte order, type, count and
    value."""

    number: int
    tags: Mapping[int, tuple[int, ...]]
    description: bytes
    present: frozenset[int]
    largest_part_bytes: int
    long: Mapping[int, tuple[str, int, int, bytes]]

    def one(self, tag: int, default: int = 0) -> int:
        """The first number of a tag."""
        return self.tags.get(tag, (default,))[0]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.one(WIDTH), self.one(HEIGHT)

    @property
    def bits(self) -> int:
        """Bits of one sample."""
        return self.one(BITS, 1)


def pages(file: Readable, size_bytes: int) -> list[Page]:
    """The pages of a file in their order, at least one. Raises ImageError `truncated` where tags are outside
    the file or overlap, `unsupported_format`."""
    found = list(iterate_pages(file, size_bytes))
    if not found:
        raise ImageError("truncated", "the file has no page")
    return found


def iterate_pages(file: Readable, size_bytes: int) -> Iterator[Page]:
    """Yield the same pages one by one, none where the file is no TIFF."""
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


def pages_below(file: Readable, page: Page, size_bytes: int) -> list[Page]:
    """The pages below a page (SubIFDs). Raises ImageError as `pages`."""
    file.seek(0)
    order, is_big = STARTS[file.read(4)]
    places = values(file, page, SUB_PAGES).tolist()
    if len(places) > MAX_PAGES or len(set(places)) < len(places):
        raise ImageError("truncated", f"a page claims {len(places):,} pages below it, or one of them twice")
    found = list[Page]()
    for place in places:
        file.seek(place)
        found.append(_page(file, order, is_big, size_bytes, len(found) + 1))
    return found


def _number(file: Readable, order: str, letter: str) -> int:
    content = file.read(struct.calcsize(order + letter))
    return int(struct.unpack(order + letter, content)[0])


def _page(file: Readable, order: str, is_big: bool, size_bytes: int, number: int) -> Page:
    n = _number(file, order, "Q" if is_big else "H")
    if n > MAX_TAGS:
        raise ImageError("truncated", f"page {number + 1} claims {n:,} tags")
    form = order + ("HHQ8s" if is_big else "HHI4s")
    entries = list(struct.iter_unpack(form, file.read(n * struct.calcsize(form))))
    if len(entries) < n:
        raise ImageError("truncated", "the file ends within its table of tags")
    # Values do not overlap; tags that claim more than the file has would fill memory.
    if sum(SIZES.get(kind, 1) * count for _, kind, count, _ in entries) > size_bytes:
        raise ImageError("truncated", "its tags claim more bytes than the file has")
    tags, description, largest = dict[int, tuple[int, ...]](), b"", 0
    kinds = (*LETTERS, TEXT, FRACTION, BYTES)
    long = {tag: (order, *rest) for tag, *rest in entries if tag in LONG and rest[0] in kinds}
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
    present = frozenset(entry[0] for entry in entries)
    return Page(number, tags, description, present, largest, long)


def values(file: Readable, page: Page, tag: int) -> np.ndarray:
    """All numbers of a tag of any length, numerators and denominators in turn, or its bytes; none where the
    page lacks it."""
    if tag not in page.long:
        return np.empty(0, np.uint8)
    order, kind, count, value = page.long[tag]
    letter = "I" if kind == FRACTION else LETTERS.get(kind, "B")
    return np.frombuffer(_value(file, order, kind, count, count, value), order + letter)


def _value(file: Readable, order: str, kind: int, count: int, n_read: int, value: bytes) -> bytes:
    """The first values of a tag: from the table where all of them fit in there, else from where it points."""
    if SIZES[kind] * count <= len(value):
        return value[: SIZES[kind] * n_read]
    place = struct.unpack(order + ("Q" if len(value) == 8 else "I"), value)[0]
    file.seek(min(place, 2**62))
    found = file.read(SIZES[kind] * n_read)
    if len(found) < SIZES[kind] * n_read:
        raise ImageError("truncated", "a tag points outside the file")
    return found


def main_page(found: Sequence[Page]) -> Page:
    """The page that is the image: the only one that is no thumbnail, mask or smaller copy. Raises ImageError
    `unsupported_format` where several could be it."""
    whole = [p for p in found if not p.one(SUBFILE) & REDUCED_OR_MASK and p.one(OLD_SUBFILE) != OLD_REDUCED]
    if not whole:
        raise ImageError("unsupported_format", "its pages are thumbnails or masks only; save the image alone")
    largest = max(whole, key=lambda page: (page.size, -page.number))
    if not all(page is largest or _is_copy(page, largest) for page in whole):
        raise ImageError(
            "unsupported_format",
            f"the file has {len(whole)} pages and does not say which one is the image; save it alone",
        )
    return largest


def _is_copy(page: Page, largest: Page) -> bool:
    """Whether a page has, to 2 px, the shape of a smaller copy, as in pyramids without marks."""
    (width, height), (full_width, full_height) = page.size, largest.size
    return width < full_width and abs(height - width * full_height / full_width) <= 2


def composite(found: Sequence[Page]) -> Sequence[Page]:
    """The red, green and blue pages of an ImageJ composite, empty for any other file.

    These are the colours of its channels unless the file has lookup tables.
    https://imagej.net/ij/docs/guide/146-28.html#sub:Make-Composite
    """
    lines = found[0].description.split(b"\n")
    is_composite = b"mode=composite" in lines and b"channels=3" in lines and b"images=3" in lines
    alike = {(page.size, page.bits, page.one(PHOTOMETRIC), page.one(SAMPLES, 1)) for page in found}
    if is_composite and len(found) == 3 and len(alike) == 1 and IMAGEJ not in found[0].present:
        return found if alike.pop()[2:] == (GREY, 1) else ()
    return ()


def require_read(page: Page, n_pages: int) -> None:
    """Reject a page that the decoder reads wrongly or not at all. Raises ImageError `unsupported_format`,
    `truncated` or `too_many_pixels`."""
    require_size(*page.size)
    if fault := _fault(page) or _fault_of_samples(page) or _fault_of_planes(page, n_pages):
        raise ImageError("unsupported_format", f"{fault}; save it as an ordinary 8-bit TIFF or PNG")


def require_whole_parts(file: Readable, page: Page) -> None:
    """Check that each JPEG stream of a page is whole: libjpeg fills one that ends early with grey. Raises
    ImageError `truncated`."""
    if page.one(COMPRESSION) != JPEG:
        return
    places, sizes = (
        np.concatenate([values(file, page, tag) for tag in tags]) for tags in (PART_PLACES, PART_BYTES)
    )
    for place, size in zip(places.tolist(), sizes.tolist(), strict=False):
        file.seek(int(place))
        require_whole_stream(file.read(int(size)))


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
    """The fault that no page contains some of the channels or slices that OME or ImageJ state."""
    planes = 1
    if page.description.startswith(IMAGEJ_START):
        planes = int(b"".join(PLANES_IMAGEJ.findall(page.description)[:1]) or 1)
    elif b"<OME" in page.description[:1_000]:
        for size in PLANES_OME.findall(page.description.partition(b"</Pixels>")[0]):
            planes *= int(size)
        planes = planes // max(1, page.one(SAMPLES, 1)) or 1
    return f"it states {planes} planes and has {n_pages}" if planes > n_pages else None


def orientation(exif: bytes) -> int:
    """The orientation in EXIF data, a small TIFF: 1 to 8, or 0 where they are damaged or have none."""
    try:
        page = next(iterate_pages(io.BytesIO(exif), len(exif)), None)
    except (ImageError, struct.error):
        return 0
    return page.one(ORIENTATION) if page else 0


def describe_samples(page: Page) -> str:
    """Number, bits and meaning of a page's samples, as text."""
    n, bits, meaning = (
        page.one(SAMPLES, 1),
        "+".join(map(str, page.tags.get(BITS, (1,)))),
        page.one(PHOTOMETRIC),
    )
    return f"{n} samples of {bits} bits, photometric interpretation {meaning}"


def significant_bits(page: Page) -> int | None:
    """The number of bits of a 16-bit sample that are in use, where the file states it.

    OME's SignificantBits, or a largest sample of 2^k - 1. By the specification, any other largest sample is a
    statistic of the image, and ImageJ's `max` is a setting of the display.
    """
    if page.bits != 16:
        return page.bits
    if b"<OME" in page.description[:1_000] and (found := DEPTH_OME.search(page.description)):
        return int(found[1])
    largest = set(page.tags.get(MAX_SAMPLE, ()))
    depths = [bits for bits in range(9, 16) if largest == {2**bits - 1}]
    return depths[0] if depths else None
