import pytest

from bcd.model.recipes.stopping import is_over


@pytest.mark.parametrize(
    ("scores", "patience", "expected"),
    [
        ([], 2, False),
        ([0.5], 1, False),
        ([0.5, 0.4], 1, True),
        ([0.5, 0.4], 2, False),
        ([0.5, 0.4, 0.45], 2, True),
        ([0.5, 0.4, 0.6], 2, False),
        ([0.5, 0.6, 0.6, 0.6], 2, True),  # equal is no better
        ([0.9] + [0.1] * 99, 0, False),
    ],
)
def test_it_is_over_after_so_many_epochs_without_a_better_one(scores, patience, expected):
    assert is_over(scores, patience) is expected


def test_it_ends_at_the_epoch_of_the_rule():
    scores = [0.5, 0.7, 0.6, 0.65, 0.71, 0.7, 0.7, 0.7, 0.9]
    assert next(n for n in range(len(scores)) if is_over(scores[:n], 3)) == 8
