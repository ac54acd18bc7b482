"""What the pages about models and archives share: their templates, and a picture with its evidence."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from bcd import image, overlay, palette, text

MAX_WIDTH_PX = 420
JPEG_QUALITY = 82


def templates() -> jinja2.Environment:
    """The templates of the pages; they know the `palette`, and `3 | counted("patient")`."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("bcd"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    found.globals["palette"] = Markup(palette.css())
    found.filters["counted"] = text.counted
    return found


@dataclass(frozen=True)
class Example:
    """One picture: pixels uint8 (H, W, 3), evidence float (h, w) over the network's input.

    Where the picture itself cannot be shown, `missing` says why: the pixels are grey, and no map is drawn.
    `warnings` are codes, and `link` leads to the file.
    """

    image_id: str
    probability_malignant: float
    predicted_class: str
    log_odds: float
    pixels: np.ndarray
    evidence: np.ndarray
    missing: str | None = None
    novelty: float | None = None
    novelty_cutoff: float | None = None
    warnings: Sequence[str] = ()
    link: str | None = None


def draw(
    example: Example, limit: float, input_size_px: tuple[int, int] | None, max_width_px: int = MAX_WIDTH_PX
) -> dict[str, Any]:
    """The example with its two pictures as data URIs, drawn at the size in which they are shown.

    Args:
        example: to draw.
        limit: log-odds per cell at full colour; stated beside the picture.
        input_size_px: height and width of the network's input, which the evidence covers; by default it
            covers the picture alone.
        max_width_px: of each picture.
    """
    pixels = image.shrink(example.pixels, 2 * max_width_px, max_width_px)
    drawn = overlay.overlay(pixels, example.evidence, limit, *(input_size_px or (None, None)))
    return {"example": example, "picture": data_uri(pixels), "overlay": data_uri(drawn), "limit": limit}


def data_uri(pixels: np.ndarray, kind: str = "JPEG") -> str:
    """A picture, uint8 (H, W, 3), for the inside of a page."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=JPEG_QUALITY)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
