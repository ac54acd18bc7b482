"""One palette: the pages use nothing else, and whatever is text can be read on whatever it may lie on."""

import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from bcd.reports import overlay, plots, style

BCD = Path(style.__file__).parent.parent
PAGES = sorted(
    path
    for folder in ("serving/page", "reports/templates")
    for path in (BCD / folder).rglob("*")
    if path.is_file() and "openseadragon" not in path.name
)
RULES = [
    (path.name, selector.strip(), body)
    for path in PAGES
    if path.suffix in (".css", ".html")
    for selector, body in re.findall(r"([^{}<>]+)\{([^{}%]*)\}", path.read_text(encoding="utf-8"))
]
# Backgrounds of text. Other backgrounds are bars and lines without text, unless a rule gives both.
PAPERS = ("paper", "sheet", "accent-paper", "warn-paper", "bad-paper")
# WCAG 2.2, 1.4.3: for text of any size.
ENOUGH = 4.5


def used(body: str, kind: str) -> list[str]:
    return re.findall(rf"(?<![-\w]){kind}:\s*(?:[^;]*\s)?var\(--([\w-]+)\)", body)


def test_contrast_is_that_of_wcag() -> None:
    assert style.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert style.contrast("#777777", "#777777") == 1
    # The grey that is known to miss by a hair, and the one that just reaches it.
    assert style.contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)
    assert style.contrast("#ffffff", "#767676") == pytest.approx(4.542, abs=1e-3)


@pytest.mark.parametrize("colors", [style.LIGHT, style.DARK], ids=["light", "dark"])
def test_every_text_of_every_page_can_be_read_on_what_it_may_lie_on(colors: dict[str, str]) -> None:
    pairs = {("ink", paper) for paper in PAPERS}
    for _, _, body in RULES:
        own = used(body, "background(?:-color)?")
        for text in used(body, "color"):
            papers = ["accent"] if text == "on-accent" else own or PAPERS
            pairs |= set(product([text], papers))
    assert {("soft", "sheet"), ("malignant", "accent-paper"), ("on-accent", "accent")} <= pairs
    found = {pair: style.contrast(*(colors[name] for name in pair)) for pair in pairs}
    assert {pair: ratio for pair, ratio in found.items() if ratio < ENOUGH} == {}


def test_the_pages_have_no_other_colours() -> None:
    assert (BCD / "serving/page/palette.css").read_text(encoding="utf-8") == style.css()
    assert style.LIGHT.keys() == style.DARK.keys()
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        if path.name != "palette.css":
            # What is drawn over a slide is light or dark as the slide is, not as the page.
            over = {style.LIGHT["ink"], style.LIGHT["paper"]} if path.parent.name == "slides" else set()
            assert set(re.findall(r"#[0-9a-fA-F]{3,8}\b(?=[;\s\"])", text)) <= over, path.name
            assert set(re.findall(r"%23([0-9a-f]{6})", text)) <= {style.BLUE[1:], style.VERMILION[1:]}
        assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= style.LIGHT.keys() | {"shade"}, path.name


def test_no_text_is_faded() -> None:
    """Opacity would take contrast away unseen; a button that cannot be used may look so (WCAG 1.4.3)."""
    faded = [selector for _, selector, body in RULES if re.search(r"(?<![-\w])opacity:\s*\.", body)]
    assert faded == ["button:disabled"]


def test_text_in_figures_can_be_read() -> None:
    for text in (style.INK, style.SOFT, style.WARN):
        assert style.contrast(text, "#ffffff") >= ENOUGH
    for share in np.linspace(0, 1, 101):
        color = to_hex(plots.BLUES(share))
        assert style.contrast(style.ink_on(color), color) >= ENOUGH
    for *_, color in plots.BARS:
        assert style.contrast(style.ink_on(color), color) >= ENOUGH


def test_black_or_white_reads_on_any_colour() -> None:
    levels = range(0, 256, 17)
    colors = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in product(levels, levels, levels)]
    assert min(style.contrast(style.ink_on(color), color) for color in colors) >= 4.58


def test_maps_and_pages_have_the_colours_of_the_classes() -> None:
    assert (overlay.BLUE, overlay.VERMILION) == (style.BLUE, style.VERMILION)
    assert (style.LIGHT["benign-fill"], style.LIGHT["malignant-fill"]) == (
        style.BLUE,
        style.VERMILION,
    )
    assert plots.CLASS_COLOR["malignant"] == style.VERMILION
