import hashlib

import numpy as np
import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.data import index
from bcd.errors import BcdError, DataError, StorageError
from bcd.imaging import image, prepared
from bcd.runtime import inspection
from tests import pictures
from tests.test_storage import DAMAGED

pytestmark = pytest.mark.ray


@pytest.fixture
def mixed(tmp_path):
    """Twelve good images and one of each fault, as an index."""
    contents = {f"benign/p/good-{i}.png": pictures.encode(pictures.gradient(46 + i, 70)) for i in range(12)}
    contents |= {f"malignant/p/{name}.png": content for name, (content, _) in pictures.broken().items()}
    for name, content in contents.items():
        storage.write_bytes(storage.join(str(tmp_path), name), content)
    return index.read_index(str(tmp_path))[0]


def test_inspect_hashes_the_good_and_names_the_broken(joined, mixed):
    good, broken, size = inspection.inspect_images(mixed)
    codes = {name: code for name, (_, code) in pictures.broken().items()}
    assert {name.split("/")[-1][:-4]: fault.split(":")[0] for name, fault in broken.items()} == codes
    assert good[schema.IMAGE_ID].to_pylist() == sorted(f"benign/p/good-{i}.png" for i in range(12))
    for row in good.to_pylist():
        assert row[schema.SHA256] == hashlib.sha256(storage.read_bytes(row[schema.URI])).hexdigest()
    assert good.schema == schema.INDEX
    assert size == (57, 70)  # all heights are equally common: the largest


def test_a_missing_file_is_one_broken_image(joined, mixed, tmp_path):
    (tmp_path / "benign/p/good-3.png").unlink()
    _, broken, _ = inspection.inspect_images(mixed)
    assert broken["benign/p/good-3.png"].startswith("unreadable")


@pytest.fixture
def store(tmp_path):
    return prepared.Store(str(tmp_path / "prepared"), 32, 48)


def inspect(table, store):
    return inspection.inspect_images(table, store, prepared.list_images(store)[0])


def kept(store):
    """Facts of every prepared image by content."""
    return {row[schema.SHA256]: row for row in prepared.list_images(store)[0].to_pylist()}


def test_images_are_prepared_in_the_same_pass(joined, mixed, store):
    assert inspect(mixed, store)[0].equals(inspection.inspect_images(mixed)[0])
    known = kept(store)
    for row in inspect(mixed, store)[0].to_pylist():
        found = prepared.read(known.pop(row[schema.SHA256]), 32, 48)
        np.testing.assert_array_equal(
            found, image.fit(image.decode(storage.read_bytes(row[schema.URI])), 32, 48)
        )
    assert not known


def test_only_what_is_new_or_damaged_is_decoded_again(joined, mixed, store):
    """Facts that are changed in the index show up for images that were not decoded."""
    inspect(mixed, store)
    by_name = {row[schema.IMAGE_ID]: row for row in inspect(mixed, store)[0].to_pylist()}
    for file in storage.list_files(store.folder):
        if file.path.endswith(prepared.INDEX):
            table = storage.read_table(file.uri)
            marks = pa.array(["known"] * len(table))
            at = table.schema.names.index(schema.PHASH)
            storage.write_table(file.uri, table.set_column(at, table.schema.field(at), marks))
    damaged = kept(store)[by_name["benign/p/good-1.png"][schema.SHA256]]
    content = bytearray(storage.read_bytes(damaged[schema.SHARD]))
    content[damaged[schema.SHARD_ROW] * store.image_bytes] ^= 1
    storage.write_bytes(damaged[schema.SHARD], bytes(content))
    storage.write_bytes(
        by_name["benign/p/good-2.png"][schema.URI], pictures.encode(pictures.gradient(40, 70))
    )
    storage.delete_file(by_name["benign/p/good-3.png"][schema.URI])
    new = {row[schema.IMAGE_ID]: row for row in inspect(mixed, store)[0].to_pylist()}
    decoded = {name for name, row in new.items() if row[schema.PHASH] != "known"}
    assert decoded == {"benign/p/good-1.png", "benign/p/good-2.png"}
    assert by_name.keys() - new.keys() == {"benign/p/good-3.png"}
    assert new["benign/p/good-1.png"] == by_name["benign/p/good-1.png"]
    assert prepared.read(kept(store)[damaged[schema.SHA256]], 32, 48) is not None  # written again


def test_a_run_goes_on_where_nothing_can_be_prepared(joined, mixed, store, capsys):
    """Such as on a full disk; here a file is where the folder should be."""
    storage.write_bytes(store.uri, b"")
    assert inspection.inspect_images(mixed, store, prepared.list_images(store)[0])[0].equals(
        inspection.inspect_images(mixed)[0]
    )
    assert "warning: 12 prepared images could not be written" in capsys.readouterr().out


def test_too_many_broken_images_end_the_run_and_few_do_not():
    broken = {f"{i}.png": "truncated: x" for i in range(7)}
    with pytest.raises(
        DataError, match=r"7 of 100 images are broken, more than --max-bad-fraction 0.01.*and 2 more"
    ):
        inspection.check_bad_fraction(broken, 100, 0.01)
    assert inspection.check_bad_fraction({"a.png": "truncated: x"}, 100, 0.01) == ["a.png: truncated: x"]


def test_inspect_stops_where_storage_fails(joined, mixed):
    """Left out as broken, the image would change split and numbers without a word."""
    lost = mixed.slice(0, 1).to_pylist()[0] | {schema.IMAGE_ID: "lost", schema.URI: DAMAGED}
    table = pa.concat_tables([mixed, pa.Table.from_pylist([lost], schema=mixed.schema)])
    with pytest.raises(StorageError, match=r"storage failed to deliver lost .* itself is not at fault"):
        inspection.inspect_images(table)


def test_an_image_that_breaks_after_the_run_began_stops_it():
    names, fine = np.array(["a", "b"]), np.array(["", ""])
    inspection.require_whole(fine, names)
    with pytest.raises(BcdError, match="b became unusable after the run began: truncated"):
        inspection.require_whole(np.array(["", "truncated"]), names)
    with pytest.raises(StorageError, match=r"failed to deliver b .*itself is not at fault"):
        inspection.require_whole(np.array(["", "unavailable"]), names)
