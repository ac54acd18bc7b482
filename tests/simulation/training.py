"""Trainings in a simulated world: the real job, with epochs that only count, and without Ray."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bcd import schema, storage
from bcd.config.training import TrainConfig
from bcd.evaluation import evaluate
from bcd.runtime import cluster, run_directory
from bcd.runtime.prepare import DatasetFacts
from bcd.training import export, feed, train
from tests.simulation.jobs import Jobs, drawn_world
from tests.simulation.world import InTurn, Odds, World

EPOCHS = 3
FACTS = DatasetFacts(
    data_fingerprint="d",
    synthetic=True,
    warnings=[],
    broken=[],
    quarantined=[],
    field_height_px=460,
    field_width_px=700,
)
FILES = ("model.safetensors", "card.json")


class Training(Jobs):
    """One run, the jobs that train it, and what it must hold."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        place, _, name = world.output.rpartition("/")
        self.config = TrainConfig(data="d", output=place, name=name, epochs=EPOCHS, weights="none")
        parts = ["train", "validation", "test"]
        rows = [{"image_id": part, "uri": part, "patient": part, "part": part} for part in parts]
        self.rows = pa.Table.from_pylist(rows, schema=schema.SPLIT)

    def work(self) -> None:
        """`jobs/train.py`."""
        train.run(self.config)

    def check(self) -> None:
        """The run is finished, and every file of it is whole."""
        read = {name: json.loads((self.folder / name).read_text()) for name in self.documents()}
        assert read["run.json"]["status"] == run_directory.FINISHED, self.story
        assert read["history.json"] == [{"epoch": epoch} for epoch in range(1, EPOCHS + 1)]
        assert read["metrics.json"] == {"of": read["model/card.json"]["of"]}
        assert pq.read_table(self.folder / "split.parquet").equals(self.rows)

    def documents(self) -> list[str]:
        """JSON files of a finished run."""
        return ["config.json", "run.json", "data.json", "history.json", "metrics.json", "model/card.json"]

    def check_between(self) -> None:
        """A run that says it is finished is whole."""
        path = self.folder / "run.json"
        if path.exists() and json.loads(path.read_text())["status"] == run_directory.FINISHED:
            self.check()

    def train_model(
        self, config: TrainConfig, run_uri: str, *settings: Any, cluster_ends: bool
    ) -> SimpleNamespace:
        """In place of `train.train_model`: each epoch is a file, and is not trained twice."""
        for epoch in range(1, EPOCHS + 1):
            uri = storage.join(run_uri, "checkpoints", f"{epoch}.json")
            if not storage.exists(uri):
                storage.write_bytes(uri, json.dumps({"epoch": epoch}).encode())
        history = [
            json.loads(storage.read_bytes(storage.join(run_uri, "checkpoints", f"{epoch}.json")))
            for epoch in range(1, EPOCHS + 1)
        ]
        return SimpleNamespace(return_value=history)

    def export_bundle(self, config: TrainConfig, uri: str, *known: Any) -> None:
        """In place of `export.bundle_of`."""
        number = self.world.draw.randrange(10**6)
        for name in FILES:
            storage.write_bytes(storage.join(uri, name), json.dumps({"of": number}).encode())

    def fault(self, run_uri: str) -> str | None:
        """In place of `export.fault`."""
        found = {storage.read_bytes(storage.join(run_uri, "model", name)) for name in FILES}
        return None if len(found) == 1 else "weights and card differ"

    def evaluate_bundle(self, model_uri: str, table: Any, facts: Any, folder: str, owner: str) -> None:
        """In place of `evaluate.evaluate`."""
        known = json.loads(storage.read_bytes(storage.join(model_uri, "card.json")))
        storage.write_bytes(storage.join(folder, "metrics.json"), json.dumps(known).encode())

    @contextmanager
    def entered(self) -> Iterator["Training"]:
        """With the world around it."""
        with pytest.MonkeyPatch.context() as patch, self.world.entered(patch):
            patch.setattr(cluster, "connect", lambda: True)
            patch.setattr(cluster, "scaling", lambda config: None)
            patch.setattr(train, "ThreadPoolExecutor", InTurn)
            patch.setattr(train, "initial_weights", lambda config: None)
            patch.setattr(train, "load_data_set", lambda config: (self.rows, FACTS))
            patch.setattr(train, "prepare", lambda config, inspected: (self.rows, FACTS))
            patch.setattr(train, "describe_split", lambda *known: [])
            patch.setattr(train, "store_of", lambda config: None)
            patch.setattr(feed, "feed_of", lambda *known: None)
            patch.setattr(train, "train_model", self.train_model)
            patch.setattr(train, "_rates", lambda history: {})
            patch.setattr(export, "require_valid_card", lambda *known: None)
            patch.setattr(export, "bundle_of", self.export_bundle)
            patch.setattr(export, "fault", self.fault)
            patch.setattr(evaluate, "evaluate", self.evaluate_bundle)
            yield self


def history(seed: int, root: Path) -> Training:
    """What one seed does to a run."""
    world = drawn_world(seed, root)
    simulated = Training(world)
    with simulated.entered():
        simulated.run(world.draw.choice([1, 2, 3]))
        simulated.check()
        world.odds = Odds()
        simulated.run(1)
        simulated.check()
        # A job that finds the run finished does not look at the claim of one that was ended.
        simulated.check_nothing_is_left(())
    return simulated
