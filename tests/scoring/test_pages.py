import pyarrow as pa
import pyarrow.compute as pc
import pytest

from bcd import schema, storage
from bcd.lease import Lease
from bcd.scoring import ledger, pages
from tests.model.test_bundle import card
from tests.reports.test_gallery import FACTS
from tests.scoring.test_finish import TABLE, judged


def test_failures_are_named_by_kind():
    found = pages._failures(TABLE)
    assert {code: failure.count for code, failure in found.items()} == {
        "truncated": 1,
        "unreadable": 1,
        "missing_mpp": 1,
    }
    assert found["truncated"].first == [("b.png", None)]


def test_the_table_of_images_begins_with_the_most_malignant_and_ends_with_errors(monkeypatch):
    ours = ledger.Ledger(Lease("/out"), "0", ())
    scored = judged(("b", 0.2, [], 1.0), ("a", 0.9, ["unlike_training_data"], 1.0), ("c", 0.5, [], 1.0))
    failed = TABLE.drop_columns("n").filter(pa.array([False, True, True, False, True]))
    table = pa.concat_tables([scored, failed])
    found = pages._images(ours, table)
    assert [row.name for row in found.rows] == ["a", "c", "b", "b.png"]
    assert found.total == 4
    assert (found.rows[0].warned, found.rows[0].link, found.rows[3].error) == (True, "../in/a", "truncated")
    monkeypatch.setattr(pages.gallery, "MAX_ROWS", 2)
    found = pages._images(ours, table)
    assert ([row.name for row in found.rows], found.total) == (["a", "c"], 4)


def test_an_archive_of_errors_only_has_a_gallery(tmp_path):
    ours = ledger.Ledger(Lease(str(tmp_path)), "0", ())
    failed = TABLE.drop_columns("n").filter(pc.is_valid(TABLE[schema.ERROR]))
    storage.write_table(f"{ours.predictions_uri}/part.parquet", failed)
    pages.write_gallery(ours, failed, schema.SLIDES.empty_table(), card(), FACTS)
    assert "truncated" in (tmp_path / "gallery.html").read_text()


@pytest.mark.parametrize(
    ("uri", "folder", "link"),
    [
        ("/data/in/a b#1.png", "/data/out", "../in/a%20b%231.png"),
        ("/data/in/x:y.png", "/data", "in/x%3Ay.png"),
        ("s3://bucket/a b.png", "/data/out", "s3://bucket/a%20b.png"),
        ("gs://bucket/a.png", "s3://bucket/out", "gs://bucket/a.png"),
        ("/data/a.png", "s3://bucket/out", None),
        ("javascript://%0aalert(1)", "/data/out", None),
        ("data://text/html,x", "/data/out", None),
    ],
)
def test_a_link_leads_to_the_file_and_never_to_a_script(uri, folder, link):
    assert pages.link(uri, folder) == link
