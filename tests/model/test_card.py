"""A card is as it was written and says what can be, or it is rejected: formats, seals and bounds."""

import hashlib
import json

import pytest

from bcd.errors import BundleError, ConfigError
from bcd.metrics.drift.stain import StainStatistics
from bcd.model import card as cards
from bcd.model import novelty
from tests.model.recipes.test_reference import MACENKO, REINHARD
from tests.model.test_bundle import card

KNOWN = card(weights_sha256="a" * 64, canary_logit=(0.5, -0.25))
CONTENT = json.loads(cards.dump(KNOWN))
OF_THREE = cards.Study(kind="ensemble", n_models=3)


def statistics(**changes):
    facts = {"mean": [0.0] * 512, "spread": [1.0] * 512, "cutoff": 1.0, "n_training": 1, "n_validation": 1}
    return {"feature_statistics": facts | changes}


def resealed(**changes):
    """A card whose checksum is right, with any content."""
    content = {name: value for name, value in (CONTENT | changes).items() if name != cards.CHECKSUM}
    return json.dumps(content | {cards.CHECKSUM: cards.seal(content)}).encode()


def test_a_card_is_read_as_it_was_written():
    assert cards.parse_card(cards.dump(KNOWN), "m") == KNOWN
    assert (
        cards.parse_card(json.dumps(CONTENT, separators=(",", ":")).encode(), "m") == KNOWN
    )  # set out otherwise
    full = KNOWN.model_copy(
        update={"feature_statistics": novelty.FeatureStatistics(**statistics()["feature_statistics"])}
    )
    assert cards.parse_card(cards.dump(full), "m") == full


# Fields that cards of version 0.2.0 do not have.
ADDED = {"stain", "symmetries", "study", "evidence", "weights_license", "published", "bundle_license"}


def test_a_card_of_an_older_version_keeps_its_identity():
    """Archives and signed copies name it."""
    old = {name: value for name, value in CONTENT.items() if name not in ADDED | {cards.CHECKSUM}}
    before = cards.parse_card(json.dumps(old | {cards.CHECKSUM: cards.seal(old)}).encode(), "m")
    facts = before.model_dump_json(exclude=ADDED | {"metrics", "warnings", "canary_logit"})
    assert cards.model_id(before) == hashlib.sha256(facts.encode()).hexdigest()[:16] == cards.model_id(KNOWN)


def test_what_only_finds_drift_does_not_change_a_model():
    """And a card without it, of an older version, is read, and keeps its identity."""
    facts = statistics()["feature_statistics"]
    known = StainStatistics(n_patients=9, mean=(0.0,) * 4, covariance=((0.0,) * 4,) * 4)
    without, whole = (
        KNOWN.model_copy(update={"feature_statistics": novelty.FeatureStatistics(**facts, stain=stain)})
        for stain in (None, known)
    )
    old = json.loads(cards.dump(without))
    del old["feature_statistics"]["stain"], old[cards.CHECKSUM]
    assert cards.parse_card(json.dumps(old | {cards.CHECKSUM: cards.seal(old)}).encode(), "m") == without
    assert cards.parse_card(cards.dump(whole), "m") == whole
    assert cards.model_id(without) == cards.model_id(whole) != cards.model_id(KNOWN)
    words = {"metrics": True, "warnings": True, "canary_logit": True} | dict.fromkeys(ADDED, True)
    as_before = without.model_dump_json(exclude=words | {"feature_statistics": {"stain"}})
    assert cards.model_id(without) == hashlib.sha256(as_before.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    "change",
    [{"stain": MACENKO}, {"stain": REINHARD}, {"symmetries": True}, {"study": OF_THREE}],
    ids=["macenko", "reinhard", "symmetries", "study"],
)
def test_recipes_and_studies_decide(change):
    changed = KNOWN.model_copy(update=change)
    assert cards.model_id(changed) != cards.model_id(KNOWN)
    assert cards.parse_card(cards.dump(changed), "m") == changed


