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


def test_models_have_names():
    config = ServiceConfig(model="m", models=("b=s3://bucket/b", "c_2=runs/x=1/model"))
    assert config.named_models == {"b": "s3://bucket/b", "c_2": "runs/x=1/model"}
    assert (config.name, ServiceConfig(model="m").named_models) == ("default", {})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"models": ("b",)}, "expected NAME=URI"),
        ({"models": ("b=",)}, "expected NAME=URI"),
        ({"models": ("=uri",)}, "expected NAME=URI"),
        ({"models": ("B/..=uri",)}, "expected NAME=URI"),
        ({"models": ("b=1", "b=2")}, "two models have the name b"),
        ({"models": ("default=1",)}, "two models have the name default"),
        ({"name": "b", "models": ("b=1",)}, "two models have the name b"),
        ({"name": "a/b"}, "name"),
    ],
)
def test_names_of_models_are_addresses_and_differ(settings, said):
    with pytest.raises(ConfigError, match=said):
        ServiceConfig(model="m", **settings)
