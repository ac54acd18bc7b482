import pandas as pd
import pytest

from bcd import schema
from bcd.data import index
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
        "malignant/Ductal Carcinoma/p3/c.tif",
        "lobular_carcinoma/p4/d.png",
        "notes.txt",
    )
    table, warnings = index.read_index(str(tmp_path))
    columns = (schema.IMAGE_ID, schema.PATIENT, schema.TUMOR_CLASS, schema.SUBTYPE, schema.SIZE_BYTES)
    assert [tuple(row[c] for c in columns) for row in table.to_pylist()] == [
        ("benign/p1/a.png", "p1", "benign", None, 15),
        ("lobular_carcinoma/p4/d.png", "p4", "malignant", "LC", 26),
        ("malignant/Ductal Carcinoma/p3/c.tif", "p3", "malignant", "DC", 35),
        ("malignant/p2/deep/b.jpg", "p2", "malignant", None, 23),
    ]
    assert table.schema == schema.INDEX
    assert warnings == []


def test_a_flat_folder_per_class_has_no_patients(tmp_path):
    touch(tmp_path, "benign/a.png", "malignant/b.png")
    table, _ = index.read_index(str(tmp_path))
    assert table[schema.PATIENT].null_count == 2


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.parquet"])
def test_a_manifest_takes_relative_and_absolute_uris(tmp_path, name):
    touch(tmp_path, "in/a.png", "b.png")
    rows = [
        {"uri": "in/a.png", "tumor_class": "benign", "patient": "007", "mpp": 0.5},
        {"uri": str(tmp_path / "b.png"), "tumor_class": "malignant", "patient": "8", "mpp": None},
    ]
    table, _ = index.read_index(manifest(tmp_path, rows, name))
    first = next(row for row in table.to_pylist() if row[schema.IMAGE_ID] == "in/a.png")
    assert (first[schema.URI], first[schema.PATIENT]) == (str(tmp_path / "in/a.png"), "007")
    assert (first[schema.MPP], first[schema.SIZE_BYTES]) == (0.5, 8)


def test_a_manifest_of_subtypes_needs_no_tumor_class(tmp_path):
    touch(tmp_path, "a.png")
    table, _ = index.read_index(manifest(tmp_path, [{"uri": "a.png", "subtype": "PC", "patient": "1"}]))
    assert table[schema.TUMOR_CLASS].to_pylist() == ["malignant"]


GOOD = {"uri": "a.png", "tumor_class": "benign", "patient": "1"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"tumor_class": "benign"}], "no column 'uri'; it has tumor_class"),
        ([{"uri": "a.png", "patient": "1"}], "needs a column 'tumor_class' or 'subtype' .*has uri, patient"),
        (
            [{"uri": "a.png", "Diagnosis": "1"}],
            "has uri, Diagnosis; column 'Diagnosis' is not used; call it 'tumor_class' to use it",
        ),
        (
            [GOOD | {"tumor_class": "Bengin"}],
            "line 2: unknown tumor_class 'Bengin'; expected benign or malignant",
        ),
        ([GOOD, GOOD | {"uri": None}], "line 3: the uri is empty"),
        ([GOOD | {"subtype": "XX"}], "line 2: unknown subtype 'XX'; expected one of A, F"),
        ([GOOD | {"subtype": "DC"}], "line 2: subtype DC is malignant, not benign"),
        ([GOOD | {"tumor_class": " "}], "line 2: the tumor_class is empty; expected benign or malignant"),
        ([GOOD | {"tumor_class": "1"}], "unknown tumor_class '1'; .* --classes benign=NAME malignant=NAME"),
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
        ([GOOD | {"mpp": "0.003"}], "line 2: the mpp is 0.003; between 0.05 and 20 µm/px are possible"),
        ([GOOD | {"mpp": "490"}], "line 2: the mpp is 490; between 0.05 and 20 µm/px are possible"),
    ],
)
def test_a_wrong_manifest_is_refused_by_row(tmp_path, rows, said):
    touch(tmp_path, "a.png", "in/b.png")
    with pytest.raises(DataError, match=said):
        index.read_index(manifest(tmp_path, rows))


def column(table, name):
    return table[name].to_pylist()


