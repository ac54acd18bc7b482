import numpy as np
import pyarrow as pa

from bcd import schema
from bcd.imaging.prepared import Store
from bcd.preflight.dry_run import page
from bcd.preflight.dry_run.measure import Read


def test_rows_are_described_by_class_and_patient():
    rows = [
        {schema.IMAGE_ID: "a", schema.TUMOR_CLASS: "benign", schema.PATIENT: "p", schema.SIZE_BYTES: 2**20},
        {schema.IMAGE_ID: "b", schema.TUMOR_CLASS: "malignant", schema.PATIENT: "q"},
        {schema.IMAGE_ID: "c", schema.TUMOR_CLASS: "malignant", schema.PATIENT: None},
    ]
    described = page.described_rows(pa.Table.from_pylist(rows, schema=schema.INDEX))
    assert described == "3 images, 1 MiB; benign 1 of 1 patient, malignant 2 of unknown patients"


def test_free_space_is_that_of_the_nearest_folder(tmp_path):
    assert page.free_space(str(tmp_path / "not/there")).endswith("iB")
    assert page.free_space("s3://bucket/x") == "free space for s3://bucket/x: that of its store"


def test_prepared_images_that_do_not_fit_are_said(tmp_path, monkeypatch):
    store = Store(str(tmp_path), 100, 100)
    assert (
        page.prepared_images(store, 3)
        == f"prepared images: 0 images in {store.folder}, 0.1 MiB more to write"
    )
    monkeypatch.setattr(Store, "has_room", lambda store, n: False)
    assert page.prepared_images(store, 3).endswith("so that none would be prepared")
    assert page.prepared_images(None, 3).startswith("prepared images: none")


def test_a_sample_names_its_errors():
    images = np.zeros((2, 1, 1, 3), np.uint8)
    assert page.of_sample(Read(images, [], 0.1)) == "from 2 images"
    assert page.of_sample(Read(images, ["truncated"], 0.1)) == "from 2 images (1 broken one: truncated)"
