import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save
from sklearn.metrics import average_precision_score, roc_auc_score

from bcd import schema
from bcd.config.scoring import PoolConfig
from bcd.errors import BundleError, DivergedError
from bcd.training.pooling import attention, bags, labels
from tests.training.pooling.planted import SHARE, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """72 patients with a slide of 200 tiles, of which 4 may carry the class: slides, bags, planted tiles."""
    folder = tmp_path_factory.mktemp("study")
    scores, given, planted = write_study(folder, patients=72, tiles=200)
    config = PoolConfig(scores=scores, labels=given)
    scored = bags.read_slides(scores)
    parts = labels.split_slides(config, scored).parts
    return scored, parts, bags.load_bags(scores, parts[schema.SLIDE].to_pylist(), folder), planted


@pytest.fixture(scope="module")
def fitted(study):
    _, parts, held, _ = study
    return attention.fit_network(held, parts, seed=0, epochs=20, learning_rate=5e-4)


def of_test(study):
    """Names and classes of the test slides."""
    rows = [row for row in study[1].to_pylist() if row[schema.PART] == "test"]
    return [row[schema.SLIDE] for row in rows], [row[schema.TUMOR_CLASS] == "malignant" for row in rows]


def test_a_class_carried_by_few_tiles_is_found_by_attention_and_not_by_their_share(study, fitted):
    """On test patients, of whom each has one slide."""
    scored, _, held, planted = study
    names, truth = of_test(study)
    logits, table = attention.answer_bags(fitted.weights, held)
    margins = [logits[name][1] - logits[name][0] for name in names]
    assert roc_auc_score(truth, margins) >= 0.95
    shares = dict(
        zip(*(scored.table[c].to_pylist() for c in (schema.SLIDE, schema.MALIGNANT_TILE_SHARE)), strict=True)
    )
    assert roc_auc_score(truth, [shares[name] for name in names]) < 0.8
    for name in (name for name, malignant in zip(names, truth, strict=True) if malignant):
        rows = table.filter(
            pa.array([slide == name for slide in table[schema.SLIDE].to_pylist()])
        ).to_pylist()
        found = [row[schema.IMAGE_ID] in planted for row in rows]
        weighed = np.array([row[schema.ATTENTION] for row in rows])
        assert weighed.sum() == pytest.approx(1, abs=1e-5)
        assert sum(found) == round(SHARE * len(rows))
        assert average_precision_score(found, weighed) >= 0.9


def test_the_best_epoch_on_validation_is_kept(study, fitted):
    losses = [record["validation_loss"] for record in fitted.history]
    assert [record["epoch"] for record in fitted.history] == list(range(1, 21))
    assert losses[fitted.epoch - 1] == min(losses)
    logits, _ = attention.answer_bags(fitted.weights, study[2])
    rows = [row for row in study[1].to_pylist() if row[schema.PART] == "validation"]
    targets = torch.tensor([int(row[schema.TUMOR_CLASS] == "malignant") for row in rows])
    given = torch.tensor(np.array([logits[row[schema.SLIDE]] for row in rows]))
    train = [row for row in study[1].to_pylist() if row[schema.PART] == "train"]
    n = np.array([sum(row[schema.TUMOR_CLASS] == name for row in train) for name in ("benign", "malignant")])
    weight = torch.tensor(len(train) / (2 * n))[targets]
    loss = torch.nn.functional.cross_entropy(given, targets, reduction="none")
    assert float((weight * loss).mean()) == pytest.approx(min(losses), rel=1e-4)


def test_the_seed_decides(study):
    _, parts, held, _ = study
    one, again, other = (attention.fit_network(held, parts, seed, 1, 5e-4) for seed in (1, 1, 2))
    assert one == again
    assert one.weights != other.weights


def test_embeddings_are_standardised_over_the_training_tiles(study, fitted):
    _, parts, held, _ = study
    names = [row[schema.SLIDE] for row in parts.to_pylist() if row[schema.PART] == "train"]
    tiles = np.concatenate([held[name] for name in names]).astype(float)
    mean, spread, between = attention._statistics(held, names)
    np.testing.assert_allclose(mean, tiles.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(spread, tiles.std(0), rtol=1e-4)
    means = [held[name].astype(float).mean(0) for name in names]
    np.testing.assert_allclose(between, np.std(means, 0), rtol=1e-4)


def test_the_order_of_tiles_does_not_matter():
    torch.manual_seed(0)
    network = attention.GatedAttention(8).eval()
    tiles = torch.randn(50, 8)
    with torch.inference_mode():
        (logit, weighed), (turned, _) = network(tiles), network(tiles.flip(0))
        twice, halved = network(torch.cat([tiles, tiles]))
    torch.testing.assert_close(logit, turned)
    torch.testing.assert_close(logit, twice)  # a slide of twice as much tissue of one kind
    torch.testing.assert_close(halved[:50], weighed / 2)


def test_a_loss_that_is_no_number_ends_the_training(study):
    with pytest.raises(DivergedError, match="lower --learning-rate"):
        attention.fit_network(study[2], study[1], 0, 20, 1e30)


def test_weights_for_other_embeddings_are_refused(study):
    content = save(attention.GatedAttention(8).state_dict())
    with pytest.raises(BundleError, match="not one for embeddings of 32"):
        attention.answer_bags(content, study[2])
