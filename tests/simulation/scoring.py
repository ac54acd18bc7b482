"""Scoring jobs in a simulated world: the real job, with a model that needs no Ray and no pixels."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow.dataset as pads
import pytest

from bcd import storage
from bcd.config.scoring import ScoreConfig
from bcd.model import bundle
from bcd.runtime import cluster, inspection, predict
from bcd.scoring import finish, ledger, score, slides
from tests.model.test_bundle import card
from tests.scoring.test_ledger import row, table
from tests.simulation.jobs import Jobs, drawn_world
from tests.simulation.world import InTurn, Odds, World

CARD = card()


class Inline:
    """`ray`: tasks run where they are started."""

    @staticmethod
    def remote(**options: Any) -> Any:
        """Of `ray`."""
        return lambda work: type("Task", (), {"remote": staticmethod(work)})

    @staticmethod
    def get(result: Any) -> Any:
        """Of `ray`."""
        return result


class Scoring(Jobs):
    """An archive of small files, the jobs that score it, and what their table must be."""

    def __init__(self, world: World, n_files: int) -> None:
        super().__init__(world)
        self.input = world.root / "in"
        self.input.mkdir()
        for number in range(n_files):
            self.write(f"{number:02}.png")
        self.config = ScoreConfig(model="m", input=str(self.input), output=world.output, compile="off")
        self.committed: dict[tuple[str, str], float] = {}

    def write(self, name: str) -> None:
        """Add or replace a file."""
        (self.input / name).write_bytes(self.world.draw.randbytes(self.world.draw.randrange(5, 50)))

    def work(self) -> None:
        """`jobs/score.py`."""
        score.run(self.config)

    def found(self) -> list[tuple[str, str]]:
        """Of each row of the table, the image and the hash of its bytes."""
        rows = pads.dataset(self.folder / "predictions", format="parquet").to_table(["image_id", "sha256"])
        return sorted((known["image_id"], known["sha256"]) for known in rows.to_pylist())

    def check(self) -> None:
        """The table is whole, each row once."""
        files = sorted(self.input.iterdir())
        assert self.found() == [(path.name, _hash(path.read_bytes())) for path in files], self.story

    def check_between(self) -> None:
        """A summary that does not say "incomplete" counts rows that are there, each once."""
        path = self.folder / ledger.SUMMARY
        if path.exists() and "incomplete" not in (summary := json.loads(path.read_text())):
            names = [name for name, _ in self.found()]
            assert len(set(names)) == len(names) >= summary["n_rows"], self.story

    def check_once(self, name: str, digest: str) -> None:
        """What was committed before this process began is not scored again."""
        before = self.committed.get((name, digest), self.world.now)
        assert before >= self.world.current.started, f"{name} again\n{self.story}"

    def score_rows(self, ours: ledger.Ledger, books: Any, progress: Any, todo: Any, *settings: Any) -> float:
        """In place of `score._score`: some rows at a time, some of them twice, as lost workers do."""
        draw, rows = self.world.draw, todo.to_pylist()
        while rows:
            size = draw.randrange(1, 4)
            batch, rows = rows[:size], rows[size:]
            digests = {one["image_id"]: _hash(storage.read_bytes(one["uri"])) for one in batch}
            for name, digest in digests.items():
                self.check_once(name, digest)
            for _ in range(1 + (draw.random() < 0.2)):
                known = table([row(name, sha256=digest) for name, digest in digests.items()])
                counted = ledger.commit(known, ours.work_uri)
            progress.add(counted)
            self.committed = dict.fromkeys(digests.items(), self.world.now) | self.committed
            rows += batch[:1] if draw.random() < 0.05 and len(rows) > 3 else []
        return 1.0

    @contextmanager
    def entered(self) -> Iterator["Scoring"]:
        """With the world around it."""
        with pytest.MonkeyPatch.context() as patch, self.world.entered(patch):
            patch.setattr(bundle, "identify", lambda *_: "abc")
            patch.setattr(bundle, "read_same", lambda *_: CARD)
            patch.setattr(cluster, "connect", lambda: None)
            patch.setattr(cluster, "total_resources", lambda: {"CPU": 2.0, "GPU": 0.0})
            patch.setattr(predict, "one_model", lambda settings: nullcontext())
            patch.setattr(inspection, "checked", lambda rows, check: check(rows))
            patch.setattr(score, "_score", self.score_rows)
            patch.setattr(finish, "_write_gallery", _gallery)
            for module in (score, finish, slides):
                patch.setattr(module, "ray", Inline)
            for module in (score, ledger):
                patch.setattr(module, "ThreadPoolExecutor", InTurn)
            patch.setattr(ledger, "FILE_BYTES", self.world.draw.choice([1, 20_000, 2**27]))
            yield self


def _gallery(ours: ledger.Ledger, *content: Any) -> None:
    storage.write_bytes(storage.join(ours.uri, ledger.GALLERY), b"page")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def history(seed: int, root: Path, plant: Any = None) -> Scoring:
    """What one seed does to an archive: jobs, and files that are added and replaced between them. `plant`
    puts a fault into the code (see `planted`)."""
    world = drawn_world(seed, root)
    draw = world.draw
    simulated = Scoring(world, draw.randrange(1, 9))
    with simulated.entered(), pytest.MonkeyPatch.context() as patch:
        if plant:
            plant(patch, world)
        for _ in range(draw.randrange(1, 4)):
            simulated.run(draw.choice([1, 1, 2, 3]))
            simulated.check()
            for _ in range(draw.randrange(3)):
                simulated.write(f"{draw.randrange(12):02}.png")
        world.odds = Odds()
        simulated.write("99.png")
        simulated.run(1)
        simulated.check()
        simulated.check_nothing_is_left(("work", ".lease"))
    return simulated
