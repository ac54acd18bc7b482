"""Given splits, facts and the verdict; all published names with the official folds."""

from pathlib import Path

import pyarrow as pa
import pytest

from bcd import schema
from bcd.audit import summary
from bcd.data import breakhis
from bcd.data.manifest import Manifest, Row
from bcd.errors import DataError
from bcd.storage import File
from tests.audit.test_findings import CLEAN, NO_PAIRS, row, table


def audited(rows: pa.Table, *splits: summary.Split, warnings: tuple[str, ...] = ()) -> summary.Audit:
    return summary.summarise(rows, warnings, splits, NO_PAIRS, 3.5)


def named(rows: pa.Table, **parts: str | None) -> summary.Split:
    roles = {name: part for name, part in parts.items() if part}
    return summary.place_rows(rows, roles, "mine")


# --- real names

# Cases that are in train and in test of each official fold; 14-13412 is a patient too.
CASES = {
    1: {"14-22549", "14-29960", "14-21998", "14-16184", "14-13412", "14-15570", "14-18842", "14-19979"},
    2: {"14-22549", "14-29960", "14-14134", "14-16184", "14-15570", "14-18842"},
    3: {"14-22549", "14-29960", "14-14134", "14-13412", "14-15570", "14-18842", "14-19979"},
    4: {"14-22549", "14-29960", "14-21998", "14-23060", "14-16184", "14-15570", "14-18842"},
    5: {"14-22549", "14-21998", "14-23060", "14-16184", "14-13412", "14-19979"},
}


@pytest.fixture(scope="module")
def official(real_data: Path) -> summary.Audit:
    folds = {n: real_data / f"folds/dsfold{n}.txt" for n in range(1, 6)}
    roles = {n: breakhis.read_fold(path.read_text(), path.name) for n, path in folds.items()}
    index = breakhis.index(File(uri=name, path=name, size_bytes=1) for name in roles[1])
    splits = [summary.place_rows(index, roles[n], f"fold {n}") for n in roles]
    warnings = breakhis.count_warnings(index)
    return audited(schema.fill(index, schema.AUDIT), *splits, warnings=tuple(warnings))


@pytest.mark.real
def test_the_published_names_are_82_labels_of_81_slides_in_70_cases(official: summary.Audit) -> None:
    facts = official.facts
    assert (facts.n_images, facts.n_cases, facts.n_slides, facts.n_slide_labels) == (7909, 70, 81, 82)
    assert facts.n_patients == 81
    assert facts.by_class == {"benign": 2480, "malignant": 5429}
    assert facts.by_magnification == {"40X": 1995, "100X": 2081, "200X": 2013, "400X": 1820}
    assert facts.by_subtype == {s: sum(n.values()) for s, n in sorted(breakhis.EXPECTED_COUNTS.items())}
    assert all(here == published for by in official.counts.values() for here, published in by.values())


@pytest.mark.real
def test_official_folds_1_3_and_5_leak_14_13412(official: summary.Audit) -> None:
    assert official.leaking_splits == ("fold 1", "fold 3", "fold 5")
    assert official.verdict.startswith("fold 1, fold 3 and fold 5 leak; 2 findings to decide on")
    groups = {given.name: given.groups for given in official.splits}
    assert groups == {f"fold {n}": ("14-13412",) if n in (1, 3, 5) else () for n in CASES}
    leaks = [one for one in official.findings if one.severity == "leak"]
    assert [one.sentence for one in leaks] == [
        f"fold {n} leaks: 1 patient or slide in several parts" for n in (1, 3, 5)
    ]
    assert all(one.details[0].sentence.startswith("patient, slide 14-13412 is in train") for one in leaks)
    assert [one.kind for one in official.findings].count("label_conflict") == 1


@pytest.mark.real
def test_the_cases_that_cross_each_official_fold_are_named(official: summary.Audit) -> None:
    assert [set(given.cases) for given in official.splits] == list(CASES.values())
    found = [one for one in official.findings if one.kind == "case_crossing"]
    assert [one.count for one in found] == [8, 6, 7, 7, 6]
    assert {one.severity for one in found} == {"warning"}


# --- tables by hand


def test_nothing_found_is_said() -> None:
    assert audited(CLEAN).verdict == "nothing to decide on before training"
    assert audited(CLEAN).findings == ()
    assert audited(CLEAN).counts == {}
    parts = dict.fromkeys(CLEAN[schema.IMAGE_ID].to_pylist(), "train")
    assert audited(CLEAN, summary.place_rows(CLEAN, parts, "s")).verdict == (
        "no leak in s; nothing to decide on before training"
    )


def test_names_are_counted_only_where_subtype_and_magnification_are_known() -> None:
    """A manifest of BreaKHis files may give neither: nought of 864 would be wrong."""
    name = "SOB_B_A-14-22549AB-40-001.png"
    known = {schema.SUBTYPE: "A", schema.MAGNIFICATION: 40}
    assert audited(table(row(name, **known))).counts["A"]["40"][0] == 1
    assert audited(table(row(name, **known | {schema.SUBTYPE: None}))).counts == {}


def test_a_split_that_was_checked_in_part_is_said_to_be() -> None:
    rows = table(row("a"), row("b"))
    assert audited(rows, named(rows, a="train", b="test", z="test")).verdict == (
        "no leak in mine among the images that are in both; nothing to decide on before training"
    )


