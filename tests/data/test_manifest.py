"""Manifests as people write them, and as they break."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bcd import schema, storage
from bcd.data import manifest
from bcd.errors import DataError

GOOD = "uri,patient,mpp\na.png,007,0.5\n"


def cells(path, content):
    """The rows of a file with this content."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [row.cells for row in manifest.read_manifest(str(path)).rows]


def refused(path, content):
    with pytest.raises(DataError) as caught:
        manifest.inputs(read(path, content), copies=False)
    return str(caught.value).removeprefix(str(path))


def read(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return manifest.read_manifest(str(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.csv", GOOD),
        ("M.CSV", GOOD.replace("\n", "\r\n")),
        ("m.csv", GOOD.replace("\n", "\r")),
        ("m.csv", GOOD.rstrip("\n")),
        ("m.csv", "\n" + GOOD + "\n  \n,,\n"),  # as spreadsheets end
        ("m.csv", GOOD.replace(",", ";")),
        ("m.csv", GOOD.replace(",", "\t")),
        ("m.csv", GOOD.replace(",", "|")),
        ("m.csv", "sep=;\n" + GOOD.replace(",", ";")),
        ("m.csv", '"uri";"patient";"mpp"\r\n"a.png";"007";"0.5"\r\n'),
        ("m.csv", " uri , patient,mpp\n a.png, 007 , 0.5\n"),
        ("m.csv", 'uri, "patient", mpp\n"a.png", "007", 0.5\n'),
        ("m.csv", "uri,patient,mpp\na.png,007,0.5,\n"),  # a separator too many in each row,
        ("m.csv", "uri,patient,mpp,\na.png,007,0.5\n"),  # in the header,
        ("m.csv", "uri,patient,mpp,,\na.png,007,0.5,,\n"),  # in both
        ("m.tsv", GOOD.replace(",", "\t")),
        ("m.csv.gz", gzip.compress(GOOD.encode(), mtime=0)),
        ("m.tsv.gz", gzip.compress(GOOD.replace(",", "\t").encode(), mtime=0)),
        ("m.csv.gz", GOOD),  # unpacked by what fetched it
        ("m.csv", gzip.compress(GOOD.encode(), mtime=0)),
        ("m.csv", GOOD.encode("utf-8-sig")),
        ("m.csv", GOOD.encode("utf-16")),
        ("m.csv", b"\xfe\xff" + GOOD.encode("utf-16-be")),
        ("m.csv", GOOD.encode("utf-32")),
    ],
)
def test_one_table_in_many_forms(tmp_path, name, content):
    assert cells(tmp_path / name, content) == [{"uri": "a.png", "patient": "007", "mpp": "0.5"}]


def test_cells_are_kept_as_they_are_written(tmp_path):
    content = (
        'uri,patient,note\n"img/a,b.png",NA,"two\nlines"\nwith space+plus é.png,,nan\n"say ""x"".png",1.0,#\n'
    )
    assert cells(tmp_path / "m.csv", content) == [
        {"uri": "img/a,b.png", "patient": "NA", "note": "two\nlines"},
        {"uri": "with space+plus é.png", "note": "nan"},
        {"uri": 'say "x".png', "patient": "1.0", "note": "#"},
    ]
    assert cells(tmp_path / "m.tsv", "uri\na,b;c.png\n") == [{"uri": "a,b;c.png"}]


def test_lines_are_counted_as_an_editor_does(tmp_path):
    content = '\nuri,note\r\na.png,"one\r\ntwo\nthree"\n\nb.png,\n'
    wheres = [row.where.rpartition(", ")[2] for row in read(tmp_path / "m.csv", content).rows]
    assert wheres == ["line 3", "line 7"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ": not a readable manifest: it is empty"),
        ("\n  \n", ": not a readable manifest: it is empty"),
        ("uri\n", ": the manifest has no rows"),
        (
            "path;label\na;b\n",
            ": no column 'uri'; it has path, label; column 'path' is not used; call it 'uri' to use it; "
            "column 'label' is not used; call it 'tumor_class' to use it",
        ),
        ("uri,patient\na.png,1\nb.png\n", ", line 3: 1 cell for 2 columns; quote a cell that contains ','"),
        ("uri,patient\na,b.png,1\n", ", line 2: 3 cells for 2 columns; quote a cell that contains ','"),
        ("uri;mpp\na;0.5;1\n", ", line 2: 3 cells for 2 columns; quote a cell that contains ';'"),
        ("uri,uri\na,b\n", ": 2 columns are called 'uri'; expected one"),
        ("uri,patient,Note,patient\na,1,,1\n", ": 2 columns are called 'patient'; expected one"),
        ('uri,n\n"a.png,1\nb.png,2\n', ", line 2: unexpected end of data; is every quote closed?"),
        ('uri\n"a"b.png\n', ", line 2: ',' expected after '\"'; is every quote closed?"),
        (f"uri\n{'a' * 200_000}\n", ", line 2: field larger than field limit (131072)"),
        ("uri\nfine\na\0.png\n", ", line 3: contains a NUL byte; save it as text in UTF-8"),
        (GOOD.encode("utf-16-le"), ", line 1: contains a NUL byte; save it as text in UTF-8"),
        ("uri\na\nMüller.png\n".encode("latin-1"), ", line 3: not a text in UTF-8; save it as UTF-8"),
        (b"\xff\xfeu", ", line 1: not a text in UTF-16; save it as UTF-8"),
        (b"\x1f\x8bno gzip at all", ": not a readable gzip file: Unknown compression method"),
        (gzip.compress(GOOD.encode(), mtime=0)[:20], ": not a readable gzip file: "),
        (b"PAR1 and no more", ": not a readable manifest: "),
        ("uri,mpp\na,0.5\nb,-1\n", ", line 3: the mpp is '-1'; expected µm per pixel, a number above 0"),
        ("uri;mpp\na;0,49\n", ", line 2: the mpp is '0,49'; expected µm per pixel"),
        *(
            (f"uri,mpp\na,{mpp}\n", f", line 2: the mpp is '{mpp}'")
            for mpp in ("nan", "inf", "0", "1e999", "1_0")
        ),
        ("uri,patient\n,1\n", ", line 2: the uri is empty"),
        ("uri\na\na\n", ", line 3: image id 'a' is in line 2 already; each may occur once"),
        (
            "uri\nfile://host/a.png\n",
            ", line 2: file://host/a.png: cannot read files of 'host'; expected file:///PATH",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_line(tmp_path, content, said):
    assert refused(tmp_path / "m.csv", content).startswith(said)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_BYTES", 20)
    assert (
        refused(tmp_path / "m.csv.gz", gzip.compress(GOOD.encode(), mtime=0))
        == ": unpacks to more than 20 bytes; divide it"
    )


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path.read_bytes()


def test_parquet_says_the_same_in_any_type(tmp_path):
    path = tmp_path / "m.parquet"
    content = parquet(
        path,
        uri=pa.array([" a.png", "b.png", None]).dictionary_encode(),
        patient=pa.array([7, None, 8], pa.int8()),
        tumor_class=pa.array([0, 1, 1]),
        case=pa.array([b"c", None, b"d"]),
        mpp=pa.array([0.25, None, 0.5], pa.float32()),
        boxes=pa.array([[1], [2], []]),
    )
    expected = [
        {"uri": "a.png", "patient": "7", "tumor_class": "0", "case": "c", "mpp": "0.25"},
        {"uri": "b.png", "tumor_class": "1"},
        {"patient": "8", "tumor_class": "1", "case": "d", "mpp": "0.5"},
    ]
    assert cells(path, content) == expected
    assert cells(tmp_path / "really parquet.csv", content) == expected
    assert refused(path, content) == ", row 3: the uri is empty"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"uri": pa.array([["a.png"]])},
            ": not a readable manifest: column 'uri' has type list<element: string>",
        ),
        ({"uri": pa.array([{"x": 1}])}, ": not a readable manifest: column 'uri' has type struct<x: int64>"),
        ({"uri": pa.array(["a", "b\0"])}, ", row 2: the uri contains a NUL byte; expected text"),
        ({"uri": pa.array([b"\xff.png"])}, ": not a readable manifest: 'utf-8' codec can't decode"),
        ({"uri": pa.array(["a"]), "mpp": pa.array([float("nan")])}, ", row 1: the mpp is 'nan'"),
        ({"uri": pa.array([], pa.string())}, ": the manifest has no rows"),
    ],
)
def test_parquet_that_says_no_answer_is_refused(tmp_path, columns, said):
    assert refused(tmp_path / "m.parquet", parquet(tmp_path / "m.parquet", **columns)).startswith(said)


