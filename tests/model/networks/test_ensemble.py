"""What holds for one network holds for several as one: in the archive, the evaluation and the service too."""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from bcd import schema
from bcd.errors import BundleError, ConfigError
from bcd.evaluation import artifacts
from bcd.metrics import aggregate
from bcd.model import bundle, novelty, predictor, weights
from bcd.model.card import Study, dump
from bcd.model.networks.ensemble import Ensemble
from bcd.runtime import predict
from bcd.serving import documents
from bcd.taxonomy import SUBTYPES
from bcd.training import export
from tests import pictures
from tests.model.test_bundle import card, statistics, untrained
from tests.trained import scored

SEEDS, T = (1, 2, 3), 0.5
OF_THREE = Study(kind="ensemble", n_models=3)


@pytest.fixture(scope="module")
def networks():
    return [untrained(0.02, seed).eval() for seed in SEEDS]


@pytest.fixture(scope="module")
def parts(networks):
    return [statistics(network) for network in networks]


@pytest.fixture(scope="module")
def uri(networks, parts, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("ensemble"))
    judged = {"cutoff": 0.4, "n_training": 9, "n_validation": 9}
    known = card(
        study=OF_THREE,
        temperature=T,
        threshold=0.4,
        feature_statistics=export.joined_statistics(parts, judged),
    )
    predictor.save(Ensemble(networks), known, folder)
    return folder


@pytest.fixture(scope="module")
def whole(uri):
    return predictor.load(uri, "cpu")


IMAGES = np.random.default_rng(0).integers(0, 255, (4, 64, 96, 3), np.uint8)


def log_odds(prediction):
    return prediction.logit[:, 1] - prediction.logit[:, 0]


def test_it_is_the_mean_of_its_members(whole, networks, parts):
    found = whole.predict(IMAGES)
    facts = [{"temperature": T, "feature_statistics": part} for part in parts]
    each = [
        predictor.from_state(network.state_dict(), card(**known)).predict(IMAGES)
        for network, known in zip(networks, facts, strict=True)
    ]
    for name in ("logit", "evidence", "evidence_bias"):
        np.testing.assert_allclose(
            getattr(found, name), np.mean([getattr(one, name) for one in each], 0), atol=1e-5
        )
    np.testing.assert_allclose(
        found.log_odds_sd, np.std([log_odds(one) for one in each], 0, ddof=1), atol=1e-5
    )
    assert found.log_odds_sd.min() > 0.01
    assert np.isnan(each[0].log_odds_sd).all()
    np.testing.assert_allclose(found.pooled, np.hstack([one.pooled for one in each]), rtol=1e-4)
    squares = np.mean([one.novelty.astype(float) ** 2 for one in each], 0)
    np.testing.assert_allclose(found.novelty, np.sqrt(squares), rtol=1e-4)


def test_mean_of_the_evidence_plus_bias_is_the_log_odds(whole):
    found = whole.predict(IMAGES)
    with torch.inference_mode():  # through none of the joint last layer
        direct = whole.network(whole._normalised(IMAGES))
    np.testing.assert_allclose(found.logit, direct, atol=1e-5)
    total = found.evidence.mean((1, 2)) + found.evidence_bias
    np.testing.assert_allclose(total, log_odds(found), atol=1e-3)
    probability = found.probability_malignant
    np.testing.assert_allclose(total, np.log(probability / (1 - probability)), atol=1e-3)


