"""Real inputs that once got a wrong answer, each with the right one; see `README.md` beside them."""

import numpy as np
import pyarrow as pa
import pytest

from bcd import schema
from bcd.data import archive, index, read
from bcd.errors import DataError
from bcd.scoring import tiling

TILING = tiling.Tiling(tile_mpp=0.49, tile_width_px=700, tile_height_px=460, mpp=None, min_tissue=0.1)


@pytest.fixture
def cases(real_data):
    return real_data / "cases"


def scored(uri, tmp_path):
    """What the archive job reads of each input, by its id: rows, error codes, mean RGB."""
    table, found = archive.list_inputs(str(uri)).table, {}
    for i, name in enumerate(table[schema.IMAGE_ID].to_pylist()):
        one = table.slice(i, 1)
        if tiling.may_be_slide(one[schema.URI][0].as_py()):
            one = pa.concat_tables(tiling.expand(one, TILING, f"{tmp_path}/{uri.name}", frozenset()))
        pixels = read.pixels(schema.fill(one, schema.READING), 64, 96, [])
        mean = pixels[schema.IMAGE].mean((0, 1, 2))
        found[name] = (len(one), set(pixels[schema.ERROR]), mean)
    return found


def test_images(cases, tmp_path):
    found = scored(cases / "images", tmp_path)
    assert {name: errors for name, (_, errors, _) in found.items()} == {
        "12_of_16_bit.tif": {"unsupported_format"},
        "icc_above_1MiB.png": {""},
        "imagej_composite.tif": {""},
        "onebyte_palette.tif": {"truncated"},
        "webp.tif": {"unsupported_format"},
    }
    # Two files of one picture: as an ordinary PNG, and with its three channels in pages of their own.
    np.testing.assert_allclose(found["imagej_composite.tif"][2], found["icc_above_1MiB.png"][2], atol=1)


def test_slides(cases, tmp_path):
    found = scored(cases / "slides", tmp_path)
    assert {name: errors for name, (_, errors, _) in found.items()} == {
        "40000px_um_0.003.tif": {"bad_mpp"},
        "bounds.scn": {""},
        "x0.5_y0.25.tif": {""},
        "yellowed_glass.tif": {""},
    }
    assert found["yellowed_glass.tif"][0] == 1
    plan = tiling.read_plan(f"{tmp_path}/slides", "yellowed_glass.tif")
    assert 0.05 <= round(plan.tissue_area_mm2, 2) <= 0.08
    plan = tiling.read_plan(f"{tmp_path}/slides", "x0.5_y0.25.tif")
    assert (plan.mpp_x, plan.mpp_y) == (0.5, 0.25)
    plan = tiling.read_plan(f"{tmp_path}/slides", "bounds.scn")
    assert (plan.bounds_x_px, plan.bounds_y_px) == (1000, 600)


def test_series_of_one_dicom_folder_are_slides_of_their_own(cases, tmp_path):
    found = scored(cases / "dicom", tmp_path)
    assert {name: errors for name, (_, errors, _) in found.items()} == {f"p{i}.dcm": {""} for i in (1, 2, 3)}


def test_manifests(cases, tmp_path):
    assert scored(cases / "manifests/trailing_comma.csv", tmp_path)["p.png"][:2] == (1, {""})
    assert archive.list_inputs(str(cases / "manifests/trailing_comma.csv")).table[
        schema.PATIENT
    ].to_pylist() == ["007"]
    assert scored(cases / "manifests/mpp_column.csv", tmp_path)["no_mpp.tif"][:2] == (1, {""})
    # Without a scale a file of one level is a field.
    assert scored(cases / "manifests/no_mpp.tif", tmp_path)["no_mpp.tif"][:2] == (1, {""})


def patients(uri):
    table, warnings = index.read_index(str(uri))[:2]
    rows = table.to_pylist()
    return {(row[schema.TUMOR_CLASS], row[schema.PATIENT]) for row in rows}, warnings


def test_training_trees(cases):
    expected = {(name, f"{site}/P{i}") for name in ("benign", "malignant") for site in "AF" for i in range(3)}
    assert patients(cases / "training/sites_A_F")[0] == expected
    with pytest.raises(DataError, match=r"100X is no patient; expected CLASS/PATIENT/IMAGE"):
        index.read_index(str(cases / "training/cls_then_mag"))


def test_training_manifests(cases):
    folder = cases / "training/man"
    expected = {("benign", str(i)) for i in range(4)} | {("malignant", str(i)) for i in range(10, 14)}
    for name in ("patient_float.csv", "spaces_patient.csv", "split_col.csv"):
        found, warnings = patients(folder / name)
        assert found == expected
        assert any("'split' is not used" in text for text in warnings) == (name == "split_col.csv")
    with pytest.raises(DataError, match=r"mpp_neg.csv, line 2: the mpp is '-1'"):
        index.read_index(str(folder / "mpp_neg.csv"))
