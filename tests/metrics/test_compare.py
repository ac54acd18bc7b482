"""The paired test against planted differences: how often it is wrong, how often it sees, what it covers."""

import json
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bcd import schema
from bcd.errors import DataError
from bcd.metrics import aggregate, bootstrap, compare, measures
from tests.studies import Cohort, one_thread, planted, predictions

N_STUDIES, N_RESAMPLES = 500, 300


def images(seed: int = 0, threshold: float = 0.5) -> pd.DataFrame:
    """Predictions of one of several models on the same 12 patients."""
    frame = predictions()
    log_odds = aggregate.clipped_log_odds(frame[schema.PROBABILITY_MALIGNANT].to_numpy())
    log_odds += np.random.default_rng(seed).normal(0, 1, len(frame))
    return aggregate.image_table(frame.assign(probability_malignant=1 / (1 + np.exp(-log_odds))), threshold)


@cache
@one_thread
def trials(skill: float, other: float) -> list[dict[str, dict[str, Any]]]:
    """Simulated comparisons of two models whose skills are known; both look at the same patients."""
    cohorts = [Cohort(seed) for seed in range(N_STUDIES)]
    return [
        compare.paired(c.images(skill, 0), c.images(other, 1), c.seed, N_RESAMPLES)["metrics"]
        for c in cohorts
    ]


def share_significant(found: list[dict[str, dict[str, Any]]]) -> dict[str, float]:
    return {name: np.mean([row[name]["p_value"] < 0.05 for row in found]) for name in compare.METRICS}


@pytest.mark.trial
def test_models_that_are_equally_good_differ_in_one_study_of_twenty() -> None:
    """3 to 7 % of 500, their sampling error. The AUC depends on 24 benign patients and errs less often (3.4 %
    of 2,000 studies), so it has no lower bound here."""
    significant = share_significant(trials(1.7, 1.7))
    assert all(share <= 0.07 for share in significant.values()), significant
    assert all(share >= 0.03 for name, share in significant.items() if name != "auc"), significant


def test_a_planted_difference_is_found() -> None:
    significant = share_significant(trials(1.7, 1.3))
    assert min(significant[name] for name in planted(1.7)) > 0.95, significant


def test_intervals_cover_the_planted_difference() -> None:
    for name, value in planted(1.7).items():
        difference = value - planted(1.3)[name]
        found = [row[name]["interval"] for row in trials(1.7, 1.3)]
        covered = np.mean([low <= difference <= high for low, high in found])
        assert 0.93 <= covered <= 0.97, (name, covered)


def test_the_interval_is_narrower_than_without_pairing() -> None:
    """Both models fail on the same patients."""
    first, second = Cohort(0).images(1.7), Cohort(0).images(1.5, 1)
    low, high = compare.paired(first, second)["metrics"]["accuracy"]["interval"]
    own = [measures.with_intervals(table)["intervals"]["accuracy"] for table in (first, second)]
    assert high - low < 0.7 * np.hypot(*(np.ptp(interval) for interval in own))


def test_what_it_returns_by_hand() -> None:
    first, second = images(0), images(1)
    found = compare.paired(first, second, seed=3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["n_images"], found["n_patients"]) == (240, 12)
    assert found["interval"] == {"level": 0.95, "method": compare.METHOD, "n_resamples": 1000, "seed": 3}
    assert list(found["metrics"]) == [name for name in bootstrap.INTERVALS if name != "ece"]
    estimates = measures.estimates(first), measures.estimates(second)
    # Patients in the order of their images' ids: p0, p1, p10, p11, p2, ...
    drawn = bootstrap.draws(12, seed=3)
    one, other = (
        measures.tally_images(t.sort_values(schema.IMAGE_ID, kind="stable")).metrics(drawn)
        for t in (first, second)
    )
    # Student's t for twelve patients, and for the four malignant ones beside eight.
    for name, t in (("accuracy", 2.2010), ("sensitivity", 3.1824), ("auc", 3.1824), ("brier", 2.2010)):
        row = found["metrics"][name]
        assert (row["first"], row["second"]) == (estimates[0][name], estimates[1][name])
        assert row["difference"] == row["first"] - row["second"]
        reach = t * np.nanstd(one[name] - other[name])
        assert row["interval"] == pytest.approx(
            [row["difference"] - reach, row["difference"] + reach], abs=1e-4
        )


