"""A seeded world in which jobs share an output: every call to storage may be their last, late, or fail.

Jobs are threads of which one runs at a time; who runs next is drawn at each call. Time passes by draws alone.
On a disk, a power cut undoes what was not synchronised. Everything follows from the seed.
"""

import os
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import fs

from bcd import disk, lease, storage
from bcd.errors import StorageError

# Of storage: what asks or changes a disk or a store.
READS = ("_info", "list_folder", "read_bytes", "read_table")
WRITES = ("write_bytes", "delete_file")
STORE = "s3://bucket"


class Killed(BaseException):
    """The process has ended: nothing that it still tries has an effect."""


@dataclass(frozen=True)
class Odds:
    """Chances of faults: of each call an error or a long pause; of each process to be ended at a drawn call,
    and then by a power cut."""

    error: float = 0.0
    late_error: float = 0.0
    pause: float = 0.0
    pause_s: float = 150.0
    kill: float = 0.0
    power_cut: float = 0.0


@dataclass
class Process:
    """A job, or what runs again in its place; its threads end together."""

    name: str
    host: int
    wakes: float = 0.0
    ended: bool = False
    calls_left: int | None = None
    started: float = 0.0


@dataclass
class Thread:
    """A thread of a process, run only while it is its turn."""

    process: Process
    work: Callable[[], object]
    turn: threading.Event = field(default_factory=threading.Event)
    wakes: float = 0.0
    done: bool = False
    failure: BaseException | None = None


