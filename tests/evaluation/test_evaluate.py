import numpy as np
import pyarrow as pa
import pytest
import torch

from bcd import schema, storage
from bcd.config.evaluation import EvaluateConfig
from bcd.config.signing import ImportConfig
from bcd.errors import BundleError, DataError
from bcd.evaluation import evaluate
from bcd.model import bundle, weights
from bcd.model.published import importer
from bcd.runtime import predict, run_directory
from tests import planted
from tests.cluster import read_json
from tests.trained import score_here

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def run_uri(trained, tmp_path_factory):
    """A copy: an evaluation of the model's own test part renews its card."""
    folder = str(tmp_path_factory.mktemp("run"))
    for file in storage.list_files(trained.uri):
        if not file.path.startswith("checkpoints/"):
            storage.write_bytes(f"{folder}/{file.path}", storage.read_bytes(file.uri))
    return folder


def test_evaluating_a_bundle_on_moved_data_gives_the_same_numbers(run_uri, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "score_rows", score_here)
    evaluate.run(EvaluateConfig(model=f"{run_uri}/model", data=tree, output=str(tmp_path)))
    assert read_json(f"{tmp_path}/metrics.json")["pooled"] == read_json(f"{run_uri}/metrics.json")["pooled"]
    for name in ("report.html", "figures/confusion_matrix.png", "figures/history.svg"):
        assert storage.exists(f"{tmp_path}/{name}")


@pytest.fixture
def fewer(tree, tmp_path):
    """The data without one image: most of it was trained on."""
    for file in storage.list_files(tree)[:-1]:
        storage.write_bytes(f"{tmp_path}/data/{file.path}", storage.read_bytes(file.uri))
    return f"{tmp_path}/data"


def test_what_was_trained_on_is_refused_or_marked_when_forced(run_uri, fewer, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "score_rows", score_here)
    model, output = f"{run_uri}/model", f"{tmp_path}/out"
    before = storage.read_bytes(f"{model}/card.json")
    with pytest.raises(DataError, match=r"were seen in training.*--force measures and marks"):
        evaluate.run(EvaluateConfig(model=model, data=fewer, output=output))
    evaluate.run(EvaluateConfig(model=model, data=fewer, output=output, force=True))
    measured = read_json(f"{output}/metrics.json")
    assert (measured["tested_on"], measured["n_images"]) == ("forced", 8 * 3 * 2 - 1)
    assert "were seen in training" in storage.read_bytes(f"{output}/report.html").decode()
    assert "forced: may have been trained on" in storage.read_bytes(f"{output}/report.html").decode()
    assert storage.read_bytes(f"{model}/card.json") == before


def test_an_imported_model_is_measured_in_place_of_its_publishers_numbers(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "score_rows", score_here)
    network, model = weights.build(3, architecture="resnet18"), str(tmp_path / "imported")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    flags = {"classes": ("a", "b", "c"), "malignant": ("b", "c"), "input_px": 64, "stated": ("AUC=0.96",)}
    importer.run(
        ImportConfig(
            published="torchvision:resnet18", weights=str(tmp_path / "weights.pth"), output=model, **flags
        )
    )
    began = bundle.identify(model)
    evaluate.run(EvaluateConfig(model=model, data=tree, output=f"{tmp_path}/out"))
    measured, card = read_json(f"{tmp_path}/out/metrics.json"), bundle.read_card(model)
    assert (measured["tested_on"], measured["classes"][1]) == ("unproven", "malignant:b")
    assert "multiclass" not in measured
    assert card.metrics["pooled"] == measured["pooled"]
    assert bundle.identify(model) == began
    page = storage.read_bytes(f"{tmp_path}/out/report.html").decode()
    for words in ("AUC, stated by the publisher, not measured", "which its publisher may have trained it on"):
        assert words in page


def test_without_its_split_a_model_may_have_seen_the_data(run_uri, fewer, tmp_path):
    for file in storage.list_files(f"{run_uri}/model"):
        storage.write_bytes(f"{tmp_path}/alone/model/{file.path}", storage.read_bytes(file.uri))
    with pytest.raises(DataError, match=r"there is no split.parquet beside the model to show"):
        evaluate.run(EvaluateConfig(model=f"{tmp_path}/alone/model", data=fewer, output=f"{tmp_path}/out"))