def test_p_is_below_one_in_twenty_where_the_interval_excludes_zero() -> None:
    for row in (row for found in trials(1.7, 1.3)[:100] for row in found.values()):
        low, high = row["interval"]
        assert (row["p_value"] < 0.05) == (low > 0 or high < 0)


def test_the_other_way_round_the_sign_changes() -> None:
    first, second = images(0), images(1)
    there, back = compare.paired(first, second)["metrics"], compare.paired(second, first)["metrics"]
    for name, row in there.items():
        low, high = row["interval"]
        assert back[name]["interval"] == pytest.approx([-high, -low])
        assert back[name]["p_value"] == pytest.approx(row["p_value"])


def test_a_model_beside_itself_makes_no_claim() -> None:
    found = compare.paired(images(), images())["metrics"]
    assert {row["difference"] for row in found.values()} == {0}
    assert {row["interval"] for row in found.values()} == {None}
    assert {row["p_value"] for row in found.values()} == {None}


def test_the_order_of_rows_does_not_matter() -> None:
    first, second = images(0), images(1)
    shuffled = [table.sample(frac=1, random_state=seed) for seed, table in enumerate((first, second))]
    assert compare.paired(*shuffled) == compare.paired(first, second)


def test_thresholds_are_those_of_the_tables() -> None:
    found = compare.paired(images(0, 0.3), images(0, 0.7))["metrics"]
    assert found["sensitivity"]["first"] > found["sensitivity"]["second"]
    assert found["specificity"]["first"] < found["specificity"]["second"]
    assert found["auc"]["p_value"] is None


def test_repeated_cross_validation_counts_patients_once() -> None:
    first, second = images(0), images(1)
    twice = [pd.concat([table, table]).sample(frac=1, random_state=0) for table in (first, second)]
    once, found = compare.paired(first, second), compare.paired(*twice)
    assert (found["n_images"], found["n_patients"]) == (240, 12)
    for name, row in found["metrics"].items():
        assert row["interval"] == pytest.approx(once["metrics"][name]["interval"])


def test_without_patients_there_is_no_interval() -> None:
    first, second = (images(seed).assign(patient=None) for seed in (0, 1))
    found = compare.paired(first, second)
    assert found["n_patients"] is None
    row = found["metrics"]["auc"]
    assert row["difference"] == row["first"] - row["second"] != 0
    assert (row["interval"], row["p_value"]) == (None, None)
    nobody = found["metrics"]["patient_recognition_rate"]
    assert set(nobody.values()) == {None}


def test_too_few_patients_make_no_claim() -> None:
    few = [t[t[schema.PATIENT].isin(["p0", "p4", "p5", "p6"])] for t in (images(0), images(1))]
    found = compare.paired(*few)["metrics"]
    assert found["specificity"]["difference"] is not None
    claims = {name for name, row in found.items() if row["p_value"] is not None}
    assert claims == {"accuracy", "sensitivity", "patient_recognition_rate", "brier"}
    benign = [t[t[schema.TUMOR_CLASS] == "benign"] for t in (images(0), images(1))]
    assert compare.paired(*benign)["metrics"]["auc"] == dict.fromkeys(
        ("first", "second", "difference", "interval", "p_value")
    )


def test_nothing_at_all_is_compared_without_a_word() -> None:
    found = compare.paired(images()[:0], images()[:0])
    assert found["n_images"] == 0
    assert all(set(row.values()) == {None} for row in found["metrics"].values())


def test_images_that_one_model_lacks_are_named() -> None:
    table = images()
    with pytest.raises(DataError, match=r"the second lacks 5 \(p0/0, p0/1, p0/2, and 2 more\).*same split"):
        compare.paired(table, table[5:])
    with pytest.raises(DataError, match=r"the second lacks 1 \(p0/0\) and the first lacks 1 \(p9/9\)"):
        compare.paired(table[table[schema.IMAGE_ID] != "p9/9"], table[1:])
    with pytest.raises(DataError, match=r"the first lacks 1 \(p0/3\)"):
        compare.paired(table, pd.concat([table, table[3:4]]))


@pytest.mark.parametrize(
    ("column", "other"), [(schema.PATIENT, "p9"), (schema.PATIENT, None), ("tumor_class", "benign")]
)
def test_images_of_another_patient_or_class_are_named(column: str, other: str | None) -> None:
    first, second = images(0), images(1)
    row = first.index[first[schema.IMAGE_ID] == "p5/7"]
    second.loc[row, column] = other
    with pytest.raises(DataError, match=rf"the {column} of 1 image differs \(p5/7\).*same index"):
        compare.paired(first, second)
