"""The file-name grammar, the published counts, and the fold files."""

from pathlib import Path

import pyarrow as pa
import pytest

from bcd import schema
from bcd.data import breakhis
from bcd.errors import DataError
from bcd.storage import File
from bcd.taxonomy import BENIGN, MAGNIFICATIONS, SUBTYPES

TREE = "histology_slides/breast/benign/SOB/adenosis/SOB_B_A_14-22549AB/40X/SOB_B_A-14-22549AB-40-001.png"


def files(*paths: str) -> list[File]:
    return [File(f"s3://bucket/{path}", path, size) for size, path in enumerate(paths, start=1)]


def complete() -> pa.Table:
    """A table with as many images of every kind as were published."""
    names = [
        f"SOB_{'B' if SUBTYPES[subtype].tumor_class == BENIGN else 'M'}_{subtype}-14-7-{m}-{i:03}.png"
        for subtype, by_magnification in breakhis.EXPECTED_COUNTS.items()
        for m, n in by_magnification.items()
        for i in range(n)
    ]
    return breakhis.index(files(*names))


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".JPEG", ".tif", ".Tiff"])
def test_a_name_may_have_another_suffix(suffix):
    path = TREE.replace(".png", suffix)
    assert breakhis.parse_path(path) == breakhis.parse_path(TREE)
    assert breakhis.published(path) == "SOB_B_A-14-22549AB-40-001.png"
    assert breakhis.published(f"a/my{suffix}") == f"my{suffix}"


@pytest.mark.parametrize("path", [TREE, Path(TREE).name, f"40X/{Path(TREE).name}"])
def test_a_name_says_everything(path: str) -> None:
    name = breakhis.parse_path(path)
    assert (name.tumor_class, name.subtype, name.year, name.number, name.suffix) == (
        ("benign", "A", "14", "22549", "AB")
    )
    assert (name.patient, name.slide, name.case) == ("14-22549AB", "14-22549AB", "14-22549")
    assert (name.magnification, name.mpp, name.sequence) == (40, 0.49, 1)
    assert name.folders == ("benign", "adenosis", "SOB_B_A_14-22549AB", "40X")


@pytest.mark.parametrize(
    "name",
    [
        "SOB_B_A-14-22549AB-40-001.png.png",
        "SOB_B_A-14-22549AB-40-001.bmp",
        "SOB_B_A-14-22549ab-40-001.png",
        "SOB_B_A-14-22549AB-50-001.png",
        "SOB_B_A-14-22549AB-40-1.png",
        "SOB_B_A-14-AB-40-001.png",
        "SOB_B_XX-14-22549AB-40-001.png",
        "SOB_M_A_14-22549AB-40-001.png",
        "xSOB_B_A-14-22549AB-40-001.png",
        "SOB_B_A-١٤-22549-40-001.png",
        "",
    ],
)
def test_a_name_that_breaks_the_grammar_is_named_with_the_grammar(name: str) -> None:
    with pytest.raises(DataError, match="expected SOB_<B\\|M>_<subtype>") as caught:
        breakhis.parse_path(f"folder/{name}")
    assert f"folder/{name}:" in str(caught.value)


def test_the_class_letter_must_agree_with_the_subtype() -> None:
    with pytest.raises(DataError, match="A is benign, so expected SOB_B_"):
        breakhis.parse_path("SOB_M_A-14-22549AB-40-001.png")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("/benign/", "/malignant/"),
        ("/adenosis/", "/fibroadenoma/"),
        ("/SOB_B_A_14-22549AB/", "/SOB_B_A_14-22549CD/"),
        ("/40X/", "/400X/"),
        ("/benign/", "/Malignant/"),
        ("/adenosis/", "/Ductal Carcinoma/"),
        ("/40X/", "/100x/"),
    ],
)
def test_a_folder_that_contradicts_the_name_is_an_error(old: str, new: str) -> None:
    with pytest.raises(DataError, match=f"folder {new.strip('/')} contradicts .* expected {old.strip('/')}"):
        breakhis.parse_path(TREE.replace(old, new))


def test_an_index_has_one_row_per_file_in_order() -> None:
    table = breakhis.index(files("b/SOB_M_DC-14-2523-100-010.png", TREE))
    assert table.schema == schema.INDEX
    assert table[schema.IMAGE_ID].to_pylist() == ["b/SOB_M_DC-14-2523-100-010.png", TREE]
    assert table.to_pylist()[0] == {
        schema.IMAGE_ID: "b/SOB_M_DC-14-2523-100-010.png",
        schema.URI: "s3://bucket/b/SOB_M_DC-14-2523-100-010.png",
        schema.PATIENT: "14-2523",
        schema.CASE: "14-2523",
        schema.SLIDE: "14-2523",
        schema.SITE: None,
        schema.TUMOR_CLASS: "malignant",
        schema.SUBTYPE: "DC",
        schema.MAGNIFICATION: 100,
        schema.MPP: pytest.approx(0.20),
        schema.SHA256: None,
        schema.SIZE_BYTES: 1,
        schema.PHASH: None,
        schema.TISSUE_FRACTION: None,
    }


