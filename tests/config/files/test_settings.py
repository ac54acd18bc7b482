import json

import pytest

from bcd import cli
from bcd.config.files import settings
from bcd.config.options import Config
from bcd.config.scoring import PoolConfig, ScoreConfig
from bcd.config.training import AblateConfig, CrossvalConfig, TrainConfig, with_recipe
from bcd.errors import ConfigError, StorageError


def expanded(tmp_path, content, *arguments, job="train", name="run.yaml"):
    (tmp_path / name).write_text(content)
    return settings.expanded(["--config", str(tmp_path / name), *arguments], job, cli.CONFIGS)


def parsed(arguments, kind: type[Config] = TrainConfig):
    return with_recipe(cli.tyro.cli(kind, args=arguments), arguments)


YAML = """
data: ./BreaKHis_v1   # a comment
learning-rate: 1e-4
magnifications: [40, 100]
augment: no
prepared: off
weights: none
folds: null
classes:
  - benign=0
  - malignant=1
"""


def test_a_file_gives_what_flags_give(tmp_path):
    expected = TrainConfig(
        data="./BreaKHis_v1",
        learning_rate=1e-4,
        magnifications=(40, 100),
        augment=False,
        prepared="off",
        weights="none",
        classes=("benign=0", "malignant=1"),
    )
    assert parsed(expanded(tmp_path, YAML)) == expected
    joined = settings.expanded([f"--config={tmp_path / 'run.yaml'}"], "train", cli.CONFIGS)
    assert parsed(joined) == expected


def test_flags_have_priority_over_the_file_and_the_file_over_the_recipe(tmp_path):
    text = "data: d\nrecipe: few\ndropout: 0.1\nepochs: 7\naugment: false\n"
    found = parsed(expanded(tmp_path, text, "--epochs", "9", "--augment"))
    assert (found.epochs, found.augment, found.dropout, found.layer_decay) == (9, True, 0.1, 0.7)
    text = "data: d\ndropout: 0.0\nfreeze_batchnorm: false\n"  # the defaults, but given
    found = parsed(expanded(tmp_path, text, "--recipe", "few"))
    assert (found.dropout, found.freeze_batchnorm, found.layer_decay) == (0.0, False, 0.7)


@pytest.mark.parametrize(
    ("job", "config"),
    [
        ("train", TrainConfig(data="d", recipe="few", folds="-f", protocol="official", fold=2, seed=3)),
        ("train", TrainConfig(data="a b", mean=(0.1, 0.2, 0.3), num_workers="2-8", ema_decay=0.9)),
        ("crossval", CrossvalConfig(data="ünïcode 😀", k=4, export="refit", against="other")),
        ("ablate", AblateConfig(data="d", arms=("plain", "ema_decay=0.99,mixup=0.2"))),
        ("pool", PoolConfig(scores="s", model="m")),
        ("score", ScoreConfig(model="m", input="i", output="o", mpp=0.5, compile="off")),
    ],
)
def test_the_config_of_a_run_is_such_a_file(tmp_path, job, config):
    content = json.dumps(config.model_dump(mode="json"), indent=2)
    arguments = expanded(tmp_path, content, job=job, name="config.json")
    assert parsed(arguments, type(config)) == config
    assert parsed(settings.as_flags(config.model_dump(mode="json")), type(config)) == config


def test_the_settings_of_an_output_of_scoring_need_only_what_they_do_not_state(tmp_path):
    """It names the model by its id, and whether the network was compiled."""
    content = json.dumps({"model": "1a2b", "input": "i", "compile": False, "mpp": None})
    arguments = expanded(tmp_path, content, "--model", "m", "--output", "o", job="score", name="config.json")
    assert parsed(arguments, ScoreConfig) == ScoreConfig(model="m", input="i", output="o", compile="off")


def test_places_of_the_command_line_have_priority_too(tmp_path):
    text = "bundle: a\ntarget: hf://o/n\npublic: true\n"
    assert expanded(tmp_path, text, job="push") == ["a", "hf://o/n", "--public"]
    (tmp_path / "run.yaml").write_text(text)
    own = ["b", "--config", str(tmp_path / "run.yaml"), "--no-public"]
    assert settings.expanded(own, "push", cli.CONFIGS) == ["b", "hf://o/n", "--public", "--no-public"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("data: d\nepocs: 3", "'epocs' is no setting of bcd train; did you mean 'epochs'?"),
        ("data: d\nzzz: 3", "'zzz' is no setting of bcd train; bcd train --help lists them"),
        ("config: other.yaml", "'config' is no setting of bcd train; bcd train --help lists them"),
        ("data: d\nepochs: 3\ncam: evidence", "'cam' is no setting of bcd train; it is one of bcd score"),
        ("model: m\ninput: i\ncam: evidence", "has settings of bcd score, not of bcd train, which has no"),
        ("data: d\nk: 4", "has settings of bcd crossval or bcd ablate, not of bcd train, which has no 'k'"),
        ("epochs: ten", "epochs: input should be a valid integer, unable to parse string as an integer, not"),
        ("epochs: 0", "epochs: input should be greater than or equal to 1, not '0'"),
        ("epochs:", "epochs: input should be a valid integer, not None"),
        ("augment: perhaps", "augment: input should be a valid boolean"),
        ("classes: benign=0", "classes: input should be a valid tuple, not 'benign=0'"),
        ("data: [a, b]", "data: input should be a valid string, not ['a', 'b']"),
        ("recipe: fast", "recipe: input should be 'steady', 'stains' or 'few', not 'fast'"),
        ("architecture: vgg", "architecture: expected resnet18, "),
        ("- data: d", "expected settings, each as NAME: VALUE, not list"),
        ("data: [", "neither YAML nor JSON: while parsing a flow node"),
    ],
)
def test_a_fault_in_the_file_is_one_sentence(tmp_path, content, said):
    with pytest.raises(ConfigError) as raised:
        expanded(tmp_path, content)
    text = str(raised.value)
    assert text.startswith(str(tmp_path / "run.yaml"))
    assert said in text
    assert "\n" not in text


def test_a_file_that_is_none_is_one_sentence(tmp_path):
    with pytest.raises(ConfigError, match="neither YAML nor JSON"):
        expanded(tmp_path, "{'data': 1}", name="config.json")
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ConfigError, match="neither YAML nor JSON"):
        settings.expanded(["--config", str(tmp_path / "image.yaml")], "train", cli.CONFIGS)
    with pytest.raises(StorageError, match=r"none\.yaml"):
        settings.expanded(["--config", str(tmp_path / "none.yaml")], "train", cli.CONFIGS)
    for arguments in (["--config"], ["--config", "--data", "d"], ["--config="]):
        with pytest.raises(ConfigError, match="--config needs the path"):
            settings.expanded(arguments, "train", cli.CONFIGS)
    with pytest.raises(ConfigError, match=r"given twice, as a\.yaml and b\.yaml"):
        settings.expanded(["--config", "a.yaml", "--config=b.yaml"], "train", cli.CONFIGS)


def test_every_job_takes_a_file_and_keeps_no_word_of_it():
    for kind in cli.CONFIGS.values():
        assert kind.model_fields["config"].exclude
        assert "config" not in settings.fields_of(kind)
    assert "config" not in TrainConfig(data="d").model_dump()
    with pytest.raises(ConfigError, match="--config is read by commands"):
        TrainConfig(data="d", config="x.yaml")


def test_settings_are_named_as_their_flags():
    assert "for" in settings.fields_of(cli.CONFIGS["doctor"])
