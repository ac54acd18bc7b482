from pathlib import Path

import pyarrow as pa
import pytest

from bcd import schema
from bcd.data import breakhis
from bcd.split import quarantine
from bcd.storage import File
from tests.split.test_split import row, table


@pytest.fixture(scope="module")
def published(real_data: Path) -> pa.Table:
    """Rows of all published names, without contents."""
    fold = (real_data / "folds" / "dsfold1.txt").read_text()
    return breakhis.index(File(uri=name, path=name, size_bytes=1) for name in breakhis.read_fold(fold, "1"))


@pytest.mark.real
def test_quarantine_finds_the_slide_published_twice(published: pa.Table) -> None:
    kept, aside, reasons = quarantine.apply_rules(published)
    assert (kept.num_rows, aside.num_rows) == (7663, 246)
    assert set(aside[schema.SLIDE].to_pylist()) == breakhis.KNOWN_ANOMALIES.keys()
    assert reasons == ["slide 14-13412 is labelled DC and LC: all 246 images quarantined"]


def test_quarantine_of_contradictions_and_duplicates() -> None:
    def copy(name: str, patient: str, subtype: str, sha256: str | None, slide: str) -> dict[str, str | None]:
        return row(name, patient, subtype, **{schema.SHA256: sha256, schema.SLIDE: slide})

    rows = table(
        copy("i.png", "1", "DC", None, "two labels"),
        copy("h.png", "1", "LC", "s", "two labels"),
        copy("g.png", "2", "A", "s", "other slide"),
        copy("f.png", "3", "A", "t", "s3"),
        copy("e.png", "3", "A", "t", "s3"),
        copy("d.png", "3", "A", "t", "s3"),
        copy("c.png", "4", "DC", "u", "s4"),
        copy("b.png", "5", "DC", "u", "s5"),
        copy("a.png", "6", "DC", None, "s6"),
    )
    kept, aside, reasons = quarantine.apply_rules(rows)
    assert kept[schema.IMAGE_ID].to_pylist() == ["d.png", "a.png"]
    assert kept.num_rows + aside.num_rows == rows.num_rows
    assert reasons == [
        "slide two labels is labelled DC and LC: all 2 images quarantined",
        "duplicates with several patients or labels, all quarantined: b.png, c.png",
        "duplicates of d.png (kept), quarantined: e.png, f.png",
        "duplicates with several patients or labels, all quarantined: g.png, h.png",
    ]
    assert quarantine.apply_rules(kept) == (kept, kept.slice(0, 0), [])


def test_a_null_slide_hash_or_subtype_is_no_conflict() -> None:
    rows = table(row("a", "p", "A"), row("b", "q", "DC"), row("c", "r", None), row("d", "p", "A"))
    assert quarantine.apply_rules(rows).kept == rows
