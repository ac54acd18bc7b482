import json

import pytest

from bcd import provenance, storage
from bcd.errors import BundleError
from bcd.model import predictor
from bcd.training.pooling import model
from tests.model.test_bundle import card as bundle_card
from tests.model.test_bundle import untrained
from tests.training.pooling.planted import MODEL


def pool_card(**changes):
    facts = {
        "content": b"weights",
        "encoder": MODEL,
        "embedding": 8,
        "classes": ("benign", "malignant"),
        "temperature": 2.0,
        "threshold": 0.25,
        "operating_point": {"target_sensitivity": None},
        "calibration": {"brier_after": 0.1},
        "epoch": 3,
        "slides": {"train": 4, "validation": 2, "test": 2},
        "split_fingerprint": "5" * 64,
        "training": {"seed": 0},
        "warnings": (),
        "versions": provenance.versions(),
        "git_commit": None,
    }
    return model.make_card(**facts | changes)


@pytest.fixture
def uri(tmp_path):
    model.write_model(b"weights", pool_card(), str(tmp_path))
    return str(tmp_path)


def test_what_is_written_is_read(uri):
    assert model.read_model(uri) == (b"weights", pool_card())


def test_the_identity_is_of_all_that_an_answer_depends_on():
    known = model.identity_of(pool_card())
    assert model.identity_of(pool_card(warnings=("few",))) == known
    assert model.identity_of(pool_card(threshold=0.3)) != known
    assert model.identity_of(pool_card(content=b"others")) != known


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threshold": 0.3}, "its checksum differs"),
        ({"kind": "mean"}, "is no model of slides"),
    ],
)
def test_a_card_that_was_edited_is_refused(uri, change, said):
    facts = json.loads(storage.read_bytes(f"{uri}/card.json"))
    storage.write_bytes(f"{uri}/card.json", json.dumps(facts | change).encode())
    with pytest.raises(BundleError, match=said):
        model.read_model(uri)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"kind": "gated', b'{"kind": "gated_attention"}'])
def test_a_damaged_card_is_refused(uri, content):
    storage.write_bytes(f"{uri}/card.json", content)
    with pytest.raises(BundleError):
        model.read_model(uri)


def test_other_weights_are_refused(uri):
    storage.write_bytes(f"{uri}/model.safetensors", b"others")
    with pytest.raises(BundleError, match=r"not the file that card\.json was written for"):
        model.read_model(uri)


def test_a_bundle_is_no_model_of_slides(tmp_path):
    with pytest.raises(BundleError, match="no model of slides there"):
        model.read_model(str(tmp_path))
    predictor.save(untrained(), bundle_card(), str(tmp_path))
    with pytest.raises(BundleError, match="is no model of slides; expected OUTPUT/NAME/model"):
        model.read_model(str(tmp_path))


def test_an_impossible_card_is_not_written():
    with pytest.raises(BundleError, match="no card can be written"):
        pool_card(temperature=float("nan"))
