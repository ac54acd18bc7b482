import pytest

from bcd import taxonomy
from bcd.errors import ConfigError


def test_eight_subtypes_four_of_each_class():
    by_class = [s.tumor_class for s in taxonomy.SUBTYPES.values()]
    assert (by_class.count("benign"), by_class.count("malignant")) == (4, 4)
    assert [s.code for s in taxonomy.SUBTYPES.values()] == list(taxonomy.SUBTYPES)


def test_scale_follows_from_the_published_optics():
    # camera pixel 6.5 µm behind a 3.3x relay lens, objectives of a tenth of the label, rounded as published
    for magnification, objective in zip(taxonomy.MAGNIFICATIONS, (4, 10, 20, 40), strict=True):
        assert abs(taxonomy.MPP_BY_MAGNIFICATION[magnification] - 6.5 / 3.3 / objective) < 0.005


def test_class_order_puts_malignant_last_of_two():
    assert taxonomy.classes("tumor_class") == ("benign", "malignant")
    assert taxonomy.classes("subtype") == ("A", "F", "PT", "TA", "DC", "LC", "MC", "PC")


def test_malignant_mask():
    assert taxonomy.malignant_mask(("benign", "malignant")) == (False, True)
    assert taxonomy.malignant_mask(taxonomy.classes("subtype")) == (False,) * 4 + (True,) * 4


def test_a_publishers_class_names_the_tumor_class_that_it_counts_as():
    names = tuple(taxonomy.published_class(name, name == "TUM") for name in ("LYM", "TUM", "DC"))
    assert names == ("benign:LYM", "malignant:TUM", "benign:DC")
    assert taxonomy.malignant_mask(names) == (False, True, False)
    assert [taxonomy.tumor_class_of(name) for name in ("benign", "DC", *names)] == [
        *("benign", "malignant", "benign", "malignant", "benign")
    ]


def test_given_names_of_classes():
    assert taxonomy.given_names(["benign=0", "Malignant = Tumor Tissue", "malignant=2"]) == {
        "0": "benign",
        "tumor_tissue": "malignant",
        "2": "malignant",
    }
    assert taxonomy.given_names(["benign=benign"]) == {"benign": "benign"}


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["benign"], "--classes benign: expected benign=NAME malignant=NAME"),
        (["cancer=1"], "--classes cancer=1: expected benign=NAME malignant=NAME"),
        (["benign= "], "--classes benign= : expected"),
        (["benign=0", "malignant=0"], "--classes malignant=0: 0 is benign; a name has one class"),
        (["benign=Malignant"], "--classes benign=Malignant: malignant is malignant"),
        (["malignant=adenosis"], "--classes malignant=adenosis: adenosis is benign"),
    ],
)
def test_given_names_that_say_two_things(pairs, said):
    with pytest.raises(ConfigError, match=said):
        taxonomy.given_names(pairs)
