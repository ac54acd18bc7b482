import os
import uuid
from pathlib import Path

import pytest

from bcd import storage
from bcd.errors import StorageError
from bcd.imaging import image
from bcd.slides import pixel_size, slide_cache
from tests import pictures
from tests.slides.parts import pyramids
from tests.slides.test_dicom import OTHERS, dicom_file


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test."""
    monkeypatch.setattr(slide_cache, "CACHE", tmp_path / "cache")
    yield tmp_path / "cache"
    slide_cache.open_staged.cache_clear()


@pytest.fixture
def fetched(monkeypatch):
    """The URIs that were downloaded, in order."""
    seen = []
    real = storage.download

    def download(uri, path):
        seen.append(uri)
        real(uri, path)

    monkeypatch.setattr(storage, "download", download)
    return seen


@pytest.fixture
def folder(s3):
    return f"{s3}/{uuid.uuid4().hex}"


def put(folder, *names, size=10):
    for name in names:
        storage.write_bytes(f"{folder}/{name}", name.encode().ljust(size, b"."))
    return [f"{folder}/{name}" for name in names]


def kept(cache):
    """Names of the files in the cache."""
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.name != slide_cache.LOCK)


def test_the_cache_is_for_its_user_alone(tmp_path):
    slide_cache.CACHE.mkdir(mode=0o755)
    slide_cache._require_private()
    assert slide_cache.CACHE.stat().st_mode & 0o777 == 0o700
    slide_cache.CACHE.rmdir()
    slide_cache._require_private()
    assert slide_cache.CACHE.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["link", "file", "of another user"])
def test_what_others_put_in_its_place_is_not_used(tmp_path, monkeypatch, kind):
    (tmp_path / "theirs").mkdir()
    if kind == "link":
        slide_cache.CACHE.symlink_to(tmp_path / "theirs")
    elif kind == "file":
        slide_cache.CACHE.touch()
    else:
        slide_cache.CACHE.mkdir()
        monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(StorageError, match="cache is not a folder of this user: remove it, or set TMPDIR"):
        slide_cache.stage("s3://bucket/a.svs")
    assert list((tmp_path / "theirs").iterdir()) == []


def test_a_local_file_is_not_copied(tmp_path, cache, fetched):
    for uri in (str(tmp_path / "a.svs"), f"file://{tmp_path}/a.svs"):
        assert slide_cache.stage(uri) == slide_cache.Staged(tmp_path / "a.svs", None)
    assert (fetched, cache.exists()) == ([], False)


def test_a_remote_file_is_fetched_once_and_held_by_many(folder, fetched):
    (uri,) = put(folder, "a.svs")
    staged = [slide_cache.stage(uri) for _ in range(3)]
    assert {s.path for s in staged} == {staged[0].path}
    assert staged[0].path.name == "a.svs"
    assert staged[0].path.read_bytes() == b"a.svs....."
    assert fetched == [uri]


def test_equal_names_in_two_folders_are_two_files(folder, fetched):
    one, two = put(folder, "1/a.svs", "2/a.svs")
    assert slide_cache.stage(one).path.read_bytes() == b"1/a.svs..."
    assert slide_cache.stage(two).path.read_bytes() == b"2/a.svs..."


def test_whole_or_not_at_all(folder, cache, monkeypatch):
    uri, *_ = put(folder, "a.mrxs", "a/Data0.dat", "a/Data1.dat")
    real = storage.download

    def breaks(uri, path):
        path.write_bytes(b"half")
        if uri.endswith("Data0.dat"):
            raise StorageError(f"{uri}: connection lost")
        real(uri, path)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "download", breaks)
        with pytest.raises(StorageError, match=r"Data0.dat: connection lost"):
            slide_cache.stage(uri)
    assert not list(cache.glob("*/slide"))
    path = slide_cache.stage(uri).path
    assert path.read_bytes() == b"a.mrxs...."
    assert kept(cache) == ["Data0.dat", "Data1.dat", "a.mrxs"]


def test_a_missing_file_is_named(folder):
    with pytest.raises(StorageError, match=r"none.svs: cannot read it"):
        slide_cache.stage(f"{folder}/none.svs")


def test_what_belongs_to_a_slide_comes_along(folder):
    names = ["a.mrxs", "a/Slidedat.ini", "a/deep/Data0.dat", "b.mrxs", "b/Data0.dat", "a.txt"]
    path = slide_cache.stage(put(folder, *names)[0]).path
    assert below(path) == ["a.mrxs", "a/Slidedat.ini", "a/deep/Data0.dat"]
    one, two, other = dicom_file("1.1"), dicom_file("1.2"), dicom_file("1.1", OTHERS["annotation.dcm"])
    series = {"1.dcm": one, "IM2": one, "3.dcm": two, "4.dcm": other, "e/1.dcm": one, "x.txt": one, "5": b""}
    for name, content in series.items():
        storage.write_bytes(f"{folder}/d/{name}", content)
    assert below(slide_cache.stage(f"{folder}/d/IM2").path) == ["1.dcm", "IM2"]
    assert below(slide_cache.stage(f"{folder}/d/3.dcm").path) == ["3.dcm"]
    assert below(slide_cache.stage(f"{folder}/d/5").path) == ["5"]
    path = slide_cache.stage(put(folder, "f/a.svs", "f/a/b.svs")[0]).path
    assert below(path) == ["a.svs"]


def below(path):
    files = [file for file in path.parent.rglob("*") if file.is_file()]
    return sorted(file.relative_to(path.parent).as_posix() for file in files)


def test_the_cache_is_bounded_and_the_least_used_goes_first(folder, cache, fetched, monkeypatch):
    monkeypatch.setattr(slide_cache, "CACHE_BYTES", 250)
    uris = put(folder, "a.svs", "b.svs", "c.svs", "d.svs", size=100)
    for second, uri in enumerate([*uris[:3], uris[0]]):
        used(slide_cache.stage(uri).path, second)
    slide_cache.stage(uris[3])
    assert kept(cache) == ["a.svs", "c.svs", "d.svs"]
    slide_cache.stage(uris[1])
    assert kept(cache) == ["a.svs", "b.svs", "d.svs"]
    assert fetched == [*uris, uris[1]]


def used(path, second):
    """As if it had been used at that time: file systems count in coarse steps."""
    os.utime(path.parent.parent, (second, second))


def test_a_slide_that_was_replaced_is_fetched_again(folder, fetched):
    (uri,) = put(folder, "a.svs")
    assert slide_cache.stage(uri).path.read_bytes() == b"a.svs....."
    storage.write_bytes(uri, b"another")
    assert slide_cache.stage(uri).path.read_bytes() == b"another"
    assert fetched == [uri, uri]


def test_the_cache_is_looked_through_now_and_then(folder, cache, monkeypatch):
    """Among 3,000 folders a look takes half a second, and an archive may have 100,000 small TIFFs."""
    monkeypatch.setattr(slide_cache, "CACHE_BYTES", 640)
    monkeypatch.setattr(slide_cache, "LOOKS_PER_CACHE", 2)
    slide_cache.stage(*put(folder, "first.svs", size=1_000))
    looks = []
    monkeypatch.setattr(slide_cache, "_size", lambda folder: looks.append(folder) or 100)
    counts = []
    for i in range(9):
        slide_cache.stage(*put(folder, f"{i}.svs", size=100))
        counts.append(len(looks))
        looks.clear()
    # The first looks, because much came before it; then after each 400 bytes. One is of the fetched itself.
    assert [i for i, count in enumerate(counts) if count > 1] == [0, 4, 8]


def test_what_is_held_stays(folder, cache, monkeypatch):
    monkeypatch.setattr(slide_cache, "CACHE_BYTES", 50)
    uris = put(folder, "a.svs", "b.svs", "c.svs", "d.svs", size=100)
    held = slide_cache.stage(uris[0])
    used(held.path, 0)
    for uri in uris[1:]:
        slide_cache.stage(uri)
    assert kept(cache) == ["a.svs", "d.svs"]
    del held
    slide_cache.stage(uris[1])
    assert kept(cache) == ["b.svs"]


def test_what_a_kill_left_behind_goes_too(folder, cache, monkeypatch):
    monkeypatch.setattr(slide_cache, "CACHE_BYTES", 50)
    (cache / "killed/aside").mkdir(parents=True)
    (cache / "killed/aside/x.svs").write_bytes(bytes(100))
    slide_cache.stage(*put(folder, "a.svs"))
    assert kept(cache) == ["a.svs"]


def test_a_file_that_went_before_it_was_held_is_fetched_again(folder, cache, fetched, monkeypatch):
    """Another process may make room between the lock for fetching and the lock for holding."""
    (uri,) = put(folder, "a.svs")
    real, removed = slide_cache.fcntl.flock, []

    def flock(file, operation):
        if operation == slide_cache.fcntl.LOCK_SH and fetched and not removed:
            removed.append(slide_cache._remove_unused(Path(file.name).parent))
        real(file, operation)

    monkeypatch.setattr(slide_cache.fcntl, "flock", flock)
    assert slide_cache.stage(uri).path.read_bytes() == b"a.svs....."
    assert (removed, fetched) == ([True], [uri, uri])


def test_the_last_slides_stay_open(folder, fetched):
    content = pictures.tiled_tiff(pictures.gradient(16, 24), 0.5, **pictures.UNUSUAL)
    uris = [f"{folder}/{i}.svs" for i in range(3)]
    for uri in uris:
        storage.write_bytes(uri, content)
    opened, staged = slide_cache.open_staged(uris[0], pixel_size.UNKNOWN)
    assert slide_cache.open_staged(uris[0], pixel_size.UNKNOWN)[0] is opened
    assert (opened.width_px, opened.height_px, staged.path.name) == (24, 16, "0.svs")
    for uri in uris:
        slide_cache.open_staged(uri, pixel_size.UNKNOWN)
    assert slide_cache.open_staged.cache_info().currsize == slide_cache.OPEN_SLIDES == 2
    assert fetched == uris


def test_a_slide_that_is_read_in_parts_is_not_fetched(folder, cache, fetched):
    """Nor a TIFF that its tags show to be a field."""
    contents = {"slide.tif": None, "field.tif": 1}
    for name, unit in contents.items():
        tags, tiles = pyramids.page(pictures.stained(64, 64))
        tags |= {296: (3, [unit])} if unit else {}
        storage.write_bytes(f"{folder}/{name}", pictures.tiff((tags, tiles)))
    opened, staged = slide_cache.open_staged(f"{folder}/slide.tif", pixel_size.UNKNOWN)
    assert (opened.width_px, opened.mpp_x, staged) == (64, 0.5, None)
    found = [slide_cache.is_slide_at(f"{folder}/{name}", pixel_size.UNKNOWN) for name in contents]
    assert (found, fetched, cache.exists()) == ([True, False], [], False)
    other = pictures.tiled_tiff(pictures.gradient(16, 24), 0.5, **pictures.UNUSUAL)
    storage.write_bytes(f"{folder}/other.tif", other)
    assert slide_cache.is_slide_at(f"{folder}/other.tif", pixel_size.UNKNOWN)
    assert fetched == [f"{folder}/other.tif"]


def test_a_broken_slide_is_not_kept_open(folder, fetched):
    slide = put(folder, "a.svs")
    for _ in range(2):
        with pytest.raises(image.ImageError, match="unreadable"):
            slide_cache.open_staged(*slide, pixel_size.UNKNOWN)
    assert len(fetched) == 1
