"""An audit as lines for a terminal and as a self-contained HTML page."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np

from bcd.audit.findings import Finding
from bcd.audit.summary import Audit
from bcd.imaging import image
from bcd.reports import style, thumbnails
from bcd.text import counted

# Instances of a finding that are printed, names in a cell of a table, instances that are shown as images.
LINES, NAMES, DRAWN = 3, 10, 12
WIDTH_PX = 320


def audit_lines(audit: Audit) -> list[str]:
    """The audit as lines, the verdict last."""
    facts = audit.facts
    lines = [f"{counted(facts.n_images, 'image')} of {counted(facts.n_patients, 'patient')}"]
    if facts.n_cases and facts.n_slides:
        slides = f"{counted(facts.n_slides, 'slide id')} under {counted(facts.n_slide_labels, 'label')}"
        lines[0] += f" in {counted(facts.n_cases, 'case')}; {slides}"
    for tally in (facts.by_class, facts.by_subtype, facts.by_magnification):
        lines += [f"  {', '.join(f'{n:,} {key}' for key, n in tally.items())}"] if tally else []
    for kind in kinds(audit).values():
        for one in kind:
            lines += ["", f"{one.severity.upper()}: {one.sentence}"]
            lines += [f"  {detail.sentence}" for detail in one.details[:LINES]]
            lines += [f"  and {one.count - LINES:,} more"] if min(one.count, len(one.details)) > LINES else []
        lines.append(f"  -> {kind[-1].next_step}")
    return [*lines, "", f"VERDICT: {audit.verdict}"]


def kinds(audit: Audit) -> dict[str, list[Finding]]:
    """The findings by kind, in their order."""
    return {kind: list(found) for kind, found in groupby(audit.findings, lambda one: one.kind)}


def shown(audit: Audit) -> list[str]:
    """Ids of the images on the page."""
    ids = (name for one in audit.findings for detail in one.details[:DRAWN] for name in detail.images)
    return list(dict.fromkeys(ids))


def thumbnail(pixels: np.ndarray) -> str:
    """A small image for the page, as data URI."""
    return thumbnails.data_uri(image.shrink(pixels, WIDTH_PX, WIDTH_PX))


def render_audit(audit: Audit, thumbnails: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """The page as self-contained HTML.

    `thumbnails` are data URIs of the `shown` images by id, missing ones are skipped; `facts` are settings and
    versions, and whether the data are `synthetic`.
    """
    values = {"audit": audit, "kinds": kinds(audit), "thumbnails": thumbnails, "facts": facts}
    limits = {"lines": LINES, "listed": NAMES, "drawn": DRAWN}
    return style.templates().get_template("audit.html").render(values | limits)
