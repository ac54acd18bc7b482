"""Synthetic images: names of BreaKHis, reproducible bytes, a class shown by nuclei and not by colour."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bcd.data import breakhis, synthetic
from bcd.data.synthetic import PatientPlan
from bcd.taxonomy import MAGNIFICATIONS, MALIGNANT, SUBTYPES

SMALL = PatientPlan(
    patients_per_subtype=2,
    images_per_magnification=2,
    magnifications=(40, 400),
    height_px=46,
    width_px=70,
)


def hashes(root: Path, plan: PatientPlan) -> dict[str, str]:
    """Write a tree; SHA-256 of every image by its path below the root."""
    paths = synthetic.write_tree(root, plan)
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    synthetic.write_tree(root, SMALL)
    return root


@pytest.fixture(scope="module")
def sample() -> dict[str, np.ndarray]:
    """One small field of each of 192 patients; images are uint8 (192, 92, 140, 3)."""
    plan = PatientPlan(height_px=92, width_px=140)
    codes = list(SUBTYPES) * 24
    fields = [
        synthetic.image(code, 90001 + i, MAGNIFICATIONS[i // 8 % 4], 1, plan) for i, code in enumerate(codes)
    ]
    malignant = [SUBTYPES[code].tumor_class == MALIGNANT for code in codes]
    return {"images": np.stack(fields), "malignant": np.array(malignant)}


def test_the_tree_is_named_and_laid_out_as_published(tree: Path) -> None:
    paths = sorted(path.relative_to(tree / "BreaKHis_v1") for path in tree.rglob("*.png"))
    names = [breakhis.parse_path(path.as_posix()) for path in paths]
    assert Counter(name.subtype for name in names) == dict.fromkeys(SUBTYPES, 2 * 2 * 2)
    assert {name.magnification for name in names} == {40, 400}
    assert {name.sequence for name in names} == {1, 2}
    assert {len({name.slide for name in names if name.subtype == code}) for code in SUBTYPES} == {2}
    assert len({name.slide for name in names}) == 2 * len(SUBTYPES), "a patient has one subtype"
    assert (
        paths[0].as_posix()
        == "histology_slides/breast/benign/SOB/adenosis/SOB_B_A_99-90001/400X/SOB_B_A-99-90001-400-001.png"
    )


def test_ids_cannot_be_taken_for_published_ones(tree: Path) -> None:
    names = [breakhis.parse_path(path.name) for path in tree.rglob("*.png")]
    assert {name.year for name in names} == {"99"}
    assert min(int(name.number) for name in names) == 90001


def test_the_tree_says_what_it_is(tree: Path) -> None:
    note = (tree / "BreaKHis_v1" / synthetic.MARKER).read_text(encoding="utf-8")
    assert note.startswith("These images are synthetic")


def test_paths_come_sorted_and_all_exist(tmp_path: Path) -> None:
    paths = synthetic.write_tree(tmp_path, PatientPlan(1, 1, (100,), 46, 70))
    assert paths == sorted(paths)
    assert sorted(tmp_path.rglob("*.png")) == paths
    assert len(paths) == len(SUBTYPES)


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tree: Path, tmp_path: Path) -> None:
    once = {
        str(path.relative_to(tree)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in tree.rglob("*.png")
    }
    assert hashes(tmp_path / "again", SMALL) == once
    other = hashes(tmp_path / "other", PatientPlan(2, 2, (40, 400), 46, 70, seed=1))
    assert other.keys() == once.keys()
    assert not set(other.values()) & set(once.values())
    assert len(set(once.values())) == len(once), "no duplicates"


def test_an_image_does_not_depend_on_the_number_of_others(tree: Path, tmp_path: Path) -> None:
    few = hashes(tmp_path, PatientPlan(1, 1, (400,), 46, 70))
    for path, digest in few.items():
        assert hashlib.sha256((tree / path).read_bytes()).hexdigest() == digest


def test_files_hold_what_image_draws(tree: Path) -> None:
    path = next(tree.rglob("SOB_M_MC-99-90007-40-002.png"))
    with Image.open(path) as picture:
        assert picture.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(picture), synthetic.image("MC", 90007, 40, 2, SMALL))


@pytest.mark.parametrize("magnification", MAGNIFICATIONS)
@pytest.mark.parametrize("subtype", SUBTYPES)
def test_a_field_looks_like_a_stained_section(subtype: str, magnification: int) -> None:
    pixels = synthetic.image(subtype, 90001, magnification, 1, PatientPlan(height_px=115, width_px=175))
    assert pixels.shape == (115, 175, 3)
    assert pixels.dtype == np.uint8
    red, green, blue = np.moveaxis(pixels.astype(int), -1, 0)
    assert np.mean(green <= np.minimum(red, blue) + 12) > 0.9, "pink, purple or nearly white everywhere"
    nuclei = (blue > red) & (green < 170)
    assert 0.03 < nuclei.mean() < 0.6
    assert np.percentile(green, 99) > 200, "some of it is pale"


def balanced_accuracy(features: np.ndarray, malignant: np.ndarray) -> float:
    """Of a logistic regression, on patients that it has not seen."""
    predicted = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression()),
        features,
        malignant,
        cv=StratifiedKFold(5, shuffle=True, random_state=0),
    )
    return balanced_accuracy_score(malignant, predicted)


def test_colour_does_not_reveal_the_class(sample: dict[str, np.ndarray]) -> None:
    assert balanced_accuracy(sample["images"].mean((1, 2)), sample["malignant"]) <= 0.65


def test_nuclei_reveal_the_class_most_of_the_time(sample: dict[str, np.ndarray]) -> None:
    red = sample["images"][..., 0]  # haematoxylin darkens it, eosin hardly does
    darkest = np.percentile(red, (1, 5, 10, 25, 50), axis=(1, 2)).T / red.mean((1, 2))[:, None]
    assert 0.75 <= balanced_accuracy(darkest, sample["malignant"]) <= 0.95


def test_stain_varies_between_patients_far_more_than_between_classes(sample: dict[str, np.ndarray]) -> None:
    colour = sample["images"].mean((1, 2))
    between = np.abs(colour[sample["malignant"]].mean(0) - colour[~sample["malignant"]].mean(0))
    assert (colour.std(0) > 2 * between).all()
