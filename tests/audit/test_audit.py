import hashlib
import json
import re
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bcd import cli, schema, storage
from bcd.audit import audit
from bcd.config.checks import AuditConfig
from bcd.data import breakhis
from bcd.errors import AuditError, DataError, ImageError, StorageError
from tests import pictures, planted_identifiers
from tests.imaging.test_appearance import tissue


def rows_of(output, name):
    filesystem, path = storage.resolve(storage.join(str(output), name))
    return {row[schema.IMAGE_ID]: row for row in pq.read_table(path, filesystem=filesystem).to_pylist()}


def kinds(result):
    return {one.kind: one.count for one in result.findings}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """24 good images of 8 patients, and one of everything that may be wrong."""
    root = tmp_path_factory.mktemp("planted")
    names = [f"{('benign', 'malignant')[p % 2]}/p{p}/{i}.png" for p in range(8) for i in range(3)]
    good = {name: tissue(number, 230, 350) for number, name in enumerate(names)}
    noise = np.random.default_rng(0).normal(230, 3, (230, 350, 3)).clip(0, 255).astype(np.uint8)
    dark = (tissue(99, 230, 350) * np.array([0.6, 0.1, 0.6])).astype(np.uint8)
    contents = {name: pictures.encode(pixels) for name, pixels in good.items()}
    contents |= {
        "malignant/p7/copy of p0.png": contents["benign/p0/0.png"],
        "benign/p2/copy of p2.png": contents["benign/p2/1.png"],
        "benign/p4/jpeg of p1.jpg": pictures.encode(good["malignant/p1/0.png"], "JPEG", quality=70),
        "benign/p6/moved.png": pictures.encode(good["benign/p6/2.png"][:, 4:]),
        "benign/p6/dark.png": pictures.encode(dark),
        "benign/p6/glass.png": pictures.encode(Image.fromarray(noise)),
        "benign/p6/cut.png": contents["benign/p6/0.png"][:400],
    }
    for name, content in contents.items():
        storage.write_bytes(storage.join(str(root), name), content)
    return root, contents


@pytest.mark.ray
def test_everything_that_was_planted_is_found_and_nothing_else(joined, planted, tmp_path, capsys):
    root, contents = planted
    parts = {name: "test" if "/p7/" in name or "/p4/" in name else "train" for name in contents}
    lines = ["image_id,part", *(f"{name},{part}" for name, part in parts.items())]
    (tmp_path / "split.csv").write_text("\n".join(lines))
    output = tmp_path / "out"
    config = AuditConfig(data=str(root), split=str(tmp_path / "split.csv"), output=str(output))
    with pytest.raises(AuditError, match=r"split.csv: a patient, slide or image is in several parts"):
        audit.run(config)
    result = json.loads((output / "audit.json").read_text())
    assert {one["kind"]: one["count"] for one in result["findings"]} == {
        "leak": 1,
        "duplicate_across": 1,
        "near_duplicate_crossing": 1,
        "near_duplicate_across": 1,
        "broken": 1,
        "blank": 1,
        "stain_outlier": 1,
        "duplicate_within": 1,
        "near_duplicate_within": 1,
        "size": 1,
    }
    named = {one["kind"]: set(one["details"][0]["images"]) for one in result["findings"]}
    assert named["near_duplicate_within"] == {"benign/p6/2.png", "benign/p6/moved.png"}
    assert named["near_duplicate_across"] == {"malignant/p1/0.png", "benign/p4/jpeg of p1.jpg"}
    assert named["stain_outlier"] == {"benign/p6/dark.png"}
    table = rows_of(output, "images.parquet")
    assert table.keys() == contents.keys()
    assert all(row[schema.SHA256] == hashlib.sha256(contents[n]).hexdigest() for n, row in table.items())
    assert {name: row[schema.ERROR] for name, row in table.items() if row[schema.ERROR]} == {
        "benign/p6/cut.png": "truncated"
    }
    near = pq.read_table(output / "near_duplicates.parquet")
    assert near.schema == schema.NEAR_DUPLICATES
    assert len(near) == 2
    html = (output / "audit.html").read_text()
    # Pairs: equal files twice, near ones three times; alone: glass and the dark one.
    assert html.count('src="data:image/jpeg') == 2 * 5 + 2
    said = capsys.readouterr().out
    assert re.search("checked 1[56] of 31 images", said)  # whichever block came first
    assert "VERDICT: split.csv leaks" in said


