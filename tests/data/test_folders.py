"""Which folder is the class, the patient and the part; and that ambiguous trees are rejected."""

import pytest

from bcd import schema
from bcd.data import folders
from bcd.errors import DataError
from bcd.storage import File
from bcd.taxonomy import given_names


def read(*paths, classes=()):
    files = [File(f"/data/{path}", path, 1) for path in paths]
    return folders.rows_of_tree("data", files, given_names(classes))


def labels(*paths, classes=()):
    """Class, subtype and patient of every path."""
    rows, _ = read(*paths, classes=classes)
    return [(row[schema.TUMOR_CLASS], row[schema.SUBTYPE], row[schema.PATIENT]) for row in rows]


@pytest.mark.parametrize("sites", [("A", "F"), ("DC", "PT"), ("Lyon", "Porto")])
def test_a_hospital_above_the_classes_is_no_class(sites):
    paths = [f"{s}/{c}/P1/0.png" for s in sites for c in ("malignant", "benign")]
    assert labels(*paths) == [(c, None, f"{s}/P1") for s in sites for c in ("malignant", "benign")]
    assert read(*paths)[1][-1] == (
        f"folders above the classes ({sites[0]}, {sites[1]}) are read as sites, and patients as "
        "SITE/PATIENT. An id of several sites, such as P1, counts as several people. If that is wrong, "
        "write a manifest with uri, tumor_class and patient"
    )


def test_where_a_tree_was_unpacked_is_no_site():
    inside = ["benign/P1/0.png", "malignant/P2/0.png"]
    for root in ("Hospital", "archive/Set_v1/Set_v1", "malignant tumours"):
        assert read(*(f"{root}/{path}" for path in inside))[1] == []
        assert labels(*(f"{root}/{path}" for path in inside)) == labels(*inside)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (" Benign /P1/0.png", ("benign", None, "P1")),
        ("BENIGN/P1/malignant_0.png", ("benign", None, "P1")),
        ("benign/SOB/adenosis/P1/40X/0.png", ("benign", "A", "P1")),
        ("Phyllodes Tumor/P1/0.png", ("benign", "PT", "P1")),
        ("benign/P1/adenosis/0.png", ("benign", "A", "P1")),
        ("benign/0.png", ("benign", None, None)),
    ],
)
def test_a_label_is_that_of_the_class_folder(path, expected):
    assert labels(path, "malignant/P2/0.png")[0] == expected


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("benign/P1/Malignant/0.png", "benign and Malignant"),
        ("malignant/benign/P1/0.png", "malignant and benign"),
        ("benign/ductal_carcinoma/P1/0.png", "benign and ductal_carcinoma"),
        ("benign/adenosis/fibroadenoma/0.png", "benign and adenosis and fibroadenoma"),
        ("benign/P1_malignant/0.png", "benign and P1_malignant"),
    ],
)
def test_folders_of_several_classes_are_refused(path, said):
    with pytest.raises(DataError, match=rf"{path}: its folders {said} name different classes"):
        read(path, "malignant/P2/0.png")


def test_codes_are_classes_where_they_are_a_level():
    assert labels("A/P1/0.png", "dc/P2/0.png") == [("benign", "A", "P1"), ("malignant", "DC", "P2")]
    assert labels("X/A/P1/0.png", "Y/DC/P1/0.png") == [("benign", "A", "X/P1"), ("malignant", "DC", "Y/P1")]
    assert labels("benign/A/P1/0.png", "malignant/DC/0.png") == [
        ("benign", "A", "P1"),
        ("malignant", "DC", None),
    ]


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (("LC/P1/0.png", "benign/P2/0.png"), "LC/P1/0.png is in no class folder"),
        (("F/0.png", "benign/P2/0.png"), "F/0.png is in no class folder"),
        (("A/P1/0.png", "B/P2/0.png"), "B/P2/0.png is in no class folder"),
        (("A/DC/0.png", "F/A/0.png"), "A/DC/0.png: its folders A and DC name different classes"),
        (("benign/A/0.png", "malignant/A/0.png"), "malignant/A/0.png: its folders malignant and A name"),
    ],
)
def test_codes_that_may_be_anything_are_refused(paths, said):
    with pytest.raises(DataError, match=said):
        read(*paths)


def test_patients_named_by_letters_are_patients():
    paths = ("benign/A/0.png", "benign/B/0.png", "malignant/C/0.png")
    assert [patient for *_, patient in labels(*paths)] == ["A", "B", "C"]
    assert read(*paths)[1] == ["A: read as a patient and not as a subtype, because B beside it is no subtype"]


@pytest.mark.parametrize(
    ("classes", "benign", "malignant"),
    [
        (("benign=0", "malignant=1"), "0", "1"),
        (("benign=B", "malignant=M"), "b", "M"),
        (("benign=normal", "malignant=Tumor"), "Normal", "tumor "),
        (("benign=N", "malignant=tumor"), "N", "tumor"),
    ],
)
def test_given_names_are_classes(classes, benign, malignant):
    paths = (f"{benign}/P1/0.png", f"{malignant}/P2/0.png")
    assert labels(*paths, classes=classes) == [("benign", None, "P1"), ("malignant", None, "P2")]
    with pytest.raises(DataError, match=r"P1/0.png is in no class folder; .* --classes benign=NAME"):
        read(*paths)


