"""Child processes for code that a file may crash, keep busy or make allocate.

Decoders and OpenSlide are written in C. They answer calls in child processes that may use so much CPU time
and memory for a call, and are kept for the next one: a bad file costs its own call.

A call is a line of JSON, its arguments and the number of bytes that follow, and these bytes. So is an answer.
"""

import atexit
import fcntl
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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bcd.errors import ImageError
from bcd.imaging.image import UNAVAILABLE

# Of one call. Images of 64 million pixels take up to 9 s and 2.5 GB (16 bits, one colour transparent).
MAX_CPU_S, MAX_MEMORY_BYTES = 30, 4 * 2**30
# Until a call is given up that uses no CPU time, on a machine where others do.
MAX_WALL_S = 600
# Of what a child prints, of which libtiff can do a line for each row.
MAX_MESSAGE_BYTES = 2**16
# Pixels pass in one piece: the largest pipe that Linux gives a user. F_SETPIPE_SZ, not in every Python.
PIPE_BYTES, SET_PIPE_BYTES = 2**20, getattr(fcntl, "F_SETPIPE_SZ", 1031)
# GLib ends the process where it gets no memory, and prints this.
NO_MEMORY = "failed to allocate"
# Threads that nothing uses would take a share of its memory; memory that is kept for the next call saves a
# third of a millisecond for each megabyte.
VARIABLES = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**26),
}

Arguments = dict[str, Any]
Content = bytes | memoryview
# Answers a call in the child: values and bytes, or None where the parent expects no answer.
Answering = Callable[[Arguments, bytes], tuple[Arguments, Content] | None]


@dataclass(frozen=True)
class Budget:
    """CPU time of one call in whole seconds, memory, and the niceness of the process that answers it."""

    cpu_s: int = MAX_CPU_S
    niceness: int = 0
    memory_bytes: int = MAX_MEMORY_BYTES


ARCHIVE = Budget()
# Where others wait: nearly all calls need far less than the first, and the rest gives way to them.
QUICK, PATIENT = Budget(cpu_s=1), Budget(niceness=10)


@dataclass(frozen=True)
class Program:
    """What a child runs, Python that calls `serve_parent`, and how messages name it and what it does."""

    code: str
    name: str
    doing: str


@dataclass(frozen=True)
class Reply:
    """Values and bytes, uint8 (n,), of an answer, and the first line that the child printed meanwhile."""

    values: Arguments
    data: np.ndarray
    printed: str


class CrashError(ImageError):
    """A call crashed two children: costly to repeat."""


def call(
    program: Program, arguments: Arguments, data: Content = b"", budget: Budget = ARCHIVE, key: str = ""
) -> Reply:
    """Call a child, if possible one that has answered a call with this key before.

    Raises:
        ImageError: what the answer is instead; `too_slow`; `too_large` where it needs too much memory;
            `unreadable` (a CrashError) where the child crashes, twice; `unavailable` where it was killed, as
            by the kernel of a machine without free memory.
    """
    try:
        return _call_once(program, arguments, data, budget, key)
    except _EndedError:  # perhaps by accident
        try:
            return _call_once(program, arguments, data, budget, key)
        except _EndedError as error:
            if error.signal == signal.SIGKILL:
                message = f"{program.name} was killed, perhaps because memory ran out"
                raise ImageError(UNAVAILABLE, message) from None
            raise CrashError("unreadable", f"{program.name} crashes: {error}") from None


