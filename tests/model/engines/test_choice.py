import sys

import pytest

from bcd.errors import ConfigError
from bcd.model import predictor
from bcd.model.engines import choice
from bcd.model.engines.choice import choose_engine
from tests.model.test_bundle import card, untrained


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(choice, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("architecture", "method", "has_gpus", "expected"),
    [
        ("resnet18", "evidence", False, "openvino"),
        ("resnet18", "evidence", True, "torch"),
        ("resnet18", "gradcam", False, "torch"),
        ("timm:test_resnet", "evidence", False, "torch"),
    ],
)
def test_auto_is_openvino_where_it_can_be(installed, monkeypatch, architecture, method, has_gpus, expected):
    given = architecture, method, has_gpus
    assert choose_engine("auto", *given) == expected
    assert choose_engine("torch", *given) == "torch"
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    assert choose_engine("auto", *given) == "torch"


def test_openvino_is_what_was_asked_for_or_an_error(installed):
    assert choose_engine("openvino", "resnet50", "evidence", has_gpus=True) == "openvino"
    with pytest.raises(
        ConfigError, match="maps in closed form only, and --cam is layercam: use --engine torch"
    ):
        choose_engine("openvino", "resnet50", "layercam", has_gpus=False)
    with pytest.raises(ConfigError, match="and the model is timm:vit_small: use --engine torch"):
        choose_engine("openvino", "timm:vit_small", "gradcam", has_gpus=False)


def test_a_missing_package_is_one_sentence(tmp_path, monkeypatch):
    predictor.save(untrained(), card(), str(tmp_path))
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert predictor.load(str(tmp_path), "cpu", engine="auto").engine == "torch"
    with pytest.raises(ConfigError) as raised:
        predictor.load(str(tmp_path), "cpu", engine="openvino")
    assert str(raised.value) == (
        "--engine openvino requires a package that is not installed (openvino is missing); run: "
        "pip install 'openvino>=2026.4,<2027'"
    )
