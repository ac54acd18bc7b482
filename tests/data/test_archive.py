import os

import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.data import archive
from bcd.errors import DataError, StorageError
from tests import pictures
from tests.data.test_index import manifest, touch
from tests.slide_files import zarr_files
from tests.slides.test_dicom import OTHERS, dicom_file


def ids(found):
    return found.table[schema.IMAGE_ID].to_pylist()


def test_images_and_slides_are_inputs_and_other_files_are_counted(tmp_path):
    touch(tmp_path, "b/2.PNG", "b/1.jpeg", "a.tif", "c.svs", "z.ndpi", "notes.txt", "b/thumbs.db")
    found = archive.list_inputs(str(tmp_path))
    assert ids(found) == ["a.tif", "b/1.jpeg", "b/2.PNG", "c.svs", "z.ndpi"]
    assert (found.ignored, found.passed) == (2, {".txt": 1, ".db": 1})
    assert found.table.schema == schema.INPUTS
    assert found.table[schema.URI].to_pylist() == [str(tmp_path / name) for name in ids(found)]
    assert found.table[schema.SIZE_BYTES].to_pylist() == [len(name) for name in ids(found)]
    assert found.table[schema.PATIENT].null_count == 5


def put(root, **contents):
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def test_each_dicom_series_of_a_folder_is_one_input(tmp_path):
    """With any name, in each folder for itself; objects without pixels beside them are counted."""
    one, two = dicom_file("1.1"), dicom_file("1.2")
    objects = {f"a/{name}": dicom_file("1.1", kind) for name, kind in OTHERS.items()}
    names = {"a/1.dcm": two, "a/2.dcm": one, "a/3.DCM": one, "a/4.dcm": two, "b/1.dcm": one, "b/IM2": one}
    put(
        tmp_path,
        **names,
        **objects,
        **{"b/1.2.840.7": two, "c/deep/1.dcm": one, "DICOMDIR": dicom_file("", "1.3")},
    )
    found = archive.list_inputs(str(tmp_path))
    assert ids(found) == ["a/1.dcm", "a/2.dcm", "b/1.2.840.7", "b/1.dcm", "c/deep/1.dcm"]
    assert found.passed == {archive.OTHER_DICOM: len(OTHERS) + 1}


def test_a_dicom_file_that_does_not_say_its_series_is_an_input(tmp_path):
    """Its row will have the error."""
    whole = dicom_file("1.1")
    put(
        tmp_path,
        **{"a.dcm": whole[:140], "b.dcm": whole[:-40], "c.dcm": b"", "d.dcm": b"text", "e.dcm": whole},
    )
    assert ids(archive.list_inputs(str(tmp_path))) == ["a.dcm", "b.dcm", "c.dcm", "d.dcm", "e.dcm"]


def test_a_manifest_names_each_dicom_slide_once(tmp_path):
    put(tmp_path, **{"1.dcm": dicom_file("1.1"), "2.dcm": dicom_file("1.1"), "3.dcm": dicom_file("1.2")})
    assert ids(archive.list_inputs(manifest(tmp_path, [{"uri": f"{n}.dcm"} for n in (1, 3, 4)]))) == [
        "1.dcm",
        "3.dcm",
        "4.dcm",
    ]
    twice = [{"image_id": name, "uri": "1.dcm"} for name in ("x", "y")]
    assert ids(archive.list_inputs(manifest(tmp_path, twice))) == ["x", "y"]
    with pytest.raises(
        DataError, match=r"line 3: .*/2.dcm is of the same slide as .*/1.dcm; name one of them"
    ):
        archive.list_inputs(manifest(tmp_path, [{"uri": f"{n}.dcm"} for n in (1, 2)]))


@pytest.mark.parametrize("version", [2, 3])
def test_an_ome_zarr_is_one_input_and_not_its_chunks(tmp_path, s3, version):
    """What it hides is a part of it, and its version changes with each of its files."""
    files = zarr_files(pictures.stained(128, 128), version)
    contents = {f"a/s.ome.zarr/{name}": content for name, content in files.items()}
    others = {"b.png": b"b", ".hidden/s.zarr/0": b"h", "c.zarr/0.png": b"damaged"}
    put(tmp_path, **contents, **others)
    storage.upload_folder(tmp_path, f"{s3}/{tmp_path.name}")
    for uri in (str(tmp_path), f"{s3}/{tmp_path.name}"):
        found = archive.list_inputs(uri)
        assert ids(found) == ["a/s.ome.zarr", "b.png", "c.zarr"]
        assert found.table[schema.SIZE_BYTES].to_pylist() == [sum(map(len, files.values())), 1, 7]
        assert found.table[schema.URI][0].as_py() == f"{uri}/a/s.ome.zarr"
        assert found.passed == {"hidden": 1}
        before = found.versions.to_pylist()
        chunk = next(name for name in files if name.startswith("0/") and name.endswith("/1"))
        storage.write_bytes(f"{uri}/a/s.ome.zarr/{chunk}", b"changed")
        after = archive.list_inputs(uri).versions.to_pylist()
        assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, True]
        alone = archive.list_inputs(f"{uri}/a/s.ome.zarr/")
        assert ids(alone) == ["s.ome.zarr"]
        assert alone.versions[0].as_py()


