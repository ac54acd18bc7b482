import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.special import expit, logit

from bcd import schema
from bcd.metrics import top_tiles

VALUES = (schema.TOP_PROBABILITY, schema.NOISY_OR)


def test_the_answers_are_of_the_highest_tiles():
    probability = np.array([0.2, 0.9, 0.1, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.35, 0.15, 0.25])
    answers = top_tiles.top_answers(probability, np.arange(12))
    top = np.sort(probability)[2:]
    assert answers[schema.TOP_TILES] == 10
    assert answers[schema.TOP_PROBABILITY] == pytest.approx(top.mean())
    assert answers[schema.NOISY_OR] == pytest.approx(1 - np.prod(1 - top))
    for value, low, high in zip(VALUES, top_tiles.LIMITS[::2], top_tiles.LIMITS[1::2], strict=True):
        assert 0 < answers[low] < answers[value] < answers[high] < 1


@pytest.mark.parametrize(
    ("probability", "expected"),
    [([], (0, None, None)), ([0.3], (1, 0.3, 0.3)), ([0.3, 0.5], (2, 0.4, 0.65)), ([1, 1], (2, 1, 1))],
)
def test_few_tiles_have_an_answer_of_those_that_there_are(probability, expected):
    """None of no tile; one tile, or one square, has no interval."""
    found = top_tiles.top_answers(np.array(probability, float), np.zeros(len(probability), int))
    assert found.keys() == set(top_tiles.ANSWERS)
    names = (schema.TOP_TILES, *VALUES)
    assert [found[name] for name in names] == [pytest.approx(value, abs=1e-6) for value in expected]
    assert [found[name] for name in top_tiles.LIMITS] == [None] * 4


def test_squares_that_do_not_differ_say_nothing():
    found = top_tiles.top_answers(np.full(40, 0.7), np.repeat(np.arange(4), 10))
    assert found[schema.TOP_PROBABILITY] == pytest.approx(0.7)
    assert [found[name] for name in top_tiles.LIMITS] == [None] * 4


def test_what_rounds_to_certainty_has_no_interval():
    """The noisy-or of ten tiles of which the model is certain; their mean has one."""
    probability = 1 - 10.0 ** -np.arange(3, 7).repeat(5)
    found = top_tiles.top_answers(probability, np.arange(20))
    assert found[schema.NOISY_OR] == 1
    assert [found[name] is None for name in top_tiles.LIMITS] == [False, False, True, True]


def test_the_same_tiles_have_the_same_answers_in_any_order():
    rng = np.random.default_rng(0)
    probability, square = rng.random(500), rng.integers(0, 30, 500)
    first = top_tiles.top_answers(probability, square)
    order = rng.permutation(500)
    assert top_tiles.top_answers(probability[order], square[order]) == first
    assert top_tiles.top_answers(probability.astype(np.float32), square) == pytest.approx(first, abs=1e-6)


def test_squares_have_a_side_of_two_millimetres():
    """Of each axis' own scale, by the centres of the tiles."""
    boxes = np.array(
        [[0, 0, 1000, 1000], [3400, 0, 1000, 1000], [3600, 0, 1000, 1000], [0, 7600, 1000, 1000]]
    )
    assert top_tiles.squares(boxes, (0.5, 0.25)).tolist() == [0, 0, 1, 2]
    assert top_tiles.squares(np.empty((0, 4), np.int32), (0.5, 0.5)).tolist() == []


@pytest.mark.parametrize("n_squares", [3, 200])
def test_a_resample_has_the_top_of_the_squares_that_were_drawn(n_squares):
    """As many squares as there are, each with all its tiles, compared with all of them sorted."""
    rng = np.random.default_rng(1)
    square = rng.integers(0, n_squares, 2_000)
    certain = np.sort(rng.random(2_000))[::-1]
    names = np.unique(square)
    taken, values = top_tiles._resamples(certain, square, 10, 50, 7)
    assert taken.shape == (50, len(values))
    assert (taken.sum(1) == 10).all()
    drawn = np.random.Generator(np.random.PCG64(7)).multinomial(
        n_squares, np.full(n_squares, 1 / n_squares), 50
    )
    if n_squares < top_tiles.DEPTH:  # then all squares are looked at, and the draws are these
        for times, row in zip(drawn, taken, strict=True):
            repeated = np.repeat(certain, times[np.searchsorted(names, square)])
            np.testing.assert_allclose(np.repeat(values, row), np.sort(repeated)[::-1][:10])
    else:
        means = [
            np.repeat(certain, rng.multinomial(n_squares, np.full(n_squares, 1 / n_squares))[square])[
                :10
            ].mean()
            for _ in range(400)
        ]
        assert (taken @ values / 10).mean() == pytest.approx(np.mean(means), abs=4 * np.std(means) / 7)


def tissue(rng, blur_mm, rows=60, columns=40):
    """Probabilities of tiles of 343 x 225 µm, 13.7 x 13.5 mm in all, that resemble those near them: the
    correlation of two places falls to 1/e at twice the blur."""
    blur = blur_mm / 0.2254, blur_mm / 0.343
    edge = int(4 * max(blur)) + 1
    noise = gaussian_filter(rng.standard_normal((rows + 2 * edge, columns + 2 * edge)), blur)
    # White noise has this deviation after the blur (a tile is its own where there is none).
    scale = np.sqrt(1 / (4 * np.pi * blur[0] * blur[1])) if blur_mm else 1
    return expit(-3 + 1.5 * noise[edge:-edge, edge:-edge] / scale).ravel()


@pytest.mark.trial
@pytest.mark.parametrize(("blur_mm", "least"), [(0, 0.9), (0.25, 0.86), (0.5, 0.84), (1, 0.78)])
def test_intervals_contain_the_mean_of_other_slides_of_the_same_tissue(blur_mm, least):
    """Printed: how often. The highest tiles depend on few places, so that it is below 95 in 100."""
    rng = np.random.default_rng(0)
    y, x = np.divmod(np.arange(2_400), 40)
    boxes = np.column_stack([700 * x, 460 * y, np.full(2_400, 700), np.full(2_400, 460)])
    square = top_tiles.squares(boxes, (0.49, 0.49))
    others = [np.sort(tissue(rng, blur_mm))[None, -10:] for _ in range(1_000)]
    truth = np.mean([top_tiles._log_odds(np.ones((1, 10)), top[0]) for top in others], 0).ravel()
    found = [top_tiles.top_answers(tissue(rng, blur_mm), square, 300) for _ in range(500)]
    limits = np.array([[one[name] for name in top_tiles.LIMITS] for one in found], float)
    limits = logit(limits[~np.isnan(limits).any(1)]).reshape(-1, 2, 2)
    contained = ((limits[..., 0] <= truth) & (truth <= limits[..., 1])).mean(0)
    print(f"blur {blur_mm} mm: {contained.round(3)} of {len(limits)} of {len(found)} slides")
    assert (contained >= least).all()
