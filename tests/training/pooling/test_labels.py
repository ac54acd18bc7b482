import numpy as np
import pyarrow as pa
import pytest

from bcd import schema
from bcd.config.scoring import PoolConfig
from bcd.errors import DataError, LeakageError
from bcd.training.pooling import bags, labels
from tests.training.pooling.planted import failed, tiles_of, write_labels, write_scores

RNG = np.random.default_rng(0)


def bag(name, **columns):
    return tiles_of(name, RNG.normal(size=(3, 8)), RNG.uniform(0.1, 0.9, 3), **columns)


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Slides a to l with tiles, a copy of a, and one that could not be read."""
    tables = [bag(name) for name in "abcdefghijkl"]
    copy = tables[0].set_column(2, schema.SLIDE, pa.array(["copy"] * 3))
    uri = write_scores(tmp_path_factory.mktemp("scores"), pa.concat_tables([*tables, copy, failed("broken")]))
    return bags.read_slides(uri)


def row(slide, tumor_class=None, patient=None, **more):
    chosen = tumor_class or ("benign" if slide < "g" else "malignant")
    return {"slide": slide, "tumor_class": chosen, "patient": patient or f"p-{slide}"} | more


def divided(tmp_path, scored, rows, **settings):
    given = write_labels(tmp_path / "labels.csv", rows)
    return labels.split_slides(PoolConfig(scores="s", labels=given, **settings), scored)


ALL = [row(name) for name in "abcdefghijkl"]


def test_labelled_slides_are_divided_by_patient(tmp_path, scored):
    """Two slides of each patient, who differ in spelling only where a spreadsheet did it."""
    rows = [
        row(name, "benign" if i < 6 else "malignant", f"{i // 2}{'.0' * (i % 2)}")
        for i, name in enumerate("abcdefghijkl")
    ]
    found = divided(tmp_path, scored, rows, validation_fraction=0.34, test_fraction=0.33)
    parts = {row[schema.SLIDE]: row for row in found.parts.to_pylist()}
    assert len(parts) == 12
    assert {row[schema.PART] for row in parts.values()} == {"train", "validation", "test"}
    for first, second in ("ab", "cd", "ef", "gh", "ij", "kl"):
        assert parts[first][schema.PART] == parts[second][schema.PART]
    assert parts["a"][schema.IMAGE_ID] == "a"


def test_slides_and_labels_without_the_other_are_named_and_left_out(tmp_path, scored):
    rows = [*ALL[:-1], row("zz"), row("broken")]
    found = divided(tmp_path, scored, rows)
    assert found.parts[schema.SLIDE].to_pylist() == list("abcdefghijk")
    assert found.others[schema.SLIDE].to_pylist() == ["broken"]
    assert found.warnings[:3] == [
        "1 label without a scored slide: zz",
        "2 scored slides without a label: copy, l",
        "1 labelled slide without a tile that has a result: left out",
    ]


def test_copies_with_two_labels_are_quarantined(tmp_path, scored):
    found = divided(tmp_path, scored, [*ALL, row("copy", "malignant")])
    assert found.others[schema.SLIDE].to_pylist() == ["a", "copy"]
    assert "duplicates with several patients or labels, all quarantined: a, copy" in found.warnings


def test_a_slide_may_be_named_twice_with_one_label(tmp_path, scored):
    twice = divided(tmp_path, scored, [*ALL, ALL[0]])
    assert twice.parts.equals(divided(tmp_path, scored, ALL).parts)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [*ALL, row("a", "malignant")],
            "labels.csv, line 14: the tumor_class of slide a is malignant, in line 2 it is benign",
        ),
        ([*ALL, row("a", patient="q")], "line 14: the patient of slide a is q, in line 2 it is p-a"),
        ([row("")], "line 2: the slide is empty"),
        ([row("a", "unsure")], "line 2: unknown tumor_class 'unsure'"),
        ([row("a", " ")], "line 2: the tumor_class is empty"),
        ([{"name": "a", "tumor_class": "benign"}], "needs a column 'slide' or 'image_id'; it has name"),
        (
            [{"slide": "a", "label": "1"}],
            "needs a column 'tumor_class' or 'subtype'; .* call it 'tumor_class'",
        ),
        (
            [row("a.svs"), row("b.svs")],
            "no label of .* is of a slide in .*: it names a.svs, b.svs, .* called a, b",
        ),
        ([row(name, "benign") for name in "abcdef"], "class malignant has 0 patient"),
        ([{"slide": "a", "tumor_class": "benign"}, {"slide": "g", "tumor_class": "malignant"}], "no patient"),
        ([row("a", part="train"), row("g", part="")], "g is in no part, others are"),
    ],
)
def test_labels_that_cannot_be_used_are_refused(tmp_path, scored, rows, said):
    with pytest.raises(DataError, match=said):
        divided(tmp_path, scored, rows)


def test_given_parts_may_not_divide_a_patient(tmp_path, scored):
    parts = dict(zip("abcdefghijkl", ["train", "train", "validation", "test"] * 3, strict=True))
    rows = [row(name, "benign" if name in "abcdij" else "malignant", part=parts[name]) for name in parts]
    found = divided(tmp_path, scored, rows)
    assert {row[schema.SLIDE]: row[schema.PART] for row in found.parts.to_pylist()} == parts
    rows[3]["patient"] = rows[0]["patient"]
    with pytest.raises(LeakageError, match=r"patient p-a is in train .* and in test"):
        divided(tmp_path, scored, rows)


def test_patients_of_labels_and_scores_must_agree(tmp_path):
    tables = [bag(name, patient=[f"p{i}"] * 3) for i, name in enumerate("abcdefghijkl")]
    scored = bags.read_slides(write_scores(tmp_path / "scores", *tables))
    without = [{name: value for name, value in one.items() if name != "patient"} for one in ALL]
    found = divided(tmp_path, scored, without)
    assert found.parts[schema.PATIENT].to_pylist() == [f"p{i}" for i in range(12)]
    with pytest.raises(DataError, match="slide a is of patient p-a in the labels, of p0 in the scores"):
        divided(tmp_path, scored, ALL)


def test_classes_may_have_other_names_and_slides_another_column(tmp_path, scored):
    rows = [
        {
            "image_id": one["slide"],
            "tumor_class": "01"[one["tumor_class"] == "malignant"],
            "patient": one["slide"],
        }
        for one in ALL
    ]
    found = divided(tmp_path, scored, rows, classes=("benign=0", "malignant=1"))
    expected = ["benign"] * 6 + ["malignant"] * 6
    assert found.parts[schema.TUMOR_CLASS].to_pylist() == expected
