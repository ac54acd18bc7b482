import pandas as pd
import pytest

from bcd import schema
from bcd.data import names


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("007", "007"),
        (7, "7"),
        (12.0, "12"),
        (12.5, "12.5"),
        ("12.00", "12"),
        ("1.0.0", "1.0.0"),
        ("-3.0", "-3"),
        (" P  1\t", "P 1"),
        ("P\u200b1", "P1"),
        ("e\u0301", "\u00e9"),
        ("\uff30\uff11", "P1"),
        ("NA", "NA"),
    ],
)
def test_an_id_is_written_in_one_way(written, expected):
    assert names.identity(written) == expected


@pytest.mark.parametrize(
    "nothing", [None, float("nan"), pd.NA, pd.NaT, "", " ", "nan", "NaN", "None", "#N/A"]
)
def test_nothing_is_no_id(nothing):
    assert names.identity(nothing) is None


@pytest.mark.parametrize(
    ("one", "other"), [("P1", "p1"), ("P01", "P1"), ("P-1", "P_1"), ("14-2523", "142523"), ("A/P1", "A/p.01")]
)
def test_ids_that_are_alike_are_named(one, other):
    first, second = sorted((one, other))
    assert names.doubtful_ids([one, None, other, one], "patient") == [
        f"patient ids differ only in case, zeros or punctuation: {first!r} and {second!r}. They count as "
        "different patients: write the id of one patient in one way"
    ]


def test_ids_that_differ_are_not():
    assert (
        names.doubtful_ids(["14-22549AB", "14-22549CD", "10", "100", "0", "A/P1", "F/P1", "é"], "case") == []
    )


def test_rounded_ids_are_named():
    (warning,) = names.doubtful_ids(["1.23457E+11", "12"], "patient")
    assert warning.startswith("patient ids were rounded by a spreadsheet: '1.23457E+11'.")


@pytest.mark.parametrize("written", ["tumor_class", " Tumor Class", "\ufeffTUMOR-CLASS", "Tumor\u00a0class "])
def test_headers_are_forgiven(written):
    assert names.column(written, {schema.TUMOR_CLASS}) == schema.TUMOR_CLASS
    assert names.column(written, {schema.PATIENT}) == written


@pytest.mark.parametrize(
    ("column", "ours"),
    [
        ("patient_id", "patient"),
        ("Label", "tumor_class"),
        ("split", "part"),
        ("fold", "part"),
        ("Mag", "magnification"),
    ],
)
def test_a_column_that_looks_like_ours_is_named(column, ours):
    assert names.unused_columns(["uri", "notes", column]) == [
        f"column {column!r} is not used; call it {ours!r} to use it"
    ]
    assert names.unused_columns([ours, column]) == [f"column {column!r} is not used; the column {ours!r} is"]


@pytest.mark.parametrize("written", ["Hospital", "centre "])
def test_a_column_of_hospitals_is_named(written):
    assert names.unused_columns(["uri", "patient", written]) == [
        f"column {written!r} is not used; call it 'site' to use it"
    ]


def test_a_number_that_two_hospitals_use_is_named():
    assert names.shared_ids(["1", "2", "1", None, "2"], ["A", "A", "A", "B", None]) == []
    (warning,) = names.shared_ids(["1", "2", "1"], ["B", "A", "A"])
    assert warning.startswith("patient ids occur at several sites: '1' at A, B. Each counts as one patient")


def test_only_the_first_of_many_columns_are_named():
    columns = [f"feature {i}" for i in range(500)]
    said = names.instead([*columns, "label"])
    assert said.startswith("it has feature 0, feature 1, ")
    assert said.endswith(", and 491 more; column 'label' is not used; call it 'tumor_class' to use it")
