"""What identifies patients is planted in files of every kind, in names and ids; all is found, and no more."""

from types import SimpleNamespace

import pytest

from bcd.audit import identifiers
from bcd.audit.identifiers import Identifier
from bcd.data import archive
from bcd.errors import StorageError
from tests import pictures
from tests import planted_identifiers as planted

FILES = planted.files()
CLEAN_NAMES = [
    *("SOB_M_DC-14-2523-40-010.png", "SOB_B_TA_14-22549AB/40X/x.png", "benign/SOB/tubular_adenoma/1.png"),
    *(
        "CMU-1-Small-Region.svs",
        "tumor_2019.tif",
        "IMG_1950.JPG",
        "patient_00012/tile_123456.png",
        "testA_10.jpg",
    ),
    "TCGA-A1-A0SB-01Z-00-DX1.B34C7C0E-1950-4B8F-9C40-9D2B1E1A2B3C.svs",
    *(
        "1.2.840.113619.2.55.3.20190312.1.dcm",
        "0005f7aaab2800f6170c399693a96917.tiff",
        "camelyon16/normal_001.tif",
    ),
    *("14-22549/14-13412.png", "glas-10", "CRC_12345.png", "Scans 2019/slides 2020.csv"),
]


@pytest.mark.parametrize("name", FILES)
def test_what_is_planted_in_a_file_is_found(name):
    content, expected = FILES[name]
    found = identifiers.in_content(name, content)
    assert {(one.what, one.found_in) for one in found} == expected
    assert len(found) == len(expected)


def test_forty_and_more_are_planted():
    assert sum(len(expected) for _, expected in FILES.values()) + len(planted.NAMES) + len(planted.IDS) >= 40


@pytest.mark.parametrize("name", planted.clean())
def test_nothing_is_found_in_a_clean_file(name):
    assert identifiers.in_content(name, planted.clean()[name]) == []


@pytest.mark.parametrize("name", planted.NAMES)
def test_what_identifies_in_a_name_is_found_and_hidden(name):
    first, *_ = identifiers.in_names([name])
    assert first.what == planted.NAMES[name]
    for digits in ("1950", "7654321", planted.SECRET):
        assert digits not in identifiers.sentences([first], 1)[0]


def test_nothing_is_found_in_names_of_public_data():
    assert list(identifiers.in_names(CLEAN_NAMES)) == []
    assert [identifiers.hidden(name) for name in CLEAN_NAMES] == CLEAN_NAMES


def test_a_folder_is_named_once():
    found = list(identifiers.in_names(["Doe_1950/a.png", "Doe_1950/b.png", "x/Doe_1950/a.png"]))
    assert [one.name for one in found] == ["Doe_1950", "x/Doe_1950"]
    assert found[0] == Identifier("Doe_1950", "name and number", "the name of the folder", "D***")


def test_ids_that_are_names_are_found_once():
    values = [*planted.IDS, None, "p1", "14-22549", "glas-10", "unknown case", *planted.IDS]
    found = list(identifiers.in_ids("patient", values, [str(i) for i in range(len(values))]))
    assert [(one.name, one.what) for one in found] == [
        (str(i), what) for i, what in enumerate(planted.IDS.values())
    ]
    assert {one.found_in for one in found} == {"the patient"}


def test_values_are_parts_of_the_text():
    """What is between two of them hides neither."""
    text = "Doe_1950 b34c7c0e-1950-4b8f-9c40-9d2b1e1a2b3c 12345-Roe 19500312 Zoe_S19-12345"
    found = list(identifiers.in_text(text))
    assert found == [
        ("date", "19500312"),
        ("name and number", "Doe_1950"),
        ("name and number", "Zoe_S19-12345"),
    ]
    assert identifiers.hidden(text).split()[0] == "D***"


def test_a_patient_is_not_named_by_the_folder_either():
    found = list(identifiers.in_ids("patient", ["Smith"], ["malignant/Smith/smith 1.png"]))
    assert identifiers.sentences(found, 9) == ["malignant/S***/s*** 1.png: person in the patient (S***)"]


def test_no_value_is_shown():
    found = [one for name, (content, _) in FILES.items() for one in identifiers.in_content(name, content)]
    found += [*identifiers.in_names(planted.NAMES), *identifiers.in_ids("case", planted.IDS, planted.IDS)]
    assert not [text for text in identifiers.sentences(found, 999) if planted.SECRET in text.casefold()]
    assert max(len(one.masked) for one in found) == len("Z***")


