import json
import sys

import numpy as np
import pytest
import torch

from bcd.config.signing import ExportConfig
from bcd.errors import BundleError, ConfigError
from bcd.model import predictor, weights
from bcd.model.published import onnx_file
from bcd.text import RESEARCH_ONLY
from tests.model.recipes.test_reference import MACENKO
from tests.model.test_bundle import card, untrained

onnx = pytest.importorskip("onnx", reason="pip install onnx onnxscript")
pytest.importorskip("onnxscript", reason="pip install onnx onnxscript")

IMAGES = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 3, 64, 96)).astype(np.float32))
FACTS = {"temperature": 2.0, "threshold": 0.4, "bundle_license": "cc-by-4.0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle, and its file, made by the job."""
    made = tmp_path_factory.mktemp("onnx")
    predictor.save(untrained(), card(**FACTS), str(made / "model"))
    path = str(made / "model.onnx")
    assert onnx_file.run(ExportConfig(bundle=str(made / "model"), output=path)) == path
    return made


@pytest.fixture(scope="module")
def loaded(folder):
    return predictor.load(str(folder / "model"), "cpu")


def expected(loaded):
    with torch.inference_mode():
        return [one.numpy() for one in onnx_file._Whole(loaded)(IMAGES)]


def test_the_file_gives_the_numbers_of_the_bundle(folder, loaded):
    """Of other images than the one that it was checked on, and of a batch of another size."""
    evaluator = onnx.reference.ReferenceEvaluator(str(folder / "model.onnx"))
    assert evaluator.input_names == ["image"]
    assert evaluator.output_names == ["logit", "embedding", "evidence", "evidence_bias"]
    found = evaluator.run(None, {"image": IMAGES.numpy()})
    for ours, theirs in zip(expected(loaded), found, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)
    logit, _, evidence, bias = found
    np.testing.assert_allclose(evidence.mean((1, 2)) + bias, logit[:, 1] - logit[:, 0], atol=1e-3)


def test_it_runs_in_onnxruntime(folder, loaded):
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
    session = runtime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    for ours, theirs in zip(expected(loaded), session.run(None, {"image": IMAGES.numpy()}), strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-4)


def test_it_states_what_its_user_has_to_know(folder, loaded):
    model = onnx.load(folder / "model.onnx")
    facts = {one.key: one.value for one in model.metadata_props}
    assert (model.opset_import[0].version, model.producer_name) == (onnx_file.OPSET, "bcd")
    assert facts["model_id"] == loaded.model_id
    assert json.loads(facts["classes"]) == ["benign", "malignant"]
    assert json.loads(facts["mean"]) == list(loaded.card.mean)
    assert (facts["input_height_px"], facts["input_width_px"], facts["threshold"]) == ("64", "96", "0.4")
    assert facts["license"] == "cc-by-4.0"
    assert facts["use"] == model.doc_string == RESEARCH_ONLY
    size = [side.dim_param or side.dim_value for side in model.graph.input[0].type.tensor_type.shape.dim]
    assert size == ["n", 3, 64, 96]


def test_it_names_no_path_of_this_machine(folder):
    content = (folder / "model.onnx").read_bytes()
    for word in (b"site-packages", b"bcd/model", b"stack_trace"):
        assert word not in content


def test_a_file_with_other_numbers_is_not_left_there(folder, tmp_path, monkeypatch):
    model = onnx.load(folder / "model.onnx")
    monkeypatch.setattr(onnx_file, "exported", lambda loaded: model)
    predictor.save(untrained(seed=2), card(**FACTS), str(tmp_path / "model"))
    with pytest.raises(BundleError, match=r"logit of the canary image differs by .* no file is written"):
        onnx_file.run(ExportConfig(bundle=str(tmp_path / "model"), output=str(tmp_path / "other.onnx")))
    assert not (tmp_path / "other.onnx").exists()


def test_what_cannot_be_exported_is_refused(folder, loaded, monkeypatch):
    bundle, output = str(folder / "model"), str(folder / "model.onnx")
    with pytest.raises(ConfigError, match=r"model\.onnx exists: choose another name"):
        onnx_file.run(ExportConfig(bundle=bundle, output=output))
    stained = predictor.from_state(untrained().state_dict(), card(stain=MACENKO))
    with pytest.raises(ConfigError, match=r"normalises the stain of each image \(macenko\), for which"):
        onnx_file.exported(stained)
    monkeypatch.setattr(onnx_file, "MOST_BYTES", 2**20)
    with pytest.raises(ConfigError, match="the weights have 43 MiB, and a file of ONNX at most 1 MiB"):
        onnx_file.exported(loaded)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"\(onnxscript is missing\); run: pip install onnx onnxscript"):
        onnx_file.run(ExportConfig(bundle=bundle, output=f"{output}2"))


@pytest.mark.trial
def test_a_network_without_closed_form_has_no_evidence():
    """And one with orientations has."""
    facts = {"architecture": "timm:test_vit", "input_height_px": 160, "input_width_px": 160}
    state = weights.build(2, None, 0, "timm:test_vit", (160, 160)).state_dict()
    other = predictor.from_state(state, card(**facts))
    turned = predictor.from_state(untrained().state_dict(), card(symmetries=True))
    for made, n in ((other, 2), (turned, 4)):
        model = onnx_file.exported(made)
        assert [one.name for one in model.graph.output] == list(onnx_file.OUTPUTS[:n])
        assert onnx_file._require_equal(onnx, model, made) < 1e-3
