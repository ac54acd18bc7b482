"""The appearance of an image in a few numbers: perceptual hash, stain, fraction of tissue.

All of them are measured on the image shrunk to at most `SIDE_PX`, so that a large one costs no more memory.
"""

import math
from typing import Any

import imagehash
import numpy as np
from PIL import Image

from bcd import schema
from bcd.imaging import image

SIDE_PX = 256
# 16 x 16 coefficients of the cosine transform, one bit each. On 190 real H&E fields, different images differ
# in 98 bits or more; a copy saved as JPEG, brightened by a tenth or halved differs in 20 or fewer, one moved
# by 1 % of its width in 34, by 2 % in 54. With the usual 64 bits, different images differ in as few as 16 and
# copies in up to 12.
HASH_SIDE = 16
HASH_BITS = HASH_SIDE**2
# Optical density of haematoxylin and of eosin in red, green and blue: Ruifrok and Johnston 2001,
# "Quantification of histochemical staining by color deconvolution", Anal Quant Cytol Histol 23(4).
STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
STAIN_COLUMNS = (schema.STAIN[:2], schema.STAIN[2:])
# A median deviation below this optical density is camera noise.
LEAST_DEVIATION = 0.005
# 8-bit value -> optical density, -log10(I / 255); black counts as 1.
_DENSITY = -np.log10(np.maximum(np.arange(256), 1) / 255).astype(np.float32)
# Tissue has texture and glass has none: a square of this side is tissue where its grey values (0 to 255) have
# at least this standard deviation. Saturation, which finds tissue on thumbnails, misses half of a pale field.
_SQUARE_PX, _TEXTURE = 8, 4.0


def hashed(pixels: np.ndarray) -> dict[str, Any]:
    """`phash` and `tissue_fraction` of an image, as in `measure_appearance`, in three fifths of its time."""
    small = image.shrink(pixels, SIDE_PX, SIDE_PX)
    return _hashed(small, _is_tissue(_squares(small)))


def _hashed(small: np.ndarray, is_tissue: np.ndarray) -> dict[str, Any]:
    return {
        schema.PHASH: str(imagehash.phash(Image.fromarray(small), hash_size=HASH_SIDE)),
        schema.TISSUE_FRACTION: float(is_tissue.mean()) if is_tissue.size else 0.0,
    }


def _is_tissue(squares: np.ndarray) -> np.ndarray:
    return squares.mean(-1).std(-1) >= _TEXTURE


def measure_appearance(pixels: np.ndarray) -> dict[str, Any]:
    """Size, perceptual hash, stain and tissue of uint8 (h, w, 3) RGB, by column of `schema.AUDIT`.

    `phash` has `HASH_BITS` bits in hexadecimal. Mean and standard deviation of the optical density of each
    stain are measured over the tissue, and are absent where there is none.
    """
    small = image.shrink(pixels, SIDE_PX, SIDE_PX)
    squares = _squares(small)
    is_tissue = _is_tissue(squares)
    described = {schema.HEIGHT_PX: pixels.shape[0], schema.WIDTH_PX: pixels.shape[1]}
    described |= _hashed(small, is_tissue)
    if is_tissue.any():
        described |= dict(zip(schema.STAIN, _stain_of(squares[is_tissue]), strict=True))
    return described


def measure_stain(pixels: np.ndarray) -> list[float]:
    """The columns `schema.STAIN` of uint8 (h, w, 3) RGB, as in `measure_appearance`; NaN without tissue.

    An image larger than `SIDE_PX` is not shrunk: of its rows and columns, so many are left out.
    """
    step = -(-max(pixels.shape[:2]) // SIDE_PX)
    squares = _squares(pixels[::step, ::step])
    is_tissue = _is_tissue(squares)
    return _stain_of(squares[is_tissue]) if is_tissue.any() else [math.nan] * len(schema.STAIN)


def _stain_of(tissue: np.ndarray) -> list[float]:
    """Mean and standard deviation of the optical density of each stain in uint8 (n, pixels, 3)."""
    densities = stain_density(tissue).reshape(-1, len(STAINS))
    return [float(value) for density in densities.T for value in (density.mean(), density.std())]


def _squares(pixels: np.ndarray) -> np.ndarray:
    """uint8 (n, pixels, 3): the whole squares of an image, row by row."""
    side, (rows, columns) = _SQUARE_PX, (size // _SQUARE_PX for size in pixels.shape[:2])
    whole = pixels[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
    return whole.swapaxes(1, 2).reshape(rows * columns, side * side, 3)


def stain_density(pixels: np.ndarray) -> np.ndarray:
    """Optical density (..., 2) of haematoxylin and of eosin in uint8 (..., 3) RGB.

    The remainder, at right angles to both stains, is dropped.
    """
    unit = STAINS / np.linalg.norm(STAINS, axis=1, keepdims=True)
    rest = np.cross(*unit)
    basis = np.stack([*unit, rest / np.linalg.norm(rest)])
    return (_DENSITY[pixels] @ np.linalg.inv(basis))[..., :2]


def robust_z(values: np.ndarray) -> np.ndarray:
    """Modified z-score of optical densities (n,), from the median absolute deviation; NaN stays NaN.

    Iglewicz and Hoaglin 1993, "How to Detect and Handle Outliers".
    """
    from_median = values - np.nanmedian(values)
    return 0.6745 * from_median / max(np.nanmedian(np.abs(from_median)), LEAST_DEVIATION)
