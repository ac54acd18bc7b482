import io
import os
import threading
import uuid

import pytest

from bcd import storage
from bcd.errors import ImageError, StorageError
from bcd.slides.parts import source
from tests import faults

CONTENT = bytes(range(256)) * 400


@pytest.fixture
def uri(s3):
    """An object of 100 KiB."""
    name = f"{s3}/{uuid.uuid4().hex}.bin"
    storage.write_bytes(name, CONTENT)
    return name


@pytest.fixture
def store(uri, monkeypatch):
    """The S3 server, behind a store that counts and can refuse."""
    with faults.store(os.environ["AWS_ENDPOINT_URL"]) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.endpoint)
        yield found


@pytest.fixture
def path(tmp_path):
    (tmp_path / "a.bin").write_bytes(CONTENT)
    return tmp_path / "a.bin"


def test_parts_are_read_wherever_the_file_is(path, uri, store):
    for name in (str(path), uri):
        opened = source.Source(name)
        assert opened.size_bytes == len(CONTENT)
        assert [opened.read(part) for part in [(0, 5), (70_000, 300), (len(CONTENT) - 1, 1)]] == [
            *(CONTENT[:5], CONTENT[70_000:70_300], CONTENT[-1:])
        ]
        opened.close()
    assert [method for method, _ in store.asked] == ["HEAD", *["GET"] * 3]
    assert store.sent_bytes == [5, 300, 1]


def test_what_does_not_exist_is_named(tmp_path, s3):
    for name in (str(tmp_path / "none.svs"), f"{s3}/none.svs"):
        with pytest.raises(StorageError, match=r"none.svs: cannot read it") as caught:
            source.Source(name)
        assert caught.value.lasting


def test_a_store_that_sends_less_is_no_end_of_the_file(path, monkeypatch):
    opened = source.Source(str(path))
    monkeypatch.setattr(storage, "read_at", lambda file, uri, offset, n_bytes: CONTENT[:3])
    with pytest.raises(StorageError, match="3 of 10 bytes were sent") as caught:
        opened.read((0, 10))
    assert not caught.value.lasting


@pytest.mark.parametrize("place", ["disk", "store"])
def test_a_file_that_was_replaced_is_read_no_more(path, uri, monkeypatch, place):
    """Of the same size, in the same second: a store's ETag says it."""
    name = str(path) if place == "disk" else uri
    opened = source.Source(name)
    monkeypatch.setattr(source, "CHECK_S", 0)
    assert opened.read((0, 10)) == CONTENT[:10]
    storage.write_bytes(name, CONTENT[::-1])
    for _ in range(2):
        with pytest.raises(StorageError, match=r"it was replaced while it was read; run the same") as caught:
            opened.read((0, 10))
        assert not caught.value.lasting
        monkeypatch.setattr(source, "CHECK_S", 3_600)
    assert source.Source(name).read((0, 10)) == CONTENT[::-1][:10]


