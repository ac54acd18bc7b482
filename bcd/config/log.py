"""The lines of a job and of the service: text, or one JSON object per line (`--log-format`).

Modules write to `logging.getLogger(__name__)`. A job calls `start`, processes that Ray starts call `hand_on`.

What C++ parts of Ray write reaches no logger of Python. So this file is also a program (`python log.py json`)
through which a job's stderr passes, and in JSON its stdout. It imports the standard library only.
"""

import atexit
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

if TYPE_CHECKING:
    from bcd.config.options import LogFormat

# By which the processes of a Ray that a job starts know the job and the format.
JOB_VARIABLE, FORMAT_VARIABLE = "BCD_JOB", "BCD_LOG_FORMAT"
# Of `extra`, besides the message: what a line is about.
FIELDS = ("request_id", "image_id", "method", "path", "status", "seconds", "code", "rows", "share")
# Ray 2.60 prints it in red, once in a process, about the actors of its own Ray Data, which starts another one
# where a restart fails. No setting prevents it: Ray Data always hands its actors objects of the store.
ADVICE = b"has constructor arguments in the object store and max_restarts > 0"
# Seconds in which the last lines must have passed at the end of a job.
END_S = 5
# What Ray puts before the line of a worker, in colour: its class, process and host.
_WORKER = re.compile(r"(?:\x1b\[\d+m)?\(([^()]*pid=\d+[^()]*)\)(?:\x1b\[0m)? ?(.*)")
# How lines begin that state a level: of Ray, of its C++ parts, and of this module.
_LEVELS = (
    re.compile(r"[\d-]+ [\d:,]+\t([A-Z]+) "),
    re.compile(r"\[[\d-]+ [\d:,]+ ([IWEF]) "),
    re.compile(r"(warning|error): "),
)
_LONG = {"i": "info", "w": "warning", "e": "error", "f": "critical"}


def start(job: str, form: "LogFormat" = "text") -> None:
    """Write the lines of a job in a format: errors to stderr, others to stdout.

    In JSON so are the lines of Ray, its workers and libraries, unless somebody has replaced the streams.
    """
    os.environ.update({JOB_VARIABLE: job, FORMAT_VARIABLE: form})
    if sys.stderr is not None and sys.stderr is sys.__stderr__:
        _pass(2, form)
    if form == "json":
        sys.excepthook = _log_fault
        if sys.stdout is not None and sys.stdout is sys.__stdout__:
            _pass(1, form)
    _attach(_Output(form))


def hand_on(job: str, form: "LogFormat" = "text") -> None:
    """Write the lines of a process that Ray has started to stderr, which Ray hands on to the job's.

    Ray Train would repeat what goes to stdout. The job and the format are those of the variables, if set.
    """
    os.environ.setdefault(JOB_VARIABLE, job)
    _attach(_Output(os.environ.get(FORMAT_VARIABLE, form), sys.stderr))


def _attach(handler: logging.Handler) -> None:
    logger = logging.getLogger("bcd")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def _log_fault(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("bcd").critical("a fault of bcd ended the job", exc_info=(kind, error, trace))


def _pass(descriptor: int, form: str) -> None:
    """Let what this process writes to a descriptor pass through this file as a program."""
    target = os.dup(descriptor)
    # In a session of its own, so that Ctrl-C does not end it before the job.
    command = [sys.executable, "-P", __file__, form]
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=target, start_new_session=True)
    with program.stdin as pipe:  # type: ignore[union-attr]
        os.dup2(pipe.fileno(), descriptor)
    atexit.register(_end, descriptor, target, program)


def _end(descriptor: int, target: int, program: subprocess.Popen[bytes]) -> None:
    (sys.stdout if descriptor == 1 else sys.stderr).flush()
    os.dup2(target, descriptor)
    with suppress(subprocess.TimeoutExpired):  # a process that outlives the job may hold the pipe
        program.wait(END_S)


class _Output(logging.Handler):
    """Writes records to stdout and stderr as they are at that time, or to one stream."""

    def __init__(self, form: str, only: TextIO | None = None) -> None:
        super().__init__()
        self._write, self._only = as_json if form == "json" else as_text, only

    def emit(self, record: logging.LogRecord) -> None:
        stream = self._only or (sys.stderr if record.levelno >= logging.ERROR else sys.stdout)
        print(self._write(record), file=stream, flush=True)


def as_text(record: logging.LogRecord) -> str:
    """The message, behind the level where that is a warning or worse, and before the id of a request."""
    level = record.levelname.lower()
    text = record.getMessage() if record.levelno < logging.WARNING else f"{level}: {record.getMessage()}"
    if request_id := getattr(record, "request_id", None):
        text += f"; request {request_id}"
    return text + _trace(record)


def as_json(record: logging.LogRecord) -> str:
    """One line: an object with time (ISO 8601, UTC), level, job, message, and those of `FIELDS` it has."""
    given = {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
    return _object(record.levelname.lower(), record.getMessage().strip("\n") + _trace(record), given)


def _trace(record: logging.LogRecord) -> str:
    return "\n" + logging.Formatter().formatException(record.exc_info) if record.exc_info else ""


def _object(level: str, message: str, more: dict[str, Any]) -> str:
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    job = os.environ.get(JOB_VARIABLE, "")
    return json.dumps({"time": time, "level": level, "job": job, "message": message} | more)


def foreign(line: str) -> str:
    """The object of a line that Ray, a worker or a library has printed; one of ours is kept as it is."""
    more, level = {}, "info"
    if match := _WORKER.fullmatch(line):
        more["process"], line = match.groups()
    if line.startswith('{"time": '):
        with suppress(ValueError):  # cut by Ray
            return json.dumps(json.loads(line) | more)
    for pattern in _LEVELS:
        if match := pattern.match(line):
            named = match[1].lower()
            level = _LONG.get(named, named)
    return _object(level, line.removeprefix(f"{level}: "), more)


def filtered(lines: Iterable[bytes], form: str, target: BinaryIO) -> None:
    """Write the lines that a job has written by any way, without `ADVICE`; in JSON as objects, none empty."""
    for line in lines:
        if ADVICE in line:
            continue
        if form == "json":
            text = line.decode(errors="replace").strip("\n")
            line = foreign(text).encode() + b"\n" if text.strip() else b""
        target.write(line)
        target.flush()


if __name__ == "__main__":
    filtered(sys.stdin.buffer, sys.argv[1], sys.stdout.buffer)
