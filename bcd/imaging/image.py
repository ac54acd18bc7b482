"""From bytes to pixels to the size of the network's input.

The same `decode` and `fit` serve training, archives and the service, so that all see the same pixels. No
torch in here: a process that only reads images starts in a second and stays small.
"""

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from bcd.errors import BcdError, ImageError
from bcd.imaging import container, tiff
from bcd.imaging.container import MAX_PIXELS as MAX_PIXELS

# What Pillow may open, by content and not by name: fewer parsers, less to attack.
FORMATS = ("PNG", "JPEG", "TIFF")
# Goes up whenever `decode` or `fit` gives other pixels for some file. 2: colour profiles, 16 bits exactly.
DECODER_VERSION: Literal[2] = 2
# A file is in memory as a whole: 64 million pixels of 8-bit RGB, uncompressed, have 192 MB.
MAX_FILE_BYTES = 2**28
# ImageNet statistics, RGB in [0, 1]: the input that torchvision's weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Space that a field leaves in the network's input is filled with the mean colour, zero after normalising:
# what the convolutions' own zero padding looks like.
FILL = tuple(round(255 * value) for value in IMAGENET_MEAN)

# Code of a picture that storage did not give, and may give later. No finished table holds it.
UNAVAILABLE = "unavailable"

# Pillow's names of 16-bit samples of which it keeps the high byte; read in the other byte order, the low one.
DEEP = re.compile(r"(RGB|RGBX|RGBA|CMYK);16([BLN])")
OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
# A bright-field image reaches a quarter of its scale. Cameras of 10, 12 and 14 bits whose values were stored
# in 16 bits as they came do not.
LEAST_BRIGHTEST = 2**14
# EXIF's orientation -> what turns the image upright.
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
# A profile that changes no colour of a grid by more than this is sRGB, whatever it is called.
SRGB_TOLERANCE = 1


@contextmanager
def boundary(code: str, action: str) -> Iterator[None]:
    """Turn whatever a foreign decoder raises for one image into an `ImageError`.

    Decoders of files from anywhere may raise anything: besides their own errors OverflowError,
    RecursionError, MemoryError and more. One image must end neither a job nor a service.

    Args:
        code: of the error.
        action: what cannot be done, for the message: "the image cannot be decoded".
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
        # Too little memory is no damage: what a decoder asks for may follow from nonsense in a header.
        found = "unreadable" if isinstance(error, MemoryError | RecursionError) else code
        raise ImageError(found, f"{action}: {str(error) or type(error).__name__}") from error


def decode(data: bytes) -> np.ndarray:
    """Decode a PNG, JPEG or TIFF as its own metadata specify, or say why not.

    Grey, CMYK, Lab and palette images are converted, 16 bits become 8; other colour profiles than sRGB are
    converted to sRGB (relative colorimetric, black point compensated); transparency is laid over white; a
    camera's note on orientation (EXIF) is followed; of the pages of a TIFF the one that is no smaller copy
    counts. CMYK without a profile is converted by subtraction.

    Returns:
        uint8 array (height, width, 3), RGB.

    Raises:
        ImageError: with code `empty`, `too_large`, `unsupported_format`, `too_many_pixels`, `truncated` or
            `unreadable`.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    if len(data) > MAX_FILE_BYTES:
        raise ImageError("too_large", f"{len(data):,} bytes; at most {MAX_FILE_BYTES:,} are read")
    with boundary("truncated", "the image cannot be decoded"):
        if container.PNG.startswith(data[:8]):
            return _finished(*_png(data))
        if container.JPEG.startswith(data[:3]):
            return _finished(*_jpeg(data))
        if data[:4] in tiff.STARTS:
            return _finished(*_tiff(data))
    raise ImageError("unsupported_format", f"not a {', '.join(FORMATS)} picture")


Decoded = tuple[Image.Image, bytes | None]


def _png(data: bytes) -> Decoded:
    content = container.png_content(data)
    return _upright(_eight_bits(content.data, "PNG"), content), content.profile


