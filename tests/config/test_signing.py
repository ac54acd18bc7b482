import pytest
import tyro

from bcd.config.evaluation import EvaluateConfig
from bcd.config.options import Role
from bcd.config.scoring import ScoreConfig
from bcd.config.serving import ServeConfig
from bcd.config.signing import PushConfig, SignConfig, VerifyConfig
from bcd.errors import ConfigError


@pytest.mark.parametrize("config_type", [SignConfig, VerifyConfig])
def test_the_bundle_is_named_without_a_flag(config_type):
    config = tyro.cli(config_type, args=["s3://bucket/model", "--key", "signing.pem"])
    assert (config.bundle, config.key) == ("s3://bucket/model", "signing.pem")


def test_the_help_teaches_how_to_sign(capsys):
    with pytest.raises(SystemExit, match="0"):
        tyro.cli(SignConfig, args=["--help"], console_outputs=True)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in (
        "openssl ecparam -name prime256v1",
        "pip install model-signing pyopenssl",
        "model.sig",
        "Sign last",
    ):
        assert words in text


@pytest.mark.parametrize("config_type", [ScoreConfig, EvaluateConfig, ServeConfig])
def test_a_required_signature_changes_no_result(config_type):
    places = {"model": "m", "input": "i", "output": "o", "data": "d"}
    settings = {name: uri for name, uri in places.items() if name in config_type.model_fields}
    assert config_type(**settings).require_signature is None
    assert config_type(**settings, require_signature="signing.pub").require_signature == "signing.pub"
    assert "require_signature" not in config_type.names(Role.OPERATIONAL)


def test_a_push_names_bundle_and_target_without_flags():
    config = tyro.cli(PushConfig, args=["runs/model", "hf://owner/name", "--license", "cc-by-4.0"])
    assert (config.bundle, config.target, config.license) == ("runs/model", "hf://owner/name", "cc-by-4.0")
    assert not config.public
    with pytest.raises(ConfigError, match="--license"):
        PushConfig(bundle="b", target="hf://owner/name", license="my own\n# b")
