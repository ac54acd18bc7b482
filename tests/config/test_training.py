import pytest

from bcd.config.options import differences
from bcd.config.scoring import PoolConfig
from bcd.config.training import RECIPES, CrossvalConfig, TrainConfig, with_recipe
from bcd.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_workers": "8-2"}, "--num-workers 8-2: the minimum exceeds the maximum"),
        ({"num_workers": "0"}, "--num-workers requires a number, MIN-MAX or auto"),
        ({"protocol": "official"}, "--protocol official requires --folds FOLDER"),
        ({"folds": "f"}, "--protocol official requires --folds FOLDER"),
        ({"protocol": "official", "folds": "f"}, "--fold requires --protocol official or --cross-folds"),
        ({"protocol": "official", "folds": "f", "fold": 6}, "--fold 6: there are 5 folds"),
        (
            {"protocol": "official", "folds": "f", "fold": 1, "cross_folds": 5},
            "official has its own five folds",
        ),
        ({"protocol": "magnification"}, "--protocol magnification requires --held-out, the one to test on"),
        ({"held_out": "A"}, "--held-out is for --protocol magnification or site"),
        (
            {"protocol": "magnification", "held_out": "40", "magnifications": (100, 200)},
            "--held-out 40: expected some of --magnifications 100 200",
        ),
        ({"protocol": "site", "held_out": "A", "cross_folds": 2, "fold": 1}, "a site is tested whole"),
        ({"fold": 2}, "--fold requires --protocol official or --cross-folds"),
        ({"cross_folds": 3}, "--fold requires --protocol official or --cross-folds"),
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
            "--no-sync-batchnorm: with --batch-size 7 some of 4 workers .* expected at least 8",
        ),
        ({"input_height_px": 31}, "--input-height-px 31: expected at least 32"),
        ({"architecture": "vgg16"}, r"--architecture expected resnet18, .* or timm:NAME, not 'vgg16'"),
        ({"architecture": "timm:a/b"}, "--architecture expected"),
        ({"head": "linear", "weights": "none"}, "--head linear .*: expected others than none"),
        ({"mean": (0.5, 0.5, 2)}, "--mean input should be less than or equal to 1"),
        ({"std": (0.5, 0.5, 0)}, "--std input should be greater than 0"),
        ({"learning_rate": -1}, "--learning-rate input should be greater than 0, not -1"),
        ({"classes": ("benign=0", "malignant=0")}, "--classes malignant=0: 0 is benign"),
        (
            {"weighted_loss": True, "balance": "subtype"},
            "--weighted-loss weights the classes of --target",
        ),
        ({"freeze_batchnorm": True, "weights": "none"}, "--freeze-batchnorm requires --weights"),
        ({"stain_jitter": 0.1, "augment": False}, "--stain-jitter is part of --augment"),
        ({"recipe": "surprise"}, "--recipe input should be 'steady', 'stains' or 'few', not 'surprise'"),
        ({"recipe": "few", "weights": "none"}, "--freeze-batchnorm requires --weights"),
        ({"ema_decay": 1.0}, "--ema-decay input should be less than 1, not 1.0"),
        ({"learning_rat": 1}, "--learning-rat extra inputs are not permitted"),
    ],
)
def test_contradictions_are_one_sentence_that_names_the_flag(settings, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        TrainConfig(data="x", **settings)
    assert "\n" not in str(caught.value)


def test_only_residual_networks_have_a_size_of_their_own():
    def size(**given):
        config = TrainConfig(data="x", **given)
        return config.input_size_px

    assert size() == (224, 336)
    assert size(input_width_px=100) == (224, 100)
    assert size(architecture="timm:vit_small_patch16_224") == (0, 0)
    assert size(architecture="timm:vit_small_patch16_224", input_width_px=336) == (0, 336)


def test_a_single_image_is_none_where_batch_norm_counts_all_workers():
    """Or where each gets two."""
    TrainConfig(data="x", batch_size=4, num_workers="4")
    TrainConfig(data="x", batch_size=8, num_workers="4", sync_batchnorm=False)
    TrainConfig(data="x", batch_size=2, sync_batchnorm=False)


def test_worker_bounds():
    bounds = [TrainConfig(data="x", num_workers=n).worker_bounds() for n in ("auto", "3", "2-8")]
    assert bounds == [None, (3, 3), (2, 8)]


def test_a_study_holds_out_by_one_protocol():
    study = CrossvalConfig(data="d", protocol="case,magnification", held_out=("40", "400"))
    assert study.held_out == ("40", "400")
    for changes, sentence in (
        ({"protocol": "magnification,site"}, "one of the two"),
        ({"held_out": ("40",)}, "--held-out is for --protocol magnification or site"),
        ({"protocol": "magnification", "held_out": ("50",)}, "--held-out 50: expected some of"),
        ({"protocol": "case,site", "export": "refit"}, "--export is of models that know all"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            CrossvalConfig(data="d", **changes)


def test_protocols_are_separated_by_commas():
    assert CrossvalConfig(data="d", protocol="image,case").protocols() == ("image", "case")
    with pytest.raises(ConfigError, match="--protocol case,case: expected each protocol once"):
        CrossvalConfig(data="d", protocol="case,case")
    with pytest.raises(ConfigError, match="--protocol official requires --folds"):
        CrossvalConfig(data="d", protocol="case,official")
    with pytest.raises(
        ConfigError, match="--protocol 'cases': expected some of case, patient, official, image"
    ):
        CrossvalConfig(data="d", protocol="cases")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "expected --labels to train, or --model to apply a trained model: one of the two"),
        ({"labels": "l", "model": "m"}, "expected --labels to train, or --model to apply"),
        ({"model": "m", "epochs": 3}, "--epochs is for training, which needs --labels"),
        ({"model": "m", "classes": ("benign=0",)}, "--classes is for training, which needs --labels"),
        ({"labels": "l", "name": "a/b"}, "--name 'a/b': use letters"),
        ({"labels": "l", "classes": ("benign",)}, "--classes benign: expected benign=NAME"),
        ({"labels": "l", "validation_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
        ({"labels": "l", "protocol": "image"}, "--protocol input should be 'case' or 'patient'"),
    ],
)
def test_contradictions_of_pooling_name_the_flag(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        PoolConfig(scores="s", **settings)


def test_a_model_is_applied_to_any_scores():
    config = PoolConfig(scores="s", model="m", output="o", name="n", maps=0, wait=True, log_format="json")
    assert (config.model, config.labels) == ("m", None)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_settings_and_flags_have_priority(name):
    found = TrainConfig(data="d", recipe=name)
    assert {field: getattr(found, field) for field in RECIPES[name]} == RECIPES[name]
    assert TrainConfig(data="d", recipe=name, ema_decay=None).ema_decay is None
    assert TrainConfig(**found.model_dump()) == found
    # Of the command line: every field has a value, but only some were given.
    parsed = TrainConfig(
        **TrainConfig(data="d").model_dump() | {"recipe": name, "epochs": 3, "ema_decay": 0.5}
    )
    arguments = ["--data=d", "--recipe", name, "--epochs", "3", "--ema_decay", "0.5"]
    assert with_recipe(parsed, arguments) == TrainConfig(data="d", recipe=name, epochs=3, ema_decay=0.5)
    assert with_recipe(TrainConfig(data="d"), ["--data", "d"]) == TrainConfig(data="d")


def test_a_run_of_a_version_without_recipes_can_be_resumed():
    now = TrainConfig(data="d").deciding()
    fields = ("recipe", "ema_decay", "stain_jitter", "stain_normalisation", "label_smoothing", "mixup")
    fields += ("dropout", "layer_decay", "freeze_batchnorm", "patience", "symmetries", "weighted_loss")
    assert differences({name: value for name, value in now.items() if name not in fields}, now) == {}
