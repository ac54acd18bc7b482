import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.data import read
from bcd.errors import StorageError
from bcd.imaging import appearance, image, prepared
from bcd.slides import slide_cache
from tests import pictures
from tests.test_storage import DAMAGED


def test_failing_storage_is_no_fault_of_the_image(tmp_path):
    uris = [DAMAGED, str(tmp_path / "none.png")]
    rows = [{schema.IMAGE_ID: uri, schema.URI: uri} for uri in uris]
    found = read.pixels(schema.fill(pa.Table.from_pylist(rows), schema.READING), 32, 32, [])
    assert found[schema.ERROR].tolist() == ["unavailable", "unreadable"]
    assert found[schema.ERROR_MESSAGE][0].startswith(f"{DAMAGED}: cannot read it")


def test_whatever_is_raised_for_one_image_is_the_row_of_that_image(monkeypatch, tmp_path):
    """While it is read, counted and decoded; the images beside it have their pixels."""
    uris = [str(tmp_path / f"{name}.png") for name in ("good", "memory", "large", "overflow")]
    for uri in uris:
        storage.write_bytes(uri, pictures.encode(pictures.gradient()))
    tags, strips = pictures.tiff_page(pictures.gradient()[..., 0], 3)
    storage.write_bytes(uris[3], pictures.tiff((tags | {320: (4, [2**31] * 768)}, strips)))
    storage.write_bytes(uris[2], bytes(20_000))
    monkeypatch.setattr(image, "MAX_FILE_BYTES", 19_999)
    read_bytes = storage.read_bytes

    def fails(uri, *limit):
        if "memory" in uri:
            raise MemoryError
        return read_bytes(uri, *limit)

    monkeypatch.setattr(storage, "read_bytes", fails)
    rows = [{schema.IMAGE_ID: uri, schema.URI: uri} for uri in uris]
    found = read.pixels(schema.fill(pa.Table.from_pylist(rows), schema.READING), 46, 70, [])
    assert found[schema.ERROR].tolist() == ["", "unreadable", "too_large", "truncated"]
    assert found[schema.ERROR_MESSAGE][1] == f"{uris[1]}: cannot read it: MemoryError"
    np.testing.assert_array_equal(found[schema.IMAGE][0], pictures.gradient())


def test_few_files_are_in_memory_before_they_are_needed(monkeypatch, tmp_path):
    """And of large ones a single one."""
    uris = [str(tmp_path / f"{i:02}.png") for i in range(40)]
    for i, uri in enumerate(uris):
        storage.write_bytes(uri, bytes([i]) * (200 if i % 10 == 9 else 100))
    monkeypatch.setattr(read, "AHEAD_BYTES", 150)
    taken, ahead, large, read_bytes = [], [0], [], storage.read_bytes

    def counted(uri, most):
        content = read_bytes(uri, most)
        if most == 150:
            ahead.append(uris.index(uri) - len(taken))
        else:
            large.append((uris.index(uri), len(taken)))
        return content

    monkeypatch.setattr(storage, "read_bytes", counted)
    for content in read.contents(uris):
        taken.append(content)
    assert [len(content) for content in taken] == [200 if i % 10 == 9 else 100 for i in range(40)]
    assert [content[0] for content in taken] == list(range(40))
    assert max(ahead) <= read.AHEAD
    assert large == [(i, i) for i in (9, 19, 29, 39)]


def test_a_tile_of_a_slide_that_cannot_be_fetched_now_is_left_to_a_rerun(monkeypatch):
    def fails(uri, given):
        raise StorageError(f"{uri}: no")

    monkeypatch.setattr(slide_cache, "open_staged", fails)
    with pytest.raises(image.ImageError, match="unavailable"):
        read.picture({schema.URI: "s.svs", schema.X_LEVEL0_PX: 0})


