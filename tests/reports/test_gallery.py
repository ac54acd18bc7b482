"""The page of a scored archive: the right images and numbers, nothing from outside, names as text."""

import base64
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bcd.imaging import image
from bcd.reports import gallery, overlay
from bcd.reports.thumbnails import Example
from tests import pictures

FACTS: dict[str, Any] = {
    "title": "Scored archive: <s3://archive>",
    "threshold": 0.5,
    "model_id": "0123456789abcdef",
    "n_inputs": 2_003,
    "n_images": 2_000,
    "n_slides": 3,
    "n_tiles": 412,
    "n_errors": 1,
    "n_ignored_files": 6,
    "rows_per_s": 27.31,
    "seconds": 600.0,
    "precision": "bfloat16",
}
PROBABILITIES = np.linspace(0, 1, 2_001)
PIXELS = pictures.gradient(460, 700)


@pytest.fixture(scope="module", autouse=True)
def _the_same_figure_is_drawn_once() -> Iterator[None]:
    drawn: dict[tuple[Any, ...], Any] = {}
    real = gallery._histogram

    def histogram(probabilities: np.ndarray, facts: Mapping[str, Any]) -> Any:
        key = probabilities.tobytes(), facts["threshold"], facts.get("synthetic")
        if key not in drawn:
            drawn[key] = real(probabilities, facts)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gallery, "_histogram", histogram)
        yield


def example(name: str = "a/b.png", p: float = 0.9, value: float = 2.0) -> Example:
    called = "malignant" if p >= 0.5 else "benign"
    return Example(name, p, called, float(np.log(p / (1 - p))), PIXELS, np.full((7, 11), value))


def page(**other: Any) -> str:
    given: dict[str, Any] = {
        "facts": FACTS,
        "probabilities": PROBABILITIES,
        "examples": {
            "most certainly malignant": [example()],
            "most certainly benign": [example("c.png", 0.1, -1.0)],
        },
        "errors": {
            "truncated": gallery.Failures(12, [(f"x/{i}.png", "cut off") for i in range(9)]),
            "missing_mpp": gallery.Failures(30, [("y.svs", "no µm")]),
        },
        "slides": [
            gallery.GallerySlide(
                "one.svs", 400, 12.34, 0.25, pictures.encode(pictures.gradient()), "s/a b.geojson"
            )
        ],
        "images": gallery.Images(
            [gallery.GalleryRow("a/b.png", "../in/a/b.png", "p1", "malignant", 0.9, 0.8)], 1
        ),
    }
    return gallery.render_gallery(**(given | other))


def text(html: str) -> str:
    """What a person reads: no style, no script, no tags, single spaces."""
    html = re.sub(r"<(style|script)>.*?</\1>", "", html, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html)).replace("&nbsp;", " ")


def without_script(html: str) -> str:
    """The page without the one script that it has, its own."""
    own, n = re.subn(r"<script>\n\"use strict\";.*?</script>", "", html, flags=re.S)
    assert n == 1
    return own


def shown(html: str) -> list[np.ndarray]:
    """The embedded images in the order of the page."""
    found = re.findall(r'src="data:image/\w+;base64,([^"]+)"', html)
    return [image.decode(base64.b64decode(content)) for content in found]


def test_the_numbers_of_the_archive_are_on_the_page() -> None:
    said = text(page())
    for fact in (
        "Scored archive: &lt;s3://archive&gt;",
        "Research use only. Not a medical device, and not for diagnosis.",
        "2,001 images scored",
        "1,001 images (50.0 %) are called malignant , with a probability of at least 0.5",
        "1 input could not be scored; it is named below",
        "inputs 2,003 6 other files ignored",
        "whole slides 3 412 tiles",
        "images per second 27.3 in 10 minutes",
        "1,599 of 2,001 (79.9 %) are between 0.1 and 0.9",
        "0.900 malignant log-odds +2.20",
        "0.100 benign log-odds −2.20",
        "one.svs",
        "25.0 % of 400",
        "12.3 mm²",
        "missing mpp 30 y.svs no µm",
        "x/4.png cut off and 7 more, all in the table",
        "model id 0123456789abcdef",
    ):
        assert fact.replace(" , ", ", ") in said.replace(" ,", ","), fact
    assert said.index("missing mpp") < said.index("truncated 12")  # the most frequent first
    assert "x/5.png" not in said


