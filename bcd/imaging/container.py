"""The container of a PNG or JPEG file, checked before its pixels are decoded.

`png_content` and `jpeg` check size, checksums, end and features of a file, and pass to the decoder only the
parts that pixels depend on: broken metadata, a huge text or a second image after the first can neither spoil
an image nor cost memory.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from bcd.errors import ImageError

# A field of view has well under a megapixel; larger images are for the slide reader. 64 million pixels take
# 256 MB in Pillow, and a few times that during conversion.
MAX_PIXELS = 64_000_000
# Of one colour profile (those of printing presses have 0.5 to 3 MB), and of one text with the orientation.
MAX_PROFILE_BYTES, MAX_NOTE_BYTES = 2**24, 2**20
# Encoders write 8 KiB or more to a chunk, and at most 20 scans; each costs a pass over the image, 0.06 s for
# 64 million pixels, however few bytes it has.
MAX_CHUNKS, MAX_SCANS, MAX_SCANNED_PIXELS = 100_000, 100, 20 * MAX_PIXELS

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
# Chunks that pixels depend on. https://www.w3.org/TR/png-3/#4Concepts.FormatTypes
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
COLOR_CHUNKS = (b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP")
# Texts that may contain the orientation. ImageMagick writes the second: three lines, then EXIF data in hex.
XMP_KEYWORD, EXIF_KEYWORD = b"XML:com.adobe.xmp", b"Raw profile type exif"
TEXT_CHUNKS = b"tEXt", b"zTXt", b"iTXt"
# sRGB in units of 1/100,000: gamma; x and y of white, red, green and blue. cICP: BT.709 primaries, sRGB
# curve, RGB, full range.
SRGB_GAMMA, SRGB_PRIMARIES = 45_455, (31_270, 32_900, 64_000, 33_000, 30_000, 60_000, 15_000, 6_000)
SRGB_CICP = b"\1\x0d\0\1"
# Starts of frames, and those that the decoder reads: SOF0 to 3, 9 and 10 of T.81.
SOF, SEGMENTS_READ = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}, {0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA}
SOS, EOI = 0xDA, 0xD9
# The next marker after compressed data, where FF 00 is a byte and FF D0 to D7 restart the decoder.
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# Segments allowed between scans: tables, restart interval, number of lines, metadata, a scan.
BETWEEN = {0xC4, 0xCC, 0xDA, 0xDB, 0xDC, 0xDD, 0xFE, *range(0xE0, 0xF0)}
JFIF, EXIF, ICC, ADOBE = 0xE0, 0xE1, 0xE2, 0xEE
EXIF_START, XMP_START, ICC_START = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"


@dataclass(frozen=True)
class Content:
    """Input of the decoder, colour profile (None for sRGB), metadata that may contain the orientation, and
    height and width of a PNG of 8-bit RGB without transparency."""

    data: bytes
    profile: bytes | None
    exif: bytes
    xmp: bytes
    rgb8_size: tuple[int, int] | None = None

    @property
    def has_metadata(self) -> bool:
        """Whether anything besides the decoder decides over colours or orientation."""
        return bool(self.profile or self.exif or self.xmp)


def require_size(width: int, height: int) -> None:
    """Raise ImageError `too_many_pixels`, or `truncated` for no pixels, by the header's claim alone."""
    if width < 1 or height < 1:
        raise ImageError("truncated", f"the header claims {width} x {height} px")
    if width * height > MAX_PIXELS:
        raise ImageError("too_many_pixels", f"{width} x {height} px; at most {MAX_PIXELS:,} pixels are read")


def png_content(data: bytes, trusted: bytes = b"") -> Content:
    """Extract the parts of a PNG that its pixels depend on, with their checksums checked.

    Args:
        data: of the file.
        trusted: name of the chunks whose checksums the caller's decoder checks.

    Raises:
        ImageError: `truncated`, `too_many_pixels` or `unsupported_format`.
    """
    kept, colors, notes = [memoryview(PNG)], dict[bytes, bytes](), dict[bytes, bytes]()
    for name, chunk in _chunks(data, trusted):
        if name in PIXEL_CHUNKS:
            kept.append(chunk)
            continue
        content = bytes(chunk[8:-4])
        if name in COLOR_CHUNKS:
            colors[name] = content
        elif name == b"acTL" and (n := int.from_bytes(content[:4], "big")) > 1:
            raise ImageError("unsupported_format", f"an animation of {n} images; save the intended one alone")
        elif name == b"eXIf":
            notes[EXIF_KEYWORD] = content.removeprefix(EXIF_START)
        elif name in TEXT_CHUNKS:
            _note(name, content, notes)
        elif not name[0] & 0x20:
            raise ImageError("unsupported_format", f"its PNG chunk {name.decode()} is not supported")
    exif, xmp = notes.get(EXIF_KEYWORD, b""), notes.get(XMP_KEYWORD, b"")
    return Content(b"".join(kept), _png_profile(colors), exif, xmp, _rgb8_size(kept))


