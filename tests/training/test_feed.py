"""What every worker is given in an epoch: its share of the rows, with the pixels of each."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.errors import BcdError, StorageError
from bcd.imaging import image
from bcd.runtime import datasets, prepare
from bcd.split import balance
from bcd.taxonomy import TRAIN, VALIDATION
from bcd.training import feed, stream
from tests.runtime.test_datasets import small
from tests.test_storage import DAMAGED

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def inspected(cluster, tree, tmp_path_factory):
    """A split whose images are prepared, the settings, and where the images are."""
    from bcd.runtime import cluster as ray_cluster

    ray_cluster.connect()
    config = small(tree, prepared=str(tmp_path_factory.mktemp("prepared")))
    table, _ = prepare.prepare(config)
    return config, prepare.located(table, prepare.store_of(config))


def fitted(row):
    return image.fit(image.decode(storage.read_bytes(row[schema.URI])), 64, 96)


FEEDS = {"files": ("off", True), "prepared": (None, False), "memory": (None, True)}


@pytest.fixture(params=FEEDS)
def fed(request, inspected, monkeypatch):
    """The feed from files, from prepared images, and from memory."""
    config, table = inspected
    prepared, fits = FEEDS[request.param]
    monkeypatch.setattr(feed, "_fits", lambda n_bytes: fits)
    if prepared == "off":
        config, table = config.model_copy(update={"prepared": "off"}), schema.fill(table, schema.SPLIT)
    found = feed.feed_of(config, table)
    assert (found.listed is not None) == (request.param == "memory")
    return found


@pytest.fixture
def passes(fed, monkeypatch):
    """Passes over a part by two workers at a time: the batches of each."""
    shards = datasets.SplitData().configure(fed.streams, 2, None, None)

    def one(part, rank, finished):
        if fed.listed is None:
            return list(shards[rank][part].iter_batches(batch_size=16, batch_format="numpy"))
        context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: 2)
        monkeypatch.setattr(stream.ray.train, "get_context", lambda: context)
        drawn = stream.Drawn(fed.listed.parts[part], 0 if part == TRAIN else None)
        images = feed.HeldImages(fed.listed.held)
        return [
            {**rows, schema.IMAGE: images.take(rows[schema.POSITION])} for rows in drawn.batches(16, finished)
        ]

    def both(part, finished=0):
        if fed.listed is not None:
            return [one(part, rank, finished) for rank in (0, 1)]
        with ThreadPoolExecutor(2) as pool:  # a split waits for both
            return list(pool.map(lambda rank: one(part, rank, finished), (0, 1)))

    return both


def test_two_workers_share_every_epoch_evenly_and_see_no_held_out_image(fed, passes, inspected):
    """Class counts equal per epoch to within one row per class and what an equal split drops."""
    _, table = inspected
    train = prepare.part_of(table, TRAIN)
    expected = Counter(balance.upsample(train, "tumor_class", 0)[schema.TUMOR_CLASS].to_pylist())
    assert len(set(expected.values())) == 1
    pixels = {row[schema.IMAGE_ID]: fitted(row) for row in train.to_pylist()}
    orders = []
    for finished in range(2):
        seen = passes(TRAIN, finished)
        assert len({sum(len(batch[schema.IMAGE_ID]) for batch in batches) for batches in seen}) == 1
        counts, order = Counter(), []
        for batch in (batch for batches in seen for batch in batches):
            counts.update(batch[schema.TARGET].tolist())
            order += batch[schema.IMAGE_ID].tolist()
            for name, found in zip(batch[schema.IMAGE_ID], batch[schema.IMAGE], strict=True):
                np.testing.assert_array_equal(found, pixels[name])  # KeyError: a held-out image
        assert abs(counts[0] - counts[1]) <= 1 + fed.n_train % 2
        assert counts.total() == fed.n_train - fed.n_train % 2
        orders.append(order)
    assert orders[0] != orders[1]


def test_validation_loses_no_row_to_an_equal_split(passes, inspected):
    rows = prepare.part_of(inspected[1], VALIDATION)
    names = [name for batches in passes(VALIDATION) for batch in batches for name in batch[schema.IMAGE_ID]]
    assert sorted(names) == rows[schema.IMAGE_ID].to_pylist()


def test_folds_share_the_images_of_all(inspected):
    """Of a study they are read once; each fold finds its own among them."""
    config, table = inspected
    held = feed.hold(config, table)
    fold = table.filter(pa.array([i % 3 > 0 for i in range(len(table))]))
    fed = feed.feed_of(config, fold, held)
    assert fed.listed.held is held
    rows = {row[schema.IMAGE_ID]: row for row in table.to_pylist()}
    listed = fed.listed.parts[VALIDATION]
    images = feed.HeldImages(held).take(listed[schema.POSITION].to_numpy())
    for name, found in zip(listed[schema.IMAGE_ID].to_pylist(), images, strict=True):
        np.testing.assert_array_equal(found, fitted(rows[name]))


@pytest.mark.parametrize(("uri", "error"), [("/nowhere.png", BcdError), (DAMAGED, StorageError)])
def test_an_image_that_cannot_be_read_any_more_ends_the_run(inspected, uri, error):
    config, table = inspected
    at = table.column_names.index(schema.URI)
    lost = schema.fill(table.set_column(at, schema.URI, pa.array([uri] * len(table))), schema.INDEX)
    with pytest.raises(error, match=r"became unusable after the run began|failed to deliver"):
        feed.hold(config, lost)


def test_images_are_held_where_every_node_has_room(monkeypatch):
    def node(cpus, store, alive=True):
        return {"Alive": alive, "Resources": {"CPU": cpus, "object_store_memory": store}}

    head, dead = node(0, 10), node(4, 10, alive=False)
    monkeypatch.setattr(feed.ray, "nodes", lambda: [node(4, 1_000), node(4, 600), head, dead])
    assert feed._fits(300)
    assert not feed._fits(301)


def test_the_stain_is_measured_once_and_on_training_images_only(inspected, tmp_path, monkeypatch):
    config, table = inspected
    config = config.model_copy(update={"stain_normalisation": "macenko"})
    monkeypatch.setattr(feed, "N_STAINS", 5)
    read, whole = [], feed._read.remote
    spied = SimpleNamespace(remote=lambda *given: read.append(given[0]) or whole(*given))
    monkeypatch.setattr(feed, "_read", spied)
    found = feed.stain_of(config, str(tmp_path), table)
    train = set(prepare.part_of(table, TRAIN)[schema.IMAGE_ID].to_pylist())
    assert set(read[0][schema.IMAGE_ID].to_pylist()) < train
    assert (found.method, len(read[0])) == ("macenko", 5)
    assert feed.stain_of(config, str(tmp_path), table) == found
    assert len(read) == 1
    assert feed.stain_of(config.model_copy(update={"stain_normalisation": None}), "", table) is None


def test_a_weighted_loss_repeats_no_rows(inspected):
    config, table = inspected
    found = feed.feed_of(config.model_copy(update={"weighted_loss": True}), table)
    train = prepare.part_of(table, TRAIN)
    assert found.n_train == len(train)
    assert found.class_weights == balance.class_weights(train, "tumor_class")
