"""The page of a scored archive: example images with evidence maps, slides, tables, and what failed.

The page is self-contained, requires no server, and stays small, however large the archive is. All its images
share one stated colour scale, which is that of the report and of the service.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup

from bcd.imaging import decoder, image
from bcd.reports import overlay, plots, style, thumbnails
from bcd.reports.thumbnails import Example

# The groups of examples and their descriptions, in the order of the page.
GROUPS = {
    "most certainly malignant": "The highest probabilities of malignancy of the archive.",
    "most certainly benign": "The lowest probabilities of malignancy of the archive.",
    "least certain": "The images closest to the threshold, where a second look is worth most.",
    "unlike the training data": "The images furthest from the training data: the model's output for them may "
    "mean nothing. They are in no other group.",
}
MALIGNANT, BENIGN, UNCERTAIN_GROUP, UNLIKE = GROUPS
# Most images of one slide or patient in a group.
PER_OWNER = 2
# Most rows in the table of images.
MAX_ROWS = 2_000
PER_GROUP = 8
MAX_SLIDES = 24
MAX_SLIDE_WIDTH_PX = 840
# Probabilities in between count as uncertain in the text beside the histogram.
UNCERTAIN = (0.1, 0.9)
MARKS = {"synthetic": "synthetic data", "leaky": "leaky model"}


@dataclass(frozen=True)
class Failures:
    """Inputs with the same error code: how many, and names and messages of the first few."""

    count: int
    first: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class GallerySlide:
    """One whole slide: its heat map and the slide with outlines of tissue and regions as encoded images, and
    the paths of its tiles and tissue as GeoJSON.

    `n_warned` tiles are unlike the training data (None: not known), `n_errors` have an error; `top` is the
    mean probability of the `n_top` highest. `error` is the code of a slide that was not scored.
    """

    name: str
    n_tiles: int
    tissue_mm2: float | None
    share_malignant: float | None
    heat_map: bytes | None = None
    geojson: str | None = None
    n_warned: int | None = 0
    patient: str | None = None
    link: str | None = None
    error: str | None = None
    outlined: bytes | None = None
    tissue_geojson: str | None = None
    n_outside: int = 0
    n_top: int = 0
    top: float | None = None
    top_interval: Sequence[float] | None = None
    n_errors: int = 0


@dataclass(frozen=True)
class GalleryRow:
    """One image in the table of the page; unknown values are None, and `warned` is of its novelty."""

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
    """The table of images: its rows, which are the first of `total` images."""

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
    """Choose the images of each of `GROUPS`; every image is in at most one.

    Args:
        probabilities: float (n,) of malignancy.
        threshold: probability from which an image is called malignant.
        count: most images in a group.
        novelty: float (n,); required with `unlike`.
        unlike: bool (n,), images unlike the training data.
        owners: object (n,) each, such as slides and patients, None where unknown: a group has at most
            `PER_OWNER` images of each.

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
    furthest = np.flatnonzero(strange)
    if novelty is not None:
        furthest = furthest[np.argsort(-novelty[furthest], kind="stable")]
    return {
        MALIGNANT: malignant.tolist(),
        BENIGN: benign.tolist(),
        UNCERTAIN_GROUP: _spread(nearest, owners)[:count_usual].tolist(),
        UNLIKE: _spread(furthest, owners)[:count].tolist(),
    }


def _spread(places: np.ndarray, owners: Sequence[np.ndarray]) -> np.ndarray:
    """Drop the places beyond the first `PER_OWNER` of each owner."""
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
    """The page as HTML; it loads nothing, and links to the files and the GeoJSON.

    Args:
        facts: about the run. `threshold` is required; optional are title, input, output, model, model_id,
            precision, cam, cam_layer, target (as on the card), seconds, rows_per_s, synthetic, leaky,
            bcd_version, stain_drift, the counts n_inputs, n_images, n_slides, n_tiles, n_errors,
            n_ignored_files, and `warnings`: by code, None where the model has no statistics for them.
        probabilities: float (n,) of malignancy, of every result.
        examples: by group (`choose_groups`), in the order of the page, at most `PER_GROUP` of each.
        errors: by typed code.
        slides: all are in the table; the first `MAX_SLIDES` with a heat map are shown with it.
        input_size_px: as in `thumbnails.draw_example`.
        images: the table of the images that are not slides.
    """
    shown = {group: list(found[:PER_GROUP]) for group, found in examples.items() if found}
    # Maps of other methods than the closed form have no unit, so the page has a scale of its own.
    maps = [one.evidence for found in shown.values() for one in found]
    limit = overlay.LIMIT if facts.get("cam") in (None, "evidence") else overlay.scale(maps)
    low, high = UNCERTAIN
    drawn = {
        group: [thumbnails.draw_example(one, limit, input_size_px) for one in found]
        for group, found in shown.items()
    }
    return style.render(
        "gallery.html",
        facts=defaultdict(lambda: None, facts),
        marks=[mark for name, mark in MARKS.items() if facts.get(name)],
        n=len(probabilities),
        n_malignant=int((probabilities >= facts["threshold"]).sum()),
        n_uncertain=int(((probabilities > low) & (probabilities < high)).sum()),
        uncertain=UNCERTAIN,
        histogram=_histogram(probabilities, facts) if len(probabilities) else None,
        descriptions=GROUPS,
        examples=drawn,
        limit=limit,
        legend=thumbnails.data_uri(overlay.legend(), "PNG"),
        errors=dict(sorted(errors.items(), key=lambda item: -item[1].count)),
        images=images,
        slides=slides,
        drawn_slides=_drawn(slides),
    )


def _histogram(probabilities: np.ndarray, facts: Mapping[str, Any]) -> Markup:
    with matplotlib.rc_context(plots.STYLE):
        figure = plots.plot_probabilities(probabilities, facts["threshold"])
        plots.mark(figure, ["synthetic data"] if facts.get("synthetic") else [])
        return plots.inline(plots.svg(figure), "probabilities")


def _drawn(slides: Sequence[GallerySlide]) -> list[tuple[GallerySlide, str | None, str | None]]:
    """The first slides that have a heat map, with it and the outlined slide as data URIs."""
    shown = [slide for slide in slides if slide.heat_map][:MAX_SLIDES]
    return [(slide, _small(slide.heat_map), _small(slide.outlined)) for slide in shown]


def _small(content: bytes | None) -> str | None:
    if content is None:
        return None
    pixels = image.shrink(decoder.decode_safely(content), 2 * MAX_SLIDE_WIDTH_PX, MAX_SLIDE_WIDTH_PX)
    return thumbnails.data_uri(pixels)