def test_an_image_is_beside_its_map_on_the_stated_scale() -> None:
    evidence = np.zeros((7, 11))
    evidence[:, 5:] = 6
    marked = Example("a", 0.9, "malignant", 2.2, np.full((460, 700, 3), 255, np.uint8), evidence)
    html = page(examples={"least certain": [marked]}, slides=[], input_size_px=(224, 336))
    legend, left, right = shown(html)
    assert "−4 0 +4" in text(html)
    assert "full colour ±4" in text(html)
    np.testing.assert_array_equal(legend, overlay.legend())
    assert left.shape == right.shape == (276, 420, 3)
    expected = overlay.overlay(left, evidence, overlay.LIMIT, 224, 336)
    assert np.abs(right.astype(int) - expected).mean() < 2  # JPEG
    assert (right[:, :120] > 250).all()


def test_the_page_needs_nothing_from_outside_and_stays_small() -> None:
    many = {group: [example(f"{i}.png") for i in range(40)] for group in gallery.GROUPS}
    heat_map = pictures.encode(pictures.gradient(1_200, 900))
    slides = [gallery.GallerySlide(f"{i}.svs", 1, None, None, heat_map) for i in range(30)]
    html = page(examples=many, slides=slides)
    found = shown(html)
    assert len(found) == 4 + 2 * 32 + 24
    assert max(pixels.shape[1] for pixels in found[: 4 + 64]) == 420
    assert max(pixels.shape[1] for pixels in found) == 840
    assert len(html) < 5_000_000
    assert not re.search(r"<(script|link|iframe)\b|@import|https?:", without_script(html))
    assert not re.search(r"fetch|XMLHttp|import|https?:|eval|innerHTML", html.split("<script>")[1])
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', html))


def test_names_are_text_and_never_markup() -> None:
    bad = '<script>alert("1")</script>'
    html = page(
        facts=FACTS | {"input": bad, "title": bad},
        examples={bad: [example(bad)]},
        errors={bad: gallery.Failures(1, [(bad, bad)])},
        slides=[
            gallery.GallerySlide(bad, 1, None, None, None, f"javascript:{bad}"),
            gallery.GallerySlide(bad, 1, 1.0, 0.5, pictures.encode(pictures.gradient()), f'" onload="{bad}'),
        ],
        images=gallery.Images([gallery.GalleryRow(bad, f'" onload="{bad}', bad, bad, 0.5, error=bad)], 1),
    )
    html = without_script(html)
    assert "<script" not in html
    assert not re.search(r"[\"'] *onload=", html)
    assert 'href="javascript%3A' in html
    assert html.count("&lt;script&gt;") >= 12


@pytest.mark.parametrize("seconds", [None, 5.0])
def test_an_archive_without_results_errors_or_slides(seconds: float | None) -> None:
    facts = {"threshold": 0.5, "n_errors": 0, "n_inputs": 0, "rows_per_s": None, "seconds": seconds}
    html = gallery.render_gallery(facts, np.zeros(0), {}, {}, [])
    assert "0 images scored" in text(html)
    assert "Nothing could be scored." in text(html)
    assert not re.search(r"\b(nan|None|inf)\b", text(html))
    assert "<svg" not in html


def test_every_block_with_numbers_has_the_marks() -> None:
    assert "synthetic data" not in page()
    html = page(facts=FACTS | {"synthetic": True})
    heads = re.findall(r"<h2>.*?</h2>", html, flags=re.S)
    assert sum("synthetic data" in head for head in heads) == 5
    assert "SYNTHETIC DATA" in re.findall(r"<svg.*?</svg>", html, flags=re.S)[0]
    assert "synthetic images" in text(html)
    assert "Images of the same patient were in several parts" in text(page(facts=FACTS | {"leaky": True}))


def test_other_targets_and_methods_are_said() -> None:
    said = text(page(facts=FACTS | {"target": "subtype", "cam": "layercam"}))
    assert "under its layercam map: vermilion for the predicted class, blue against it" in said
    assert "in the method&#39;s own units" in said or "in the method's own units" in said