@pytest.mark.real
def test_one_damaged_tile_is_one_error(tmp_path, real_data):
    """After an error OpenSlide's handle is dead: the tiles beside the damaged one are read all the same."""
    content = bytearray((real_data / "slides/CMU-1-Small-Region.svs").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3_000] = bytes(3_000)
    (tmp_path / "damaged.svs").write_bytes(content)
    rows = [
        {
            schema.IMAGE_ID: f"{x},{y}",
            schema.URI: str(tmp_path / "damaged.svs"),
            schema.X_LEVEL0_PX: x,
            schema.Y_LEVEL0_PX: y,
            schema.MPP: 0.499,
            schema.WIDTH_PX: 240,
            schema.HEIGHT_PX: 240,
        }
        for y in range(0, 2_967, 240)
        for x in range(0, 2_220, 240)
    ]
    table = schema.fill(pa.Table.from_pylist(rows), schema.READING)
    found = read.pixels(table, 64, 64, [schema.IMAGE_ID])
    codes = found[schema.ERROR].tolist()
    assert 1 <= codes.count("unreadable") <= 8
    assert codes.count("") == len(rows) - codes.count("unreadable")


@pytest.fixture
def kept(tmp_path):
    """A file, its prepared image, and its row."""
    content = pictures.encode(pictures.gradient())
    storage.write_bytes(str(tmp_path / "a.png"), content)
    store, digest = prepared.Store(str(tmp_path / "prepared"), 32, 48), hashlib.sha256(content).hexdigest()
    facts = {schema.SHA256: digest, schema.HEIGHT_PX: 46, schema.WIDTH_PX: 70}
    fitted = image.fit(pictures.gradient(), 32, 48)
    prepared.write(store, [facts], [fitted])
    row = {schema.IMAGE_ID: "a", schema.URI: str(tmp_path / "a.png"), schema.SHA256: digest}
    table = prepared.with_places(pa.Table.from_pylist([row]), prepared.list_images(store)[0])
    return tmp_path / "a.png", Path(table[schema.SHARD][0].as_py()), table, fitted


def check_whole(found, table, fitted):
    np.testing.assert_array_equal(found[schema.IMAGE][0], fitted)
    assert (found[schema.HEIGHT_PX][0], found[schema.WIDTH_PX][0]) == (46, 70)
    assert found[schema.SHA256][0] == table[schema.SHA256][0].as_py()
    assert found[schema.ERROR][0] == ""


def test_a_prepared_image_is_read_in_place_of_its_file(kept):
    path, _, table, fitted = kept
    path.unlink()
    check_whole(read.pixels(table, 32, 48, []), table, fitted)


def test_the_file_is_read_where_the_prepared_image_is_damaged(kept):
    _, shard, table, fitted = kept
    shard.write_bytes(bytes(shard.stat().st_size))
    check_whole(read.pixels(table, 32, 48, []), table, fitted)
    shard.unlink()
    check_whole(read.pixels(table, 32, 48, []), table, fitted)


def test_a_file_that_is_another_one_by_now_is_an_error(kept):
    path, shard, table, fitted = kept
    path.write_bytes(pictures.encode(pictures.gradient(47)))
    check_whole(read.pixels(table, 32, 48, []), table, fitted)  # as inspected
    shard.unlink()
    found = read.pixels(table, 32, 48, [])
    assert found[schema.ERROR].tolist() == ["changed"]
    assert not found[schema.IMAGE].any()


def test_the_stain_is_that_of_the_fitted_image(tmp_path):
    storage.write_bytes(str(tmp_path / "a.png"), pictures.encode(pictures.gradient(92, 140)))
    storage.write_bytes(str(tmp_path / "b.png"), b"no image")
    rows = [{schema.IMAGE_ID: name, schema.URI: str(tmp_path / name)} for name in ("a.png", "b.png")]
    table = schema.fill(pa.Table.from_pylist(rows), schema.READING)
    found = read.pixels(table, 64, 96, [], stain=True)
    expected = np.array(appearance.measure_stain(found[schema.IMAGE][0]), np.float32)
    assert np.isfinite(expected).all()
    assert [found[name][0] for name in schema.STAIN] == expected.tolist()
    assert np.isnan([found[name][1] for name in schema.STAIN]).all()
    assert not set(schema.STAIN) & read.pixels(table, 64, 96, []).keys()