def _jpeg(data: bytes) -> Decoded:
    content = container.jpeg(data)
    return _upright(_load(content.data, "JPEG")[0], content), content.profile


def _tiff(data: bytes) -> Decoded:
    """Pillow turns it upright itself."""
    pages = tiff.pages(io.BytesIO(data), len(data))
    chosen = tiff.composite(pages) or [tiff.main_page(pages)]
    try:
        channels = [_tiff_page(data, page, len(pages)) for page in chosen]
    except UnidentifiedImageError:
        raise ImageError(
            "unsupported_format", f"a TIFF of {tiff.describe_samples(chosen[0])} is not read"
        ) from None
    profile = channels[0].info.get("icc_profile")
    return (Image.merge("RGB", channels) if len(channels) > 1 else channels[0]), profile


def _tiff_page(data: bytes, page: tiff.Page, n_pages: int) -> Image.Image:
    tiff.require_read(page, n_pages)
    is_inverted = page.bits > 8 and page.one(tiff.PHOTOMETRIC) == tiff.WHITE_IS_ZERO
    return _eight_bits(data, "TIFF", page.number, tiff.significant_bits(page), is_inverted)


def _load(data: bytes, kind: str, number: int = 0, swapped: bool = False) -> tuple[Image.Image, str]:
    """A page and Pillow's name of its samples; with those of 16 bits in the other byte order if asked for."""
    picture = Image.open(io.BytesIO(data), formats=(kind,))
    if number:
        picture.seek(number)
    container.require_size(*picture.size)
    # Arguments are a name, or begin with it; each tile of a file has its own.
    given = [tile.args or "" for tile in picture.tile]
    named = [(one,) if isinstance(one, str) else one for one in given]
    if swapped:
        other = [(name[:-1] + OTHER_ORDER[name[-1]], *rest) for name, *rest in named]
        picture.tile = [tile._replace(args=args) for tile, args in zip(picture.tile, other, strict=True)]
    picture.load()
    return picture, str(named[0][0])


def _eight_bits(
    data: bytes, kind: str, number: int = 0, bits: int | None = None, is_inverted: bool = False
) -> Image.Image:
    """A page with samples of 8 bits; of more than 8, `bits` are in use, where that is known."""
    picture, raw = _load(data, kind, number)
    if picture.mode.startswith("I;16"):
        deep = np.asarray(picture)[..., None]
    elif DEEP.fullmatch(raw):
        low = np.asarray(_load(data, kind, number, swapped=True)[0])
        deep = np.asarray(picture).astype(np.uint16) << 8 | low
    elif ";16" in raw:  # grey with alpha, or alpha that is multiplied in: the high bytes will do
        _largest(np.asarray(picture)[..., :3].astype(np.uint16) << 8, bits)
        return picture
    else:
        return picture
    colors = deep[..., : 4 if picture.mode == "CMYK" else 3]
    table = (np.arange(2**16) * (255 / _largest(colors, bits))).round().clip(0, 255).astype(np.uint8)
    return _with_mask(table[::-1][deep] if is_inverted else table[deep], deep, picture)


def _largest(deep: np.ndarray, bits: int | None) -> int:
    """What full intensity is in these samples of at most 16 bits."""
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


def _with_mask(pixels: np.ndarray, deep: np.ndarray, picture: Image.Image) -> Image.Image:
    """An image of 8-bit samples (h, w, channels); the one deep colour that PNG calls transparent is."""
    size = picture.size
    mode = "L" if pixels.shape[-1] == 1 else picture.mode
    result = Image.frombytes(mode, size, pixels.tobytes())
    result.info = {key: value for key, value in picture.info.items() if key == "icc_profile"}
    if (color := picture.info.get("transparency")) is not None:
        is_seen = (deep != np.array(color, np.uint16)).any(-1)
        result.putalpha(Image.fromarray(is_seen.astype(np.uint8) * 255))
    return result


