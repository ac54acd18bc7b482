"""Statements of headers, as they are written there; what identifies in them is for `tests.audit`."""

import io
import struct

import pytest

from bcd.imaging import metadata
from bcd.imaging.metadata import Note
from tests import pictures
from tests import planted_identifiers as planted


def read(content):
    return list(metadata.notes(io.BytesIO(content), len(content)))


def test_a_png_gives_its_texts_with_their_keywords():
    found = read(planted.png())
    assert Note("PNG", "Author", planted.NAME) in found
    assert Note("PNG", "Description", f"left, {planted.NAME}") in found
    assert Note("PNG", "Comment", f"née {planted.NAME}") in found
    assert Note("EXIF", "DateTime", "1999:03:12 10:00:00") in found
    assert Note("EXIF", "DocumentName", planted.NAME) in found


def test_a_jpeg_gives_exif_xmp_iptc_and_comment():
    found = read(planted.jpeg())
    assert {note.place for note in found} == {"EXIF", "XMP", "IPTC", "JPEG"}
    assert {note.text for note in found if note.field in ("UserComment", "XPAuthor", "By-line")} == {
        planted.NAME
    }


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_tiff_gives_its_tags_in_either_byte_order(order):
    page = pictures.tiff_page(pictures.gradient(), t315=b"Someone\0", t306=b"1999:03:12 10:00:00\0")
    found = read(pictures.tiff(page, page, order=order))
    assert Note("TIFF", "Artist", "Someone") in found
    assert Note("TIFF page 2", "DateTime", "1999:03:12 10:00:00") in found


def test_a_big_tiff_gives_its_tags():
    text = b"Someone who has a long name\0"
    content = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16) + struct.pack(
        "<QHHQQQ", 1, 315, 2, len(text), 52, 0
    )
    assert read(content + text) == [Note("TIFF", "Artist", text[:-1].decode())]


def test_ndpi_beyond_4_gib_is_read_with_its_long_addresses(tmp_path):
    """The last directory, and the text before it, are beyond 4 GiB; the file has a hole."""
    text, at = b"Someone who has a long name\0", 2**32 + 100
    path = tmp_path / "large.ndpi"
    with path.open("wb") as file:
        file.write(struct.pack("<2sHQ", b"II", 42, at + 100))
        file.seek(at)
        file.write(text)
        file.seek(at + 100)
        file.write(struct.pack("<HHHIIQ", 1, 315, 2, len(text), at % 2**32, 0))
    with path.open("rb") as file:
        assert list(metadata.notes(file, path.stat().st_size)) == [Note("TIFF", "Artist", text[:-1].decode())]


def test_xml_that_is_cut_off_gives_what_there_is():
    text = '<a:OME xmlns:a="x"><Experimenter LastName="Doe &amp; Roe"/><Image>'
    text += "<AcquisitionDate>1999</AcquisitionDate><De"
    assert list(metadata.xml_notes("OME", text)) == [
        Note("OME", "LastName", "Doe & Roe"),
        Note("OME", "AcquisitionDate", "1999"),
    ]
    named = '<Attribute Name="PIM_DP_UFS_BARCODE" Group="0x1">MTIz</Attribute>'
    assert Note("Philips", "PIM_DP_UFS_BARCODE", "MTIz") in metadata.xml_notes("Philips", named)


def test_pages_that_go_round_in_a_circle_end():
    content = bytearray(pictures.tiff(pictures.tiff_page(pictures.gradient(), t315=b"Someone")))
    start = struct.unpack_from("<I", content, 4)[0]
    n = struct.unpack_from("<H", content, start)[0]
    struct.pack_into("<I", content, start + 2 + 12 * n, start)
    assert len(read(bytes(content))) == metadata.MAX_PAGES


def test_other_formats_and_empty_files_state_nothing():
    for content in (b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"II*\0", b"\xff\xd8\xff"):
        assert read(content) == []


def test_little_is_read_of_a_large_file():
    """Of a PNG with long pixels, no more than the heads of its chunks."""

    class Counting(io.BytesIO):
        n_read = 0

        def read(self, size=-1):
            found = super().read(size)
            self.n_read += len(found)
            return found

    content = planted.png()
    pixels = struct.pack(">I", 10**6) + b"IDAT" + bytes(10**6 + 4)
    long = (
        struct.pack(">I", metadata.MAX_TEXT_BYTES)
        + b"tEXt"
        + b"Key\0".ljust(metadata.MAX_TEXT_BYTES + 4, b"a")
    )
    claims = Counting(content[:33] + 100 * long + content[33:])
    assert len(list(metadata.notes(claims, 10**6))) == metadata.MAX_BYTES // metadata.MAX_TEXT_BYTES
    assert claims.n_read <= metadata.MAX_BYTES + 8
    file = Counting(content[:33] + pixels + content[33:])
    assert Note("PNG", "Author", planted.NAME) in list(metadata.notes(file, 10**6))
    assert file.n_read < len(content) + 100
