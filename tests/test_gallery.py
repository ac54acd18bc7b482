"""The page of a scored archive: the right pictures and numbers, nothing from outside, names as text."""

import base64
import re
from typing import Any

import numpy as np
import pytest

from bcd import gallery, image, overlay
from bcd.example import Example
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


def example(name: str = "a/b.png", p: float = 0.9, value: float = 2.0) -> Example:
    pixels = pictures.gradient(460, 700)
    called = "malignant" if p >= 0.5 else "benign"
    return Example(name, p, called, float(np.log(p / (1 - p))), pixels, np.full((7, 11), value))


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
            gallery.Slide("one.svs", 400, 12.34, 0.25, pictures.encode(pictures.gradient()), "s/a b.geojson")
        ],
    }
    return gallery.page(**(given | other))


def text(html: str) -> str:
    """What a person reads: no style, no tags, single spaces."""
    html = re.sub(r"<style>.*?</style>", "", html, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html)).replace("&nbsp;", " ")


def shown(html: str) -> list[np.ndarray]:
    """The embedded pictures in the order of the page."""
    found = re.findall(r'src="data:image/\w+;base64,([^"]+)"', html)
    return [image.decode(base64.b64decode(content)) for content in found]


def test_the_numbers_of_the_archive_are_on_the_page() -> None:
    said = text(page())
    for fact in (
        "Scored archive: &lt;s3://archive&gt;",
        "Research use only. Not a medical device, and not for diagnosis.",
        "2,001 pictures scored",
        "1,001 pictures (50.0 %) are called malignant , from a probability of 0.5 on",
        "1 input could not be scored; it is named below",
        "inputs 2,003 6 other files passed over",
        "whole slides 3 412 tiles",
        "pictures per second 27.3 in 10 minutes",
        "1,599 of 2,001 (79.9 %) lie between 0.1 and 0.9",
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


def test_a_picture_stands_beside_its_map_on_the_scale_that_is_stated() -> None:
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
    slides = [gallery.Slide(f"{i}.svs", 1, None, None, heat_map) for i in range(30)]
    html = page(examples=many, slides=slides)
    found = shown(html)
    assert len(found) == 3 + 2 * 24 + 24
    assert max(pixels.shape[1] for pixels in found[: 3 + 48]) == 420
    assert max(pixels.shape[1] for pixels in found) == 840
    assert "6 slides without a picture here" in text(html)
    assert len(html) < 5_000_000
    assert not re.search(r"<(script|link|iframe)\b|@import|https?:", html)
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', html))


def test_names_are_text_and_never_markup() -> None:
    bad = '<script>alert("1")</script>'
    html = page(
        facts=FACTS | {"input": bad, "title": bad},
        examples={bad: [example(bad)]},
        errors={bad: gallery.Failures(1, [(bad, bad)])},
        slides=[
            gallery.Slide(bad, 1, None, None, None, f"javascript:{bad}"),
            gallery.Slide(bad, 1, 1.0, 0.5, pictures.encode(pictures.gradient()), f'" onload="{bad}'),
        ],
    )
    assert "<script" not in html
    assert "onload=" not in html.replace("onload%3D", "")
    assert 'href="javascript%3A' in html
    assert html.count("&lt;script&gt;") >= 8


@pytest.mark.parametrize("seconds", [None, 5.0])
def test_an_archive_without_results_errors_or_slides(seconds: float | None) -> None:
    facts = {"threshold": 0.5, "n_errors": 0, "n_inputs": 0, "rows_per_s": None, "seconds": seconds}
    html = gallery.page(facts, np.zeros(0), {}, {}, [])
    assert "0 pictures scored" in text(html)
    assert "Nothing could be scored." in text(html)
    assert not re.search(r"\b(nan|None|inf)\b", text(html))
    assert "<svg" not in html


def test_a_mark_stands_on_every_block_with_numbers() -> None:
    assert "synthetic data" not in page()
    html = page(facts=FACTS | {"synthetic": True})
    heads = re.findall(r"<h2>.*?</h2>", html, flags=re.S)
    assert sum("synthetic data" in head for head in heads) == 4
    assert "SYNTHETIC DATA" in re.findall(r"<svg.*?</svg>", html, flags=re.S)[0]
    assert "made-up pictures" in text(html)
    assert "Pictures of the same patient stood on both sides" in text(page(facts=FACTS | {"leaky": True}))


def test_other_targets_and_methods_are_said() -> None:
    said = text(page(facts=FACTS | {"target": "subtype", "cam": "layercam"}))
    assert "layercam map laid over it: vermilion speaks for the predicted class, blue against it" in said
    assert "in the method&#39;s own units" in said or "in the method's own units" in said


def test_maps_without_a_unit_have_a_scale_of_their_own() -> None:
    shown = {"least certain": [example(value=0.002), example(value=-0.001)]}
    assert "full colour ±0.002" in text(page(facts=FACTS | {"cam": "layercam"}, examples=shown))
    assert "full colour ±4" in text(page(facts=FACTS | {"cam": "evidence"}, examples=shown))


def test_the_clearest_cases_are_chosen_and_none_twice() -> None:
    probabilities = np.array([0.9, 0.1, 0.55, 0.99, 0.02, 0.4, 0.7, 0.3, 0.95])
    assert gallery.choose(probabilities, 0.5, 2) == {
        "most certainly malignant": [3, 8],
        "most certainly benign": [4, 1],
        "least certain": [2, 5],
    }
    assert list(gallery.choose(probabilities[:4], 0.5).values()) == [[3, 0], [1], [2]]
    assert list(gallery.choose(np.array([0.2]), 0.5).values()) == [[], [0], []]
    assert list(gallery.choose(np.zeros(0), 0.5).values()) == [[], [], []]
    many = np.random.default_rng(0).random(100_000)
    chosen = gallery.choose(many, 0.3)
    assert many[chosen["most certainly malignant"]].min() == np.sort(many)[-8]
    assert np.abs(many[chosen["least certain"]] - 0.3).max() < 1e-3
