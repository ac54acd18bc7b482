import numpy as np
import pytest

from bcd.model import novelty


def test_moments_are_those_of_the_features():
    features = np.random.default_rng(0).normal(3, 2, (500, 8))
    mean, deviation = novelty.spread(500, features.sum(0), (features**2).sum(0))
    np.testing.assert_allclose(mean, features.mean(0))
    np.testing.assert_allclose(deviation, features.std(0))


def test_a_feature_that_never_moved_does_not_decide_alone():
    features = np.random.default_rng(0).normal(0, 1, (100, 100))
    features[:, 0] = 5
    mean, deviation = novelty.spread(100, features.sum(0), (features**2).sum(0))
    assert deviation[0] == pytest.approx(novelty.SMALLEST_SPREAD * features.std(0).mean(), rel=0.01)
    moved = features[:1].copy()
    moved[0, 0] += 1e-3
    near, far = (novelty.distance(one, mean, deviation)[0] for one in (features[:1], moved))
    assert far == pytest.approx(near, rel=0.01)


def test_all_features_alike_give_a_finite_distance():
    mean, deviation = novelty.spread(2, np.full(4, 2.0), np.full(4, 2.0))
    assert np.isfinite(novelty.distance(np.ones((1, 4)) + 1e-9, mean, deviation)).all()


def test_distance_counts_spreads():
    mean, deviation = [1.0, 2.0], [0.5, 4.0]
    found = novelty.distance(np.array([[1.0, 2.0], [2.0, 2.0], [1.5, 6.0]]), mean, deviation)
    np.testing.assert_allclose(found, [0, np.sqrt(4 / 2), 1])
    assert found.dtype == np.float32


def test_images_like_the_training_are_near_and_others_far():
    rng = np.random.default_rng(0)
    training = rng.normal(0, 1, (400, 50))
    mean, deviation = novelty.spread(400, training.sum(0), (training**2).sum(0))
    limit = novelty.cutoff(novelty.distance(rng.normal(0, 1, (300, 50)), mean, deviation))
    like = novelty.distance(rng.normal(0, 1, (1_000, 50)), mean, deviation)
    unlike = novelty.distance(rng.normal(1, 1, (1_000, 50)), mean, deviation)
    assert (like > limit).mean() < 0.03
    assert (unlike > limit).mean() > 0.7
    assert np.median(like) == pytest.approx(1, abs=0.05)


def test_the_sentence_has_the_numbers():
    assert "3.21" in novelty.warning_text(3.2111, 1.5)
    assert "1.50" in novelty.warning_text(3.2111, 1.5)


def test_a_warning_from_the_cut_off_on_as_the_table_stores_both():
    assert novelty.warning_codes(2.0, 1.9) == ["unlike_training_data"]
    assert (
        novelty.warning_codes(1.9, 1.9)
        == novelty.warning_codes(1.8, 1.9)
        == novelty.warning_codes(9.0, None)
        == []
    )
    # Apart in float64 and one number in float32: no warning that the columns do not show.
    assert novelty.warning_codes(1.9000000001, 1.9) == []