def _rgb8_size(chunks: list[memoryview]) -> tuple[int, int] | None:
    width, height, depth, color = struct.unpack_from(">8xIIBB", chunks[1])
    is_transparent = any(chunk[4:8] == b"tRNS" for chunk in chunks[2:])
    return None if (depth, color) != (8, 2) or is_transparent else (height, width)


def _note(name: bytes, content: bytes, notes: dict[bytes, bytes]) -> None:
    """Keep a text that may contain the orientation; an eXIf chunk has priority."""
    if content.startswith(XMP_KEYWORD + b"\0"):
        notes[XMP_KEYWORD] = chunk_text(name, content)
    elif content.startswith(EXIF_KEYWORD + b"\0"):
        with suppress(ValueError):
            found = bytes.fromhex("".join(chunk_text(name, content).decode("latin-1").split("\n")[3:]))
            notes.setdefault(EXIF_KEYWORD, found.removeprefix(EXIF_START))


def _chunks(data: bytes, trusted: bytes = b"") -> Iterator[tuple[bytes, memoryview]]:
    """Yield name and bytes of each chunk up to the end; skip metadata with a wrong checksum."""
    view, place = memoryview(data), len(PNG)
    for _ in range(MAX_CHUNKS):
        length, name = struct.unpack_from(">I4s", data.ljust(place + 8, b"\0"), place)
        chunk = view[place : place + 12 + length]
        if place == len(PNG):
            if name != b"IHDR" or length != 13:
                raise ImageError("truncated", "the file does not begin with a header")
            require_size(*struct.unpack(">II", data[16:24].ljust(8, b"\0")))
        if len(chunk) < 12 + length or not name.isalpha():
            raise ImageError("truncated", f"the file ends or is damaged after {place:,} bytes")
        is_whole = name == trusted or zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if not is_whole and name in PIXEL_CHUNKS + COLOR_CHUNKS:
            raise ImageError("truncated", f"the checksum of chunk {name.decode()} is wrong")
        if is_whole:
            yield name, chunk
        if name == b"IEND":
            return
        place += len(chunk)
    raise ImageError("unsupported_format", f"a PNG of more than {MAX_CHUNKS:,} chunks")


def chunk_text(name: bytes, content: bytes) -> bytes:
    """The text of a chunk; empty where it is compressed and damaged or too large."""
    rest = content.partition(b"\0")[2]
    if name == b"tEXt":
        return rest
    is_compressed = name == b"zTXt" or rest[:1] == b"\1"
    text = rest[1:] if name == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    return (_inflated(text, MAX_NOTE_BYTES) or b"") if is_compressed else text


def _inflated(compressed: bytes, most_bytes: int) -> bytes | None:
    """Decompressed bytes; None where they are damaged or more than `most_bytes`."""
    try:
        found = zlib.decompressobj().decompress(compressed, most_bytes + 1)
    except zlib.error:
        return None
    return found if len(found) <= most_bytes else None


def _png_profile(colors: dict[bytes, bytes]) -> bytes | None:
    """The colour profile, in the specification's order of precedence."""
    if b"cICP" in colors:
        if colors[b"cICP"] != SRGB_CICP:
            raise ImageError("unsupported_format", "its colours (cICP) are not sRGB; save as sRGB")
        return None
    if b"iCCP" in colors:
        profile = _inflated(colors[b"iCCP"].partition(b"\0")[2][1:], MAX_PROFILE_BYTES)
        if profile is None:
            raise ImageError("unsupported_format", "its colour profile cannot be read; save as sRGB")
        return profile
    if b"sRGB" not in colors:
        _require_srgb(colors)
    return None


def _require_srgb(colors: dict[bytes, bytes]) -> None:
    """Check gamma and primaries, which define the colours where there is no profile."""
    gamma = int.from_bytes(colors.get(b"gAMA", b"")[:4], "big") or SRGB_GAMMA
    if abs(gamma - SRGB_GAMMA) > 0.05 * SRGB_GAMMA:
        message = f"its gamma is {gamma / 1e5:g}, that of sRGB 0.45455; save as sRGB"
        raise ImageError("unsupported_format", message)
    if len(primaries := colors.get(b"cHRM", b"")) == 32:
        found = struct.unpack(">8I", primaries)
        if any(abs(a - b) > 1_000 for a, b in zip(found, SRGB_PRIMARIES, strict=True)):
            raise ImageError("unsupported_format", "its primaries (cHRM) are not those of sRGB; save as sRGB")


