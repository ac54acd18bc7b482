"""What holds out a magnification or site, from a manifest to the rows of a run, without a cluster."""

import pytest

from bcd import schema, storage
from bcd.config.training import CrossvalConfig, TrainConfig
from bcd.data import index
from bcd.errors import DataError
from bcd.runtime import prepare, run_directory
from bcd.split import split
from bcd.taxonomy import LEFT_OUT, PARTS
from bcd.training import crossval

COLUMNS = "uri,tumor_class,patient,magnification,site,part"


@pytest.fixture
def data(tmp_path):
    """A manifest of 12 patients at two magnifications, half of them at each of two sites, with parts."""
    lines = [COLUMNS]
    for p in range(12):
        for m in (40, 100):
            storage.write_bytes(f"{tmp_path}/{p}-{m}.png", f"{p} {m}".encode())
            lines.append(
                f"{p}-{m}.png,{('benign', 'malignant')[p % 2]},P{p},{m},{'AB'[p // 2 % 2]},{PARTS[p % 3]}"
            )
    (tmp_path / "m.csv").write_text("\n".join(lines))
    return str(tmp_path / "m.csv")


def inspected(data):
    table, warnings = index.read_index(data)
    facts = {"synthetic": False, "warnings": warnings, "broken": [], "quarantined": []}
    return table, prepare.DatasetFacts(data_fingerprint="", field_height_px=0, field_width_px=0, **facts)


def test_what_is_in_no_part_is_counted_and_said(data):
    config = TrainConfig(data=data, protocol="magnification", held_out="40", test_fraction=1 / 3)
    table, facts = prepare.prepare(config, inspected(data))
    assert table.schema == schema.SPLIT
    counts = {part: len(prepare.part_of(table, part)) for part in (*PARTS, LEFT_OUT)}
    assert counts == {"train": 6, "validation": 2, "test": 4, LEFT_OUT: 12}
    assert facts.left_out == 12
    lines = prepare.describe_split(config, table, facts)
    (line,) = [line for line in lines if line.startswith("left out, in no part")]
    assert "12 images, at 40 of patients who are not tested" in line
    assert any("not used: --held-out divides the images into new parts" in text for text in facts.warnings)
    again = prepare.prepare(config, inspected(data))[1]
    assert again.split_fingerprint == facts.split_fingerprint
    assert prepare.class_counts(config, table)["parts"]["test"] == {"benign": 2, "malignant": 2}


def test_a_site_leaves_nothing_out(data):
    config = TrainConfig(data=data, protocol="site", held_out="B", validation_fraction=0.3)
    table, facts = prepare.prepare(config, inspected(data))
    assert set(prepare.part_of(table, "test")[schema.SITE].to_pylist()) == {"B"}
    assert facts.left_out == 0
    assert not any("in no part" in line for line in prepare.describe_split(config, table, facts))


def test_a_run_resumes_only_with_the_sites_that_it_was_split_by(data, tmp_path):
    config = TrainConfig(data=data, protocol="site", held_out="B", validation_fraction=0.3)
    rows, facts = inspected(data)
    table, _ = prepare.prepare(config, (rows, facts))
    run_directory.write_split(str(tmp_path), table)
    assert run_directory.resume(config, str(tmp_path), rows) == table
    moved = rows.set_column(
        rows.schema.get_field_index(schema.SITE), schema.INDEX.field(schema.SITE), [["C"] * len(rows)]
    )
    with pytest.raises(DataError, match=r"another site of 24 images \(0-100.png: A -> C\)"):
        run_directory.resume(config, str(tmp_path), moved)
    # A run of an older version knows no sites.
    run_directory.write_split(str(tmp_path), table.drop_columns(schema.SITE))
    assert run_directory.resume(config, str(tmp_path), moved) is not None


def study(data, **settings):
    config = CrossvalConfig(data=data, prepared="off", validation_fraction=0.3, **settings)
    config = config.model_copy(update={"held_out": prepare.held_out_values(config)})
    return config, list(crossval.folds_of(config, "u", config.protocols()[-1]))


def test_a_study_tests_each_image_once_at_each_magnification(data):
    config, folds = study(data, protocol="case,magnification", k=2, repeats=2)
    assert config.held_out == ("40", "100")
    assert len(folds) == 2 * 2 * 2
    assert [crossval.name_of(fold) for fold in folds[:3]] == [
        "magnification, repeat 1, fold 1, 40 held out",
        "magnification, repeat 1, fold 2, 40 held out",
        "magnification, repeat 1, fold 3, 100 held out",
    ]
    assert len({fold.uri for fold in folds}) == len(folds)
    rows = inspected(data)
    tested = [
        name
        for fold in folds[:4]
        for parts in [prepare.prepare(fold.config, rows)[0]]
        for name in prepare.part_of(parts, split.TEST)[schema.IMAGE_ID].to_pylist()
    ]
    assert sorted(tested) == sorted(rows[0][schema.IMAGE_ID].to_pylist())


def test_a_study_has_a_fold_for_each_site_or_those_named(data):
    config, folds = study(data, protocol="site")
    assert config.held_out == ("A", "B")
    assert [(fold.config.held_out, fold.config.fold) for fold in folds] == [("A", None), ("B", None)]
    assert [fold.config.held_out for fold in study(data, protocol="site", held_out=("B",))[1]] == ["B"]
    assert study(data, protocol="case", k=3)[0].held_out == ()


def test_a_tree_without_sites_says_what_it_lacks(tmp_path):
    for name in ("benign/P1/a.png", "malignant/P2/b.png"):
        storage.write_bytes(f"{tmp_path}/{name}", b"")
    with pytest.raises(DataError, match=r"no site; .*: give a manifest with the column site"):
        study(str(tmp_path), protocol="site")


def test_folders_above_the_classes_are_sites(tmp_path):
    for name in ("A/benign/P1/a.png", "A/malignant/P2/b.png", "B/benign/P1/c.png", "B/malignant/P2/d.png"):
        storage.write_bytes(f"{tmp_path}/{name}", b"")
    assert study(str(tmp_path), protocol="site")[0].held_out == ("A", "B")
