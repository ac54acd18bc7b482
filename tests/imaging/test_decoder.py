from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from bcd.errors import ImageError
from bcd.imaging import child, decoder, image
from tests import pictures

pytestmark = pytest.mark.process
PIXELS = pictures.gradient(200, 300)
JPEG = pictures.encode(PIXELS, "JPEG")


@pytest.fixture
def injected(monkeypatch):
    """Sets what the decoders of this test do; they are ended after it."""

    def set_code(code: str) -> None:
        program = f"import os, signal; from bcd.imaging import decoder, image; {code}; decoder.serve_parent()"
        monkeypatch.setattr(decoder, "PROGRAM", replace(decoder.PROGRAM, code=program))

    yield set_code
    child.close_all()


def result(decode, data):
    try:
        return decode(data).tolist()
    except ImageError as error:
        return error.code, error.message


def kinds():
    """Bytes by kind of image: those for which a child is needed, and one for which none is."""
    rgba = np.dstack([PIXELS, PIXELS[..., :1]])
    cmyk = Image.fromarray(PIXELS).convert("CMYK")
    exif = Image.Exif()
    exif[274] = 6
    return {
        "png": pictures.encode(PIXELS),
        "jpeg": JPEG,
        "jpeg, turned": pictures.encode(PIXELS, "JPEG", exif=exif),
        "jpeg, cmyk": pictures.encode(cmyk, "JPEG"),
        "png, transparent": pictures.encode(rgba),
        "png, palette": pictures.encode(Image.fromarray(PIXELS).quantize(16)),
        "tiff": pictures.encode(PIXELS, "TIFF", compression="tiff_lzw"),
    }


def test_pixels_and_errors_are_those_of_image_decode():
    given = list(kinds().values()) + [data for data, _ in pictures.broken().values()]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda data: result(decoder.decode_safely, data), 2 * given))
    assert found == 2 * [result(image.decode, data) for data in given]


def test_plain_images_need_no_child(injected, monkeypatch):
    injected("1 / 0")
    assert (decoder.decode_safely(kinds()["png"]) == PIXELS).all()
    with pytest.raises(ImageError, match="ends or is damaged") as caught:
        decoder.decode_safely(kinds()["png"][:-20])
    assert caught.value.code == "truncated"
    # A large one would hold up the other threads of this process.
    monkeypatch.setattr(image, "PLAIN_PIXELS", 200 * 300 - 1)
    with pytest.raises(RuntimeError, match="the process of the decoder ended with exit code 1"):
        decoder.decode_safely(kinds()["png"])


def test_an_image_that_takes_too_long_is_too_slow(injected):
    injected("image.decode = lambda data: [0 for _ in iter(int, 1)]")
    with pytest.raises(ImageError, match=r"decoding takes more than 1 s of CPU time") as caught:
        decoder.decode_safely(JPEG, child.QUICK)
    assert caught.value.code == "too_slow"


def test_an_image_that_needs_too_much_memory_is_too_large():
    large = pictures.encode(Image.new("L", (8_000, 8_000)))
    budget = child.Budget(memory_bytes=2**29)
    with pytest.raises(ImageError, match=r"decoding needs more than 0\.5 GiB of memory") as caught:
        decoder.decode_safely(large, budget)
    assert caught.value.code == "too_large"
    assert (decoder.decode_safely(JPEG, budget) == image.decode(JPEG)).all()


def test_an_image_that_crashes_the_decoder_is_unreadable(injected):
    injected("image.decode = lambda data: os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(ImageError, match="the decoder crashes: Segmentation fault") as caught:
        decoder.decode_safely(JPEG)
    assert caught.value.code == "unreadable"


def test_what_a_decoder_prints_is_damage_of_this_image_alone(injected):
    """libtiff prints that a stream is corrupt, and may decode the rest."""
    short = pictures.encode(PIXELS[:9, :9], "JPEG")
    says = f"os.write(2, b'LZW: corrupt' + bytes([10]) + b'more') if len(data) == {len(short)} else 0"
    injected(f"image.decode = lambda data, real=image.decode: [{says}, real(data)][1]")
    for _ in range(2):
        with pytest.raises(ImageError, match=r"the image cannot be decoded: LZW: corrupt'") as caught:
            decoder.decode_safely(short)
        assert caught.value.code == "truncated"
        assert (decoder.decode_safely(JPEG) == image.decode(JPEG)).all()
