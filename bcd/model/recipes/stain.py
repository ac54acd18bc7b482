"""Stain: varied in training (jitter), or made that of the training images in every image (normalisation).

Both are linear maps of each image's colours in a logarithmic space, computed for a whole batch on its device.
Images are (n, 3, height, width) RGB from 0 to 255.

Our own code: of the libraries, torchstain and tiatoolbox normalise one image at a time, and give no numbers
for one without tissue; torch-staintools is licensed for non-commercial use.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bcd.errors import DataError
from bcd.imaging.image import FILL
from bcd.model.recipes.reference import Macenko, Reinhard

# Optical density of haematoxylin, eosin and DAB, as in `bcd.imaging.appearance`: Ruifrok and Johnston 2001.
HED = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
# RGB to the responses of the cones, and their logarithms to l, alpha and beta: Reinhard et al. 2001, "Color
# Transfer between Images", equations 4 and 6.
CONES = torch.tensor([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
LAB = torch.tensor([[1.0, 1, 1], [1, 1, -2], [1, -1, 0]]) / torch.tensor([[3.0], [6], [2]]).sqrt()
# Of a stained pixel the optical density in the colour where it is largest. Macenko et al. require 0.15 in
# each, which drops eosin, because it leaves red nearly as it is; and the hue of paler pixels is noise.
LEAST_DENSITY = 0.3
# Of Macenko et al. 2009: extreme angles and largest amounts of stain are those of these shares of the pixels.
EXTREME, MOST = 0.01, 0.99
# An image with a smaller share of stained pixels, or whose stains are as good as parallel (the sine of their
# angle), stays as it is.
LEAST_STAINED, LEAST_SINE = 0.01, 0.02
# Images that are fitted at a time, to bound memory. Stains are measured on every second pixel of every second
# row, because sorting is what takes longest.
CHUNK, STEP = 16, 2


def _density(images: Tensor) -> Tensor:
    """Optical density (n, 3, pixels), 0 for white: Beer and Lambert."""
    return -((images.flatten(2).float() + 1) / 256).log()


def _from_density(density: Tensor, like: Tensor) -> Tensor:
    return (256 * density.neg().exp() - 1).clamp(0, 255).view(like.shape)


def draw_amounts(n: int, strength: float) -> Tensor:
    """Factors (n, 3) of the amounts of haematoxylin, eosin and the rest, from torch's generator."""
    return torch.empty(n, 3).uniform_(1 - strength, 1 + strength)


def jitter(images: Tensor, amounts: Tensor) -> Tensor:
    """Multiply the amounts of the stains in float32 images by factors (n, 3): Tellez et al. 2018,
    "Whole-Slide Mitosis Detection in H&E Breast Histology". Without their offsets, which would colour
    glass."""
    unit = (HED / HED.norm(dim=1, keepdim=True)).T.to(images.device)
    change = unit @ torch.diag_embed(amounts.to(images.device)) @ torch.linalg.inv(unit)
    return _from_density(change @ _density(images), images)


class _Stained(NamedTuple):
    """Which pixels (n, pixels) are stained, their number (n,), and in which images (n,) there are enough."""

    weight: Tensor
    n: Tensor
    is_enough: Tensor


def _stained(images: Tensor, density: Tensor) -> _Stained:
    """Of pixels that are neither glass nor the frame that `image.fit` puts around an image."""
    fill = torch.tensor(FILL, device=images.device).view(1, 3, 1)
    is_stained = (density.amax(1) >= LEAST_DENSITY) & (images.flatten(2) != fill).any(1)
    n = is_stained.sum(1)
    enough = n >= max(2, math.ceil(LEAST_STAINED * density.shape[2]))
    return _Stained(is_stained.float(), n.clamp(min=2), enough)


def _moments(values: Tensor, stained: _Stained) -> tuple[Tensor, Tensor]:
    """Mean (n, 3) and covariance (n, 3, 3) over stained pixels, in float64."""
    weight, n = stained.weight[:, None].double(), stained.n[:, None]
    mean = (values * weight).sum(2) / n
    apart = (values - mean[..., None]) * weight
    return mean, apart @ apart.mT / (n[..., None] - 1)


def _quantile(values: Tensor, share: float, stained: _Stained) -> Tensor:
    """Quantiles (n,) of values (n, pixels) over stained pixels; linear between neighbours."""
    ordered = values.masked_fill(stained.weight == 0, torch.inf).sort(1).values
    place = share * (stained.n - 1).float()
    low, high = (ordered.gather(1, at.long()[:, None])[:, 0] for at in (place.floor(), place.ceil()))
    # Of an image without stained pixels: infinite, and not used.
    return torch.where(low == high, low, low + (place - place.floor()) * (high - low))


