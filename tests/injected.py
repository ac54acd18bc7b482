"""Faults of OpenSlide in child processes: for slides with `bad` in their path."""

import pytest

from bcd.imaging import child
from bcd.slides.readers import openslide_client

CODE = """
import os, signal, sys
from bcd.slides.readers import openslide_server as server
real = server.CALLS["{name}"]
def bad(**given):
    if "bad" in given["path"]: {code}
    return real(**given)
server.CALLS["{name}"] = bad
server.serve_slides()
"""
CRASH = "os.kill(os.getpid(), signal.SIGSEGV)"
HANG = "[0 for _ in iter(int, 1)]"
# As GLib does.
ALLOCATE = 'print("failed to allocate 68719476736 bytes", file=sys.stderr, flush=True), os.abort()'


def set_fault(monkeypatch: pytest.MonkeyPatch, name: str, code: str) -> None:
    """Let new children run `code` first in calls of this name, whose arguments are `given`."""
    old = openslide_client.PROGRAM
    program = child.Program(CODE.format(name=name, code=code), old.name, old.doing)
    monkeypatch.setattr(openslide_client, "PROGRAM", program)
