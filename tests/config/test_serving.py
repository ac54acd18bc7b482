import pytest

from bcd.config.serving import ServeConfig, ServiceConfig
from bcd.errors import ConfigError


def test_a_service_has_its_bounds_in_order():
    with pytest.raises(ConfigError, match=r"--max-replicas 2 is less than --min-replicas 3"):
        ServeConfig(model="m", min_replicas=3, max_replicas=2)
    with pytest.raises(ConfigError, match="--engine openvino computes on CPUs: leave out --num-gpus"):
        ServeConfig(model="m", engine="openvino", num_gpus=0.5)
    assert ServiceConfig(model="m", num_gpus="0.25", max_replicas="4").num_gpus == 0.25


def test_every_setting_has_a_help_text():
    for name, setting in ServeConfig.model_fields.items():
        assert setting.description, f"{name} has no docstring"


def test_origins_are_named():
    origins = ("https://viewer.example", "http://localhost:3000", "http://[::1]:3000")
    assert ServiceConfig(model="m", cors_origins=origins).cors_origins == origins
    for origin in ("*", "viewer.example", "https://a/b", "https://*.example", "file:///", "null"):
        with pytest.raises(ConfigError, match="expected a scheme and a host, as https://HOST:PORT"):
            ServiceConfig(model="m", cors_origins=(origin,))