def test_maps_without_a_unit_have_a_scale_of_their_own() -> None:
    shown = {"least certain": [example(value=0.002), example(value=-0.001)]}
    assert "full colour ±0.002" in text(page(facts=FACTS | {"cam": "layercam"}, examples=shown))
    assert "full colour ±4" in text(page(facts=FACTS | {"cam": "evidence"}, examples=shown))


def test_the_clearest_cases_are_chosen_and_none_twice() -> None:
    probabilities = np.array([0.9, 0.1, 0.55, 0.99, 0.02, 0.4, 0.7, 0.3, 0.95])
    assert gallery.choose_groups(probabilities, 0.5, 2) == {
        "most certainly malignant": [3, 8],
        "most certainly benign": [4, 1],
        "least certain": [2, 5],
        "unlike the training data": [],
    }
    assert list(gallery.choose_groups(probabilities[:4], 0.5).values()) == [[3, 0], [1], [2], []]
    assert list(gallery.choose_groups(np.array([0.2]), 0.5).values()) == [[], [0], [], []]
    assert list(gallery.choose_groups(np.zeros(0), 0.5).values()) == [[], [], [], []]
    many = np.random.default_rng(0).random(100_000)
    chosen = gallery.choose_groups(many, 0.3)
    assert many[chosen["most certainly malignant"]].min() == np.sort(many)[-8]
    assert np.abs(many[chosen["least certain"]] - 0.3).max() < 1e-3


def test_what_is_unlike_the_training_is_in_its_own_group_only() -> None:
    """The most certain of all, the least certain, and one called benign; the furthest first."""
    probabilities = np.array([0.99, 0.95, 0.9, 0.5, 0.49, 0.1, 0.02])
    novelty = np.array([3.0, 1.0, 1.0, 9.0, 1.0, 1.0, 2.0])
    unlike = novelty > 1.5
    chosen = gallery.choose_groups(probabilities, 0.5, 8, novelty, unlike)
    assert chosen == {
        "most certainly malignant": [1, 2],
        "most certainly benign": [5, 4],
        "least certain": [],
        "unlike the training data": [3, 0, 6],
    }
    everything = gallery.choose_groups(probabilities, 0.5, 8, novelty, np.ones(7, bool))
    assert list(everything.values()) == [[], [], [], [3, 0, 6, 1, 2, 4, 5]]


def test_at_most_two_of_a_slide_or_patient_are_in_a_group() -> None:
    """One slide of 95 tiles, two fields of a patient with a third slide, and fields of nobody."""
    n = 100
    probabilities = np.linspace(0.99, 0.9, n)
    slides = np.array(["s"] * 95 + [None] * 5, object)
    patients = np.array([None] * 95 + ["p", "p", "p", None, None], object)
    chosen = gallery.choose_groups(probabilities, 0.5, 8, owners=[slides, patients])
    assert chosen["most certainly malignant"] == [0, 1, 95, 96, 98, 99]
    for group, places in gallery.choose_groups(probabilities, 0.95, 8, owners=[slides, patients]).items():
        for owner in (slides, patients):
            names = [owner[place] for place in places if owner[place] is not None]
            assert all(names.count(name) <= 2 for name in names), group


def test_a_warning_is_beside_its_image_and_counted() -> None:
    one = replace(example(), novelty=3.2, novelty_cutoff=1.27, warnings=("unlike_training_data",))
    usual = replace(example(), novelty=0.9, novelty_cutoff=1.27)
    groups = {"unlike the training data": [one], "least certain": [usual]}
    rows = [gallery.GalleryRow("far.png", None, "p", "malignant", 0.999, 3.2, warned=True)]
    slide = gallery.GallerySlide("s.svs", 10, 1.0, 0.5, pictures.encode(pictures.gradient()), n_warned=4)
    facts = FACTS | {"warnings": {"unlike_training_data": 240}}
    said = text(page(facts=facts, examples=groups, images=gallery.Images(rows, 1), slides=[slide]))
    for fact in (
        "240 images (12.0 %) do not look like the training data",
        "unlike the training 240 12.0 % of the images scored",
        "Unlike the training data (novelty 3.20, usual up to 1.27): the result may mean nothing.",
        "novelty 0.90, usual up to 1.27",
        "far.png p 0.999 malignant unlike the training data 3.20",
        "unlike the training data 4 tiles, hatched",
    ):
        assert fact in said, fact
    none = text(page(facts=FACTS | {"warnings": {}}))
    assert "do not look like" not in none
    assert "unlike the training 0 0.0 %" in none
    unknown = text(page(facts=FACTS | {"warnings": None}, slides=[replace(slide, n_warned=None)]))
    assert "it is unknown which of these images are unlike them" in unknown
    assert "s.svs 10 50.0 % – 1" in unknown
    assert "hatched" not in unknown


