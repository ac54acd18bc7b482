"""The bundle of a study, made in one process of two untrained models and their predictions."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import ray.train

from bcd import schema, storage, taxonomy
from bcd.config.evaluation import EvaluateConfig
from bcd.config.training import CrossvalConfig, TrainConfig
from bcd.data import index
from bcd.errors import ConfigError, DataError
from bcd.evaluation import evaluate
from bcd.lease import Lease
from bcd.metrics import calibration
from bcd.model import bundle, predictor, train_step
from bcd.runtime import output, predict, run_directory
from bcd.runtime.prepare import DatasetFacts, part_of
from bcd.runtime.run_directory import SELECTION
from bcd.split import split
from bcd.training import crossval, export, train
from bcd.training.checkpoint import State
from tests import planted
from tests.cluster import read_json
from tests.model.test_bundle import untrained
from tests.trained import scored, statistics_here
from tests.training.test_loop import RECORD

# Of each fold: best epoch, temperature and threshold.
CHOSEN = {1: (3, 0.5, 0.3), 2: (6, 2.0, 0.6)}


def fill(fold, table, facts):
    """What a finished fold leaves behind; its network is untrained."""
    parts = split.assign_fold(table, "case", 0, 2, fold.fold, 0.2)
    run_directory.write_split(fold.uri, parts)
    run_directory.write_json(fold.uri, run_directory.DATA, facts.model_dump())
    run_directory.write_json(fold.uri, run_directory.HISTORY, [RECORD])
    epoch, temperature, threshold = CHOSEN[fold.fold]
    rows = part_of(parts, split.TRAIN)
    known = export._card(fold.config, rows, facts, {"epoch": epoch})
    network = untrained(0.05, seed=fold.fold)
    features, _ = statistics_here(network, known, rows, part_of(parts, split.VALIDATION))
    changed = {"temperature": temperature, "threshold": threshold, "feature_statistics": features}
    uri = f"{fold.uri}/model"
    predictor.save(network, known.model_copy(update=changed), uri)
    test = schema.fill(part_of(parts, split.TEST), schema.READING)
    predictions = scored(test, predict.Settings(uri, bundle.identify(uri), batch_size=12))
    storage.write_table(f"{fold.uri}/predictions/part-x.parquet", predictions)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Config, lease, folds, arm, and the data set of a study of 24 patients."""
    folder = tmp_path_factory.mktemp("study")
    data = planted.tree(folder / "data", signal=True, n_images=1)
    facts = {"data_fingerprint": "d" * 64, "split_fingerprint": "5" * 64, "synthetic": False, "broken": []}
    facts |= {"quarantined": [], "field_height_px": 48, "field_width_px": 72, "warnings": ["of all"]}
    network = {"architecture": "resnet18", "input_height_px": 32, "input_width_px": 48, "weights": "none"}
    config = CrossvalConfig(data=data, output=str(folder), k=2, prepared="off", **network)
    uri = f"{folder}/crossval"
    output.claim_folder(uri, output.CROSSVAL)
    folds = list(crossval.folds_of(config, uri, "case"))
    table, facts = schema.fill(index.read_index(data)[0], schema.INDEX), DatasetFacts(**facts)
    for fold in folds:
        fill(fold, table, facts)
    arm = crossval._arm("case", folds, config)
    return SimpleNamespace(
        config=config, own=Own(uri), folds=folds, arm=arm, inspected=(table, facts), uri=uri
    )


class Own(Lease):
    """The lease of a study that nobody else wants."""

    def require(self):
        pass


def judged(study):
    """Log-odds of every image by the model that had not seen it, without temperature; its truth."""
    log_odds, malignant = [], []
    for fold in study.folds:
        model = predictor.load(f"{fold.uri}/model", "cpu")
        rows = part_of(run_directory.read_split(fold.uri), split.TEST)
        found = model.predict_files([storage.read_bytes(uri) for uri in rows[schema.URI].to_pylist()])
        log_odds.append((found.logit[:, 1] - found.logit[:, 0]) * model.card.temperature)
        malignant += [name == taxonomy.MALIGNANT for name in rows[schema.TUMOR_CLASS].to_pylist()]
    return np.concatenate(log_odds).astype(float), np.array(malignant)


