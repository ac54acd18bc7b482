import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bcd.errors import ImageError
from bcd.imaging import child

pytestmark = pytest.mark.process
# Answers with its process and what it was sent; `{}` comes first.
ECHO = """
import os, signal, sys
import numpy as np
from bcd.errors import ImageError
from bcd.imaging import child
def answer(given, data):
    {}
    return given | {{"pid": os.getpid()}}, data
child.serve(answer)
"""


@pytest.fixture(autouse=True)
def ended():
    """A test begins without children, and ends its own."""
    child.close_all()
    yield
    child.close_all()


def program(code: str = "pass") -> child.Program:
    return child.Program(ECHO.format(code), "the echo", "answering")


def waiting() -> list[int]:
    """Processes that wait for a call."""
    pids = [
        one._process.pid
        for (parent, *_), idle in child._idle.items()
        for one in idle
        if parent == os.getpid()
    ]
    return sorted(pids)


def error_of(given: child.Program, *arguments: object) -> ImageError:
    with pytest.raises(ImageError) as caught:
        child.call(given, {}, *arguments)
    return caught.value


def test_a_call_has_its_answer_and_the_child_is_kept():
    echo, large = program(), np.arange(2**22, dtype=np.uint32).view(np.uint8)
    first = child.call(echo, {"a": [1, "µ"]})
    assert first.values == {"a": [1, "µ"], "pid": waiting()[0]}
    assert (first.data.size, first.printed) == (0, "")
    second = child.call(echo, {}, large.data)
    assert (second.data == large).all()
    assert [second.values["pid"]] == waiting()


def test_threads_have_children_of_their_own_and_get_their_answers():
    echo = program()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: child.call(echo, {"i": i}, bytes([i]) * 70_000), range(40)))
    assert [reply.values["i"] for reply in found] == list(range(40))
    assert [set(reply.data.tolist()) for reply in found] == [{i} for i in range(40)]
    assert {reply.values["pid"] for reply in found} <= set(waiting())
    assert len(waiting()) <= 2


def test_a_key_has_the_child_that_knows_it():
    """And `post` reaches all that do, which may have ended."""
    echo = program('if given.get("silent"): return print("closed") or None')
    one = child.call(echo, {}, key="one").values["pid"]
    (idle,) = child._idle.values()
    busy = idle.pop()
    two = child.call(echo, {}, key="two").values["pid"]
    idle.insert(0, busy)
    for _ in range(2):
        assert child.call(echo, {}, key="one").values["pid"] == one
        assert child.call(echo, {}, key="two").values["pid"] == two
    child.post(echo, {"silent": True}, child.ARCHIVE, "one")
    assert sorted(len(known.keys) for known in idle) == [0, 1]
    reply = child.call(echo, {})
    assert (reply.values["pid"], reply.printed) == (one, "closed")
    os.kill(two, signal.SIGKILL)
    child.post(echo, {"silent": True}, child.ARCHIVE, "two")
    assert {child.call(echo, {}).values["pid"] for _ in range(3)} & {two} == set()


def test_what_takes_too_long_is_too_slow():
    error = error_of(program("while True: pass"), b"", child.QUICK)
    assert (error.code, error.message) == ("too_slow", "answering takes more than 1 s of CPU time")
    assert waiting() == []


def test_so_is_what_only_waits(monkeypatch):
    monkeypatch.setattr(child, "MAX_WALL_S", 0.1)
    error = error_of(program("signal.pause()"))
    assert (error.code, error.message) == ("too_slow", "answering takes more than 0.1 s")
    assert waiting() == []


@pytest.mark.parametrize(
    "code",
    [
        'if data: raise MemoryError("none")',
        "if data: np.ones(2**29)",
        'if data: raise ImageError("unreadable", "it cannot") from MemoryError()',
        'if data: print("GLib-ERROR: failed to allocate 9 bytes", file=sys.stderr, flush=True); os.abort()',
    ],
    ids=["says so", "limit", "as a cause", "GLib"],
)
def test_what_needs_too_much_memory_is_too_large(code):
    budget = child.Budget(memory_bytes=2**29)
    given = program(code)
    error = error_of(given, b"large", budget)
    assert (error.code, error.message) == ("too_large", "answering needs more than 0.5 GiB of memory")
    assert child.call(given, {}, b"", budget).data.size == 0


def test_an_error_is_the_answer_of_its_call_alone():
    given = program('if data: raise ImageError("code", "why")')
    error = error_of(given, b"x")
    assert (error.code, error.message) == ("code", "why")
    (pid,) = waiting()
    assert child.call(given, {}).values["pid"] == pid


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        ("SIGSEGV", "unreadable", "the echo crashes: Segmentation fault"),
        ("SIGKILL", "unavailable", "the echo was killed, perhaps because memory ran out"),
    ],
)
def test_a_crash_is_an_error_and_what_was_killed_may_be_read_later(number, code, message):
    """The kernel kills where memory runs out, whatever the file is."""
    error = error_of(program(f"os.kill(os.getpid(), signal.{number})"))
    assert (error.code, error.message) == (code, message)
    assert waiting() == []


def test_a_child_that_cannot_start_is_no_fault_of_the_file():
    given = child.Program("1 / 0", "the echo", "answering")
    with pytest.raises(RuntimeError, match=r"the echo ended with exit code 1: [^$]*ZeroDivisionError"):
        child.call(given, {})


def test_a_child_that_another_ended_is_replaced():
    echo = program()
    pid = child.call(echo, {}).values["pid"]
    os.kill(pid, signal.SIGKILL)
    assert child.call(echo, {}, b"x").values["pid"] != pid
    assert len(waiting()) == 1


def test_what_a_child_prints_belongs_to_its_call_and_is_no_answer():
    given = program('if data: print("out", flush=True); os.write(2, b"error")')
    assert child.call(given, {}, b"x").printed == "out"
    assert child.call(given, {}).printed == ""
    assert len(waiting()) == 1


def test_after_a_fork_no_child_is_shared(monkeypatch):
    echo, parent = program(), os.getpid()
    pid = child.call(echo, {}).values["pid"]
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: parent + 1)
        assert child.call(echo, {}).values["pid"] != pid
        child.close_all()
    assert waiting() == [pid]


def test_a_child_has_the_limits_of_its_budget():
    echo, mine = program(), os.getpriority(os.PRIO_PROCESS, 0)
    for budget, nicer in ((child.ARCHIVE, 0), (child.PATIENT, 10)):
        pid = child.call(echo, {}, b"", budget).values["pid"]
        assert os.getpriority(os.PRIO_PROCESS, pid) == mine + nicer
    with open(f"/proc/{pid}/limits", encoding="ascii") as file:
        limits = {line[:26].strip(): line[26:].split()[0] for line in file}
    assert limits["Max core file size"] == "0"
    assert limits["Max address space"] == str(child.MAX_MEMORY_BYTES)
    assert limits["Max file size"] == str(child.MAX_MESSAGE_BYTES)
    assert 30 <= int(limits["Max cpu time"]) <= 40


def test_children_end_with_their_parent():
    """However it ends: nothing comes from it any more."""
    code = f"from bcd.imaging import child; import os; p = child.Program({ECHO.format('pass')!r}, '', '')\n"
    code += "print(child.call(p, {}).values['pid'], flush=True); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pid = int(done.stdout)
    ends = os.pidfd_open(pid) if os.path.exists(f"/proc/{pid}") else None
    if ends is not None:
        import select

        assert select.select([ends], [], [], 30)[0]
        os.close(ends)
