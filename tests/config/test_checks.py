import sys
from types import SimpleNamespace

import pytest

from bcd import cli
from bcd.config.checks import PLACES, AuditConfig, DoctorConfig
from bcd.config.scoring import ScoreConfig
from bcd.config.serving import ServeConfig
from bcd.config.training import TrainConfig
from bcd.errors import ConfigError


def doctor(purpose, **settings):
    return DoctorConfig(**{"for": purpose}, **settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"for": "trian"}, "--for input should be 'train', 'score' or 'serve', not 'trian'"),
        ({"for": "train", "model": "m"}, "--model requires --for score, serve, not --for train"),
        ({"for": "score", "data": "d"}, "--data requires --for train, not --for score"),
        ({"for": "serve", "output": "o"}, "--output requires --for train, score, not --for serve"),
        ({"for": "train", "num_workers": "0"}, "--num-workers requires a number, MIN-MAX or auto"),
        ({"for": "score", "num_workers": "2"}, "--num-workers: jobs/score.py has no such flag; it uses the"),
        ({"for": "serve", "num_workers": "2-3"}, "--num-workers 2-3: expected a number of replicas"),
        ({"for": "train", "timeout_s": 0}, "--timeout-s input should be greater than 0"),
        ({"for": "train", "epochs": 3}, "--epochs extra inputs are not permitted"),
    ],
)
def test_contradictions_are_one_sentence_that_names_the_flag(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        DoctorConfig(**settings)


def test_the_flags_are_those_of_the_jobs():
    for purpose, config_type in (("train", TrainConfig), ("score", ScoreConfig), ("serve", ServeConfig)):
        assert set(PLACES[purpose]) <= config_type.model_fields.keys()


def test_what_is_given_and_what_is_not():
    config = doctor("train", data="d", weights="none")
    assert config.given() == {"--data": "d", "--weights": "none"}
    assert config.not_given() == ["--output"]
    assert config.training().worker_bounds() is None


def test_every_setting_has_a_help_text():
    assert all(setting.description for setting in DoctorConfig.model_fields.values())


def test_the_flag_is_spelled_for(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--for", "score", "--input", "i"])
    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(run=seen.append))
    cli.main("doctor", "ray job submit")
    assert seen == [doctor("score", input="i")]


def test_bad_flags_exit_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--for", "score", "--data", "d"])
    monkeypatch.setattr(cli, "import_module", lambda name: pytest.fail("the pipeline ran"))
    with pytest.raises(SystemExit, match="2"):
        cli.main("doctor", "ray job submit")
    assert "--data requires --for train" in " ".join(capsys.readouterr().err.split())


def test_an_audit_knows_what_a_split_looks_like():
    with pytest.raises(ConfigError, match=r"--split s.txt: expected a file ending in .csv, .tsv, .csv.gz"):
        AuditConfig(data="d", split="s.txt")
    with pytest.raises(ConfigError, match=r"--near-bits input should be less than or equal to 90, not 98"):
        AuditConfig(data="d", near_bits=98)
    assert AuditConfig(data="d", split="S.CSV").pixels
