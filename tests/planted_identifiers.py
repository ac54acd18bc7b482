"""Files and names with identifiers planted, one of each kind, and what has to be found in each of them."""

import io
import struct
from typing import Any

from PIL import Image, PngImagePlugin

from bcd.slides import dicom
from tests import pictures
from tests.slides.test_dicom import dicom_file, element

# In every value: no report may contain it.
SECRET = "ephyrine"
NAME = f"Z{SECRET}"
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/2019-01-01/"><rdf:RDF><rdf:Description xmp:CreateDate="1999-03-12" '
    f'xmp:CreatorTool="Program 2.0"><dc:creator><rdf:Seq><rdf:li>{NAME}</rdf:li></rdf:Seq></dc:creator>'
    "</rdf:Description></rdf:RDF></x:xmpmeta>"
)
APERIO = (
    "Aperio Image Library v12.2.2 \r\n70x46 [0,0 70x46] (64x64) JPEG/RGB Q=30|AppMag = 20|"
    f"ScanScope ID = SS{SECRET}|Filename = {NAME}|Date = 12/29/09|Time = 09:59:15|User = {NAME}|MPP = 0.4990"
)
SCN = (
    f'<?xml version="1.0"?><scn xmlns="http://example.com/2010/10/01"><collection><barcode>{NAME}</barcode>'
    '<image name="a"/><image name="b"/></collection></scn>'
)
PHILIPS = (
    f'<DataObject><Attribute Name="PIM_DP_UFS_BARCODE" Group="0x301D">{NAME}</Attribute>'
    '<Attribute Name="DICOM_ACQUISITION_DATETIME" Group="0x0008">"20160718122300.000000"</Attribute>'
    '<Attribute Name="PIM_DP_IMAGE_TYPE" Group="0x301D">LABELIMAGE</Attribute></DataObject>'
)
SLIDEDAT = f"[GENERAL]\r\nSLIDE_NAME = {NAME}\r\n[LAYER]\r\nLAYER_0_NAME = SlideBarcode\r\n"
Found = set[tuple[str, str]]


def jpeg() -> bytes:
    """A JPEG with EXIF, XMP, IPTC and a comment."""
    exif = Image.Exif()
    exif[315], exif[316], exif[40093] = NAME, NAME, (NAME + "\0").encode("utf-16-le")
    below = exif.get_ifd(0x8769)
    below[36867], below[42032], below[42033] = "1999:03:12 10:00:00", NAME, f"S{SECRET}"
    below[37510] = b"UNICODE\0" + NAME.encode("utf-16-le")
    exif.get_ifd(0x8825)[2] = (50.0, 1.0, 2.0)
    content = pictures.encode(pictures.gradient(), "JPEG", exif=exif, comment=NAME.encode(), xmp=XMP.encode())
    iptc = b"".join(
        b"\x1c\x02" + bytes([key]) + struct.pack(">H", len(NAME)) + NAME.encode() for key in (80, 120)
    )
    segment = b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0" + struct.pack(">H", len(iptc)) + iptc
    return content[:2] + b"\xff\xed" + struct.pack(">H", len(segment) + 2) + segment + content[2:]


def png() -> bytes:
    """A PNG with texts of all three kinds, EXIF, and EXIF as ImageMagick writes it."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", NAME)
    info.add_text("Description", f"left, {NAME}", zip=True)
    info.add_itxt("Comment", f"née {NAME}")
    info.add_text("Software", "Program 2.0")
    exif = Image.Exif()
    exif[306] = "1999:03:12 10:00:00"
    raw = Image.Exif()
    raw[269] = NAME
    profile = raw.tobytes()
    info.add_text("Raw profile type exif", f"\nexif\n{len(profile)}\n{profile.hex()}\n")
    return pictures.encode(pictures.gradient(), pnginfo=info, exif=exif)


def svs() -> bytes:
    """An SVS with the images of its label and of the whole glass."""
    pixels = pictures.gradient()
    names = [f"Aperio Image Library v12.2.2 \r\n{name} 70x46".encode() for name in ("label", "macro")]
    pages = [pictures.tiled_page(pixels, 0.5, t270=APERIO.encode())]
    return pictures.tiff(*pages, *(pictures.tiff_page(pixels, t270=name) for name in names))


def ndpi() -> bytes:
    """A TIFF with Hamamatsu's tags and its image of the whole glass."""
    pixels = pictures.gradient()
    first = pictures.tiff_page(
        pixels, t65427=NAME.encode(), t65442=NAME.encode(), t306=b"1999:03:12 10:00:00"
    )
    macro = pictures.tiff_page(pixels)
    macro[0][65421] = (4, list(struct.unpack("<I", struct.pack("<f", -1.0))))
    return pictures.tiff(first, macro)


def slide_object(explicit: bool = True, removed: bool = False) -> bytes:
    """A DICOM object with identifying elements, one of them in a sequence."""
    parts = element(8, 8, "CS", "DERIVED\\PRIMARY\\LABEL\\NONE", explicit)
    parts += element(8, 0x50, "SH", f"A{SECRET}", explicit) + element(8, 0x80, "LO", NAME, explicit)
    parts += element(0x10, 0x10, "PN", f"{NAME}^A", explicit) + element(0x10, 0x20, "LO", NAME, explicit)
    parts += element(0x10, 0x30, "DA", "19500312", explicit)
    parts += element(0x12, 0x62, "CS", "YES", explicit) if removed else b""
    item = element(0xFFFE, 0xE000, "", element(0x40, 0x551, "LO", NAME, explicit))
    syntax = dicom.IMPLICIT if not explicit else "1.2.840.10008.1.2.1"
    content = dicom_file("1.2.33", syntax=syntax, before=parts, after=item)
    return content + element(0x2200, 2, "UT", NAME, explicit)


