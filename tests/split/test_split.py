"""Groups stay together, shares are balanced, and every leak is detected."""

import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import strategies as st

from bcd import schema
from bcd.config.options import Protocol
from bcd.data import breakhis
from bcd.errors import ConfigError, DataError, LeakageError
from bcd.split import quarantine, split, stratify
from bcd.storage import File
from bcd.taxonomy import LEFT_OUT, SUBTYPES, TUMOR_CLASSES, part_named

SEEDS = range(8)


def row(name: str, patient: str | None, subtype: str | None, **more: str | None) -> dict[str, str | None]:
    known = {schema.SUBTYPE: subtype, schema.TUMOR_CLASS: SUBTYPES[subtype].tumor_class} if subtype else {}
    return {schema.IMAGE_ID: name, schema.URI: name, schema.PATIENT: patient, **known, **more}


def table(*rows: dict[str, str | None]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=schema.INDEX)


def cohort(seed: int, n_patients: int = 40) -> pa.Table:
    """Patients with 1 to 20 images, most of one subtype and some of two, some sharing a case."""
    random = np.random.default_rng(seed)
    rows = []
    for patient in range(n_patients):
        subtypes = random.choice(list(SUBTYPES), size=1 + (patient % 7 == 0))
        more = {schema.CASE: f"c{patient // 2 if patient % 5 == 0 else patient}"}
        rows += [
            row(f"{patient:03}-{i:02}.png", f"p{patient}", random.choice(subtypes), **more)
            for i in range(random.integers(1, 21))
        ]
    # Three patients of each class, whatever chance has given.
    rows += [row(f"{s}{i}.png", f"{s}{i}", s) for s, i in itertools.product(("A", "DC"), range(3))]
    return table(*rows)


def parts(assigned: pa.Table) -> dict[str, str]:
    return dict(zip(assigned[schema.IMAGE_ID].to_pylist(), assigned[schema.PART].to_pylist(), strict=True))


def with_parts(rows: pa.Table, *of_rows: str) -> pa.Table:
    return rows.append_column(schema.PART, pa.array(of_rows))


def shares(rows: pa.Table) -> dict[str | None, float]:
    return {r["values"]: r["counts"] / rows.num_rows for r in rows[schema.SUBTYPE].value_counts().to_pylist()}


def part_of(assigned: pa.Table, part: str) -> pa.Table:
    return assigned.filter(pc.equal(assigned[schema.PART], part))


def groups_of(assigned: pa.Table, column: str) -> dict[str, set[str]]:
    sides: dict[str, set[str]] = defaultdict(set)
    for name, part in zip(assigned[column].to_pylist(), assigned[schema.PART].to_pylist(), strict=True):
        sides[name].add(part)
    return sides


# --- real names


@pytest.fixture(scope="module")
def folds(real_data: Path) -> list[dict[str, str]]:
    paths = sorted((real_data / "folds").glob("dsfold?.txt"))
    return [breakhis.read_fold(path.read_text(), path.name) for path in paths]


@pytest.fixture(scope="module")
def published(folds: list[dict[str, str]]) -> pa.Table:
    return breakhis.index(File(uri=name, path=name, size_bytes=1) for name in folds[0])


@pytest.mark.real
@pytest.mark.parametrize("protocol", ["case", "patient"])
def test_no_group_crosses_and_shares_hold_on_all_published_names(
    published: pa.Table, protocol: split.Protocol
) -> None:
    """Within 5 points where a subtype has a group for every part; adenosis has two cases for three parts."""
    kept = quarantine.apply_rules(published).kept
    column = {"case": schema.CASE, "patient": schema.PATIENT}[protocol]
    groups = kept.group_by(schema.SUBTYPE).aggregate([(column, "count_distinct")]).to_pylist()
    enough = {r[schema.SUBTYPE] for r in groups if r[f"{column}_count_distinct"] >= len(split.PARTS)}
    assert SUBTYPES.keys() - enough == ({"A"} if protocol == "case" else set())
    whole = shares(kept)
    seen = set()
    for seed in SEEDS:
        assigned = split.assign(kept, protocol, seed)
        split.require_no_leak(assigned, protocol)
        assert all(len(sides) == 1 for sides in groups_of(assigned, column).values())
        seen.add(split.fingerprint(assigned))
        for part, fraction in zip(split.PARTS, (0.65, 0.15, 0.20), strict=True):
            rows = part_of(assigned, part)
            here = shares(rows)
            assert rows.num_rows / kept.num_rows == pytest.approx(fraction, rel=0.1)
            assert max(abs(here.get(name, 0) - whole[name]) for name in enough) <= 0.05
            assert part == split.VALIDATION or here.keys() == whole.keys()
    assert len(seen) == len(SEEDS)


