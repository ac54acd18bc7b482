import hashlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import ray

from bcd import balance, image, index, schema, storage
from bcd.config import TrainConfig
from bcd.errors import BcdError, DataError, StorageError
from bcd.pipelines import prepare, read, staging, train
from tests import pictures
from tests.test_storage import DAMAGED

pytestmark = pytest.mark.ray


def small(data, **changes):
    settings = {"weights": "none", "input_height_px": 64, "input_width_px": 96, "test_fraction": 0.34}
    return TrainConfig(**{"data": data, "validation_fraction": 0.33} | settings | changes)


@pytest.fixture
def mixed(tmp_path):
    """Twelve good pictures and every kind of broken one, as an index."""
    contents = {f"benign/p/good-{i}.png": pictures.encode(pictures.gradient(46 + i, 70)) for i in range(12)}
    contents |= {f"malignant/p/{name}.png": content for name, (content, _) in pictures.broken().items()}
    for name, content in contents.items():
        storage.write_bytes(storage.join(str(tmp_path), name), content)
    return index.read(str(tmp_path))[0]


def test_inspect_hashes_the_good_and_names_the_broken(joined, mixed):
    good, broken, size = read.inspect(mixed)
    codes = {name: code for name, (_, code) in pictures.broken().items()}
    assert {name.split("/")[-1][:-4]: fault.split(":")[0] for name, fault in broken.items()} == codes
    assert good[schema.IMAGE_ID].to_pylist() == sorted(f"benign/p/good-{i}.png" for i in range(12))
    for row in good.to_pylist():
        assert row[schema.SHA256] == hashlib.sha256(storage.read_bytes(row[schema.URI])).hexdigest()
    assert good.schema == schema.INDEX
    assert size == (57, 70)  # all heights are equally common: the largest


def test_a_missing_file_is_one_broken_image(joined, mixed, tmp_path):
    (tmp_path / "benign/p/good-3.png").unlink()
    _, broken, _ = read.inspect(mixed)
    assert broken["benign/p/good-3.png"].startswith("unreadable")


def test_too_many_broken_images_end_the_run_and_few_do_not():
    broken = {f"{i}.png": "truncated: x" for i in range(7)}
    with pytest.raises(
        DataError, match=r"7 of 100 images are broken, more than --max-bad-fraction 0.01.*and 2 more"
    ):
        read.check_bad_fraction(broken, 100, 0.01)
    assert read.check_bad_fraction({"a.png": "truncated: x"}, 100, 0.01) == ["a.png: truncated: x"]


def test_images_are_decoded_and_fitted_as_everywhere_else(joined, mixed):
    dataset = read.images(read.rows(mixed), 64, 96, [schema.IMAGE_ID])
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
    assert read.rows_per_task(n) == expected


def test_a_task_hands_on_each_block_when_it_is_there(joined, mixed):
    uri = mixed[schema.URI].to_pylist()[0]
    table = pa.table({schema.URI: [uri] * 100, schema.IMAGE_ID: [f"{i}" for i in range(100)]})
    dataset = read.images(read.rows(table, 64), 64, 96, [schema.IMAGE_ID])
    blocks = list(dataset.iter_batches(batch_size=None, batch_format="numpy"))
    assert sorted(len(block[schema.IMAGE_ID]) for block in blocks) == [4] + [16] * 6
    assert {name for block in blocks for name in block[schema.IMAGE_ID]} == set(
        table[schema.IMAGE_ID].to_pylist()
    )


def test_storage_that_fails_is_no_fault_of_the_picture(tmp_path):
    uris = [DAMAGED, str(tmp_path / "none.png")]
    rows = [{schema.IMAGE_ID: uri, schema.URI: uri} for uri in uris]
    found = read.pixels(schema.fill(pa.Table.from_pylist(rows), schema.READING), 32, 32, [])
    assert found[schema.ERROR].tolist() == ["unavailable", "unreadable"]
    assert found[schema.ERROR_MESSAGE][0].startswith(f"{DAMAGED}: cannot read it")


