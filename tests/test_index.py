import pandas as pd
import pytest

from bcd import index, schema
from bcd.errors import DataError, StorageError


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def manifest(root, rows, name="manifest.csv"):
    frame = pd.DataFrame(rows)
    frame.to_csv(root / name, index=False) if name.endswith("csv") else frame.to_parquet(root / name)
    return str(root / name)


def test_a_folder_per_class_with_patients(tmp_path):
    touch(
        tmp_path,
        "benign/p1/a.png",
        "malignant/p2/deep/b.jpg",
        "malignant/DC/p3/c.tif",
        "LC/p4/d.png",
        "notes.txt",
    )
    table, warnings = index.read(str(tmp_path))
    columns = (schema.IMAGE_ID, schema.PATIENT, schema.TUMOR_CLASS, schema.SUBTYPE, schema.SIZE_BYTES)
    assert [tuple(row[c] for c in columns) for row in table.to_pylist()] == [
        ("LC/p4/d.png", "p4", "malignant", "LC", 11),
        ("benign/p1/a.png", "p1", "benign", None, 15),
        ("malignant/DC/p3/c.tif", "p3", "malignant", "DC", 21),
        ("malignant/p2/deep/b.jpg", "p2", "malignant", None, 23),
    ]
    assert table.schema == schema.INDEX
    assert warnings == []


def test_a_flat_folder_per_class_has_no_patients(tmp_path):
    touch(tmp_path, "benign/a.png", "malignant/b.png")
    table, _ = index.read(str(tmp_path))
    assert table[schema.PATIENT].null_count == 2


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.parquet"])
def test_a_manifest_takes_relative_and_absolute_uris(tmp_path, name):
    touch(tmp_path, "in/a.png", "b.png")
    rows = [
        {"uri": "in/a.png", "tumor_class": "benign", "patient": "007", "mpp": 0.5},
        {"uri": str(tmp_path / "b.png"), "tumor_class": "malignant", "patient": "8", "mpp": None},
    ]
    table, _ = index.read(manifest(tmp_path, rows, name))
    first = next(row for row in table.to_pylist() if row[schema.IMAGE_ID] == "in/a.png")
    assert (first[schema.URI], first[schema.PATIENT]) == (str(tmp_path / "in/a.png"), "007")
    assert (first[schema.MPP], first[schema.SIZE_BYTES]) == (0.5, 8)


def test_a_manifest_of_subtypes_needs_no_tumor_class(tmp_path):
    touch(tmp_path, "a.png")
    table, _ = index.read(manifest(tmp_path, [{"uri": "a.png", "subtype": "PC", "patient": "1"}]))
    assert table[schema.TUMOR_CLASS].to_pylist() == ["malignant"]


GOOD = {"uri": "a.png", "tumor_class": "benign", "patient": "1"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"tumor_class": "benign"}], "no column 'uri'; it has tumor_class"),
        ([{"uri": "a.png", "patient": "1"}], "needs a column 'tumor_class' or 'subtype'"),
        (
            [GOOD | {"tumor_class": "Bengin"}],
            "line 2: unknown tumor_class 'Bengin'; expected benign or malignant",
        ),
        ([GOOD, GOOD | {"uri": None}], "line 3: the uri is empty"),
        ([GOOD | {"subtype": "XX"}], "line 2: unknown subtype 'XX'; expected one of A, F"),
        ([GOOD | {"subtype": "DC"}], "line 2: subtype DC is malignant, not benign"),
        ([GOOD, GOOD], "line 3: image id 'a.png' is in line 2 already"),
        (
            [GOOD | {"image_id": "1"}, GOOD | {"image_id": "2"}],
            r"line 3: file '.*/a.png' is in line 2 already",
        ),
        ([GOOD, GOOD | {"uri": "./a.png"}], r"line 3: file '.*/a.png' is in line 2 already"),
        ([GOOD | {"uri": "no.png"}], "line 2: .*/no.png does not exist; uris are relative to the manifest"),
        ([GOOD | {"uri": r"in\a.png"}], r"does not exist; write / between folders, not \\"),
        ([GOOD | {"uri": "in"}], "line 2: .*/in is a folder; expected an image"),
        (
            [GOOD | {"magnification": "20"}],
            "line 2: magnification '20'; expected one of 40, 100, 200, 400, or none",
        ),
        ([GOOD | {"mpp": "wide"}], "line 2: the mpp is 'wide'; expected µm per pixel"),
    ],
)
def test_a_wrong_manifest_is_refused_by_row(tmp_path, rows, said):
    touch(tmp_path, "a.png", "in/b.png")
    with pytest.raises(DataError, match=said):
        index.read(manifest(tmp_path, rows))


def test_an_unreadable_or_empty_manifest_is_refused(tmp_path):
    (tmp_path / "m.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="not a readable manifest"):
        index.read(str(tmp_path / "m.parquet"))
    (tmp_path / "m.csv").write_text("uri,tumor_class\n")
    with pytest.raises(DataError, match="the manifest has no rows"):
        index.read(str(tmp_path / "m.csv"))
    (tmp_path / "e.csv").write_text("")
    with pytest.raises(DataError, match="not a readable manifest"):
        index.read(str(tmp_path / "e.csv"))


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(StorageError, match="there is no such folder"):
        index.read(str(tmp_path / "none"))
    touch(tmp_path, "readme.txt")
    with pytest.raises(DataError, match=r"no image below it; expected .png"):
        index.read(str(tmp_path))


def test_images_without_any_class_are_refused_by_name(tmp_path):
    touch(tmp_path, "benign/a.png", "somewhere/b.png")
    with pytest.raises(DataError, match=r"somewhere/b.png lies in no class folder"):
        index.read(str(tmp_path))


def test_select_magnifications_keeps_rows_without_one(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png")
    rows = [
        GOOD | {"uri": n, "magnification": m} for n, m in (("a.png", "40"), ("b.png", "100"), ("c.png", None))
    ]
    table, _ = index.read(manifest(tmp_path, rows))
    assert index.select_magnifications(table, [40])[schema.IMAGE_ID].to_pylist() == ["a.png", "c.png"]
    with pytest.raises(DataError, match=r"no image has a magnification of \[400\]"):
        index.select_magnifications(table.slice(0, 2), [400])


@pytest.mark.real
def test_the_published_tree(real_data):
    table, warnings = index.read(str(real_data / "breakhis/BreaKHis_v1"))
    assert len(table) == 78
    assert len(set(table[schema.CASE].to_pylist())) == 21
    assert len(set(table[schema.PATIENT].to_pylist())) == 24
    assert any("7,909" in warning for warning in warnings)


@pytest.mark.real
def test_own_data_by_manifest(real_data):
    table, _ = index.read(str(real_data / "glas/manifest.csv"))
    classes = table[schema.TUMOR_CLASS].to_pylist()
    assert (classes.count("benign"), classes.count("malignant")) == (35, 77)
    assert len(set(table[schema.PATIENT].to_pylist())) == 11
