"""The driver of a search: what it keeps, what it refuses, and one search on a local cluster."""

import math
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from ray.exceptions import ActorDiedError

from bcd import schema
from bcd.config.training import TuneConfig
from bcd.errors import BcdError, ConfigError, DivergedError, StorageError
from bcd.runtime.run_directory import read_json, write_json
from bcd.taxonomy import VALIDATION
from bcd.training.tuning import tune
from bcd.training.tuning.space import Values
from bcd.training.tuning.trials import RECORDED
from tests.cluster import PATIENCE_S, finished, start_job, wait_for

SPACE = {"dropout": Values(uniform=(0.0, 0.5))}


def result(folder, began, dropout, records, **facts):
    """What Ray Tune keeps of a trial, and its run."""
    write_json(str(folder), f"trials/trial-{began}/history.json", history_of(records))
    tag = f"{began}_dropout={dropout}"
    return SimpleNamespace(
        metrics={"config": {"dropout": dropout}, "experiment_tag": tag, "trial_id": str(began), **facts}
    )


def history_of(records):
    return [dict(zip(RECORDED, one, strict=True)) | {"headspace": 0.9} for one in records]


class Results(list):
    errors = ()


def test_results_become_trials_in_their_order(tmp_path):
    results = Results(
        [
            result(tmp_path, 10, 0.3, [], failure="the loss is no longer finite"),
            result(tmp_path, 1, 0.1, [(1, 0.5, 0.7, 0.4), (2, 0.7, 0.5, 0.6)]),
            result(tmp_path, 2, 0.2, [(1, 0.5, 0.7, 0.4)]),
        ]
    )
    first, second, third = tune._trials(results, SPACE, str(tmp_path))
    assert [first.number, second.number, third.number] == [1, 2, 3]
    assert first.epochs[1] == dict(zip(RECORDED, (2, 0.7, 0.5, 0.6), strict=True))
    assert [record["validation_balanced_accuracy"] for record in first.epochs] == [0.5, 0.7]
    assert (third.epochs, third.failure) == ([], "the loss is no longer finite")
    assert first.settings == {"dropout": 0.1}


@pytest.mark.parametrize("error", [StorageError("s3://b: cannot write it"), ZeroDivisionError()])
def test_an_error_of_a_trial_is_that_of_the_search(error):
    results = Results()
    results.errors = [SimpleNamespace(cause=error) if isinstance(error, BcdError) else error]
    with pytest.raises(type(error)):
        tune._trials(results, SPACE, "runs/tune")


@pytest.mark.parametrize(
    ("error", "said"),
    [(DivergedError("the loss is NaN"), "the loss is NaN"), (ConfigError("too few rows"), "too few rows")],
)
def test_settings_that_cannot_be_trained_are_a_result(monkeypatch, error, said):
    reported = []
    monkeypatch.setattr(tune.tune, "report", reported.append)
    monkeypatch.setattr(tune.tune, "get_context", lambda: SimpleNamespace(get_trial_id=lambda: "3f8a1"))
    monkeypatch.setattr(tune, "TuneReportCallback", lambda: None)

    def fail(config, *_):
        assert (config.name, config.dropout) == ("trial-3f8a1", 0.2)
        raise error

    monkeypatch.setattr(tune, "_fit", fail)
    tune._trial({"dropout": 0.2}, TuneConfig(data="d", space="s"), "runs/tune", None, None, 1)
    assert reported == [{"failure": said, "selection": -math.inf, "epoch": 0}]


def test_a_search_goes_on_in_its_own_space_only(tmp_path):
    tune._keep_space(str(tmp_path), SPACE)
    tune._keep_space(str(tmp_path), {"dropout": Values(uniform=(0.0, 0.5))})
    with pytest.raises(ConfigError, match=r"--space has changed since .* began: dropout, epochs"):
        tune._keep_space(str(tmp_path), {"dropout": Values(choice=(0, 1)), "epochs": Values(choice=(1, 2))})


def test_a_search_without_a_model_is_an_error(tmp_path):
    failed = Results([result(tmp_path, 0, 0.1, [], failure="too few rows")])
    trials = tune._trials(failed, SPACE, str(tmp_path))
    with pytest.raises(ConfigError, match="no trial could be trained; the first: too few rows"):
        tune._write(TuneConfig(data="d", space="s"), str(tmp_path), trials, {})


