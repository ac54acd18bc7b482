import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.config.training import TrainConfig
from bcd.errors import DataError, LeakageError, StorageError
from bcd.runtime import prepare
from bcd.split import split
from tests import pictures
from tests.runtime.test_datasets import small

pytestmark = pytest.mark.ray


def folder_per_class(root, n_patients=6, contents=None):
    """A folder per class, two distinct images per patient."""
    for i in range(n_patients):
        for tumor_class in ("benign", "malignant"):
            for j in range(2):
                pixels = pictures.gradient(40 + i, 60 + 2 * j + (tumor_class == "benign"))
                storage.write_bytes(
                    f"{root}/{tumor_class}/{tumor_class}-{i}/{j}.png", pictures.encode(pixels)
                )
    for name, content in (contents or {}).items():
        storage.write_bytes(f"{root}/{name}", content)
    return str(root)


def test_the_same_config_gives_the_same_split_on_disk_and_on_s3(joined, tree, tree_on_s3):
    first, facts = prepare.prepare(small(tree))
    again, facts_again = prepare.prepare(small(tree))
    remote, facts_remote = prepare.prepare(small(tree_on_s3))
    assert first.equals(again)
    assert first.drop_columns(schema.URI).equals(remote.drop_columns(schema.URI))
    assert facts == facts_again
    assert facts.model_copy(update={"data": tree_on_s3}) == facts_remote
    assert facts.synthetic
    assert prepare.prepare(small(tree, seed=1))[1].split_fingerprint != facts.split_fingerprint


def test_every_row_goes_to_one_part_and_no_case_to_two(joined, tree):
    table, facts = prepare.prepare(small(tree))
    assert len(table) == 8 * 3 * 2
    assert table.schema == schema.SPLIT
    assert split.crossings_forbidden(table, "case") == []
    lines = prepare.describe_split(small(tree), table, facts)
    assert any(line.startswith("train: ") and " patients (" in line for line in lines)
    assert [f"warning: {text}" for text in facts.warnings] == [s for s in lines if s.startswith("warning: ")]


def test_broken_images_and_doubles_are_out_and_named(joined, tmp_path):
    double = pictures.encode(pictures.gradient(200, 300))
    contents = {
        "benign/benign-0/broken.png": b"",
        "benign/benign-1/double.png": double,
        "malignant/malignant-1/double.png": double,
    }
    data = folder_per_class(tmp_path, contents=contents)
    table, facts = prepare.prepare(small(data, max_bad_fraction=0.1))
    assert len(table) == 24
    assert facts.broken == ["benign/benign-0/broken.png: empty: the file has no bytes"]
    assert len(facts.quarantined) == 1
    assert "benign/benign-1/double.png" in facts.quarantined[0]
    assert not facts.synthetic
    with pytest.raises(DataError, match=r"1 of 27 images are broken, more than --max-bad-fraction 0.01"):
        prepare.prepare(small(data))


