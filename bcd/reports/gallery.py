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
import pandas as pd
from markupsafe import Markup

from bcd.imaging import image
from bcd.reports import overlay, plots, style, thumbnails
from bcd.reports.thumbnails import Example

# The groups of examples, in the order of the page, and what each shows.
GROUPS = {
    "most certainly malignant": "The highest probabilities of malignancy of the archive.",
    "most certainly benign": "The lowest probabilities of malignancy of the archive.",
    "least certain": "The pictures nearest to the threshold: a second look is worth most here.",
    "unlike the training data": "The pictures furthest from those of the training: what the model says of "
    "them may mean nothing. They stand in no other group.",
}
MALIGNANT, BENIGN, UNCERTAIN_GROUP, UNLIKE = GROUPS
# So many of a slide and of a patient, at most, stand in a group.
PER_OWNER = 2
# So many images have a row in the table of the page.
MAX_ROWS = 2_000
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
class GallerySlide:
    """One whole slide: its heat map as an encoded picture, and where its tiles lie beside the page.

    `n_warned` tiles are unlike the training data; `error` is the code of a slide that was not scored.
    """

    name: str
    n_tiles: int
    tissue_mm2: float | None
    share_malignant: float | None
    heat_map: bytes | None = None
    geojson: str | None = None
    n_warned: int = 0
    patient: str | None = None
    link: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class GalleryRow:
    """One image in the table of the page; what is not known is None, and `warned` is of a novelty."""

    name: str
    link: str | None = None
    patient: str | None = None
    predicted_class: str | None = None
    probability_malignant: float | None = None
    novelty: float | None = None
    warned: bool = False
    error: str | None = None


@dataclass(frozen=True)
class Images:
    """The table of the images: its rows, and of how many images they are the first."""

    rows: Sequence[GalleryRow] = ()
    total: int = 0


def choose_groups(
    probabilities: np.ndarray,
    threshold: float,
    count: int = PER_GROUP,
    novelty: np.ndarray | None = None,
    unlike: np.ndarray | None = None,
    owners: Sequence[np.ndarray] = (),
) -> dict[str, list[int]]:
    """Which pictures to show in each of `GROUPS`; none stands in two of them.

    Args:
        probabilities: float (n,) of malignancy.
        threshold: from which a picture is called malignant.
        count: most pictures in a group.
        novelty: float (n,), how unlike the training data; needed with `unlike`.
        unlike: bool (n,), pictures that are warned of.
        owners: object (n,) each, such as slides and patients, None where unknown: at most `PER_OWNER`
            pictures of each stand in a group.

    Returns:
        Positions in `probabilities` by group, the clearest case of each group first.
    """
    strange = np.zeros(len(probabilities), bool) if unlike is None else unlike
    usual = np.flatnonzero(~strange)
    count_usual = min(count, -(-len(usual) // 3))
    rising = usual[np.argsort(probabilities[usual], kind="stable")]
    called = probabilities[rising] >= threshold
    malignant = _spread(rising[called][::-1], owners)[:count_usual]
    benign = _spread(rising[~called], owners)[:count_usual]
    rest = rising[~np.isin(rising, np.concatenate([malignant, benign]))]
    nearest = rest[np.argsort(np.abs(probabilities[rest] - threshold), kind="stable")]
    found = {MALIGNANT: malignant, BENIGN: benign, UNCERTAIN_GROUP: _spread(nearest, owners)[:count_usual]}
    furthest = np.flatnonzero(strange)
    if novelty is not None:
        furthest = furthest[np.argsort(-novelty[furthest], kind="stable")]
    found[UNLIKE] = _spread(furthest, owners)[:count]
    return {group: places.tolist() for group, places in found.items()}


def _spread(places: np.ndarray, owners: Sequence[np.ndarray]) -> np.ndarray:
    """The same places in their order, without those beyond the first `PER_OWNER` of an owner."""
    for owner in owners:
        names = pd.Series(owner[places], dtype=object)
        nth = names.groupby(names, dropna=False).cumcount()
        places = places[(names.isna() | (nth < PER_OWNER)).to_numpy()]
    return places


def render_gallery(
    facts: Mapping[str, Any],
    probabilities: np.ndarray,
    examples: Mapping[str, Sequence[Example]],
    errors: Mapping[str, Failures],
    slides: Sequence[GallerySlide],
    input_size_px: tuple[int, int] | None = None,
    images: Images = Images(),
) -> str:
    """The page as HTML; it shows nothing from outside itself, and links to the files and the GeoJSON.

    Args:
        facts: what is known about the run. `threshold` is needed; optional are title, input, output, model,
            model_id, precision, cam, cam_layer, target (as on the card), seconds, rows_per_s, synthetic,
            leaky, bcd_version, and the counts n_inputs, n_images, n_slides, n_tiles, n_errors,
            n_ignored_files, and `warnings`: results by code, None where the model cannot tell.
        probabilities: float (n,) of malignancy, of every result.
        examples: by group (`choose_groups`), in the order of the page, at most `PER_GROUP` of each.
        errors: by typed code.
        slides: the first `MAX_SLIDES` that have a heat map are shown with it, all stand in the table.
        input_size_px: height and width of the network's input, which the evidence covers; by default it
            covers each picture alone.
        images: the table of the images that are no slides.
    """
    shown = {group: list(found[:PER_GROUP]) for group, found in examples.items() if found}
    limit = _limit(shown, facts.get("cam"))
    return (
        style.templates()
        .get_template("gallery.html")
        .render(
            facts=defaultdict(lambda: None, facts),
            marks=[mark for mark in ("synthetic", "leaky") if facts.get(mark)],
            called=_called(probabilities, facts["threshold"]),
            histogram=_histogram(probabilities, facts) if len(probabilities) else None,
            uncertain=UNCERTAIN,
            descriptions=GROUPS,
            examples={
                group: [thumbnails.draw_example(one, limit, input_size_px) for one in found]
                for group, found in shown.items()
            },
            limit=limit,
            legend=thumbnails.data_uri(overlay.legend(), "PNG"),
            errors=dict(sorted(errors.items(), key=lambda item: -item[1].count)),
            images=images,
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
    with matplotlib.rc_context(plots.STYLE):
        figure = plots.plot_probabilities(probabilities, facts["threshold"])
        plots.mark(figure, ["synthetic data"] if facts.get("synthetic") else [])
        return plots.inline(plots.svg(figure), "probabilities")


def _heat_maps(slides: Sequence[GallerySlide]) -> list[str | None]:
    """Data URIs of the first heat maps."""
    left, found = MAX_SLIDES, list[str | None]()
    for slide in slides:
        drawn = slide.heat_map is not None and left > 0
        left -= drawn
        found.append(_heat_map(slide.heat_map) if drawn and slide.heat_map else None)
    return found


def _heat_map(content: bytes) -> str:
    return thumbnails.data_uri(
        image.shrink(image.decode(content), 2 * MAX_SLIDE_WIDTH_PX, MAX_SLIDE_WIDTH_PX)
    )
