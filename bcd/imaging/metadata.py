"""What the metadata of an image file state in words: texts, dates, names of label images.

Only headers are read, and of each text a bounded part. Damage ends the reading without an error: it is for
the decoder to judge. Tags of EXIF 3.0, TIFF 6.0, IPTC-IIM 4.2, Aperio (SVS) and Hamamatsu (NDPI).
"""

import io
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from html import unescape
from typing import BinaryIO, Literal

from bcd.errors import ImageError
from bcd.imaging import container, tiff

# Of one text, of all that precedes the pixels of a JPEG, and parts or pages of a file.
MAX_TEXT_BYTES, MAX_HEAD_BYTES, MAX_PARTS, MAX_PAGES = 2**18, 2**20, 20_000, 100
# Of one file, and elements of XML in each other.
MAX_BYTES, MAX_DEPTH = 2**23, 100
# Tags of TIFF and EXIF by number; the last three are of Hamamatsu: the slide's label, the scanner, and pairs
# of names and values.
# fmt: off
TAGS = {
    269: "DocumentName", 270: "ImageDescription", 285: "PageName", 306: "DateTime", 315: "Artist",
    316: "HostComputer", 700: "XMP", 33432: "Copyright", 33723: "IPTC", 36867: "DateTimeOriginal",
    36868: "DateTimeDigitized", 37510: "UserComment", 40091: "XPTitle", 40092: "XPComment",
    40093: "XPAuthor", 40094: "XPKeywords", 40095: "XPSubject", 42032: "CameraOwnerName",
    42033: "BodySerialNumber", 42037: "LensSerialNumber", 50971: "PreviewDateTime",
    65427: "Reference", 65442: "SerialNumber", 65449: "PropertyMap",
}
# Datasets of IPTC-IIM, record 2.
IPTC = {
    5: "ObjectName", 25: "Keywords", 40: "SpecialInstructions", 55: "DateCreated", 80: "By-line",
    90: "City", 92: "Sub-location", 105: "Headline", 110: "Credit", 116: "CopyrightNotice",
    118: "Contact", 120: "Caption", 122: "Writer",
}
# fmt: on
SUB_DIRECTORIES, GPS_DIRECTORY = {34665, 34853}, 34853
BYTE_ORDERS: dict[str, Literal["little", "big"]] = {"<": "little", ">": "big"}
GPS_TAGS = {2: "GPSLatitude", 4: "GPSLongitude", 29: "GPSDateStamp"}
# Objective of a page of NDPI; -1 is the macro image.
NDPI_LENS, NDPI_MACRO = 65421, -1.0
APP13, COMMENT, PHOTOSHOP = 0xED, 0xFE, b"Photoshop 3.0\0"
# A line of Aperio's and Ventana's descriptions that names the page: of the label, or the whole glass.
LABEL = re.compile(r"^\s*(label|macro)(?![a-z0-9]|[ _]*=)", re.IGNORECASE | re.MULTILINE)
TAG = re.compile(r"<(/?)([A-Za-z][\w:.-]{0,99})([^<>]*)>([^<]*)")
ATTRIBUTE = re.compile(r"\b([A-Za-z][\w:.-]{0,99})\s?=\s?(?:\"([^\"<]*)\"|'([^'<]*)')")
# Elements of RDF that only hold a value together.
BRACKETS = {"rdf:li", "rdf:Seq", "rdf:Bag", "rdf:Alt", "rdf:Description", "rdf:RDF", "x:xmpmeta"}


@dataclass(frozen=True)
class Note:
    """One statement: its place, such as `EXIF`, the field as the format names it, and its text."""

    place: str
    field: str
    text: str