def test_threshold_and_temperature_are_those_of_all_patients(study):
    """By trying every one of them."""
    log_odds, malignant = judged(study)
    assert len(malignant) == planted.N_PATIENTS
    chosen = study.arm.measured["out_of_fold"]
    temperatures = np.geomspace(*calibration.BOUNDS, 4000)
    right = np.where(malignant, 1, -1) * log_odds
    losses = [
        (np.log(t) / calibration.PRIOR) ** 2 / 2 + np.logaddexp(0, -right / t).sum() for t in temperatures
    ]
    assert chosen["temperature"] == pytest.approx(temperatures[np.argmin(losses)], rel=2e-3)
    probability = 1 / (1 + np.exp(-log_odds / chosen["temperature"]))

    def youden(threshold):
        called = probability >= threshold
        return called[malignant].mean() + (~called[~malignant]).mean()

    best = max(map(youden, np.append(probability, 2)))
    assert youden(chosen["threshold"]) == pytest.approx(best)
    point = chosen["operating_point"]
    assert point["sensitivity"] + point["specificity"] == pytest.approx(best)
    assert (point["rule"], point["n_patients"], point["n_malignant"]) == ("youden", 24, 12)
    assert point["chosen_on"] == "the out-of-fold set"
    # The study's own numbers are at the thresholds of the folds.
    assert [row["threshold"] for row in study.arm.measured["folds"]] == [0.3, 0.6]


def test_three_patients_of_a_class_choose_nothing(study, capsys):
    images = study.arm.images
    few = images[images[schema.TUMOR_CLASS] == "benign"].index[:3]
    kept = images.loc[[*few, *images[images[schema.TUMOR_CLASS] == "malignant"].index]]
    chosen = crossval._chosen(kept, np.zeros((len(kept), 2)), 0.7, study.config)
    assert (chosen["temperature"], chosen["operating_point"]["rule"]) == (1, "prior")
    assert chosen["threshold"] == pytest.approx(0.7)
    assert "the out-of-fold set has 3 benign patients and 12 malignant patients" in capsys.readouterr().out
    benign = kept[kept[schema.TUMOR_CLASS] == "benign"]
    assert crossval._chosen(benign, np.zeros((3, 2)), 0.5, study.config) is None


@pytest.fixture(scope="module")
def ensemble(study):
    """URI of the bundle of both models."""
    config = study.config.model_copy(update={"export": "ensemble"})
    crossval._export(config, study.own, study.folds, study.arm, None)
    return f"{study.uri}/ensemble/model"


def test_the_ensemble_averages_the_models_at_the_choice_of_the_study(study, ensemble):
    whole = predictor.load(ensemble, "cpu")
    pixels = np.random.default_rng(0).integers(0, 255, (3, 32, 48, 3), np.uint8)
    models = [predictor.load(f"{fold.uri}/model", "cpu") for fold in study.folds]
    raw = [model.predict(pixels).logit * model.card.temperature for model in models]
    chosen = study.arm.measured["out_of_fold"]
    np.testing.assert_allclose(
        whole.predict(pixels).logit, np.mean(raw, 0) / chosen["temperature"], atol=1e-5
    )
    card = whole.card
    assert card.training["name"] == "crossval-ensemble"
    assert (card.study.kind, card.n_members, card.fold, card.validation) == (
        "ensemble",
        2,
        None,
        {"epoch": 3},
    )
    assert card.threshold == chosen["threshold"]
    assert card.metrics["pooled"] == study.arm.measured["pooled"]
    assert card.metrics["summary"]
    assert "folds" not in card.metrics
    assert card.warnings == ("of all",)
    distances = study.arm.images[schema.NOVELTY]
    assert card.feature_statistics.cutoff == pytest.approx(np.percentile(distances, 99))
    assert card.feature_statistics.n_training == len(distances) == planted.N_PATIENTS
    assert output.read_marker(study.uri, output.CROSSVAL)


