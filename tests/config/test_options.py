import json

import pytest

from bcd.config.checks import AuditConfig
from bcd.config.evaluation import EvaluateConfig
from bcd.config.options import Role, differences
from bcd.config.scoring import PoolConfig, ScoreConfig
from bcd.config.training import CrossvalConfig, DemoConfig, TrainConfig


def test_a_config_survives_json_and_is_frozen():
    config = TrainConfig(data="x", magnifications=(40,), fold=1, folds="f", protocol="official")
    assert TrainConfig(**json.loads(config.model_dump_json())) == config
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_differences_name_what_decides_the_result_and_nothing_else():
    old = TrainConfig(data="x").deciding()
    new = TrainConfig(data="x", seed=1, num_workers="2", max_failures=0, output="o", name="n", device="cpu")
    assert differences(old, new.deciding()) == {"seed": "--seed 0 -> 1"}


def test_names_leave_out_what_has_a_role():
    assert ScoreConfig.names() == ScoreConfig.model_fields.keys()
    left_out = ScoreConfig.names() - ScoreConfig.names(Role.OPERATIONAL)
    places = {"output", "max_workers", "require_signature"}
    assert left_out == places | {"config", "log_format", "wait", "dry_run"}
    searched = TrainConfig.names(*Role)
    assert {"learning_rate", "optimizer", "dropout"} <= searched
    assert not {"seed", "data", "architecture", "device"} & searched


def test_required_settings_come_first_then_own_ones_then_shared_ones():
    names = list(ScoreConfig.model_fields)
    assert names[:4] == ["model", "input", "output", "pseudonymise"]
    assert set(names[-5:]) == {"require_signature", "dry_run", "wait", "config", "log_format"}
    assert list(CrossvalConfig.model_fields)[:3] == ["data", "name", "protocol"]


def test_a_flag_that_is_off_is_as_one_that_an_older_version_did_not_have():
    now = ScoreConfig(model="m", input="i", output="o").deciding()
    old = {name: value for name, value in now.items() if name != "embeddings"}
    with_them = now | {"embeddings": True}
    assert differences(old, now) == {}
    assert differences(old, with_them) == {"embeddings": "--embeddings None -> True"}
    assert differences(with_them, now) == {"embeddings": "--embeddings True -> False"}


@pytest.mark.parametrize(
    "config_type",
    [TrainConfig, AuditConfig, CrossvalConfig, EvaluateConfig, ScoreConfig, PoolConfig, DemoConfig],
)
def test_every_setting_has_a_help_text(config_type):
    for name, setting in config_type.model_fields.items():
        assert setting.description, f"{config_type.__name__}.{name} has no docstring"