@pytest.mark.parametrize("name", ["manifest.csv", "manifest.parquet"])
@pytest.mark.parametrize("twin", [12.0, "12.0", " 12", "12 ", "12\u00a0", "\ufeff12", "１２"])
def test_one_patient_has_one_id(tmp_path, name, twin):
    touch(tmp_path, "a.png", "b.png")
    frame = pd.DataFrame([GOOD | {"patient": "12"}, GOOD | {"uri": "b.png", "patient": str(twin)}])
    table, warnings = index.read_index(manifest(tmp_path, frame, name))
    assert column(table, schema.PATIENT) == ["12", "12"]
    assert warnings == []


def test_numbers_of_parquet_are_ids_and_classes(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    rows = {"uri": ["a.png", "b.png"], "tumor_class": [0, 1], "patient": [7.0, None], "case": [3, 4]}
    table, _ = index.read_index(manifest(tmp_path, rows, "m.parquet"), ["benign=0", "malignant=1"])
    assert column(table, schema.PATIENT) == ["7", None]
    assert column(table, schema.CASE) == ["3", "4"]
    assert column(table, schema.TUMOR_CLASS) == ["benign", "malignant"]


@pytest.mark.parametrize(
    ("written", "classes", "expected"),
    [
        (" Benign", (), "benign"),
        ("MALIGNANT", (), "malignant"),
        ("1", ("benign=0", "malignant=1"), "malignant"),
        ("b", ("benign=B", "malignant=M"), "benign"),
        ("Tumor ", ("benign=normal", "malignant=tumor"), "malignant"),
        ("malignant", ("benign=0", "malignant=1"), "malignant"),
    ],
)
def test_class_names_are_forgiven_or_given(tmp_path, written, classes, expected):
    touch(tmp_path, "a.png")
    table, _ = index.read_index(manifest(tmp_path, [GOOD | {"tumor_class": written}]), classes)
    assert column(table, schema.TUMOR_CLASS) == [expected]


@pytest.mark.parametrize("subtype", ["dc", " DC ", "Ductal Carcinoma", "ductal_carcinoma"])
def test_subtypes_are_codes_or_names(tmp_path, subtype):
    touch(tmp_path, "a.png")
    table, _ = index.read_index(manifest(tmp_path, [{"uri": "a.png", "subtype": subtype, "patient": "1"}]))
    assert (column(table, schema.SUBTYPE), column(table, schema.TUMOR_CLASS)) == (["DC"], ["malignant"])


def test_a_spreadsheet_is_read_as_it_was_meant(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    text = "\ufeffURI, Patient ,Tumor Class,Patient_ID,Fold\na.png,12,Benign,x,1\nb.png,012, malignant,y,2\n"
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    table, warnings = index.read_index(str(tmp_path / "m.csv"))
    assert column(table, schema.PATIENT) == ["12", "012"]
    assert warnings == [
        "column 'Patient_ID' is not used; the column 'patient' is",
        "column 'Fold' is not used; call it 'part' to use it",
        "patient ids differ only in case, zeros or punctuation: '012' and '12'. They count as different "
        "patients: write the id of one patient in one way",
    ]


def test_a_given_part_is_kept(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png")
    parts = {"a.png": "Train", "b.png": "val", "c.png": "testing "}
    rows = [GOOD | {"uri": uri, "part": part} for uri, part in parts.items()]
    table, warnings = index.read_index(manifest(tmp_path, rows))
    assert (column(table, schema.PART), warnings) == (["train", "validation", "test"], [])
    assert table.schema == schema.SPLIT


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (["train", "hold"], "line 3: unknown part 'hold'; expected train, validation, test"),
        (["train", None], "b.png is in no part, others are; expected train, validation, test for every"),
        (["train", "nan"], "b.png is in no part, others are"),
    ],
)
def test_a_part_that_is_none_is_refused(tmp_path, parts, said):
    touch(tmp_path, "a.png", "b.png")
    rows = [GOOD | {"uri": uri, "part": part} for uri, part in zip(("a.png", "b.png"), parts, strict=True)]
    with pytest.raises(DataError, match=said):
        index.read_index(manifest(tmp_path, rows))


def test_one_part_alone_is_no_split(tmp_path):
    touch(tmp_path, "a.png")
    table, warnings = index.read_index(manifest(tmp_path, [GOOD | {"part": "train"}]))
    assert (table.schema, warnings) == (
        schema.INDEX,
        ["all images are in the part train: this is no split"],
    )


def test_breakhis_names_keep_the_division_of_their_tree(tmp_path):
    touch(tmp_path, "Train/SOB_B_A-14-22549AB-40-001.png", "val/SOB_M_DC-14-2523-40-010.png")
    table, _ = index.read_index(str(tmp_path))
    assert column(table, schema.PART) == ["train", "validation"]
    assert column(table, schema.PATIENT) == ["14-22549AB", "14-2523"]


def test_an_unreadable_or_empty_manifest_is_refused(tmp_path):
    (tmp_path / "m.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="not a readable manifest"):
        index.read_index(str(tmp_path / "m.parquet"))
    (tmp_path / "m.csv").write_text("uri,tumor_class\n")
    with pytest.raises(DataError, match="the manifest has no rows"):
        index.read_index(str(tmp_path / "m.csv"))
    (tmp_path / "e.csv").write_text("")
    with pytest.raises(DataError, match="not a readable manifest"):
        index.read_index(str(tmp_path / "e.csv"))


def test_a_missing_or_empty_folder_is_refused(tmp_path):
    with pytest.raises(StorageError, match="there is no such folder"):
        index.read_index(str(tmp_path / "none"))
    touch(tmp_path, "readme.txt")
    with pytest.raises(DataError, match=r"no image below it; expected .png"):
        index.read_index(str(tmp_path))


def test_skipped_entries_of_a_tree_are_named(tmp_path):
    touch(
        tmp_path,
        "benign/p1/a.png",
        "malignant/p2/b.png",
        "benign/p1/c.bmp",
        "benign/p1/d.BMP",
        "malignant/e.svs",
    )
    (tmp_path / "benign/p1/gone.png").symlink_to("/nowhere")
    (tmp_path / "more").symlink_to("benign")
    table, warnings = index.read_index(str(tmp_path))
    assert table[schema.IMAGE_ID].to_pylist() == ["benign/p1/a.png", "malignant/p2/b.png"]
    expected = "expected .png, .jpg, .jpeg, .tif, .tiff"
    assert warnings == [
        "skipped benign/p1/gone.png: a link to /nowhere: No such file or directory",
        f"skipped 2 .bmp files; {expected}",
        f"skipped 1 .svs file; {expected}",
        "skipped 1 link to folders that are already listed",
    ]


def test_images_without_any_class_are_refused_by_name(tmp_path):
    touch(tmp_path, "benign/a.png", "somewhere/b.png")
    with pytest.raises(DataError, match=r"somewhere/b.png is in no class folder"):
        index.read_index(str(tmp_path))


def test_select_magnifications_keeps_rows_without_one(tmp_path):
    touch(tmp_path, "a.png", "b.png", "c.png")
    rows = [
        GOOD | {"uri": n, "magnification": m} for n, m in (("a.png", "40"), ("b.png", "100"), ("c.png", None))
    ]
    table, _ = index.read_index(manifest(tmp_path, rows))
    assert index.select_magnifications(table, [40])[schema.IMAGE_ID].to_pylist() == ["a.png", "c.png"]
    with pytest.raises(DataError, match=r"no image has a magnification of \[400\]"):
        index.select_magnifications(table.slice(0, 2), [400])


@pytest.mark.real
def test_the_published_tree(real_data):
    table, warnings = index.read_index(str(real_data / "breakhis/BreaKHis_v1"))
    assert len(warnings) == 1
    assert len(table) == 78
    assert len(set(table[schema.CASE].to_pylist())) == 21
    assert len(set(table[schema.PATIENT].to_pylist())) == 24
    assert any("7,909" in warning for warning in warnings)


@pytest.mark.real
def test_own_data_by_manifest(real_data):
    table, warnings = index.read_index(str(real_data / "glas/manifest.csv"))
    assert warnings == []
    classes = table[schema.TUMOR_CLASS].to_pylist()
    assert (classes.count("benign"), classes.count("malignant")) == (35, 77)
    assert len(set(table[schema.PATIENT].to_pylist())) == 11
