"""A network of timm from training to rows: the last layer alone, on frozen features of a file."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import bcd
from bcd import schema, storage
from bcd.config.scoring import ScoreConfig
from bcd.scoring import score
from bcd.training import train
from tests.runtime.test_datasets import small

timm = pytest.importorskip("timm", reason="needs the extra `timm`")


@pytest.mark.ray
@pytest.mark.trial
def test_a_linear_head_on_a_network_of_timm(joined, tree, tmp_path):
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "w.safetensors")
    flags = {"architecture": "timm:test_vit", "weights": str(tmp_path / "w.safetensors"), "head": "linear"}
    run_uri = train.run(small(tree, output=str(tmp_path), name="vit", epochs=2, num_workers="1", **flags))
    model = bcd.load(storage.join(run_uri, "model"), "cpu")
    assert (model.card.evidence, model.card.mean) == ("gradcam", (0.5, 0.5, 0.5))
    assert len(model.card.feature_statistics.mean) == 64
    trained = load_file(tmp_path / "vit/model/model.safetensors")
    given = load_file(tmp_path / "w.safetensors")
    assert torch.equal(trained["body.blocks.0.mlp.fc1.weight"], given["blocks.0.mlp.fc1.weight"])
    output = score.run(ScoreConfig(model=f"{run_uri}/model", input=tree, output=str(tmp_path / "scores")))
    rows = storage.dataset(storage.join(output, "predictions")).to_table()
    assert rows[schema.EVIDENCE_BIAS].null_count == len(rows) > 0
    content = storage.read_bytes(rows[schema.URI][0].as_py())
    np.testing.assert_allclose(
        model.predict_files([content]).logit[0], rows[schema.LOGIT][0].as_py(), atol=1e-4
    )
