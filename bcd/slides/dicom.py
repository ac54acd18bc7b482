"""Class of object and series of a DICOM file, from its header alone.

Implements the parts of the standard that this requires: PS3.10 section 7 (file), PS3.5 section 7 (elements,
sequences).
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from pathlib import PurePosixPath

from bcd import storage
from bcd.errors import StorageError

# VL Whole Slide Microscopy Image: the only objects that OpenSlide opens.
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
IMPLICIT = "1.2.840.10008.1.2"
# Not supported: big endian and deflated, both retired or unknown for slides.
OTHER_SYNTAXES = ("1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99")
SOP_CLASS, SYNTAX, SERIES = (0x0002, 0x0002), (0x0002, 0x0010), (0x0020, 0x000E)
ITEM_END, SEQUENCE_END = (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
UNDEFINED = 0xFFFFFFFF
# Value representations with a length of 32 bits.
LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
# The series is within some hundred bytes; large private elements may precede it.
HEAD_BYTES, LONG_HEAD_BYTES = 2**14, 2**22

Tag = tuple[int, int]


@dataclass(frozen=True)
class Header:
    """UIDs of the object's class and series; "" where unknown."""

    sop_class: str
    series: str

    @property
    def is_slide(self) -> bool:
        """Whether the file contains pixels of a whole slide, or is cut before it states its class."""
        return self.sop_class in (WHOLE_SLIDE, "")


def is_dicom(start: bytes) -> bool:
    """Whether a file that starts like this is DICOM."""
    return start[128:132] == b"DICM"


def read_header(start: bytes) -> Header:
    """Read the header from the first bytes of a file; "" for what they do not contain."""
    meta = list(takewhile(lambda element: element[0][0] == SYNTAX[0], _elements(start, 132, True)))
    texts = _texts(start, meta)
    syntax = texts.get(SYNTAX, "")
    if syntax not in OTHER_SYNTAXES:
        data_set = _elements(start, meta[-1][2] if meta else 132, syntax != IMPLICIT)
        texts |= _texts(start, takewhile(lambda element: element[0] <= SERIES, data_set))
    return Header(texts.get(SOP_CLASS, ""), texts.get(SERIES, ""))


def _texts(data: bytes, elements: Iterable[tuple[Tag, int, int]]) -> dict[Tag, str]:
    """Texts of the wanted elements among the given ones, as far as there are bytes."""
    return {
        tag: data[begin:end].decode("ascii", "replace").strip("\0 ")
        for tag, begin, end in elements
        if tag in (SOP_CLASS, SYNTAX, SERIES) and end <= len(data)
    }


def headers(files: Sequence[storage.File]) -> dict[str, Header | None]:
    """The headers of files by path; None for those that are no DICOM or have a permanent error. Raises
    StorageError for a transient error."""
    with ThreadPoolExecutor(storage.READ_THREADS) as pool:
        return dict(zip((file.path for file in files), pool.map(_header, files), strict=True))


def _header(file: storage.File) -> Header | None:
    try:
        start = storage.read_start(file.uri, HEAD_BYTES)
        if not is_dicom(start):
            return None
        found = read_header(start)
        if found.is_slide and not found.series and file.size_bytes > HEAD_BYTES:
            found = read_header(storage.read_start(file.uri, LONG_HEAD_BYTES))
        return found
    except StorageError as error:
        if not error.lasting:
            raise
        return None


def slides(found: dict[str, Header | None]) -> dict[str, list[str]]:
    """The paths of each whole slide (one series in one folder), by the first of them.

    A file of unknown series is a slide by itself.
    """
    first: dict[tuple[PurePosixPath, str], str] = {}
    result: dict[str, list[str]] = {}
    for path, header in sorted(found.items()):
        if header is not None and header.is_slide:
            key = PurePosixPath(path).parent, header.series or f"of {path}"
            result.setdefault(first.setdefault(key, path), []).append(path)
    return result


def _elements(data: bytes, at: int, explicit: bool) -> Iterator[tuple[Tag, int, int]]:
    """Yield tag, begin and end of the value of each element, as far as there are bytes."""
    try:
        while True:
            tag, begin, length = _element(data, at, explicit)
            at = _end(data, begin, explicit) if length == UNDEFINED else begin + length
            yield tag, begin, at
    except struct.error:
        return


def _element(data: bytes, at: int, explicit: bool) -> tuple[Tag, int, int]:
    """Tag, begin of the value, and its length in bytes."""
    tag = struct.unpack_from("<HH", data, at)
    if not explicit or tag[0] == 0xFFFE:
        return tag, at + 8, struct.unpack_from("<I", data, at + 4)[0]
    if data[at + 4 : at + 6] in LONG:
        return tag, at + 12, struct.unpack_from("<I", data, at + 8)[0]
    return tag, at + 8, struct.unpack_from("<H", data, at + 6)[0]


def _end(data: bytes, at: int, explicit: bool) -> int:
    """End of a value of undefined length, after the items and sequences nested in it."""
    depth = 1
    while depth:
        tag, begin, length = _element(data, at, explicit)
        depth += (length == UNDEFINED) - (tag in (ITEM_END, SEQUENCE_END))
        at = begin if length == UNDEFINED else begin + length
    return at