def test_the_data_of_the_study_are_refused_or_marked_in_an_evaluation(study, ensemble):
    card, (table, facts) = bundle.read_card(ensemble), study.inspected
    rows = table.set_column(
        table.schema.get_field_index(schema.PHASH), schema.PHASH, pa.array(["0" * 64] * len(table))
    )
    config = EvaluateConfig(model=ensemble, data=study.config.data)
    training = TrainConfig(**card.training)
    with pytest.raises(
        DataError, match=r"is of a whole study, none .*24 of its images.* were seen in training"
    ):
        evaluate._tested(config, card, training, rows, facts)
    forced = config.model_copy(update={"force": True})
    _, marked, kind = evaluate._tested(forced, card, training, rows, facts)
    assert (kind, "were seen in training" in marked.warnings[0]) == (evaluate.FORCED, True)


def trained(config, run_uri, rows):
    """In place of `train.refit`: two epochs, of which the last is the best."""
    kept = []
    for epoch in (1, 2):
        network = untrained(0.05, seed=10 + epoch)
        folder = Path(run_uri) / "checkpoints" / str(epoch)
        folder.mkdir(parents=True)
        State(network, train_step.optimizer(network, TrainConfig(data="d")), [RECORD]).save(folder)
        metrics = {"epoch": epoch, SELECTION: float(epoch)}
        kept.append((ray.train.Checkpoint.from_directory(folder), metrics))
    return SimpleNamespace(best_checkpoints=kept)


def test_a_refit_is_the_last_epoch_with_the_choice_of_the_study(study, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "refit", lambda *given: seen.append(given) or trained(*given))
    monkeypatch.setattr(export.feature_statistics, "compute_statistics", statistics_here)
    config = study.config.model_copy(update={"export": "refit", "num_workers": "3"})
    crossval._export(config, study.own, study.folds, study.arm, study.inspected)
    ((whole, uri, rows),) = seen
    # The median of 3 and 6, the lower one; no fold is left out.
    assert (whole.epochs, whole.num_workers, whole.fold, whole.cross_folds) == (3, "3", None, None)
    assert set(rows[schema.PART].to_pylist()) == {"train"}
    assert len(rows) == planted.N_PATIENTS
    model = predictor.load(f"{uri}/model", "cpu")
    pixels = np.random.default_rng(0).integers(0, 255, (2, 32, 48, 3), np.uint8)
    chosen = study.arm.measured["out_of_fold"]
    last = predictor.from_state(
        untrained(0.05, seed=12).state_dict(), model.card.model_copy(update={"temperature": 1.0})
    )
    np.testing.assert_allclose(
        model.predict(pixels).logit, last.predict(pixels).logit / chosen["temperature"], atol=1e-5
    )
    assert (model.card.study.kind, model.card.n_members) == ("refit", 1)
    assert model.card.threshold == chosen["threshold"]
    cutoff = np.percentile(study.arm.images[schema.NOVELTY], 99)
    assert model.card.feature_statistics.cutoff == pytest.approx(cutoff)
    assert read_json(f"{uri}/run.json")["status"] == "finished"
    assert export.fault(uri) is None


def test_data_that_changed_since_are_not_trained_on_again(study, tmp_path):
    table, facts = study.inspected
    whole = crossval._of_all(study.config, study.folds[0], 3)
    with pytest.raises(DataError, match=r"has changed since .* 1 image gone"):
        crossval._refit(whole, f"{tmp_path}/refit", study.own, table, study.folds[0], (table.slice(1), facts))


@pytest.mark.parametrize(("changes", "n"), [({"k": 65}, 65), ({"k": 13, "repeats": 5}, 65)])
def test_an_export_has_so_many_models_at_most(changes, n):
    with pytest.raises(ConfigError, match=f"--export is for at most 64 models, not {n} in one protocol"):
        CrossvalConfig(data="d", export="ensemble", **changes)
    CrossvalConfig(data="d", **changes)
