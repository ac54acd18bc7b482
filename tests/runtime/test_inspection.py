import hashlib

import numpy as np
import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.data import index
from bcd.errors import BcdError, DataError, StorageError
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
    with pytest.raises(StorageError, match=r"storage failed to deliver lost .* run the same command again"):
        inspection.inspect_images(table)


def test_an_image_that_breaks_after_the_run_began_stops_it():
    names, fine = np.array(["a", "b"]), np.array(["", ""])
    inspection.require_whole(fine, names)
    with pytest.raises(BcdError, match="b became unusable after the run began: truncated"):
        inspection.require_whole(np.array(["", "truncated"]), names)
    with pytest.raises(StorageError, match=r"failed to deliver b .*run the same command again"):
        inspection.require_whole(np.array(["", "unavailable"]), names)
