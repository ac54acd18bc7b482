"""Lines and page of the audit: every number and name, nothing from outside, names as text."""

import re
from typing import Any

import numpy as np
import pytest

from bcd import schema
from bcd.audit import findings, report, summary
from bcd.data import breakhis
from bcd.storage import File
from tests import pictures
from tests.audit.test_findings import CLEAN, row, table
from tests.audit.test_summary import audited, named
from tests.reports.test_gallery import shown, text

FACTS: dict[str, Any] = {
    "data": "<s3://data>",
    "folds": None,
    "split": "mine.csv",
    "output": "out",
    "pixels": True,
    "near_bits": 60,
    "outlier_z": 3.5,
    "bcd_version": "0.2.0",
    "git_commit": None,
    "synthetic": False,
}
SHARED = {schema.SHA256: "f00", schema.SLIDE: "s"}


@pytest.fixture(scope="module")
def leaking() -> summary.Audit:
    """Two copies in two parts, 40 nearly blank images, one broken."""
    blank = [row(f"blank-{i:02}.png", **{schema.TISSUE_FRACTION: 0.01 * (i % 10)}) for i in range(40)]
    broken = row("broken.png", **{schema.ERROR: "truncated", schema.ERROR_MESSAGE: "cut off"})
    copies = [row(name, **SHARED, **{schema.CASE: "c"}) for name in ("a.png", "b.png")]
    rows = table(*copies, *blank, broken)
    return audited(rows, named(rows, **{"a.png": "train", "b.png": "test"}))


def page(result: summary.Audit, **other: Any) -> str:
    thumbnails = dict.fromkeys(report.shown(result), report.thumbnail(pictures.gradient(460, 700)))
    return report.render_audit(result, thumbnails, FACTS | other)


def test_lines_say_what_was_found_what_to_do_and_end_with_the_verdict(leaking: summary.Audit) -> None:
    lines = report.audit_lines(leaking)
    assert lines[:2] == ["43 images of 43 patients in 1 case; 1 slide id under 1 label", "  43 benign"]
    assert "LEAK: mine leaks: 1 patient or slide and 1 image in several parts" in lines
    blank = lines.index("WARNING: 40 images with less than 10% tissue")
    assert lines[blank + 1 : blank + 5] == [
        *(f"  blank-{i:02}.png: {i}.0% tissue" for i in range(3)),
        "  and 37 more",
    ]
    assert sum(line.startswith("  -> ") for line in lines) == len({one.kind for one in leaking.findings})
    assert lines[-1] == f"VERDICT: {leaking.verdict}"
    assert report.audit_lines(audited(CLEAN)) == [
        "30 images of 30 patients",
        "  30 benign",
        "  30 F",
        "",
        "VERDICT: nothing to decide on before training",
    ]


def test_the_page_says_the_same(leaking: summary.Audit) -> None:
    said = text(page(leaking))
    for fact in (
        "Audit of &lt;s3://data&gt;",
        "Research use only. Not a medical device, and not for diagnosis.",
        "1 leaking split",
        leaking.verdict,
        "images 43 43 benign",
        "mine 1 – 1 1 s 1 1 c",
        "40 images with less than 10% tissue",
        "blank-00.png: 0.0% tissue",
        "28 more",
        "1 broken image: 1 truncated broken.png: truncated: cut off",
        "differ in at most 60 bits",
    ):
        assert fact in re.sub(r"\s+", " ", said.replace("( ", "(")), fact
    for one in leaking.findings:
        assert said.count(one.sentence) >= 1
        assert one.next_step.replace("'", "&#39;") in said


def test_a_few_images_are_shown_side_by_side(leaking: summary.Audit) -> None:
    wanted = report.shown(leaking)
    assert wanted == ["a.png", "b.png", *(f"blank-{i:02}.png" for i in range(report.DRAWN))]
    drawn = shown(page(leaking))
    assert len(drawn) == len(wanted)
    assert {pixels.shape for pixels in drawn} == {(210, 320, 3)}
    assert len(shown(report.render_audit(leaking, {}, FACTS))) == 0


def test_counts_are_shown_with_the_published_ones() -> None:
    names = [f"SOB_B_F-14-1234-40-{i:03}.png" for i in range(3)]
    index = breakhis.index(File(uri=name, path=name, size_bytes=1) for name in names)
    said = text(page(audited(schema.fill(index, schema.AUDIT), warnings=("3 of 7,909",)), pixels=False))
    assert "F 3 of 253 0 of 260 0 of 264 0 of 237 3 of 1,014" in said
    assert "no picture was opened" in said
    assert "perceptual" not in said


def test_nothing_found_is_a_short_page() -> None:
    html = page(audited(CLEAN))
    assert "0 findings to decide on" in text(html)
    assert "No split was given" in text(html)
    assert not re.search(r"\b(nan|None|inf)\b", text(html))
    assert "made up" in text(page(audited(CLEAN), synthetic=True))


def test_the_page_needs_nothing_from_outside_and_names_are_text() -> None:
    bad = '<script>alert("1")</script>'
    rows = table(row(bad, **SHARED), row(f"{bad}2", **SHARED))
    html = page(audited(rows, named(rows, **{bad: "train", f"{bad}2": "test"})), data=bad)
    assert not re.search(r"<(script|link|iframe)\b|@import|https?:", html)
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', html))
    assert html.count("&lt;script&gt;") >= 5


def test_every_kind_of_finding_has_a_title() -> None:
    one = audited(table(row("a", **{schema.PATIENT: None}))).findings[0]
    for kind in findings.KINDS:
        said = page(audited(CLEAN).model_copy(update={"findings": (one.model_copy(update={"kind": kind}),)}))
        assert re.search(r"<h2>[A-Z][\w ,]+ <span", said), kind


def test_a_thumbnail_is_small() -> None:
    uri = report.thumbnail(np.zeros((4_600, 7_000, 3), np.uint8))
    assert shown(f'<img src="{uri}">')[0].shape == (210, 320, 3)


@pytest.mark.parametrize("kind", findings.KINDS)
def test_every_kind_of_finding_has_a_heading(leaking: summary.Audit, kind: str) -> None:
    one = findings.Finding.of(kind, "something", [findings.Detail(sentence="it")])
    html = page(leaking.model_copy(update={"findings": (one,)}))
    assert re.search(r"<h2>[A-Z][^<]{4,} <span class=\"kind", html)