def test_a_manifest_names_an_ome_zarr(tmp_path):
    files = zarr_files(pictures.stained(128, 128), 3)
    put(tmp_path, **{f"s.zarr/{name}": content for name, content in files.items()})
    found = archive.list_inputs(manifest(tmp_path, [{"uri": "s.zarr"}, {"uri": "none.zarr"}]))
    assert ids(found) == ["none.zarr", "s.zarr"]
    assert [version is None for version in found.versions.to_pylist()] == [True, False]


def test_files_without_a_suffix_count_by_their_first_bytes(tmp_path, s3):
    starts = {"png": b"\x89PNG\r\n\x1a\n", "tif.1": b"II*\0", "big": b"MM\0+", "jpg.2": b"\xff\xd8\xff\xe0"}
    others = {"README": b"text", "empty": b"", "x.3": b"PNG"}
    put(tmp_path, **starts, **others)
    storage.upload_folder(tmp_path, f"{s3}/{tmp_path.name}")
    for uri in (str(tmp_path), f"{s3}/{tmp_path.name}"):
        found = archive.list_inputs(uri)
        assert (ids(found), found.passed) == (sorted(starts), {archive.NO_SUFFIX: 3})


def test_every_entry_is_accounted_for(tmp_path):
    touch(
        tmp_path, "a.png", "b.bmp", "c/d.BMP", "c/e.czi", "f.qptiff", "g.webp", "h.jp2", ".DS_Store", "c/.x/y"
    )
    (tmp_path / "gone.svs").symlink_to("/nowhere")
    (tmp_path / "c/up").symlink_to("..")
    with open(os.path.join(os.fsencode(tmp_path), b"z\xff.tif"), "wb"):
        pass
    found = archive.list_inputs(str(tmp_path))
    assert ids(found) == ["a.png", "gone.svs", r"z\xff.tif"]
    assert found.table[schema.ERROR].to_pylist() == [None, "unreadable", "unreadable"]
    assert found.table[schema.ERROR_MESSAGE].to_pylist()[1:] == [
        "a link to /nowhere: No such file or directory",
        "the name is not in UTF-8; rename it",
    ]
    kinds = {
        ".bmp": 2,
        ".czi": 1,
        ".qptiff": 1,
        ".webp": 1,
        ".jp2": 1,
        "hidden": 2,
        "link to a folder above it": 1,
    }
    assert found.passed == kinds
    assert archive.described(found.passed).startswith("2 .bmp, 2 hidden, 1 .czi, ")
    assert archive.described({f".{n}": n for n in range(1, 12)}).endswith("5 .5, 4 .4 and 6 others")


@pytest.mark.parametrize("name", ["a.PNG", "b.svs", "c.dcm", "IM7"])
def test_one_file_is_an_archive(tmp_path, name):
    put(tmp_path, **{name: dicom_file("1.1")})
    (row,) = archive.list_inputs(f"{tmp_path}/{name}").table.to_pylist()
    assert [row[key] for key in (schema.IMAGE_ID, schema.URI)] == [name, f"{tmp_path}/{name}"]
    assert row[schema.SIZE_BYTES] == len(dicom_file("1.1"))


def test_one_unsupported_file_is_rejected_with_what_is_expected(tmp_path):
    touch(tmp_path, "list.txt", "notes")
    for name in ("list.txt", "notes"):
        with pytest.raises(DataError, match=rf"{name}: unsupported file; expected .png, .*\.zarr, \.csv"):
            archive.list_inputs(f"{tmp_path}/{name}")


def test_the_files_of_a_mirax_slide_are_one_input(tmp_path):
    touch(tmp_path, "a.mrxs", "a/Slidedat.ini", "a/Data0000.dat", "b/Data0000.dat")
    found = archive.list_inputs(str(tmp_path))
    assert (ids(found), found.ignored) == (["a.mrxs"], 1)


def test_a_folder_named_like_an_image_is_no_input(tmp_path):
    touch(tmp_path, "x.png/y.jpg", "z.svs/notes.txt")
    (tmp_path / "empty.png").mkdir()
    found = archive.list_inputs(str(tmp_path))
    assert (ids(found), found.ignored) == (["x.png/y.jpg"], 1)


def test_a_folder_on_s3(s3, tree_on_s3, tree):
    assert ids(archive.list_inputs(tree_on_s3)) == ids(archive.list_inputs(tree))


