import pytest

from bcd.config.serving import ServeConfig, ServiceConfig
from bcd.errors import ConfigError


def test_a_service_has_its_bounds_in_order():
    with pytest.raises(ConfigError, match=r"--max-replicas 2 is less than --min-replicas 3"):
        ServeConfig(model="m", min_replicas=3, max_replicas=2)
    assert ServiceConfig(model="m", num_gpus="0.25", max_replicas="4").num_gpus == 0.25


def test_every_setting_has_a_help_text():
    for name, setting in ServeConfig.model_fields.items():
        assert setting.description, f"{name} has no docstring"