def files() -> dict[str, tuple[bytes, Found]]:
    """Content, and kind and place of each identifier in it, by name."""
    plain = {
        name: pictures.tiff(pictures.tiff_page(pictures.gradient(), **tags)) for name, tags in TIFFS.items()
    }
    slide, dated = "TIFF ImageDescription", "date"
    return {
        "a.jpg": (
            jpeg(),
            {("person", "EXIF Artist"), ("device", "EXIF HostComputer"), ("person", "EXIF XPAuthor")}
            | {(dated, "EXIF DateTimeOriginal"), ("person", "EXIF CameraOwnerName")}
            | {("device", "EXIF BodySerialNumber"), ("free text", "EXIF UserComment")}
            | {("place", "EXIF GPSLatitude"), (dated, "XMP CreateDate"), ("person", "XMP creator")}
            | {("person", "IPTC By-line"), ("free text", "IPTC Caption"), ("free text", "JPEG comment")},
        ),
        "b.png": (
            png(),
            {("person", "PNG Author"), ("free text", "PNG Description"), ("free text", "PNG Comment")}
            | {(dated, "EXIF DateTime"), ("name of a file or slide", "EXIF DocumentName")},
        ),
        "c.tif": (plain["c.tif"], {("free text", slide), ("person", "TIFF Artist")}),
        "d.svs": (
            svs(),
            {("device", f"{slide} ScanScope ID"), ("name of a file or slide", f"{slide} Filename")}
            | {(dated, f"{slide} Date"), ("person", f"{slide} User")}
            | {("image of the label", "TIFF page 2, label"), ("image of the label", "TIFF page 3, macro")},
        ),
        "e.ndpi": (
            ndpi(),
            {("number", "TIFF Reference"), ("device", "TIFF SerialNumber"), (dated, "TIFF DateTime")}
            | {("image of the label", "TIFF page 2, macro")},
        ),
        "f.scn": (plain["f.scn"], {("number", f"{slide} barcode"), ("image of the label", "TIFF, macro")}),
        "g.dcm": (
            slide_object(),
            {("image of the label", "DICOM, label"), ("number", "DICOM AccessionNumber")}
            | {("place", "DICOM InstitutionName"), ("person", "DICOM PatientName")}
            | {("number", "DICOM PatientID"), ("date of birth", "DICOM PatientBirthDate")}
            | {("number", "DICOM SpecimenIdentifier"), ("number", "DICOM LabelText")},
        ),
        "i.bif": (plain["i.bif"], {("image of the label", "TIFF, label"), ("number", "XMP Barcode1D")}),
        "j.tiff": (
            plain["j.tiff"],
            {("number", f"{slide} PIM_DP_UFS_BARCODE"), ("date", f"{slide} DICOM_ACQUISITION_DATETIME")}
            | {("image of the label", f"{slide}, label")},
        ),
        "h/Slidedat.ini": (
            SLIDEDAT.encode(),
            {
                ("name of a file or slide", "Slidedat.ini SLIDE_NAME"),
                ("image of the label", "Slidedat.ini, label"),
            },
        ),
    }


TIFFS: dict[str, dict[str, Any]] = {
    "c.tif": {"t270": NAME.encode(), "t315": NAME.encode()},
    "f.scn": {"t270": SCN.encode()},
    "i.bif": {"t270": b"Label_Image", "t700": f'<Metadata><iScan Barcode1D="{NAME}"/></Metadata>'.encode()},
    "j.tiff": {"t270": PHILIPS.encode()},
}
# Names of files and folders, and ids, with what identifies in them.
NAMES = {
    f"Z{SECRET}_1950/1.png": "name and number",
    f"Z{SECRET}_Anna_S19-12345.svs": "name and number",
    f"1950-Z{SECRET}.png": "name and number",
    "MRN7654321.png": "number",
    "acc 7654321.png": "number",
    f"Z{SECRET}^ANNA.png": "person",
    "born 12.3.1950.png": "date of birth",
    "x-19500312.png": "date",
}
IDS = {f"Z{SECRET}, Anna": "person", f"z{SECRET}": "person", f"z.{SECRET}@example.com": "person"}


def clean() -> dict[str, bytes]:
    """Files that state nothing about anyone."""
    pixels = pictures.gradient()
    info = PngImagePlugin.PngInfo()
    for keyword in ("Software", "date:create", "Comment"):
        info.add_text(keyword, "Created with a program 2026-01-02")
    software, shape = Image.Exif(), b'{"shape": [46, 70, 3]}'
    software[305], software[315], software[306] = "Program 2.0", "  ", "0000:00:00 00:00:00"
    removed = io.BytesIO()
    Image.fromarray(pixels).save(removed, "TIFF", software="tifffile.py")
    return {
        "a.png": pictures.encode(pixels, pnginfo=info),
        "b.jpg": pictures.encode(pixels, "JPEG", exif=software),
        "c.tif": pictures.tiff(pictures.tiff_page(pixels, t270=shape)),
        "d.tif": removed.getvalue(),
        "e.svs": pictures.tiff(pictures.tiled_page(pixels, 0.5, t270=b"Aperio Image Library v12|MPP = 0.5")),
        "f.dcm": dicom_file("1.2.33", before=element(8, 8, "CS", "ORIGINAL\\PRIMARY\\VOLUME")),
        "g.txt": b"not an image",
        "h.png": b"",
    }
