import pyarrow as pa
import pytest

from bcd import schema
from bcd.config import CrossvalConfig, TrainConfig
from bcd.errors import BcdError, ConfigError
from bcd.pipelines import rundir
from tests.cluster import read_json


def test_a_run_is_begun_claimed_and_finished(tmp_path):
    config, uri = TrainConfig(data="d"), f"{tmp_path}/run"
    assert rundir.begin(config, uri) is False
    rundir.claim(config, uri)
    assert rundir.begin(config, uri) is False
    assert read_json(f"{uri}/run.json")["status"] == "started"
    rundir.finish(config, uri, {"train_s": 1.5})
    assert rundir.begin(config, uri) is True
    run = read_json(f"{uri}/run.json")
    assert (run["timings"], run["seed"]) == ({"train_s": 1.5}, 0)
    assert read_json(f"{uri}/config.json") == config.model_dump(mode="json")


def test_other_settings_are_named_and_refused(tmp_path):
    rundir.claim(CrossvalConfig(data="d"), str(tmp_path))
    with pytest.raises(ConfigError, match=r"--k 5 -> 3; --protocol case -> case,image"):
        rundir.begin(CrossvalConfig(data="d", k=3, protocol="case,image"), str(tmp_path))


def test_the_split_comes_back_as_it_was(tmp_path):
    rows = [{schema.IMAGE_ID: "a", schema.URI: "u", schema.MAGNIFICATION: 40, schema.PART: "test"}]
    table = schema.fill(pa.Table.from_pylist(rows), schema.SPLIT)
    assert rundir.read_split(str(tmp_path)) is None
    rundir.write_split(str(tmp_path), table)
    assert rundir.read_split(str(tmp_path)) == table


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(BcdError, match=r"run.json is damaged: .*delete the run directory"):
        rundir.read_json(str(tmp_path), rundir.RUN)