def test_given_names_add_to_ours():
    paths = ("0/P1/0.png", "benign/P2/0.png", "malignant/P3/0.png")
    assert [found[0] for found in labels(*paths, classes=["benign=0"])] == ["benign", "benign", "malignant"]
    # If every image is in a folder with a longer name, 0 is a patient.
    assert labels("benign/0/0.png", "malignant/1/0.png", classes=["benign=0", "malignant=1"]) == [
        ("benign", None, "0"),
        ("malignant", None, "1"),
    ]


def test_a_folder_above_flat_classes_may_be_a_patient_or_a_hospital():
    rows, (warning,) = read("8863/0/a.png", "8864/1/b.png", classes=("benign=0", "malignant=1"))
    assert [row[schema.PATIENT] for row in rows] == [None, None]
    assert "(8863, 8864) may be patients or hospitals: no patient is known" in warning
    with pytest.raises(DataError, match="its folders 0 and 1 name different classes"):
        read("0/1/a.png", "1/1/b.png", classes=("benign=0", "malignant=1"))


STRUCTURE = ["40X", "400x", "mag_40", "SOB", "images", "fold1", "Fold 2", "png", "raw"]


@pytest.mark.parametrize("folder", STRUCTURE)
def test_a_structural_folder_is_no_patient(folder):
    inside = [f"{c}/{folder}/P{i}/0.png" for i, c in enumerate(("benign", "malignant"))]
    above = [f"{folder}/{c}/P{i}/0.png" for i, c in enumerate(("benign", "malignant"))]
    other = ["benign/P0/0.png", "malignant/P1/0.png"]
    assert labels(*inside) == labels(*above) == labels(*other)
    assert labels(*above, *other) == labels(*other, *other)
    with pytest.raises(DataError, match=rf"{folder} is no patient; expected CLASS/PATIENT/IMAGE"):
        read(f"benign/{folder}/0.png", "malignant/P1/0.png")


def test_bare_numbers_are_magnifications_where_all_are():
    assert [p for *_, p in labels("benign/40/P1/0.png", "malignant/100/P2/0.png")] == ["P1", "P2"]
    assert [p for *_, p in labels("40/benign/P1/0.png", "100/malignant/P2/0.png")] == ["P1", "P2"]
    assert [p for *_, p in labels("benign/40/0.png", "malignant/41/0.png")] == ["40", "41"]
    with pytest.raises(DataError, match="40 is no patient"):
        read("benign/40/0.png", "malignant/100/0.png")


def test_one_folder_in_all_classes_is_no_patient():
    paths = ("benign/set/P1/0.png", "malignant/set/P2/0.png")
    assert [patient for *_, patient in labels(*paths)] == ["P1", "P2"]
    assert read(*paths)[1] == ["folder set contains all images of every class: patients are those below it"]


def test_a_hospital_between_class_and_patients_is_refused():
    paths = [
        f"{c}/{s}/{c[0]}{i}/0.png" for c in ("benign", "malignant") for s in ("HA", "HB") for i in (1, 2)
    ]
    with pytest.raises(DataError, match="HA, HB have images of every class, and folders such as b1 in them"):
        read(*paths)
    # One patient with slides of both classes among others is one.
    rows = labels("benign/P1/s1/0.png", "malignant/P1/s2/0.png", "malignant/P2/s3/0.png")
    assert [patient for *_, patient in rows] == ["P1", "P1", "P2"]


def test_patients_that_all_have_both_classes_are_named():
    _, warnings = read("benign/P1/0.png", "malignant/P1/0.png")
    assert warnings == [
        "every patient (P1) has images of every class; if these are no patients, write a manifest"
    ]


@pytest.mark.parametrize("form", ["{part}/{tumor_class}/{patient}", "{tumor_class}/{part}/{patient}"])
@pytest.mark.parametrize("words", [("train", "val", "test"), ("Training", "valid", "test_set")])
def test_a_divided_tree_is_read_with_its_parts(form, words):
    paths = [
        form.format(part=part, tumor_class=c, patient=f"{c[0]}{i}") + "/0.png"
        for i, part in enumerate(words)
        for c in ("benign", "malignant")
    ]
    rows, warnings = read(*paths)
    assert [row[schema.PART] for row in rows] == ["train"] * 2 + ["validation"] * 2 + ["test"] * 2
    assert [row[schema.PATIENT] for row in rows] == ["b0", "m0", "b1", "m1", "b2", "m2"]
    assert warnings == []


@pytest.mark.parametrize("form", ["{c}/{s}/{part}/{i}/0.png", "{part}/{s}/{i}/0.png", "{s}/{part}/{i}/0.png"])
def test_parts_beside_codes_of_subtypes(form):
    places = [("benign", "A", "train"), ("malignant", "DC", "test")]
    rows, _ = read(*(form.format(c=c, s=s, part=part, i=f"P{s}") for c, s, part in places))
    columns = (schema.TUMOR_CLASS, schema.SUBTYPE, schema.PART, schema.PATIENT)
    assert [tuple(row[name] for name in columns) for row in rows] == [
        (*place, f"P{place[1]}") for place in places
    ]


def test_parts_of_hospitals():
    rows, _ = read("train/A/benign/P1/0.png", "test/F/malignant/P1/0.png")
    assert [(row[schema.PART], row[schema.PATIENT]) for row in rows] == [("train", "A/P1"), ("test", "F/P1")]


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        (("train/benign/test/P1/0.png",), "P1/0.png is in test and train; expected one part"),
        (
            ("fold1/train/benign/P1/0.png", "fold2/test/benign/P1/0.png"),
            "fold1, fold2 divide the images in sev",
        ),
    ],
)
def test_several_divisions_are_refused(paths, said):
    with pytest.raises(DataError, match=said):
        read(*paths)