@pytest.mark.parametrize(("per_class", "choosable"), [(1, False), (12, True)])
def test_few_validation_patients_are_said(per_class, choosable):
    names = [f"{kind}{n}" for kind in "bm" for n in range(per_class)]
    classes = ["benign" if name[0] == "b" else "malignant" for name in names]
    parts = [VALIDATION] * len(names)
    table = pa.table({schema.PATIENT: names, schema.TUMOR_CLASS: classes, schema.PART: parts})
    expected = {"n_images": 2 * per_class, "n_patients": 2 * per_class, "is_choosable": choosable}
    assert tune._judged_on(table) == expected


def test_optuna_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match="pip install optuna"):
        tune._require_optuna(TuneConfig(data="d", space="s", search="optuna"))


def not_trained(chosen, settings, uri, *others, **more):
    """A trial whose training ends at once. The second is killed when it has trained, and was not reported."""
    begun = [*Path(uri).glob("begun-*")]

    def fit(config, *_):
        Path(uri, f"begun-{len(begun)}-{config.name}").touch()
        epochs = range(1, config.epochs + 1)
        history = history_of((epoch, config.dropout, 1 / epoch, epoch) for epoch in epochs)
        write_json(f"{config.output}/{config.name}", "history.json", history)
        if len(begun) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return history

    tune._fit, tune.TuneReportCallback = fit, lambda: None
    tune._trial(chosen, settings, uri, *others, **more)


@pytest.mark.ray
def test_a_search_resumes_with_the_trial_that_was_killed(joined, tmp_path, monkeypatch, capsys):
    """Trials are processes of Ray Tune, without the minute that a training takes there."""
    monkeypatch.setattr(tune, "_trial", not_trained)
    config = TuneConfig(data="d", space="s", trials=3, epochs=2, parallel=1, scheduler="none")
    uri = str(tmp_path)
    given = (config, SPACE, uri, pa.table({}), None)
    killed = tune._search(*given)
    with pytest.raises(ActorDiedError):
        tune._trials(killed, SPACE, uri)
    chosen = [one.config for one in killed]
    trials = tune._trials(tune._search(*given), SPACE, uri)
    assert [trial.settings for trial in trials] == chosen
    assert [[record[schema.EPOCH] for record in trial.epochs] for trial in trials] == [[1, 2]] * 3
    assert [trial.best["validation_balanced_accuracy"] for trial in trials] == [
        pytest.approx(settings["dropout"]) for settings in chosen
    ]
    first, second, third, again = [path.name.split("-", 2)[2] for path in sorted(tmp_path.glob("begun-*"))]
    assert again == second
    assert len({first, second, third}) == 3
    said = capsys.readouterr().out
    assert [f"trial {n} ({n_ended} of 3): " in said for n, n_ended in ((1, 1), (3, 2), (2, 3))] == [True] * 3


def search(tree, output, space, *flags):
    """A search in a process of its own."""
    small = ["--architecture", "resnet18", "--weights", "none", "--input-height-px", "32"]
    small += ["--input-width-px", "48", "--num-workers", "1"]
    return start_job("jobs/tune.py", "--data", tree, "--output", output, "--space", space, *small, *flags)


@pytest.mark.ray
@pytest.mark.trial
def test_a_killed_search_resumes_and_its_best_is_an_ordinary_run(cluster, tree, tmp_path):
    (tmp_path / "space.yaml").write_text("learning_rate: {loguniform: [1.0e-5, 1.0e-2]}\n")
    size = ("--trials", "8", "--epochs", "2")
    job = search(tree, str(tmp_path), str(tmp_path / "space.yaml"), *size)
    uri = tmp_path / "tune"
    wait_for(lambda: len([*uri.glob("trials/*/checkpoints")]) == 2, PATIENCE_S, "a second trial")
    os.kill(job.pid, signal.SIGKILL)
    job.communicate()
    finished(search(tree, str(tmp_path), str(tmp_path / "space.yaml"), "--wait", *size))
    trials = read_json(str(uri), "trials.json")
    assert [trial["number"] for trial in trials] == [*range(1, 9)]
    assert all(1e-5 <= trial["settings"]["learning_rate"] <= 1e-2 for trial in trials)
    best = max(trials, key=lambda trial: max(record["selection"] for record in trial["epochs"]))
    config = read_json(str(uri / "best"), "config.json")
    assert config["learning_rate"] == best["settings"]["learning_rate"]
    history = read_json(str(uri / "best"), "history.json")
    for one, other in zip(history, best["epochs"], strict=True):
        # Of equal settings; blocks of the first pass may overtake each other.
        assert one["validation_loss"] == pytest.approx(other["validation_loss"], rel=0.02)
    assert (uri / "best/report.html").exists()
    assert not (uri / "trials").exists()
    assert "Trial" in (uri / "tuning.html").read_text()
