import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import fsspec
import pytest

from bcd import schema, storage
from bcd.data import archive
from bcd.data.stores import buckets, schemes
from bcd.errors import MissingError, StorageError
from tests.hub import TOKEN

FILES = {"a.png": b"123", "b/2.png": b"12345", "b/empty.png": b"", ".git/x": b"1"}


@pytest.fixture
def memory():
    """URI of a folder in fsspec's memory."""
    client = fsspec.filesystem("memory")
    client.pipe({f"/store/{path}": content for path, content in FILES.items()})
    yield "memory://store"
    client.rm("/store", recursive=True)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)


def test_a_folder_of_another_scheme_is_listed_and_read(memory, tmp_path):
    found = storage.list_folder(f"{memory}/")
    assert [(file.uri, file.size_bytes) for file in found.files] == [
        ("memory://store/a.png", 3),
        ("memory://store/b/2.png", 5),
        ("memory://store/b/empty.png", 0),
    ]
    assert found.passed == {"hidden": 1}
    assert storage.read_bytes(f"{memory}/b/2.png") == b"12345"
    assert storage.read_bytes(f"{memory}/b/empty.png") == b""
    assert storage.read_start(f"{memory}/b/2.png", 2) == b"12"
    assert storage.read_range(f"{memory}/b/2.png", 1, 3) == b"234"
    storage.download(f"{memory}/b/2.png", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"12345"
    assert [file.path for file in storage.first_files(memory, ("y.png",))] == ["b/empty.png"]
    assert storage.sizes([f"{memory}/a.png", f"{memory}/none.png", memory]) == [3, None, None]
    assert (storage.is_folder(memory), storage.is_file(f"{memory}/a.png")) == (True, True)
    with pytest.raises(MissingError, match=r"none.png: cannot read it"):
        storage.read_bytes(f"{memory}/none.png")
    with pytest.raises(MissingError, match="there is no such folder"):
        storage.list_folder(f"{memory}/none")


def test_nothing_is_written_there(memory):
    attempts = (
        lambda: storage.write_bytes(f"{memory}/new.bin", b"1"),
        lambda: storage.delete_file(f"{memory}/a.png"),
        lambda: storage.delete_folder(memory),
        lambda: storage.require_writable("HTTPS://host/x"),
    )
    for attempt in attempts:
        with pytest.raises(StorageError, match="outputs are on a local path, s3:// or gs://") as caught:
            attempt()
        assert caught.value.lasting
    assert len(storage.list_files(memory)) == 3
    uris = ("/a", "file:///a", "S3://a", "gs://a", memory, "hf://a/b")
    assert [storage.is_writable(uri) for uri in uris] == [True, True, True, True, False, False]


def test_a_version_changes_with_the_content(memory):
    first = storage.version(f"{memory}/a.png")
    assert storage.list_files(memory)[0].version == first
    fsspec.filesystem("memory").pipe("/store/a.png", b"321")
    assert storage.version(f"{memory}/a.png") != first
    same = {"type": "file", "size": 3, "name": "x"}
    infos = [schemes._facts("x", same | mark) for mark in ({"ETag": "1"}, {"ETag": "2"}, {"ETag": "1"})]
    assert infos[0].mtime_ns == infos[2].mtime_ns != infos[1].mtime_ns


def test_one_client_serves_all_threads_and_goes_to_other_processes(memory):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(storage.resolve, [memory] * 8))
    assert len({id(client.handler.fs) for client, _ in found}) == 1
    client, path = pickle.loads(pickle.dumps(found[0]))  # noqa: S301
    assert client.get_file_info(f"{path}/a.png").size == 3


def test_what_cannot_be_opened_says_what_can(monkeypatch):
    expected = {
        "nowhere://x/y": "cannot open it: expected a local path, s3://, gs:// or a scheme of fsspec such as hf://",
        "github://x": "expected a local path",
        "simplecache::memory://a": "cannot open it",
        "memory://a::https://host/x": "expected one scheme",
    }
    for uri, sentence in expected.items():
        if not storage.is_remote(uri):
            continue
        with pytest.raises(StorageError, match=sentence) as caught:
            storage.read_bytes(uri)
        assert caught.value.lasting
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(
        StorageError, match=r"az:// requires a package .* not installed; run: pip install adlfs"
    ):
        storage.read_bytes("az://container/a.png")


def test_the_package_of_the_hub_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(StorageError, match="not installed; run: pip install huggingface_hub") as caught:
        storage.pinned("hf://owner/name")
    assert caught.value.lasting
    assert [storage.pinned(uri) for uri in ("s3://bucket/model", "model")] == ["s3://bucket/model", "model"]


@pytest.fixture
def web(hub):
    """The address of a folder on a web server."""
    hub.put("owner/name", {"a b.png": b"123", "empty.png": b"", "large.bin": bytes(range(256)) * 1_000})
    return f"{hub.endpoint}/owner/name/resolve/main"