def test_the_version_is_asked_for_now_and_then(uri, store, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(source.time, "monotonic", lambda: now[0])
    opened = source.Source(uri)
    for now[0] in (100, 104.9, 105, 106, 109, 110.5):
        opened.read((0, 10))
    methods = [method for method, _ in store.asked]
    assert methods == ["HEAD", "GET", "GET", "GET", "HEAD", "GET", "GET", "GET", "HEAD"]


def test_blocks_are_a_file_that_is_requested_once(uri, store):
    opened = source.Source(uri)
    blocks, file = source.Blocks(opened), io.BytesIO(CONTENT)
    for place, n_bytes in [(0, 4), (4, 10), (16_380, 10), (90_000, 200), (102_390, 99), (10, 50_000)]:
        assert (blocks.seek(place), file.seek(place)) == (place, place)
        assert blocks.read(n_bytes) == file.read(n_bytes)
        assert blocks.read(3) == file.read(3)
    assert blocks.seek(2**62) == 2**62
    assert blocks.read(5) == b""
    block = source.BLOCK_BYTES
    # The last one is cut, and those between 32 KiB and the one of 90,000 come in one request.
    assert store.sent_bytes == [block, block, block, len(CONTENT) - 6 * block, 2 * block]


def test_tags_have_so_many_bytes_at_most(path, monkeypatch):
    monkeypatch.setattr(source, "MAX_TAG_BYTES", 4 * source.BLOCK_BYTES)
    blocks = source.Blocks(source.Source(str(path)))
    assert len(blocks.read(60_000)) == 60_000
    with pytest.raises(ImageError, match="bytes of tags") as caught:
        blocks.read(10_000)
    assert caught.value.code == "too_large"


@pytest.mark.parametrize(
    ("most_bytes", "parts", "expected"),
    [
        (300, [], []),
        (300, [(0, 10), (10, 10), (20, 5)], [3]),
        (300, [(0, 80), (90, 10)], [2]),  # 10 are an eighth of 90 bytes at most
        (300, [(0, 80), (92, 10)], [1, 1]),
        (300, [(0, 80), (85, 80), (170, 80), (260, 10)], [4]),
        (269, [(0, 80), (85, 80), (170, 80), (260, 10)], [3, 1]),
        (300, [(0, 80), (80, 80), (99, 80)], [2, 1]),  # overlaps
        (300, [(0, 500), (500, 10)], [1, 1]),
    ],
)
def test_neighbours_are_requested_together(monkeypatch, most_bytes, parts, expected):
    monkeypatch.setattr(source, "MOST_BYTES", most_bytes)
    found = list(source.spans(parts))
    assert [len(together) for together in found] == expected
    assert [part for together in found for part in together] == parts


def test_parts_are_requested_once_and_in_few_requests(uri, store):
    opened = source.Source(uri)
    parts = source.Parts(opened)
    wanted = [(place, 100) for place in (*range(0, 1_000, 100), *range(50_000, 50_300, 100))]
    parts.request(wanted[::-1])
    parts.request(wanted)
    for place, n_bytes in wanted:
        assert parts.read((place, n_bytes)) == CONTENT[place : place + n_bytes]
    assert sorted(store.sent_bytes) == [300, 1_000]
    assert parts.read((70_000, 7)) == CONTENT[70_000:70_007]
    assert len(store.sent_bytes) == 3


def test_memory_for_parts_is_bounded_and_the_last_used_stay(path, monkeypatch):
    monkeypatch.setattr(source, "CACHE_BYTES", 1_000)
    opened, reads = source.Source(str(path)), []
    monkeypatch.setattr(opened, "read", lambda part: reads.append(part) or CONTENT[part[0] :][: part[1]])
    parts = source.Parts(opened)
    parts.request((place, 100) for place in range(0, 1_000, 100))
    for _ in range(2):
        assert parts.read((0, 100)) == CONTENT[:100]
        parts.request([(0, 100)])
    parts.request((place, 100) for place in range(50_000, 50_500, 100))
    assert parts.read((50_000, 100)) == CONTENT[50_000:50_100]
    assert parts.read((0, 100)) == CONTENT[:100]
    assert (parts._held_bytes, len(parts._held), reads) == (1_000, 10, [(0, 1_000), (50_000, 500)])
    assert parts.read((100, 100)) == CONTENT[100:200]
    assert reads[2:] == [(100, 100)]
    # Contents are gone as well, of requests that brought several.
    assert sum(len(request.result()) for request in set(parts._held.values())) == len(parts._held) == 10


def test_a_part_that_failed_is_requested_again(path, monkeypatch):
    opened, faulty = source.Source(str(path)), [True]
    read = opened.read

    def fails(part):
        if faulty:
            raise StorageError(f"{path}: no")
        return read(part)

    monkeypatch.setattr(opened, "read", fails)
    parts = source.Parts(opened)
    parts.request([(0, 10), (10, 10)])
    for part in [(0, 10), (10, 10)]:
        with pytest.raises(StorageError, match="no"):
            parts.read(part)
    faulty.clear()
    assert [parts.read(part) for part in [(0, 10), (10, 10)]] == [CONTENT[:10], CONTENT[10:20]]
    assert parts._held_bytes == 20


def test_several_requests_are_under_way_at_a_time(path, monkeypatch):
    opened, together = source.Source(str(path)), threading.Barrier(4, timeout=20)
    monkeypatch.setattr(opened, "read", lambda part: (together.wait(), CONTENT[part[0] :][: part[1]])[1])
    parts = source.Parts(opened)
    parts.request((place, 10) for place in (0, 1_000, 2_000, 3_000))
    assert parts.read((3_000, 10)) == CONTENT[3_000:3_010]


def test_the_first_parts_that_fit_are_taken():
    parts = [(0, 60), (0, 60), (60, 30), (90, 11), (101, 5)]
    assert list(source.within(parts, 100)) == [(0, 60), (60, 30)]
    assert list(source.within(parts, 1_000)) == [(0, 60), (60, 30), (90, 11), (101, 5)]
