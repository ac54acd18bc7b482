import ast
import json
import runpy
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, GetTimeoutError, OutOfMemoryError, RayTaskError, WorkerCrashedError

import bcd
from bcd import cli, provenance
from bcd.config.evaluation import EvaluateConfig
from bcd.config.scoring import ScoreConfig
from bcd.config.training import TrainConfig
from bcd.errors import ASK_AGAIN, ConfigError, DataError, IncompleteError, MissingError, StorageError


def run(monkeypatch, *arguments, pipeline=lambda config: None, job="train"):
    monkeypatch.setattr(sys, "argv", ["job.py", *arguments])
    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(run=pipeline))
    cli.main(job, "What the job does.\n\n    ray job submit ...")


def raising(error):
    """A job that ends with an error."""

    def pipeline(config):
        raise error

    return pipeline


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


def test_a_file_is_put_in_its_place_so_that_the_command_is_whole(monkeypatch, tmp_path):
    (tmp_path / "run.yaml").write_text("data: my data\nepochs: 3\nrecipe: few\n")
    seen = []
    pipeline = lambda config: seen.append((config, provenance.command()))  # noqa: E731
    run(monkeypatch, "--config", str(tmp_path / "run.yaml"), "--dropout", "0.1", pipeline=pipeline)
    config, command = seen[0]
    assert config == TrainConfig(data="my data", epochs=3, recipe="few", dropout=0.1)
    assert command == "python job.py --data 'my data' --epochs 3 --recipe few --dropout 0.1"
    run(monkeypatch, *shlex.split(command)[2:], pipeline=pipeline)
    assert seen[1] == seen[0]


def test_a_fault_in_the_file_is_one_line_and_exit_code_2(monkeypatch, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("epocs: 3\n")
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "--config", str(tmp_path / "run.yaml"), pipeline=lambda config: pytest.fail("ran"))
    said = capsys.readouterr().err
    assert said == (
        f"error: {tmp_path / 'run.yaml'}: 'epocs' is no setting of bcd train; did you mean 'epochs'?\n"
    )


@pytest.mark.parametrize("job", ["train", "crossval", "ablate", "evaluate", "score"])
def test_a_dry_run_is_another_module(monkeypatch, job):
    flags = {"evaluate": "--model m --data d", "score": "--model m --input i --output o"}
    seen = []
    monkeypatch.setattr(sys, "argv", ["job.py", "--dry-run", *flags.get(job, "--data d").split()])
    pipeline = SimpleNamespace(run=seen.append)
    monkeypatch.setattr(cli, "import_module", lambda name: seen.append(name) or pipeline)
    cli.main(job)
    assert seen[0] == f"bcd.preflight.dry_run.{job}"
    assert seen[1].dry_run
    assert find_spec(seen[0])


def test_help_shows_the_command_and_every_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, "--help")
    text = capsys.readouterr().out
    assert "ray job submit" in text
    for name in TrainConfig.model_fields:
        assert f"--{name.replace('_', '-')}" in text


def test_help_has_the_lines_of_its_examples_and_a_paragraph_for_each_flag(monkeypatch, capsys):
    for path in sorted(Path("jobs").glob("*.py")):
        monkeypatch.setattr(sys, "argv", [str(path), "--help"])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(path), run_name="__main__")
        lines = capsys.readouterr().out.splitlines()
        doc = ast.get_docstring(ast.parse(path.read_text())).splitlines()
        examples = [line for line in doc if line.startswith(" ") or line.endswith(":")]
        assert [line for line in examples if line not in lines] == [], path
    fields = [field for config in cli.CONFIGS.values() for field in config.model_fields.values()]
    described = [field.description for field in fields]
    assert [text for text in described if not text or "\n" in text] == []


def test_help_that_nobody_reads_to_the_end_is_no_error():
    for job in ("train", "serve"):
        head = f"{sys.executable} jobs/{job}.py --help | head -1"
        shown = subprocess.run(head, shell=True, capture_output=True, text=True, check=True)
        assert (shown.stdout[:6], shown.stderr) == ("usage:", "")


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
    error = DataError("x.csv: no column 'uri'")
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, job="demo", pipeline=raising(error))
    assert capsys.readouterr().err == "error: x.csv: no column 'uri'\n"


def test_what_a_task_of_ray_raises_is_one_line_too(monkeypatch, capsys):
    """Ray's own error is of our class as well, and its text is a stack trace."""

    def pipeline(config):
        cause = StorageError("s3://bucket/a: cannot write it")
        raise RayTaskError("draw", "Traceback\n  File ...", cause).as_instanceof_cause()

    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, job="demo", pipeline=pipeline)
    assert capsys.readouterr().err == f"error: s3://bucket/a: cannot write it; {ASK_AGAIN}\n"


def died():
    """Of a process that was killed, as Ray 2.60 raises it."""
    about = ActorDiedErrorContext(error_message="killed", class_name="TrainController", actor_id=bytes(16))
    return ActorDiedError(about)


@pytest.mark.parametrize(
    ("error", "process"),
    [
        (died(), "TrainController, a process of this job, is gone (ActorDiedError)"),
        (RayTaskError("fold", "Trace", WorkerCrashedError()).as_instanceof_cause(), "a process of this job"),
        (WorkerCrashedError(), "a process of this job, is gone (WorkerCrashedError)"),
        (OutOfMemoryError("Task was killed"), "a process of this job, is gone (OutOfMemoryError)"),
    ],
)
def test_a_lost_process_is_one_line_that_says_how_to_resume(error, process, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, job="demo", pipeline=raising(error))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {process}")
    assert line.endswith("run the same command again to resume")