def test_an_address_is_read_in_ranges(web, hub, tmp_path):
    assert storage.read_bytes(f"{web}/a b.png") == b"123"
    assert storage.read_bytes(f"{web}/empty.png") == b""
    storage.download(f"{web}/large.bin", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == bytes(range(256)) * 1_000
    assert storage.version(f"{web}/a b.png") != storage.version(f"{web}/empty.png")
    with storage.open_file(f"{web}/large.bin") as file:
        hub.asked.clear()
        places = [(n * 997 % 250_000, 100 + n) for n in range(64)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda place: storage.read_at(file, web, *place), places))
    content = bytes(range(256)) * 1_000
    assert found == [content[start : start + size] for start, size in places]
    assert len(hub.asked) == len(places)
    assert not storage.exists(f"{web}/none.png")
    assert storage.sizes([f"{web}/a b.png", f"{web}/none.png"]) == [3, None]


def test_a_web_server_has_no_listing(web):
    for look in (
        storage.list_folder,
        storage.list_files_if_any,
        lambda uri: next(storage.first_files(uri, ())),
    ):
        with pytest.raises(StorageError, match="has no listing of its files: name them in a m") as caught:
            look(web)
        assert caught.value.lasting


def test_a_manifest_names_files_on_the_web(web, hub):
    table = f"image_id,uri,mpp\none,a b.png,0.5\ntwo,{web}/large.tif,\n".encode()
    hub.put("owner/name", {"list.csv": table, "large.tif": b"II*\0"})
    found = archive.list_inputs(f"{web}/list.csv")
    assert found.table[schema.URI].to_pylist() == [f"{web}/a b.png", f"{web}/large.tif"]
    assert [version.partition("-")[0] for version in found.versions.to_pylist()] == ["3", "4"]


@pytest.mark.parametrize("status", [403, 503])
def test_a_server_that_fails_is_not_one_without_the_file(web, hub, impatient, status):
    hub.fault = lambda method, path: status
    for ask in (storage.exists, storage.read_bytes, storage.version):
        hub.asked.clear()
        with pytest.raises(StorageError, match=str(status)) as caught:
            ask(f"{web}/large.bin")
        assert not caught.value.lasting
        assert len(hub.asked) >= buckets.ATTEMPTS
    answers = [status] * 3
    hub.fault = lambda method, path: answers.pop() if answers else None
    assert storage.read_bytes(f"{web}/a b.png") == b"123"
    hub.fault = lambda method, path: None
    assert refused("http://127.0.0.1:1/x").lasting is False


def refused(uri):
    with pytest.raises(StorageError) as caught:
        storage.read_bytes(uri)
    return caught.value


@pytest.fixture
def library():
    return pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")


def test_a_repository_is_read_at_a_commit(library, hub, tmp_path):
    first = hub.put("owner/name", {"card.json": b"{}", "sub/large.bin": b"x" * 5_000})
    pinned = storage.pinned("hf://owner/name")
    assert pinned == f"hf://owner/name@{first}"
    hub.put("owner/name", {"card.json": b"{1}", "more.bin": b"1"})
    assert [(file.uri, file.size_bytes) for file in storage.list_files(pinned)] == [
        (f"{pinned}/card.json", 2),
        (f"{pinned}/sub/large.bin", 5_000),
    ]
    assert storage.read_bytes(f"{pinned}/card.json") == b"{}"
    assert storage.read_bytes("hf://owner/name/card.json") == b"{1}"
    assert storage.read_range(f"{pinned}/sub/large.bin", 4_990, 100) == b"x" * 10
    storage.download(f"{pinned}/sub/large.bin", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"x" * 5_000
    assert storage.pinned(pinned) == pinned
    assert storage.pinned("HF://owner/name/sub").endswith("/sub")
    assert storage.version(f"{pinned}/card.json") == storage.list_files(pinned)[0].version
    assert not storage.exists(f"{pinned}/more.bin")


def test_a_data_set_of_the_hub_is_an_input(library, hub):
    hub.put("owner/data", {"train/a.png": b"123", "list.csv": b"uri\ntrain/a.png\n"}, kind="datasets")
    uri = "hf://datasets/owner/data"
    assert storage.pinned(uri).startswith(f"{uri}@")
    whole = archive.list_inputs(uri)
    assert whole.table[schema.URI].to_pylist() == [f"{uri}/train/a.png"]
    listed = archive.list_inputs(f"{uri}/list.csv")
    assert listed.table[schema.URI].to_pylist() == [f"{uri}/train/a.png"]
    assert listed.versions == whole.versions


@pytest.mark.parametrize(
    "uri", ["hf://owner/none", "hf://owner/name@none", "hf://owner/closed", "hf://owner"]
)
def test_what_is_not_on_the_hub_or_closed_says_so(library, hub, monkeypatch, uri):
    hub.put("owner/name", {"card.json": b"{}"})
    sha = hub.put("owner/closed", {"card.json": b"{}"}, private=True)
    with pytest.raises(StorageError, match=r"no such repository or revision|must be 'namespace") as caught:
        storage.pinned(uri)
    assert caught.value.lasting
    assert not storage.exists(f"{uri}/card.json")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert storage.pinned("hf://owner/closed") == f"hf://owner/closed@{sha}"


def test_a_hub_that_fails_is_not_one_without_the_repository(library, hub, impatient):
    hub.put("owner/name", {"card.json": b"{}"})
    hub.fault = lambda method, path: 500
    for ask in (storage.pinned, storage.exists, storage.read_bytes):
        with pytest.raises(StorageError, match="500") as caught:
            ask("hf://owner/name/card.json")
        assert not caught.value.lasting
