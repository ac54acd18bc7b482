import re

import pyarrow as pa
import pytest

from bcd import schema
from bcd.config.training import CrossvalConfig, TrainConfig
from bcd.errors import BcdError, ConfigError, DataError
from bcd.runtime import run_directory
from tests.cluster import read_json


def test_a_run_is_begun_claimed_and_finished(tmp_path):
    config, uri = TrainConfig(data="d"), f"{tmp_path}/run"
    assert run_directory.begin_run(config, uri) is False
    run_directory.claim_run(config, uri)
    assert run_directory.begin_run(config, uri) is False
    assert read_json(f"{uri}/run.json")["status"] == "started"
    run_directory.finish_run(config, uri, {"train_s": 1.5})
    assert run_directory.begin_run(config, uri) is True
    run = read_json(f"{uri}/run.json")
    assert (run["timings"], run["seed"]) == ({"train_s": 1.5}, 0)
    assert read_json(f"{uri}/config.json") == config.model_dump(mode="json")


def test_other_settings_are_named_and_refused(tmp_path):
    run_directory.claim_run(CrossvalConfig(data="d"), str(tmp_path))
    with pytest.raises(ConfigError, match=r"--k 5 -> 3; --protocol case -> case,image"):
        run_directory.begin_run(CrossvalConfig(data="d", k=3, protocol="case,image"), str(tmp_path))


def test_the_split_comes_back_as_it_was(tmp_path):
    rows = [{schema.IMAGE_ID: "a", schema.URI: "u", schema.MAGNIFICATION: 40, schema.PART: "test"}]
    table = schema.fill(pa.Table.from_pylist(rows), schema.SPLIT)
    assert run_directory.read_split(str(tmp_path)) is None
    run_directory.write_split(str(tmp_path), table)
    assert run_directory.read_split(str(tmp_path)) == table


def split_of(uri, **changed):
    """A run of two training images of p and one test image of q, begun in the folder."""
    rows = [
        {schema.IMAGE_ID: name, schema.URI: name, schema.PATIENT: patient, schema.PART: part}
        | {schema.TUMOR_CLASS: "benign", schema.SIZE_BYTES: 9, schema.SHA256: name, schema.PHASH: None}
        for name, patient, part in (("a", "p", "train"), ("b", "p", "validation"), ("c", "q", "test"))
    ]
    run_directory.write_split(uri, table := schema.fill(pa.Table.from_pylist(rows), schema.SPLIT))
    return schema.fill(table, schema.INDEX)


def with_column(table, name, *values):
    place = table.schema.get_field_index(name)
    return table.set_column(place, table.schema.field(name), pa.array(values, table.schema.field(name).type))


def test_a_run_resumes_with_the_same_data_at_another_place(tmp_path):
    assert run_directory.resume(TrainConfig(data="d"), f"{tmp_path}/none", None) is None
    now = split_of(str(tmp_path))
    moved = with_column(now, schema.URI, "s3://b/a", "s3://b/b", "s3://b/c")
    moved = with_column(moved, schema.PHASH, "0", "1", "2")  # a run of an older version has none
    assert run_directory.resume(TrainConfig(data="d"), str(tmp_path), moved).num_rows == 3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda now: now.slice(0, 2), "1 image gone (c), and with them patient q"),
        (lambda now: now.slice(1), "1 image gone (a)"),
        (lambda now: with_column(now, schema.IMAGE_ID, "a", "b", "d"), "gone (c); 1 image new (d)"),
        (
            lambda now: with_column(now, schema.TUMOR_CLASS, "benign", "malignant", "malignant"),
            "another tumor_class of 2 images (b: benign -> malignant)",
        ),
        (
            lambda now: with_column(now, schema.PATIENT, "p", "r", "q"),
            "another patient of 1 image (b: p -> r)",
        ),
        (lambda now: with_column(now, schema.SIZE_BYTES, 9, 9, 8), "other content in 1 image (c)"),
        (lambda now: with_column(now, schema.SHA256, "a", "x", "y"), "other content in 2 images (b, c)"),
        (
            lambda now: with_column(now, schema.CASE, None, "k", None),
            "another case of 1 image (b: None -> k)",
        ),
    ],
)
def test_a_run_does_not_resume_with_other_data(tmp_path, change, told):
    now = split_of(str(tmp_path))
    with pytest.raises(DataError, match=rf"^d has changed since .* was split: .*{re.escape(told)}"):
        run_directory.resume(TrainConfig(data="d"), str(tmp_path), change(now))


def test_a_given_part_that_changed_stops_a_run(tmp_path):
    """Where none came as validation, that part is of the training part; a fold uses none of them."""
    now = split_of(str(tmp_path))
    given = [
        now.append_column(schema.PART, pa.array(parts))
        for parts in (["train", "train", "test"], ["test"] * 3)
    ]
    assert run_directory.resume(TrainConfig(data="d"), str(tmp_path), given[0]).num_rows == 3
    with pytest.raises(DataError, match=r"another part of 2 images \(a: train -> test\)"):
        run_directory.resume(TrainConfig(data="d"), str(tmp_path), given[1])
    folds = TrainConfig(data="d", cross_folds=5, fold=1)
    assert run_directory.resume(folds, str(tmp_path), given[1]).num_rows == 3


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(BcdError, match=r"run.json is damaged: .*delete the run directory"):
        run_directory.read_json(str(tmp_path), run_directory.RUN)