def test_evidence_of_subtypes_is_for_the_class_of_the_mean():
    """Where members alone would explain several classes; the deviation is that of malignancy."""
    classes = tuple(SUBTYPES)
    members = [weights.build(8, seed=seed, architecture="resnet18").eval() for seed in (1, 2)]
    for member in members:
        torch.nn.init.normal_(member.fc.weight, std=0.02)
    known = card(target="subtype", classes=classes, study=Study(kind="ensemble", n_models=2))
    found = predictor.from_state(Ensemble(members).state_dict(), known).predict(IMAGES)
    chosen = found.logit.argmax(1)
    expected = found.logit[np.arange(4), chosen] - found.logit.mean(1)
    np.testing.assert_allclose(found.evidence.mean((1, 2)) + found.evidence_bias, expected, atol=1e-3)
    one = card(target="subtype", classes=classes)
    odds = []
    for member in members:
        p = predictor.from_state(member.state_dict(), one).predict(IMAGES).probability_malignant.astype(float)
        odds.append(np.log(p / (1 - p)))
    np.testing.assert_allclose(found.log_odds_sd, np.std(odds, 0, ddof=1), rtol=1e-2, atol=1e-3)


def test_archive_evaluation_and_service_have_its_numbers(uri, whole, tmp_path):
    files = {name: pictures.encode(pictures.gradient(46 + i, 70)) for i, name in enumerate("abc")}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    rows = [{schema.IMAGE_ID: name, schema.URI: str(tmp_path / name)} for name in files]
    rows = schema.fill(pa.Table.from_pylist(rows), schema.READING)
    settings = predict.Settings(uri, bundle.identify(uri), batch_size=4, embeddings=True)
    table = scored(rows, settings)
    assert table.schema.field(schema.EMBEDDING).type.list_size == 3 * 512
    direct = whole.predict_files(list(files.values()))
    for name in (schema.LOGIT, schema.PROBABILITY_MALIGNANT, schema.LOG_ODDS_SD, schema.NOVELTY):
        np.testing.assert_allclose(table[name].to_pylist(), getattr(direct, name), atol=1e-5)
    # The service.
    for i, content in enumerate(files.values()):
        pixels = pictures.gradient(46 + i, 70)
        told = documents.answer(whole.card, whole.model_id, content, pixels, direct.rows()[i])
        assert told.log_odds_sd == pytest.approx(table[schema.LOG_ODDS_SD][i].as_py(), abs=1e-5)
        assert told.log_odds == pytest.approx(log_odds(direct)[i], abs=1e-5)
        assert np.mean(told.evidence.values) + told.evidence.bias == pytest.approx(told.log_odds, abs=1e-3)
        assert told.predicted_class == table[schema.PREDICTED_CLASS][i].as_py()
    # The evaluation.
    (tmp_path / "predictions").mkdir()
    pa.parquet.write_table(table, tmp_path / "predictions/part.parquet")
    truth = [{schema.IMAGE_ID: name, schema.TUMOR_CLASS: "malignant"} for name in files]
    truth = schema.fill(pa.Table.from_pylist(truth), schema.INDEX)
    frame = artifacts.with_truth(str(tmp_path / "predictions"), truth, whole.card)
    images = artifacts.images_of(frame, whole.card, "predictions")
    np.testing.assert_allclose(images[aggregate.LOG_ODDS], log_odds(direct), atol=1e-5)
    assert images[schema.PREDICTED_CLASS].tolist() == direct.predicted_class


def test_a_single_network_has_no_deviation_in_table_and_service(networks, tmp_path):
    predictor.save(networks[0], card(), str(tmp_path / "one"))
    (tmp_path / "a").write_bytes(content := pictures.encode(pictures.gradient()))
    rows = pa.Table.from_pylist([{schema.IMAGE_ID: "a", schema.URI: str(tmp_path / "a")}])
    settings = predict.Settings(f"{tmp_path}/one", bundle.identify(f"{tmp_path}/one"))
    assert scored(schema.fill(rows, schema.READING), settings)[schema.LOG_ODDS_SD].to_pylist() == [None]
    one = predictor.load(f"{tmp_path}/one", "cpu")
    told = documents.answer(one.card, "m", content, pictures.gradient(), one.predict_files([content]))
    assert json.loads(told.model_dump_json())["log_odds_sd"] is None


