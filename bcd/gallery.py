"""A scored archive as one page that a person opens in a browser: pictures, maps, slides, and what failed.

The page is self-contained, needs no server, and stays small: it shows a few pictures, however long the
archive is. What it shows is collected by the pipeline; all pictures share one stated colour scale, which is
that of the report and of the service.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup

from bcd import example, figures, image, overlay
from bcd.example import Example

# The groups of examples, in the order of the page, and what each shows.
GROUPS = {
    "most certainly malignant": "The highest probabilities of malignancy of the archive.",
    "most certainly benign": "The lowest probabilities of malignancy of the archive.",
    "least certain": "The pictures nearest to the threshold: a second look is worth most here.",
}
PER_GROUP = 8
MAX_SLIDES = 24
MAX_SLIDE_WIDTH_PX = 840
# Probabilities in between count as uncertain in the text below the histogram.
UNCERTAIN = (0.1, 0.9)


@dataclass(frozen=True)
class Failures:
    """Inputs that failed in the same way: how many, and the first few with their messages."""

    count: int
    first: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Slide:
    """One whole slide: its heat map as an encoded picture, and where its tiles lie beside the page."""

    name: str
    n_tiles: int
    tissue_mm2: float | None
    share_malignant: float | None
    heat_map: bytes | None = None
    geojson: str | None = None


def choose(probabilities: np.ndarray, threshold: float, count: int = PER_GROUP) -> dict[str, list[int]]:
    """Which pictures to show in each of `GROUPS`; none stands in two of them.

    Args:
        probabilities: float (n,) of malignancy.
        threshold: from which a picture is called malignant.
        count: most pictures in a group.

    Returns:
        Positions in `probabilities` by group, the clearest case of each group first.
    """
    count = min(count, -(-len(probabilities) // len(GROUPS)))
    rising = np.argsort(probabilities, kind="stable")
    split = int(np.searchsorted(probabilities[rising], threshold))
    benign, malignant = rising[: min(count, split)], rising[::-1][: min(count, len(rising) - split)]
    rest = rising[len(benign) : len(rising) - len(malignant)]
    nearest = rest[np.argsort(np.abs(probabilities[rest] - threshold), kind="stable")][:count]
    return dict(zip(GROUPS, (malignant.tolist(), benign.tolist(), nearest.tolist()), strict=True))


def page(
    facts: Mapping[str, Any],
    probabilities: np.ndarray,
    examples: Mapping[str, Sequence[Example]],
    errors: Mapping[str, Failures],
    slides: Sequence[Slide],
    input_size_px: tuple[int, int] | None = None,
) -> str:
    """The page as HTML; it refers to nothing outside itself but the GeoJSON of the slides.

    Args:
        facts: what is known about the run. `threshold` is needed; optional are title, input, output, model,
            model_id, precision, cam, cam_layer, target (as on the card), seconds, rows_per_s, synthetic,
            leaky, bcd_version, and the counts n_inputs, n_images, n_slides, n_tiles, n_errors,
            n_ignored_files.
        probabilities: float (n,) of malignancy, of every result.
        examples: by group, in the order of the page; see `choose`. At most `PER_GROUP` of each are shown.
        errors: by typed code.
        slides: the first `MAX_SLIDES` that have a heat map are shown with it, all stand in the table.
        input_size_px: height and width of the network's input, which the evidence covers; by default it
            covers each picture alone.
    """
    shown = {group: list(found[:PER_GROUP]) for group, found in examples.items() if found}
    limit = _limit(shown, facts.get("cam"))
    return (
        example.templates()
        .get_template("gallery.html")
        .render(
            facts=defaultdict(lambda: None, facts),
            marks=[mark for mark in ("synthetic", "leaky") if facts.get(mark)],
            called=_called(probabilities, facts["threshold"]),
            histogram=_histogram(probabilities, facts) if len(probabilities) else None,
            uncertain=UNCERTAIN,
            descriptions=GROUPS,
            examples={
                group: [example.draw(one, limit, input_size_px) for one in found]
                for group, found in shown.items()
            },
            limit=limit,
            legend=example.data_uri(overlay.legend(), "PNG"),
            errors=dict(sorted(errors.items(), key=lambda item: -item[1].count)),
            slides=[(slide, picture) for slide, picture in zip(slides, _heat_maps(slides), strict=True)],
        )
    )


def _limit(shown: Mapping[str, Sequence[Example]], method: str | None) -> float:
    """Log-odds per cell at full colour; maps of other methods have no unit, and so a scale of this page."""
    if method in (None, "evidence"):
        return overlay.LIMIT
    return overlay.scale(one.evidence for found in shown.values() for one in found)


def _called(probabilities: np.ndarray, threshold: float) -> dict[str, int]:
    low, high = UNCERTAIN
    return {
        "n": len(probabilities),
        "malignant": int((probabilities >= threshold).sum()),
        "uncertain": int(((probabilities > low) & (probabilities < high)).sum()),
    }


def _histogram(probabilities: np.ndarray, facts: Mapping[str, Any]) -> Markup:
    with matplotlib.rc_context(figures.STYLE):
        figure = figures.probabilities(probabilities, facts["threshold"])
        figures.mark(figure, ["synthetic data"] if facts.get("synthetic") else [])
        return figures.inline(figures.svg(figure), "probabilities")


def _heat_maps(slides: Sequence[Slide]) -> list[str | None]:
    """Data URIs of the first heat maps."""
    left, found = MAX_SLIDES, list[str | None]()
    for slide in slides:
        drawn = slide.heat_map is not None and left > 0
        left -= drawn
        found.append(_heat_map(slide.heat_map) if drawn and slide.heat_map else None)
    return found


def _heat_map(content: bytes) -> str:
    return example.data_uri(image.shrink(image.decode(content), 2 * MAX_SLIDE_WIDTH_PX, MAX_SLIDE_WIDTH_PX))
