"""Each fault is planted alone, and found with its number and its names; a clean table has none."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bcd import schema
from bcd.audit import findings
from bcd.imaging import appearance

NO_PAIRS = np.zeros((0, 3), np.int64)


def row(name: str, **more: Any) -> dict[str, Any]:
    """A good image of a patient of its own."""
    usual = {
        schema.PATIENT: f"p-{name}",
        schema.TUMOR_CLASS: "benign",
        schema.SUBTYPE: "F",
        schema.SHA256: f"content of {name}",
        schema.SIZE_BYTES: 9,
        schema.WIDTH_PX: 700,
        schema.HEIGHT_PX: 460,
        schema.TISSUE_FRACTION: 0.9,
        schema.HEMATOXYLIN_OD_MEAN: 0.2,
        schema.EOSIN_OD_MEAN: 0.1,
    }
    return {schema.IMAGE_ID: name, schema.URI: f"/data/{name}", **usual, **more}


def table(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=schema.AUDIT)


def sentences(found: findings.Finding) -> list[str]:
    return [detail.sentence for detail in found.details]


CLEAN = table(*(row(f"{i}.png", **{schema.EOSIN_OD_MEAN: 0.1 + 0.001 * i}) for i in range(30)))


def test_a_clean_table_has_no_findings() -> None:
    alone = [
        findings.label_conflicts,
        findings.broken,
        findings.blank,
        findings.unusual_sizes,
        findings.without_patient,
    ]
    found = [check(CLEAN) for check in alone] + findings.exact_duplicates(CLEAN)
    found += [findings.stain_outliers(CLEAN, 3.5), *findings.near_duplicates(CLEAN, {}, NO_PAIRS)]
    assert {one.kind: one.count for one in found} == dict.fromkeys((one.kind for one in found), 0)
    assert len(found) == 11


def test_every_kind_is_serious_or_not_and_says_what_to_do() -> None:
    assert [kind for kind, (severity, _) in findings.KINDS.items() if severity == "leak"] == ["leak"]
    order = [severity for severity, _ in findings.KINDS.values()]
    assert order == sorted(order, key=("leak", "warning", "note").index)
    assert all(step.endswith(".") for _, step in findings.KINDS.values())


def test_a_slide_under_two_subtypes_is_named_and_the_published_one_is_known() -> None:
    rows = [row("a", **{schema.SLIDE: "14-13412", schema.SUBTYPE: "DC"})]
    rows += [row(name, **{schema.SLIDE: "14-13412", schema.SUBTYPE: "LC"}) for name in "bc"]
    rows += [row(name, **{schema.SLIDE: "7", schema.SUBTYPE: subtype}) for name, subtype in ("dA", "eF")]
    found = findings.label_conflicts(table(*rows, row("f", **{schema.SLIDE: "8"})))
    assert found.sentence == "2 slides with several subtypes"
    assert sentences(found)[0].startswith(
        "slide 14-13412 is labelled DC (1 image) and LC (2 images); known: published as ductal"
    )
    assert sentences(found)[1] == "slide 7 is labelled A (1 image) and F (1 image)"


def test_duplicates_are_sorted_by_their_labels() -> None:
    same, other = {schema.SHA256: "x", schema.PATIENT: "p"}, {schema.SHA256: "y"}
    rows = table(*(row(name, **same) for name in "abcdef"), *(row(name, **other) for name in "gh"), row("i"))
    across, within = findings.exact_duplicates(rows)
    assert (across.count, within.count) == (1, 1)
    assert sentences(across) == ["g, h are the same file"]
    assert sentences(within) == ["a, b, c, d, and 2 more are the same file"]
    assert across.details[0].images == ("g", "h")
    assert (across.severity, within.severity) == ("warning", "note")
    relabelled = table(row("a", **same), row("b", **same | {schema.SUBTYPE: "A"}))
    assert [one.count for one in findings.exact_duplicates(relabelled)] == [1, 0]


def test_near_duplicates_are_sorted_by_what_they_spoil() -> None:
    rows = [row("a"), row("b"), *(row(name, **{schema.PATIENT: "p"}) for name in "cde")]
    rows.append(row("f", **{schema.PATIENT: "p", schema.SUBTYPE: "A"}))
    rows += [row(name, **{schema.PATIENT: None}) for name in "gh"]
    pairs = np.array([[0, 1, 3], [2, 3, 5], [3, 4, 8], [2, 5, 9], [6, 7, 9]])
    parts = {
        "s1": ["train", "test", "train", "train", "test", "train", None, "test"],
        "s2": ["test", "train", "test", "test", "test", "test", "test", "test"],
    }
    crossing, across, within = findings.near_duplicates(table(*rows), parts, pairs)
    assert sentences(crossing) == [
        "a and b: 3 of 256 bits differ; p-a (F) and p-b (F); s1: train and test; s2: test and train",
        "d and e: 8 of 256 bits differ; p (F); s1: train and test",
    ]
    assert [detail.images for detail in across.details] == [("a", "b"), ("c", "f"), ("g", "h")]
    assert sentences(across)[1:] == [
        "c and f: 9 of 256 bits differ; p (F) and p (A)",
        "g and h: 9 of 256 bits differ; unknown (F)",
    ]
    assert [detail.images for detail in within.details] == [("c", "d"), ("d", "e")]
    assert (crossing.severity, across.severity, within.severity) == ("warning", "warning", "note")


def test_all_are_counted_and_the_first_are_kept() -> None:
    rows = table(*(row(str(i), **{schema.PATIENT: "p"}) for i in range(2)))
    pairs = np.array([[0, 1, 0]] * 250)
    *_, within = findings.near_duplicates(rows, {}, pairs)
    assert (within.count, len(within.details)) == (250, findings.MOST_DETAILS)
    assert within.sentence == "250 pairs of near duplicates within a patient"


def test_broken_images_are_counted_by_code() -> None:
    broken = {schema.ERROR: "too_many_pixels", schema.ERROR_MESSAGE: "9 x 9 px"}
    rows = table(row("a", **broken), row("b", **broken), row("c", **{schema.SIZE_BYTES: 0}), row("d"))
    found = findings.broken(rows)
    assert found.sentence == "3 broken images: 2 too many pixels and 1 empty"
    assert sentences(found) == [
        "a: too_many_pixels: 9 x 9 px",
        "b: too_many_pixels: 9 x 9 px",
        "c: empty: the file has no bytes",
    ]
    assert findings.broken(table(row("a", **{schema.SIZE_BYTES: None}))).count == 0


def test_nearly_blank_images_are_named_and_have_no_unusual_stain() -> None:
    glass = row("glass", **{schema.TISSUE_FRACTION: 0.04, schema.EOSIN_OD_MEAN: 5.0})
    rows = pa.concat_tables([CLEAN, table(glass)])
    found = findings.blank(rows)
    assert (found.sentence, sentences(found)) == (
        "1 image with less than 10% tissue",
        ["glass: 4.0% tissue"],
    )
    assert found.details[0].images == ("glass",)
    assert findings.stain_outliers(rows, 3.5).count == 0


@pytest.mark.parametrize("column", [mean for mean, _ in appearance.STAIN_COLUMNS])
def test_unusual_stain_is_named_with_its_distance(column: str) -> None:
    far = [
        row(name, **{column: value, schema.PATIENT: "p"}) for name, value in (("pale", -0.4), ("dark", 0.9))
    ]
    rows = pa.concat_tables([CLEAN, table(*far)])
    found = findings.stain_outliers(rows, 3.5)
    assert found.sentence == "2 images of 1 patient with unusual stain, robust z beyond 3.5"
    z = appearance.robust_z(rows[column].to_numpy())
    stain, median = column.split("_")[0], np.median(rows[column].to_numpy())
    assert sentences(found)[0] == f"dark: {stain} 0.90, median {median:.2f}, robust z {z[-1]:+.1f}"
    assert [detail.images for detail in found.details] == [("dark",), ("pale",)]
    assert findings.stain_outliers(rows, 1_000).count == 0
    assert findings.stain_outliers(rows.slice(len(rows) - 19), 3.5).count == 0  # too few for a median


def test_other_sizes_are_counted_beside_the_usual() -> None:
    other = [row(name, **{schema.HEIGHT_PX: 456}) for name in ("x", "y")]
    found = findings.unusual_sizes(
        pa.concat_tables([CLEAN, table(*other, row("z", **{schema.WIDTH_PX: None}))])
    )
    assert (found.count, found.sentence) == (2, "2 images not 700 x 460 px like most")
    assert sentences(found) == ["700 x 456 px: 2 images, such as x"]


def test_images_without_a_patient_are_counted() -> None:
    found = findings.without_patient(table(row("a"), row("b", **{schema.PATIENT: None})))
    assert (found.sentence, sentences(found)) == ("1 image of unknown patients", ["b"])
