import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from bcd.errors import ImageError
from bcd.imaging import decoder, image
from tests import pictures

PIXELS = pictures.gradient(200, 300)
JPEG = pictures.encode(PIXELS, "JPEG")
# In the place of the decoder, in a child.
DECODER = "import os, signal; from bcd.imaging import decoder, image; {}; decoder.serve_parent()"


@pytest.fixture
def child(monkeypatch):
    """Sets what the children of this test do; they are ended after it."""
    monkeypatch.setattr(decoder, "_idle", {})
    yield lambda code: monkeypatch.setattr(
        decoder, "COMMAND", (sys.executable, "-P", "-c", DECODER.format(code))
    )
    decoder._close_all()


def processes():
    return [
        one._process.pid
        for (parent, _), idle in decoder._idle.items()
        for one in idle
        if parent == os.getpid()
    ]


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
    with ThreadPoolExecutor(4) as pool:  # each gets its own
        found = list(pool.map(lambda data: result(decoder.decode_safely, data), 3 * given))
    assert found == 3 * [result(image.decode, data) for data in given]
    assert len(processes()) <= 4


def test_plain_images_need_no_child(child):
    child("1 / 0")
    assert (decoder.decode_safely(kinds()["png"]) == PIXELS).all()
    with pytest.raises(ImageError, match="ends or is damaged") as caught:
        decoder.decode_safely(kinds()["png"][:-20])
    assert caught.value.code == "truncated"
    assert processes() == []


def test_a_child_is_kept_for_the_next_image(child):
    decoder.decode_safely(JPEG)
    before = processes()
    for data in (JPEG[:900], JPEG):
        result(decoder.decode_safely, data)
    assert processes() == before


def test_an_image_that_takes_too_long_is_too_slow(child):
    child("image.decode = lambda data: [0 for _ in iter(int, 1)]")
    with pytest.raises(ImageError, match=r"decoding takes more than 1 s of CPU time") as caught:
        decoder.decode_safely(JPEG, decoder.QUICK)
    assert caught.value.code == "too_slow"
    assert processes() == []


def test_so_is_one_that_only_waits(child, monkeypatch):
    child("image.decode = lambda data: signal.pause()")
    monkeypatch.setattr(decoder, "MAX_WALL_S", 0.1)
    with pytest.raises(ImageError, match=r"decoding takes more than 0\.1 s") as caught:
        decoder.decode_safely(JPEG)
    assert caught.value.code == "too_slow"
    assert processes() == []


def test_an_image_that_needs_too_much_memory_is_too_large(child):
    child("decoder.MAX_MEMORY_BYTES = 2**29")
    large = pictures.encode(Image.new("L", (8_000, 8_000)))
    with pytest.raises(ImageError, match=r"decoding needs more than 0\.5 GiB of memory") as caught:
        decoder.decode_safely(large)
    assert caught.value.code == "too_large"
    assert (decoder.decode_safely(JPEG) == image.decode(JPEG)).all()
    assert len(processes()) == 1


def test_an_image_that_crashes_the_decoder_is_unreadable(child):
    child("image.decode = lambda data: os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(ImageError, match="the decoder crashes: Segmentation fault") as caught:
        decoder.decode_safely(JPEG)
    assert caught.value.code == "unreadable"
    assert processes() == []


@pytest.mark.parametrize(
    ("code", "message"), [("SIGKILL", "the decoder was killed"), ("SIGABRT", "the decoder crashes: Aborted")]
)
def test_one_that_is_killed_may_be_read_later(child, code, message):
    """The kernel kills where memory runs out, whatever the image is."""
    child(f"image.decode = lambda data: os.kill(os.getpid(), signal.{code})")
    with pytest.raises(ImageError, match=message) as caught:
        decoder.decode_safely(JPEG)
    assert caught.value.code == ("unavailable" if code == "SIGKILL" else "unreadable")


def test_a_decoder_that_cannot_start_is_no_fault_of_the_image(child):
    child("1 / 0")
    with pytest.raises(RuntimeError, match=r"ended with exit code 1: [^$]*ZeroDivisionError"):
        decoder.decode_safely(JPEG)


def test_a_child_that_another_ended_is_replaced(child):
    decoder.decode_safely(JPEG)
    (pid,) = processes()
    os.kill(pid, signal.SIGKILL)
    assert (decoder.decode_safely(JPEG) == image.decode(JPEG)).all()
    assert len(processes()) == 1
    assert processes() != [pid]


def test_what_a_decoder_prints_is_damage_of_this_image_alone(child):
    """libtiff prints that a stream is corrupt, and may decode the rest."""
    short = pictures.encode(PIXELS[:9, :9], "JPEG")
    says = f"os.write(2, b'LZW: corrupt' + bytes([10]) + b'more') if len(data) == {len(short)} else 0"
    child(f"image.decode = lambda data, real=image.decode: [{says}, real(data)][1]")
    for _ in range(2):
        with pytest.raises(ImageError, match=r"the image cannot be decoded: LZW: corrupt'") as caught:
            decoder.decode_safely(short)
        assert caught.value.code == "truncated"
        assert (decoder.decode_safely(JPEG) == image.decode(JPEG)).all()
    assert len(processes()) == 1


def test_after_a_fork_no_child_is_shared(child, monkeypatch):
    decoder.decode_safely(JPEG)
    before, parent = processes(), os.getpid()
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: parent + 1)
        decoder.decode_safely(JPEG)
        assert len(processes()) == 1
        assert processes() != before
        decoder._close_all()
    assert processes() == before


def test_a_large_image_is_decoded_in_a_child(child, monkeypatch):
    """In this process it would hold up the other threads."""
    monkeypatch.setattr(image, "PLAIN_PIXELS", 200 * 300 - 1)
    assert (decoder.decode_safely(kinds()["png"]) == PIXELS).all()
    assert len(processes()) == 1


def test_each_budget_has_its_children(child):
    for budget in (decoder.ARCHIVE, decoder.QUICK, decoder.PATIENT, decoder.PATIENT):
        decoder.decode_safely(JPEG, budget)
    found = [(os.getpriority(os.PRIO_PROCESS, pid)) for pid in processes()]
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert found == [mine, mine, mine + 10]


def test_a_child_has_limits(child):
    decoder.decode_safely(JPEG)
    (pid,) = processes()
    with open(f"/proc/{pid}/limits", encoding="ascii") as file:
        limits = {line[:26].strip(): line[26:].split()[0] for line in file}
    assert limits["Max core file size"] == "0"
    assert limits["Max address space"] == str(decoder.MAX_MEMORY_BYTES)
    assert limits["Max file size"] == str(decoder.MAX_MESSAGE_BYTES)
    assert 30 <= int(limits["Max cpu time"]) <= 40