def test_whatever_is_raised_for_one_image_is_the_row_of_that_image(monkeypatch, tmp_path):
    """While it is read, counted and decoded; the images beside it have their pixels."""
    uris = [str(tmp_path / f"{name}.png") for name in ("good", "memory", "large", "overflow")]
    for uri in uris:
        storage.write_bytes(uri, pictures.encode(pictures.gradient()))
    tags, strips = pictures.tiff_page(pictures.gradient()[..., 0], 3)
    storage.write_bytes(uris[3], pictures.tiff((tags | {320: (4, [2**31] * 768)}, strips)))
    storage.write_bytes(uris[2], bytes(20_000))
    monkeypatch.setattr(image, "MAX_FILE_BYTES", 19_999)
    read_bytes = storage.read_bytes

    def fails(uri, *limit):
        if "memory" in uri:
            raise MemoryError
        return read_bytes(uri, *limit)

    monkeypatch.setattr(storage, "read_bytes", fails)
    rows = [{schema.IMAGE_ID: uri, schema.URI: uri} for uri in uris]
    found = read.pixels(schema.fill(pa.Table.from_pylist(rows), schema.READING), 46, 70, [])
    assert found[schema.ERROR].tolist() == ["", "unreadable", "too_large", "truncated"]
    assert found[schema.ERROR_MESSAGE][1] == f"{uris[1]}: cannot read it: MemoryError"
    np.testing.assert_array_equal(found[schema.IMAGE][0], pictures.gradient())


def test_a_tile_of_a_slide_that_cannot_be_fetched_now_is_left_to_a_rerun(monkeypatch):
    def fails(uri, given):
        raise StorageError(f"{uri}: no")

    monkeypatch.setattr(staging, "open_slide", fails)
    with pytest.raises(image.ImageError, match="unavailable"):
        read.picture({schema.URI: "s.svs", schema.X_LEVEL0_PX: 0})


def test_inspect_stops_where_storage_fails(joined, mixed):
    """Left out as broken, the image would change split and numbers without a word."""
    lost = mixed.slice(0, 1).to_pylist()[0] | {schema.IMAGE_ID: "lost", schema.URI: DAMAGED}
    table = pa.concat_tables([mixed, pa.Table.from_pylist([lost], schema=mixed.schema)])
    with pytest.raises(StorageError, match=r"storage did not give lost .* run the same command again"):
        read.inspect(table)


def test_rows_are_shuffled_anew_every_epoch_and_alike_for_a_seed(joined):
    table = pa.table({schema.URI: [str(i) for i in range(500)]})

    def blocks(dataset):
        """Those of one epoch; tasks may end in any order."""
        batches = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        return sorted(tuple(batch[schema.URI].to_pylist()) for batch in batches)

    first, again, other = (read.shuffled(table, seed) for seed in (1, 1, 2))
    epochs = [blocks(first), blocks(first)]
    for epoch in epochs:
        assert sorted(name for block in epoch for name in block) == sorted(table[schema.URI].to_pylist())
        assert {len(block) for block in epoch} == {read.rows_per_task(500), 500 % read.rows_per_task(500)}
    assert epochs[0] != epochs[1]
    assert epochs == [blocks(again), blocks(again)]
    assert blocks(other) != epochs[0]


def test_an_epoch_of_many_rows_is_planned_as_few_tasks(joined, monkeypatch):
    monkeypatch.setattr(read, "MOST_TASKS", 3)
    table = pa.table({schema.URI: [str(i) for i in range(500)]})
    tasks = read.Shuffled(table, 0).get_read_tasks(1)
    assert [task.metadata.num_rows for task in tasks] == [176, 176, 148]
    seen = [name for task in tasks for block in task() for name in block[schema.URI].to_pylist()]
    assert sorted(seen) == sorted(table[schema.URI].to_pylist())
    assert seen != table[schema.URI].to_pylist()