@pytest.mark.real
def test_the_official_folds_are_reproduced_row_for_row(
    published: pa.Table, folds: list[dict[str, str]]
) -> None:
    kept = quarantine.apply_rules(published).kept
    for fold in folds:
        assigned = split.assign(kept, "official", seed=0, fold=fold)
        split.require_no_leak(assigned, "official")
        assert assigned.drop_columns(schema.PART) == kept
        for name, part in parts(assigned).items():
            assert (part == split.TEST) == (fold[name] == "test")
        training = kept.num_rows - part_of(assigned, split.TEST).num_rows
        assert part_of(assigned, split.VALIDATION).num_rows / training == pytest.approx(0.15, rel=0.1)
        cases = groups_of(assigned, schema.CASE).values()
        assert not any({split.TRAIN, split.VALIDATION} <= sides for sides in cases)


@pytest.mark.real
def test_the_audit_names_14_13412_in_folds_1_3_and_5(
    published: pa.Table, folds: list[dict[str, str]]
) -> None:
    for number, fold in enumerate(folds, start=1):
        raw = with_parts(published, *(fold[name] for name in published[schema.IMAGE_ID].to_pylist()))
        findings = split.crossings_forbidden(raw, "official")
        if number in (1, 3, 5):
            assert len(findings) == 1
            assert findings[0].startswith("patient, slide 14-13412 is in train (as SOB_M_")
            with pytest.raises(LeakageError, match="14-13412"):
                split.require_no_leak(split.assign(published, "official", 0, fold=fold), "official")
        else:
            assert findings == []
            split.require_no_leak(split.assign(published, "official", 0, fold=fold), "official")


@pytest.mark.real
def test_a_magnification_is_held_out_of_all_published_names(published: pa.Table) -> None:
    kept = quarantine.apply_rules(published).kept
    made = split.hold_out(kept, "magnification", 0, "40")
    split.require_no_leak(made, "magnification", "40")
    counts = [part_of(made, part).num_rows for part in (*split.PARTS, LEFT_OUT)]
    assert counts == [3836, 664, 378, 2785]


@pytest.mark.real
def test_by_image_shares_are_exact_and_patients_leak(published: pa.Table) -> None:
    assigned = split.assign(published, "image", seed=0)
    split.require_no_leak(assigned, "image")
    assert "image" in split.LEAKY
    assert len(split.crossings_forbidden(assigned, "patient")) == 81
    for part in split.PARTS:
        here = shares(part_of(assigned, part))
        assert here == pytest.approx(shares(published), abs=0.002)


# --- tables by hand: assign


@pytest.mark.parametrize("protocol", ["case", "patient", "image"])
@pytest.mark.parametrize("seed", range(8))
def test_no_group_crosses_and_every_part_has_both_classes(protocol: split.Protocol, seed: int) -> None:
    rows = cohort(seed)
    assigned = split.assign(rows, protocol, seed)
    split.require_no_leak(assigned, protocol)
    assert assigned.schema == schema.SPLIT
    assert assigned.drop_columns(schema.PART) == rows
    for part in split.PARTS:
        assert set(part_of(assigned, part)[schema.TUMOR_CLASS].to_pylist()) == set(TUMOR_CLASSES)


def test_the_order_of_rows_does_not_matter_and_the_seed_does() -> None:
    rows = cohort(0)
    shuffled = rows.take(np.random.default_rng(1).permutation(rows.num_rows))
    assert parts(split.assign(rows, "case", 7)) == parts(split.assign(shuffled, "case", 7))
    assert parts(split.assign(rows, "case", 7)) != parts(split.assign(rows, "case", 8))


def test_a_seed_means_the_same_split_everywhere() -> None:
    rows = table(*(row(f"{i:02}", f"p{i}", s) for i, s in enumerate(("A", "DC", "LC") * 8)))
    assigned = split.assign(rows, "case", seed=0)
    assert "".join(part[1] for part in parts(assigned).values()) == PINNED


# The second letters: tRain, vAlidation, tEst.
PINNED = "errerrrrerrraaarrrrrrree"


