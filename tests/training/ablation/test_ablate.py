"""The driver of an ablation, with studies whose predictions are made."""

import json
from itertools import count

import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.config.training import RECIPES, AblateConfig
from bcd.errors import BcdError, ConfigError
from bcd.evaluation import artifacts
from bcd.metrics import aggregate
from bcd.runtime import output
from bcd.training import crossval
from bcd.training.ablation import ablate
from tests import studies

ARMS = ("plain", "few", "mixup=0.2,learning-rate=0.001")
# Shift of the log-odds towards the truth in the studies of an arm.
GAINS = {"plain": 0.0, "few": 1.5, "mixup-0.2-learning-rate-0.001": 0.0}


def config(folder, **changes):
    settings = {"output": str(folder), "arms": ARMS, "k": 3, "repeats": 2, "epochs": 5}
    return AblateConfig(data="d", **settings | changes)


def images(gain):
    """Images of the same patients by a model that is better by so many log-odds."""
    made = studies.predictions(n_patients=16, n_images=6, spread=0.5)
    odds = made[schema.PROBABILITY_MALIGNANT] / (1 - made[schema.PROBABILITY_MALIGNANT])
    sign = 2.0 * (made[schema.TUMOR_CLASS] == "malignant") - 1
    odds = odds * 2.718281828 ** (gain * sign)
    return aggregate.image_table(made.assign(**{schema.PROBABILITY_MALIGNANT: odds / (1 + odds)}), 0.5)


@pytest.fixture
def studied(monkeypatch):
    """The studies that were run, each of which is finished at once; the call of `killed` fails."""
    calls = {"studies": [], "killed": None, "number": count(1)}

    def run(study):
        if next(calls["number"]) == calls["killed"]:
            raise BcdError("killed")
        calls["studies"].append(study)
        uri = storage.join(study.output, study.name)
        table = pa.Table.from_pandas(images(GAINS[study.name]), preserve_index=False)
        storage.write_table(storage.join(uri, artifacts.IMAGES), table)
        return uri

    monkeypatch.setattr(crossval, "run", run)
    return calls


def test_arms_differ_in_their_settings_only():
    given = config("runs")
    arms = ablate.arms_of(given, "runs/ablation")
    assert list(arms) == list(ARMS)
    plain, few, other = (study.model_dump() for study in arms.values())
    apart = lambda study: {name for name in plain if study[name] != plain[name]}  # noqa: E731
    assert apart(few) == {"name", "recipe", *RECIPES["few"]}
    assert apart(other) == {"name", "mixup", "learning_rate"}
    assert (other["mixup"], other["learning_rate"]) == (0.2, 0.001)
    assert (plain["epochs"], plain["output"], plain["prepared"]) == (
        5,
        "runs/ablation",
        storage.absolute("runs/prepared"),
    )


def test_folds_and_seeds_are_the_same_in_all_arms():
    found = [
        [
            (fold.repeat, fold.fold, fold.config.seed, fold.config.cross_folds, fold.config.protocol)
            for fold in crossval.folds_of(study, study.output, "case")
        ]
        for study in ablate.arms_of(config("runs"), "runs/ablation").values()
    ]
    assert found[0] == found[1] == found[2]
    assert [(repeat, fold) for repeat, fold, *_ in found[0]] == [(r, f) for r in (1, 2) for f in (1, 2, 3)]
    (fold, *_) = crossval.folds_of(ablate.arms_of(config("runs"), "u")["few"], "u", "case")
    assert fold.config.layer_decay == RECIPES["few"]["layer_decay"]


def test_each_arm_is_compared_with_the_first_on_the_same_patients(studied, tmp_path):
    uri = ablate.run(config(tmp_path))
    found = json.loads(storage.read_bytes(f"{uri}/ablation.json"))
    assert found["baseline"] == "plain"
    few, same = (found["arms"][arm] for arm in ARMS[1:])
    assert few["n_patients"] == 16
    for name in ("auc", "balanced_accuracy"):
        low, high = few["metrics"][name]["interval"]
        assert 0 < low < few["metrics"][name]["difference"] < high
        assert (same["metrics"][name]["difference"], same["metrics"][name]["interval"]) == (0, None)
    text = storage.read_bytes(f"{uri}/ablation.md").decode()
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {7}
    assert [row[0].strip() for row in rows[2:]] == ["plain", "few", "mixup=0.2,learning-rate=0.001"]
    auc = few["metrics"]["auc"]
    low, high = auc["interval"]
    assert rows[2][1].strip() == f"{auc['second']:.3f}"
    assert rows[3][1].strip() == f"{auc['first']:.3f}"
    assert rows[3][2].strip() == f"{auc['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
    assert "96 images of 16 patients" in text


def test_the_same_command_continues_after_a_kill(studied, tmp_path):
    """`crossval.run` returns at once where an arm is finished, which its own tests show."""
    studied["killed"] = 2
    with pytest.raises(BcdError, match="killed"):
        ablate.run(config(tmp_path))
    assert not storage.exists(f"{tmp_path}/ablation/ablation.json")
    uri = ablate.run(config(tmp_path))
    assert [study.name for study in studied["studies"]] == ["plain", *GAINS]
    assert storage.exists(f"{uri}/ablation.json")
    assert output.owner(uri) == output.ABLATE
    more = ablate.run(config(tmp_path, arms=ARMS[:2]))
    assert list(json.loads(storage.read_bytes(f"{more}/ablation.json"))["arms"]) == ["few"]


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        (("plain",), "--arms plain: expected two or more, each once"),
        (("few", "few"), "expected two or more, each once"),
        (("plain", "fw"), "--arms 'fw': 'fw' is no setting .* expected plain, steady, stains, few, or"),
        (("plain", "seed=3"), "'seed' is no setting in which arms can differ"),
        (("plain", "dry_run=true"), "'dry_run' is no setting in which arms can differ"),
        (("plain", "ema_decay=2"), "--ema-decay input should be less than 1"),
    ],
)
def test_what_is_no_arm_ends_with_a_sentence_before_any_training(studied, tmp_path, arms, said):
    with pytest.raises(ConfigError, match=said):
        ablate.run(config(tmp_path, arms=arms))
    assert not studied["studies"]


def test_arms_have_one_protocol():
    with pytest.raises(ConfigError, match="--arms are compared under one --protocol, without --against"):
        config("runs", protocol="case,image")