def _upright(picture: Image.Image, content: container.Content) -> Image.Image:
    """By its EXIF data, else by its XMP; broken ones say nothing."""
    orientation = tiff.orientation(content.exif)
    if not orientation and (found := XMP_ORIENTATION.search(content.xmp)):
        orientation = int(found[1])
    return picture.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else picture


def _finished(picture: Image.Image, profile: bytes | None) -> np.ndarray:
    if picture.mode in ("La", "RGBa"):
        picture = picture.convert(picture.mode.upper())
    if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        colors = to_srgb(picture.convert("RGB"), profile)
        colors.putalpha(picture.getchannel("A"))
        white = Image.new("RGBA", picture.size, "white")
        return np.asarray(Image.alpha_composite(white, colors).convert("RGB"))
    return np.asarray(to_srgb(picture, profile))


def to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert an image from its ICC profile, None for sRGB, to mode RGB in sRGB.

    Raises:
        ImageError: `unsupported_format` where the profile is damaged or of other pixels.
    """
    if picture.mode == "LAB":
        return _converted(picture, _from_lab())
    if picture.mode not in ("L", "CMYK"):
        picture = picture.convert("RGB")
    if profile is None:
        return picture.convert("RGB")
    transform, mode = _transform(profile)
    if picture.mode == "L" and mode == "RGB":
        picture = picture.convert("RGB")
    if picture.mode != mode:
        raise ImageError(
            "unsupported_format", f"its colour profile is of {mode}, its pixels are {picture.mode}"
        )
    return picture if transform is None else _converted(picture, transform)


@lru_cache(maxsize=1)
def _from_lab() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
    )


@lru_cache(maxsize=4)
def _transform(profile: bytes) -> tuple[ImageCms.ImageCmsTransform | None, str]:
    """What converts pixels of a profile to sRGB, None where that changes nothing, and their mode."""
    if len(profile) > container.MAX_PROFILE_BYTES:
        raise ImageError("unsupported_format", f"a colour profile of {len(profile):,} bytes; save as sRGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = SPACES.get(source.profile.xcolor_space.strip())
        if mode is None:
            raise ImageError(
                "unsupported_format", f"a colour profile of {source.profile.xcolor_space}; save as sRGB"
            )
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError) as error:
        raise ImageError(
            "unsupported_format", f"its colour profile cannot be used: {error}; save as sRGB"
        ) from None
    return (None if mode == "RGB" and _changes_nothing(transform) else transform), mode


def _converted(picture: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(picture, transform)
    assert converted is not None  # it is None only where the picture is changed in place
    return converted


def _changes_nothing(transform: ImageCms.ImageCmsTransform) -> bool:
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(9, 81, 3)
    found = np.asarray(_converted(Image.fromarray(grid), transform))
    return bool(np.abs(found.astype(int) - grid).max() <= SRGB_TOLERANCE)


def fit(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a picture into the network's input, whole and with its aspect ratio kept.

    Args:
        pixels: uint8 (h, w, 3) RGB.
        height: of the result in pixels.
        width: of the result in pixels.

    Returns:
        uint8 (height, width, 3), the picture in the middle.
    """
    top, left, inner_height, inner_width = placement(pixels.shape[0], pixels.shape[1], height, width)
    resized = Image.fromarray(pixels).resize((inner_width, inner_height), Image.Resampling.BILINEAR)
    result = np.empty((height, width, 3), np.uint8)
    result[:] = FILL
    result[top : top + inner_height, left : left + inner_width] = np.asarray(resized)
    return result


def shrink(pixels: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """A picture for people: uint8 (h, w, 3) within a size, aspect ratio kept, never enlarged."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((width_px, height_px), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 (h, w, 3) RGB as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def placement(height: int, width: int, into_height: int, into_width: int) -> tuple[int, int, int, int]:
    """Where `fit` puts a picture: top, left, height and width in pixels of the input."""
    scale = min(into_height / height, into_width / width)
    inner_height = max(1, min(into_height, round(height * scale)))
    inner_width = max(1, min(into_width, round(width * scale)))
    return (into_height - inner_height) // 2, (into_width - inner_width) // 2, inner_height, inner_width
