import pytest

from bcd import archive, schema
from bcd.errors import DataError, StorageError
from tests.test_index import manifest, touch


def ids(found):
    return found.table[schema.IMAGE_ID].to_pylist()


def test_images_and_slides_are_inputs_and_other_files_are_counted(tmp_path):
    touch(tmp_path, "b/2.PNG", "b/1.jpeg", "a.tif", "c.svs", "z.ndpi", "notes.txt", "b/thumbs.db")
    found = archive.read(str(tmp_path))
    assert ids(found) == ["a.tif", "b/1.jpeg", "b/2.PNG", "c.svs", "z.ndpi"]
    assert found.ignored == 2
    assert found.table.schema == schema.INDEX
    assert found.table[schema.URI].to_pylist() == [str(tmp_path / name) for name in ids(found)]
    assert found.table[schema.SIZE_BYTES].to_pylist() == [len(name) for name in ids(found)]
    assert found.table[schema.PATIENT].null_count == 5


def test_the_dicom_files_of_a_folder_are_one_input(tmp_path):
    touch(tmp_path, "a/2.dcm", "a/1.dcm", "a/3.DCM", "b/1.dcm", "b/deep/1.dcm")
    found = archive.read(str(tmp_path))
    assert (ids(found), found.ignored) == (["a/1.dcm", "b/1.dcm", "b/deep/1.dcm"], 0)


def test_the_files_of_a_mirax_slide_are_one_input(tmp_path):
    touch(tmp_path, "a.mrxs", "a/Slidedat.ini", "a/Data0000.dat", "b/Data0000.dat")
    found = archive.read(str(tmp_path))
    assert (ids(found), found.ignored) == (["a.mrxs"], 1)


def test_a_folder_named_like_a_picture_is_no_input(tmp_path):
    touch(tmp_path, "x.png/y.jpg", "z.svs/notes.txt")
    (tmp_path / "empty.png").mkdir()
    found = archive.read(str(tmp_path))
    assert (ids(found), found.ignored) == (["x.png/y.jpg"], 1)


def test_a_folder_on_s3(s3, tree_on_s3, tree):
    assert ids(archive.read(tree_on_s3)) == ids(archive.read(tree))


@pytest.mark.parametrize("name", ["m.csv", "m.parquet"])
def test_a_manifest_needs_nothing_but_uris(tmp_path, name):
    rows = [{"uri": uri} for uri in ("s3://elsewhere/b.svs", "in/a.png", "/abs/c.tif")]
    found = archive.read(manifest(tmp_path, rows, name))
    assert ids(found) == ["/abs/c.tif", "in/a.png", "s3://elsewhere/b.svs"]
    uris = found.table[schema.URI].to_pylist()
    assert uris == ["/abs/c.tif", str(tmp_path / "in/a.png"), "s3://elsewhere/b.svs"]
    assert (found.ignored, found.table.schema) == (0, schema.INDEX)


def test_a_manifest_says_what_is_known(tmp_path):
    rows = [
        {"uri": "b.png", "image_id": "7", "patient": "007", "case": "c", "slide": "s", "mpp": 0.25},
        {"uri": "b.png", "image_id": "10", "patient": None, "case": None, "slide": None, "mpp": None},
    ]
    found = archive.read(manifest(tmp_path, rows))
    columns = (schema.IMAGE_ID, schema.PATIENT, schema.CASE, schema.SLIDE, schema.MPP)
    assert [tuple(row[name] for name in columns) for row in found.table.to_pylist()] == [
        ("10", None, None, None, None),
        ("7", "007", "c", "s", 0.25),
    ]


def test_a_patient_is_written_as_in_training(tmp_path):
    rows = [{"URI ": f"{i}.png", " Patient": name} for i, name in enumerate(("12", "12.0", " 12", "nan"))]
    found = archive.read(manifest(tmp_path, rows))
    assert found.table[schema.PATIENT].to_pylist() == ["12", "12", "12", None]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"path": "a.png"}], "no column 'uri'; it has path"),
        ([{"uri": "a.png", "patient": 1}, {"uri": None, "patient": 1}], "line 3: the uri is empty"),
        (
            [{"uri": "a.png"}, {"uri": "a.png"}],
            "line 3: image id 'a.png' is in line 2 already; each may occur once",
        ),
        (
            [{"uri": "a", "image_id": "1"}, {"uri": "b", "image_id": "1"}],
            "line 3: image id '1' is in line 2 already",
        ),
        ([{"uri": "a.png"}, {"uri": "in/../a.png"}], r"line 3: file '.*/a.png' is in line 2 already"),
        ([{"uri": "a.png", "mpp": "wide"}], "line 2: the mpp is 'wide'; expected µm per pixel"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path, rows, said):
    with pytest.raises(DataError, match=said):
        archive.read(manifest(tmp_path, rows))


def test_nothing_to_score_is_refused(tmp_path):
    with pytest.raises(StorageError, match="there is no such folder"):
        archive.read(str(tmp_path / "none"))
    with pytest.raises(StorageError, match="cannot read it"):
        archive.read(str(tmp_path / "none.csv"))
    touch(tmp_path, "readme.txt")
    with pytest.raises(DataError, match=r"no image or slide below it; expected .png, .*\.mrxs"):
        archive.read(str(tmp_path))
    (tmp_path / "m.csv").write_text("uri\n")
    with pytest.raises(DataError, match="the manifest has no rows"):
        archive.read(str(tmp_path / "m.csv"))


def test_a_manifest_may_have_any_magnification(tmp_path):
    """Scoring never uses it."""
    (tmp_path / "m.csv").write_text("uri,magnification,mpp\na.png,20,0.5\nb.png,20x,0.25\n")
    assert archive.read(str(tmp_path / "m.csv")).table[schema.MPP].to_pylist() == [0.5, 0.25]