@pytest.mark.ray
def test_a_manifest_on_s3_gives_the_same_rows(joined, s3, planted, tmp_path):
    root, contents = planted
    names = sorted(contents)[:6]
    lines = [
        "uri,tumor_class,patient",
        *(f"{name},{name.split('/')[0]},{name.split('/')[1]}" for name in names),
    ]
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    for name in (*names, "manifest.csv"):
        source = tmp_path if name == "manifest.csv" else root
        storage.write_bytes(f"{s3}/audited/{name}", (source / name).read_bytes())
        if source is root:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, tmp_path / name)
    here = audit.run(AuditConfig(data=str(tmp_path / "manifest.csv"), output=str(tmp_path / "out")))
    there = audit.run(AuditConfig(data=f"{s3}/audited/manifest.csv", output=f"{s3}/audit"))
    assert here == there
    rows, remote = (rows_of(output, "images.parquet") for output in (tmp_path / "out", f"{s3}/audit"))
    without = [
        {n: {k: v for k, v in r.items() if k != schema.URI} for n, r in t.items()} for t in (rows, remote)
    ]
    assert without[0] == without[1]
    assert storage.exists(f"{s3}/audit/audit.html")


@pytest.mark.trial
@pytest.mark.ray
@pytest.mark.real
def test_real_fields_have_no_duplicates_and_only_cases_cross(joined, real_data, tmp_path):
    data, folds = real_data / "breakhis/BreaKHis_v1", real_data / "folds"
    result = audit.run(AuditConfig(data=str(data), folds=str(folds), output=str(tmp_path)))
    found = kinds(result)
    assert not found.keys() & {"leak", "duplicate_across", "near_duplicate_across", "broken", "blank"}
    assert [given.cases for given in result.splits] == [("14-22549",)] * 5
    assert found["stain_outlier"] == 3
    assert len(pq.read_table(tmp_path / "near_duplicates.parquet")) == 0
    assert {
        (row[schema.WIDTH_PX], row[schema.HEIGHT_PX]) for row in rows_of(tmp_path, "images.parquet").values()
    } == {(700, 460)}