def test_a_data_set_that_was_never_seen_is_scored_whole_and_compared(run_uri, trained, tmp_path, monkeypatch):
    """Twice the same model on the same patients: no difference, and no claim."""
    monkeypatch.setattr(predict, "score_rows", score_here)
    data, outputs = planted.tree(tmp_path / "data", signal=False, n_images=1), []
    for name in ("one", "two"):
        against = outputs[0] if outputs else None
        config = EvaluateConfig(
            model=f"{run_uri}/model", data=data, output=f"{tmp_path}/{name}", against=against
        )
        outputs.append(evaluate.run(config))
    measured = read_json(f"{outputs[1]}/metrics.json")
    assert (measured["tested_on"], measured["n_images"]) == ("external", planted.N_PATIENTS)
    row = measured["comparison"]["metrics"]["accuracy"]
    assert (row["difference"], row["interval"], row["p_value"]) == (0, None, None)
    page = storage.read_bytes(f"{outputs[1]}/report.html").decode()
    assert "The model was trained on none of these images" in page
    assert "Comparison with another model" in page
    with pytest.raises(DataError, match="name an --output for its evaluation"):
        evaluate.run(EvaluateConfig(model=f"{trained.uri}/model", data=data))


def test_another_slide_of_a_case_that_was_trained_on_is_seen(tmp_path):
    """Whether two slides of a case are of one person is not published."""
    run_with(tmp_path, split_row("a", "14-22549AB", case="14-22549"))
    for case, n_seen in (("14-22549", 1), ("14-1", 0), (None, 0)):
        table = schema.fill(pa.Table.from_pylist([split_row("b", "14-22549CD", case=case)]), schema.INDEX)
        seen = "1 of its images, or others of their patients or cases, were seen in training"
        assert evaluate._doubts(f"{tmp_path}/model", table) == [seen] * n_seen


def split_row(name, patient, part="train", phash=None, tissue=1.0, **more):
    """A row whose image looks like no other, unless its hash is given: 256 bits in four words."""
    words = np.random.default_rng(list(name.encode())).integers(2**63, size=4, dtype=np.uint64)
    row = {schema.IMAGE_ID: name, schema.URI: name, schema.PATIENT: patient, schema.PART: part}
    row |= {schema.SHA256: name, schema.PHASH: phash or words.tobytes().hex(), schema.TISSUE_FRACTION: tissue}
    return row | more


def run_with(folder, *rows):
    """A run of which nothing but its split is there."""
    run_directory.write_split(str(folder), schema.fill(pa.Table.from_pylist(list(rows)), schema.SPLIT))


def flipped(phash, n_bits):
    """The hash with its first bits changed."""
    return f"{int(phash, 16) ^ ((1 << n_bits) - 1):064x}"


PHASH = split_row("a", "p")[schema.PHASH]


@pytest.mark.parametrize(
    ("trained", "external", "doubts"),
    [
        (split_row("a", "p"), split_row("b", "q"), []),
        (split_row("a", "p"), split_row("b", None), ["1 of its images name no patient, who may be in both"]),
        (split_row("a", None), split_row("b", "q"), ["1 of the images seen in training name no patient"]),
        (
            split_row("a", "p"),
            split_row("b", "q", phash=PHASH),
            ["1 of its images looks like one seen in training (b like a)"],
        ),
        (
            split_row("a", "p"),
            split_row("b", "q", phash=flipped(PHASH, 60)),
            ["1 of its images looks like one"],
        ),
        (split_row("a", "p"), split_row("b", "q", phash=flipped(PHASH, 61)), []),
        (split_row("a", "p", part="test"), split_row("b", "p", phash=PHASH), []),
        (split_row("a", "p", tissue=0.05), split_row("b", "q", phash=PHASH), []),
        (split_row("a", "p") | {schema.PHASH: None}, split_row("b", "q"), ["keeps no perceptual hashes"]),
        (split_row("a", "p"), split_row("b", "p"), ["1 of its images, or others of their patients"]),
    ],
)
def test_what_is_not_proven_to_be_unseen_is_doubted(tmp_path, trained, external, doubts):
    run_with(tmp_path, trained)
    found = evaluate._doubts(f"{tmp_path}/model", schema.fill(pa.Table.from_pylist([external]), schema.INDEX))
    assert len(found) == len(doubts)
    assert all(part in whole for part, whole in zip(doubts, found, strict=True))


def test_no_bundle_no_evaluation(tree, tmp_path):
    with pytest.raises(BundleError, match="no model bundle there"):
        evaluate.run(EvaluateConfig(model=str(tmp_path), data=tree))


def test_the_card_contains_metrics_with_intervals(run_uri):
    card = bundle.read_card(f"{run_uri}/model")
    assert card.metrics["n_images"] > 0
    text = storage.read_bytes(f"{run_uri}/model/README.md").decode()
    assert "| balanced accuracy |" in text
