import json

import pytest

from bcd.config.checks import AuditConfig
from bcd.config.evaluation import EvaluateConfig
from bcd.config.options import changed_flags
from bcd.config.scoring import PoolConfig, ScoreConfig
from bcd.config.training import CrossvalConfig, DemoConfig, TrainConfig


def test_a_config_survives_json_and_is_frozen():
    config = TrainConfig(data="x", magnifications=(40,), fold=1, folds="f", protocol="official")
    assert TrainConfig(**json.loads(config.model_dump_json())) == config
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_differences_name_what_decides_the_result_and_nothing_else():
    old = TrainConfig(data="x").model_dump(mode="json")
    new = TrainConfig(data="x", seed=1, num_workers="2", max_failures=0, output="o", name="n", device="cpu")
    assert changed_flags(old, new.model_dump(mode="json")) == ["--seed 0 -> 1"]


def test_a_flag_that_is_off_is_as_one_that_an_older_version_did_not_have():
    now = ScoreConfig(model="m", input="i", output="o").model_dump(mode="json")
    old = {name: value for name, value in now.items() if name != "embeddings"}
    assert changed_flags(old, now) == []
    assert changed_flags(old, now | {"embeddings": True}) == ["--embeddings None -> True"]
    assert changed_flags(now | {"embeddings": True}, now) == ["--embeddings True -> False"]


@pytest.mark.parametrize(
    "config_type",
    [TrainConfig, AuditConfig, CrossvalConfig, EvaluateConfig, ScoreConfig, PoolConfig, DemoConfig],
)
def test_every_setting_has_a_help_text(config_type):
    for name, setting in config_type.model_fields.items():
        assert setting.description, f"{config_type.__name__}.{name} has no docstring"