@pytest.mark.parametrize("seed", range(20))
def test_a_fair_split_is_found_where_there_is_one(seed: int) -> None:
    """Fourteen patients made by cutting up a perfect split of 100 images, 40 of them benign."""
    random = np.random.default_rng(seed)
    sizes = []
    for subtype, images, n in (
        *(("A", 26, 3), ("A", 6, 2), ("A", 8, 2)),
        *(("DC", 39, 3), ("DC", 9, 2), ("DC", 12, 2)),
    ):
        cuts = np.sort(random.choice(np.arange(1, images), size=n - 1, replace=False))
        sizes += [(subtype, int(size)) for size in np.diff([0, *cuts, images])]
    rows = table(*(row(f"{p:02}-{i:02}", f"p{p}", s) for p, (s, n) in enumerate(sizes) for i in range(n)))
    assigned = split.assign(rows, "patient", seed)
    for part, n in zip(split.PARTS, (65, 15, 20), strict=True):
        here = part_of(assigned, part)
        assert here.num_rows == pytest.approx(n, rel=0.1)
        assert shares(here)["A"] == pytest.approx(0.4, abs=0.05)


def test_three_patients_of_a_class_give_one_to_each_part_however_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stratify, "_WORK", 300)
    sizes = {"A0": 200, "A1": 1, "A2": 3, "DC0": 50, "DC1": 9, "DC2": 2}
    rows = table(*(row(f"{p}-{i:03}", p, p[:-1]) for p, n in sizes.items() for i in range(n)))
    for seed in range(5):
        sides = groups_of(split.assign(rows, "case", seed), schema.PATIENT)
        for subtype in ("A", "DC"):
            assert set().union(*(sides[f"{subtype}{i}"] for i in range(3))) == set(split.PARTS)


@pytest.mark.parametrize("seed", range(20))
def test_one_round_suffices_for_both_classes_everywhere(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two patients of both classes and one of each: only one way of dividing them is right."""
    monkeypatch.setattr(stratify, "_WORK", 1)
    rows = table(
        *(row(f"both{p}-{s}", f"both{p}", s) for p in range(2) for s in ("A", "DC")),
        *(row(f"{s}-{i}", s, s) for s in ("A", "DC") for i in range(9)),
    )
    assigned = split.assign(rows, "case", seed)
    for part in split.PARTS:
        assert set(part_of(assigned, part)[schema.TUMOR_CLASS].to_pylist()) == set(TUMOR_CLASSES)


def test_a_subtype_with_two_patients_is_trained_on_and_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a division without would be fair in all else; a single patient is trained on."""
    monkeypatch.setattr(stratify, "_WORK", 1_000)
    sizes = {"A": (9, 6, 2, 7, 8, 5, 4), "DC": (6, 5, 2), "LC": (5, 10), "MC": (1,)}
    rows = table(
        *(row(f"{s}{p}-{i}", f"{s}{p}", s) for s in sizes for p, n in enumerate(sizes[s]) for i in range(n))
    )
    for seed in SEEDS:
        sides = groups_of(split.assign(rows, "case", seed), schema.PATIENT)
        assert sides["LC0"] | sides["LC1"] == {split.TRAIN, split.TEST}
        assert sides["MC0"] == {split.TRAIN}


def test_what_is_connected_stays_together() -> None:
    """A patient of two cases, a case of two patients, and an image of two patients."""
    linked = [
        row("1", "p", "A", **{schema.CASE: "c"}),
        row("2", "p", "A", **{schema.CASE: "d"}),
        row("3", "q", "A", **{schema.CASE: "d", schema.SHA256: "x"}),
        row("4", "r", "DC", **{schema.SHA256: "x"}),
    ]
    others = [row(f"{s}{i}", f"{s}{i}", s) for s in ("A", "DC") for i in range(6)]
    for seed in range(5):
        assigned = split.assign(table(*linked, *others), "case", seed)
        assert len({parts(assigned)[name] for name in "1234"}) == 1


def test_without_subtypes_the_tumor_class_is_spread() -> None:
    rows = table(
        *(
            row(f"{c}{i:03}", f"{c}{i // 4}", None, **{schema.TUMOR_CLASS: c})
            for c, n in (("benign", 80), ("malignant", 160))
            for i in range(n)
        )
    )
    assigned = split.assign(rows, "case", seed=0)
    for part in split.PARTS:
        here = part_of(assigned, part)[schema.TUMOR_CLASS].to_pylist()
        assert here.count("benign") / len(here) == pytest.approx(1 / 3, abs=0.05)


def test_many_groups_are_no_trouble() -> None:
    names = [f"{i:05}" for i in range(20_000)]
    classes = ["benign" if i % 3 else "malignant" for i in range(20_000)]
    columns = {schema.IMAGE_ID: names, schema.URI: names, schema.PATIENT: names, schema.TUMOR_CLASS: classes}
    empty = {field.name: pa.nulls(20_000, field.type) for field in schema.INDEX}
    assigned = split.assign(pa.table(empty | columns, schema=schema.INDEX), "case", seed=0)
    for part, n in zip(split.PARTS, (13_000, 3_000, 4_000), strict=True):
        here = part_of(assigned, part)[schema.TUMOR_CLASS].to_pylist()
        assert len(here) == pytest.approx(n, abs=3)
        assert here.count("malignant") == pytest.approx(n / 3, abs=3)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("A", 2), ("DC", 5)], "class benign has 2 patients; train, validation and test need at least 3"),
        ([("A", 5), ("DC", 1)], "class malignant has 1 patient; train, validation and test need"),
        ([("A", 5)], "class malignant has 0 patients; train, validation and test need at least 3"),
        ([], "class benign has 0 patients"),
    ],
)
def test_a_class_with_too_few_patients_is_named(rows: list[tuple[str, int]], message: str) -> None:
    made = table(*(row(f"{s}{p}{i}", f"{s}{p}", s) for s, n in rows for p in range(n) for i in range(9)))
    with pytest.raises(DataError, match=message):
        split.assign(made, "case", seed=0)


