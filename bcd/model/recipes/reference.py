"""The stain that images are normalised to, as numbers in the card; without torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Triple = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]


class _Reference(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    n_images: int = Field(ge=1)
    """Training images that it is the median of."""


class Macenko(_Reference):
    """Reference of Macenko's method: two stains, and how much of each there is."""

    method: Literal["macenko"] = "macenko"
    hematoxylin: Triple
    """Optical density of haematoxylin in red, green and blue, of length 1."""
    eosin: Triple
    """Optical density of eosin, likewise."""
    density: tuple[Positive, Positive]
    """Amounts of both that 99 % of the stained pixels do not exceed, in natural logarithms."""


class Reinhard(_Reference):
    """Reference of Reinhard's method: the colours of stained pixels in the space l-alpha-beta."""

    method: Literal["reinhard"] = "reinhard"
    mean: Triple
    spread: tuple[Positive, Positive, Positive]
    """Standard deviations."""


StainReference = Annotated[Macenko | Reinhard, Field(discriminator="method")]
