from bcd.imaging.image import ImageError
from bcd.slides.parts import tiff_reader
from bcd.slides.readers import interface, openslide_client
from tests.slides.test_slide import White


def test_readers_have_the_interface():
    """Checked by mypy where `Slide` gets one; here that none lacks a member."""
    members = {"facts", "read", "close"}
    assert {name for name in vars(interface.Reader) if not name.startswith("_")} == members
    for reader in (openslide_client.OpenSlideReader, tiff_reader.TiffReader, White):
        assert members - {"facts"} <= set(vars(reader))


def test_what_is_unreadable_has_a_code_and_an_action():
    error = ImageError(*interface.UNREADABLE)
    assert (error.code, error.message) == ("unreadable", "the slide cannot be read")
