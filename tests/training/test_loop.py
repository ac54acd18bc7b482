import contextlib
import re
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray.train
import torch

from bcd.config.training import TrainConfig
from bcd.errors import BcdError, ConfigError, DivergedError
from bcd.model import train_step
from bcd.model.recipes.loss import Loss
from bcd.runtime import run_directory
from bcd.runtime.run_directory import SCORE, SELECTION
from bcd.training import checkpoint, loop
from bcd.training.checkpoint import State
from bcd.training.stream import Batch
from bcd.training.task import Task
from tests.model.recipes.test_reference import MACENKO

RECORD = {
    "epoch": 2,
    "train_loss": 0.5,
    "validation_loss": 0.25,
    "validation_accuracy": 0.75,
    SCORE: 0.875,
    "n_validation": 1234,
    "class_counts": {"benign": 4000, "malignant": 4000},
    "learning_rate": 2e-4,
    "images_per_s": 31.25,
    "headspace": 0.9512,
    "images_from": "host memory",
    "seconds": 60.0,
}


def test_files_of_tensorboard_do_not_name_the_host(tmp_path, monkeypatch):
    task = SimpleNamespace(run_uri=str(tmp_path / "run"), config=SimpleNamespace(epochs=12))
    (tmp_path / "board").mkdir()
    board = loop.SummaryWriter(tmp_path / "board")
    loop._publish(task, board, tmp_path / "board", [RECORD])
    board.close()
    (made,), (published,) = ((tmp_path / name).iterdir() for name in ("board", "run/tensorboard"))
    assert f".{socket.gethostname()}." in made.name
    assert re.fullmatch(r"events\.out\.tfevents\.\d+\.\d+\.\d+", published.name)
    # Each epoch, for those who follow the run.
    assert run_directory.read_json(task.run_uri, run_directory.HISTORY) == [RECORD]


def test_progress_line():
    assert loop.progress_line(RECORD, 12) == (
        "epoch 2/12: loss 0.500 (validation 0.250), balanced accuracy 0.875 on 1,234 validation images; "
        "saw benign 4,000, malignant 4,000; learning rate 2.0e-04; "
        "31.2 images/s (headspace 0.95, images from host memory), 60 s; 10 min left"
    )


def test_without_validation_the_last_epoch_is_the_best():
    seen = loop.Seen()
    whole = replace(task(4), validates=False)
    records = [RECORD | loop._validation_metrics(whole, seen, epoch) for epoch in (1, 2)]
    assert [record[loop.SELECTION] for record in records] == [1.0, 2.0]
    assert records[0][SCORE] is None
    assert loop.progress_line(records[0], 12).startswith("epoch 2/12: loss 0.500; saw benign 4,000")


def small_state(**changes):
    """A state of a few numbers, with a step behind it."""
    network = torch.nn.BatchNorm1d(3)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    network.load_state_dict(network.state_dict() | changes)
    return State(network, optimizer, [RECORD])


def flipped(path):
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


class Kept:
    """A checkpoint in a folder."""

    def __init__(self, path, epoch):
        self.path, self.metrics, self.checkpoint = str(path), {"epoch": epoch}, self

    def as_directory(self):
        return contextlib.nullcontext(self.path)


@pytest.mark.parametrize(("n_damaged", "weight"), [(0, 3.0), (1, 2.0), (2, 1.0), (3, 9.0)])
def test_the_newest_intact_checkpoint_is_used(tmp_path, monkeypatch, caplog, n_damaged, weight):
    kept = [Kept(tmp_path / f"{epoch}", epoch) for epoch in (3, 2, 1)]
    for one in kept:
        Path(one.path).mkdir()
        small_state(weight=torch.full((3,), float(one.metrics["epoch"]))).save(Path(one.path))
    for one in kept[:n_damaged]:
        flipped(Path(one.path) / checkpoint.WEIGHTS_FILE)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: kept[0])
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda: [kept[2], kept[0], kept[1]])
    state = small_state(weight=torch.full((3,), 9.0))
    state.history = []
    loop._resume(state)
    assert state.network.weight.tolist() == [weight] * 3
    assert state.history == ([RECORD] if n_damaged < 3 else [])
    told = [record.message for record in caplog.records]
    assert len(told) == n_damaged
    assert all("is damaged (model.safetensors is not as it was written" in message for message in told)


def alone(monkeypatch, world=1):
    context = SimpleNamespace(get_world_size=lambda: world, get_world_rank=lambda: 0)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)


def task(n_train, **changes):
    settings = {"weights": "none", "batch_size": 2, "learning_rate": 1.0}
    config = TrainConfig(data="d", **settings | changes)
    return Task(config, ("benign", "malignant"), None, "run", n_train)


