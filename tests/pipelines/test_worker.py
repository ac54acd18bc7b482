import threading

import numpy as np
import pytest
import ray.train
import torch

from bcd import model, optimise, schema
from bcd.errors import BcdError
from bcd.pipelines import worker

RECORD = {
    "epoch": 2,
    "train_loss": 0.5,
    "validation_loss": 0.25,
    worker.SCORE: 0.875,
    "n_validation": 1234,
    "class_counts": {"benign": 4000, "malignant": 4000},
    "learning_rate": 2e-4,
    "images_per_s": 31.25,
    "seconds": 60.0,
}


def test_progress_line_is_for_people():
    assert worker.progress_line(RECORD, 12) == (
        "epoch 2/12: loss 0.500 (validation 0.250), balanced accuracy 0.875 on 1,234 validation images; "
        "saw benign 4,000, malignant 4,000; learning rate 2.0e-04; 31.2 images/s, 60 s; 10 min left"
    )


def test_a_checkpoint_restores_network_optimiser_and_history(tmp_path):
    def fresh(seed):
        network = model.build(2, seed=seed).to(memory_format=torch.channels_last)
        return worker.State(network, optimise.optimizer(network, "adamw", 1e-3, 0.01))

    saved, restored = fresh(1), fresh(2)
    saved.history.append(RECORD)
    step = optimise.Step(saved.network.train(), saved.optimizer, torch.device("cpu"), "float32", None)
    step(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), torch.tensor([0, 1]), 1e-3)
    saved.save(tmp_path)
    restored.load(tmp_path)
    for name, tensor in saved.network.state_dict().items():
        assert torch.equal(tensor, restored.network.state_dict()[name])
    first = lambda state: state.optimizer.state_dict()["state"][0]["exp_avg"]  # noqa: E731
    assert torch.equal(first(saved), first(restored))
    assert restored.history == [RECORD]


class Shard:
    """Passes over five batches of two rows; `read` is set when one of them begins to be read."""

    def __init__(self, broken=()):
        self.read, self.broken = threading.Event(), broken

    def iter_batches(self, batch_size, **_):
        self.read.set()
        for start in range(0, 10, batch_size):
            ids = [f"{i}" for i in range(start, start + batch_size)]
            errors = ["truncated: x" if name in self.broken else "" for name in ids]
            yield {schema.IMAGE_ID: np.array(ids), schema.ERROR: np.array(errors, object)}


def stream(monkeypatch, shard):
    monkeypatch.setattr(ray.train, "get_dataset_shard", lambda name: shard)
    return worker.Stream("train", 2)


def ids(batches):
    return [name for batch in batches for name in batch[schema.IMAGE_ID]]


def test_a_pass_that_was_begun_is_read_before_it_is_asked_for(monkeypatch):
    passes = stream(monkeypatch, shard := Shard())
    assert not shard.read.is_set()
    passes.begin()
    assert shard.read.wait(60)
    assert ids(passes.batches()) == [f"{i}" for i in range(10)]
    shard.read.clear()
    assert ids(passes.batches()) == [f"{i}" for i in range(10)]  # another, which begins only now
    assert shard.read.is_set()


@pytest.mark.parametrize("broken", ["0", "7"])
def test_a_picture_that_broke_meanwhile_ends_the_pass_that_was_begun(monkeypatch, broken):
    passes = stream(monkeypatch, Shard(broken=(broken,)))
    passes.begin()
    with pytest.raises(BcdError, match=f"{broken} became unusable after the run began"):
        ids(passes.batches())
