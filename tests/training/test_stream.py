import threading
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import ray.train
import torch

from bcd import schema
from bcd.errors import BcdError
from bcd.runtime.datasets import shuffled_order
from bcd.taxonomy import TRAIN, VALIDATION
from bcd.training import stream

CPU = torch.device("cpu")


class Shard:
    """Passes over ten rows; `read` is set when one of them begins to be read."""

    def __init__(self, broken=(), n=10):
        self.read, self.broken, self.n = threading.Event(), broken, n

    def iter_batches(self, batch_size, **_):
        self.read.set()
        for start in range(0, self.n, batch_size):
            numbers = np.arange(start, min(self.n, start + batch_size))
            ids = numbers.astype(str)
            errors = ["truncated: x" if name in self.broken else "" for name in ids]
            yield {
                schema.IMAGE_ID: ids,
                schema.TARGET: numbers % 2,
                schema.POSITION: numbers,
                schema.IMAGE: np.broadcast_to(
                    numbers.astype(np.uint8)[:, None, None, None], (len(ids), 2, 3, 3)
                ),
                schema.ERROR: np.array(errors, object),
            }


class Held:
    """Ten images in blocks of four, whose pixels are their positions."""

    def __init__(self, _):
        blocks = np.array_split(np.arange(10, dtype=np.uint8), [4, 8])
        self.blocks = [np.broadcast_to(b[:, None, None, None], (len(b), 2, 3, 3)) for b in blocks]
        self.n_bytes = 180

    def take(self, positions):
        return np.concatenate(self.blocks)[positions]


def stream_of(monkeypatch, shard, name=TRAIN, held=None, batch_size=2):
    monkeypatch.setattr(ray.train, "get_dataset_shard", lambda _: shard)
    return stream.Stream(name, batch_size, stream.Pixels(held, CPU), stream.Streamed(name))


def ids(batches):
    return [name for batch in batches for name in batch.image_ids]


def test_a_pass_that_was_begun_is_read_before_it_is_asked_for(monkeypatch):
    passes = stream_of(monkeypatch, shard := Shard())
    assert not shard.read.is_set()
    passes.begin(0)
    assert shard.read.wait(60)
    assert ids(passes.batches(0)) == [f"{i}" for i in range(10)]
    shard.read.clear()
    assert ids(passes.batches(0)) == [f"{i}" for i in range(10)]  # another, which begins only now
    assert shard.read.is_set()


@pytest.mark.parametrize("broken", ["0", "7"])
def test_an_image_that_broke_ends_the_pass_that_was_begun(monkeypatch, broken):
    passes = stream_of(monkeypatch, Shard(broken=(broken,)))
    passes.begin(0)
    with pytest.raises(BcdError, match=f"{broken} became unusable after the run began"):
        ids(passes.batches(0))


@pytest.mark.parametrize(
    ("fits", "source"), [(None, "storage"), (False, "host memory"), (True, "GPU memory")]
)
def test_images_are_those_of_their_rows_wherever_they_are(monkeypatch, fits, source):
    monkeypatch.setattr(stream, "HeldImages", Held)
    monkeypatch.setattr(stream, "_fits", lambda n_bytes, device: fits)
    passes = stream_of(monkeypatch, Shard(), held=None if fits is None else object())
    assert passes.images_from == source
    batches = list(passes.batches(0))
    assert [len(batch.images) for batch in batches] == [2] * 5
    for batch in batches:
        numbers = [int(name) for name in batch.image_ids]
        assert batch.images.shape == (2, 2, 3, 3)
        assert batch.images[:, 1, 2, 2].tolist() == numbers
        assert batch.targets == batch.target.tolist() == [number % 2 for number in numbers]


@pytest.mark.parametrize(("name", "sizes"), [(TRAIN, [4, 4, 3]), (VALIDATION, [4, 4, 3])])
def test_the_last_images_of_a_pass_make_no_small_step(monkeypatch, name, sizes):
    passes = stream_of(monkeypatch, Shard(n=11), name, batch_size=4)
    assert [len(batch.images) for batch in passes.batches(0)] == sizes
    passes = stream_of(monkeypatch, Shard(n=9), name, batch_size=4)
    assert [len(batch.images) for batch in passes.batches(0)] == ([4, 3, 2] if name == TRAIN else [4, 4, 1])


def test_items_are_made_a_few_ahead_and_no_more():
    made = []

    def items():
        for i in range(10):
            made.append(i)
            yield i

    found = stream.ahead(items())
    first = [next(found) for _ in range(4)]
    assert first == [0, 1, 2, 3]
    assert len(made) <= 4 + stream.AHEAD
    assert first + list(found) == list(range(10))


@pytest.mark.parametrize("n", [1, 8, 9, 10])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_are_disjoint_and_equal_in_training(n, world):
    order = np.random.default_rng(0).permutation(n)
    for is_equal in (True, False):
        shares = [stream.share_of(order, rank, world, is_equal) for rank in range(world)]
        together = np.concatenate(shares)
        assert len(set(together)) == len(together) == (n // world * world if is_equal else n)
        assert len({len(share) for share in shares}) == 1 or not is_equal


def drawn(monkeypatch, rank, seed, finished, world=2, n=101, batch_size=8):
    context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: world)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    rows = pa.table({schema.IMAGE_ID: [str(i) for i in range(n)], schema.POSITION: range(n)})
    batches = list(stream.Drawn(rows, seed).batches(batch_size, finished))
    for batch in batches:
        assert batch[schema.IMAGE_ID].tolist() == [str(i) for i in batch[schema.POSITION]]
    return [int(i) for batch in batches for i in batch[schema.POSITION]]


def test_every_worker_draws_the_same_order_in_every_epoch_another(monkeypatch):
    epochs = [[drawn(monkeypatch, rank, 7, finished) for rank in (0, 1)] for finished in (0, 1)]
    for first, second in epochs:
        assert len(first) == len(second) == 50
        assert not set(first) & set(second)
    assert epochs[0] != epochs[1]
    assert drawn(monkeypatch, 0, 7, 1) == epochs[1][0]  # resumed there
    assert drawn(monkeypatch, 0, 8, 0) != epochs[0][0]
    assert drawn(monkeypatch, 0, 7, 0, world=1) == shuffled_order(101, 7, 0).tolist()
    assert drawn(monkeypatch, 0, None, 3, world=1) == list(range(101))


@pytest.mark.parametrize("is_held", [True, False])
def test_without_validation_rows_its_stream_is_empty(monkeypatch, is_held):
    monkeypatch.setattr(ray.train, "get_dataset_shard", {TRAIN: Shard()}.__getitem__)
    context = SimpleNamespace(get_world_size=lambda: 1, get_world_rank=lambda: 0)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(stream, "HeldImages", Held)
    rows = pa.table({schema.IMAGE_ID: ["0"], schema.TARGET: [0], schema.POSITION: [0]})
    listed = SimpleNamespace(held="held", parts={TRAIN: rows, VALIDATION: rows.slice(1)})
    trains, validates = stream.streams_of(listed if is_held else None, 0, (2, 2), CPU, validates=False)
    assert ids(validates.batches(0)) == []
    assert ids(trains.batches(0)) == (["0"] if is_held else [f"{i}" for i in range(10)])
