import pytest

from bcd import storage
from bcd.errors import StorageError


def test_a_file_is_read_back_as_written(tmp_path):
    uri = storage.join(str(tmp_path), "deep", "er", "a.bin")
    storage.write_bytes(uri, b"first")
    storage.write_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"second"
    assert [file.path for file in storage.list_files(str(tmp_path))] == ["deep/er/a.bin"]


def test_list_files_gives_paths_and_sizes_and_passes_over_hidden_ones(tmp_path):
    for name in ("b/2.png", "a.png", ".hidden/x.png", ".DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * len(name))
    files = storage.list_files(str(tmp_path))
    assert [(f.path, f.size_bytes) for f in files] == [("a.png", 5), ("b/2.png", 7)]
    assert files[1].uri == str(tmp_path / "b/2.png")


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
    with pytest.raises(StorageError, match=r"missing.png: cannot read it"):
        storage.read_bytes(str(tmp_path / "missing.png"))
    with pytest.raises(StorageError, match="ftp://x/y: cannot read 'ftp://'"):
        storage.exists("ftp://x/y")


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot write it"):
        storage.check_writable(str(tmp_path / "file"))
    storage.check_writable(str(tmp_path / "new"))
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("uri", "expected"),
    [("s3://bucket/a/", "s3://bucket/a"), ("gs://b", "gs://b"), ("file:///x/y", "/x/y"), ("/x/../y", "/y")],
)
def test_absolute(uri, expected):
    assert storage.absolute(uri) == expected
    assert storage.parent(storage.join(uri, "run", "model")) == storage.join(uri, "run")


def test_first_file_finds_one_without_listing_all(tmp_path, s3):
    for root in (str(tmp_path), f"{s3}/{tmp_path.name}-first"):
        for name in ("a/notes.txt", "a/.hidden/x.png", "b/c/1.PNG", "b/c/2.png"):
            storage.write_bytes(f"{root}/{name}", b"12345")
        assert storage.first_file(root, (".png",)) == storage.File(f"{root}/b/c/1.PNG", "b/c/1.PNG", 5)
        assert storage.first_file(f"{root}/a", (".png",)) is None
        with pytest.raises(StorageError, match=r"none: there is no such folder"):
            storage.first_file(f"{root}/none", (".png",))


def test_read_start_reads_as_much_as_there_is(tmp_path, s3):
    for uri in (str(tmp_path / "in.bin"), f"{s3}/{tmp_path.name}-start.bin"):
        storage.write_bytes(uri, b"0123456789")
        assert [storage.read_start(uri, n) for n in (4, 20)] == [b"0123", b"0123456789"]