class _EndedError(Exception):
    """A signal ended the child before it answered."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.strsignal(number))
        self.signal = number


@dataclass(eq=False)
class _Child:
    """A child process that answers one call after another; `keys` are those of its calls."""

    program: Program
    budget: Budget
    is_idle: bool = True
    keys: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        paths, limits = [path or os.getcwd() for path in sys.path], self.budget
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115
        arguments = map(str, (limits.cpu_s, limits.niceness, limits.memory_bytes))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", self.program.code, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            env=os.environ | VARIABLES | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for this process, which ends the child
        )
        assert self._process.stdin
        assert isinstance(self._process.stdout, io.BufferedReader)
        self._to, self._from = self._process.stdin, self._process.stdout
        with suppress(OSError):  # a smaller one is slower
            fcntl.fcntl(self._from, SET_PIPE_BYTES, PIPE_BYTES)

    def answer(self, arguments: Arguments, data: Content) -> Reply:
        """Raises ImageError for an answer that is one, or takes too long, and else `_EndedError`."""
        self.is_idle = False
        try:
            self.send(arguments, data)
        except BrokenPipeError:
            raise self._ended() from None
        answering = select.poll()
        answering.register(self._from, select.POLLIN)
        if not answering.poll(MAX_WALL_S * 1000):
            raise ImageError("too_slow", f"{self.program.doing} takes more than {MAX_WALL_S} s")
        return self._received()

    def send(self, arguments: Arguments, data: Content = b"") -> None:
        """Call without waiting for an answer. Raises BrokenPipeError where the child has ended."""
        self._to.write(_line(arguments, data))
        self._to.write(data)
        self._to.flush()

    def _received(self) -> Reply:
        line = self._from.readline()
        if not line.endswith(b"\n"):
            raise self._ended()
        values, n_bytes = json.loads(line)
        data = np.empty(n_bytes, np.uint8)
        if n_bytes and self._from.readinto(data.data) < n_bytes:
            raise self._ended()
        self.is_idle, printed = True, self._printed()
        if values.get("fault") == "memory":
            raise self._too_large()
        if "fault" in values:
            raise ImageError(*values["fault"])
        return Reply(values, data, printed)

    def _printed(self) -> str:
        """The first line that it printed for this call."""
        file = self._messages.fileno()
        text = os.pread(file, MAX_MESSAGE_BYTES, 0).decode(errors="replace").strip()
        if text:
            os.ftruncate(file, 0)
            os.lseek(file, 0, os.SEEK_SET)  # of the child, too
        return text.partition("\n")[0]

    def _ended(self) -> Exception:
        code = self._process.wait()
        if code == -signal.SIGXCPU:
            doing = self.program.doing
            return ImageError("too_slow", f"{doing} takes more than {self.budget.cpu_s} s of CPU time")
        # All that it printed since the last answer: the reason comes last.
        printed = os.pread(self._messages.fileno(), MAX_MESSAGE_BYTES, 0).decode(errors="replace").strip()
        if code < 0:
            return self._too_large() if NO_MEMORY in printed else _EndedError(-code)
        # No fault of the file, whose row would be an error for good.
        return RuntimeError(f"the process of {self.program.name} ended with exit code {code}: {printed}")

    def _too_large(self) -> ImageError:
        most = f"{self.budget.memory_bytes / 2**30:g} GiB of memory"
        return ImageError("too_large", f"{self.program.doing} needs more than {most}")

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for file in (self._to, self._from, self._messages):
            with suppress(BrokenPipeError):
                file.close()


# Children that wait for a call, by their parent and what they run: after a fork, they are not those of the
# new process. No lock: operations on a list are atomic, and a lock would stay locked in a forked process.
_idle: dict[tuple[int, Program, Budget], list[_Child]] = {}


def _call_once(program: Program, arguments: Arguments, data: Content, budget: Budget, key: str) -> Reply:
    ours = _idle.setdefault((os.getpid(), program, budget), [])
    child = _taken(ours, key) or _Child(program, budget)
    if key:
        child.keys.add(key)
    try:
        return child.answer(arguments, data)
    finally:
        if child.is_idle:
            ours.append(child)
        else:
            child.close()


def _taken(idle: list[_Child], key: str) -> _Child | None:
    """Take the child that knows the key, else the last one, from a list; None where none is in it."""
    for child in [one for one in idle if key in one.keys]:
        with suppress(ValueError):  # another thread was faster
            idle.remove(child)
            return child
    with suppress(IndexError):
        return idle.pop()
    return None


def post(program: Program, arguments: Arguments, budget: Budget, key: str) -> None:
    """Call without an answer, and for the last time, the waiting children that know a key."""
    ours = _idle.get((os.getpid(), program, budget), [])
    for child in [one for one in ours if key in one.keys]:
        with suppress(ValueError):  # another thread has taken it
            ours.remove(child)
            child.keys.discard(key)
            with suppress(BrokenPipeError):
                child.send(arguments)
            ours.append(child)


@atexit.register
def close_all() -> None:
    """End the children of this process."""
    for parent, program, budget in list(_idle):
        if parent == os.getpid():
            for child in _idle.pop((parent, program, budget)):
                child.close()


def serve(answer: Answering) -> None:
    """The child process: answer the calls of the parent until it has ended; arguments are a `Budget`."""
    cpu_s, niceness, memory_bytes = map(int, sys.argv[1:])
    os.nice(niceness)
    _limit(resource.RLIMIT_AS, memory_bytes)
    _limit(resource.RLIMIT_FSIZE, MAX_MESSAGE_BYTES)
    _limit(resource.RLIMIT_CORE, 0)  # images of patients stay in memory
    with open(0, "rb") as given, open(os.dup(1), "wb") as taken:
        os.dup2(2, 1)  # what a library prints is no answer
        while line := given.readline():
            arguments, n_bytes = json.loads(line)
            data = given.read(n_bytes)
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + cpu_s)
            if (answered := _answered(answer, arguments, data)) is not None:
                values, content = answered
                taken.write(_line(values, content))
                taken.write(content)
                taken.flush()


def _answered(answer: Answering, arguments: Arguments, data: bytes) -> tuple[Arguments, Content] | None:
    try:
        return answer(arguments, data)
    except (ImageError, MemoryError) as error:
        if isinstance(error, ImageError) and not isinstance(error.__cause__, MemoryError):
            return {"fault": [error.code, error.message]}, b""
        return {"fault": "memory"}, b""


def _line(values: Arguments, data: Content) -> bytes:
    return json.dumps([values, memoryview(data).nbytes]).encode() + b"\n"


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