def test_the_identity_follows_what_decides():
    same = {"metrics": {"accuracy": 1.0}, "canary_logit": (0.5, -0.2500001), "warnings": ("few patients",)}
    same |= {"bundle_license": "mit", "weights_license": "MIT", "evidence": "gradcam"}
    assert cards.model_id(KNOWN.model_copy(update=same)) == cards.model_id(KNOWN)
    for change in ({"threshold": 0.4}, {"weights_sha256": "b" * 64}, {"temperature": 1.5}):
        assert cards.model_id(KNOWN.model_copy(update=change)) != cards.model_id(KNOWN)


@pytest.mark.parametrize(
    "change", [{"threshold": 0.4}, {"synthetic": True}, {"metrics": {"n": 1}}, {"surprise": 1}]
)
def test_a_card_that_was_changed_is_rejected(change):
    with pytest.raises(
        BundleError, match=r"m: the model card is not as it was written: its checksum differs\. Copy"
    ):
        cards.parse_card(json.dumps(CONTENT | change).encode(), "m")


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (1, "format 1, this version reads 2; run the command of its training again, with the same --name"),
        (3, "format 3, this version reads 2; install the version of bcd that wrote it"),
        (None, "format None"),
        ("2", "format 2"),
        (True, "format True"),
    ],
)
def test_another_format_is_rejected_with_what_to_do(version, said):
    with pytest.raises(BundleError, match=f"m: the model card has {said}"):
        cards.parse_card(json.dumps(CONTENT | {"format_version": version}).encode(), "m")


TEXT = cards.dump(KNOWN).decode()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TEXT[:-20], "not a valid model card"),
        ("", "not a valid model card"),
        ("[]", "expected a JSON object"),
        ("[" * 100_000, "not a valid model card"),
        (TEXT.replace('"fold": null', '"fold": null, "fold": null'), "'fold' occurs twice"),
        (TEXT.replace('"name"', '"data"', 1), "'data' occurs twice"),
        (TEXT.replace('"threshold": 0.5', '"threshold": NaN'), "not a valid model card: Out of range float"),
        (
            TEXT.replace('"threshold": 0.5', '"threshold": -Infinity'),
            "not a valid model card: Out of range float",
        ),
        (
            TEXT.replace('"threshold": 0.5', '"threshold": 1e999'),
            "not a valid model card: Out of range float",
        ),
        (TEXT.replace('"seed": 0', '"seed": ' + "9" * 5000, 1), "not a valid model card: Exceeds the limit"),
    ],
)
def test_what_is_no_card_is_rejected(text, said):
    with pytest.raises(BundleError, match=said):
        cards.parse_card(text.encode(), "m")


