import subprocess
import sys
from types import SimpleNamespace

import pytest
from ray.exceptions import RayTaskError

from bcd import cli
from bcd.config.training import TrainConfig
from bcd.errors import ASK_AGAIN, DataError, IncompleteError, MissingError, StorageError


def run(monkeypatch, *arguments, pipeline=lambda config: None, job="train"):
    monkeypatch.setattr(sys, "argv", ["job.py", *arguments])
    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(run=pipeline))
    cli.main(job, "What the job does.\n\n    ray job submit ...")


def test_flags_become_a_config(monkeypatch):
    seen = []
    arguments = ["--data", "d", "--magnifications", "40", "100", "--no-augment", "--num-workers", "2-8"]
    run(monkeypatch, *arguments, pipeline=seen.append)
    assert seen == [TrainConfig(data="d", magnifications=(40, 100), augment=False, num_workers="2-8")]


def test_flags_have_priority_over_the_recipe(monkeypatch):
    seen = []
    arguments = ["--data", "d", "--recipe", "few", "--dropout", "0.0", "--no-freeze-batchnorm"]
    run(monkeypatch, *arguments, pipeline=seen.append)
    assert seen == [TrainConfig(data="d", recipe="few", dropout=0.0, freeze_batchnorm=False)]
    assert seen[0].layer_decay == 0.7


def test_help_shows_the_command_and_every_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, "--help")
    text = capsys.readouterr().out
    assert "ray job submit" in text
    for name in TrainConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "d", "--learning-rate", "-1"], "--learning-rate input should be greater than 0"),
        (["--data", "d", "--epoch", "3"], "--epochs"),
        ([], "--data"),
        (["--data", "d", "--protocol", "official"], "requires --folds"),
    ],
)
def test_bad_flags_exit_2_before_the_pipeline(monkeypatch, capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments, pipeline=lambda config: pytest.fail("the pipeline ran"))
    assert said in " ".join(capsys.readouterr().err.split())


def test_what_a_user_can_put_right_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def pipeline(config):
        raise DataError("x.csv: no column 'uri'")

    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, job="demo", pipeline=pipeline)
    assert capsys.readouterr().err == "error: x.csv: no column 'uri'\n"


def test_what_a_task_of_ray_raises_is_one_line_too(monkeypatch, capsys):
    """Ray's own error is of our class as well, and its text is a stack trace."""

    def pipeline(config):
        cause = StorageError("s3://bucket/a: cannot write it")
        raise RayTaskError("draw", "Traceback\n  File ...", cause).as_instanceof_cause()

    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, job="demo", pipeline=pipeline)
    assert capsys.readouterr().err == f"error: s3://bucket/a: cannot write it; {ASK_AGAIN}\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            StorageError("s3://b/a: cannot list it: timeout."),
            f"s3://b/a: cannot list it: timeout; {ASK_AGAIN}",
        ),
        (StorageError("a: cannot read it: denied", lasting=True), "a: cannot read it: denied"),
        (MissingError("a: no such file"), "a: no such file"),
        (StorageError("a: replaced; run the same command again"), "a: replaced; run the same command again"),
    ],
)
def test_another_attempt_is_advised_where_it_may_succeed(monkeypatch, capsys, error, said):
    def pipeline(config):
        raise error

    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, job="demo", pipeline=pipeline)
    assert capsys.readouterr().err == f"error: {said}\n"


def test_inputs_without_a_result_exit_1(monkeypatch, capsys):
    def pipeline(config):
        raise IncompleteError("3 of 9 inputs have neither a result nor an error")

    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, job="demo", pipeline=pipeline)
    assert capsys.readouterr().err == "error: 3 of 9 inputs have neither a result nor an error\n"


def test_our_own_faults_keep_their_trace(monkeypatch):
    def pipeline(config):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, job="demo", pipeline=pipeline)


def test_wrong_flags_and_help_cost_no_import_of_ray_or_torch():
    code = "import sys; from bcd import cli; assert not {'ray', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("job", cli.JOBS)
def test_the_command_runs_the_job_that_it_names(monkeypatch, job):
    """What it imports for that has a `run`."""
    seen = []
    monkeypatch.setattr(sys, "argv", ["bcd", job, "--help"])
    monkeypatch.setattr(cli, "main", lambda job: seen.append((job, sys.argv)))
    cli.console()
    assert seen == [(job, [f"bcd {job}", "--help"])]


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["-h"], 0), ([], 2), (["traim"], 2), (["train.py"], 2)]
)
def test_the_command_lists_the_jobs(monkeypatch, capsys, arguments, code):
    monkeypatch.setattr(sys, "argv", ["bcd", *arguments])
    with pytest.raises(SystemExit, match=str(code)):
        cli.console()
    said = capsys.readouterr()
    text = said.err if code else said.out
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  ")] == list(cli.JOBS)