@pytest.mark.real
def test_all_published_names_without_pixels_exit_1(real_data, tmp_path, monkeypatch, capsys):
    """The job, on empty files in the published tree: no Ray is started."""
    roles = breakhis.read_fold((real_data / "folds/dsfold1.txt").read_text(), "dsfold1.txt")
    for name in roles:
        tumor_class, *folders = breakhis.parse_path(name).folders
        folder = tmp_path.joinpath("BreaKHis_v1", tumor_class, "SOB", *folders)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    monkeypatch.setattr(audit.cluster, "connect", lambda: pytest.fail("Ray was started"))
    arguments = ["--data", str(tmp_path / "BreaKHis_v1"), "--folds", str(real_data / "folds")]
    monkeypatch.setattr(
        sys, "argv", ["audit.py", *arguments, "--no-pixels", "--output", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit, match="1"):
        cli.main("audit", "ray job submit")
    said = capsys.readouterr()
    assert said.err == "error: fold 1, fold 3, fold 5: a patient, slide or image is in several parts\n"
    assert "7,909 images of 81 patients in 70 cases; 81 slide ids under 82 labels" in said.out
    assert "fold 1: 8 cases in several parts (14-22549, " in said.out
    assert "WARNING: 7,909 broken images: 7,909 empty" in said.out
    assert len(rows_of(tmp_path / "out", "images.parquet")) == 7909


def test_bad_splits_are_found_before_pixels_are_read(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(audit.cluster, "connect", lambda: pytest.fail("Ray was started"))
    with pytest.raises(DataError, match=r"expected dsfold1.txt to dsfold5.txt"):
        audit.run(AuditConfig(data=tree, folds=tree, output=str(tmp_path / "out")))
    with pytest.raises(StorageError, match=r"there is no such folder"):
        audit.run(AuditConfig(data=tree, folds=str(tmp_path / "none"), output=str(tmp_path / "out")))
    (tmp_path / "split.csv").write_text("image_id,part\nother.png,train\n")
    with pytest.raises(DataError, match=r"split.csv: contains none of the images"):
        audit.run(AuditConfig(data=tree, split=str(tmp_path / "split.csv"), output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_a_split_that_does_not_leak_ends_well(tree, tmp_path):
    files = storage.list_files(tree)
    lines = [f"{f.path},{'test' if '-14-1' in f.path else 'train'}" for f in files if f.path.endswith(".png")]
    (tmp_path / "split.csv").write_text("\n".join(["image_id,part", *lines]))
    output = str(tmp_path / "out")
    result = audit.run(AuditConfig(data=tree, split=str(tmp_path / "split.csv"), output=output, pixels=False))
    assert result.leaking_splits == ()
    assert kinds(result).keys() <= {"published_counts", "case_crossing"}
    assert "Synthetic data." in (tmp_path / "out/audit.html").read_text()


def test_names_and_ids_that_identify_are_findings_without_pixels(tmp_path, capsys):
    for name in ("benign/Doe_1950/1.png", "malignant/p7/2.png", "malignant/p8/19500312.png"):
        storage.write_bytes(str(tmp_path / "data" / name), pictures.encode(pictures.gradient()))
    result = audit.run(AuditConfig(data=str(tmp_path / "data"), output=str(tmp_path / "out"), pixels=False))
    assert kinds(result)["identifier"] == 3
    table = pq.read_table(tmp_path / "out/identifiers.parquet")
    assert table.schema == schema.IDENTIFIERS
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("benign/Doe_1950", "name and number", "the name of the folder", "D***"),
        ("malignant/p8/19500312.png", "date", "the name of the file", "1***"),
        ("benign/Doe_1950/1.png", "name and number", "the patient", "D***"),
    ]
    said, page = capsys.readouterr().out, (tmp_path / "out/audit.html").read_text()
    for text in (said, page):
        assert "3 statements in 3 files or folders that may identify a patient" in text
        assert "benign/D***: name and number in the name of the folder (D***)" in text
        assert "1950" not in text
    assert "What may identify a patient" in page


def test_what_a_file_too_large_to_decode_states_is_found(tmp_path):
    content, expected = planted_identifiers.files()["d.svs"]
    (tmp_path / "d.tif").write_bytes(content)
    row = {schema.IMAGE_ID: "d.tif", schema.URI: str(tmp_path / "d.tif")}
    described = audit._described(row, ImageError("too_large", "large"))
    assert described[schema.ERROR] == "too_large"
    assert len(described["identifiers"]) == len(expected)
    assert audit._described(row, ImageError("unreadable", "no"))["identifiers"] == []


@pytest.mark.ray
def test_what_identifies_in_an_archive_without_classes_is_found(joined, s3, tmp_path):
    files, root = planted_identifiers.files(), f"{s3}/{tmp_path.name}-identifiers"
    for name, content in [(name, content) for name, (content, _) in files.items()] + [
        (f"clean/{name}", content) for name, content in planted_identifiers.clean().items()
    ]:
        storage.write_bytes(f"{root}/{name}", content)
    result = audit.run(AuditConfig(data=root, output=str(tmp_path / "out"), identifiers_only=True))
    assert kinds(result) == {"identifier": sum(len(expected) for _, expected in files.values())}
    assert result.verdict == result.findings[0].sentence
    found = {name: set() for name in files}
    for row in pq.read_table(tmp_path / "out/identifiers.parquet").to_pylist():
        found[row[schema.IMAGE_ID]].add((row[schema.IDENTIFIER], row[schema.FOUND_IN]))
    assert found == {name: expected for name, (_, expected) in files.items()}
    assert planted_identifiers.SECRET not in (tmp_path / "out/audit.html").read_text()
