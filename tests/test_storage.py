import copy
import gzip
import os
import resource
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from bcd import storage
from bcd.data.stores import buckets
from bcd.errors import MissingError, StorageError, TooLargeError
from tests import faults

# Linux answers a read of its first bytes with EIO, as a disk or a network drive does that fails.
DAMAGED = "/proc/self/mem"


def test_a_file_is_read_back_as_written(tmp_path):
    uri = storage.join(str(tmp_path), "deep", "er", "a.bin")
    storage.write_bytes(uri, b"first")
    storage.write_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"second"
    assert [file.path for file in storage.list_files(str(tmp_path))] == ["deep/er/a.bin"]


def test_an_open_file_is_copied_from_where_it_is(tmp_path, s3):
    content = os.urandom(9 * 2**20)
    for folder in (str(tmp_path), f"{s3}/{tmp_path.name}-copied"):
        with tempfile.TemporaryFile() as file:
            file.write(b"before" + content)
            file.seek(6)
            storage.write_bytes(f"{folder}/a.bin", file)
        assert storage.read_bytes(f"{folder}/a.bin") == content


def test_list_files_gives_paths_and_sizes_and_passes_over_hidden_ones(tmp_path):
    for name in ("b/2.png", "a.png", ".hidden/x.png", ".DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    files = storage.list_files(str(tmp_path))
    assert [(f.path, f.size_bytes) for f in files] == [("a.png", 5), ("b/2.png", 7)]
    assert files[1].uri == str(tmp_path / "b/2.png")


def test_packed_files_stay_packed(tmp_path, s3):
    content = gzip.compress(b"packed")
    for folder in (str(tmp_path), f"{s3}/{tmp_path.name}-packed"):
        storage.write_bytes(f"{folder}/a.gz", content)
        storage.download(f"{folder}/a.gz", tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == content
        assert storage.read_bytes(f"{folder}/a.gz") == content
        assert storage.read_start(f"{folder}/a.gz", 5) == content[:5]
        assert storage.sizes([f"{folder}/a.gz"]) == [len(content)]


def test_sizes_are_none_where_there_is_no_file(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    assert storage.sizes([str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path)]) == [3, None, None]


def test_upload_folder_writes_the_marker_last(tmp_path, monkeypatch):
    source = tmp_path / "source"
    (source / "z").mkdir(parents=True)
    for name in ("card.json", "a.bin", "z/b.bin"):
        (source / name).write_bytes(name.encode())
    written = []
    monkeypatch.setattr(storage, "write_bytes", lambda uri, data: written.append((uri, data)))
    storage.upload_folder(source, str(tmp_path / "to"), last="card.json")
    assert [uri for uri, _ in written] == [
        str(tmp_path / "to" / n) for n in ("a.bin", "z/b.bin", "card.json")
    ]
    assert written[-1][1] == b"card.json"


def test_a_folder_that_may_not_be_there_lists_nothing(tmp_path, s3):
    for folder in (str(tmp_path / "some"), f"{s3}/{tmp_path.name}"):
        assert storage.list_files_if_any(folder) == []
        storage.write_bytes(f"{folder}/a.bin", b"123")
        assert storage.list_files_if_any(folder) == [storage.File(f"{folder}/a.bin", "a.bin", 3)]
        assert storage.list_files_if_any(f"{folder}/a.bin") == []


def test_nor_does_one_that_goes_while_it_is_listed(tmp_path, s3, monkeypatch):
    """The last job deletes the last claim in a folder: to S3 the folder is gone with it."""
    monkeypatch.setattr(storage, "_require_folder", lambda filesystem, uri, path: None)
    for folder in (str(tmp_path / "some"), f"{s3}/{tmp_path.name}-gone"):
        assert storage.list_files_if_any(folder) == []
        with pytest.raises(MissingError, match="cannot list it"):
            storage.list_folder(folder)


def test_download_copies_files_larger_than_a_piece(tmp_path, s3):
    content = bytes(range(256)) * 2**15
    for uri in (str(tmp_path / "in.bin"), f"{s3}/{tmp_path.name}.bin"):
        storage.write_bytes(uri, content)
        storage.download(uri, tmp_path / "out.bin")
        assert (tmp_path / "out.bin").read_bytes() == content
    with pytest.raises(StorageError, match=r"none.bin: cannot read it"):
        storage.download(f"{s3}/none.bin", tmp_path / "out.bin")


def test_delete_file_removes_one(tmp_path, s3):
    for folder in (str(tmp_path / "some"), f"{s3}/{tmp_path.name}-some"):
        for name in ("a.bin", "b.bin"):
            storage.write_bytes(f"{folder}/{name}", b"x")
        storage.delete_file(f"{folder}/a.bin")
        assert [file.path for file in storage.list_files(folder)] == ["b.bin"]
    with pytest.raises(StorageError, match=r"none.bin: cannot delete it"):
        storage.delete_file(str(tmp_path / "none.bin"))


def test_errors_name_the_uri(tmp_path):
    with pytest.raises(StorageError, match="nowhere: there is no such folder"):
        storage.list_files(str(tmp_path / "nowhere"))
    (tmp_path / "a.txt").touch()
    with pytest.raises(StorageError, match=r"a.txt is a file; expected a folder"):
        storage.list_files(str(tmp_path / "a.txt"))
    with pytest.raises(StorageError, match=r"missing.png: cannot read it"):
        storage.read_bytes(str(tmp_path / "missing.png"))
    with pytest.raises(StorageError, match="nowhere://x/y: cannot open it: expected a local path"):
        storage.exists("nowhere://x/y")


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot write it"):
        storage.write_bytes(str(tmp_path / "file" / "a"), b"1")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            storage.write_bytes(str(tmp_path / "new" / "a"), b"1")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://bucket/a/", "s3://bucket/a"),
        ("gs://b", "gs://b"),
        ("file:///x/y", "/x/y"),
        ("File://localhost/x/y%20z#1%.png", "/x/y z#1%.png"),
        ("~/x", f"{Path.home()}/x"),
        ("~nobody/x", f"{Path.cwd()}/~nobody/x"),
        ("/x/../y", "/y"),
    ],
)
def test_absolute(uri, expected):
    assert storage.absolute(uri) == expected
    assert storage.parent(storage.join(uri, "run", "model")) == storage.join(uri, "run")