def test_cases_are_called_cases_where_there_are_some() -> None:
    rows = table(*(row(f"{s}{i}", f"{s}{i}", s, **{schema.CASE: s}) for s in ("A", "DC") for i in range(3)))
    with pytest.raises(DataError, match="class benign has 1 case; train"):
        split.assign(rows, "case", seed=0)
    split.assign(rows, "patient", seed=0)


def test_a_row_without_patient_or_class_is_named() -> None:
    nobody = table(row("a.png", None, "A"), row("b.png", "p", "DC"))
    with pytest.raises(DataError, match=r"^a.png: no patient; protocol case needs the column patient"):
        split.assign(nobody, "case", seed=0)
    with pytest.raises(DataError, match=r"^b.png: no tumor_class; expected benign or malignant"):
        split.assign(table(row("a.png", "p", "A"), row("b.png", "p", None)), "image", seed=0)
    images = table(*(row(f"{s}{i}", None, s) for s in ("A", "DC") for i in range(3)))
    assert set(parts(split.assign(images, "image", seed=0)).values()) == set(split.PARTS)


@pytest.mark.parametrize("fractions", [(0.0, 0.2), (0.2, 0.0), (0.5, 0.5), (-0.1, 0.2)])
def test_fractions_that_leave_a_part_empty_are_refused(fractions: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="expected fractions above 0"):
        split.assign(cohort(0), "case", 0, *fractions)


# --- tables by hand: shares of each class


def patients_of(tumor_class: str, *images: int) -> list[dict[str, str | None]]:
    """Rows of patients with so many images of a class."""
    return [
        row(f"{tumor_class}{p}-{i:03}", f"{tumor_class}{p}", None, **{schema.TUMOR_CLASS: tumor_class})
        for p, n in enumerate(images)
        for i in range(n)
    ]


def shares_of(assigned: pa.Table) -> list[tuple[int, int]]:
    """Images and patients of each class in each part."""
    found = []
    for part, tumor_class in itertools.product(split.PARTS, TUMOR_CLASSES):
        rows = part_of(assigned, part).filter(
            pc.equal(part_of(assigned, part)[schema.TUMOR_CLASS], tumor_class)
        )
        found.append((len(rows), len(rows[schema.PATIENT].unique())))
    return found