def test_text_in_no_utf8_is_rejected():
    with pytest.raises(BundleError, match="not a valid model card: 'utf-8' codec"):
        cards.parse_card(b'{"a": "\xff"}', "m")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "vgg16"}, "architecture: expected resnet18, .* or timm:NAME"),
        ({"architecture": "timm:hf-hub:a/b"}, "architecture: expected"),
        ({"evidence": "layercam"}, "evidence: Input should be 'evidence' or 'gradcam'"),
        ({"weights_license": "x" * 201}, "weights_license: String should have at most 200"),
        ({"classes": ["malignant", "benign"]}, r"expected \['benign', 'malignant'\], in this order"),
        ({"classes": ["benign"]}, "in this order"),
        ({"target": "subtype"}, "in this order"),
        ({"target": "published"}, "expected benign:NAME and malignant:NAME, at least one each"),
        (
            {"target": "published", "classes": ["malignant:a", "malignant:b"]},
            "expected benign:NAME and malignant:NAME, at least one each",
        ),
        (
            {"target": "published", "classes": ["malignant:a", "benign:b", "benign"]},
            "expected benign:NAME and malignant:NAME only",
        ),
        (
            {"target": "published", "classes": ["malignant:a", "benign:b", "benign:b"]},
            "at most 100, of different names",
        ),
        ({"seed": None}, "seed is missing"),
        ({"data_fingerprint": None}, "data_fingerprint is missing"),
        ({"published": {"source": "x"}}, "published.license: Field required"),
        ({"target": "grade"}, "target: "),
        ({"threshold": 1.01}, "threshold: Input should be less than or equal to 1"),
        ({"threshold": -0.01}, "threshold: "),
        ({"threshold": "0.5"}, "threshold: Input should be a valid number"),
        ({"temperature": 0.0}, "temperature: "),
        ({"temperature": 1000.0}, "temperature: "),
        ({"mean": [0.5, 0.5, 1.5]}, "mean.2: "),
        ({"mean": [0.5, 0.5]}, "mean.2: Field required"),
        ({"std": [0.2, 0.0, 0.2]}, "std.1: Input should be greater than 0"),
        ({"std": [0.2, -0.2, 0.2]}, "std.1: "),
        ({"input_height_px": 16}, "input_height_px: "),
        ({"input_width_px": 100_000}, "input_width_px: "),
        ({"input_width_px": 96.5}, "input_width_px: "),
        ({"field_height_px": 0}, "field_height_px: "),
        ({"mpp": [0.003]}, "mpp.0: "),
        ({"mpp": [21.0]}, "mpp.0: "),
        ({"magnifications": [40, 41]}, r"magnifications \[41\]: expected some of \[40, 100, 200, 400\]"),
        ({"seed": -1}, "seed: "),
        ({"fold": 0}, "fold: "),
        ({"protocol": "guess"}, "protocol: "),
        ({"leaky": 0}, "leaky: Input should be a valid boolean"),
        ({"weights_sha256": "a"}, "weights_sha256: "),
        ({"split_fingerprint": "z" * 64}, "split_fingerprint: "),
        ({"canary_logit": [1.0]}, "1 canary logits for 2 classes"),
        ({"training": {"data": "d"}}, "training: name is missing"),
        ({"validation": {}}, "validation: the epoch is missing"),
        ({"surprise": 1}, "surprise: Extra inputs are not permitted"),
        (statistics(mean=[0.0]), "feature_statistics: expected as many means as spreads"),
        (
            statistics(spread=[1.0] * 2047 + [0.0]),
            "feature_statistics.spread.2047: Input should be greater than 0",
        ),
        (statistics(cutoff=-1.0), "feature_statistics.cutoff: "),
        (statistics(n_training=0), "feature_statistics.n_training: "),
        ({"decoder_version": 1}, "decoder_version"),
    ],
)
def test_what_cannot_be_is_rejected_by_name(change, said):
    with pytest.raises(BundleError, match=f"m: not a valid model card: .*{said}"):
        cards.parse_card(resealed(**change), "m")


def test_the_bounds_hold_when_a_card_is_written():
    with pytest.raises(
        BundleError, match="no model card can be written: temperature: Input should be a finite"
    ):
        cards.dump(KNOWN.model_copy(update={"temperature": float("nan")}))


@pytest.mark.parametrize(
    ("architecture", "given", "expected"),
    [
        ("resnet18", ("evidence",), "evidence"),
        ("resnet18", ("scorecam", "layer2"), "scorecam"),
        ("timm:resnet18", ("evidence",), "gradcam"),
        ("timm:resnet18", ("layercam",), "layercam"),
        ("timm:resnet18", ("layercam", "layer3"), None),
        ("timm:resnet18", ("ablationcam",), None),
    ],
)
def test_a_method_is_one_that_the_network_has(architecture, given, expected):
    known = KNOWN.model_copy(update={"architecture": architecture})
    if architecture != "resnet18":
        known = known.model_copy(update={"evidence": "gradcam"})
    if expected is None:
        with pytest.raises(
            ConfigError, match=f"--cam {given[0]} .* needs a ResNet, and the model is timm:res"
        ):
            known.cam(*given)
    else:
        assert known.cam(*given) == expected
