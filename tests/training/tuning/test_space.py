"""What a search may change: settings of a training, each with values that are possible."""

import pytest

from bcd.config.training import TuneConfig
from bcd.errors import ConfigError
from bcd.training.tuning import space

GOOD = """
learning-rate: {loguniform: [1.0e-5, 1.0e-2]}
dropout: {uniform: [0, 0.5]}
batch_size: {integer: [16, 64]}
optimizer: [adamw, sgd]
"""


def config(tmp_path, text=GOOD, **changes):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return TuneConfig(data="d", space=str(path), **changes)


def test_a_space_is_settings_and_their_values(tmp_path):
    found = space.read_space(config(tmp_path))
    assert found == {
        "learning_rate": space.Values(loguniform=(1e-5, 1e-2)),
        "dropout": space.Values(uniform=(0, 0.5)),
        "batch_size": space.Values(integer=(16, 64)),
        "optimizer": space.Values(choice=("adamw", "sgd")),
    }
    assert [values.ends() for values in found.values()] == [
        (1e-5, 1e-2),
        (0, 0.5),
        (16, 64),
        ("adamw", "sgd"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1", "not YAML"),
        ("learning_rate", "expected settings and their values"),
        ("", "expected settings and their values"),
        ("learning_rat: [1, 2]", "'learning_rat' is no setting in which trials differ: .*learning_rate"),
        ("seed: [1, 2]", "'seed' is no setting in which trials differ"),
        ("protocol: [case, patient]", "'protocol' is no setting in which trials differ"),
        ("space: [1, 2]", "'space' is no setting in which trials differ"),
        ("dropout: [0.1]", "dropout: expected at least two values"),
        ("dropout: 0.1", "dropout: 0.1; expected a list of values"),
        ("dropout: ", "dropout: None; expected a list"),
        ("dropout: {normal: [0, 1]}", "dropout: Extra inputs"),
        ("dropout: {uniform: [0.5, 0]}", "the first number has to be below the second"),
        ("dropout: {uniform: [0, 0.2], loguniform: [0.1, 0.2]}", "dropout: .*expected a list of values"),
        ("learning_rate: {loguniform: [0, 1]}", "loguniform is for numbers above 0"),
        ("learning_rate: {loguniform: [1e-5, 1e-2]}", "valid number.*in YAML 1e-5 is text"),
        ("dropout: {uniform: [0, 1.5]}", "dropout cannot be 1.5: .*less than 1"),
        ("optimizer: [adamw, lion]", "optimizer cannot be 'lion'"),
        ("head: [null, linear]", "head cannot be 'linear': --head linear trains on the features"),
    ],
)
def test_what_is_wrong_with_a_space_is_named(tmp_path, text, said):
    given = config(tmp_path, text, weights="none")
    with pytest.raises(ConfigError, match=said):
        space.read_space(given)


def test_a_trial_is_a_training_with_what_was_chosen(tmp_path):
    given = config(tmp_path, epochs=3, protocol="patient", trials=4)
    found = space.training_of(given, {"dropout": 0.25}, output="runs/tune", name="trial-1")
    assert (found.dropout, found.epochs, found.protocol, found.name) == (0.25, 3, "patient", "trial-1")
    assert type(found).__name__ == "TrainConfig"


def test_trials_are_not_judged_on_patients_of_the_training(tmp_path):
    with pytest.raises(ConfigError, match="--protocol image judges trials on patients of the training"):
        config(tmp_path, protocol="image")