def test_a_class_of_two_percent_gets_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 benign patients of 500 images, 40 malignant ones of 3: about 65, 15 and 20 % of each."""
    monkeypatch.setattr(stratify, "_WORK", 500)
    rows = table(*patients_of("benign", *[500] * 10), *patients_of("malignant", *[3] * 40))
    expected = [(3000, 6), (78, 26), (1000, 2), (18, 6), (1000, 2), (24, 8)]
    assert shares_of(split.assign(rows, "case", 0)) == expected
    fold = split.assign_fold(rows, "case", 0, 5, 2)
    assert shares_of(fold) == expected
    few = "of class benign; {} on so few patients"
    said = [
        "the validation part has 1,000 of 5,000 images and 2 of 10 patients "
        + few.format("these are too few for a threshold and a temperature, and the best epoch depends"),
        "the test part has 1,000 of 5,000 images and 2 of 10 patients "
        + few.format("its numbers for this class depend"),
    ]
    assert split.share_warnings(fold, {"train": 0.65, "validation": 0.15, "test": 0.2}) == said


def in_parts(parts: dict[str, list[dict[str, str | None]]]) -> pa.Table:
    rows = [row | {schema.PART: part} for part, rows in parts.items() for row in rows]
    return pa.Table.from_pylist(rows, schema=schema.SPLIT)


def test_a_given_part_with_less_than_half_of_its_share_of_a_class_is_named() -> None:
    """Of its patients, of its images, and of a class that it lacks."""
    benign, malignant = patients_of("benign", *[10] * 20), patients_of("malignant", *[5] * 20)
    parts = {
        "train": benign[:100] + malignant[:85],
        "validation": benign[100:150] + malignant[85:86] + malignant[90:91] + malignant[95:96],
        "test": benign[150:],
    }
    short = "of class malignant, less than half of its share of"
    assert split.share_warnings(in_parts(parts)) == [
        f"the validation part has 3 of 88 images and 3 of 20 patients {short} 18 %; "
        "these are too few for a threshold and a temperature, and the best epoch depends on so few patients",
        f"the test part has 0 of 88 images and 0 of 20 patients {short} 17 %; "
        "its numbers for this class depend on so few patients",
    ]


def test_without_patients_only_images_are_counted() -> None:
    rows = [row(f"{s}{i}", None, s) for s, n in (("A", 12), ("DC", 12)) for i in range(n)]
    assigned = split.assign(table(*rows), "image", 0)
    assert split.share_warnings(assigned, {"train": 0.65, "validation": 0.15, "test": 0.2}) == []
    lacking = with_parts(table(*rows), *["train"] * 12, *["test"] * 12)
    assert split.share_warnings(lacking)[:2] == [
        "the train part has 0 of 12 images of class malignant, less than half of its share of 50 %",
        "the test part has 0 of 12 images of class benign, less than half of its share of 50 %",
    ]


# --- tables by hand: official folds


def fold_of(rows: pa.Table, is_test: Callable[[str], bool]) -> dict[str, str]:
    return {name: "test" if is_test(name) else "train" for name in rows[schema.IMAGE_ID].to_pylist()}


def test_official_keeps_the_test_part_and_divides_the_rest() -> None:
    rows = table(
        *(row(f"x/{s}{p}-{i}", f"{s}{p}", s) for s in ("A", "DC") for p in range(9) for i in range(4))
    )
    fold = {
        f"{s}{p}-{i}": "test" if p < 3 else "train" for s in ("A", "DC") for p in range(9) for i in range(4)
    }
    assigned = split.assign(rows, "official", seed=3, validation_fraction=1 / 3, fold=fold)
    split.require_no_leak(assigned, "case")
    assert {name for name, part in parts(assigned).items() if part == split.TEST} == (
        {f"x/{name}" for name, role in fold.items() if role == "test"}
    )
    assert part_of(assigned, split.VALIDATION).num_rows == 16


def test_official_names_what_is_wrong() -> None:
    rows = table(*(row(f"{s}{p}", f"{s}{p}", s) for s in ("A", "DC") for p in range(4)))
    with pytest.raises(ConfigError, match="needs one of the published folds"):
        split.assign(rows, "official", seed=0)
    with pytest.raises(
        DataError, match="8 images are not in the official fold: A0, A1, A2, A3, DC0, and 3 more"
    ):
        split.assign(rows, "official", seed=0, fold={"other.png": "train"})
    with pytest.raises(DataError, match="test part has no benign image here"):
        split.assign(rows, "official", seed=0, fold=fold_of(rows, lambda name: name == "DC0"))
    with pytest.raises(DataError, match="class benign has 1 patient; train and validation need at least 2"):
        split.assign(rows, "official", 0, fold=fold_of(rows, lambda name: name in {"DC0", "A0", "A1", "A2"}))


# --- one magnification or site held out

# Of `cohort`, as they were before there were these protocols: `assign`, and fold 2 of 3.
BEFORE = {
    ("case", 0): ("e2862f7947b3b92d", "1da961ce3e6c798e"),
    ("case", 1): ("71b2701f0e43ea8d", "b5cf9ad0cafe01c8"),
    ("patient", 0): ("183a2bcdf6d88c32", "187b0f7b05e5f751"),
    ("patient", 1): ("f59fbd3ac77efdeb", "1a777ad3ee4fb7ae"),
    ("image", 0): ("f417fd466f05cdf1", "2b59628308744ea9"),
    ("image", 1): ("19ab465a35685126", "d5b7f2fcf9651933"),
}


@pytest.mark.parametrize(("protocol", "seed"), BEFORE)
def test_the_other_protocols_split_as_before(protocol: split.Protocol, seed: int) -> None:
    rows = cohort(seed)
    made = split.assign(rows, protocol, seed), split.assign_fold(rows, protocol, seed, 3, 2)
    assert tuple(split.fingerprint(one)[:16] for one in made) == BEFORE[protocol, seed]


@st.composite
def magnified(draw: st.DrawFn) -> pa.Table:
    """Patients of both classes, some in one case, with images at some of three magnifications, and a site."""
    rows = []
    for i in range(draw(st.integers(8, 16))):
        more = {schema.CASE: f"c{draw(st.integers(0, 60))}", schema.SITE: draw(st.sampled_from("ABC"))}
        for j, magnification in enumerate(
            draw(st.lists(st.sampled_from([40, 100, 200]), min_size=1, max_size=6))
        ):
            one = row(f"{i:02}-{j}", f"p{i}", ("A", "DC")[i % 2], **more)
            rows.append(one | {schema.MAGNIFICATION: magnification})
    return table(*rows)


@hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    rows=magnified(), protocol=st.sampled_from(["magnification", "site"]), seed=st.integers(0, 9)
)
def test_what_is_held_out_is_tested_alone_and_on_other_patients(
    rows: pa.Table, protocol: split.Protocol, seed: int
) -> None:
    tested: list[str] = []
    held_out, folds = ("40", 2) if protocol == "magnification" else ("A", 1)
    for fold in range(1, folds + 1):
        try:
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(stratify, "_WORK", 1)  # one round: what is balanced is tested elsewhere
                made = split.hold_out(
                    rows, protocol, seed, held_out, folds=(folds, fold) if folds > 1 else None
                )
        except DataError:  # too few patients, or one at two sites, through a case
            hypothesis.assume(False)
        split.require_no_leak(made, protocol, held_out)
        assert made.drop_columns(schema.PART) == rows
        part = parts(made)
        for one in made.to_pylist():
            is_held = str(one[protocol]) == held_out
            assert not (is_held and one[schema.PART] in (split.TRAIN, split.VALIDATION))
            assert is_held or one[schema.PART] != split.TEST
        for column in (schema.PATIENT, schema.CASE):
            assert all(len(of - {LEFT_OUT}) <= 1 for of in groups_of(made, column).values())
        tested += [name for name, of in part.items() if of == split.TEST]
        # Nobody is left out without need.
        in_test = {one[schema.PATIENT] for one in part_of(made, split.TEST).to_pylist()}
        cases = {one[schema.CASE] for one in part_of(made, split.TEST).to_pylist()}
        for one in part_of(made, LEFT_OUT).to_pylist():
            connected = one[schema.PATIENT] in in_test or one[schema.CASE] in cases
            assert connected != (str(one[protocol]) == held_out)
        assert protocol == "magnification" or not part_of(made, LEFT_OUT).num_rows
    held = [one[schema.IMAGE_ID] for one in rows.to_pylist() if str(one[protocol]) == held_out]
    assert sorted(tested) == sorted(held)


def biopsies(n_patients: int = 12, **more: str | None) -> pa.Table:
    """Patients with an image at each of two magnifications, half of them at each of two sites."""
    return table(
        *(
            row(f"{p:02}-{m}", f"p{p}", ("A", "DC")[p % 2], **{schema.SITE: "AB"[p // 2 % 2]})
            | {schema.MAGNIFICATION: m}
            | more
            for p in range(n_patients)
            for m in (40, 100)
        )
    )


def test_a_share_of_the_patients_is_tested_at_the_magnification() -> None:
    made = split.hold_out(biopsies(), "magnification", 0, "40", 0.2, 1 / 3)
    counts = {part: part_of(made, part).num_rows for part in (*split.PARTS, LEFT_OUT)}
    assert counts == {"train": 6, "validation": 2, "test": 4, LEFT_OUT: 4 + 8}
    assert split.fingerprint(made) != split.fingerprint(split.hold_out(biopsies(), "magnification", 1, "40"))
    shuffled = biopsies().take(np.random.default_rng(1).permutation(24))
    assert parts(split.hold_out(shuffled, "magnification", 0, "40", 0.2, 1 / 3)) == parts(made)
    # Of the images in a part, 4 of 12 are tested; those in none are of no share.
    assert not any("less than half" in text for text in split.share_warnings(made))


def test_a_site_is_tested_whole() -> None:
    made = split.hold_out(biopsies(), "site", 0, "A", 0.3)
    assert part_of(made, split.TEST)[schema.SITE].to_pylist() == ["A"] * 12
    assert set(made[schema.PART].to_pylist()) == {*split.PARTS}


@pytest.mark.parametrize(
    ("rows", "protocol", "held_out", "said"),
    [
        (biopsies(), "magnification", "200", "no image has the magnification 200; there are 40, 100"),
        (biopsies(), "site", "C", "no image has the site C; there are A, B"),
        (biopsies(site=None), "site", "A", "00-100, 00-40, .*: no site; .* manifest with the column site"),
        (biopsies(site="A"), "site", "A", "all images have the site A; expected several"),
        (biopsies(4), "magnification", "40", "class benign has 1 patient; train and validation need"),
        (biopsies(patient=None), "site", "A", "protocol site needs the column patient"),
        (
            biopsies(case="c"),
            "site",
            "A",
            r"00-100 \(patient p0\) is at site A, and 02-100 \(patient p2\) at B, .* as in B/p2, and one",
        ),
    ],
)
def test_what_cannot_be_held_out_is_refused(
    rows: pa.Table, protocol: split.Protocol, held_out: str, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        split.hold_out(rows, protocol, 0, held_out)


def test_too_few_patients_at_a_magnification_cannot_make_the_folds() -> None:
    with pytest.raises(DataError, match="12 groups of magnification 40 cannot make 13 folds; lower --k"):
        split.hold_out(biopsies(), "magnification", 0, "40", folds=(13, 1))


def test_an_image_of_the_wrong_magnification_is_a_leak() -> None:
    made = split.hold_out(biopsies(), "magnification", 0, "40")
    names, of = made[schema.IMAGE_ID].to_pylist(), made[schema.PART].to_pylist()
    for part, magnification in ((split.TRAIN, 40), (split.TEST, 100)):
        patients = part_of(made, part)[schema.PATIENT].to_pylist()
        other = next(
            one[schema.IMAGE_ID]
            for one in part_of(made, LEFT_OUT).to_pylist()
            if one[schema.PATIENT] in patients
        )
        moved = with_parts(
            made.drop_columns(schema.PART),
            *(part if name == other else was for name, was in zip(names, of, strict=True)),
        )
        split.require_no_leak(moved, "case")
        with pytest.raises(LeakageError, match=f"{other} of the magnification {magnification} is in {part}"):
            split.require_no_leak(moved, "magnification", "40")


# --- tables by hand: quarantine, audit, fingerprints


@pytest.mark.parametrize(
    ("column", "forbidden_by"),
    [
        (schema.CASE, {"case", "magnification", "site"}),
        (schema.PATIENT, {"case", "patient", "official", "magnification", "site"}),
        (schema.SLIDE, {"case", "patient", "official", "magnification", "site"}),
        (schema.SHA256, {"case", "patient", "official", "magnification", "site", "image"}),
    ],
)
@pytest.mark.parametrize("protocol", get_args(Protocol))
def test_what_may_not_cross_is_found(
    column: str, forbidden_by: set[split.Protocol], protocol: split.Protocol
) -> None:
    rows = table(*(row(name, f"p{name}", "A") | {column: "shared"} for name in "abc"), row("d", "pd", "A"))
    crossing = with_parts(rows, split.TRAIN, split.TEST, split.TEST, split.VALIDATION)
    if protocol not in forbidden_by:
        split.require_no_leak(crossing, protocol)
        return
    expected = f"{column} shared is in train (as a) and in test (as b, and 1 more)"
    assert split.crossings_forbidden(crossing, protocol) == [expected]
    with pytest.raises(LeakageError) as caught:
        split.require_no_leak(crossing, protocol)
    assert str(caught.value) == f"the split by {protocol} leaks: {expected}"


def test_crossings_are_named_for_the_columns_that_are_asked_for() -> None:
    rows = table(row("a", "p", "A", case="c"), row("b", "p", "A", case="c"), row("d", "q", "A", case="c"))
    crossing = with_parts(rows, split.TRAIN, split.TRAIN, split.TEST)
    assert split.crossings(crossing, (schema.PATIENT,)) == []
    said = "case c is in train (as a, and 1 more) and in test (as d)"
    assert split.crossings(crossing, (schema.PATIENT, schema.CASE)) == [("c", said)]


def test_one_case_in_one_part_is_no_leak() -> None:
    rows = table(row("a", "p", "A"), row("b", "p", "A"))
    split.require_no_leak(with_parts(rows, split.TRAIN, split.TRAIN), "case")


def test_fingerprints_differ_between_splits_and_data() -> None:
    rows = cohort(1)
    assigned = split.assign(rows, "case", 0)
    backwards = assigned.take(np.arange(rows.num_rows)[::-1])
    assert split.fingerprint(assigned) == split.fingerprint(backwards)
    assert split.data_fingerprint(assigned) == split.data_fingerprint(backwards)
    other = split.assign(rows, "case", 1)
    assert split.fingerprint(assigned) != split.fingerprint(other)
    assert split.data_fingerprint(assigned) == split.data_fingerprint(other)
    assert split.data_fingerprint(rows) != split.data_fingerprint(rows.slice(1))
    sizes = rows.set_column(
        rows.column_names.index(schema.SIZE_BYTES), schema.SIZE_BYTES, [[9] * rows.num_rows]
    )
    assert split.data_fingerprint(rows) != split.data_fingerprint(sizes)


# --- a division that the data come with


def given(*of_patients: str, **patients: str | None) -> pa.Table:
    """Two images of each patient p0, p1, ... in the given parts, benign and malignant in turn."""
    rows = [
        row(f"{p}-{i}.png", patients.get(f"p{p}", f"p{p}"), ("A", "DC")[p % 2])
        for p in range(len(of_patients))
        for i in range(2)
    ]
    return with_parts(table(*rows), *(part for part in of_patients for _ in range(2)))


TRAINING = ("train",) * 8


def test_given_parts_are_kept() -> None:
    rows = given(*TRAINING, "validation", "validation", "test", "test")
    kept = split.keep(rows, "case", seed=0)
    assert parts(kept) == parts(rows)
    assert kept.schema == schema.SPLIT
    assert split.fingerprint(split.keep(rows, "patient", seed=1)) == split.fingerprint(kept)


def test_a_missing_validation_part_comes_out_of_training() -> None:
    rows = given(*TRAINING, "test", "test")
    kept = split.keep(rows, "case", seed=0, validation_fraction=0.25)
    assert part_of(kept, "test").num_rows == 4
    assert part_of(kept, "validation").num_rows == 4
    assert set(part_of(kept, "validation")[schema.TUMOR_CLASS].to_pylist()) == set(TUMOR_CLASSES)
    assert all(len(found) == 1 for found in groups_of(kept, schema.PATIENT).values())


@pytest.mark.parametrize(
    ("rows", "error", "said"),
    [
        (
            given("train", "train", "test", "test", p2="p0"),
            LeakageError,
            r"p0 is in train .* and in test",
        ),
        (given("train", "train", "validation", "test"), DataError, "part validation has no malignant image"),
        (given(*TRAINING), DataError, "part test has no benign image"),
        (given("train", "train", "test", "test", p3=None), DataError, "3-0.png, 3-1.png: no patient"),
        (given("train", "train", "test", "held out"), DataError, "3-0.png, 3-1.png: no part; expected train"),
        (
            given("train", "train", "test", "test"),
            DataError,
            "class benign has 1 patient; train and validation",
        ),
    ],
)
def test_given_parts_that_cannot_be_used_are_refused(rows: pa.Table, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        split.keep(rows, "case", seed=0)


def test_given_parts_without_patients_are_for_the_leaky_protocol() -> None:
    rows = given("train", "train", "validation", "validation", "test", "test", p0=None)
    assert parts(split.keep(rows, "image", seed=0)) == parts(rows)


@pytest.mark.parametrize(
    ("name", "part"),
    [("Train", "train"), ("training set", "train"), ("val", "validation"), ("VALID", "validation"),
     ("dev", "validation"), ("test-images", "test"), ("testing", "test"), ("tests", None), ("trainer", None)],
)  # fmt: skip
def test_parts_have_the_usual_names(name: str, part: str | None) -> None:
    assert part_named(name) == part
