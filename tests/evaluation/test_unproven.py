"""Evaluations of imported models, of which nobody knows what they have seen; without Ray."""

import pyarrow as pa

from bcd import schema
from bcd.config.evaluation import EvaluateConfig
from bcd.config.training import TrainConfig
from bcd.evaluation import evaluate
from bcd.runtime.prepare import DatasetFacts
from tests.model.test_bundle import card

SIDES = {"input_height_px": 64, "input_width_px": 64}
PUBLISHED = {
    "source": "timm: x",
    "license": "CC0",
    "citation": "y",
    "trained_on": "z",
    "classes": ("a", "b"),
    "file_sha256": "f" * 64,
}


def test_own_data_are_scored_whole_and_in_doubt():
    unknown = dict.fromkeys(("protocol", "seed", "data_fingerprint", "split_fingerprint"))
    settings = {"name": "x", "data": "z", "weights": "timm: x", "architecture": "resnet18"} | SIDES
    known = card(published=PUBLISHED, training=settings, validation={}, warnings=("by others",), **unknown)
    training = TrainConfig(**known.training | {"data": "mine"})
    sizes = {"field_height_px": 48, "field_width_px": 48, "data_fingerprint": "d" * 64}
    facts = DatasetFacts(**sizes, synthetic=False, warnings=["few"], broken=[], quarantined=[])
    table = schema.fill(pa.table({schema.IMAGE_ID: ["a.png"]}), schema.INDEX)
    config = EvaluateConfig(model="nowhere/model", data="mine", output="out")
    parts, found, kind = evaluate._tested(config, known, training, table, facts)
    assert (kind, parts[schema.PART].to_pylist()) == (evaluate.UNPROVEN, ["test"])
    assert found.warnings == ["by others", "few"]
    about = evaluate._about(known, found, kind)
    assert not about["external"]
    assert (about["forced"], about["best_epoch"], about["protocol"]) == (False, None, None)
