import pytest

from bcd import storage
from bcd.config.training import TrainConfig
from bcd.errors import ConfigError, DataError, StorageError
from bcd.preflight.dry_run import train
from bcd.runtime import prepare, run_directory
from bcd.split import split
from bcd.text import size

SMALL = {"architecture": "resnet18", "weights": "none", "input_height_px": 64, "input_width_px": 96}
PARTS = {"validation_fraction": 0.33, "test_fraction": 0.34}


def config(tree, **changes):
    return TrainConfig(**{"data": tree, "epochs": 3, "batch_size": 5} | SMALL | PARTS | changes)


def test_it_states_data_split_steps_space_and_time(dry, tree):
    lines = dry(train, config(tree))
    text = "\n".join(lines)
    n_bytes = sum(file.size_bytes for file in storage.list_files(tree) if file.path.endswith(".png"))
    counts = f"48 images, {size(n_bytes)}; benign 24 of 12 patients, malignant 24 of 12 patients"
    assert lines[0] == f"{tree}: {counts}"
    rows, facts = train.data_set(config(tree))
    parts, _ = prepare.prepare(config(tree), (rows, facts))
    for part in ("train", "validation", "test"):
        n = len(prepare.part_of(parts, part))
        assert any(line.startswith(f"{part}: {n} images of ") for line in lines)
    # As many images of both classes, so that nothing is repeated.
    n = len(prepare.part_of(parts, "train"))
    steps = -(-n // 5)
    assert f"an epoch: {n} images, balanced, {steps} steps; 3 epochs: {3 * steps} steps" in lines
    assert "resnet18: input 64x96 px, batches of 5, weights none (random); classes benign, malignant" in lines
    assert f"{size(48 * 64 * 96 * 3)} more to write" in text
    assert "estimates, from 8 images and 2 steps of 5 images in this process" in text
    assert text.count("about ") == 4
    assert "free space for runs: " in text


def test_the_split_is_that_of_the_training(tree):
    """Whose images are read first, and here are whole and no duplicates."""
    given = config(tree, seed=3)
    rows, facts = train.data_set(given)
    parts, found = prepare.prepare(given, (rows, facts))
    assert found.split_fingerprint == split.fingerprint(parts)
    hashed = rows.set_column(
        rows.column_names.index("sha256"), "sha256", rows["image_id"]
    )  # of each image another
    assert split.fingerprint(prepare.prepare(given, (hashed, facts))[0]) == found.split_fingerprint


def test_a_run_that_is_begun_keeps_its_split(dry, tree, tmp_path):
    given = config(tree, output=str(tmp_path / "runs"))
    uri = storage.join(given.output, given.name)
    parts, _ = prepare.prepare(given, train.data_set(given))
    run_directory.claim_run(given, uri)
    run_directory.write_split(uri, parts.slice(0, 40))
    run_directory.write_json(uri, run_directory.HISTORY, [{}])
    lines = dry(train, given)
    assert f"{uri} is begun: its split is used, and 1 of 3 epochs are done" in lines
    assert any(line.startswith("  all, with 2 epochs and the test part: about ") for line in lines)
    with pytest.raises(ConfigError, match="was started with other settings: --epochs 3 -> 4"):
        dry(train, given.model_copy(update={"epochs": 4}))


@pytest.mark.parametrize("changes", [{"head": "linear", "weights": "hf-hub:o/n"}, {"ema_decay": 0.9}])
def test_what_is_particular_to_a_training_is_measured_too(dry, tree, changes):
    lines = dry(train, config(tree, prepared="off", **changes))
    assert "prepared images: none, every file is decoded in every epoch" in lines


def test_a_fault_is_that_of_the_training(dry, tree, tmp_path):
    with pytest.raises(StorageError, match=r"none\.pth"):
        dry(train, config(tree, weights=str(tmp_path / "none.pth")))
    with pytest.raises(DataError, match="no image below it"):
        dry(train, config(str(tmp_path / "home")))
    (tmp_path / "runs/train").mkdir(parents=True)
    (tmp_path / "runs/train/thesis.docx").write_text("mine")
    with pytest.raises(ConfigError, match=r"contains thesis\.docx"):
        dry(train, config(tree))