def test_files_of_another_machine_are_refused():
    with pytest.raises(
        StorageError, match=r"file://host/x: cannot read files of 'host'; expected file:///PATH"
    ):
        storage.read_bytes("file://host/x")


def test_the_first_files_are_found_without_listing_all(tmp_path, s3):
    for root in (str(tmp_path), f"{s3}/{tmp_path.name}-first"):
        for name in ("a/notes.txt", "a/.hidden/x.png", "b/c/1.PNG", "b/c/2.png"):
            storage.write_bytes(f"{root}/{name}", b"12345")
        found = storage.first_files(root, (".png",))
        assert next(found) == storage.File(f"{root}/b/c/1.PNG", "b/c/1.PNG", 5)
        assert [file.path for file in found] == ["b/c/2.png"]
        assert list(storage.first_files(f"{root}/a", (".png",))) == []
        with pytest.raises(StorageError, match=r"none: there is no such folder"):
            next(storage.first_files(f"{root}/none", (".png",)))


def test_read_start_reads_as_much_as_there_is(tmp_path, s3):
    for uri in (str(tmp_path / "in.bin"), f"{s3}/{tmp_path.name}-start.bin"):
        storage.write_bytes(uri, b"0123456789")
        assert [storage.read_start(uri, n) for n in (4, 20)] == [b"0123", b"0123456789"]


@pytest.fixture
def faulty(s3, monkeypatch):
    """The S3 server, behind a store that can refuse."""
    storage.write_bytes(f"{s3}/a.png", b"123")
    with faults.store(os.environ["AWS_ENDPOINT_URL"]) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        yield store


def test_a_file_is_read_in_one_request(s3, request):
    """A stream of pyarrow asks for 16 KiB at a time: six thousand requests for a model."""
    content = bytes(range(256)) * 10_000
    storage.write_bytes(f"{s3}/large.bin", content)
    store = request.getfixturevalue("faulty")
    assert storage.read_bytes(f"{s3}/large.bin") == content
    assert [method for method, _ in store.asked].count("GET") == 1