def test_an_image_that_breaks_after_the_run_began_stops_it():
    names, fine = np.array(["a", "b"]), np.array(["", ""])
    read.require_whole(fine, names)
    with pytest.raises(BcdError, match="b became unusable after the run began: truncated"):
        read.require_whole(np.array(["", "truncated"]), names)
    with pytest.raises(StorageError, match=r"did not give b .*run the same command again"):
        read.require_whole(np.array(["", "unavailable"]), names)


def test_two_workers_share_every_epoch_evenly_and_see_no_held_out_image(joined, tree):
    """Done when 5: class counts equal per epoch to within one row per class and what an equal split drops."""
    config = small(tree)
    table, _ = prepare.prepare(config)
    streams, n_train = train.streams_of(config, table)
    expected = Counter(
        balance.upsample(prepare.part_of(table, read.TRAIN), "tumor_class", 0)[schema.TUMOR_CLASS].to_pylist()
    )
    assert len(set(expected.values())) == 1
    held_out = set(table[schema.IMAGE_ID].to_pylist()) - set(
        prepare.part_of(table, "train")[schema.IMAGE_ID].to_pylist()
    )
    shards = read.SplitData().configure(streams, 2, None, None)
    iterators = [shard[read.TRAIN] for shard in shards]
    for _ in range(2):
        seen = _both(iterators)
        assert abs(len(seen[0]) - len(seen[1])) == 0
        counts = Counter(target for rows in seen for _, target in rows)
        assert abs(counts[0] - counts[1]) <= 1 + n_train % 2
        assert sum(counts.values()) == n_train - n_train % 2
        assert not {name for rows in seen for name, _ in rows} & held_out


def test_validation_loses_no_row_to_an_equal_split(joined, tree):
    config = small(tree, magnifications=(40,))
    table, _ = prepare.prepare(config)
    streams, _ = train.streams_of(config, table)
    rows = prepare.part_of(table, "validation")
    shards = read.SplitData().configure(streams, 2, None, None)
    seen = _both([shard[read.VALIDATION] for shard in shards])
    assert sorted(name for rows in seen for name, _ in rows) == rows[schema.IMAGE_ID].to_pylist()


def _both(iterators):
    """Read two shards at the same time, as two workers do: [[(image id, target), ...], [...]]."""
    from concurrent.futures import ThreadPoolExecutor

    def consume(iterator):
        batches = iterator.iter_batches(batch_size=16, batch_format="numpy")
        return [pair for b in batches for pair in zip(b[schema.IMAGE_ID], b[schema.TARGET], strict=True)]

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(consume, iterators))


@pytest.mark.real
def test_one_damaged_tile_is_one_error(tmp_path, real_data):
    """After an error OpenSlide's handle is dead: the tiles beside the damaged one are read all the same."""
    content = bytearray((real_data / "slides/CMU-1-Small-Region.svs").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3_000] = bytes(3_000)
    (tmp_path / "damaged.svs").write_bytes(content)
    rows = [
        {
            schema.IMAGE_ID: f"{x},{y}",
            schema.URI: str(tmp_path / "damaged.svs"),
            schema.X_LEVEL0_PX: x,
            schema.Y_LEVEL0_PX: y,
            schema.MPP: 0.499,
            schema.WIDTH_PX: 240,
            schema.HEIGHT_PX: 240,
        }
        for y in range(0, 2_967, 240)
        for x in range(0, 2_220, 240)
    ]
    table = schema.fill(pa.Table.from_pylist(rows), schema.READING)
    for threads in (1, 2):
        found = read.pixels(table, 64, 64, [schema.IMAGE_ID], threads)
        codes = found[schema.ERROR].tolist()
        assert 1 <= codes.count("unreadable") <= 8
        assert codes.count("") == len(rows) - codes.count("unreadable")