def test_all_invalid_names_are_counted_and_five_are_shown() -> None:
    with pytest.raises(DataError, match=r"7 file names are invalid: .*; and 2 more$") as caught:
        breakhis.index(files(TREE, *(f"SOB_{i}.png" for i in range(7))))
    assert [f"SOB_{i}.png" in str(caught.value) for i in range(7)] == [True] * 5 + [False] * 2
    with pytest.raises(DataError, match=r"^1 file name is invalid: SOB_0.png: .*PC$"):
        breakhis.index(files("SOB_0.png", TREE))


def test_a_complete_set_gives_no_warning() -> None:
    assert breakhis.count_warnings(complete()) == []


def test_missing_and_surplus_images_are_summed_up() -> None:
    few = breakhis.index(files(TREE))
    assert breakhis.count_warnings(few) == [
        "1 of 7,909 published images are here; missing 1,994 at 40X, 2,081 at 100X, 2,013 at 200X, "
        "1,820 at 400X (443 A, 1,014 F, 453 PT, 569 TA, 3,451 DC, 626 LC, 792 MC, 560 PC)"
    ]
    whole = complete()
    assert breakhis.count_warnings(pa.concat_tables([whole, few])) == [
        "1 image more than published: 1 at 40X (1 A)"
    ]
    exchanged = pa.concat_tables([whole.slice(0, whole.num_rows - 1), few])
    assert breakhis.count_warnings(exchanged) == [
        "7,908 of 7,909 published images are here; missing 1 at 400X (1 PC)",
        "1 image more than published: 1 at 40X (1 A)",
    ]


def test_a_fold_gives_every_image_its_role() -> None:
    text = "SOB_B_A-14-1-40-001.png|40|3|train\r\nSOB_M_DC-14-2-100-001.png|100|3|test\n"
    assert breakhis.read_fold(text, "dsfold3.txt") == {
        "SOB_B_A-14-1-40-001.png": "train",
        "SOB_M_DC-14-2-100-001.png": "test",
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("SOB_B_A-14-1-40-002.png|40|3|validation", "line 2: .* expected file name"),
        ("SOB_B_A-14-1-40-002.png|40|3", "line 2: .* expected file name"),
        ("SOB_B_A-14-1-40-002.png|40|6|train", "line 2: .* expected file name"),
        ("", "line 2: '' ?; expected file name"),
        ("SOB_B_A-14-1-40-002.png|100|3|train", "line 2: .* is not at magnification 100"),
        ("SOB_B_A-14-1-40-001.png|40|3|test", "line 2: .* is listed twice"),
        ("SOB_B_A-14-1-40-002.png|40|4|train", "line 2: fold 4; expected one fold"),
        ("SOB_B_X-14-1-40-002.png|40|3|train", "SOB_B_X-14-1-40-002.png: not a BreaKHis name"),
    ],
)
def test_a_broken_fold_is_named_with_its_line(line: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        breakhis.read_fold(f"SOB_B_A-14-1-40-001.png|40|3|train\n{line}\nend", "dsfold3.txt")


def test_an_empty_fold_is_an_error() -> None:
    with pytest.raises(DataError, match=r"dsfold1.txt: empty"):
        breakhis.read_fold("", "dsfold1.txt")


@pytest.mark.real
def test_the_published_names_have_the_published_counts(real_data: Path) -> None:
    folds = [
        breakhis.read_fold(path.read_text(), path.name)
        for path in sorted((real_data / "folds").glob("*.txt"))
    ]
    assert len(folds) == 5
    assert all(fold.keys() == folds[0].keys() for fold in folds)
    table = breakhis.index(files(*folds[0]))
    assert breakhis.count_warnings(table) == []
    counted = [table[name].value_counts().to_pylist() for name in (schema.MAGNIFICATION, schema.TUMOR_CLASS)]
    totals = {row["values"]: row["counts"] for column in counted for row in column}
    assert totals == {40: 1995, 100: 2081, 200: 2013, 400: 1820, "benign": 2480, "malignant": 5429}
    names = [breakhis.parse_path(name) for name in folds[0]]
    assert len({name.slide for name in names}) == 81
    assert len({(name.slide, name.subtype) for name in names}) == 82
    assert len({name.case for name in names}) == 70


@pytest.mark.real
def test_the_doubly_published_slide_is_as_described(real_data: Path) -> None:
    fold = breakhis.read_fold((real_data / "folds" / "dsfold1.txt").read_text(), "dsfold1.txt")
    copies = [name for name in map(breakhis.parse_path, fold) if name.slide in breakhis.KNOWN_ANOMALIES]
    for subtype in ("DC", "LC"):
        per_magnification = [
            sum(name.subtype == subtype and name.magnification == m for name in copies)
            for m in MAGNIFICATIONS
        ]
        assert per_magnification == [32, 33, 32, 26]
    assert len(copies) == 2 * 123


@pytest.mark.real
def test_the_published_tree_is_read(real_data: Path) -> None:
    root = real_data / "breakhis"
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    table = breakhis.index(files(*paths))
    assert table.num_rows == len(paths) == 78
    assert len(set(table[schema.PATIENT].to_pylist())) == 24
    assert len(set(table[schema.CASE].to_pylist())) == 21
    assert breakhis.count_warnings(table)[0].startswith(
        "78 of 7,909 published images are here; missing 1,958"
    )