@pytest.mark.parametrize("name", ["m.csv", "m.parquet"])
def test_a_manifest_needs_nothing_but_uris(tmp_path, name):
    rows = [{"uri": uri} for uri in ("s3://elsewhere/b.svs", "in/a.png", "/abs/c.tif")]
    found = archive.list_inputs(manifest(tmp_path, rows, name))
    assert ids(found) == ["/abs/c.tif", "in/a.png", "s3://elsewhere/b.svs"]
    uris = found.table[schema.URI].to_pylist()
    assert uris == ["/abs/c.tif", str(tmp_path / "in/a.png"), "s3://elsewhere/b.svs"]
    assert (found.ignored, found.table.schema) == (0, schema.INPUTS)


def test_a_manifest_says_what_is_known(tmp_path):
    rows = [
        {"uri": "b.png", "image_id": "7", "patient": "007", "case": "c", "slide": "s", "mpp": 0.25},
        {"uri": "b.png", "image_id": "10", "patient": None, "case": None, "slide": None, "mpp": None},
    ]
    found = archive.list_inputs(manifest(tmp_path, rows))
    columns = (schema.IMAGE_ID, schema.PATIENT, schema.CASE, schema.SLIDE, schema.MPP)
    assert [tuple(row[name] for name in columns) for row in found.table.to_pylist()] == [
        ("10", None, None, None, None),
        ("7", "007", "c", "s", 0.25),
    ]


def test_a_patient_is_written_as_in_training(tmp_path):
    rows = [{"URI ": f"{i}.png", " Patient": name} for i, name in enumerate(("12", "12.0", " 12", "nan"))]
    found = archive.list_inputs(manifest(tmp_path, rows))
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
        archive.list_inputs(manifest(tmp_path, rows))


def test_nothing_to_score_is_refused(tmp_path):
    with pytest.raises(StorageError, match="there is no such folder"):
        archive.list_inputs(str(tmp_path / "none"))
    with pytest.raises(StorageError, match="cannot read it"):
        archive.list_inputs(str(tmp_path / "none.csv"))
    touch(tmp_path, "readme.txt", "x.bmp", "y.bmp")
    with pytest.raises(
        DataError, match=r"below it; expected .png, .*\.zarr files; it contains 2 .bmp, 1 .txt$"
    ):
        archive.list_inputs(str(tmp_path))
    (tmp_path / "m.csv").write_text("uri\n")
    with pytest.raises(DataError, match="the manifest has no rows"):
        archive.list_inputs(str(tmp_path / "m.csv"))


def test_a_manifest_may_have_any_magnification(tmp_path):
    """Scoring never uses it."""
    (tmp_path / "m.csv").write_text("uri,magnification,mpp\na.png,20,0.5\nb.png,20x,0.25\n")
    assert archive.list_inputs(str(tmp_path / "m.csv")).table[schema.MPP].to_pylist() == [0.5, 0.25]


def versions(path):
    """Version by id."""
    found = archive.list_inputs(str(path))
    return dict(zip(found.table[schema.IMAGE_ID].to_pylist(), found.versions.to_pylist(), strict=True))


def test_a_version_changes_with_any_file_of_its_input(tmp_path):
    """A field, a MIRAX slide with its folder, and a DICOM slide of two files; a file beside them is none."""
    names = ["a.png", "m.mrxs", "m/Data0.dat", "d/1.dcm", "d/2.dcm", "notes.txt"]
    for name in names:
        storage.write_bytes(str(tmp_path / name), dicom_file("1.1"))
    owners = {"m/Data0.dat": "m.mrxs", "d/2.dcm": "d/1.dcm", "notes.txt": None}
    before = versions(tmp_path)
    assert sorted(before) == ["a.png", "d/1.dcm", "m.mrxs"]
    for name in names:
        storage.write_bytes(str(tmp_path / name), dicom_file("1.1", after=b"replaced"))
        after = versions(tmp_path)
        owner = owners.get(name, name)
        assert [key for key in before if before[key] != after[key]] == ([owner] if owner else [])
        before = after


def test_a_manifest_has_the_versions_of_its_files(tmp_path):
    storage.write_bytes(str(tmp_path / "a.png"), b"1234")
    (tmp_path / "m.csv").write_text("image_id,uri\nx,a.png\ny,a.png\nz,gone.png\n")
    found = versions(tmp_path / "m.csv")
    assert found == {"x": storage.version(str(tmp_path / "a.png")), "y": found["x"], "z": None}


