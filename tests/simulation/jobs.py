"""What simulated jobs of every kind share: they run until one succeeds, and leave nothing half-written."""

import random
from collections.abc import Callable, Iterable
from pathlib import Path

from bcd import disk
from bcd.errors import BcdError
from tests.simulation.world import Killed, Odds, World

# Runs of a job that is ended again and again, before its world becomes quiet.
MOST_RUNS = 12


def drawn_world(seed: int, root: Path) -> World:
    """The world of a seed: what can happen in it, where its output is, and on how many hosts jobs run."""
    draw = random.Random(seed)
    kind = draw.choice(["quiet", "kills", "errors", "pauses", "all"])
    every = kind == "all"
    odds = Odds(
        kill=draw.choice([0.5, 0.9]) if kind == "kills" or every else 0.0,
        power_cut=draw.choice([0.0, 0.5, 1.0]) if kind == "kills" or every else 0.0,
        error=0.02 if kind == "errors" or every else 0.0,
        late_error=0.02 if kind == "errors" or every else 0.0,
        pause=draw.choice([0.01, 0.05]) if kind == "pauses" or every else 0.0,
    )
    return World(seed, root, odds, remote=draw.random() < 0.4, one_host=draw.random() < 0.5)


def live_through(history: Callable[[int, Path], object], seeds: Iterable[int], root: Path) -> None:
    """Each seed in a folder of its own; a failure names its seed."""
    for seed in seeds:
        (folder := root / str(seed)).mkdir()
        try:
            history(seed, folder)
        except BaseException as failure:
            failure.add_note(f"seed {seed}")
            raise


class Jobs:
    """Jobs on one output. A kind of job says what it does (`work`) and what must then be true (`check`)."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ended: list[str] = []

    @property
    def folder(self) -> Path:
        """The output."""
        return self.world.root / "out"

    def work(self) -> None:
        """The real job."""
        raise NotImplementedError

    def check(self) -> None:
        """The output is whole."""
        raise NotImplementedError

    def check_between(self) -> None:
        """What is true even when all processes were ended."""

    def job(self) -> None:
        """One process that runs the job until it ends; what a finished one leaves is whole."""
        try:
            self.work()
        except BcdError as error:
            self.ended.append(f"{type(error).__name__}: {error}")
        else:
            self.check()
            self.ended.append("finished")

    def run(self, n_jobs: int) -> None:
        """Start jobs at drawn moments, and one again after all have ended too early, until one succeeds."""
        world = self.world
        for number in range(2 * MOST_RUNS):
            world.odds = Odds() if number >= MOST_RUNS else world.odds
            self.ended.clear()
            started = []
            for at in range(1 if number else n_jobs):
                host = 0 if world.one_host else number * n_jobs + at
                started.append(world.begin(host, self.job))
            world.run()
            self.check_between()
            for thread in started:
                if thread.failure is not None and not isinstance(thread.failure, Killed):
                    raise thread.failure
            if "finished" in self.ended:
                return
        raise AssertionError(f"no job succeeded:\n{self.ended}\n{self.story}")

    @property
    def story(self) -> str:
        """What happened last."""
        return "\n".join(self.world.trace[-40:])

    def check_nothing_is_left(self, folders: tuple[str, ...]) -> None:
        """No half-written file, and none in these folders, once the world is quiet."""
        files = [path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file()]
        left = [str(path) for path in files if path.parts[0] in folders or path.suffix == disk.ASIDE]
        assert not left, f"{left}\n{self.story}"