@pytest.mark.parametrize(
    ("uri", "place"),
    [
        ("in/a.png", "ROOT/in/a.png"),
        ("../a b%20#é.png", "ROOT/../a b%20#é.png"),
        ("/abs/a.png", "/abs/a.png"),
        ("~/a.png", f"{Path.home()}/a.png"),
        ("~a.png", "ROOT/~a.png"),
        ("file:///abs/a%20b%23.png", "/abs/a b#.png"),
        ("FILE://localhost/abs/100%.png", "/abs/100%.png"),
        ("file:/abs/a.png", "/abs/a.png"),
        ("s3://bucket/a b%20#.png", "s3://bucket/a b%20#.png"),
        (r"in\a.png", r"ROOT/in\a.png"),
    ],
)
def test_where_a_row_points_to(tmp_path, uri, place):
    (row,) = manifest.inputs(read(tmp_path / "m.csv", f"uri\n{uri}\n"), False).to_pylist()
    assert row[schema.URI] == place.replace("ROOT", str(tmp_path))
    assert row[schema.IMAGE_ID] == uri


def test_a_file_may_be_named_again_only_where_each_row_has_an_id(tmp_path):
    rows = read(tmp_path / "m.csv", "uri,image_id\na.png,1\n./a.png,2\n")
    assert manifest.inputs(rows, copies=True)[schema.IMAGE_ID].to_pylist() == ["1", "2"]
    with pytest.raises(DataError, match=r"line 3: file '.*/a.png' is in line 2 already"):
        manifest.inputs(rows, copies=False)
    with pytest.raises(DataError, match=r"line 4: file '.*/a.png' is in line 3 already"):
        manifest.inputs(read(tmp_path / "m.csv", "uri,image_id\na.png,1\na.png,\n./a.png,\n"), copies=True)


@pytest.mark.parametrize(
    ("written", "value"),
    [("40", 40), ("40x", 40), ("400X", 400), ("400.0", 400), ("100 x", 100), ("200×", 200)],
)
def test_magnifications_as_people_write_them(written, value):
    assert manifest.magnification(manifest.Row("m, line 2", {schema.MAGNIFICATION: written})) == value


@pytest.mark.parametrize("written", ["20", "40.5", "x", "4e1", "-40", "9" * 5_000])
def test_other_magnifications_are_refused(written):
    with pytest.raises(DataError, match=r"m, line 2: magnification '.*'; expected one of 40, 100, 200, 400"):
        manifest.magnification(manifest.Row("m, line 2", {schema.MAGNIFICATION: written}))


def test_which_uris_are_manifests(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    names = ["a.csv", "b.TSV", "c.csv.gz", "d.tsv.gz", "e.parquet", "f.txt", "g.gz", "folder.csv"]
    assert [manifest.is_one(storage.join(str(tmp_path), name)) for name in names] == [True] * 5 + [False] * 3
