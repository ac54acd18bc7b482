import numpy as np
import pyarrow as pa
import pytest
import ray

from bcd import schema, storage
from bcd.config.training import TrainConfig
from bcd.data import index
from bcd.imaging import image
from bcd.runtime import datasets
from tests import pictures

pytestmark = pytest.mark.ray


def small(data, **changes):
    network = {"architecture": "resnet18", "weights": "none", "input_height_px": 64, "input_width_px": 96}
    parts = {"validation_fraction": 0.33, "test_fraction": 0.34}
    return TrainConfig(**{"data": data, "prepared": "off"} | network | parts | changes)


@pytest.fixture
def mixed(tmp_path):
    """Twelve good images and one of each fault, as an index."""
    contents = {f"benign/p/good-{i}.png": pictures.encode(pictures.gradient(46 + i, 70)) for i in range(12)}
    contents |= {f"malignant/p/{name}.png": content for name, (content, _) in pictures.broken().items()}
    for name, content in contents.items():
        storage.write_bytes(storage.join(str(tmp_path), name), content)
    return index.read_index(str(tmp_path))[0]


def test_images_are_decoded_and_fitted_as_everywhere_else(joined, mixed):
    dataset = datasets.read_images(datasets.row_dataset(mixed), 64, 96, [schema.IMAGE_ID])
    seen = {row[schema.IMAGE_ID]: row for row in dataset.iter_rows()}
    assert seen.keys() == set(mixed[schema.IMAGE_ID].to_pylist())
    for uri, name in zip(mixed[schema.URI].to_pylist(), mixed[schema.IMAGE_ID].to_pylist(), strict=True):
        row = seen[name]
        if row[schema.ERROR] == "":
            decoded = image.decode(storage.read_bytes(uri))
            np.testing.assert_array_equal(row[schema.IMAGE], image.fit(decoded, 64, 96))
            assert (row[schema.HEIGHT_PX], row[schema.WIDTH_PX]) == decoded.shape[:2]
        else:
            assert not row[schema.IMAGE].any()


@pytest.mark.parametrize(
    ("n", "cpus", "expected"),
    [(100, 4, 16), (600, 4, 32), (10_000, 4, 64), (10_000, 64, 32), (10_000_000, 4, 1_008), (20, 0, 16)],
)
def test_a_task_takes_whole_blocks_and_every_cpu_has_some(monkeypatch, n, cpus, expected):
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus} if cpus else {})
    assert datasets.rows_per_task(n) == expected


def test_a_task_hands_on_each_block_when_it_is_there(joined, mixed):
    uri = mixed[schema.URI].to_pylist()[0]
    table = pa.table({schema.URI: [uri] * 100, schema.IMAGE_ID: [f"{i}" for i in range(100)]})
    dataset = datasets.read_images(datasets.row_dataset(table, 64), 64, 96, [schema.IMAGE_ID])
    blocks = list(dataset.iter_batches(batch_size=None, batch_format="numpy"))
    assert sorted(len(block[schema.IMAGE_ID]) for block in blocks) == [4] + [16] * 6
    assert {name for block in blocks for name in block[schema.IMAGE_ID]} == set(
        table[schema.IMAGE_ID].to_pylist()
    )


def test_rows_are_shuffled_every_epoch_as_the_seed_says(joined):
    table = pa.table({schema.URI: [str(i) for i in range(500)]})

    def blocks(dataset):
        """Those of one epoch; tasks may end in any order."""
        batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        return sorted(tuple(batch[schema.URI].to_pylist()) for batch in batches)

    first, again, other = (datasets.shuffled(table, seed) for seed in (1, 1, 2))
    epochs = [blocks(first), blocks(first)]
    for epoch in epochs:
        assert sorted(name for block in epoch for name in block) == sorted(table[schema.URI].to_pylist())
        assert {len(block) for block in epoch} == {
            datasets.rows_per_task(500),
            500 % datasets.rows_per_task(500),
        }
    assert epochs[0] != epochs[1]
    assert epochs == [blocks(again), blocks(again)]
    assert blocks(other) != epochs[0]
    resumed = datasets.shuffled(table, 1)
    resumed.context.set_config(datasets.FINISHED_EPOCHS, 1)
    assert blocks(resumed) == epochs[1]


def test_an_epoch_of_many_rows_is_planned_as_few_tasks(joined, monkeypatch):
    monkeypatch.setattr(datasets, "MOST_TASKS", 3)
    table = pa.table({schema.URI: [str(i) for i in range(500)]})
    tasks = datasets.Rows(table, seed=0).get_read_tasks(1)
    assert [task.metadata.num_rows for task in tasks] == [176, 176, 148]
    seen = [name for task in tasks for block in task() for name in block[schema.URI].to_pylist()]
    assert sorted(seen) == sorted(table[schema.URI].to_pylist())
    assert seen != table[schema.URI].to_pylist()
