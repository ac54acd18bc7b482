"""From bytes to pixels to the size of the network's input.

Training, archives and the service use the same `decode` and `fit`, so that all see the same pixels. Without
torch, a process that only reads images starts in a second and stays small.
"""

import io
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import kornia_rs
import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from bcd.errors import BcdError, ImageError
from bcd.imaging import container, tiff
from bcd.imaging.container import MAX_PIXELS as MAX_PIXELS

# Formats that Pillow may open, by content and not by name: fewer parsers, less to attack.
FORMATS = ("PNG", "JPEG", "TIFF")
# Incremented when `decode` or `fit` changes the pixels of any file. 2: colour profiles, 16 bits exactly.
DECODER_VERSION: Literal[2] = 2
# A file is read whole: 64 million pixels of 8-bit RGB, uncompressed, have 192 MB.
MAX_FILE_BYTES = 2**28
# 0.05 s for the fast decoder, in which no other thread of the process does anything.
PLAIN_PIXELS = 4_000_000
# ImageNet statistics, RGB in [0, 1]: the input that torchvision's weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Colour of the margin around a field in the network's input: the mean, which is zero after normalising, like
# the zero padding of the convolutions.
FILL = tuple(round(255 * value) for value in IMAGENET_MEAN)

# Code of a transient error of storage. No finished table contains it.
UNAVAILABLE = "unavailable"

# Pillow's names of 16-bit samples of which it keeps the high byte; in the other byte order, the low one.
DEEP = re.compile(r"(RGB|RGBX|RGBA|CMYK);16([BLN])")
OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
# A bright-field image reaches a quarter of its scale. Values of 10, 12 and 14-bit cameras, stored unscaled in
# 16 bits, do not.
LEAST_BRIGHTEST = 2**14
# EXIF's orientation -> the transposition that turns the image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
# Colour space of a profile -> mode of the pixels that it describes.
SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
# A profile that changes no colour of a grid by more than this counts as sRGB.
SRGB_TOLERANCE = 1


@contextmanager
def boundary(code: str, action: str) -> Iterator[None]:
    """Convert any exception of a foreign decoder into an `ImageError` with a code and the failed action.

    For a damaged file, decoders may raise anything: besides their own errors OverflowError, RecursionError,
    MemoryError and more. One image must end neither a job nor a service.
    """
    try:
        yield
    except (ImageError, BcdError):
        raise
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from None
    except UnidentifiedImageError:
        raise ImageError(code, f"{action}: its header is damaged") from None
    except Exception as error:
        # A lack of memory is no proof of damage: a header's nonsense may have asked for it.
        found = "unreadable" if isinstance(error, MemoryError | RecursionError) else code
        raise ImageError(found, f"{action}: {str(error) or type(error).__name__}") from error


def decode(data: bytes) -> np.ndarray:
    """Decode a PNG, JPEG or TIFF, following its metadata, to uint8 (height, width, 3) RGB.

    Grey, CMYK, Lab and palette images are converted, 16 bits become 8; colour profiles other than sRGB are
    converted to sRGB (relative colorimetric, black point compensated); transparency is blended over white;
    the orientation of EXIF is applied; of the pages of a TIFF, the one that is no smaller copy is decoded.
    CMYK without a profile is converted by subtraction.

    Raises:
        ImageError: with code `empty`, `too_large`, `unsupported_format`, `too_many_pixels`, `truncated` or
            `unreadable`.
    """
    _require_size(data)
    with boundary("truncated", "the image cannot be decoded"):
        if container.PNG.startswith(data[:8]):
            return _png(data)
        if container.JPEG.startswith(data[:3]):
            content = container.jpeg(data)
            return _framed(_eight_bits(content.data, "JPEG"), content)
        if data[:4] in tiff.STARTS:
            return _tiff(data)
    raise ImageError("unsupported_format", f"not a {', '.join(FORMATS)} image")


def decode_plain(data: bytes) -> np.ndarray | None:
    """`decode` for PNGs of 8-bit RGB without transparency, profile or metadata, of at most `PLAIN_PIXELS`, in
    less than half of the time; None for any other image. Every parser of it is memory-safe."""
    _require_size(data)
    if not container.PNG.startswith(data[:8]):
        return None
    with boundary("truncated", "the image cannot be decoded"):
        content = _unchecked(data)
    if content.has_metadata or math.prod(content.rgb8_size or ()) > PLAIN_PIXELS:
        return None
    return _decode_fast(content)


def _require_size(data: bytes) -> None:
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if len(data) > MAX_FILE_BYTES:
        raise ImageError("too_large", f"{len(data):,} bytes; at most {MAX_FILE_BYTES:,} are read")