def _macenko_of(images: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, 8): directions of haematoxylin and eosin, their largest amounts; and which images have them.

    Macenko et al. 2009, "A method for normalizing histology slides for quantitative analysis": the extreme
    directions in the plane of most variance.
    """
    density = _density(images)
    stained = _stained(images, density)
    _, covariance = _moments(density, stained)
    plane = torch.linalg.eigh(covariance).eigenvectors[..., [2, 1]].float()
    # Of two opposite directions the one in which density grows.
    plane = plane * torch.where(plane.sum(1, keepdim=True) < 0, -1.0, 1.0)
    across, up = (plane.mT @ density).unbind(1)
    angle = torch.atan2(up, across)
    extremes = torch.stack([_quantile(angle, share, stained) for share in (EXTREME, 1 - EXTREME)], 1)
    extremes = extremes.nan_to_num(0, 0, 0)
    found = plane @ torch.stack([extremes.cos(), extremes.sin()], 1)
    # Haematoxylin absorbs more red.
    first_is_h = (found[:, 0, 0] > found[:, 0, 1])[:, None, None]
    direction = torch.where(first_is_h, found, found.flip(2)).mT
    sine = torch.linalg.cross(direction[:, 0], direction[:, 1]).norm(dim=1)
    is_apart = stained.is_enough & (sine > LEAST_SINE)
    direction = torch.where(is_apart[:, None, None], direction, HED[:2].to(images.device))
    amounts = (torch.linalg.pinv(direction.mT) @ density).unbind(1)
    amount = torch.stack([_quantile(one, MOST, stained) for one in amounts], 1)
    is_known = is_apart & (amount > 0).all(1) & amount.isfinite().all(1)
    return torch.cat([direction.flatten(1), amount], 1), is_known


def _reinhard_of(images: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, 6): mean and spread of the colours; and which images have enough stained pixels."""
    stained = _stained(images, _density(images))
    mean, covariance = _moments(_lab(images), stained)
    spread = covariance.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-3)
    return torch.cat([mean, spread], 1).float(), stained.is_enough


def _lab(images: Tensor) -> Tensor:
    """Colours (n, 3, pixels) in the space l-alpha-beta, of natural logarithms."""
    light = (images.flatten(2).float() + 1) / 256
    return LAB.to(images.device) @ (CONES.to(images.device) @ light).log()


def transform(images: Tensor, reference: Macenko | Reinhard | None) -> Tensor:
    """Normalise the stain of uint8 images to the reference, as float32; without one they are returned as
    they are.

    What an image becomes does not depend on others in the batch. The frame around an image, and an image
    with too little stain to measure, keep their colours.
    """
    if reference is None:
        return images
    own, is_known = measure_stains(images, reference.method)
    change = _as_macenko if isinstance(reference, Macenko) else _as_reinhard
    wanted = torch.tensor(_numbers(reference), device=images.device)
    is_frame = (images == torch.tensor(FILL, device=images.device).view(1, 3, 1, 1)).all(1, keepdim=True)
    return torch.where(is_known[:, None, None, None] & ~is_frame, change(images, own, wanted), images.float())


def _as_macenko(images: Tensor, own: Tensor, wanted: Tensor) -> Tensor:
    factors = wanted[6:] / own[:, 6:].clamp(min=1e-6)
    direction, other = own[:, :6].view(-1, 2, 3).mT, wanted[:6].view(2, 3).T
    change = other @ torch.diag_embed(factors) @ torch.linalg.pinv(direction)
    return _from_density(change @ _density(images), images)


def _as_reinhard(images: Tensor, own: Tensor, wanted: Tensor) -> Tensor:
    mean, spread = own[..., None].split(3, 1)
    moved = (_lab(images) - mean) * (wanted[3:, None] / spread) + wanted[:3, None]
    lab, cones = LAB.to(images.device), CONES.to(images.device)
    light = torch.linalg.inv(cones) @ (torch.linalg.inv(lab) @ moved).exp()
    # Its own colours for glass, which would be tinted, and of pale pixels in part.
    share = (_density(images).amax(1, keepdim=True) / LEAST_DENSITY).clamp(max=1)
    return images.flatten(2).float().lerp((256 * light - 1).clamp(0, 255), share).view(images.shape)


def measure_stains(images: Tensor, method: str) -> tuple[Tensor, Tensor]:
    """A row of the numbers of a method for each of the uint8 images, and which images (n,) have them."""
    sampled = images[..., ::STEP, ::STEP]
    return _macenko_of(sampled) if method == "macenko" else _reinhard_of(sampled)


def _numbers(reference: Macenko | Reinhard) -> list[float]:
    """The reference as a row of `measure_stains`."""
    if isinstance(reference, Macenko):
        return [*reference.hematoxylin, *reference.eosin, *reference.density]
    return [*reference.mean, *reference.spread]


def fit_reference(images: Tensor, method: str) -> Macenko | Reinhard:
    """The reference of a method, `macenko` or `reinhard`: the median over the uint8 images that have enough
    stain. Raises DataError if none has."""
    found = [measure_stains(chunk, method) for chunk in images.split(CHUNK)]
    rows = torch.cat([row[is_known] for row, is_known in found])
    if not len(rows):
        raise DataError(
            f"--stain-normalisation {method}: none of {len(images):,} training images has stained tissue to "
            "measure a stain on; check the images, or train without it"
        )
    median, n = rows.double().quantile(0.5, 0), len(rows)
    if method == "reinhard":
        return Reinhard(n_images=n, mean=tuple(median[:3].tolist()), spread=tuple(median[3:].tolist()))
    first, second = (part / part.norm() for part in (median[:3], median[3:6]))
    return Macenko(
        n_images=n,
        hematoxylin=tuple(first.tolist()),
        eosin=tuple(second.tolist()),
        density=tuple(median[6:].tolist()),
    )