def test_its_embeddings_times_one_last_layer_are_the_logits(uri, whole):
    """From the file alone, as the reference says."""
    tensors = load_file(f"{uri}/{bundle.WEIGHTS}")
    heads = [{k: tensors[f"members.{i}.fc.{k}"].numpy() for k in ("weight", "bias")} for i in range(3)]
    weight = np.hstack([head["weight"] for head in heads]) / 3
    bias = np.mean([head["bias"] for head in heads], 0)
    found = whole.predict(IMAGES)
    np.testing.assert_allclose((found.pooled @ weight.T + bias) / T, found.logit, atol=1e-4)


def test_another_method_than_the_closed_form_is_refused(whole):
    with pytest.raises(ConfigError, match=r"--cam layercam explains a single network, and .* averages 3"):
        whole.predict(IMAGES, "layercam")


def test_the_canary_guards_every_member(uri, whole, tmp_path):
    tensors = load_file(f"{uri}/{bundle.WEIGHTS}")
    tensors["members.2.fc.bias"] = tensors["members.2.fc.bias"] + torch.tensor([0.0, 60.0])
    save_file(tensors, tmp_path / bundle.WEIGHTS)
    changed = hashlib.sha256((tmp_path / bundle.WEIGHTS).read_bytes()).hexdigest()
    known = whole.card.model_copy(update={"weights_sha256": changed})
    (tmp_path / bundle.CARD).write_bytes(dump(known))
    with pytest.raises(BundleError, match="this machine computes the logits"):
        predictor.load(str(tmp_path), "cpu")


@pytest.mark.parametrize("n", [2, 4])
def test_weights_of_more_or_fewer_members_are_rejected(networks, n):
    state = Ensemble(networks).state_dict()
    said = "members.2.conv1.weight is no part of it" if n == 2 else "members.3.conv1.weight is missing"
    with pytest.raises(BundleError, match=said):
        weights.assembled(2, state, "resnet18", n_members=n)


def test_the_statistics_have_to_be_of_all_members(networks, parts):
    state, of_one = Ensemble(networks).state_dict(), {"feature_statistics": parts[0]}
    with pytest.raises(BundleError, match="statistics of 512 features, expected 1536"):
        predictor.from_state(state, card(study=OF_THREE).model_copy(update=of_one))
    with pytest.raises(BundleError, match="n_models: Input should be less than or equal to 64"):
        dump(card().model_copy(update={"study": Study.model_construct(kind="ensemble", n_models=65)}))
    judged = {"cutoff": 1.0, "n_training": 1, "n_validation": 1}
    assert export.joined_statistics([parts[0], None], judged) is None
    assert export.joined_statistics(parts, None) is None


def test_the_readme_states_members_cost_and_what_they_saw():
    metrics = {"summary": [["AUC", "0.9", "–"]], "n_images": 8, "n_patients": 4}
    text = " ".join(bundle._readme(card(study=OF_THREE, metrics=metrics)).split())
    assert "An ensemble of 3 networks (resnet18) that reads" in text
    assert "a prediction takes 3 forward passes" in text
    assert "This bundle has seen all of these images and was not tested itself" in text
    assert "| out of fold | value |" in text
    refit = card(study=Study(kind="refit", n_models=5), metrics=metrics)
    text = " ".join(bundle._readme(refit).split())
    assert "A resnet18 that reads" in text
    assert "trained on all images for 3 epochs, after which the models were best (median)" in text
    assert "those of the 5 models, each on the images that it had not seen" in text
    assert refit.n_members == 1


def test_novelty_of_members_is_that_of_unseen_images(parts):
    joined = export.joined_statistics(parts, {"cutoff": 0.4, "n_training": 9, "n_validation": 9})
    assert (joined.cutoff, joined.n_training, len(joined.mean)) == (0.4, 9, 3 * 512)
    pooled = np.hstack([np.array(part.mean) + 0.5 for part in parts])[None]
    assert novelty.distance(pooled, joined.mean, joined.spread) == pytest.approx(1)