def _png(data: bytes) -> np.ndarray:
    content = _unchecked(data)
    pixels = _decode_fast(content)
    if pixels is None:
        content = container.png_content(data)
        return _framed(_eight_bits(content.data, "PNG"), content)
    return _framed(Image.fromarray(pixels), content) if content.has_metadata else pixels


def _framed(image: Image.Image, content: container.Content) -> np.ndarray:
    return _finished(_upright(image, content), content.profile)


def _unchecked(data: bytes) -> container.Content:
    """The content of a PNG for `_decode_fast`, which checks the checksums of the pixels itself."""
    return container.png_content(data, trusted=b"IDAT")


def _decode_fast(content: container.Content) -> np.ndarray | None:
    """Pillow's pixels of a plain PNG in less than half of its time; None for any other image, and for one
    that Pillow has to judge. Threads do not share the work: the decoder holds the interpreter."""
    if content.rgb8_size is None:
        return None
    try:
        with boundary("truncated", "the fast decoder"):
            return kornia_rs.io.decode_image_png_u8(content.data, content.rgb8_size, "rgb")
    except ImageError:
        return None


def _tiff(data: bytes) -> np.ndarray:
    """Decode a TIFF, which Pillow turns upright itself."""
    file = io.BytesIO(data)
    pages = tiff.pages(file, len(data))
    chosen = tiff.composite(pages) or [tiff.main_page(pages)]
    for page in chosen:
        tiff.require_read(page, len(pages))
        tiff.require_whole_parts(file, page)
    try:
        channels = [_tiff_page(data, page) for page in chosen]
    except UnidentifiedImageError:
        message = f"a TIFF of {tiff.describe_samples(chosen[0])} is not supported"
        raise ImageError("unsupported_format", message) from None
    merged = Image.merge("RGB", channels) if len(channels) > 1 else channels[0]
    return _finished(merged, channels[0].info.get("icc_profile"))


def _tiff_page(data: bytes, page: tiff.Page) -> Image.Image:
    is_inverted = page.bits > 8 and page.one(tiff.PHOTOMETRIC) == tiff.WHITE_IS_ZERO
    return _eight_bits(data, "TIFF", page.number, tiff.significant_bits(page), is_inverted)


def _load(data: bytes, kind: str, number: int = 0, swapped: bool = False) -> tuple[Image.Image, str]:
    """A page and Pillow's name of its samples, those of 16 bits in the other byte order if `swapped`."""
    image = Image.open(io.BytesIO(data), formats=(kind,))
    if number:
        image.seek(number)
    container.require_size(*image.size)
    # The arguments of each tile are a name, or begin with it.
    given = [tile.args or "" for tile in image.tile]
    named = [(one,) if isinstance(one, str) else one for one in given]
    if swapped:
        other = [(name[:-1] + OTHER_ORDER[name[-1]], *rest) for name, *rest in named]
        image.tile = [tile._replace(args=args) for tile, args in zip(image.tile, other, strict=True)]
    image.load()
    return image, str(named[0][0])


def _eight_bits(
    data: bytes, kind: str, number: int = 0, bits: int | None = None, is_inverted: bool = False
) -> Image.Image:
    """A page with samples of 8 bits; `bits` of a deeper sample are in use, where that is known."""
    image, raw = _load(data, kind, number)
    if image.mode.startswith("I;16"):
        deep = np.asarray(image)[..., None]
    elif DEEP.fullmatch(raw):
        low = np.asarray(_load(data, kind, number, swapped=True)[0])
        deep = np.asarray(image).astype(np.uint16) << 8 | low
    elif ";16" in raw:  # grey with alpha, or premultiplied alpha: the high bytes suffice
        _largest(np.asarray(image)[..., :3].astype(np.uint16) << 8, bits)
        return image
    else:
        return image
    colors = deep[..., : 4 if image.mode == "CMYK" else 3]
    table = (np.arange(2**16) * (255 / _largest(colors, bits))).round().clip(0, 255).astype(np.uint8)
    return _with_mask(table[::-1][deep] if is_inverted else table[deep], deep, image)


def _largest(deep: np.ndarray, bits: int | None) -> int:
    """Full intensity of these samples of at most 16 bits."""
    brightest = int(deep.max())
    if bits is None and 0 < brightest < LEAST_BRIGHTEST:
        raise ImageError(
            "unsupported_format",
            f"its brightest sample is {brightest:,} of 65,535, so fewer than 16 bits are in use, and it does "
            "not say how many; scale it to 8 or 16 bits",
        )
    if bits is not None and brightest >= 2**bits:
        raise ImageError("unsupported_format", f"it claims {bits} bits and has the value {brightest:,}")
    return 2 ** (bits or 16) - 1