class Steps:
    """Training steps whose losses are given; remembers rates and images."""

    def __init__(self, losses=(), spoils=False):
        self.network, self.losses = torch.nn.BatchNorm1d(3), iter(losses)
        self.rates, self.sizes, self.spoils = [], [], spoils

    def __call__(self, images, target, rate, image_ids):
        self.rates.append(rate)
        self.sizes.append(len(images))
        if self.spoils:
            self.network.weight.data[0] = torch.nan
        return torch.tensor(next(self.losses, 0.5))


def rows(n, size=2):
    """A pass over n images."""
    for at in range(0, n, size):
        ids = [str(i) for i in range(at, min(n, at + size))]
        images, target = torch.zeros((len(ids), 2, 2, 3), dtype=torch.uint8), torch.zeros(len(ids))
        yield Batch(ids, [0] * len(ids), images, target)


def an_epoch(given, steps, n, epoch=1, size=2):
    passes = SimpleNamespace(batch_size=size, batches=lambda finished: rows(n, size))
    return loop._train_epoch(given, steps, epoch, passes, loop.StepClock(torch.device("cpu")))


def test_a_long_epoch_logs_how_far_it_is(monkeypatch, caplog):
    alone(monkeypatch)
    monkeypatch.setattr(loop, "PROGRESS_S", 0)
    caplog.set_level("INFO", logger="bcd")
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    told = loop.Told(task(40, epochs=3), 2)
    told.tell(20)
    told.tell(40)  # the line of the epoch follows
    assert caplog.messages == ["epoch 2/3: 20 of 40 images, 2.0 images/s, 10 s left"]


@pytest.mark.parametrize(("n", "epochs"), [(2, 1), (4, 1), (20, 3)])
def test_no_step_has_the_rate_zero(monkeypatch, n, epochs):
    alone(monkeypatch)
    steps = Steps()
    for epoch in range(1, epochs + 1):
        an_epoch(task(n, epochs=epochs), steps, n, epoch)
    assert len(steps.rates) == epochs * n // 2
    assert min(steps.rates) > 0
    n_steps = epochs * n // 2
    middles = [(i + 0.5) / n_steps for i in range(n_steps)]
    assert steps.rates == pytest.approx([train_step.learning_rate(1.0, middle, 0.1) for middle in middles])


@pytest.mark.parametrize(
    ("losses", "n_taken", "said"),
    [
        ([0.5] * 24 + [float("nan")] * 99, 40, "in epoch 2: from step 25 on the loss is no finite number"),
        ([float("inf")], 20, "in epoch 2: from step 1 on the loss"),
        ([0.5] * 44 + [float("nan")], 45, "in epoch 2: from step 45 on the loss"),
        ([0.5] * 19 + [float("nan")] + [0.5] * 99, 20, "in epoch 2: from step 20 on the loss"),
    ],
)
def test_a_diverging_training_stops_and_names_the_step(monkeypatch, losses, n_taken, said):
    alone(monkeypatch)
    steps = Steps(losses)
    with pytest.raises(DivergedError, match=said) as raised:
        an_epoch(task(90, learning_rate=0.25), steps, 90, epoch=2)
    assert len(steps.rates) == n_taken
    assert "a lower --learning-rate than 0.25" in str(raised.value)


def test_weights_that_are_no_numbers_end_the_epoch(monkeypatch):
    alone(monkeypatch)
    with pytest.raises(DivergedError, match="after its last step, 3, the weights are no finite numbers"):
        an_epoch(task(6), Steps(spoils=True), 6)


def test_what_one_worker_finds_stops_all(monkeypatch):
    """This one's losses are fine; the other's are not from the second step on."""
    alone(monkeypatch, world=2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda first, operation: first.fill_(1))
    with pytest.raises(DivergedError, match="from step 2 on"):
        an_epoch(task(12), Steps(), 6)


@pytest.mark.parametrize(
    ("n", "size", "world", "shared"), [(1, 2, 1, True), (1, 1, 2, False), (0, 2, 1, True)]
)
def test_no_step_has_a_single_image(monkeypatch, n, size, world, shared):
    alone(monkeypatch, world)
    steps = Steps()
    with pytest.raises(ConfigError, match="a training step has a single image"):
        an_epoch(task(n * world, sync_batchnorm=shared), steps, n, size=size)
    assert not steps.rates


