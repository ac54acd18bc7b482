"""Sheets: harmless in a spreadsheet, and read again as a spreadsheet saves them."""

import csv
import io
import json

import pandas as pd
import pytest

from bcd import schema
from bcd.errors import DataError
from bcd.scoring.triage import sheet

NAMES = ["=1+1", "+a", "-b", "@SUM(A1)", "'=c", "'d", "e,f.png", 'g"h\n.png', " i", "\tj", "µ.png"]


def rows(names):
    return pd.DataFrame({schema.IMAGE_ID: names, schema.URI: names, schema.PROBABILITY_MALIGNANT: 0.25})


def filled(path, labels, separator=",", encoding="utf-8-sig"):
    """The sheet of `NAMES` as a spreadsheet saves it, with these labels."""
    table = list(csv.reader(io.StringIO(sheet.as_csv(rows(NAMES)).decode("utf-8-sig"))))
    at = table[0].index(schema.REVIEWED_CLASS)
    for row, label in zip(table[1:], labels, strict=True):
        row[at] = label
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(table)
    path.write_bytes(text.getvalue().encode(encoding))
    return str(path)


def test_no_cell_of_a_sheet_is_a_formula():
    table = list(csv.reader(io.StringIO(sheet.as_csv(rows(NAMES)).decode("utf-8-sig"))))
    assert table[0] == list(schema.TRIAGE)
    cells = [cell for row in table[1:] for cell in row]
    assert not [cell for cell in cells if cell.startswith(sheet.FORMULA)]
    assert [row[0] for row in table[1:3]] == ["'=1+1", "'+a"]
    assert table[1][table[0].index(schema.PROBABILITY_MALIGNANT)] == "0.25"


@pytest.mark.parametrize(("separator", "encoding"), [(",", "utf-8-sig"), (";", "utf-8"), ("\t", "utf-16")])
def test_labels_come_back_for_any_name(tmp_path, separator, encoding):
    labels = ["benign", "Malignant", "DC", "ductal carcinoma", "exclude", "", "n/a", "A", "b", "benign", "PT"]
    labels[8] = "fibroadenoma"
    found = sheet.read_sheet(filled(tmp_path / "a.csv", labels, separator, encoding), NAMES)
    expected = [("benign", None), ("malignant", None), ("malignant", "DC"), ("malignant", "DC"), (None, None)]
    expected += [None, None, ("benign", "A"), ("benign", "F"), ("benign", None), ("benign", "PT")]
    assert found == {name: label for name, label in zip(NAMES, expected, strict=True) if label}


def test_what_is_no_label_is_named_with_its_line(tmp_path):
    labels = ["", "maybe", *[""] * 9]
    with pytest.raises(
        DataError, match=r"a.csv, line 3: reviewed_class 'maybe'; expected benign, malignant, A"
    ):
        sheet.read_sheet(filled(tmp_path / "a.csv", labels), NAMES)
    labels[1] = "benign"
    with pytest.raises(DataError, match=r"line 3: no result for image \"'\+a\" in --scores"):
        sheet.read_sheet(filled(tmp_path / "a.csv", labels), NAMES[2:])
    (tmp_path / "b.csv").write_text("image_id,reviewed_class\nx,benign\nx,malignant\n")
    with pytest.raises(DataError, match=r"line 3: image 'x' has another reviewed_class above"):
        sheet.read_sheet(str(tmp_path / "b.csv"), ["x"])
    (tmp_path / "c.csv").write_text("image_id,label\nx,benign\n")
    with pytest.raises(DataError, match="no column 'reviewed_class'"):
        sheet.read_sheet(str(tmp_path / "c.csv"), ["x"])


def test_fiftyone_gets_label_confidence_and_attributes():
    shown = pd.DataFrame(
        {
            schema.IMAGE_ID: ["a", "b"],
            schema.URI: ["/in/a.png", "/in/b.png"],
            schema.PROBABILITY_MALIGNANT: [0.75, 0.25],
            schema.PREDICTED_CLASS: ["malignant", "F"],
            schema.REASON: ["wrong", "least_certain"],
            schema.TUMOR_CLASS: ["benign", None],
            schema.PATIENT: [None, "p"],
        }
    )
    files = sheet.as_fiftyone(shown)
    assert json.loads(files["data.json"]) == {"000000": "/in/a.png", "000001": "/in/b.png"}
    found = json.loads(files["labels.json"])
    assert found["classes"] is None
    first = {"image_id": "a", "reason": "wrong", "tumor_class": "benign"}
    second = {"image_id": "b", "reason": "least_certain", "patient": "p"}
    assert found["labels"] == {
        "000000": {"label": "malignant", "confidence": 0.75, "attributes": first},
        "000001": {"label": "F", "confidence": 0.75, "attributes": second},
    }
