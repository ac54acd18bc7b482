"""Decode images so that a bad one affects only itself.

Plain PNGs that are not large are decoded here, by a decoder in Rust. Those for all other images are written
in C: a file may crash them, keep them busy or make them allocate. They run in child processes that may use
so much CPU time and memory for an image, and are kept for the next one.

A child reads the number of bytes of an image (8, little endian) and its bytes. It answers with a line of
JSON, the size or the error, and the pixels.
"""

import atexit
import io
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from bcd.errors import ImageError
from bcd.imaging import image

# Of one image. Those of 64 million pixels take up to 9 s and 2.5 GB (16 bits, one colour transparent).
MAX_CPU_S, MAX_MEMORY_BYTES = 30, 4 * 2**30


@dataclass(frozen=True)
class Budget:
    """CPU time for one image, in whole seconds, and the niceness of the process that decodes it."""

    cpu_s: int = MAX_CPU_S
    niceness: int = 0


ARCHIVE = Budget()
# Where others wait: nearly all images need far less than the first, and the rest gives way to them.
QUICK, PATIENT = Budget(cpu_s=1), Budget(niceness=10)
# Until an image is given up that uses no CPU time, on a machine where others do.
MAX_WALL_S = 600
# Of messages of libtiff, of which one can print a line for each row.
MAX_MESSAGE_BYTES = 2**16
# Threads that nothing uses would take a share of its memory; memory that is kept for the next image saves a
# third of a millisecond for each megabyte.
VARIABLES = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**26),
}
COMMAND = (sys.executable, "-P", "-c", "from bcd.imaging import decoder; decoder.serve_parent()")


def decode_safely(data: bytes, budget: Budget = ARCHIVE) -> np.ndarray:
    """`image.decode`, in a child process where the decoder is not memory-safe, or the image is large.

    Raises:
        ImageError: as `image.decode`, and with code `too_slow`; `too_large` also where decoding needs more
            than `MAX_MEMORY_BYTES`; `unreadable` where the decoder crashes; `unavailable` where it was
            killed, as by the kernel of a machine without free memory.
    """
    pixels = image.decode_plain(data)
    if pixels is not None:
        return pixels
    try:
        return _decode_apart(data, budget)
    except _EndedError:  # perhaps by accident
        try:
            return _decode_apart(data, budget)
        except _EndedError as error:
            if error.signal == signal.SIGKILL:
                message = "the decoder was killed, perhaps because memory ran out"
                raise ImageError(image.UNAVAILABLE, message) from None
            raise ImageError("unreadable", f"the decoder crashes: {error}") from None


class _EndedError(Exception):
    """A signal ended the child before it answered."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.strsignal(number))
        self.signal = number


class _Child:
    """A child process that decodes one image after another."""

    def __init__(self, budget: Budget) -> None:
        paths = [path or os.getcwd() for path in sys.path]
        self.is_idle, self._budget = True, budget
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [*COMMAND, str(budget.cpu_s), str(budget.niceness)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env=os.environ | VARIABLES | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for this process, which ends the child
        )
        assert self._process.stdin
        assert isinstance(self._process.stdout, io.BufferedReader)
        self._to, self._from = self._process.stdin, self._process.stdout

    def decode(self, data: bytes) -> np.ndarray:
        """Pixels of an image. Raises ImageError where it has none, or takes too long, and else
        `_EndedError`."""
        self.is_idle = False
        try:
            self._to.write(len(data).to_bytes(8, "little"))
            self._to.write(data)
            self._to.flush()
        except BrokenPipeError:
            raise self._ended() from None
        answering = select.poll()
        answering.register(self._from, select.POLLIN)
        if not answering.poll(MAX_WALL_S * 1000):
            raise ImageError("too_slow", f"decoding takes more than {MAX_WALL_S} s")
        return self._answer()

    def _answer(self) -> np.ndarray:
        line = self._from.readline()
        answer = json.loads(line) if line.endswith(b"\n") else {}
        pixels = np.empty((answer.get("height", 0), answer.get("width", 0), 3), np.uint8)
        if not answer or (pixels.size and self._from.readinto(pixels.reshape(-1).data) < pixels.nbytes):
            raise self._ended()
        self.is_idle, said = True, self._said()
        if "code" in answer:
            raise ImageError(answer["code"], answer["message"])
        if said:
            raise ImageError("truncated", f"the image cannot be decoded: {said}")
        return pixels

    def _said(self) -> str:
        """What it printed for this image: libtiff prints errors only, and may decode the rest."""
        file = self._messages.fileno()
        text = os.pread(file, MAX_MESSAGE_BYTES, 0).decode(errors="replace").strip()
        if text:
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)  # of the child, too
        return text.partition("\n")[0]

    def _ended(self) -> Exception:
        code = self._process.wait()
        if code == -signal.SIGXCPU:
            return ImageError("too_slow", f"decoding takes more than {self._budget.cpu_s} s of CPU time")
        if code < 0:
            return _EndedError(-code)
        # No fault of the image, whose row would be an error for good.
        said = os.pread(self._messages.fileno(), MAX_MESSAGE_BYTES, 0).decode(errors="replace").strip()
        return RuntimeError(f"the process of the decoder ended with exit code {code}: {said}")

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for file in (self._to, self._from, self._messages):
            with suppress(BrokenPipeError):
                file.close()


# Children that wait for an image, by their budget and parent: after a fork, they are not those of the new
# process.
_idle: dict[tuple[int, Budget], list[_Child]] = {}


def _decode_apart(data: bytes, budget: Budget) -> np.ndarray:
    ours = _idle.setdefault((os.getpid(), budget), [])
    try:
        child = ours.pop()
    except IndexError:
        child = _Child(budget)
    try:
        return child.decode(data)
    finally:
        if child.is_idle:
            ours.append(child)
        else:
            child.close()


@atexit.register
def _close_all() -> None:
    for parent, budget in list(_idle):
        if parent == os.getpid():
            for child in _idle.pop((parent, budget)):
                child.close()


def serve_parent() -> None:
    """The child process: decode what the parent sends until it has ended; its arguments are a `Budget`."""
    cpu_s, niceness = map(int, sys.argv[1:])
    os.nice(niceness)
    _limit(resource.RLIMIT_AS, MAX_MEMORY_BYTES)
    _limit(resource.RLIMIT_FSIZE, MAX_MESSAGE_BYTES)
    _limit(resource.RLIMIT_CORE, 0)  # images of patients stay in memory
    with open(0, "rb") as given, open(1, "wb") as taken:
        while len(head := given.read(8)) == 8:
            data = given.read(int.from_bytes(head, "little"))
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + cpu_s)
            answer, pixels = _answer(data)
            taken.write(json.dumps(answer).encode() + b"\n")
            taken.write(pixels)
            taken.flush()


def _answer(data: bytes) -> tuple[dict[str, Any], bytes | memoryview]:
    try:
        pixels = np.ascontiguousarray(image.decode(data))
    except (ImageError, MemoryError) as error:
        if isinstance(error, ImageError) and not isinstance(error.__cause__, MemoryError):
            return {"code": error.code, "message": error.message}, b""
        needed = f"decoding needs more than {MAX_MEMORY_BYTES / 2**30:g} GiB of memory"
        return {"code": "too_large", "message": needed}, b""
    height, width, _ = pixels.shape
    return {"height": height, "width": width}, pixels.reshape(-1).data


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
