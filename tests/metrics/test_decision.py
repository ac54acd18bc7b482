"""The threshold against all thresholds there are; abstention by hand."""

import numpy as np
import pandas as pd
import pytest

from bcd import schema
from bcd.metrics import aggregate, decision


def validation(seed: int, n: int = 60, digits: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Truth and probability of images that overlap; rounded to digits, many are tied."""
    generator = np.random.default_rng(seed)
    truth = np.r_[True, False, generator.random(n - 2) < 0.6]
    probability = 1 / (1 + np.exp(-generator.normal(np.where(truth, 1, -1), 1.2)))
    return truth, (probability if digits is None else probability.round(digits)).astype(np.float32)


def reached(truth: np.ndarray, probability: np.ndarray, threshold: float) -> tuple[float, float]:
    """Sensitivity and specificity, the plain way."""
    called = probability >= threshold
    return called[truth].sum() / truth.sum(), (~called)[~truth].sum() / (~truth).sum()


def everything(truth: np.ndarray, probability: np.ndarray) -> list[tuple[float, float]]:
    """Sensitivity and specificity of every threshold that calls anything differently."""
    return [reached(truth, probability, t) for t in [0.0, *np.unique(probability), np.inf]]


@pytest.mark.parametrize("digits", [None, 1, 2])
@pytest.mark.parametrize("target", [0.5, 0.8, 0.95, 1.0])
def test_a_target_is_met_by_the_fewest_that_reach_it(target: float, digits: int | None) -> None:
    for seed in range(30):
        truth, probability = validation(seed, digits=digits)
        chosen = decision.choose_threshold(truth, probability, target)
        found = chosen["sensitivity"], chosen["specificity"]
        assert found == reached(truth, probability, chosen["threshold"])
        reaching = [pair for pair in everything(truth, probability) if pair[0] >= target]
        assert found[0] == min(sensitivity for sensitivity, _ in reaching)
        assert found[1] == max(specificity for _, specificity in reaching)
        if digits is None:
            assert round(found[0] * truth.sum()) == int(np.ceil(target * truth.sum() - 1e-9))
        assert (chosen["rule"], chosen["target_sensitivity"]) == ("sensitivity", target)


@pytest.mark.parametrize("digits", [None, 1, 2])
def test_youdens_index_is_greatest(digits: int | None) -> None:
    for seed in range(30):
        truth, probability = validation(seed, digits=digits)
        chosen = decision.choose_threshold(truth, probability)
        found = chosen["sensitivity"], chosen["specificity"]
        assert found == reached(truth, probability, chosen["threshold"])
        assert sum(found) == pytest.approx(max(map(sum, everything(truth, probability))))
        assert (chosen["rule"], chosen["target_sensitivity"]) == ("youden", None)
        assert (chosen["n_malignant"], chosen["n_benign"]) == (truth.sum(), (~truth).sum())


def test_of_equally_good_thresholds_the_nearest_to_a_half() -> None:
    # Both 0.25 (sensitivity 1, specificity 1/2) and 0.7 (1/2 and 1) reach an index of 1.5.
    truth = np.array([0, 1, 0, 1], bool)
    assert decision.choose_threshold(truth, np.array([0.1, 0.4, 0.6, 0.8]))["threshold"] == pytest.approx(0.7)
    assert decision.choose_threshold(truth, np.array([0.2, 0.4, 0.8, 0.9]))["threshold"] == pytest.approx(0.3)


def test_a_half_where_it_calls_the_same() -> None:
    truth = np.array([0, 0, 1, 1], bool)
    for target in (None, 1.0):
        chosen = decision.choose_threshold(truth, np.array([0.1, 0.2, 0.51, 0.9]), target)
        assert (chosen["threshold"], chosen["sensitivity"], chosen["specificity"]) == (0.5, 1, 1)


def test_the_prior_in_place_of_a_choice() -> None:
    truth, probability = np.array([0, 0, 1, 1], bool), np.array([0.1, 0.65, 0.6, 0.9])
    chosen = decision.choose_threshold(truth, probability, prior=0.7)
    assert (chosen["threshold"], chosen["rule"]) == (pytest.approx(0.7), "prior")
    assert (chosen["sensitivity"], chosen["specificity"]) == (0.5, 1)
    # A sensitivity that was asked for is reached all the same.
    asked = decision.choose_threshold(truth, probability, 1.0, prior=0.7)
    assert asked == decision.choose_threshold(truth, probability, 1.0)


@pytest.mark.parametrize(("n_benign", "enough"), [(0, False), (decision.MIN_CHOOSING - 1, False), (99, True)])
def test_few_patients_choose_nothing(n_benign: int, enough: bool) -> None:
    assert decision.is_choosable({"benign": n_benign, "malignant": decision.MIN_CHOOSING}) == enough
    assert decision.is_choosable(None)


def test_a_half_that_was_seen_is_no_threshold() -> None:
    chosen = decision.choose_threshold(np.array([0, 1, 1], bool), np.array([0.2, 0.5, 0.9]))
    assert chosen["threshold"] == pytest.approx(0.35)


def test_a_target_is_not_surpassed_even_where_that_costs_nothing() -> None:
    """What was asked for, and no alarm more: of ten malignant images nine."""
    truth = np.repeat([False, True], 10)
    chosen = decision.choose_threshold(truth, np.r_[np.full(10, 0.05), np.linspace(0.5, 0.95, 10)], 0.9)
    assert (chosen["sensitivity"], chosen["specificity"]) == (0.9, 1)
    assert chosen["threshold"] == pytest.approx(0.525)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_image_crosses_by_rounding(dtype: type) -> None:
    """Probabilities of sure models crowd near 0 and 1, some of them neighbours in float32."""
    generator = np.random.default_rng(0)
    for seed in range(50):
        truth = np.r_[True, False, generator.random(30) < 0.5]
        probability = 1 / (1 + np.exp(-generator.normal(0, 12, 32).astype(dtype)))
        if seed % 2:  # one after the other
            probability = (1 - np.arange(32) * 2.0**-24).astype(dtype)
        kept = probability.astype(np.float32)
        for target in (None, 0.9):
            chosen = decision.choose_threshold(truth, probability, target)
            threshold = chosen["threshold"]
            assert threshold == np.float32(threshold)
            called = kept >= np.float32(threshold)
            np.testing.assert_array_equal(called, kept.astype(float) >= threshold)
            assert chosen["sensitivity"] == called[truth].mean()
            below, above = kept[~called].max(initial=-1), kept[called].min(initial=2)
            between = np.nextafter(below, np.float32(2)) < above
            assert below < threshold <= above
            assert not between or threshold < above


def test_everything_can_be_called_malignant() -> None:
    """Even a malignant image of probability 0, or one that is 0 in float32."""
    for smallest in (0.0, 1e-60, 1e-45, 0.01):
        chosen = decision.choose_threshold(np.array([1, 0, 1], bool), np.array([smallest, 0.3, 1.0]), 1.0)
        assert (chosen["sensitivity"], chosen["specificity"]) == (1, 0)


def test_all_alike_are_all_called_or_none() -> None:
    chosen = decision.choose_threshold(np.array([1, 0], bool), np.array([0.7, 0.7]))
    assert chosen["sensitivity"] + chosen["specificity"] == 1
    assert chosen["threshold"] == 0.5


def images(rows: list[tuple[str | None, float]], threshold: float = 0.5) -> pd.DataFrame:
    columns = [schema.TUMOR_CLASS, schema.PROBABILITY_MALIGNANT]
    table = pd.DataFrame(rows, columns=columns).assign(**{schema.IMAGE_ID: "x", schema.ERROR: None})
    return aggregate.image_table(table, threshold)


def test_abstention_by_hand() -> None:
    # From the surest on: right, wrong, right, right, wrong.
    rows = [("malignant", 0.9), ("benign", 0.6), ("benign", 0.9), ("benign", 0.3), ("benign", 0.01)]
    curve = decision.abstention_curve(images(rows))
    assert curve["n_kept"].tolist() == [5, 4, 3, 2, 1]
    assert curve["handed_over"].tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    # two are equally sure: the first in the table is kept longer
    assert curve["accuracy"].tolist() == pytest.approx([3 / 5, 3 / 4, 2 / 3, 1, 1])


def test_certainty_is_the_distance_from_the_threshold() -> None:
    rows = [("malignant", 0.9), ("benign", 0.5)]
    assert decision.abstention_curve(images(rows, 0.5))["accuracy"].tolist() == [0.5, 1]
    # at 0.9 the first is called malignant with nothing to spare
    assert decision.abstention_curve(images(rows[::-1], 0.9))["accuracy"].tolist() == [1, 1]
    assert decision.abstention_curve(images([("malignant", 0.89), ("benign", 0.5)], 0.9))[
        "accuracy"
    ].tolist() == [
        0.5,
        1,
    ]


def test_abstention_of_groups_leaves_out_those_of_unknown_class() -> None:
    table = images([("malignant", 0.9), ("benign", 0.2), ("malignant", 0.4), ("benign", 0.3)])
    table[schema.PATIENT] = ["p", "q", "r", "r"]
    curve = decision.abstention_curve(aggregate.groups(table, schema.PATIENT))
    assert curve["n_kept"].tolist() == [2, 1]
    assert curve["accuracy"].tolist() == [1, 1]


def test_abstention_of_nothing() -> None:
    assert len(decision.abstention_curve(images([]))) == 0


def calls(n_patients: int, seed: int = 0) -> pd.DataFrame:
    """Images of patients of both classes, 1 to 6 each, many of them wrong."""
    generator = np.random.default_rng(seed)
    patient = np.repeat(np.arange(n_patients), 1 + np.arange(n_patients) % 6)
    truth = np.where(patient % 2, "malignant", "benign")
    probability = 1 / (1 + np.exp(-generator.normal(np.where(patient % 2, 1, -1), 1.5)))
    table = images(list(zip(truth, probability, strict=True)))
    return table.assign(**{schema.PATIENT: [f"p{i}" for i in patient]})


def test_class_sets_by_hand() -> None:
    """Each patient without those of one other: the smallest cut-off that suffices for nine tenths of all and
    one more, by the plain definition."""
    table = calls(12)
    found = decision.class_sets(table)
    rows = list(
        zip(table[schema.PATIENT], table[aggregate.MARGIN].abs(), table[aggregate.CORRECT], strict=True)
    )

    def cutoff(without: str | None) -> float:
        others = [row for row in rows if row[0] != without]
        patients = {row[0] for row in others}
        for reach in sorted({0.0, *(margin for _, margin, _ in others)}):
            shares = [
                np.mean([right or margin <= reach for p, margin, right in others if p == patient])
                for patient in patients
            ]
            if sum(shares) / (len(patients) + 1) >= 0.9 - 1e-9:
                return reach
        raise AssertionError

    reach = {patient: cutoff(patient) for patient in table[schema.PATIENT].unique()}
    both = [margin <= reach[patient] for patient, margin, _ in rows]
    covered = pd.Series([right or two for (_, _, right), two in zip(rows, both, strict=True)], dtype=float)
    share = covered.groupby(table[schema.PATIENT]).mean()
    assert found is not None
    assert found["cutoff"] == cutoff(None)
    assert found["both"] == np.mean(both)
    assert 0.3 < found["both"] < 1
    assert found["coverage"] == pytest.approx(share.mean())
    malignant = share[[f"p{i}" for i in range(1, 12, 2)]].mean()
    assert found["coverage_by_class"]["malignant"] == pytest.approx(malignant)


def test_sets_of_few_or_unknown_patients_are_not_stated() -> None:
    found = decision.class_sets(calls(9))
    assert found is not None
    assert (found["n_patients"], found["cutoff"], found["coverage"]) == (9, None, None)
    enough = decision.class_sets(calls(10))
    assert enough is not None
    assert enough["cutoff"] is not None
    assert decision.class_sets(calls(12).assign(**{schema.PATIENT: None})) is None


def test_sets_keep_their_level_on_patients_alike() -> None:
    """Mean over studies whose patients differ much, and over new patients of each."""
    covered = []
    for seed in range(40):
        table = calls(24, seed)
        shift = np.random.default_rng(seed).normal(0, 2, 24)[table[schema.PATIENT].str[1:].astype(int)]
        log_odds = table[aggregate.LOG_ODDS] + shift
        table = images(list(zip(table[schema.TUMOR_CLASS], 1 / (1 + np.exp(-log_odds)), strict=True))).assign(
            **{schema.PATIENT: table[schema.PATIENT]}
        )
        is_new = table[schema.PATIENT].isin([f"p{i}" for i in range(12)])
        found = decision.class_sets(table[~is_new])
        assert found is not None
        new = table[is_new]
        right = new[aggregate.CORRECT] | (new[aggregate.MARGIN].abs() <= found["cutoff"])
        covered.append(right.groupby(new[schema.PATIENT]).mean().mean())
    assert 0.88 < np.mean(covered) < 0.99