@pytest.mark.parametrize(("is_found", "kind"), [(True, "banner"), (False, "quiet")])
def test_drift_of_the_stain_is_one_sentence(is_found, kind):
    drift = {"is_found": is_found, "sentence": "a sentence of <drift>"}
    assert f'<p class="{kind}">A sentence of &lt;drift&gt;.</p>' in page(facts=FACTS | {"stain_drift": drift})


@pytest.mark.parametrize(
    ("known", "said"),
    [
        (
            {"n_top": 10, "top": 0.931, "top_interval": [0.81, 0.974]},
            "mean of the highest 10 0.931 (0.810 to 0.974)",
        ),
        ({"n_top": 10, "top": 0.931}, "mean of the highest 10 0.931 tissue"),
        ({"n_top": 1, "top": 0.2}, "mean of the highest 0.200 tissue"),
        ({"n_errors": 3}, "not scored 3 tiles tissue"),
        ({}, "of 400 tissue"),
    ],
)
def test_the_card_of_a_slide_has_the_mean_of_its_highest_tiles(known, said) -> None:
    slide = gallery.GallerySlide("s.svs", 400, 1.0, 0.5, pictures.encode(pictures.gradient()), **known)
    assert said in text(page(slides=[slide]))


def test_the_table_lists_images_and_slides_with_links() -> None:
    rows = [
        gallery.GalleryRow("a.png", "../in/a%20b.png", "p1", "malignant", 0.91, 1.2),
        gallery.GalleryRow("cut.png", "s3://bucket/cut.png", None, error="truncated"),
    ]
    slides = [
        gallery.GallerySlide("b.svs", 0, None, None, error="missing_mpp", patient="p2", link="../in/b.svs")
    ]
    html = page(images=gallery.Images(rows, 3_000), slides=slides)
    assert re.findall(r'<a href="([^"]+)">', html) == [
        "../in/b.svs",
        "../in/a%20b.png",
        "s3://bucket/cut.png",
    ]
    said = text(html)
    for fact in (
        "The 2 images with the highest probability of 3,000; the Parquet table contains all of them.",
        "a.png p1 0.910 malignant 1.20",
        "cut.png – not scored: truncated –",
        "b.svs p2 0 – – – missing mpp",
    ):
        assert fact in said, fact


def test_a_slide_is_beside_its_heat_map_with_its_tissue_outlined() -> None:
    green, heat = (pictures.encode(np.full((20, 30, 3), color, np.uint8)) for color in ((0, 255, 0), 90))
    old = gallery.GallerySlide("old.svs", 1, 1.0, 0.0, heat, "s/old.geojson")
    new = replace(old, outlined=green, tissue_geojson="s/tissue.geojson", n_outside=7)
    html = page(slides=[new], examples={})
    left, right = shown(html)[-2:]
    assert (left[10, 15, 1] > 200 > left[10, 15, 0], right[10, 15].tolist()) == (True, [90] * 3)
    assert 'href="s/tissue.geojson"' in html
    assert "what counts as tissue outlined in green" in text(html)
    assert "outside of regions 7 tiles, not scored tissue in regions" in text(html)
    html = page(slides=[old], examples={})
    assert [one[10, 15, 0] for one in shown(html)[-1:]] == [90]
    assert "outlined in green" not in html
    assert "outside of regions" not in html


@pytest.mark.parametrize("shape", [(10_000, 1), (1, 10_000)])
def test_a_strip_is_bounded_on_the_page(shape: tuple[int, int]) -> None:
    strip = replace(example(), pixels=np.full((*shape, 3), 90, np.uint8))
    _, picture, _ = shown(page(examples={"least certain": [strip]}, slides=[]))
    assert max(picture.shape[:2]) <= 840
    # Enlarged to the width of its place, one pixel would make a page of 222,000.
    assert re.search(r"\.example img \{[^}]*max-height: 24rem; object-fit: contain", page())