def test_without_quarantine_copies_stay_in_one_part(joined, tmp_path):
    """Copies hold their groups together: the check finds nothing, unless rows are moved by hand."""
    double = pictures.encode(pictures.gradient(200, 300))
    contents = {f"{c}/{c}-{i}/double.png": double for i, c in enumerate(("benign", "malignant"))}
    data = folder_per_class(tmp_path, contents=contents)
    table, _ = prepare.prepare(small(data, quarantine=False))
    rows = [row for row in table.to_pylist() if row[schema.IMAGE_ID] in contents]
    assert len({row[schema.PART] for row in rows}) == 1
    moved = table.set_column(
        table.schema.get_field_index(schema.PART),
        schema.SPLIT.field(schema.PART),
        [["train", "test"] * (len(table) // 2)],
    )
    with pytest.raises(LeakageError):
        split.require_no_leak(moved, "case")


def test_too_few_patients_are_refused_with_their_number(joined, tmp_path):
    data = folder_per_class(tmp_path, n_patients=2)
    with pytest.raises(DataError, match=r"class benign has 2 .*need at least 3"):
        prepare.prepare(small(data))


def divided(tmp_path, test_patient="Q"):
    """A tree that comes divided, read without its pixels."""
    for part, patients in {"train": range(8), "test": range(8, 10)}.items():
        for i in patients:
            path = f"{part}/{('benign', 'malignant')[i % 2]}/P{i}/0.png"
            storage.write_bytes(f"{tmp_path}/{path}", path.encode())
    storage.write_bytes(f"{tmp_path}/test/benign/{test_patient}/0.png", b"")
    table, warnings = prepare.index.read_index(str(tmp_path))
    told = {"synthetic": False, "warnings": warnings, "broken": [], "quarantined": []}
    return table, prepare.DatasetFacts(data_fingerprint="", field_height_px=0, field_width_px=0, **told)


def test_a_tree_that_comes_divided_stays_so(tmp_path):
    inspected = divided(tmp_path)
    table, facts = prepare.prepare(TrainConfig(data="d", validation_fraction=0.25), inspected)
    assert prepare.part_of(table, "test")[schema.PATIENT].to_pylist() == ["P8", "Q", "P9"]
    assert len(prepare.part_of(table, "validation")) == 2
    assert "the parts are those given with the data; --test-fraction is not used" in facts.warnings
    again = prepare.prepare(TrainConfig(data="d", validation_fraction=0.25), inspected)[1]
    assert again.split_fingerprint == facts.split_fingerprint == split.fingerprint(table)


def test_folds_replace_given_parts_with_a_warning(tmp_path):
    config = TrainConfig(data="d", cross_folds=2, fold=1, validation_fraction=0.3)
    table, facts = prepare.prepare(config, divided(tmp_path))
    assert table.schema == schema.SPLIT
    assert any("given with the data are not used: --fold divides" in text for text in facts.warnings)


def test_a_tree_that_comes_with_a_leak_is_refused(tmp_path):
    with pytest.raises(LeakageError, match=r"patient P0 is in train .* and in test"):
        prepare.prepare(TrainConfig(data="d"), divided(tmp_path, test_patient="P0"))


def test_warnings_of_an_index_are_printed_with_the_error(tmp_path, capsys):
    table, facts = divided(tmp_path)
    lacking = table.set_column(2, schema.INDEX.field(schema.PATIENT), pa.nulls(len(table), pa.string()))
    facts = facts.model_copy(update={"warnings": ["column 'patient_id' is not used"]})
    with pytest.raises(DataError, match="no patient; protocol case needs the column patient"):
        prepare.prepare(TrainConfig(data="d"), (lacking, facts))
    assert capsys.readouterr().out == "warning: column 'patient_id' is not used\n"


@pytest.mark.parametrize("flag", ["target", "balance"])
def test_subtypes_cannot_be_used_where_some_are_unknown(joined, tmp_path, flag):
    data = folder_per_class(tmp_path)
    with pytest.raises(
        DataError, match=rf"--{flag} subtype needs .* but 24 have none, first benign/benign-0/0.png"
    ):
        prepare.prepare(small(data, **{flag: "subtype"}))


def test_missing_fold_files_are_found_before_pixels_are_read(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.inspection, "inspect_images", lambda table: pytest.fail("pixels were read"))
    config = TrainConfig(data=tree, protocol="official", folds=str(tmp_path), fold=2)
    with pytest.raises(StorageError, match=r"dsfold2.txt: cannot read it"):
        prepare.prepare(config)


def test_what_a_part_should_have_follows_from_the_settings():
    assert prepare._wanted(TrainConfig(data="d")) == {"validation": 0.15, "test": 0.2, "train": 0.65}
    fold = TrainConfig(data="d", cross_folds=4, fold=1, validation_fraction=0.25)
    assert prepare._wanted(fold) == {"validation": 0.25, "test": 0.25, "train": 0.5}


def test_class_counts_before_and_after_balancing(joined, tree):
    config = small(tree, balance="subtype")
    table, _ = prepare.prepare(config)
    counts = prepare.class_counts(config, table)
    assert sum(sum(part.values()) for part in counts["parts"].values()) == len(table)
    assert len(set(counts["balanced"].values())) == 1


@pytest.mark.real
def test_the_official_fold_on_real_images(joined, real_data):
    data = str(real_data / "breakhis/BreaKHis_v1")
    config = TrainConfig(data=data, protocol="official", folds=str(real_data / "folds"), fold=4)
    table, facts = prepare.prepare(config)
    fold = prepare.breakhis.read_fold((real_data / "folds/dsfold4.txt").read_text(), "dsfold4.txt")
    for row in table.to_pylist():
        assert (row[schema.PART] == "test") == (fold[row[schema.IMAGE_ID].rpartition("/")[2]] == "test")
    assert any("7,909" in warning for warning in facts.warnings)


@pytest.mark.parametrize("part", ["train", "validation"])
@pytest.mark.parametrize("tumor_class", ["benign", "malignant"])
def test_a_part_of_one_class_is_rejected(part, tumor_class):
    rows = [(p, c) for p in split.PARTS for c in ("benign", "malignant") if (p, c) != (part, tumor_class)]
    table = pa.table({schema.PART: [row[0] for row in rows], schema.TUMOR_CLASS: [row[1] for row in rows]})
    with pytest.raises(DataError, match=f"the {part} part has no {tumor_class} image; expected both classes"):
        prepare._require_classes(table)


def test_a_test_part_of_one_class_is_not():
    parts = ["train", "train", "validation", "validation", "test"]
    prepare._require_classes(
        pa.table({schema.PART: parts, schema.TUMOR_CLASS: ["benign", "malignant"] * 2 + ["benign"]})
    )
