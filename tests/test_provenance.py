import sys
from importlib.metadata import version

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
