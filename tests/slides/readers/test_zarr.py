import json
import uuid

import numpy as np
import pytest

from bcd import storage
from bcd.errors import StorageError
from bcd.imaging.image import ImageError
from bcd.slides import slide, slide_cache
from bcd.slides.readers import zarr
from tests import pictures, slide_files

PIXELS = pictures.stained(256, 384)
RECTANGLES = [(0, 0, 384, 256), (30, 100, 200, 100), (-20, -10, 60, 50), (350, 250, 60, 40), (400, 0, 9, 9)]


def write(folder, version=3, changes=()):
    """The files at any URI, of which some are other ones, or none."""
    files = {**slide_files.zarr_files(PIXELS, version), **dict(changes)}
    for name, content in files.items():
        if content is not None:
            storage.write_bytes(f"{folder}/s.ome.zarr/{name}", content)
    return f"{folder}/s.ome.zarr"


def edited(name, version=3, **changes):
    """A file of metadata with other values."""
    content = json.loads(slide_files.zarr_files(PIXELS, version)[name])
    return {name: json.dumps(content | changes).encode()}


def described(**changes):
    content = json.loads(slide_files.zarr_files(PIXELS, 3)["zarr.json"])
    content["attributes"]["ome"]["multiscales"][0] |= changes
    return {"zarr.json": json.dumps(content).encode()}


def error_of(function, *given):
    with pytest.raises(ImageError) as caught:
        function(*given)
    return caught.value.code, caught.value.message


def require_pixels(uri):
    reader = zarr.ZarrReader(uri)
    for level, whole in enumerate((PIXELS, slide_files.halved(PIXELS))):
        padded = np.pad(whole, ((64, 400), (64, 400), (0, 0)), constant_values=255)
        for x, y, width, height in RECTANGLES:
            found = reader.read(x << level, y << level, level, width, height)
            np.testing.assert_array_equal(found, padded[64 + y :, 64 + x :][:height, :width])
    reader.close()


@pytest.mark.parametrize("version", [2, 3])
def test_rectangles_have_the_pixels_that_were_written(tmp_path, version):
    uri = write(tmp_path, version)
    facts = zarr.ZarrReader(uri).facts
    assert facts.sizes == ((384, 256), (192, 128))
    assert (facts.downsamples, facts.profile, facts.reader) == ((1.0, 2.0), None, "zarr")
    assert dict(facts.properties) == {"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.5"}
    require_pixels(uri)


def test_it_is_read_where_it_is_on_a_store(s3):
    folder = f"{s3}/{uuid.uuid4().hex}"
    uri = write(folder, 2)
    require_pixels(uri)
    opened, staged = slide_cache.open_staged(uri, slide.pixel_size.UNKNOWN)
    assert (opened.width_px, opened.mpp_x, staged.lock) == (384, 0.5, None)
    slide_cache.open_staged.cache_clear()


def test_the_first_image_of_a_collection_counts(tmp_path):
    """As bioformats2raw writes."""
    files = slide_files.zarr_files(PIXELS, 2)
    storage.write_bytes(f"{tmp_path}/s.zarr/.zattrs", b'{"bioformats2raw.layout": 3}')
    for name, content in files.items():
        storage.write_bytes(f"{tmp_path}/s.zarr/0/{name}", content)
    require_pixels(f"{tmp_path}/s.zarr")


def test_a_missing_chunk_has_the_fill_value_and_a_damaged_one_is_an_error(tmp_path):
    fill = edited("0/zarr.json", fill_value=200)
    uri = write(tmp_path, 3, {**fill, "0/c/0/0/1": None, "0/c/0/1/1": b"no chunk"})
    reader = zarr.ZarrReader(uri)
    assert (reader.read(64, 0, 0, 64, 64) == 200).all()
    code, message = error_of(reader.read, 64, 64, 0, 64, 64)
    assert (code, "the slide cannot be read" in message) == ("unreadable", True)
    np.testing.assert_array_equal(reader.read(128, 64, 0, 64, 64), PIXELS[64:128, 128:192])