def beside(root, names, flag_files, suffix=".geojson"):
    """The files of each input, by the path below their folder; None for what is no slide."""
    put(root, **{f"in/{name}": b"II*\0" for name in names})  # files without a suffix are known by it
    touch(root, *(f"files/{name}" for name in flag_files))
    inputs = archive.list_inputs(str(root / "in"))
    found = archive.with_files(inputs, "--regions", str(root / "files"), suffix, schema.REGION_FILES)
    lists = found.table[schema.REGION_FILES].to_pylist()
    cut = [None if one is None else [uri.removeprefix(f"{root}/files/") for uri in one] for one in lists]
    return dict(zip(ids(found), cut, strict=True)), found


def test_files_belong_to_the_slide_of_their_name(tmp_path):
    """With its suffix or without, at its path; what belongs to none is named."""
    names = ["a.svs", "b.tif", "c/a.svs", "d.ndpi", "e.svs", "f.png", "1.2.840.9"]
    files = ["a.geojson", "b.tif.geojson", "c/a.geojson", "e.geojson", "e.svs.geojson", "f.geojson"]
    files += ["1.2.840.geojson", "x/d.geojson", "d.png"]
    lists, found = beside(tmp_path, names, files)
    assert lists == {
        "1.2.840.9": [],
        "a.svs": ["a.geojson"],
        "b.tif": ["b.tif.geojson"],
        "c/a.svs": ["c/a.geojson"],
        "d.ndpi": [],
        "e.svs": ["e.svs.geojson", "e.geojson"],
        "f.png": None,
    }
    assert found.unclaimed == ("1.2.840.geojson", "f.geojson", "x/d.geojson")


def test_a_file_that_two_slides_could_claim_belongs_to_neither(tmp_path):
    names = ["a.svs", "a.tif", "b.svs", "b"]
    lists, found = beside(tmp_path, names, ["a.geojson", "a.tif.geojson", "b.geojson"])
    assert lists == {"a.svs": [], "a.tif": ["a.tif.geojson"], "b": ["b.geojson"], "b.svs": []}
    assert found.unclaimed == ("a.geojson",)


def test_an_id_that_is_no_path_counts_by_its_last_part(tmp_path):
    uris = ["s3://b/x/one.svs", "/data/two.svs", "../three.svs", "in/four.svs", "gs://b/y/five.svs"]
    uris += ["gs://b/z/five.svs"]
    rows = [{schema.IMAGE_ID: uri, schema.URI: uri} for uri in uris]
    table = pa.Table.from_pylist(rows, schema=schema.INPUTS)
    inputs = archive.Archive(table, pa.nulls(len(uris), pa.string()))
    touch(tmp_path, *(f"files/{n}.geojson" for n in ("one", "two", "three", "four", "five", "in/four")))
    found = archive.with_files(inputs, "--regions", str(tmp_path / "files"), ".geojson", schema.REGION_FILES)
    lists = found.table[schema.REGION_FILES].to_pylist()
    names = {
        name: [uri.removeprefix(f"{tmp_path}/files/") for uri in one]
        for name, one in zip(ids(found), lists, strict=True)
    }
    assert names == {
        "s3://b/x/one.svs": ["one.geojson"],
        "/data/two.svs": ["two.geojson"],
        "../three.svs": ["three.geojson"],
        "in/four.svs": ["in/four.geojson"],
        "gs://b/y/five.svs": [],
        "gs://b/z/five.svs": [],
    }


def test_a_slide_has_another_version_with_another_file(tmp_path):
    names = ["a.svs", "b.svs", "f.png"]
    _, before = beside(tmp_path, names, ["a.geojson"])
    plain = archive.list_inputs(str(tmp_path / "in")).versions.to_pylist()
    assert before.versions.to_pylist()[1:] == plain[1:]
    os.utime(tmp_path / "files/a.geojson", ns=(1, 1))
    changed = archive.with_files(
        archive.list_inputs(str(tmp_path / "in")), "--regions", str(tmp_path / "files"), ".geojson", "x"
    )
    assert changed.versions.to_pylist()[0] != before.versions.to_pylist()[0] != plain[0]
    assert changed.versions.to_pylist()[1:] == plain[1:]


def test_one_file_is_for_one_slide(tmp_path):
    touch(tmp_path, "in/a.svs", "in/f.png", "two/a.svs", "two/b.svs", "drawn.geojson")
    one, two = (archive.list_inputs(str(tmp_path / name)) for name in ("in", "two"))
    uri = str(tmp_path / "drawn.geojson")
    found = archive.with_files(one, "--regions", uri, ".geojson", schema.REGION_FILES)
    assert found.table[schema.REGION_FILES].to_pylist() == [[uri], None]
    with pytest.raises(
        DataError, match="is one file, for one slide; the input may have 2 slides: give a fold"
    ):
        archive.with_files(two, "--regions", uri, ".geojson", schema.REGION_FILES)
    with pytest.raises(StorageError, match="there is no such folder"):
        archive.with_files(one, "--regions", f"{tmp_path}/none", ".geojson", schema.REGION_FILES)
