import json
import sys
from datetime import UTC, datetime, timedelta, timezone
from importlib.metadata import version

import pytest

from bcd import provenance


def test_versions_are_those_installed():
    versions = provenance.versions()
    assert versions["ray"] == version("ray")
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))


def test_own_version_is_that_of_this_code_even_where_it_is_not_installed(tmp_path, monkeypatch):
    assert provenance.own_version() == version("bcd")
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "9.8.7"\n')
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "bcd/provenance.py"))
    assert provenance.own_version() == "9.8.7"


def test_commit_is_named_in_a_checkout_and_absent_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.git_commit() is None
    run = lambda *a: provenance._git(tmp_path, "-c", "user.name=n", "-c", "user.email=e", *a)  # noqa: E731
    run("init", "-q")
    (tmp_path / "f").write_text("1")
    run("add", "f")
    run("commit", "-qm", "m")
    commit = provenance.git_commit()
    assert len(commit) == 12
    (tmp_path / "f").write_text("2")
    assert provenance.git_commit() == commit + "+"


def test_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jobs/train.py", "--data", "x"])
    assert provenance.command() == "python jobs/train.py --data x"


def test_the_command_can_be_given_to_a_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bcd train", "--data", "my data", "--classes", "benign=0"])
    assert provenance.command() == "bcd train --data 'my data' --classes benign=0"
    with provenance.stating("bcd score --input 'a b'"):
        assert provenance.command() == "bcd score --input 'a b'"
    assert provenance.command().startswith("bcd train ")


FILE = ("model.safetensors", "a" * 64)
NOON = datetime(2026, 11, 29, 12, tzinfo=UTC)


def test_the_bill_of_materials_is_valid_cyclonedx():
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    content = provenance.bill_of_materials(*FILE, NOON)
    assert validator.validate_str(json.dumps(content)) is None
    assert validator.validate_str(json.dumps(content | {"specversion": "1.6"})) is not None


def test_the_bill_of_materials_names_what_is_installed():
    content = provenance.bill_of_materials(*FILE, NOON)
    packages = {each["name"]: each["version"] for each in content["components"]}
    assert packages["torch"] == version("torch")
    assert list(packages) == sorted(packages)
    references = [each["bom-ref"] for each in content["components"]]
    assert len(set(references)) == len(references)
    assert content["dependencies"][0] == {"ref": FILE[0], "dependsOn": references}


def test_an_import_is_not_stated_as_a_training():
    made = provenance.statement(*FILE, {"data": "PCam"}, {"published_sha256": "f"}, None, NOON, "import")
    predicate = made["predicate"]
    assert predicate["buildDefinition"]["buildType"] == "urn:bcd:import:1"
    assert predicate["runDetails"]["builder"]["id"] == "urn:bcd:import"


def test_documents_of_origin_differ_in_their_times_only():
    later = datetime(2026, 11, 29, 14, tzinfo=timezone(timedelta(hours=1)))
    facts = ({"data": "d", "seed": 0}, {"data_fingerprint": "f" * 64}, "0123456789ab")
    for make in (
        lambda when: provenance.bill_of_materials(*FILE, when),
        lambda when: provenance.statement(*FILE, *facts, when),
    ):
        early, late = (json.dumps(make(when)) for when in (NOON, later))
        assert early.replace("T12:00:00Z", "T13:00:00Z") == late
