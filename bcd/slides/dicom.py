"""Class of object, series and identifying statements of a DICOM file, from its header alone.

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
from bcd.imaging.metadata import Note

# VL Whole Slide Microscopy Image: the only objects that OpenSlide opens.
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
IMPLICIT = "1.2.840.10008.1.2"
# Not supported: big endian and deflated, both retired or unknown for slides.
OTHER_SYNTAXES = ("1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99")
SOP_CLASS, SYNTAX, SERIES = (0x0002, 0x0002), (0x0002, 0x0010), (0x0020, 0x000E)
ITEM, ITEM_END, SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
UNDEFINED = 0xFFFFFFFF
# Values of each frame and the pixels, which no identifying element follows; and the sequences that may hold
# one, which an implicit syntax does not mark: other ids of the patient, requests, specimens.
PIXELS, SEQUENCES = (0x5200, 0), {(0x10, 0x1002), (0x40, 0x275), (0x40, 0x560)}
# Value representations with a length of 32 bits.
LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
# The series is within some hundred bytes; large private elements may precede it.
HEAD_BYTES, LONG_HEAD_BYTES = 2**14, 2**22

Tag = tuple[int, int]
# What the basic profile of PS3.15, table E.1-1, removes or replaces and an object of a slide may contain, but
# for the UIDs, which every object has. Of (8, 8) and (0x28, 0x301) it is the pixels that identify.
# fmt: off
IDENTIFYING: dict[Tag, str] = {
    (0x08, 0x08): "ImageType", (0x08, 0x20): "StudyDate", (0x08, 0x21): "SeriesDate",
    (0x08, 0x22): "AcquisitionDate", (0x08, 0x23): "ContentDate", (0x08, 0x2A): "AcquisitionDateTime",
    (0x08, 0x50): "AccessionNumber", (0x08, 0x80): "InstitutionName", (0x08, 0x81): "InstitutionAddress",
    (0x08, 0x90): "ReferringPhysicianName", (0x08, 0x1010): "StationName", (0x08, 0x1030): "StudyDescription",
    (0x08, 0x103E): "SeriesDescription", (0x08, 0x1040): "InstitutionalDepartmentName",
    (0x08, 0x1048): "PhysiciansOfRecord", (0x08, 0x1050): "PerformingPhysicianName",
    (0x08, 0x1060): "NameOfPhysiciansReadingStudy", (0x08, 0x1070): "OperatorsName",
    (0x10, 0x10): "PatientName", (0x10, 0x20): "PatientID", (0x10, 0x30): "PatientBirthDate",
    (0x10, 0x40): "PatientSex", (0x10, 0x1000): "OtherPatientIDs", (0x10, 0x1001): "OtherPatientNames",
    (0x10, 0x1005): "PatientBirthName", (0x10, 0x1010): "PatientAge", (0x10, 0x1040): "PatientAddress",
    (0x10, 0x1060): "PatientMotherBirthName", (0x10, 0x1090): "MedicalRecordLocator",
    (0x10, 0x2154): "PatientTelephoneNumbers", (0x10, 0x2160): "EthnicGroup",
    (0x10, 0x21B0): "AdditionalPatientHistory", (0x10, 0x4000): "PatientComments",
    (0x12, 0x62): "PatientIdentityRemoved", (0x18, 0x1000): "DeviceSerialNumber",
    (0x18, 0x1030): "ProtocolName", (0x20, 0x10): "StudyID", (0x20, 0x4000): "ImageComments",
    (0x28, 0x301): "BurnedInAnnotation", (0x32, 0x1032): "RequestingPhysician",
    (0x32, 0x1060): "RequestedProcedureDescription", (0x38, 0x10): "AdmissionID",
    (0x40, 0x512): "ContainerIdentifier", (0x40, 0x551): "SpecimenIdentifier",
    (0x40, 0x600): "SpecimenShortDescription", (0x40, 0x602): "SpecimenDetailedDescription",
    (0x40, 0x1001): "RequestedProcedureID", (0x2200, 0x02): "LabelText", (0x2200, 0x05): "BarcodeValue",
}
# fmt: on


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
    texts, place = _meta(start)
    syntax = texts.get(SYNTAX, "")
    if syntax not in OTHER_SYNTAXES:
        data_set = _elements(start, place, syntax != IMPLICIT)
        texts |= _texts(start, takewhile(lambda element: element[0] <= SERIES, data_set))
    return Header(texts.get(SOP_CLASS, ""), texts.get(SERIES, ""))


def _meta(start: bytes) -> tuple[dict[Tag, str], int]:
    """Texts of the group before the data set, and where that begins."""
    meta = list(takewhile(lambda element: element[0][0] == SYNTAX[0], _elements(start, 132, True)))
    return _texts(start, meta), meta[-1][2] if meta else 132


def identifying_notes(start: bytes) -> Iterator[Note]:
    """The elements of `IDENTIFYING` in the first bytes of a file that have a value, in sequences, too."""
    texts, place = _meta(start)
    if (syntax := texts.get(SYNTAX, "")) in OTHER_SYNTAXES:
        return
    for tag, begin, end in _flat(start, place, syntax != IMPLICIT):
        value = start[begin:end].decode("utf-8", "replace").strip("\0 ")
        if tag in IDENTIFYING and value and end <= len(start):
            yield Note("DICOM", IDENTIFYING[tag], value)


def _flat(data: bytes, at: int, explicit: bool) -> Iterator[tuple[Tag, int, int]]:
    """Yield every element up to the pixels, those of sequences as if there were none."""
    try:
        while True:
            tag, begin, length = _element(data, at, explicit)
            is_sequence = data[at + 4 : at + 6] == b"SQ" if explicit else tag in SEQUENCES
            if tag[0] == ITEM[0] or is_sequence or length == UNDEFINED:
                at = begin
            else:
                at = begin + length
                yield tag, begin, at
            if tag >= PIXELS and tag[0] != ITEM[0]:
                return
    except struct.error:
        return


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
