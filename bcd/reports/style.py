"""The look of every page, figure and map, in one place: colours and templates.

Blue speaks for benign and vermilion for malignant (Okabe and Ito 2008, "Color Universal Design": told apart
under every common colour blindness). As text both are darker, so that they can be read: at least 4.5:1
(WCAG 2.2, success criterion 1.4.3). `page/palette.css` is what `css` says, for the page of the service.
"""

from types import MappingProxyType

import jinja2
from markupsafe import Markup

from bcd import text

BLUE, VERMILION = "#0072b2", "#d55e00"
SKY, GREEN, ORANGE, PURPLE = "#56b4e9", "#009e73", "#e69f00", "#cc79a7"
# Text and lines of figures; on a page they take its own colours, light or dark: see `plots.inline`.
INK, SOFT, WARN = "#1f2328", "#59636e", "#b34a00"
GREY, PALE = "#8c959f", "#8c959f66"
# Custom properties of the pages. `-fill` is for areas, `on-accent` for text on the accent.
LIGHT = MappingProxyType(
    {
        "paper": "#ffffff",
        "sheet": "#f6f8fa",
        "ink": INK,
        "soft": SOFT,
        "line": "#d1d9e0",
        "accent": "#0067a3",
        "accent-paper": "#eaf4fb",
        "on-accent": "#ffffff",
        "warn": WARN,
        "warn-line": VERMILION,
        "warn-paper": "#fff1e8",
        "bad": "#b3261e",
        "bad-paper": "#fdeeed",
        "benign": "#0067a3",
        "malignant": WARN,
        "benign-fill": BLUE,
        "malignant-fill": VERMILION,
        "range": SKY,
    }
)
DARK = MappingProxyType(
    {
        "paper": "#12161b",
        "sheet": "#1a2028",
        "ink": "#e6edf3",
        "soft": "#9aa6b2",
        "line": "#313a44",
        "accent": "#62bdf0",
        "accent-paper": "#16293a",
        "on-accent": "#0b1520",
        "warn": "#f29a5c",
        "warn-line": "#e07a33",
        "warn-paper": "#33231a",
        "bad": "#ff9a92",
        "bad-paper": "#3a1f1e",
        "benign": "#62bdf0",
        "malignant": "#f29a5c",
        "benign-fill": "#3f9fd8",
        "malignant-fill": "#e07a33",
        "range": "#2f7cae",
    }
)


def css() -> str:
    """The colours as custom properties; dark ones on a screen only, since paper is white."""
    light, dark = ("".join(f" --{name}: {value};" for name, value in part.items()) for part in (LIGHT, DARK))
    return f":root {{{light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{{dark} }} }}\n"


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours `#rrggbb`, 1 to 21 (WCAG 2.2)."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def ink_on(background: str) -> str:
    """Black or white, whichever reads better on a colour; at least 4.58:1 on any."""
    return max("#000000", "#ffffff", key=lambda ink: contrast(ink, background))


def _luminance(color: str) -> float:
    parts = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def templates() -> jinja2.Environment:
    """The templates of the pages; they know the `palette`, and `3 | counted("patient")`."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("bcd.reports"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    found.globals["palette"] = Markup(css())
    found.filters["counted"] = text.counted
    return found
