import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.imaging import prepared

SIZE = (6, 8)


def digest(number):
    return hashlib.sha256(bytes([number])).hexdigest()


def facts(number):
    size = {schema.HEIGHT_PX: 40 + number, schema.WIDTH_PX: 60}
    return {
        schema.SHA256: digest(number),
        **size,
        schema.PHASH: f"{number:016x}",
        schema.TISSUE_FRACTION: 0.5,
    }


def pixels(number):
    return np.random.default_rng(number).integers(0, 256, (*SIZE, 3), np.uint8)


def write(store, *numbers):
    prepared.write(store, [facts(n) for n in numbers], [pixels(n) for n in numbers])


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.process)])
def store(request, tmp_path):
    uri = str(tmp_path) if request.param == "disk" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    return prepared.Store(uri, *SIZE)


def rows(*numbers):
    return pa.table({schema.SHA256: pa.array([digest(n) for n in numbers])})


def found(store, *numbers):
    """Images of some contents, as a reader finds them."""
    index, _ = prepared.list_images(store)
    return [prepared.read(row, *SIZE) for row in prepared.with_places(rows(*numbers), index).to_pylist()]


def test_images_are_found_by_content_with_their_facts(store):
    assert prepared.list_images(store)[0].num_rows == 0
    assert found(store, 1) == [None]
    write(store, 3, 1)
    write(store, 2)
    index, n_unusable = prepared.list_images(store)
    assert n_unusable == 0
    assert index[schema.SHA256].to_pylist() == sorted(map(digest, (1, 2, 3)))
    for row in index.to_pylist():
        assert facts(row[schema.HEIGHT_PX] - 40).items() <= row.items()
    images = found(store, 2, 9, 3, 1, 3)
    assert images.pop(1) is None
    for number, image in zip((2, 3, 1, 3), images, strict=True):
        np.testing.assert_array_equal(image, pixels(number))


def test_another_size_or_version_has_a_folder_of_its_own(store, monkeypatch):
    write(store, 1)
    assert prepared.list_images(prepared.Store(store.uri, 8, 6))[0].num_rows == 0
    monkeypatch.setattr(prepared.image, "DECODER_VERSION", 0)
    assert prepared.list_images(store)[0].num_rows == 0


def spoil(store, suffix, change):
    (file,) = [file for file in storage.list_files(store.folder) if file.path.endswith(suffix)]
    changed = change(storage.read_bytes(file.uri))
    storage.delete_file(file.uri) if changed is None else storage.write_bytes(file.uri, changed)


def foreign(_):
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table({schema.SHA256: [digest(1)]}), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("suffix", "change"),
    [
        (prepared.INDEX, lambda data: data[: len(data) // 2]),
        (prepared.INDEX, lambda _: b""),
        (prepared.INDEX, foreign),
        (prepared.PIXELS, lambda data: data[:-1]),
        (prepared.PIXELS, lambda data: data + b"\0"),
        (prepared.PIXELS, lambda _: None),
    ],
)
def test_a_damaged_or_foreign_shard_is_counted_and_not_used(store, suffix, change):
    write(store, 1)
    spoil(store, suffix, change)
    write(store, 2)
    assert prepared.list_images(store)[1] == 1
    missing, image = found(store, 1, 2)
    assert missing is None
    np.testing.assert_array_equal(image, pixels(2))


def test_pixels_without_their_index_are_what_a_killed_job_leaves(store):
    write(store, 1)
    spoil(store, prepared.INDEX, lambda _: None)
    assert prepared.list_images(store) == (prepared._EMPTY, 0)


def test_a_changed_pixel_is_noticed_when_it_is_read(store):
    write(store, 1, 2)
    spoil(store, prepared.PIXELS, lambda data: data[:5] + bytes([data[5] ^ 1]) + data[6:])
    damaged, intact = found(store, 1, 2)
    assert damaged is None
    np.testing.assert_array_equal(intact, pixels(2))


def test_a_shard_that_went_away_is_as_none(store):
    write(store, 1)
    index, _ = prepared.list_images(store)
    (row,) = prepared.with_places(rows(1), index).to_pylist()
    spoil(store, prepared.PIXELS, lambda data: data[:10])
    assert prepared.read(row, *SIZE) is None
    spoil(store, prepared.PIXELS, lambda _: None)
    assert prepared.read(row, *SIZE) is None


def test_of_two_jobs_that_prepare_the_same_the_later_is_used(store):
    write(store, 1, 2)
    spoil(store, prepared.PIXELS, lambda data: bytes(len(data)))
    write(store, 1)
    index, _ = prepared.list_images(store)
    assert len(index) == 2
    intact, damaged = found(store, 1, 2)
    np.testing.assert_array_equal(intact, pixels(1))
    assert damaged is None


def test_a_disk_is_never_filled(tmp_path, monkeypatch):
    store = prepared.Store(str(tmp_path / "not" / "yet"), *SIZE)
    asked = []

    def usage(path):
        asked.append(path)
        return type("usage", (), {"free": 2_880})

    monkeypatch.setattr(prepared.shutil, "disk_usage", usage)
    assert store.image_bytes == 144
    assert store.has_room(10)
    assert not store.has_room(11)
    assert asked == [Path(tmp_path)] * 2
    assert prepared.Store("s3://bucket/x", *SIZE).has_room(10**12)