def _with_mask(pixels: np.ndarray, deep: np.ndarray, image: Image.Image) -> Image.Image:
    """An image of 8-bit samples (h, w, channels), transparent where PNG says so of one deep colour."""
    mode = "L" if pixels.shape[-1] == 1 else image.mode
    result = Image.frombytes(mode, image.size, pixels.tobytes())
    result.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    if (color := image.info.get("transparency")) is not None:
        is_seen = (deep != np.array(color, np.uint16)).any(-1)
        result.putalpha(Image.fromarray(is_seen.astype(np.uint8) * 255))
    return result


def _upright(image: Image.Image, content: container.Content) -> Image.Image:
    """Turn an image upright by its EXIF data, else by its XMP; damaged metadata is ignored."""
    orientation = tiff.orientation(content.exif)
    if not orientation and (found := XMP_ORIENTATION.search(content.xmp)):
        orientation = int(found[1])
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


def _finished(image: Image.Image, profile: bytes | None) -> np.ndarray:
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        colors = to_srgb(image.convert("RGB"), profile)
        colors.putalpha(image.getchannel("A"))
        white = Image.new("RGBA", image.size, "white")
        return np.asarray(Image.alpha_composite(white, colors).convert("RGB"))
    return np.asarray(to_srgb(image, profile))


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image from its ICC profile, None for sRGB, to mode RGB in sRGB. Raises ImageError
    `unsupported_format` where the profile is damaged or describes other pixels."""
    if image.mode == "LAB":
        return _converted(image, _from_lab())
    if image.mode not in ("L", "CMYK"):
        image = image.convert("RGB")
    if profile is None:
        return image.convert("RGB")
    transform, mode = _transform(profile)
    if image.mode == "L" and mode == "RGB":
        image = image.convert("RGB")
    if image.mode != mode:
        message = f"its colour profile is of {mode}, its pixels are {image.mode}"
        raise ImageError("unsupported_format", message)
    return image if transform is None else _converted(image, transform)


@lru_cache(maxsize=1)
def _from_lab() -> ImageCms.ImageCmsTransform:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")


@lru_cache(maxsize=4)
def _transform(profile: bytes) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """The transformation of a profile's pixels to sRGB, None where it changes nothing, and their mode."""
    if len(profile) > container.MAX_PROFILE_BYTES:
        raise ImageError("unsupported_format", f"a colour profile of {len(profile):,} bytes; save as sRGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space
        if (mode := SPACES.get(space.strip())) is None:
            raise ImageError("unsupported_format", f"a colour profile of {space}; save as sRGB")
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError) as error:
        message = f"its colour profile cannot be used: {error}; save as sRGB"
        raise ImageError("unsupported_format", message) from None
    return (None if mode == "RGB" and _changes_nothing(transform) else transform), mode


def _converted(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # None only where the image is changed in place
    return converted


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(9, 81, 3)
    found = np.asarray(_converted(Image.fromarray(grid), transform))
    return bool(np.abs(found.astype(int) - grid).max() <= SRGB_TOLERANCE)


def fit(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fit uint8 (h, w, 3) RGB into the network's input, (height, width, 3): whole, centred, aspect kept."""
    top, left, inner_height, inner_width = placement(pixels.shape[0], pixels.shape[1], height, width)
    resized = Image.fromarray(pixels).resize((inner_width, inner_height), Image.Resampling.BILINEAR)
    result = np.empty((height, width, 3), np.uint8)
    bottom, right = top + inner_height, left + inner_width
    # The margins alone: the image covers the rest.
    result[:top] = result[bottom:] = FILL
    result[top:bottom, :left] = result[top:bottom, right:] = FILL
    result[top:bottom, left:right] = np.asarray(resized)
    return result


def shrink(pixels: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Shrink uint8 (h, w, 3) to within a size; the aspect ratio is kept, and nothing is enlarged."""
    image = Image.fromarray(pixels)
    image.thumbnail((width_px, height_px), Image.Resampling.LANCZOS)
    return np.asarray(image)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 (h, w, 3) RGB as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def placement(height: int, width: int, into_height: int, into_width: int) -> tuple[int, int, int, int]:
    """Where `fit` puts an image: top, left, height and width in pixels of the input."""
    scale = min(into_height / height, into_width / width)
    inner_height = max(1, min(into_height, round(height * scale)))
    inner_width = max(1, min(into_width, round(width * scale)))
    return (into_height - inner_height) // 2, (into_width - inner_width) // 2, inner_height, inner_width
