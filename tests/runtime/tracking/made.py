"""Folders as the jobs write them, without images or a training, and an MLflow that keeps files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bcd import storage
from bcd.config.training import CrossvalConfig, TrainConfig
from bcd.imaging import image
from bcd.model import predictor
from bcd.runtime import run_directory
from tests.model.test_bundle import card, untrained

RECORD = {
    "validation_loss": 0.25,
    "validation_balanced_accuracy": 0.875,
    "class_counts": {"benign": 4000, "malignant": 4000},
    "images_from": "host memory",
}
HISTORY = [RECORD | {"epoch": epoch, "train_loss": 1 / epoch} for epoch in (1, 2, 3)]
MEASURED: dict[str, Any] = {
    "model_id": "0123456789abcdef",
    "data_fingerprint": "d" * 64,
    "split_fingerprint": "5" * 64,
    "protocol": "case",
    "tested_on": "held_out",
    "synthetic": True,
    "leaky": False,
    "too_few_patients": None,
    "best_epoch": 2.0,
    "threshold": 0.5,
    "temperature": None,
    "n_images": 30,
    "n_patients": 5,
    "n_errors": 0,
    "pooled": {
        "auc": 0.9,
        "accuracy": 0.8,
        "sensitivity": None,
        "confusion_matrix": [[1, 2], [3, 4]],
        "n_patients": 5,
        "intervals": {"auc": [0.7, 0.95], "accuracy": None},
        "support": {"auc": 5},
    },
}
PNG = image.encode_png(np.full((20, 30, 3), 200, np.uint8))


def begun(uri: str, n_epochs: int = 0, **changes: Any) -> TrainConfig:
    """A run that has claimed its folder, and so many epochs."""
    settings = {"data": "/home/someone/BreaKHis_v1", "name": "first", "weights": "none", "fold": None}
    config = TrainConfig(**settings | changes)
    run_directory.claim_run(config, uri)
    run_directory.write_json(uri, run_directory.DATA, {"data_fingerprint": "d" * 64, "synthetic": True})
    if n_epochs:
        run_directory.write_json(uri, run_directory.HISTORY, HISTORY[:n_epochs])
    return config


def evaluated(uri: str, **changes: Any) -> None:
    """Metrics, report and a figure."""
    run_directory.write_json(uri, run_directory.METRICS, MEASURED | changes)
    storage.write_bytes(f"{uri}/report.html", b"<p>")
    storage.write_bytes(f"{uri}/figures/roc.png", PNG)
    storage.write_bytes(f"{uri}/figures/roc.svg", b"<svg/>")


def finished(uri: str, bundle_uri: str | None = None, **changes: Any) -> None:
    """A whole run, with a copy of a bundle."""
    config = begun(uri, 3, **changes)
    if bundle_uri:
        for file in storage.list_files(bundle_uri):
            storage.write_bytes(f"{uri}/model/{file.path}", storage.read_bytes(file.uri))
    evaluated(uri)
    run_directory.finish_run(config, uri, {})


def study(uri: str) -> CrossvalConfig:
    """A study that has begun."""
    config = CrossvalConfig(data="d", name="study", k=2)
    run_directory.claim_run(config, uri)
    return config


def bundle_in(folder: Path) -> str:
    """A bundle of an untrained network."""
    predictor.save(untrained(), card(), str(folder))
    return str(folder)


def of_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of an MLflow that keeps files in the folder, as the job's own would have."""
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", folder.as_uri())
    return mlflow.MlflowClient()
