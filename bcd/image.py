"""From bytes to pixels to the size of the network's input.

The same `decode` and `fit` serve training, archives and the service, so that all see the same pixels. No
torch in here: a process that only reads images starts in a second and stays small.
"""

import io
from struct import error as struct_error

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# What Pillow may open, by content and not by name: fewer parsers, less to attack.
FORMATS = ("PNG", "JPEG", "TIFF")
# A field of view has well under a megapixel; a larger picture belongs to the slide reader.
MAX_PIXELS = 64_000_000
# First bytes of a format -> what begins its pixels, and what ends the file: PNG's IDAT and IEND chunks (with
# its checksum), JPEG's SOS and EOI markers.
ENDS = {b"\x89PNG\r\n\x1a\n": (b"IDAT", b"IEND\xaeB`\x82"), b"\xff\xd8\xff": (b"\xff\xda", b"\xff\xd9")}
# ImageNet statistics, RGB in [0, 1]: the input that torchvision's weights expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# Space that a field leaves in the network's input is filled with the mean colour, zero after normalising:
# what the convolutions' own zero padding looks like.
FILL = tuple(round(255 * value) for value in IMAGENET_MEAN)

# Code of a picture that storage did not give, and may give later. No finished table holds it.
UNAVAILABLE = "unavailable"


class ImageError(Exception):
    """One picture that cannot be used: `code` is stable and typed, the message is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code, self.message = code, message


def decode(data: bytes) -> np.ndarray:
    """Decode a PNG, JPEG or TIFF.

    Grey, CMYK and palette pictures are converted, 16 bits become 8; transparency is laid over white; a
    camera's note on orientation (EXIF) is followed; of several frames or pages the first one counts.

    Returns:
        uint8 array (height, width, 3), RGB.

    Raises:
        ImageError: with code `empty`, `unsupported_format`, `too_many_pixels` or `truncated`.
    """
    if not data:
        raise ImageError("empty", "the file has no bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check_size(picture)
            _check_end(data)
            return np.asarray(_to_rgb(ImageOps.exif_transpose(picture)))
    except UnidentifiedImageError:
        if data.startswith(tuple(ENDS)):
            raise ImageError("truncated", "the file ends within its header") from None
        raise ImageError("unsupported_format", f"not a {', '.join(FORMATS)} picture") from None
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from None
    # Pillow's decoders report damage in all of these ways.
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct_error) as error:
        raise ImageError("truncated", f"the picture cannot be decoded: {error}") from error


def _check_size(picture: Image.Image) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ImageError("too_many_pixels", f"{width} x {height} px; at most {MAX_PIXELS:,} pixels are read")


def _check_end(data: bytes) -> None:
    """Pillow forgives a missing end where the pixels before it fill the picture; we do not."""
    for start, (body, end) in ENDS.items():
        if data.startswith(start) and data.rfind(end) < data.rfind(body):
            raise ImageError("truncated", "the file has no end")


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16 bits a channel, grey; in 32 bits, what lies beyond is white
        grey = (np.asarray(picture).astype(np.float64) / 257).round().clip(0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ImageError("unsupported_format", "floating-point pixels have no fixed scale; save as 8 bit")
    if "A" in picture.mode or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


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


def png(pixels: np.ndarray) -> bytes:
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
