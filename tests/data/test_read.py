import numpy as np
import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.data import read
from bcd.errors import StorageError
from bcd.imaging import image
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
    for threads in (1, 2):
        found = read.pixels(table, 64, 64, [schema.IMAGE_ID], threads)
        codes = found[schema.ERROR].tolist()
        assert 1 <= codes.count("unreadable") <= 8
        assert codes.count("") == len(rows) - codes.count("unreadable")