@pytest.mark.parametrize(
    "error",
    [
        ActorDiedError(RayTaskError("__init__", "Traceback ...", ValueError("ours"))),
        RayTaskError("fold", "Traceback ...", ValueError("ours")).as_instanceof_cause(),
        GetTimeoutError("in a wait of ours"),
    ],
)
def test_a_defect_in_a_process_of_ray_keeps_its_stack_trace(error, monkeypatch):
    with pytest.raises(type(error)):
        run(monkeypatch, job="demo", pipeline=raising(error))


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
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, job="demo", pipeline=raising(error))
    assert capsys.readouterr().err == f"error: {said}\n"


def test_inputs_without_a_result_exit_1(monkeypatch, capsys):
    error = IncompleteError("3 of 9 inputs have neither a result nor an error")
    with pytest.raises(SystemExit, match="1"):
        run(monkeypatch, job="demo", pipeline=raising(error))
    assert capsys.readouterr().err == "error: 3 of 9 inputs have neither a result nor an error\n"


def test_our_own_faults_keep_their_trace(monkeypatch):
    def pipeline(config):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(monkeypatch, job="demo", pipeline=pipeline)


def test_wrong_flags_and_help_cost_no_import_of_ray_or_torch():
    code = "import sys; from bcd import cli, train, score; assert not {'ray', 'torch'} & set(sys.modules)"
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


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_knows_jobs_flags_and_values(monkeypatch, capsys, shell):
    monkeypatch.setattr(sys, "argv", ["bcd", "--print-completion", shell])
    cli.console()
    script = capsys.readouterr().out
    for word in ("crossval", "--dry-run", "--stain-normalisation", "macenko"):
        assert word in script
    (known,) = [line for line in script.splitlines() if line.startswith("COMPLETION_SPEC = ")]
    assert r"\n" not in known  # of which a shell would make candidates


def test_of_other_shells_there_is_no_completion(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bcd", "--print-completion", "powershell"])
    with pytest.raises(SystemExit, match="2"):
        cli.console()
    assert "bash|zsh|fish" in capsys.readouterr().err


COMPLETE = """
source /dev/stdin
COMP_WORDS=(bcd train --stain-n) COMP_CWORD=2; _tyro_bcd; echo "${COMPREPLY[@]}"
COMP_WORDS=(bcd cross) COMP_CWORD=1; _tyro_bcd; echo "${COMPREPLY[@]}"
complete -p bcd
"""


@pytest.mark.process
def test_bash_completes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bcd", "--print-completion", "bash"])
    cli.console()
    script = capsys.readouterr().out
    done = subprocess.run(["bash", "-c", COMPLETE], input=script, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["--stain-normalisation", "crossval", "complete -F _tyro_bcd bcd"]
    assert done.stderr == ""


def called(monkeypatch, folder, pipeline=None):
    """Stand in for the jobs: one writes what the function reads back."""
    seen = []

    def run(config):
        seen.append((config, provenance.command()))
        for name in ("metrics.json", "summary.json"):
            (folder / name).write_text(json.dumps({"from": name}))
        return str(folder)

    module = SimpleNamespace(run=pipeline or run)
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    return seen


def test_jobs_are_functions_with_the_same_settings(monkeypatch, tmp_path):
    seen = called(monkeypatch, tmp_path)
    trained = bcd.train(data="my data", epochs=3, magnifications=[40, 100], augment=False)
    expected = TrainConfig(data="my data", epochs=3, magnifications=(40, 100), augment=False)
    command = "bcd train --data 'my data' --epochs 3 --magnifications 40 100 --no-augment"
    assert seen == [(expected, command)]
    uri = str(tmp_path)
    assert trained == cli.JobResult(uri, f"{uri}/predictions", f"{uri}/model", {"from": "metrics.json"})
    assert bcd.evaluate(model="m", data="d") == cli.JobResult(
        uri, f"{uri}/predictions", "m", {"from": "metrics.json"}
    )
    assert bcd.score(model="m", input="i", output="o").metrics == {"from": "summary.json"}
    assert [config for config, _ in seen[1:]] == [
        EvaluateConfig(model="m", data="d"),
        ScoreConfig(model="m", input="i", output="o"),
    ]
    assert not provenance.command().startswith("bcd ")


def test_keywords_have_priority_over_a_file(monkeypatch, tmp_path):
    seen = called(monkeypatch, tmp_path)
    (tmp_path / "run.yaml").write_text("data: d\nepochs: 7\nseed: 2\n")
    bcd.train(config=str(tmp_path / "run.yaml"), epochs=9)
    assert seen == [(TrainConfig(data="d", epochs=9, seed=2), "bcd train --data d --epochs 9 --seed 2")]


def test_functions_raise_the_sentences_of_the_jobs(monkeypatch, tmp_path):
    def pipeline(config):
        raise RayTaskError("draw", "Traceback\n  File ...", DataError("x.csv: empty")).as_instanceof_cause()

    called(monkeypatch, tmp_path, pipeline)
    with pytest.raises(DataError) as raised:
        bcd.score(model="m", input="i", output="o")
    assert str(raised.value) == "x.csv: empty"
    with pytest.raises(ConfigError, match="--epochs"):
        bcd.train(data="d", epochs=0)
    with pytest.raises(ConfigError, match="bcd train --dry-run"):
        bcd.train(data="d", dry_run=True)
    with pytest.raises(AttributeError, match="serve"):
        bcd.serve  # noqa: B018
