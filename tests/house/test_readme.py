"""The README is run, not trusted: its commands, its flags, its files, its code."""

import re
from pathlib import Path

import pytest

from bcd import provenance
from bcd.model import bundle, resnet
from tests import commands, pictures
from tests.model.test_bundle import card

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "README.md").read_text()
COMMANDS = commands.in_markdown(TEXT)
JOBS = list(filter(None, map(commands.job, COMMANDS)))
INLINE = re.findall(r"`((?:ray (?:up|down|start)|serve (?:deploy|run)) [^`]+)`", TEXT)


def test_there_are_commands_to_check():
    assert len(JOBS) >= 4
    assert INLINE


@pytest.mark.parametrize(("config_type", "arguments"), JOBS)
def test_every_job_command_is_valid(config_type, arguments):
    commands.check_job(config_type, arguments)


@pytest.mark.parametrize("line", [*filter(commands.is_rays, COMMANDS), *INLINE])
def test_every_command_of_ray_is_valid(line):
    commands.check_rays(line)


def test_every_make_target_exists():
    targets = {match[1] for line in COMMANDS if (match := re.match(r"make (\w+)", line))}
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_every_file_that_is_named_exists():
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    for name in ("cluster.yaml", "LICENSE", "constraints.txt"):
        assert (ROOT / name).exists()


def test_the_picture_of_the_house_is_the_house():
    house = TEXT.split("bcd/\n", 1)[1].split("benchmarks/", 1)[0]
    drawn = {word for line in house.splitlines() for word in re.split(r" {2,}", line[2:])[0].split(", ")}
    there = {path.stem for path in (ROOT / "bcd").glob("*.py")} - {"__init__"}
    assert drawn - {"pipelines/", ""} == there
    upstairs = re.search(r"all that imports Ray: (.*)", house)[1].split()
    assert set(upstairs) == {path.stem for path in (ROOT / "bcd/pipelines").glob("*.py")} - {"__init__"}


def test_the_code_of_the_bundle_section_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
    bundle.save(resnet.build(2, architecture="resnet18"), card(), str(tmp_path / "model"))
    (tmp_path / "field.png").write_bytes(pictures.encode(pictures.gradient()))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code.replace("s3://bucket/runs/first/model", "model"), names)
    assert 0 <= names["prediction"].probability_malignant[0] <= 1
    assert provenance.versions()["bcd"]


def test_the_status_table_says_what_was_not_tested():
    status = TEXT.split("## Status", 1)[1]
    for words in ("GPUs", "never started", "not tested"):
        assert words in status
    assert "MEASURED" not in TEXT
