"""The look of all pages, figures and maps: colours, number formats and templates.

Blue is benign and vermilion malignant (Okabe and Ito 2008, "Color Universal Design": distinguishable with
every common colour blindness). As text both are darker, for a contrast of at least 4.5:1 (WCAG 2.2, success
criterion 1.4.3). `page/palette.css` of the service is the output of `css`.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from bcd import text

BLUE, VERMILION = "#0072b2", "#d55e00"
SKY, GREEN, ORANGE, PURPLE = "#56b4e9", "#009e73", "#e69f00", "#cc79a7"
# Text and lines of figures; `plots.inline` replaces them by the colours of the page, light or dark.
INK, SOFT, WARN = "#1f2328", "#59636e", "#b34a00"
GREY, PALE = "#8c959f", "#8c959f66"
# Custom properties of the pages, light and dark. `-fill` is for areas, `on-accent` for text on the accent.
PALETTE = {
    "paper": ("#ffffff", "#12161b"),
    "sheet": ("#f6f8fa", "#1a2028"),
    "ink": (INK, "#e6edf3"),
    "soft": (SOFT, "#9aa6b2"),
    "line": ("#d1d9e0", "#313a44"),
    "accent": ("#0067a3", "#62bdf0"),
    "accent-paper": ("#eaf4fb", "#16293a"),
    "on-accent": ("#ffffff", "#0b1520"),
    "warn": (WARN, "#f29a5c"),
    "warn-line": (VERMILION, "#e07a33"),
    "warn-paper": ("#fff1e8", "#33231a"),
    "bad": ("#b3261e", "#ff9a92"),
    "bad-paper": ("#fdeeed", "#3a1f1e"),
    "benign": ("#0067a3", "#62bdf0"),
    "malignant": (WARN, "#f29a5c"),
    "benign-fill": (BLUE, "#3f9fd8"),
    "malignant-fill": (VERMILION, "#e07a33"),
    "range": (SKY, "#2f7cae"),
}
LIGHT, DARK = ({name: colors[i] for name, colors in PALETTE.items()} for i in (0, 1))
PERCENT = "\N{NO-BREAK SPACE}%"


def css() -> str:
    """The colours as custom properties; dark ones on a screen only, since paper is white."""
    light, dark = ("".join(f" --{name}: {value};" for name, value in part.items()) for part in (LIGHT, DARK))
    return f":root {{{light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{{dark} }} }}\n"


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours `#rrggbb`, 1 to 21 (WCAG 2.2)."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def ink_on(background: str) -> str:
    """Black or white, whichever has more contrast on a colour; at least 4.58:1 on any."""
    return max("#000000", "#ffffff", key=lambda ink: contrast(ink, background))


def _luminance(color: str) -> float:
    parts = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def format_metric(value: float | None, name: str = "") -> str:
    """A metric as a percentage, the AUC as a number, an undefined one as a dash."""
    if value is None:
        return "–"
    return f"{value:.3f}" if name == "auc" else f"{100 * value:.1f}{PERCENT}"


def format_difference(difference: float | None, name: str = "") -> str:
    """A signed difference of two values of a metric, in percentage points or of the AUC."""
    if difference is None:
        return "–"
    text = f"{difference:+.3f}" if name == "auc" else f"{100 * difference:+.1f}"
    return text.replace("-", "−")


def format_interval(interval: Sequence[float] | None, name: str = "") -> str:
    """Both ends of an interval of a metric."""
    if interval is None:
        return "–"
    low, high = (format_metric(end, name) for end in interval)
    return f"{low.removesuffix(PERCENT)} to {high}"


def format_certainty(values: Mapping[str, Any], name: str = "") -> str:
    """The interval of one of the metrics of `measures.with_intervals`, or why it has none."""
    n_patients = values["support"][name]
    if values["intervals"][name] is None and values[name] is not None and n_patients is not None:
        return too_few_to_say(n_patients)
    return format_interval(values["intervals"][name], name)


def too_few_to_say(n_patients: int) -> str:
    """In place of an interval, or of a headline."""
    return f"{text.counted(n_patients, 'patient')}: too few to say"


@cache
def templates() -> jinja2.Environment:
    """The environment of all HTML templates, with the `palette` and filters for counts, metrics and paths."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bcd.reports"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.globals["palette"] = Markup(css())
    environment.filters |= {
        "counted": text.counted,
        "value": format_metric,
        "interval": format_interval,
        "certainty": format_certainty,
        "too_few_to_say": too_few_to_say,
        "points": format_difference,
        "place": text.without_folders,
    }
    return environment


def render(template: str, **context: Any) -> str:
    """A page from one of the templates."""
    return templates().get_template(template).render(context)
