from bcd import provenance
from bcd.config.training import TrainConfig
from bcd.runtime.tracking import values
from tests.runtime.tracking.made import HISTORY, MEASURED


def test_settings_are_text_without_folders():
    config = TrainConfig(data="/home/someone/BreaKHis_v1", name="first", classes=("benign=0", "malignant=1"))
    found = values.settings_of(config.model_dump(mode="json"))
    assert found["data"] == "BreaKHis_v1"
    assert found["classes"] == "benign=0, malignant=1"
    assert (found["epochs"], found["quarantine"]) == (str(config.epochs), "True")
    assert "folds" not in found  # not set
    assert values.settings_of({"data": "s3://bucket/a", "name": "n" * 600}) == {
        "data": "s3://bucket/a",
        "name": "n" * 500,
    }


def test_an_epoch_is_its_numbers():
    found = values.epoch_of(HISTORY[0])
    assert found["train_loss"] == 1.0
    assert found["class_counts.malignant"] == 4000.0
    assert "images_from" not in found


def test_metrics_have_the_bounds_of_their_intervals():
    assert values.metrics_of(MEASURED) == {
        "auc": 0.9,
        "auc.low": 0.7,
        "auc.high": 0.95,
        "accuracy": 0.8,
        "n_images": 30.0,
        "n_patients": 5.0,
        "n_errors": 0.0,
        "threshold": 0.5,
    }
    spread = {"auc": {"mean": 0.85, "sd": None, "n": 1}}
    found = values.metrics_of(MEASURED | {"spread": spread})
    assert found["auc.fold_mean"] == 0.85
    assert "auc.fold_sd" not in found


def test_tags_say_which_model_data_and_code():
    assert values.tags_of(MEASURED) == {
        "model_id": "0123456789abcdef",
        "data_fingerprint": "d" * 64,
        "split_fingerprint": "5" * 64,
        "protocol": "case",
        "tested_on": "held_out",
        "synthetic": "True",
    }
    assert values.code_of()["bcd_version"] == provenance.own_version()
