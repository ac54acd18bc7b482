"""What the child does, in this process: tests may import OpenSlide."""

import openslide
import pytest

from bcd.errors import ImageError
from bcd.slides.readers import openslide_server
from tests import pictures


@pytest.fixture
def path(tmp_path):
    """A slide of 70 x 46 px; none is open before and after."""
    place = tmp_path / "s.tif"
    place.write_bytes(pictures.tiled_tiff(pictures.gradient(), 0.5))
    yield str(place)
    for key in list(openslide_server._open):
        openslide_server.answer_call({"call": "close", "key": key})
    assert not openslide_server._open


def called(name, **given):
    return openslide_server.answer_call({"call": name, **given})


def test_facts_are_those_of_openslide(path):
    values, profile = called("facts", path=path, key="a")
    with openslide.OpenSlide(path) as handle:
        assert values == {
            "sizes": handle.level_dimensions,
            "downsamples": handle.level_downsamples,
            "properties": dict(handle.properties),
            "reader": f"openslide {openslide.__library_version__}",
            "has_profile": False,
        }
    assert profile == b""
    assert called("layout", path=path)[0] == {"layout": "generic-tiff"}


def test_a_slide_stays_open_and_the_number_of_them_is_bounded(path):
    for key in "abacd":
        called("facts", path=path, key=key)
    assert list(openslide_server._open) == ["b", "a", "c", "d"]
    first = openslide_server._open["a"]
    called("read", path=path, key="a", x=0, y=0, level=0, width=3, height=2)
    called("facts", path=path, key="e")
    assert list(openslide_server._open) == ["c", "d", "a", "e"]
    assert openslide_server._open["a"] is first
    assert called("close", key="a") is called("close", key="none") is None
    assert list(openslide_server._open) == ["c", "d", "e"]


@pytest.mark.parametrize("error", [MemoryError, OverflowError, UnicodeDecodeError, ValueError])
def test_whatever_openslide_raises_is_an_error_of_that_call(path, monkeypatch, error):
    """After it the slide is opened again."""

    def fails(*_):
        raise error("utf-8", b"x", 0, 1, "why") if error is UnicodeDecodeError else error("why")

    called("facts", path=path, key="a")
    with monkeypatch.context() as broken:
        broken.setattr(openslide.OpenSlide, "read_region", fails)
        with pytest.raises(ImageError, match="the slide cannot be read: ") as caught:
            called("read", path=path, key="a", x=0, y=0, level=0, width=3, height=2)
    assert caught.value.code == "unreadable"
    assert not openslide_server._open
    assert len(called("read", path=path, key="a", x=0, y=0, level=0, width=3, height=2)[1]) == 18
