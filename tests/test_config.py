import json
from typing import get_args

import pytest

from bcd import cam
from bcd.config import (
    AuditConfig,
    Cam,
    CrossvalConfig,
    DemoConfig,
    EvaluateConfig,
    ScoreConfig,
    TrainConfig,
    differences,
)
from bcd.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_workers": "8-2"}, "--num-workers 8-2: the minimum exceeds the maximum"),
        ({"num_workers": "0"}, "--num-workers takes a number, MIN-MAX or auto"),
        ({"protocol": "official"}, "--protocol official goes with --folds FOLDER"),
        ({"folds": "f"}, "--protocol official goes with --folds FOLDER"),
        ({"protocol": "official", "folds": "f"}, "--fold goes with --protocol official or --cross-folds"),
        ({"protocol": "official", "folds": "f", "fold": 6}, "--fold 6: there are 5 folds"),
        (
            {"protocol": "official", "folds": "f", "fold": 1, "cross_folds": 5},
            "official has its own five folds",
        ),
        ({"fold": 2}, "--fold goes with --protocol official or --cross-folds"),
        ({"cross_folds": 3}, "--fold goes with --protocol official or --cross-folds"),
        ({"cross_folds": 3, "fold": 4}, "--fold 4: there are 3 folds"),
        ({"validation_fraction": 0.6, "test_fraction": 0.4}, "leave nothing to train on"),
        ({"magnifications": (50,)}, r"--magnifications \[50\]: BreaKHis has \[40, 100, 200, 400\]"),
        ({"name": "a/b"}, "--name 'a/b': use letters"),
        ({"name": ".."}, r"--name '\.\.': use letters, .*, a letter or digit first"),
        ({"name": "."}, r"--name '\.': use letters"),
        ({"name": ".hidden"}, r"--name '\.hidden': use letters"),
        ({"name": "-x"}, "--name '-x': use letters"),
        ({"name": "a\n"}, "--name 'a.n': use letters"),
        ({"learning_rate": float("inf")}, "--learning-rate input should be a finite number, not inf"),
        ({"learning_rate": float("nan")}, "--learning-rate input should be a finite number, not nan"),
        ({"weight_decay": float("inf")}, "--weight-decay input should be a finite number, not inf"),
        (
            {"validation_fraction": float("nan")},
            "--validation-fraction input should be a finite number, not nan",
        ),
        ({"seed": 2**31}, "--seed input should be less than or equal to 2147483647, not 2147483648"),
        ({"seed": -1}, "--seed input should be greater than or equal to 0, not -1"),
        (
            {"input_width_px": 10_000},
            "--input-width-px input should be less than or equal to 4096, not 10000",
        ),
        (
            {"sync_batchnorm": False, "batch_size": 7, "num_workers": "2-4"},
            "--no-sync-batchnorm: of --batch-size 7 some of 4 workers .* at least 8 are needed",
        ),
        ({"learning_rate": -1}, "--learning-rate input should be greater than 0, not -1"),
        ({"classes": ("benign=0", "malignant=0")}, "--classes malignant=0: 0 is benign"),
        ({"learning_rat": 1}, "--learning-rat extra inputs are not permitted"),
    ],
)
def test_contradictions_are_one_sentence_that_names_the_flag(settings, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        TrainConfig(data="x", **settings)
    assert "\n" not in str(caught.value)


def test_a_single_image_is_none_where_batch_norm_counts_all_workers():
    """Or where each gets two."""
    TrainConfig(data="x", batch_size=4, num_workers="4")
    TrainConfig(data="x", batch_size=8, num_workers="4", sync_batchnorm=False)
    TrainConfig(data="x", batch_size=2, sync_batchnorm=False)


def test_worker_bounds():
    bounds = [TrainConfig(data="x", num_workers=n).worker_bounds() for n in ("auto", "3", "2-8")]
    assert bounds == [None, (3, 3), (2, 8)]


def test_a_config_survives_json_and_is_frozen():
    config = TrainConfig(data="x", magnifications=(40,), fold=1, folds="f", protocol="official")
    assert TrainConfig(**json.loads(config.model_dump_json())) == config
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_differences_name_what_decides_the_result_and_nothing_else():
    old = TrainConfig(data="x").model_dump(mode="json")
    new = TrainConfig(data="x", seed=1, num_workers="2", max_failures=0, output="o", name="n", device="cpu")
    assert differences(old, new.model_dump(mode="json")) == ["--seed 0 -> 1"]


@pytest.mark.parametrize(
    "config_type", [TrainConfig, AuditConfig, CrossvalConfig, EvaluateConfig, ScoreConfig, DemoConfig]
)
def test_every_setting_has_a_help_text(config_type):
    for name, setting in config_type.model_fields.items():
        assert setting.description, f"{config_type.__name__}.{name} has no docstring"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"cam_layer": "layer3"}, "--cam-layer layer3 needs another --cam, such as gradcam or layercam"),
        ({"cam": "guesscam"}, "--cam input should be 'evidence', 'gradcam'"),
        ({"mpp": 0}, "--mpp input should be greater than 0, not 0"),
        ({"mpp": 0.003}, "--mpp 0.003: between 0.05 and 20 µm/px are possible"),
        ({"mpp_override": 25}, "--mpp-override 25: between 0.05 and 20 µm/px are possible"),
        ({"tile_mpp": 0.01}, "--tile-mpp 0.01: between 0.05 and 20 µm/px are possible"),
        ({"mpp": float("nan")}, "--mpp input should be a finite number, not nan"),
        ({"mpp_override": float("inf")}, "--mpp-override input should be a finite number, not inf"),
        ({"min_tissue": 1.5}, "--min-tissue input should be less than or equal to 1, not 1.5"),
        ({"max_workers": 0}, "--max-workers input should be greater than or equal to 1, not 0"),
        ({"classes": 2}, "--classes extra inputs are not permitted"),
    ],
)
def test_contradictions_of_scoring_name_the_flag(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ScoreConfig(model="m", input="i", output="o", **settings)


def test_another_method_explains_any_layer():
    config = ScoreConfig(model="m", input="i", output="o", cam="layercam", cam_layer="layer2")
    assert (config.cam, config.cam_layer) == ("layercam", "layer2")


def test_every_cam_method_can_be_asked_for():
    assert set(get_args(Cam)) == {cam.CLOSED_FORM, *cam.METHODS}


def test_protocols_stand_between_commas():
    assert CrossvalConfig(data="d", protocol="image,case").protocols() == ("image", "case")
    with pytest.raises(ConfigError, match="--protocol case,case: each protocol once"):
        CrossvalConfig(data="d", protocol="case,case")
    with pytest.raises(ConfigError, match="--protocol official goes with --folds"):
        CrossvalConfig(data="d", protocol="case,official")
    with pytest.raises(
        ConfigError, match="--protocol 'cases': expected some of case, patient, official, image"
    ):
        CrossvalConfig(data="d", protocol="cases")


def test_forced_numbers_do_not_replace_honest_ones():
    with pytest.raises(ConfigError, match="--force needs --output"):
        EvaluateConfig(model="m", data="d", force=True)


def test_an_audit_knows_what_a_split_looks_like():
    with pytest.raises(ConfigError, match=r"--split s.txt: expected a file ending in .csv, .tsv, .csv.gz"):
        AuditConfig(data="d", split="s.txt")
    with pytest.raises(ConfigError, match=r"--near-bits input should be less than or equal to 90, not 98"):
        AuditConfig(data="d", near_bits=98)
    assert AuditConfig(data="d", split="S.CSV").pixels