def downloaded(uri):
    with tempfile.TemporaryDirectory() as folder:
        storage.download(uri, Path(folder) / "copy")
        return (Path(folder) / "copy").read_bytes()


def refused(uri):
    with pytest.raises(StorageError) as caught:
        storage.read_bytes(uri)
    return caught.value


@pytest.mark.parametrize("fault", [faults.DENIED, faults.EXPIRED])
def test_denied_access_to_the_bucket_is_transient(s3, faulty, fault):
    uri = f"{s3}/a.png"
    faulty.fault = lambda method, path: fault
    assert not refused(uri).lasting
    faulty.fault = lambda method, path: None
    assert storage.read_bytes(uri) == b"123"


def test_a_file_that_is_not_for_us_stays_so(s3, faulty):
    uri = f"{s3}/a.png"
    faulty.fault = lambda method, path: faults.DENIED if path.endswith("a.png") else None
    assert refused(uri).lasting
    assert "ACCESS_DENIED" in str(refused(uri))


def test_a_store_that_is_slow_or_silent_is_asked_again(s3, faulty, monkeypatch):
    monkeypatch.setattr(buckets, "ATTEMPTS", 2)
    uri = f"{s3}/a.png"
    answers = [faults.SLOW_DOWN]
    faulty.fault = lambda method, path: answers.pop() if answers else None
    assert storage.read_bytes(uri) == b"123"
    faulty.asked.clear()
    faulty.fault = lambda method, path: faults.SLOW_DOWN
    assert not refused(uri).lasting
    assert len(faulty.asked) == 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert not refused(uri).lasting


@pytest.mark.parametrize("read", [storage.read_bytes, lambda uri: storage.read_start(uri, 3), downloaded])
def test_an_answer_longer_than_the_file_is_no_end(s3, faulty, read):
    """The AWS SDK does not retry itself when the text of "slow down" does not fit the file's buffer."""
    answers = [faults.SLOW_DOWN]
    faulty.fault = lambda method, path: answers.pop() if answers and method == "GET" else None
    assert read(f"{s3}/a.png") == b"123"
    assert not answers


def test_a_small_table_survives_it_too(s3, faulty):
    table = pa.table({"a": [1]})
    storage.write_table(f"{s3}/small.parquet", table)
    answers = [faults.SLOW_DOWN]
    faulty.fault = lambda method, path: answers.pop() if answers and method == "GET" else None
    assert storage.read_table(f"{s3}/small.parquet") == table


def test_what_is_missing_stays_missing(s3, tmp_path):
    (tmp_path / "file").write_bytes(b"1")
    for uri in (f"{s3}/none.png", "s3://none/none.png"):
        assert refused(uri).lasting, uri
    for name in ("none", "file/x", "", "n" * 300):
        assert refused(str(tmp_path / name)).lasting, name
    assert not refused(DAMAGED).lasting
    assert refused("nowhere://x/y").lasting


def test_an_error_keeps_its_kind_between_processes():
    error = copy.copy(StorageError("a: gone", lasting=True))
    assert (str(error), error.lasting) == ("a: gone", True)
    missing = copy.copy(MissingError("a: gone"))
    assert (type(missing), str(missing), missing.lasting) == (MissingError, "a: gone", True)


def test_sizes_of_many_files_hold_few_connections(s3):
    storage.write_bytes(f"{s3}/sized.bin", b"12345")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, before[0]), before[1]))
    try:
        assert storage.sizes([f"{s3}/sized.bin"] * 400) == [5] * 400
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_sizes_name_the_uri_of_an_error(s3, faulty):
    faulty.fault = lambda method, path: faults.DENIED
    with pytest.raises(StorageError, match=r"bucket/a.png: cannot access it"):
        storage.sizes([f"{s3}/a.png"])


def test_an_entry_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "b.png").write_bytes(b"123")
    (tmp_path / "c.png").symlink_to("/nowhere")
    with open(os.path.join(os.fsencode(tmp_path), b"a\xff.png"), "wb"):
        pass
    with pytest.raises(StorageError, match=r"a\\xff.png: the name is not in UTF-8; rename it"):
        storage.list_files(str(tmp_path))
    found = storage.list_folder(str(tmp_path))
    assert found.files == [storage.File(f"{tmp_path}/b.png", "b.png", 3)]
    assert list(found.faults) == [r"a\xff.png", "c.png"]


