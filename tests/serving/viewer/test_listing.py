import pyarrow as pa
import pytest
from pydantic import ValidationError

from bcd import schema, storage
from bcd.serving.viewer import listing, scored
from bcd.serving.viewer.listing import Query
from tests import viewed


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return viewed.make(str(tmp_path_factory.mktemp("listed")))


@pytest.fixture(scope="module")
def output(made):
    return scored.open_scored(made.uri)


def names(output, **options):
    return [row["name"] for row in listing.page(output, Query(kind="fields", **options)).rows]


def test_fields_are_sorted_by_each_key_and_nulls_are_last(made, output):
    fields = [row for name, row in made.rows.items() if name.startswith("field")]
    for key, column in (("probability", schema.PROBABILITY_MALIGNANT), ("novelty", schema.NOVELTY)):
        known = sorted((row for row in fields if row[column] is not None), key=lambda row: row[column])
        rising = [row[schema.IMAGE_ID] for row in known]
        assert names(output, sort=key) == [*rising, "field 3.png"]
        assert names(output, sort=key, descending=True) == [*rising[::-1], "field 3.png"]
    assert names(output) == [f"field {n}.png" for n in range(viewed.FIELDS)]
    assert names(output, sort="patient")[:3] == ["field 0.png", "field 3.png", "field 6.png"]


def test_a_page_is_a_part_of_the_order(output):
    found = listing.page(output, Query(kind="fields", offset=4, limit=2))
    assert (found.total, [row["name"] for row in found.rows]) == (7, ["field 4.png", "field 5.png"])


def test_filters(made, output):
    fields = {name: row for name, row in made.rows.items() if name.startswith("field")}
    malignant = [n for n, row in fields.items() if (row[schema.PROBABILITY_MALIGNANT] or 0) >= 0.5]
    benign = [n for n, row in fields.items() if (row[schema.PROBABILITY_MALIGNANT] or 1) <= 0.5]
    assert malignant
    assert benign
    assert names(output, least=0.5) == malignant
    assert names(output, most=0.5) == benign
    assert names(output, unlike=True) == [n for n, row in fields.items() if row[schema.WARNINGS]]
    assert names(output, error="any") == names(output, error="truncated") == ["field 3.png"]
    assert names(output, error="none") == [name for name in fields if name != "field 3.png"]
    assert names(output, text="ELD 5") == ["field 5.png"]
    assert names(output, text="p1") == ["field 1.png", "field 4.png"]
    assert names(output, text="(", error="bad") == []


def test_slides_are_listed_by_the_same_keys(made, output):
    found = listing.page(output, Query(sort="share", descending=True))
    assert [(row["name"], row["error"]) for row in found.rows] == [
        (viewed.SLIDE, None),
        (viewed.BROKEN, "unreadable"),
    ]
    assert found.rows[0]["tiles"] == len(made.tiles())
    assert listing.page(output, Query(text="case 7", unlike=True)).total == 1
    assert listing.page(output, Query(error="any")).rows[0]["name"] == viewed.BROKEN


def test_only_the_first_rows_are_kept_of_many_batches(made, output, monkeypatch):
    """Each batch is a quarter of a row group of the table."""
    monkeypatch.setattr(listing, "BATCH_ROWS", 2)
    seen = []
    first = listing.pc.sort_indices
    monkeypatch.setattr(
        listing.pc, "sort_indices", lambda rows, order: seen.append(len(rows)) or first(rows, order)
    )
    expected = names(output, sort="probability", descending=True, limit=200)[:3]
    seen.clear()
    assert names(output, sort="probability", descending=True, limit=3) == expected
    assert max(seen) <= 3 + 2


def test_equal_values_are_in_the_order_of_names(tmp_path):
    must = {schema.URI: "u", schema.MODEL_ID: "m", schema.BCD_VERSION: "1"}
    rows = [
        must | {schema.IMAGE_ID: f"{n:03}", schema.PROBABILITY_MALIGNANT: n % 2} for n in range(99, -1, -1)
    ]
    table = pa.Table.from_pylist(rows, schema=schema.predictions(1, 1))
    storage.write_table(str(tmp_path / "predictions/a.parquet"), table)
    output = scored.Scored(str(tmp_path), "1", {}, schema.SLIDES.empty_table())
    odd, even = ([f"{n:03}" for n in range(start, 100, 2)] for start in (1, 0))
    assert names(output, sort="probability", descending=True, limit=60) == [*odd, *even][:60]


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "tiles"},
        {"kind": "fields", "sort": "tiles"},
        {"sort": "uri"},
        {"least": 2},
        {"least": "nan"},
        {"offset": -1},
        {"limit": 1_000},
        {"offset": 9_990},
        {"text": "x" * 201},
        {"other": 1},
    ],
)
def test_what_the_list_does_not_know_is_rejected(options):
    with pytest.raises(ValidationError):
        Query.model_validate(options)