def test_the_images_of_all_workers_count_where_batch_norm_does(monkeypatch):
    alone(monkeypatch, world=2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    steps = Steps()
    assert len(an_epoch(task(4), steps, 2, size=1).image_ids) == 2
    assert steps.sizes == [1, 1]


def test_a_validation_that_is_no_number_is_not_kept(monkeypatch):
    alone(monkeypatch)
    monkeypatch.setattr(loop, "_train_epoch", lambda *_: loop.Seen(1.0))
    monkeypatch.setattr(loop, "_validate", lambda *_: loop.Seen(float("nan")))
    state, step = small_state(), SimpleNamespace(device=torch.device("cpu"))
    with pytest.raises(
        DivergedError, match="in epoch 1: the loss on the validation images is no finite number"
    ):
        loop._epoch(task(4, epochs=1), step, state, 1, (None, SimpleNamespace(batches=lambda finished: [])))


@pytest.mark.parametrize("error", [DivergedError("diverged"), ConfigError("a single image")])
def test_what_all_workers_find_is_returned_and_not_tried_again(monkeypatch, error):
    def fail(_):
        raise error

    monkeypatch.setattr(loop, "_train", fail)
    assert loop.train(task(4)) is error
    error = BcdError("one worker's own")
    with pytest.raises(BcdError, match="one worker's own"):
        loop.train(task(4))


def test_augmentation_differs_between_workers_and_after_resuming():
    drawn = {loop.augmentation_seed(7, rank, n_epochs) for rank in range(8) for n_epochs in range(50)}
    assert len(drawn) == 8 * 50
    assert loop.augmentation_seed(7, 3, 0) == 7_003


def test_a_recipe_is_in_the_network_and_its_step(monkeypatch):
    alone(monkeypatch)
    monkeypatch.setattr(loop, "_resume", lambda state: None)
    changes = {"weights": "imagenet", "recipe": "few", "mixup": 0.2, "patience": 3}
    given = replace(task(4, architecture="resnet18", **changes), class_weights=(2.0, 0.5), stain=MACENKO)
    state = loop._state(given, torch.device("cpu"))
    assert not any(m.training for m in state.network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert {group["scale"] for group in state.optimizer.param_groups} == {0.7**n for n in range(6)}
    assert len(state.network.fc._forward_pre_hooks) == 1
    step = loop._step(given, state, state.network, torch.device("cpu"))
    assert (step.loss.smoothing, step.loss.mixup, step.loss.weights.tolist()) == (0.05, 0.2, [2.0, 0.5])
    assert (step.stain, step.average) == (MACENKO, state.average)
    assert state.judged is state.average.module


def test_without_a_recipe_the_network_and_its_step_are_plain(monkeypatch):
    alone(monkeypatch)
    monkeypatch.setattr(loop, "_resume", lambda state: None)
    given = task(4, architecture="resnet18")
    state = loop._state(given, torch.device("cpu"))
    step = loop._step(given, state, state.network, torch.device("cpu"))
    assert (step.loss, step.config, step.stain, step.average) == (Loss(), given.config, None, None)
    assert (state.judged, len(state.optimizer.param_groups)) == (state.network, 2)
    assert not state.network.fc._forward_pre_hooks


SCORES = [0.5, 0.7, 0.6, 0.65, 0.6, 0.9]


@pytest.mark.parametrize(
    ("n_before", "patience", "expected"), [(0, 3, 5), (4, 3, 5), (5, 3, 5), (0, 0, 6), (6, 9, 6)]
)
def test_a_training_ends_early_also_where_it_was_resumed(monkeypatch, n_before, patience, expected):
    """After the third epoch that is no better than the second, wherever the run was interrupted."""
    alone(monkeypatch)
    begun, records = [], [{SELECTION: score} for score in SCORES]
    context = SimpleNamespace(
        get_world_size=lambda: 1, get_world_rank=lambda: 1, get_local_world_size=lambda: 1
    )
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda network, _: network)
    monkeypatch.setattr(loop.cluster, "share_cores", lambda n: None)
    monkeypatch.setattr(loop.log, "hand_on", lambda job: None)
    state = small_state()
    state.history = records[:n_before]
    monkeypatch.setattr(loop, "_state", lambda task, device: state)
    monkeypatch.setattr(loop, "streams_of", lambda *_: [SimpleNamespace(begin=begun.append)])
    monkeypatch.setattr(loop, "_epoch", lambda task, step, state, epoch, streams: records[epoch - 1])
    monkeypatch.setattr(loop, "_checkpoint", lambda state, record: None)
    history = loop._train(task(4, epochs=6, patience=patience))
    assert history == records[:expected]
    # What validation may end is not begun ahead.
    assert begun == ([0] if not patience else [])
