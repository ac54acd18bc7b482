"""Does any damaged file do anything but give pixels or a typed error?

    python -m benchmarks.fuzz_images --n 50000 --seed 0 --slides FOLDER

Small PNG, JPEG and TIFF images and slides, made by code and, of slides, found in FOLDER, are damaged: bytes
changed, cut off, cut out or put in from another file; chunks, segments and tags edited so that checksums
hold. Each goes through `bcd.imaging.image.decode` or `bcd.slides.slide`, in a process that may have
`MEMORY_BYTES`. Printed are outcomes by kind, the most memory, lines that libraries wrote to stderr, and
the seed of every case that raised anything else, took longer than `LIMIT_S` or ended the process. A case is
made again from its seed: `--n 1 --seed SEED`.
"""

import argparse
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from bcd.imaging import image
from bcd.slides import pixel_size, slide
from tests import pictures

KINDS = ("PNG", "JPEG", "TIFF", "SVS")
MEMORY_BYTES, LIMIT_S = 4 * 2**30, 60
# Numbers at which sizes, counts and addresses go wrong.
EDGES = (0, 1, 2, 3, 7, 8, 16, 255, 256, 2**15, 2**16 - 1, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
Draw = np.random.Generator


@cache
def bases(kind: str, slides: str) -> list[bytes]:
    """Whole files of a kind."""
    pixels = pictures.gradient()
    picture, exif = Image.fromarray(pixels), Image.Exif()
    exif[274] = 6
    modes = ("L", "RGB", "P", "RGBA", "LA", "1")
    if kind == "PNG":
        deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        found = [pictures.encode(picture.convert(mode)) for mode in modes]
        return [*found, pictures.encode(deep), pictures.encode(picture, exif=exif, icc_profile=_profile())]
    if kind == "JPEG":
        found = [pictures.encode(picture.convert(mode), "JPEG") for mode in ("L", "RGB", "CMYK")]
        more = {"progressive": True, "exif": exif, "icc_profile": _profile()}
        return [
            *found,
            pictures.encode(picture, "JPEG", **more),
            pictures.encode(picture, "JPEG", restart_marker_rows=1),
        ]
    if kind == "TIFF":
        packed = ("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits", "zstd", "lzma")
        found = [pictures.encode(picture, "TIFF", compression=name) for name in packed]
        found += [pictures.encode(picture.convert(mode), "TIFF") for mode in (*modes, "CMYK", "LAB", "YCbCr")]
        deep = pixels.astype(np.uint16) * 257
        pages = [pictures.tiff_page(deep), pictures.tiff_page(pixels[::2, ::2].copy(), t254=[1])]
        return [
            *found,
            pictures.tiff(*pages),
            pictures.tiff(pictures.tiff_page(deep.astype(">u2")), order=">"),
        ]
    found = [pictures.tiled_tiff(pictures.gradient(150, 200), 0.5)]
    if slides:
        whole = [path.read_bytes() for path in sorted(Path(slides).iterdir())]
        # A large one takes as long as hundreds of small ones.
        found += [one for one in whole if len(one) < 2**16] * 20 + [one for one in whole if len(one) >= 2**16]
    return found


def _profile() -> bytes:
    from PIL import ImageCms

    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def case(seed: int, slides: str) -> tuple[str, bytes]:
    """The damaged file of a seed, and its kind."""
    draw = np.random.default_rng(seed)
    kind = KINDS[seed % len(KINDS)]
    files = bases(kind, slides)
    content = bytearray(files[draw.integers(len(files))])
    edit = {"PNG": _edit_chunk, "JPEG": _edit_segment, "TIFF": _edit_tag, "SVS": _edit_tag}[kind]
    ways: list[Callable[[bytearray, Draw], None]] = [_flip, _cut, _remove, _zero, edit, edit, edit]
    for _ in range(draw.integers(1, 4)):
        way = ways[draw.integers(len(ways))]
        way(content, draw)
        if draw.random() < 0.1:
            other = files[draw.integers(len(files))]
            start, place = draw.integers(len(other)), draw.integers(len(content) + 1)
            content[place:place] = other[start : start + draw.integers(1, 400)]
    if kind == "PNG" and draw.random() < 0.5:
        _mend(content)
    return kind, bytes(content)


def _flip(content: bytearray, draw: Draw) -> None:
    for place in draw.integers(len(content), size=draw.integers(1, 9)) if content else ():
        content[place] = draw.integers(256)


def _cut(content: bytearray, draw: Draw) -> None:
    del content[draw.integers(len(content) + 1) :]


def _remove(content: bytearray, draw: Draw) -> None:
    start = draw.integers(len(content) + 1)
    del content[start : start + draw.integers(1, 100)]


def _zero(content: bytearray, draw: Draw) -> None:
    start = draw.integers(len(content) + 1)
    n = min(len(content) - start, draw.integers(1, 100))
    content[start : start + n] = bytes(n)


def _chunks(content: bytearray) -> list[tuple[int, int]]:
    """Place and length of each whole chunk of a PNG."""
    found, place = [], 8
    while place + 12 <= len(content):
        length = struct.unpack_from(">I", content, place)[0]
        if place + 12 + length <= len(content):
            found.append((place, length))
        place += 12 + length
    return found


def _edit_chunk(content: bytearray, draw: Draw) -> None:
    """Change bytes of a chunk of a PNG and set its checksum right."""
    chunks = [(place, length) for place, length in _chunks(content) if length]
    if chunks:
        place, length = chunks[draw.integers(len(chunks))]
        for _ in range(draw.integers(1, 4)):
            content[place + 8 + draw.integers(length)] = draw.integers(256)
        _mend(content)


def _mend(content: bytearray) -> None:
    """Set all checksums of a PNG right."""
    for place, length in _chunks(content):
        end = place + 8 + length
        struct.pack_into(">I", content, end, zlib.crc32(content[place + 4 : end]))


def _edit_segment(content: bytearray, draw: Draw) -> None:
    """Change a byte after a marker of a JPEG: its length, or what follows."""
    places = [i for i in range(len(content) - 8) if content[i] == 0xFF and content[i + 1] >= 0xC0]
    if places:
        content[places[draw.integers(len(places))] + draw.integers(1, 8)] = draw.integers(256)


def _edit_tag(content: bytearray, draw: Draw) -> None:
    """Change one field of one tag of the first or second page of a TIFF."""
    order = ">" if content[:2] == b"MM" else "<"
    start = struct.unpack_from(order + "I", content, 4)[0] if len(content) >= 8 else len(content)
    if start + 2 > len(content):
        return
    n = struct.unpack_from(order + "H", content, start)[0]
    entry = start + 2 + 12 * draw.integers(max(1, n))
    if entry + 12 > len(content):
        return
    value = EDGES[draw.integers(len(EDGES))] if draw.random() < 0.7 else int(draw.integers(2**32))
    field = draw.integers(4)
    if field == 0:
        struct.pack_into(order + "H", content, entry, int(draw.integers(254, 350)))
    elif field == 1:
        struct.pack_into(order + "H", content, entry + 2, int(draw.integers(20)))
    else:
        struct.pack_into(order + "I", content, entry + 4 * field - 4, value)


def outcome(kind: str, content: bytes, folder: Path) -> str:
    """`image`, or the code of the error."""
    try:
        if kind != "SVS":
            image.decode(content)
            return "image"
        path = folder / "s.tif"
        path.write_bytes(content)
        slide.is_slide(path)
        with slide.open_slide(path, pixel_size.Given(fallback=0.5)) as opened:
            opened.read(0, 0, 0, 100, 100)
            opened.thumbnail(256)
        return "image"
    except image.ImageError as error:
        return error.code


def child(first: int, last: int, slides: str) -> None:
    """Print `seed kind outcome` of each case, before it with outcome `begun`."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, last):
            kind, content = case(seed, slides)
            print(seed, kind, "begun", flush=True)
            signal.alarm(LIMIT_S)  # ends the process
            try:
                found = outcome(kind, content, Path(folder))
            except Exception as error:  # noqa: BLE001  what raises is what is looked for
                found = f"RAISED:{type(error).__name__}"
            signal.alarm(0)
            print(seed, kind, found, flush=True)
    print("memory", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slides", default="")
    parser.add_argument("--child", action="store_true")
    asked = parser.parse_args()
    if asked.child:
        child(asked.seed, asked.seed + asked.n, asked.slides)
        return
    counts, faults, memory_mib, noise = Counter[tuple[str, str]](), list[str](), 0, Counter[str]()
    seed, last = asked.seed, asked.seed + asked.n
    while seed < last:
        command = [sys.executable, "-m", "benchmarks.fuzz_images", "--child", "--seed", str(seed)]
        command += ["--n", str(min(5_000, last - seed)), "--slides", asked.slides]
        ran = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        noise.update(line.strip()[:60] for line in ran.stderr.splitlines())
        kind = "?"
        for line in ran.stdout.splitlines():
            first, *rest = line.split()
            if first == "memory":
                memory_mib = max(memory_mib, int(rest[0]))
                continue
            seed, (kind, found) = int(first), rest
            if found != "begun":
                counts[kind, found] += 1
            if found.startswith("RAISED"):
                faults.append(f"{seed} {kind} {found}")
        if ran.returncode:
            counts[kind, "ENDED"] += 1
            faults.append(f"{seed} {kind} the process ended with {ran.returncode}")
        seed += 1
        print(f"{seed - asked.seed:,} of {asked.n:,}", file=sys.stderr, flush=True)
    for (kind, found), count in sorted(counts.items()):
        print(f"{kind:5} {found:22} {count:7,}")
    print(f"most memory {memory_mib:,} MiB; {noise.total():,} lines on stderr: {noise.most_common(8)}")
    print("faults:", *faults or ["none"], sep="\n  ")


if __name__ == "__main__":
    main()
