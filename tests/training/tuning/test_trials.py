"""Trials in their order, and the page that shows them."""

import re

import pytest

from bcd.training.tuning import trials
from bcd.training.tuning.trials import Trial

FACTS = {"title": "Search: s", "n_epochs": 3, "n_images": 40, "n_patients": 12, "is_choosable": True}
FACTS |= {"synthetic": False, "command": "python jobs/tune.py"}


def record(epoch, score, loss):
    return {
        "epoch": epoch,
        "validation_balanced_accuracy": score,
        "validation_loss": loss,
        "selection": score - 1e-3 * loss,
    }


MADE = [
    Trial(number=1, settings={"dropout": 0.123456}, epochs=[record(1, 0.6, 0.7), record(2, 0.9, 0.4)]),
    Trial(number=2, settings={"dropout": 0.2}, epochs=[record(1, 0.9, 0.3), record(2, 0.8, 0.5)]),
    Trial(number=3, settings={"dropout": 0.3}, epochs=[], failure="the loss is no longer finite"),
    Trial(number=4, settings={"dropout": 0.4}, epochs=[record(1, 0.5, 0.7)]),
]


def test_the_best_epoch_counts_and_the_loss_decides_between_equals():
    assert [trial.number for trial in trials.ranked(MADE)] == [2, 1, 4, 3]
    assert MADE[0].best == record(2, 0.9, 0.4)
    assert MADE[2].best is None


def test_settings_are_written_as_flags():
    given = {"learning_rate": 0.000123456, "batch_size": 32, "optimizer": "sgd"}
    assert trials.chosen_flags(given) == "--learning-rate 0.000123 --batch-size 32 --optimizer sgd"


@pytest.mark.parametrize("few", [False, True])
def test_the_page_shows_every_trial_and_that_the_best_is_too_good(few):
    page = trials.render_search(MADE, FACTS | {"is_choosable": not few})
    text = " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S).split())
    assert "Trial 2 of 4 trials is the best on 40 validation images of 12 patients" in text
    assert "The best of many is better here than on others" in text
    assert 'href="best/report.html"' in page
    assert "3 --dropout 0.3 the loss is no longer finite 0 of 3 – – –" in text
    assert re.search(r"1 --dropout 0.123 2 of 3 90\.0.% 0\.400 2", text)
    assert ("Too few validation patients to compare trials" in text) == few
    assert "best: trial 2" in text