class _Limited:
    """A file of which at most `MAX_BYTES` are read, whatever its headers claim."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, MAX_BYTES
        self.seek = file.seek

    def read(self, n_bytes: int) -> bytes:
        """Of a file; nothing once all are read."""
        content = self._file.read(min(n_bytes, self._left))
        self._left -= len(content)
        return content


def notes(file: BinaryIO, size_bytes: int) -> Iterator[Note]:
    """What a PNG, JPEG or TIFF file (SVS, NDPI and others, too) states; nothing for other formats.

    A page with the image of a slide's label or of the whole glass gives a note `image` with its name.
    """
    start = file.read(8)
    file.seek(0)
    limited = _Limited(file)
    with suppress(struct.error, ImageError, ValueError):
        if start == container.PNG:
            yield from _png(limited)
        elif start.startswith(container.JPEG):
            yield from _jpeg(limited.read(MAX_HEAD_BYTES))
        elif start[:4] in tiff.STARTS:
            yield from _tiff(limited, size_bytes, "TIFF")


def _png(file: _Limited) -> Iterator[Note]:
    place = len(container.PNG)
    for _ in range(MAX_PARTS):
        file.seek(place)
        length, name = struct.unpack(">I4s", file.read(8))
        if name == b"eXIf" and length <= MAX_TEXT_BYTES:
            yield from _exif(file.read(length))
        elif name in container.TEXT_CHUNKS and length <= MAX_TEXT_BYTES:
            content = file.read(length)
            keyword = content.partition(b"\0")[0].decode("latin-1")
            yield from _keyword(keyword, container.chunk_text(name, content))
        if name == b"IEND":
            return
        place += 12 + length


def _keyword(keyword: str, content: bytes) -> Iterator[Note]:
    """Notes of a text of a PNG; ImageMagick writes other metadata as such, in hexadecimal."""
    if keyword == container.XMP_KEYWORD.decode():
        yield from xml_notes("XMP", _decoded(content))
    elif keyword.startswith("Raw profile type "):
        with suppress(ValueError):
            raw = bytes.fromhex("".join(content.decode("latin-1").split("\n")[3:]))
            yield from _app1(raw) if raw.startswith(container.EXIF_START) else _iptc(raw)
    else:
        yield Note("PNG", keyword, _decoded(content))


def _jpeg(head: bytes) -> Iterator[Note]:
    for marker, start, end in container.segments(head):
        content = head[start + 4 : end]
        if marker == container.SOS:
            return
        if marker == container.EXIF:
            yield from _app1(content)
        elif marker == APP13 and content.startswith(PHOTOSHOP):
            yield from _iptc(content)
        elif marker == COMMENT:
            yield Note("JPEG", "comment", _decoded(content))


def _app1(content: bytes) -> Iterator[Note]:
    if content.startswith(container.EXIF_START):
        yield from _exif(content.removeprefix(container.EXIF_START))
    elif content.startswith(container.XMP_START):
        yield from xml_notes("XMP", _decoded(content.removeprefix(container.XMP_START)))


def _exif(content: bytes) -> Iterator[Note]:
    with suppress(struct.error, ImageError):
        yield from _tiff(_Limited(io.BytesIO(content)), len(content), "EXIF")


def _iptc(content: bytes) -> Iterator[Note]:
    for match in re.finditer(rb"\x1c\x02(.)(..)", content, re.DOTALL):
        length = int.from_bytes(match[2], "big")
        if name := IPTC.get(match[1][0]):
            yield Note("IPTC", name, _decoded(content[match.end() : match.end() + length]))


@dataclass(frozen=True)
class _Layout:
    """How a TIFF writes numbers; `long` are the addresses of BigTIFF, and of NDPI from 4 GiB on."""

    file: _Limited
    size_bytes: int
    order: str
    big: bool

    @property
    def long(self) -> bool:
        return self.big or self.size_bytes >= 2**32

    def number(self, letter: str) -> int:
        form = self.order + letter
        return int(struct.unpack(form, self.file.read(struct.calcsize(form)))[0])

    def entries(self, place: int) -> tuple[dict[int, bytes], int]:
        """The values of one directory by tag, and the place of the next one, 0 after the last."""
        self.file.seek(place)
        form = self.order + ("HHQ8s" if self.big else "HHI4s")
        n = self.number("Q" if self.big else "H")
        if n > tiff.MAX_TAGS:
            return {}, 0
        entries = list(struct.iter_unpack(form, self.file.read(n * struct.calcsize(form))))
        following = self.number("Q" if self.long else "I")
        known = (*TAGS, *GPS_TAGS, *SUB_DIRECTORIES, NDPI_LENS)
        return {tag: self._value(place, *rest) for tag, *rest in entries if tag in known}, following

    def _value(self, place: int, kind: int, count: int, value: bytes) -> bytes:
        n_bytes = tiff.SIZES.get(kind, 1) * count
        if n_bytes <= len(value):
            return value[:n_bytes]
        address = int(struct.unpack(self.order + ("Q" if self.big else "I"), value)[0])
        if self.long and not self.big:  # NDPI: what a directory points to precedes it
            address |= place >> 32 << 32
            address -= 2**32 if address >= place else 0
        self.file.seek(max(0, min(address, self.size_bytes)))
        return self.file.read(min(n_bytes, MAX_TEXT_BYTES))


def _tiff(file: _Limited, size_bytes: int, kind: str) -> Iterator[Note]:
    order, big = tiff.STARTS.get(file.read(4), ("", False))
    if not order:
        return
    layout = _Layout(file, size_bytes, order, big)
    file.seek(8 if big else 4)
    place = layout.number("Q" if layout.long else "I")
    for number in range(1, MAX_PAGES + 1):
        if not 0 < place < size_bytes:
            return
        values, place = layout.entries(place)
        yield from _page_notes(kind if number == 1 else f"{kind} page {number}", values, order)
        for tag in SUB_DIRECTORIES & values.keys():
            below = int.from_bytes(values[tag], BYTE_ORDERS[order])
            yield from _below(layout, below, tag == GPS_DIRECTORY, kind)


def _below(layout: _Layout, place: int, is_gps: bool, kind: str) -> Iterator[Note]:
    """Notes of the directory of EXIF or GPS below a page."""
    values, _ = layout.entries(place)
    names = GPS_TAGS if is_gps else TAGS
    for tag in names.keys() & values:
        yield from _tag(kind, names[tag], values[tag])


def _page_notes(place: str, values: dict[int, bytes], order: str) -> Iterator[Note]:
    for tag in TAGS.keys() & values:
        yield from _tag(place, TAGS[tag], values[tag])
    description = _decoded(values.get(270, b""))
    if image := LABEL.search(description[:1_000]):
        yield Note(place, "image", image[1].lower())
    if "<scn" in description[:1_000] and description.count("<image ") > 1:  # Leica's first one
        yield Note(place, "image", "macro")
    if len(lens := values.get(NDPI_LENS, b"")) == 4 and struct.unpack(order + "f", lens)[0] == NDPI_MACRO:
        yield Note(place, "image", "macro")


def _tag(place: str, name: str, value: bytes) -> Iterator[Note]:
    """Notes of one tag, whose value may contain others."""
    if name == "IPTC":
        yield from _iptc(value)
    elif name in ("GPSLatitude", "GPSLongitude"):
        if any(value):
            yield Note(place, name, "a position")
    elif name.startswith("XP"):
        yield Note(place, name, value.decode("utf-16-le", "replace").rstrip("\0"))
    elif name == "UserComment":
        # EXIF does not say in which order the bytes of a character are.
        wide = "utf-16-be" if value[8:9] == b"\0" else "utf-16-le"
        is_wide = value.startswith(b"UNICODE\0")
        yield Note(place, name, value[8:].decode(wide, "replace") if is_wide else _decoded(value[8:]))
    else:
        yield from _text(place, name, _decoded(value))


def _text(place: str, name: str, text: str) -> Iterator[Note]:
    """Notes of a text, which may be XML, or pairs of names and values as of Aperio."""
    if text.lstrip("\ufeff \r\n").startswith("<"):
        yield from xml_notes("XMP" if name == "XMP" else f"{place} {name}", text)
    elif text.startswith("Aperio") or name == "PropertyMap":
        yield from pair_notes(f"{place} {name}", text)
    else:
        yield Note(place, name, text)


def pair_notes(place: str, text: str) -> Iterator[Note]:
    """Notes of pairs `name = value`, each in a line or between bars."""
    for part in re.split(r"[|\r\n]", text):
        name, separator, value = part.partition("=")
        if separator:
            yield Note(place, name.strip(), value.strip())


def xml_notes(place: str, text: str) -> Iterator[Note]:
    """Notes of the attributes and elements of XML (XMP, OME, SCN, BIF, Philips), which may be cut off.

    No parser: none is needed for damaged or hostile text.
    """
    above: list[str] = []
    for match in TAG.finditer(text):
        closes, name, rest, content = match.groups()
        if closes:
            del above[-1:]
            continue
        pairs = ((key, a or b) for key, a, b in ATTRIBUTE.findall(rest) if not key.startswith("xmlns"))
        given = {key.rpartition(":")[2]: unescape(value) for key, value in pairs}
        del above[:-MAX_DEPTH]
        above.append(given.get("Name", name) if name == "Attribute" else name)
        owner = next((one for one in reversed(above) if one not in BRACKETS), name).rpartition(":")[2]
        yield from (Note(place, key, value) for key, value in given.items() if value.strip())
        if content.strip():
            yield Note(place, owner, unescape(content).strip())
        if rest.endswith("/"):
            above.pop()


def _decoded(content: bytes) -> str:
    """Text in UTF-8, else in Latin-1, without what follows a NUL."""
    content = content.rstrip(b"\0").split(b"\0\0")[0].replace(b"\0", b" ")
    try:
        return content.decode("utf-8").strip()
    except UnicodeDecodeError:
        return content.decode("latin-1").strip()
