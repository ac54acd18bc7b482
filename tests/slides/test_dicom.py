"""Headers of DICOM files, built element by element."""

import struct

import pytest

from bcd import storage
from bcd.slides import dicom

EXPLICIT = "1.2.840.10008.1.2.1"
# Objects that lie beside slides: annotations, segmentation, report, presentation state, a field.
OTHERS = {
    "annotation.dcm": "1.2.840.10008.5.1.4.1.1.91.1",
    "segmentation.dcm": "1.2.840.10008.5.1.4.1.1.66.4",
    "report.dcm": "1.2.840.10008.5.1.4.1.1.88.33",
    "state.dcm": "1.2.840.10008.5.1.4.1.1.11.1",
    "field.dcm": "1.2.840.10008.5.1.4.1.1.77.1.2",
}
UNDEFINED = 0xFFFFFFFF


def element(group, number, vr, value, explicit=True, length=None):
    value = value.encode() if isinstance(value, str) else value
    value += b"\0" * (len(value) % 2)
    length = len(value) if length is None else length
    if not explicit or group == 0xFFFE:
        return struct.pack("<HHI", group, number, length) + value
    if vr.encode() in dicom.LONG:
        return struct.pack("<HH2sHI", group, number, vr.encode(), 0, length) + value
    return struct.pack("<HH2sH", group, number, vr.encode(), length) + value


def sequence(content, explicit=True, defined=False):
    """A sequence of one item, before the series; its own series is another's."""
    if defined:
        return element(8, 0x1115, "SQ", element(0xFFFE, 0xE000, "", content), explicit)
    ends = element(0xFFFE, 0xE00D, "", b"") + element(0xFFFE, 0xE0DD, "", b"")
    item = element(0xFFFE, 0xE000, "", content, length=UNDEFINED)
    return element(8, 0x1115, "SQ", item + ends, explicit, UNDEFINED)


def dicom_file(series, kind=dicom.WHOLE_SLIDE, syntax=EXPLICIT, before=b"", after=b"after"):
    explicit = syntax != dicom.IMPLICIT
    meta = element(2, 2, "UI", kind) + element(2, 0x10, "UI", syntax)
    body = element(8, 5, "CS", "ISO_IR 192", explicit) + before
    body += element(0x20, 0xD, "UI", "1.2.3.4", explicit)
    body += element(0x20, 0xE, "UI", series, explicit) + element(0x40, 0x560, "SQ", after, explicit)
    return bytes(128) + b"DICM" + meta + body


@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("defined", [True, False])
def test_the_series_is_that_of_the_object_itself(explicit, defined):
    other = element(0x20, 0xE, "UI", "9.9.9", explicit)
    nested = sequence(sequence(other, explicit, defined) + other, explicit, defined)
    syntax = EXPLICIT if explicit else dicom.IMPLICIT
    found = dicom.read_header(dicom_file("1.2.33", syntax=syntax, before=nested))
    assert found == dicom.Header(dicom.WHOLE_SLIDE, "1.2.33")
    assert found.is_slide


@pytest.mark.parametrize("kind", OTHERS.values())
def test_other_objects_are_no_slides(kind):
    assert not dicom.read_header(dicom_file("1.1", kind)).is_slide


def test_a_cut_file_gives_the_header_that_it_has():
    whole = dicom_file("1.2.33")
    found = [dicom.read_header(whole[:n]) for n in range(132, len(whole))]
    assert set(found) == {
        dicom.Header("", ""),
        dicom.Header(dicom.WHOLE_SLIDE, ""),
        dicom.Header(dicom.WHOLE_SLIDE, "1.2.33"),
    }
    assert all(header.is_slide for header in found)
    assert dicom.read_header(dicom_file("1.2.33", syntax="1.2.840.10008.1.2.2")).series == ""


def test_a_series_behind_much_else_is_found(tmp_path):
    private = element(9, 0x1001, "OB", bytes(3 * dicom.HEAD_BYTES))
    (tmp_path / "a.dcm").write_bytes(dicom_file("1.1", before=private))
    (tmp_path / "b.dcm").write_bytes(b"no DICOM")
    found = dicom.headers([*storage.list_files(str(tmp_path)), storage.File("/none", "none", 1)])
    assert found == {"a.dcm": dicom.Header(dicom.WHOLE_SLIDE, "1.1"), "b.dcm": None, "none": None}


def test_a_slide_is_a_series_of_one_folder():
    one, two = (dicom.Header(dicom.WHOLE_SLIDE, series) for series in ("1.1", "1.2"))
    unknown, other = dicom.Header("", ""), dicom.Header(OTHERS["report.dcm"], "1.1")
    found = {
        "b/2": one,
        "b/1": one,
        "a/1": one,
        "b/0": two,
        "c": unknown,
        "d": unknown,
        "b/3": other,
        "e": None,
    }
    assert dicom.slides(found) == {
        "a/1": ["a/1"],
        "b/0": ["b/0"],
        "b/1": ["b/1", "b/2"],
        "c": ["c"],
        "d": ["d"],
    }
