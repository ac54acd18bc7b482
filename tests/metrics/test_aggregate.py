"""Images to slides, cases and patients, by hand."""

import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from bcd import schema
from bcd.errors import DataError
from bcd.metrics import aggregate


def predictions() -> pd.DataFrame:
    """Two slides of patient p1 (malignant), one of p2 (benign), an image of p2 that could not be read."""
    rows = [
        ("a", "s1", "p1", "malignant", 0.9, None),
        ("b", "s1", "p1", "malignant", 0.4, None),
        ("c", "s2", "p1", "malignant", 0.8, None),
        ("d", "s3", "p2", "benign", 0.5, None),
        ("e", "s3", "p2", "benign", None, "truncated"),
    ]
    names = (
        schema.IMAGE_ID,
        schema.SLIDE,
        schema.PATIENT,
        schema.TUMOR_CLASS,
        schema.PROBABILITY_MALIGNANT,
        schema.ERROR,
    )
    return pd.DataFrame(rows, columns=list(names))


def test_images_are_judged_at_the_threshold() -> None:
    images = aggregate.image_table(predictions(), threshold=0.5)
    assert images[schema.IMAGE_ID].tolist() == ["a", "b", "c", "d"]
    assert images[schema.PREDICTED_CLASS].tolist() == ["malignant", "benign", "malignant", "malignant"]
    assert images[aggregate.CORRECT].tolist() == [True, False, True, False]
    stricter = aggregate.image_table(predictions(), threshold=0.51)
    assert stricter[aggregate.CORRECT].tolist() == [True, False, True, True]


def test_the_margin_is_the_log_odds_above_the_threshold() -> None:
    images = aggregate.image_table(predictions(), threshold=0.8)
    # odds 9, 2/3, 4 and 1 against 4
    assert images[aggregate.MARGIN].tolist() == pytest.approx([math.log(o / 4) for o in (9, 2 / 3, 4, 1)])
    assert images[schema.PREDICTED_CLASS].tolist() == ["malignant", "benign", "malignant", "benign"]


@pytest.mark.parametrize("threshold", [0.0, 1e-30, 1e-8, 0.3, 0.5, 1 - 2**-25, 1.0])
def test_a_group_of_one_image_is_called_as_the_image_is(threshold: float) -> None:
    """Thresholds at, beside and between the probabilities, and where clipped log-odds are equal."""
    probability = np.unique([0, 1e-30, 1e-12, 0.5, 1 - 2**-24, 1, threshold, np.nextafter(threshold, 0)])
    rows = {schema.PROBABILITY_MALIGNANT: probability, schema.TUMOR_CLASS: "benign", schema.ERROR: None}
    names = [f"{i:02}" for i in range(len(probability))]
    images = aggregate.image_table(
        pd.DataFrame(rows | {schema.IMAGE_ID: names, schema.SLIDE: names}), threshold
    )
    slides = aggregate.groups(images, schema.SLIDE)
    assert images[aggregate.CORRECT].tolist() == (probability < threshold).tolist()
    assert slides[schema.PREDICTED_CLASS].tolist() == images[schema.PREDICTED_CLASS].tolist()
    assert ((images[aggregate.MARGIN] < 0) == images[aggregate.CORRECT]).all()


def test_groups_of_joined_models_go_by_the_mean_margin() -> None:
    frame = predictions()
    joined = pd.concat([aggregate.image_table(frame[:2], 0.5), aggregate.image_table(frame[2:3], 0.9)])
    patient = aggregate.groups(joined, schema.PATIENT).iloc[0]
    # odds 9 and 2/3 against 1, and 4 against 9
    margin = math.log(9 * (2 / 3) * (4 / 9)) / 3
    assert patient[aggregate.MARGIN] == pytest.approx(margin)
    assert patient[schema.PREDICTED_CLASS] == "malignant"
    # the probability knows no threshold
    odds = 24 ** (1 / 3)
    assert patient[schema.PROBABILITY_MALIGNANT] == pytest.approx(odds / (1 + odds))


