"""Small slides of each format, written byte by byte, with known pixels: two levels, the second one halved.

`FORMATS` has their makers: each writes pixels, uint8 (h, w, 3), as a slide of 0.5 µm/px below a folder, and
returns its path. Width and height are multiples of 128.
"""

import io
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from bcd.slides.readers import openslide_server
from tests.slides.test_dicom import EXPLICIT, element

SIDE, MPP = 64, 0.5
# TIFF's types -> size in bytes, and letter for `struct`; 5 is a fraction of two numbers, 9 signed.
TYPES = {
    1: (1, "B"),
    2: (1, "s"),
    3: (2, "H"),
    4: (4, "I"),
    5: (8, "I"),
    9: (4, "i"),
    11: (4, "f"),
    16: (8, "Q"),
}
Tags = dict[int, tuple[int, list[int] | list[float] | bytes]]
Page = tuple[Tags, list[bytes]]
Encode = Callable[[np.ndarray], bytes]


def jpeg(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def jpeg2000(pixels: np.ndarray) -> bytes:
    """A codestream without loss."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG2000", no_jp2=True, irreversible=False)
    return out.getvalue()


def deflated(pixels: np.ndarray) -> bytes:
    return zlib.compress(pixels.tobytes())


def lzw(pixels: np.ndarray) -> bytes:
    """Of the differences from the pixel to the left; the strip of a TIFF that Pillow writes."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "TIFF", compression="tiff_lzw", tiffinfo={317: 2, 278: len(pixels)})
    with Image.open(out) as written:
        ((place,), (n_bytes,)) = written.tag_v2[273], written.tag_v2[279]
    return out.getvalue()[place : place + n_bytes]


# Encoder, and TIFF's numbers of compression and colours.
RAW, DEFLATE, JPEG = (np.ndarray.tobytes, 1, 2), (deflated, 8, 2), (jpeg, 7, 6)
LZW = (lzw, 5, 2)
JPEG_2000 = (jpeg2000, 33005, 2)


def tiles(pixels: np.ndarray, side: int = SIDE) -> list[np.ndarray]:
    """In rows from the upper left."""
    height, width, channels = pixels.shape
    parts = pixels.reshape(height // side, side, width // side, side, channels).swapaxes(1, 2)
    return [part.copy() for part in parts.reshape(-1, side, side, channels)]


def halved(pixels: np.ndarray) -> np.ndarray:
    return pixels[::2, ::2].copy()


def page(pixels: np.ndarray, coding: tuple[Encode, int, int], **changes: object) -> Page:
    """A page of tiles; `t270=b"text"` or `t254=[1]` sets a tag."""
    encode, compression, meaning = coding
    tags: Tags = {256: (4, [pixels.shape[1]]), 257: (4, [pixels.shape[0]]), 258: (3, [8, 8, 8])}
    tags |= {259: (3, [compression]), 262: (3, [meaning]), 277: (3, [3]), 284: (3, [1])}
    tags |= {322: (3, [SIDE]), 323: (3, [SIDE]), 530: (3, [1, 1])}
    tags |= {282: (5, [20_000, 1]), 283: (5, [20_000, 1]), 296: (3, [3])}
    for name, value in changes.items():
        kind = 2 if isinstance(value, bytes) else 3
        tags[int(name[1:])] = value if isinstance(value, tuple) else (kind, value)  # type: ignore[assignment]
    return tags, [encode(part) for part in tiles(pixels)]


def tiff(pages: list[Page], big: bool = False, nested: bool = False) -> bytes:
    """A classic or big TIFF; with `nested`, the first page has the others as SubIFDs."""
    content = bytearray(
        struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0) if big else struct.pack("<2sHI", b"II", 42, 0)
    )
    pointer, below = (8 if big else 4), list[int]()
    for tags, parts in pages[1:] * nested + pages[: 1 if nested else None]:
        places = []
        for part in parts:
            places.append(len(content))
            content += part + bytes(len(part) % 2)
        kind = 16 if big else 4
        begin, sizes = (324, 325) if 322 in tags else (273, 279)
        full = tags | {begin: (kind, places), sizes: (kind, [len(part) for part in parts])}
        if nested and tags is pages[0][0]:
            full |= {330: (kind, below)}
        start = len(content)
        content += directory(full, start, big)
        if nested and tags is not pages[0][0]:
            below.append(start)
            continue
        content[pointer : pointer + (8 if big else 4)] = struct.pack("<Q" if big else "<I", start)
        pointer = start + (8 + 20 * len(full) if big else 2 + 12 * len(full))
    return bytes(content)


def directory(tags: Tags, start: int, big: bool) -> bytes:
    table, extra = struct.pack("<Q" if big else "<H", len(tags)), b""
    inline, after = (8, start + 16 + 20 * len(tags)) if big else (4, start + 6 + 12 * len(tags))
    for tag, (kind, values) in sorted(tags.items()):
        size, letter = TYPES[kind]
        packed = values if isinstance(values, bytes) else struct.pack(f"<{len(values)}{letter}", *values)
        packed += b"\0" * (kind == 2)
        table += struct.pack("<HHQ" if big else "<HHI", tag, kind, len(packed) // size)
        if len(packed) <= inline:
            table += packed.ljust(inline, b"\0")
        else:
            table += struct.pack("<Q" if big else "<I", after + len(extra))
            extra += packed + bytes(len(packed) % 2)
    return table + bytes(inline) + extra


def pyramid(
    pixels: np.ndarray, coding: tuple[Encode, int, int], first: bytes = b"", **changes: object
) -> list[Page]:
    """Both levels, the first one with a description."""
    described = {"t270": first} if first else {}
    return [page(pixels, coding, **described, **changes), page(halved(pixels), coding, t254=[1], **changes)]


def svs(coding: tuple[Encode, int, int]) -> Callable[[Path, np.ndarray], Path]:
    def write(folder: Path, pixels: np.ndarray) -> Path:
        size = "{1}x{0}".format(*pixels.shape)
        text = f"Aperio Image Library v12\r\n{size} [0,0 {size}] (64x64)|AppMag = 20|MPP = 0.5".encode()
        pages = [page(level, coding, t270=text) for level in (pixels, halved(pixels))]
        return put(folder / "s.svs", tiff(pages))

    return write


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def generic(coding: tuple[Encode, int, int], **changes: object) -> Callable[[Path, np.ndarray], Path]:
    return lambda folder, pixels: put(folder / "s.tif", tiff(pyramid(pixels, coding, **changes)))


def big(folder: Path, pixels: np.ndarray) -> Path:
    return put(folder / "s.tif", tiff(pyramid(pixels, JPEG), big=True))


OME = """<?xml version="1.0"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">
<Pixels ID="Pixels:0" Type="uint8" DimensionOrder="XYCZT" SizeX="{}" SizeY="{}" SizeC="3" SizeZ="1" SizeT="1"
 PhysicalSizeX="500" PhysicalSizeXUnit="nm" PhysicalSizeY="0.5">
<Channel ID="Channel:0:0" SamplesPerPixel="{}"/>
{}</Pixels></Image></OME>"""


def ome(pixels: np.ndarray, samples: int = 3) -> bytes:
    others = "".join(f'<Channel ID="Channel:0:{i}" SamplesPerPixel="1"/>' for i in range(1, 4 - samples))
    return OME.format(pixels.shape[1], pixels.shape[0], samples, others if samples == 1 else "").encode()


def ome_nested(folder: Path, pixels: np.ndarray) -> Path:
    """Its second level is a SubIFD of the first."""
    return put(folder / "s.ome.tif", tiff(pyramid(pixels, DEFLATE, ome(pixels)), nested=True))


def ome_planar(folder: Path, pixels: np.ndarray) -> Path:
    """Red, green and blue in tiles of their own."""
    pages = pyramid(pixels, DEFLATE, ome(pixels), t284=[2])
    planar = []
    for (tags, _), level in zip(pages, (pixels, halved(pixels)), strict=True):
        planes = [deflated(part) for channel in range(3) for part in tiles(level[..., channel : channel + 1])]
        planar.append((tags, planes))
    return put(folder / "s.ome.tif", tiff(planar))


def ome_pages(folder: Path, pixels: np.ndarray) -> Path:
    """Red, green and blue in pages of their own."""
    text, found = ome(pixels, samples=1), []
    for channel in range(3):
        tags, _ = page(pixels, DEFLATE, **({} if channel else {"t270": text}))
        grey = {258: (3, [8]), 262: (3, [1]), 277: (3, [1])}
        found.append((tags | grey, [deflated(part) for part in tiles(pixels[..., channel : channel + 1])]))
    return put(folder / "s.ome.tif", tiff(found))


def trestle(folder: Path, pixels: np.ndarray) -> Path:
    text = b"Objective Power=20;OverlapsXY= 0 0 0 0;"
    mpp = {"t282": (5, [1, 2]), "t283": (5, [1, 2])}
    pages = [page(level, JPEG, t270=text, t305=b"MedScan", **mpp) for level in (pixels, halved(pixels))]
    return put(folder / "s.tif", tiff(pages))


SCN = """<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01" uuid="urn:uuid:1">
<collection name="t" uuid="urn:uuid:2" sizeX="{nm_x}" sizeY="{nm_y}"><barcode>QQ==</barcode>{images}
</collection></scn>"""
SCN_IMAGE = """<image name="i" uuid="urn:uuid:4"><creationDate>2020-01-01T00:00:00Z</creationDate>
<device model="Leica SCN400" version="1"/><pixels sizeX="{x}" sizeY="{y}">{levels}</pixels>
<view sizeX="{nm_x}" sizeY="{nm_y}" offsetX="{at}" offsetY="{at}" spacingZ="0"/>
<scanSettings><objectiveSettings><objective>{lens}</objective></objectiveSettings><illuminationSettings><numericalAperture>0.4</numericalAperture>
<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image>"""
SCN_MARGIN_PX = 128


def scn(folder: Path, pixels: np.ndarray) -> Path:
    """The scanned region is within a glass that is larger by a margin on each side."""
    height, width, _ = pixels.shape
    glass = [side + 2 * SCN_MARGIN_PX for side in (width, height)]
    nm = [500 * side for side in glass]
    macro = SCN_IMAGE.format(
        x=64,
        y=64,
        nm_x=nm[0],
        nm_y=nm[1],
        at=0,
        lens=1,
        levels='<dimension sizeX="64" sizeY="64" r="0" ifd="0"/>',
    )
    levels = "".join(
        f'<dimension sizeX="{width >> r}" sizeY="{height >> r}" r="{r}" ifd="{r + 1}"/>' for r in range(2)
    )
    main = SCN_IMAGE.format(
        x=width, y=height, nm_x=500 * width, nm_y=500 * height, at=500 * SCN_MARGIN_PX, lens=20, levels=levels
    )
    text = SCN.format(nm_x=nm[0], nm_y=nm[1], images=macro + main).encode()
    pages = [page(np.full((64, 64, 3), 230, np.uint8), JPEG, t270=text), *pyramid(pixels, JPEG)]
    return put(folder / "s.scn", tiff(pages))


PHILIPS = """<?xml version="1.0" encoding="UTF-8"?><DataObject ObjectType="DPUfsImport">
<Attribute Name="PIM_DP_SCANNED_IMAGES" Group="0x301D" Element="0x1003" PMSVR="IDataObjectArray"><Array>
<DataObject ObjectType="DPScannedImage">
<Attribute Name="PIM_DP_IMAGE_TYPE" Group="0x301D" Element="0x1004" PMSVR="IString">WSI</Attribute>
<Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030" PMSVR="IDoubleArray">{first}</Attribute>
<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"
 Group="0x1001" Element="0x8B01" PMSVR="IDataObjectArray">
<Array>{levels}</Array></Attribute></DataObject></Array></Attribute></DataObject>"""
PHILIPS_LEVEL = """<DataObject ObjectType="PixelDataRepresentation">
<Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030" PMSVR="IDoubleArray">{}</Attribute>
</DataObject>"""


def philips(folder: Path, pixels: np.ndarray) -> Path:
    spacing = [f"&quot;{0.0005 * 2**level}&quot; &quot;{0.0005 * 2**level}&quot;" for level in range(2)]
    text = PHILIPS.format(first=spacing[0], levels="".join(map(PHILIPS_LEVEL.format, spacing)))
    software = {"t305": b"Philips DP v1.0"}
    pages = [
        page(pixels, JPEG, t270=text.encode(), **software),
        page(halved(pixels), JPEG, t254=[1], t270=b"level=1 mag=10 quality=90", **software),
    ]
    return put(folder / "s.tiff", tiff(pages))


def ndpi(folder: Path, pixels: np.ndarray) -> Path:
    """Each level is one JPEG."""
    pages = []
    for number, level in enumerate((pixels, halved(pixels))):
        tags, _ = page(level, JPEG)
        del tags[322], tags[323]
        tags |= {278: (4, [level.shape[0]]), 65420: (4, [1]), 65421: (11, [20.0 / 2**number])}
        tags |= {65422: (9, [0]), 65423: (9, [0]), 65424: (9, [0])}
        pages.append((tags, [jpeg(level)]))
    return put(folder / "s.ndpi", tiff(pages))


ISCAN = b'<iScan Magnification="20" ScanRes="0.5" ScannerModel="made"/>'
ENCODE = """<EncodeInfo Ver="2"><SlideInfo/><SlideStitchInfo><ImageInfo AOIScanned="1" AOIIndex="0"
 Width="64" Height="64" NumRows="{rows}" NumCols="{columns}" Pos-X="0" Pos-Y="0">{joints}</ImageInfo>
</SlideStitchInfo><AoiOrigin><AOI0 OriginX="0" OriginY="0"/></AoiOrigin></EncodeInfo>"""
JOINT = """<TileJointInfo FlagJoined="1" Confidence="99" Direction="{}" Tile1="{}" Tile2="{}"
 OverlapX="0" OverlapY="0"/>"""


def bif(folder: Path, pixels: np.ndarray) -> Path:
    """Tiles are numbered from the lower left, every other row from the right."""
    rows, columns = (side // SIDE for side in pixels.shape[:2])
    numbers = np.arange(1, rows * columns + 1).reshape(rows, columns)
    numbers[1::2] = numbers[1::2, ::-1]
    joints = [JOINT.format("RIGHT", a, b) for row in numbers for a, b in pairwise(row)]
    joints += [
        JOINT.format("UP", a, b) for low, high in pairwise(numbers) for a, b in zip(low, high, strict=True)
    ]
    text = ENCODE.format(rows=rows, columns=columns, joints="".join(joints)).encode()
    pages = [
        page(np.full((64, 64, 3), 230, np.uint8), RAW, t270=b"Label_Image", t700=(1, ISCAN)),
        page(pixels, JPEG, t270=b"level=0 mag=20 quality=95", t700=(1, text)),
        page(halved(pixels), JPEG, t270=b"level=1 mag=10 quality=95"),
    ]
    return put(folder / "s.bif", tiff(pages))


SLIDEDAT = """[GENERAL]
SLIDE_ID = {id}
IMAGENUMBER_X = {columns}
IMAGENUMBER_Y = {rows}
OBJECTIVE_MAGNIFICATION = 20
[HIERARCHICAL]
INDEXFILE = Index.dat
HIER_COUNT = 1
NONHIER_COUNT = 0
HIER_0_NAME = Slide zoom level
HIER_0_COUNT = 2
HIER_0_VAL_0 = ZoomLevel_0
HIER_0_VAL_0_SECTION = LEVEL_0
HIER_0_VAL_1 = ZoomLevel_1
HIER_0_VAL_1_SECTION = LEVEL_1
[DATAFILE]
FILE_COUNT = 1
FILE_0 = Data0000.dat
"""
MIRAX_LEVEL = """[LEVEL_{level}]
OVERLAP_X = 0
OVERLAP_Y = 0
MICROMETER_PER_PIXEL_X = {mpp}
MICROMETER_PER_PIXEL_Y = {mpp}
IMAGE_FORMAT = JPEG
IMAGE_FILL_COLOR_BGR = 16777215
DIGITIZER_WIDTH = 64
DIGITIZER_HEIGHT = 64
IMAGE_CONCAT_FACTOR = {level}
"""
MIRAX_ID = "0123456789ABCDEF0123456789ABCDEF"


def mirax(folder: Path, pixels: np.ndarray) -> Path:
    """A file beside a folder: an index with a list of images for each level, and their JPEGs."""
    rows, columns = (side // SIDE for side in pixels.shape[:2])
    text, data, lists = SLIDEDAT.format(id=MIRAX_ID, rows=rows, columns=columns), b"", []
    for level, plane in enumerate((pixels, halved(pixels))):
        text += MIRAX_LEVEL.format(level=level, mpp=MPP * 2**level)
        found = b""
        for number, stored in enumerate(map(jpeg, tiles(plane))):
            y, x = divmod(number, columns >> level)
            found += struct.pack("<iiii", (y * columns + x) << level, len(data), len(stored), 0)
            data += stored
        lists.append(found)
    head = b"01.02" + MIRAX_ID.encode()
    heads_at = len(head) + 8
    pages_at = heads_at + 4 * len(lists)
    index, pages = head + struct.pack("<ii", heads_at, 0), b""
    for found in lists:
        begin = pages_at + len(pages)
        index += struct.pack("<i", begin)
        pages += struct.pack("<iiii", 0, begin + 8, len(found) // 16, 0) + found
    put(folder / "s/Slidedat.ini", text.encode())
    put(folder / "s/Index.dat", index + pages)
    put(folder / "s/Data0000.dat", data)
    return put(folder / "s.mrxs", jpeg(pixels[:64, :64]))


def item(content: bytes) -> bytes:
    return element(0xFFFE, 0xE000, "", content)


def dicom(folder: Path, pixels: np.ndarray) -> Path:
    """A series of two files, one for each level, uncompressed."""
    for number, level in enumerate((pixels, halved(pixels))):
        height, width, _ = level.shape
        frames = tiles(level)
        spacing = f"{0.0005 * 2**number}\\{0.0005 * 2**number}"
        measures = element(
            0x5200, 0x9229, "SQ", item(element(0x28, 0x9110, "SQ", item(element(0x28, 0x30, "DS", spacing))))
        )
        kind = "ORIGINAL\\PRIMARY\\VOLUME\\NONE" if number == 0 else "DERIVED\\PRIMARY\\VOLUME\\RESAMPLED"
        body = (
            element(8, 8, "CS", kind)
            + element(8, 0x16, "UI", WHOLE_SLIDE)
            + element(8, 0x18, "UI", f"1.2.3.{number + 1}")
        )
        body += (
            element(8, 0x60, "CS", "SM")
            + element(0x20, 0xD, "UI", "1.2.3.4")
            + element(0x20, 0xE, "UI", "1.2.3.5")
        )
        body += element(0x20, 0x9311, "CS", "TILED_FULL")
        body += (
            element(0x28, 2, "US", struct.pack("<H", 3))
            + element(0x28, 4, "CS", "RGB")
            + element(0x28, 6, "US", b"\0\0")
        )
        body += element(0x28, 8, "IS", str(len(frames)))
        body += element(0x28, 0x10, "US", struct.pack("<H", SIDE)) + element(
            0x28, 0x11, "US", struct.pack("<H", SIDE)
        )
        body += b"".join(
            element(0x28, tag, "US", struct.pack("<H", value))
            for tag, value in ((0x100, 8), (0x101, 8), (0x102, 7), (0x103, 0))
        )
        body += element(0x48, 6, "UL", struct.pack("<I", width)) + element(
            0x48, 7, "UL", struct.pack("<I", height)
        )
        body += measures + element(0x7FE0, 0x10, "OB", b"".join(frame.tobytes() for frame in frames))
        meta = (
            element(2, 1, "OB", b"\0\1")
            + element(2, 2, "UI", WHOLE_SLIDE)
            + element(2, 3, "UI", f"1.2.3.{number + 1}")
        )
        meta += element(2, 0x10, "UI", EXPLICIT) + element(2, 0x12, "UI", "1.2.3")
        group = element(2, 0, "UL", struct.pack("<I", len(meta)))
        put(folder / f"{number}.dcm", bytes(128) + b"DICM" + group + meta + body)
    return folder / "0.dcm"


WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"


def blosc(data: bytes) -> bytes:
    """One block of LZ4 after its bits are shuffled."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").reshape(-1, 8)
    shuffled = np.packbits(bits.T, axis=1, bitorder="little").tobytes()
    stored = pa.Codec("lz4_raw").compress(shuffled, asbytes=True)
    stored = stored if len(stored) < len(data) else shuffled
    head = struct.pack("<BBBBIII", 2, 1, 0x4 | 0x10 | 1 << 5, 1, len(data), len(data), 24 + len(stored))
    return head + struct.pack("<II", 20, len(stored)) + stored


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def zarr(version: int) -> Callable[[Path, np.ndarray], Path]:
    """As bioformats2raw writes: five axes and planes of colours (2), or colours together (3)."""

    def write(folder: Path, pixels: np.ndarray) -> Path:
        root = folder / "s.ome.zarr"
        for name, content in zarr_files(pixels, version).items():
            put(root / name, content)
        return root

    return write


def zarr_files(pixels: np.ndarray, version: int) -> Mapping[str, bytes]:
    names = "tczyx" if version == 2 else "cyx"
    axes = [
        {"name": name} | ({"type": "space", "unit": "micrometer"} if name in "xy" else {}) for name in names
    ]
    scales = [[1.0] * (len(names) - 2) + [MPP * 2**level] * 2 for level in range(2)]
    datasets = [
        {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
        for level, scale in enumerate(scales)
    ]
    described = {"multiscales": [{"version": "0.4", "axes": axes, "datasets": datasets}]}
    if version == 2:
        files = {".zattrs": described, ".zgroup": {"zarr_format": 2}}
    else:
        files = {
            "zarr.json": {
                "zarr_format": 3,
                "node_type": "group",
                "attributes": {"ome": {"version": "0.5", **described}},
            }
        }
    found = {name: json.dumps(content).encode() for name, content in files.items()}
    for level, plane in enumerate((pixels, halved(pixels))):
        found |= {f"{level}/{name}": content for name, content in zarr_level(plane, version).items()}
    return found


def zarr_level(pixels: np.ndarray, version: int) -> Mapping[str, bytes]:
    height, width, channels = pixels.shape
    places = [(y, x) for y in range(height // SIDE) for x in range(width // SIDE)]
    if version == 2:
        array = {
            "zarr_format": 2,
            "shape": [1, channels, 1, height, width],
            "chunks": [1, 1, 1, SIDE, SIDE],
            "dtype": "|u1",
        }
        array |= {
            "compressor": {"id": "blosc", "cname": "lz4"},
            "filters": None,
            "order": "C",
            "fill_value": 0,
            "dimension_separator": "/",
        }
        chunks = {
            f"0/{c}/0/{y}/{x}": blosc(tile[..., c].tobytes())
            for (y, x), tile in zip(places, tiles(pixels), strict=True)
            for c in range(channels)
        }
        return {".zarray": json.dumps(array).encode(), **chunks}
    grid = {"name": "regular", "configuration": {"chunk_shape": [channels, SIDE, SIDE]}}
    array = {"zarr_format": 3, "node_type": "array", "shape": [channels, height, width], "data_type": "uint8"}
    array |= {
        "chunk_grid": grid,
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    }
    array |= {"fill_value": 0, "codecs": [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 3}}]}
    chunks = {
        f"c/0/{y}/{x}": zstd(tile.transpose(2, 0, 1).tobytes())
        for (y, x), tile in zip(places, tiles(pixels), strict=True)
    }
    return {"zarr.json": json.dumps(array).encode(), **chunks}


OPENSLIDE = openslide_server.READER
TIFF_TILES = "tiff_tiles"


@dataclass(frozen=True)
class Format:
    """How a slide of a format is written; largest difference of its pixels from those given, 0 where nothing
    is lost; the corner of the pixels at level 0; and what reads it."""

    write: Callable[[Path, np.ndarray], Path]
    tolerance: int = 0
    corner_px: int = 0
    reader: str = OPENSLIDE


FORMATS = {
    "SVS, JPEG": Format(svs(JPEG), 3, reader=TIFF_TILES),
    "SVS, JPEG 2000": Format(svs(JPEG_2000), reader=TIFF_TILES),
    "tiled TIFF, deflate": Format(generic(DEFLATE), reader=TIFF_TILES),
    "tiled TIFF, LZW": Format(generic(LZW, t317=[2]), reader=TIFF_TILES),
    "tiled TIFF, uncompressed": Format(generic(RAW), reader=TIFF_TILES),
    "BigTIFF": Format(big, 3, reader=TIFF_TILES),
    "OME-TIFF, SubIFDs": Format(ome_nested, reader=TIFF_TILES),
    "OME-TIFF, planes": Format(ome_planar, reader=TIFF_TILES),
    "Trestle": Format(trestle, 3),
    "Leica SCN": Format(scn, 3, SCN_MARGIN_PX),
    "Philips TIFF": Format(philips, 3),
    "NDPI": Format(ndpi, 3),
    "BIF": Format(bif, 3),
    "MRXS": Format(mirax, 3),
    "DICOM": Format(dicom),
    "OME-Zarr 0.4": Format(zarr(2), reader="zarr"),
    "OME-Zarr 0.5": Format(zarr(3), reader="zarr"),
}