@pytest.mark.parametrize("explicit", [True, False])
def test_a_syntax_of_dicom_changes_nothing(explicit):
    found = identifiers.in_content("g.dcm", planted.slide_object(explicit))
    assert {(one.what, one.found_in) for one in found} == FILES["g.dcm"][1]


def test_an_object_whose_identity_was_removed_has_its_label_and_what_looks_like_names():
    found = identifiers.in_content("g.dcm", planted.slide_object(removed=True))
    assert [(one.what, one.found_in) for one in found] == [
        ("image of the label", "DICOM, label"),
        ("person", "DICOM"),
        ("date", "DICOM"),
    ]


@pytest.mark.parametrize("name", FILES)
def test_damage_ends_the_search_and_no_more(name):
    content = FILES[name][0]
    for cut in range(0, len(content), max(1, len(content) // 97)):
        identifiers.in_content(name, content[:cut])
        identifiers.in_content(name, content[:cut] + b"\xff" * 40 + content[cut + 40 :])


def test_a_stored_file_is_searched_by_its_header(tmp_path):
    for name, (content, expected) in FILES.items():
        path = tmp_path / name.replace("/", "_")
        path.write_bytes(content)
        found = identifiers.in_stored(path.name, str(path))
        assert {(one.what, one.found_in) for one in found} == expected
    for place in (str(tmp_path / "gone.svs"), "tape://host/gone.svs"):
        (gone,) = identifiers.in_stored("gone.svs", place)
        assert gone.what == identifiers.NOT_READ


def test_a_transient_error_is_none_of_the_file(monkeypatch):
    def refuse(path):
        raise OSError("no answer")

    store = SimpleNamespace(open_input_file=refuse)
    monkeypatch.setattr(identifiers.storage, "resolve", lambda uri: (store, "bucket/a.svs"))
    with pytest.raises(StorageError, match=r"s3://bucket/a.svs: cannot read it: no answer"):
        identifiers.in_stored("a.svs", "s3://bucket/a.svs")


@pytest.mark.parametrize("text", ["a", "1", "a.1", "A^", "x=<a ", "<", "Ab, "])
def test_a_hostile_text_takes_no_longer_than_another(text):
    """Regular expressions whose time grows with the square would need minutes."""
    content = 10**5 * text.encode()
    for tags in ({"t270": content}, {"t270": b"<a " + content}, {"t65449": content}):
        identifiers.in_content("a.tif", pictures.tiff(pictures.tiff_page(pictures.gradient(), **tags)))
    list(identifiers.in_text(content[: identifiers.MOST_CHARACTERS].decode()))


def test_a_sum_names_the_kinds():
    found = [Identifier("a", "date", "x", "1***"), Identifier("a", "person", "y", "Z***")]
    found.append(Identifier("b", "date", "x", "2***"))
    assert (
        identifiers.summed(found)
        == "3 statements in 2 files or folders that may identify a patient: 2 date, 1 person"
    )


def test_files_that_may_state_something_are_known_by_name():
    assert all(map(identifiers.has_metadata, ["a.SVS", "1.2.3", "x/Slidedat.ini", "b.png", "c.dcm"]))
    assert not any(map(identifiers.has_metadata, ["a.csv", "b.json", "x/Data0001.dat"]))


@pytest.mark.real
def test_real_images_give_no_false_positive(real_data):
    """The names of BreaKHis and its folds, and all fields; what the slides of scanners state is theirs."""
    names = {
        line.split("|")[0]
        for file in (real_data / "folds").iterdir()
        for line in file.read_text().splitlines()
    }
    assert len(names) == 7_909
    assert list(identifiers.in_names(names)) == []
    for folder in ("breakhis/BreaKHis_v1", "glas/images"):
        rows = archive.list_inputs(str(real_data / folder)).table.to_pylist()
        assert list(identifiers.in_names(row["image_id"] for row in rows)) == []
        assert [one for row in rows for one in identifiers.in_stored(row["image_id"], row["uri"])] == []
    found = identifiers.in_stored("a.svs", str(real_data / "slides/CMU-1-Small-Region.svs"))
    assert {one.found_in.removeprefix("TIFF ImageDescription ") for one in found} == {
        *("ScanScope ID", "Filename", "Date", "User", "ImageID", "TIFF page 3, label", "TIFF page 4, macro")
    }