def jpeg(data: bytes) -> Content:
    """Extract the first image of a JPEG file, up to its end, without metadata. Raises ImageError `truncated`,
    `too_many_pixels` or `unsupported_format`."""
    kept, profile, layers, has_adobe, exif, xmp = [data[:2]], dict[int, bytes](), 0, False, b"", b""
    n_pixels = 1
    for marker, start, end in segments(data):
        content = data[start + 4 : end]
        if marker in SOF:
            layers, n_pixels = _require_read(marker, content)
        if marker == SOS:
            if layers == 4 and not has_adobe:
                raise ImageError("unsupported_format", "CMYK without Adobe's marker: inverted or not?")
            whole = (
                b"".join(kept) + data[start : _end(data, end, min(MAX_SCANS, MAX_SCANNED_PIXELS // n_pixels))]
            )
            return Content(whole, _joined(profile), exif, xmp)
        has_adobe |= marker == ADOBE and content.startswith(b"Adobe")
        if marker == ICC and content.startswith(ICC_START):
            profile[content[12]] = content[13:]
        elif marker == EXIF and content.startswith(EXIF_START):
            exif = exif or content.removeprefix(EXIF_START)
        elif marker == EXIF and content.startswith(XMP_START):
            xmp = content.removeprefix(XMP_START)
        elif marker in (JFIF, ADOBE) or not 0xE0 <= marker <= 0xFE:
            kept.append(data[start:end])
    raise ImageError("truncated", "the file ends within its header")


def segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, start and end of each segment of the header; skip bytes between them."""
    place = 2
    for _ in range(MAX_CHUNKS):
        if not (found := MARKER.search(data, place)):
            return
        marker, start = data[found.start() + 1], found.start()
        length = int.from_bytes(data[start + 2 : start + 4], "big")
        place = start + 2 + length
        if marker == EOI or length < 2 or place > len(data):
            return
        yield marker, start, place


def _require_read(marker: int, content: bytes) -> tuple[int, int]:
    """Check a start of frame and return the numbers of its components and pixels."""
    bits, height, width, layers = struct.unpack(">BHHB", content[:6].ljust(6, b"\0"))
    if marker not in SEGMENTS_READ or bits != 8 or layers not in (1, 3, 4) or not height:
        found = f"a JPEG of {layers} components of {bits} bits, coded as SOF{marker - 0xC0}"
        raise ImageError("unsupported_format", f"{found}; save as an ordinary JPEG of 8 bits, or as PNG")
    require_size(width, height)
    return layers, width * height


def _end(data: bytes, place: int, most_scans: int) -> int:
    """Position of the end of the image whose first scan begins at `place`."""
    for _ in range(most_scans):
        found = MARKER.search(data, place)
        while found and data[found.start() + 1] in BETWEEN - {SOS}:
            start = found.start() + 2
            found = MARKER.search(data, start + int.from_bytes(data[start : start + 2], "big"))
        if not found:
            raise ImageError("truncated", "the file has no end")
        if data[found.start() + 1] == EOI:
            return found.end()
        if data[found.start() + 1] != SOS:
            raise ImageError("truncated", f"the file is damaged after {found.start():,} bytes")
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    raise ImageError("unsupported_format", f"a JPEG of more than {most_scans} scans")


def require_whole_stream(stream: bytes) -> None:
    """Check that a JPEG stream of a TIFF has an end, and nothing after it. Raises ImageError `truncated` or
    `unsupported_format`."""
    first = next((end for marker, _, end in segments(stream) if marker == SOS), None)
    if first is None or stream[_end(stream, first, MAX_SCANS) :].strip(b"\0\xff"):
        raise ImageError("truncated", "a JPEG stream in it ends early")


def _joined(parts: dict[int, bytes]) -> bytes | None:
    """The profile from its parts: `{1: number of parts and first bytes, 2: ...}`."""
    if not parts:
        return None
    numbers = sorted(parts)
    if numbers != [*range(1, len(parts) + 1)] or {part[0] for part in parts.values()} != {len(parts)}:
        raise ImageError("truncated", "a part of its colour profile is missing")
    return b"".join(parts[number][1:] for number in numbers)