def test_probabilities_before_the_temperature_are_kept_where_known() -> None:
    assert aggregate.image_table(predictions())[aggregate.UNCALIBRATED].isna().all()
    before = predictions().assign(**{aggregate.UNCALIBRATED: [0.99, 0.3, 0.9, 0.5, None]})
    assert aggregate.image_table(before)[aggregate.UNCALIBRATED].tolist() == [0.99, 0.3, 0.9, 0.5]


def test_an_arrow_table_gives_the_same() -> None:
    table = pa.Table.from_pandas(predictions().assign(evidence=[[0.0]] * 5))
    pd.testing.assert_frame_equal(
        aggregate.image_table(table),
        aggregate.image_table(predictions()),
        check_dtype=False,
        check_column_type=False,
    )


def test_the_unscored_are_named() -> None:
    assert aggregate.unscored(predictions()).to_dict("records") == [
        {schema.IMAGE_ID: "e", schema.ERROR: "truncated"}
    ]


def test_a_patient_is_the_logistic_of_the_mean_log_odds() -> None:
    patients = aggregate.groups(aggregate.image_table(predictions()), schema.PATIENT)
    assert patients[schema.PATIENT].tolist() == ["p1", "p2"]
    assert patients[schema.TUMOR_CLASS].tolist() == ["malignant", "benign"]
    assert patients[aggregate.N_IMAGES].tolist() == [3, 1]
    assert patients[aggregate.SHARE_CORRECT].tolist() == pytest.approx([2 / 3, 0])
    # odds 9, 2/3 and 4: their geometric mean is 24 ** (1/3)
    odds = 24 ** (1 / 3)
    assert patients[schema.PROBABILITY_MALIGNANT].tolist() == pytest.approx([odds / (1 + odds), 0.5])
    assert patients[schema.PREDICTED_CLASS].tolist() == ["malignant", "malignant"]


def test_slides_keep_their_patient_and_a_stable_order() -> None:
    images = aggregate.image_table(predictions())
    slides = aggregate.groups(images, schema.SLIDE)
    assert slides[[schema.SLIDE, schema.PATIENT, aggregate.N_IMAGES]].to_numpy().tolist() == [
        ["s1", "p1", 2],
        ["s2", "p1", 1],
        ["s3", "p2", 1],
    ]
    turned = aggregate.groups(images.iloc[::-1], schema.SLIDE)
    pd.testing.assert_frame_equal(slides, turned)


def test_certainty_is_finite() -> None:
    frame = predictions().assign(**{schema.PROBABILITY_MALIGNANT: np.array([1, 0, 1, 0.5, 0.5], np.float32)})
    images = aggregate.image_table(frame)
    assert np.isfinite(images[aggregate.LOG_ODDS]).all()
    patients = aggregate.groups(images, schema.PATIENT)
    assert 0.5 < patients[schema.PROBABILITY_MALIGNANT][0] < 1


def test_a_patient_with_both_classes_has_neither() -> None:
    frame = predictions()
    frame.loc[0, schema.TUMOR_CLASS] = "benign"
    patients = aggregate.groups(aggregate.image_table(frame), schema.PATIENT)
    assert patients[schema.TUMOR_CLASS].isna().tolist() == [True, False]


@pytest.mark.parametrize("level", [schema.SLIDE, schema.CASE, schema.PATIENT])
def test_nothing_known_gives_an_empty_table(level: str) -> None:
    nobody = predictions().drop(columns=[schema.PATIENT, schema.SLIDE])
    assert len(aggregate.groups(aggregate.image_table(nobody), level)) == 0


@pytest.mark.parametrize("column", [schema.TUMOR_CLASS, schema.PROBABILITY_MALIGNANT])
def test_an_image_that_cannot_be_measured_is_named(column: str) -> None:
    frame = predictions()
    frame.loc[1, column] = math.nan if column == schema.PROBABILITY_MALIGNANT else None
    with pytest.raises(DataError, match=f"'b' has no {column}"):
        aggregate.image_table(frame)
