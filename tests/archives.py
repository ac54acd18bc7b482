"""A small archive with what people's archives have: good pictures, odd ones, broken ones, slides."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from bcd import schema
from bcd.lease import Lease
from tests import pictures

CUTS = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98, 0.999)


def claimed(output: str) -> Lease:
    """The lease of an output, as a job has it."""
    lease = Lease(output)
    lease.claim()
    return lease


def fields(n: int, height: int = 92, width: int = 140) -> dict[str, bytes]:
    """`n` good PNGs, each its own picture."""
    rng = np.random.default_rng(0)
    base = pictures.gradient(height, width).astype(int)
    drawn = (np.clip(base + rng.integers(-40, 40, base.shape), 0, 255).astype(np.uint8) for _ in range(n))
    return {f"case-{i % 7}/field-{i:04d}.png": pictures.encode(picture) for i, picture in enumerate(drawn)}


def odd() -> dict[str, bytes]:
    """Pictures that are unusual and have to be scored."""
    field = Image.fromarray(pictures.gradient(92, 140))
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = (np.asarray(field.convert("L")).astype(np.uint16) * 257).astype(np.uint16)
    return {
        "odd/16 bit.png": pictures.encode(Image.fromarray(deep)),
        "odd/grey.png": pictures.encode(field.convert("L")),
        "odd/bilevel.png": pictures.encode(field.convert("1")),
        "odd/palette.png": pictures.encode(field.convert("P")),
        "odd/alpha.png": pictures.encode(field.convert("RGBA")),
        "odd/grey alpha.png": pictures.encode(field.convert("LA")),
        "odd/cmyk.jpg": pictures.encode(field.convert("CMYK"), "JPEG"),
        "odd/cmyk.tif": pictures.encode(field.convert("CMYK"), "TIFF"),
        "odd/rotated.jpg": pictures.encode(field, "JPEG", exif=exif),
        "odd/UPPER CASE.PNG": pictures.encode(field),
        "odd/really a jpeg.png": pictures.encode(field, "JPEG"),
    }


def broken() -> dict[str, tuple[bytes, str]]:
    """Name -> (bytes, typed error) of inputs that cannot be scored."""
    whole = {kind: pictures.encode(pictures.gradient(200, 300), kind) for kind in ("PNG", "JPEG")}
    planted = {
        f"bad/{kind} cut at {cut}.{kind.lower()}": (content[: int(cut * len(content))], "truncated")
        for kind, content in whole.items()
        for cut in CUTS
    }
    planted |= {f"bad/{name}.png": found for name, found in pictures.broken().items()}
    several = {"save_all": True, "append_images": [Image.fromarray(pictures.gradient(92, 140)[::-1].copy())]}
    for name, kind in (("animated.png", "PNG"), ("pages.tiff", "TIFF")):
        content = pictures.encode(pictures.gradient(92, 140), kind, **several)
        planted[f"bad/{name}"] = (content, "unsupported_format")
    planted["bad/text.svs"] = (b"no slide at all", "unreadable")
    planted["bad/empty.ndpi"] = (b"", "unreadable")
    return planted


def half_a_slide(real_data: Path) -> bytes:
    """A slide cut in the middle."""
    content = (real_data / "slides/CMU-1-Small-Region.svs").read_bytes()
    return content[: len(content) // 2]


def write_manifest(path: Path, uris: list[str], n: int) -> None:
    """A manifest of n rows: the pictures over and over, each row with its own id."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([schema.IMAGE_ID, schema.URI])
        writer.writerows((f"{i:08d}", uris[i % len(uris)]) for i in range(n))
