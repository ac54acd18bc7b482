import json
import sys

import pytest

from bcd import provenance
from bcd.config.checks import EnvConfig
from bcd.preflight import environment


@pytest.fixture
def found(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_HOME", "/home/somebody/cuda")
    monkeypatch.setenv("PYTORCH_API_KEY", "abc")
    return environment.environment_facts()


def test_it_states_versions_hardware_and_extras(found):
    assert found["bcd"]["version"] == provenance.own_version()
    assert found["packages"]["ray"] == provenance.versions()["ray"]
    assert {"system", "python", "cpu", "cores", "memory"} <= found["machine"].keys()
    assert {"built for CUDA", "cuDNN", "GPUs", "threads"} == found["torch"].keys()
    assert {"aws", "hub", "mlflow", "sign", "timm"} <= found["extras"].keys()
    assert "dev" not in found["extras"]


def test_values_of_variables_are_shown_only_where_they_are_harmless(found):
    variables = found["variables"]
    assert variables["OMP_NUM_THREADS"] == "3"
    masked = ("AWS_SECRET_ACCESS_KEY", "AWS_REGION", "RAY_AUTH_TOKEN", "CUDA_HOME", "PYTORCH_API_KEY")
    assert {variables[name] for name in masked} == {environment.MASK}
    assert environment.shown_variables({"HOME": "/home/somebody", "SHELL": "/bin/sh"}) == {}
    assert environment.shown_variables({"https_proxy": "http://u:p@proxy"}) == {
        "https_proxy": environment.MASK
    }


def test_the_page_and_the_object_have_no_secret_and_start_no_ray(found, monkeypatch, capsys):
    monkeypatch.setattr(environment, "environment_facts", lambda: found)
    environment.run(EnvConfig())
    page = capsys.readouterr().out
    environment.run(EnvConfig(as_json=True))
    text = capsys.readouterr().out
    assert json.loads(text) == json.loads(json.dumps(found))
    for secret in ("wJalrXUtnFEMI", "0123456789abcdef", "/home/somebody", "eu-central-1"):
        assert secret not in page + text
    for section, facts in found.items():
        assert f"\n{section}\n" in f"\n{page}"
        assert all(str(value) in page for value in facts.values())


def test_a_torch_that_cannot_be_imported_is_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert environment._torch()["import"].startswith("ModuleNotFoundError: ")


def test_extras_are_found_without_a_checkout(monkeypatch, tmp_path):
    lines = ['timm<2,>=1.0.22; extra == "timm"', 'pytest>=8; extra == "dev"', "numpy>=2.0"]
    monkeypatch.setattr(environment, "requires", lambda name: lines)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "bcd/provenance.py"))
    assert environment._packages_of_extras() == {"timm": ["timm"]}
    assert environment._installed("no-such-package") == environment.NOT_THERE