@pytest.mark.parametrize(
    ("column", "leaks", "cases"),
    [(schema.PATIENT, 1, 0), (schema.SLIDE, 1, 0), (schema.SHA256, 1, 0), (schema.CASE, 0, 1)],
)
def test_only_patients_slides_and_images_fail_an_audit(column: str, leaks: int, cases: int) -> None:
    rows = table(row("a", **{column: "shared"}), row("b", **{column: "shared"}), row("c"))
    crossing = audited(rows, named(rows, a="train", b="test", c="validation"))
    facts = crossing.splits[0]
    assert (len(facts.groups) + len(facts.pictures), len(facts.cases)) == (leaks, cases)
    assert crossing.leaking_splits == (("mine",) if leaks else ())
    assert facts.n_images == {"train": 1, "validation": 1, "test": 1}
    apart = audited(rows, named(rows, a="train", b="train", c="test"))
    assert apart.leaking_splits == ()
    assert not apart.splits[0].cases


def test_an_image_in_two_parts_is_named_by_id_and_not_by_hash() -> None:
    rows = table(row("a", **{schema.SHA256: "f00"}), row("b", **{schema.SHA256: "f00"}))
    found = audited(rows, named(rows, a="train", b="test")).findings[0]
    assert found.sentence == "mine leaks: 1 image in several parts"
    assert found.details[0].sentence == "one image is in train (as a) and in test (as b)"


def test_the_most_serious_comes_first_and_warnings_are_counted_by_kind() -> None:
    rows = table(
        row("a", **{schema.PATIENT: "p", schema.SIZE_BYTES: 0}),
        row("b", **{schema.PATIENT: "p", schema.WIDTH_PX: 1}),
        row("c", **{schema.PATIENT: None, schema.WIDTH_PX: 1}),
    )
    split = named(rows, a="train", b="test", z="test")
    found = audited(rows, split, warnings=("2 missing", "3 surplus"))
    kinds = [(one.kind, one.count) for one in found.findings]
    assert kinds == [
        ("leak", 1),
        ("broken", 1),
        ("no_patient", 1),
        ("published_counts", 2),
        ("size", 1),
        ("coverage", 2),
    ]
    assert found.verdict == "mine leaks; 3 findings to decide on before training"
    coverage = [detail.sentence for detail in found.findings[-1].details]
    assert coverage == ["mine: 1 image without a part", "mine: 1 entry without an image"]


def test_images_are_found_in_a_split_by_id_uri_or_unique_file_name() -> None:
    names = ("x/1.png", "y/1.png", "z/2.png")
    rows = table(*(row(name) for name in names))
    roles = {"x/1.png": "train", "/data/y/1.png": "test", "2.png": "validation", "1.png": "train"}
    assert summary.place_rows(rows, roles, "s") == summary.Split("s", ["train", "test", "validation"], 1)
    assert summary.place_rows(rows, {"1.png": "train", "2.png": "test"}, "s").parts == [None, None, "test"]
    saved, name = "a/SOB_B_A-14-1-40-001.TIF", "SOB_B_A-14-1-40-001.png"  # as the folds have it
    assert summary.place_rows(table(row(saved)), {name: "test"}, "s").parts == ["test"]
    with pytest.raises(DataError, match=r"s: contains none of the images, by id, URI or file name"):
        summary.place_rows(rows, {"other.png": "train"}, "s")


def given(*rows: dict[str, str]) -> Manifest:
    """A split file called s.csv."""
    written = tuple(Row(f"s.csv, line {line}", row) for line, row in enumerate(rows, 2))
    return Manifest("s.csv", tuple({name: None for row in rows for name in row}), written)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"name": "a", "part": "train"}], r"s.csv: needs the columns image_id \(or uri\) and part"),
        ([{"image_id": "a"}], r"needs the columns image_id \(or uri\) and part"),
        ([{"uri": "a", "part": "val"}], r"line 2: a has part 'val'; expected one of train, validation, test"),
        ([{"uri": "a", "part": "test"}, {"uri": "b"}], r"line 3: b has part None; expected one of"),
        ([{"uri": "a", "part": "test"}, {"part": "test"}], r"line 3: the uri is empty"),
        ([{"uri": "a", "part": "train"}, {"uri": "a", "part": "test"}], r"a is in train and in test"),
    ],
)
def test_a_split_that_cannot_be_used_is_one_sentence(rows: list[dict[str, str]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        summary.read_roles(given(*rows))


def test_a_split_file_is_read_by_image_id_before_uri() -> None:
    rows = [("a", "u", "train"), ("b", "v", "test"), ("b", "v", "test")]
    written = given(*(dict(zip(("image_id", "uri", "part"), row, strict=True)) for row in rows))
    assert summary.read_roles(written) == {"a": "train", "b": "test"}


def test_the_result_survives_json() -> None:
    result = audited(CLEAN, warnings=("1 missing",))
    assert summary.Audit.model_validate_json(result.model_dump_json()) == result


def test_the_names_of_many_cases_are_cut_short() -> None:
    rows = table(*(row(f"{i:02}{side}", **{schema.CASE: f"c{i}"}) for i in range(12) for side in "ab"))
    parts = {name: "train" if name.endswith("a") else "test" for name in rows[schema.IMAGE_ID].to_pylist()}
    found = audited(rows, summary.place_rows(rows, parts, "s")).findings[0]
    assert found.sentence.startswith("s: 12 cases in several parts (c0, c1, ")
    assert found.sentence.endswith("c9, and 2 more)")