def test_chunks_are_kept_and_their_number_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(zarr, "CACHE_BYTES", 6 * 64 * 64 * 3)
    reader, read, fetched = zarr.ZarrReader(write(tmp_path)), storage.read_bytes, []
    monkeypatch.setattr(storage, "read_bytes", lambda uri, most: fetched.append(uri) or read(uri, most))
    for x in range(0, 64, 8):
        reader.read(x, 0, 0, 64, 128)
    assert len(fetched) == 4
    reader.read(0, 0, 0, 384, 256)
    assert reader._chunk.cache_info().currsize == 6


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"zarr.json": None}, "unreadable", "has no zarr.json or .zattrs"),
        ({"zarr.json": b"{"}, "unreadable", "the slide cannot be read: "),
        ({"zarr.json": b"[" * 9_000}, "unreadable", "the slide cannot be read: "),
        ({"0/zarr.json": None}, "unreadable", "has no zarr.json or .zarray"),
        (described(datasets=[]), "unreadable", "it has 0 levels"),
        (described(datasets=[{"path": "../0"}]), "unreadable", "it names arrays outside of its folder"),
        (described(datasets=[{"path": "s3://b/0"}]), "unreadable", "it names arrays outside of its folder"),
        (
            edited("0/zarr.json", data_type="uint16"),
            "unsupported_format",
            "an OME-Zarr of uint16, c 3, y 256, x",
        ),
        (
            edited("0/zarr.json", shape=[4, 256, 384]),
            "unsupported_format",
            "of uint8, c 4, y 256, x 384; expected",
        ),
        (edited("0/zarr.json", shape=[3, 10**9, 10**9]), "too_many_pixels", "1,000,000,000 px is impossible"),
        (edited("0/zarr.json", fill_value=300), "unreadable", "out of bounds"),
        (
            edited("0/zarr.json", shape=[3, -256, -384]),
            "unsupported_format",
            "an OME-Zarr in chunks of 64 x 64",
        ),
        (edited("0/zarr.json", shape=[3, 0, 384]), "unreadable", "by zero"),
        (
            edited("0/zarr.json", chunk_grid={"configuration": {"chunk_shape": [10**9, 64, 64]}}),
            "unsupported_format",
            "an OME-Zarr in chunks of 64 x 64 px",
        ),
        (
            edited("0/zarr.json", chunk_grid={"configuration": {"chunk_shape": [3, 1, 1]}}),
            "unsupported_format",
            "an OME-Zarr in chunks of 1 x 1 px",
        ),
        (
            edited("0/zarr.json", chunk_grid={"configuration": {"chunk_shape": [3, 99_999, 99_999]}}),
            "unsupported_format",
            "an OME-Zarr in chunks of 99,999 x 99,999 px",
        ),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path, changes, code, message):
    uri = write(tmp_path, 3, changes)
    found = error_of(slide.open_slide, uri)
    assert (found[0], message in found[1]) == (code, True), found


def test_units_are_converted_and_without_one_there_is_no_scale(tmp_path):
    axes = [{"name": "c"}, {"name": "y", "unit": "millimeter"}, {"name": "x", "unit": "nanometer"}]
    factor = [{"type": "scale", "scale": [1, 0.001, 1_000]}]
    uri = write(tmp_path, 3, described(axes=axes, coordinateTransformations=factor))
    with slide.open_slide(uri) as opened:
        assert (opened.mpp_x, opened.mpp_y) == (pytest.approx(0.5), pytest.approx(0.5))
    uri = write(tmp_path, 3, described(axes=[{"name": "c"}, {"name": "y"}, {"name": "x"}]))
    assert error_of(slide.open_slide, uri)[0] == "missing_mpp"


def test_a_store_that_fails_is_not_damage(tmp_path, monkeypatch):
    def fails(uri, most):
        raise StorageError(f"{uri}: no")

    reader = zarr.ZarrReader(write(tmp_path))
    monkeypatch.setattr(storage, "read_bytes", fails)
    with pytest.raises(StorageError, match="no"):
        reader.read(0, 0, 0, 9, 9)