class World:
    """One seed, one folder, one clock."""

    def __init__(self, seed: int, root: Path, odds: Odds, remote: bool, one_host: bool) -> None:
        self.draw = random.Random(seed)
        self.root, self.odds, self.remote, self.one_host = root, odds, remote, one_host
        self.now = 1000.0
        self.trace: list[str] = []
        self.processes: list[Process] = []
        self.threads: list[Thread] = []
        self.disk = Disk(self.draw)
        self._over = threading.Event()
        self._local = threading.local()

    @property
    def output(self) -> str:
        """Where the jobs write."""
        return f"{STORE}/out" if self.remote else str(self.root / "out")

    # Scheduling.

    def begin(self, host: int, work: Callable[[], object]) -> Thread:
        """Add a process, which starts within half a minute."""
        name = f"job-{len(self.processes)}"
        starts = self.now + self.draw.uniform(0, 30)
        process = Process(name, host, wakes=starts, started=starts)
        if self.draw.random() < self.odds.kill:
            process.calls_left = self.draw.randrange(self.draw.choice([40, 150, 400]))
        self.processes.append(process)
        return self.start(process, work)

    def start(self, process: Process, work: Callable[[], object]) -> Thread:
        """Add a thread to a process."""
        thread = Thread(process, work)
        self.threads.append(thread)
        threading.Thread(target=self._live, args=(thread,), daemon=True).start()
        return thread

    def _live(self, thread: Thread) -> None:
        self._local.thread = thread
        thread.turn.wait()
        try:
            thread.work()
        except BaseException as failure:  # noqa: BLE001 - also what ends a process: `Scoring.run` looks at it
            thread.failure = failure
        thread.done = True
        self._hand_on()

    def run(self) -> None:
        """Until all threads are done."""
        self._over.clear()
        self._hand_on()
        assert self._over.wait(120), "a thread does not hand its turn on"
        self.threads.clear()

    def _hand_on(self) -> None:
        if (thread := self._next()) is None:
            self._over.set()
        else:
            thread.turn.set()

    def _next(self) -> Thread | None:
        waiting = [thread for thread in self.threads if not thread.done]
        if not waiting:
            return None
        due = [0.0 if t.process.ended else max(t.wakes, t.process.wakes) for t in waiting]
        self.now = max(self.now, min(due))
        return self.draw.choice([t for t, at in zip(waiting, due, strict=True) if at <= self.now])

    def _yield(self, seconds: float = 0.0) -> None:
        thread = self._local.thread
        thread.wakes = self.now + seconds
        thread.turn.clear()
        if (following := self._next()) is not thread:
            following.turn.set()
            thread.turn.wait()
        if thread.process.ended:
            raise Killed

    @property
    def current(self) -> Process | None:
        """The process whose turn it is; None outside of `run`."""
        thread = getattr(self._local, "thread", None)
        return thread.process if thread else None

    # What the code under test is given in place of its own.

    def call(self, name: str, real: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """A call to storage, from one of the jobs."""
        process = self.current
        if process is None:
            return real(*arguments, **options)
        if process.ended:
            raise Killed
        self._yield(self.draw.uniform(0, 0.5))
        # A pause between looking and writing is not to be told from a slow write, which nothing can fence.
        if name in READS and self.draw.random() < self.odds.pause:
            process.wakes = self.now + self.odds.pause_s
            self._note(process, f"pauses before {name}")
            self._yield()
        self._count(process, f"before {name}")
        if self.draw.random() < self.odds.error:
            self._note(process, f"error in place of {name}")
            raise StorageError(f"{arguments[0]}: simulated error")
        result = real(*arguments, **options)
        self._count(process, f"after {name}")
        if name in WRITES and self.draw.random() < self.odds.late_error:
            self._note(process, f"late error of {name}")
            raise StorageError(f"{arguments[0]}: simulated error after the effect")
        return result

    def _note(self, process: Process, text: str) -> None:
        self.trace.append(f"{self.now:.0f} {process.name} {text}")

    def _count(self, process: Process, when: str) -> None:
        """One call less that the process has; ends it after the last."""
        if process.calls_left is None:
            return
        process.calls_left -= 1
        if process.calls_left >= 0:
            return
        everybody = not self.remote and self.draw.random() < self.odds.power_cut
        self._note(process, f"{'power cut' if everybody else 'killed'} {when}")
        for other in self.processes if everybody else [process]:
            other.ended = True
        if everybody:
            self.disk.cut()
        raise Killed

    def sleep(self, seconds: float) -> None:
        """`time.sleep`."""
        if self.current:
            self._yield(seconds)

    def is_gone(self, content: dict[str, Any]) -> bool:
        """`lease._is_gone`: only processes of this host are known."""
        named = [process for process in self.processes if process.name == content.get("place")]
        return bool(named) and bool(self.current) and named[0].ended and named[0].host == self.current.host

    def step(self) -> None:
        """Inside a call: the process may end here, too."""
        if process := self.current:
            self._count(process, "within a write")

    @contextmanager
    def entered(self, patch: Any) -> Iterator["World"]:
        """Put this world in place of the real one, by a MonkeyPatch."""
        for name in READS + WRITES:
            patch.setattr(storage, name, self._through(name, getattr(storage, name)))
        for place in (storage, lease):
            patch.setattr(place, "Thread", SimulatedThreads(self), raising=False)
        patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=self.draw.getrandbits(128)))
        patch.setattr(lease, "random", self.draw)
        patch.setattr(lease, "Event", lambda: Flag(self))
        patch.setattr(lease, "Lock", lambda: Mutex(self))
        patch.setattr(lease, "_now", lambda: self.now)
        patch.setattr(lease, "_watched_time", lambda: self.now)
        patch.setattr(lease, "_sleep", self.sleep)
        patch.setattr(lease, "_place", lambda: self.current and self.current.name)
        patch.setattr(lease, "_is_gone", self.is_gone)
        patch.setattr(storage, "ThreadPoolExecutor", InTurn)
        if self.remote:
            patch.setattr(storage, "resolve", self._resolved)
            patch.setattr(storage, "_write_to_store", self._put)
        else:
            patch.setattr(disk, "os", SimulatedOs(self))
            patch.setattr(disk, "open", self._opened, raising=False)
        yield self

    def _through(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **options: self.call(name, real, *arguments, **options)

    def _resolved(self, uri: str) -> tuple[fs.FileSystem, str]:
        return fs.LocalFileSystem(), str(self.root / uri.removeprefix(f"{STORE}/"))

    def _put(self, filesystem: fs.FileSystem, path: str, data: bytes) -> None:
        """An object is there as a whole, or not at all."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        aside = Path(path).with_name(f".{Path(path).name}")
        aside.write_bytes(data)
        aside.replace(path)

    def _opened(self, path: str, mode: str) -> Any:
        self.step()
        if not os.path.exists(path):
            self.disk.begin(path)
        return open(path, mode, buffering=0)


class InTurn:
    """A pool without threads."""

    def __init__(self, n_threads: int) -> None:
        self._n = n_threads

    def __enter__(self) -> "InTurn":
        return self

    def __exit__(self, *failure: object) -> None:
        return None

    def map(self, work: Callable[..., Any], *columns: Any) -> list[Any]:
        """Of `Executor`."""
        return [work(*row) for row in zip(*columns, strict=True)]

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Of `Executor`: the result is known at once."""
        result = work(*arguments)
        return type("Future", (), {"result": lambda self: result})()


class SimulatedThreads:
    """`threading.Thread` of a process of the world."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __call__(self, target: Any, args: tuple[Any, ...], name: str, daemon: bool) -> "SimulatedThreads":
        thread = SimulatedThreads(self._world)
        thread._work = lambda: target(*args)
        return thread

    def start(self) -> None:
        """Of `Thread`."""
        if process := self._world.current:
            self._thread = self._world.start(process, self._work)

    def join(self) -> None:
        """Of `Thread`."""
        while self._world.current and not self._thread.done:
            self._world.sleep(0.1)


class Flag:
    """`threading.Event`."""

    def __init__(self, world: World) -> None:
        self._world, self._set = world, False

    def set(self) -> None:
        """Of `Event`."""
        self._set = True

    def wait(self, seconds: float) -> bool:
        """Of `Event`, noticed within a second."""
        until = self._world.now + seconds
        while not self._set and self._world.now < until:
            self._world.sleep(min(1.0, seconds))
        return self._set


class Mutex:
    """`threading.Lock`."""

    def __init__(self, world: World) -> None:
        self._world, self._taken = world, False

    def __enter__(self) -> None:
        while self._taken:
            self._world.sleep(0.1)
        self._taken = True

    def __exit__(self, *failure: object) -> None:
        self._taken = False


class Disk:
    """What a power cut undoes: contents that were not synchronised, and names in folders that were not."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._loose: set[str] = set()
        self._names: list[tuple[str, Callable[[], None]]] = []

    def begin(self, path: str) -> None:
        """A file is made and written."""
        self._loose.add(path)
        self._names.append((os.path.dirname(path), lambda: _remove(path)))

    def synchronise(self, path: str) -> None:
        """A file's content, or the names in a folder, will last."""
        if os.path.isdir(path):
            self._names = [(folder, undo) for folder, undo in self._names if folder != path]
        else:
            self._loose.discard(path)

    def rename(self, old: str, new: str) -> None:
        """A file replaces another."""
        before = Path(new).read_bytes() if os.path.exists(new) else None
        os.replace(old, new)
        if old in self._loose:
            self._loose.remove(old)
            self._loose.add(new)
        self._names.append((os.path.dirname(new), lambda: _restore(new, before)))

    def remove(self, path: str) -> None:
        """A file is deleted."""
        before = Path(path).read_bytes()
        os.remove(path)
        self._names.append((os.path.dirname(path), lambda: _restore(path, before)))

    def cut(self) -> None:
        """The power goes."""
        for path in sorted(self._loose):
            if os.path.exists(path):
                content = Path(path).read_bytes()
                Path(path).write_bytes(content[: self._draw.randrange(len(content) + 1)])
        for _, undo in reversed(self._names):
            if self._draw.random() < 0.5:
                undo()
        self._loose.clear()
        self._names.clear()


def _remove(path: str) -> None:
    if os.path.exists(path):
        os.remove(path)


def _restore(path: str, content: bytes | None) -> None:
    if content is None:
        _remove(path)
    else:
        Path(path).write_bytes(content)


class SimulatedOs:
    """The module `os`, for `disk`."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, handle: int) -> None:
        """Of `os`."""
        self._world.step()
        self._world.disk.synchronise(os.readlink(f"/proc/self/fd/{handle}"))

    def replace(self, old: str, new: str) -> None:
        """Of `os`."""
        self._world.step()
        self._world.disk.rename(old, new)

    def remove(self, path: str) -> None:
        """Of `os`; not by a process that has ended."""
        if self._world.current and self._world.current.ended:
            raise Killed
        self._world.disk.remove(path)