def test_what_is_hidden_is_counted(tmp_path, s3):
    for folder in (str(tmp_path / "some"), f"{s3}/{tmp_path.name}-hidden"):
        for name in (".a.png", "b/.c.png", "b/d.png"):
            storage.write_bytes(f"{folder}/{name}", b"x")
        found = storage.list_folder(folder)
        assert ([file.path for file in found.files], found.passed) == (["b/d.png"], {"hidden": 2})


def test_keys_with_empty_parts_keep_their_names(s3):
    """Pyarrow can list but not open them: each is named, as itself."""
    for key in ("empty/a//x.png", "empty/a/x.png", "empty//y.png"):
        uri = f"{os.environ['AWS_ENDPOINT_URL']}/bucket/{key}"
        form = {"Content-Type": "application/octet-stream"}
        urllib.request.urlopen(urllib.request.Request(uri, b"123", form, method="PUT"))
    files = storage.list_files(f"{s3}/empty")
    assert [file.path for file in files] == ["/y.png", "a//x.png", "a/x.png"]
    assert [file.uri for file in files] == [f"{s3}/empty/{file.path}" for file in files]
    assert refused(files[0].uri).lasting
    assert storage.read_bytes(files[2].uri) == b"123"


def test_tables_are_written_whole_and_read_in_part(tmp_path, s3):
    table = pa.table({"a": [3, 1, 2], "b": ["x", "y", None]})
    for folder in (str(tmp_path), f"{s3}/{tmp_path.name}"):
        for part in (0, 1):
            storage.write_table(f"{folder}/{part}.parquet", table, row_group_size=2)
        assert storage.read_table(f"{folder}/0.parquet").equals(table)
        assert storage.read_table(f"{folder}/1.parquet", ["b"]).equals(table.select(["b"]))
        assert storage.dataset(folder).to_table(filter=pc.field("a") > 1)["a"].to_pylist() == [3, 2] * 2
        storage.write_bytes(f"{folder}/2.parquet", b"no table at all")
        with pytest.raises(StorageError, match=r"2.parquet: cannot read it"):
            storage.read_table(f"{folder}/2.parquet")


def test_an_interrupted_write_leaves_no_empty_object(tmp_path, faulty, s3):
    """SIGTERM while the object is opened, as Ray ends a worker: with its whole content, or not at all."""
    uri, processes = f"{s3}/{tmp_path.name}/a", []

    def fault(method, path):
        if method == "PUT":
            processes[0].terminate()

    faulty.fault = fault
    code = (
        "import signal, sys; from bcd import storage; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
        f"print(flush=True); sys.stdin.readline(); storage.write_bytes({uri!r}, b'123')"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        processes.append(process)
        process.stdout.readline()
        process.communicate("\n", timeout=60)
    assert process.returncode == 7
    assert [file.size_bytes for file in storage.list_files_if_any(f"{s3}/{tmp_path.name}")] in ([], [3])


def test_a_small_object_is_written_by_one_request(tmp_path, faulty, s3):
    seen = []
    faulty.fault = lambda method, path: seen.append(method)
    uri = f"{s3}/{tmp_path.name}/a"
    storage.write_bytes(uri, b"123")
    assert seen == ["PUT"]
    assert storage.read_bytes(uri) == b"123"
    large = bytes(20 * 2**20)
    storage.write_bytes(uri, large)
    assert storage.read_bytes(uri) == large


def test_no_more_is_read_than_allowed(tmp_path, s3):
    for uri in (str(tmp_path / "x"), f"{s3}/{tmp_path.name}-x"):
        storage.write_bytes(uri, b"12345")
        assert storage.read_bytes(uri, 5) == b"12345"
        with pytest.raises(TooLargeError, match="has more than 4 bytes, the most that are read"):
            storage.read_bytes(uri, 4)
    with pytest.raises(TooLargeError):
        storage.read_bytes("/dev/zero", 1_000_000)  # which has no size and no end
