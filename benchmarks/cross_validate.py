"""Five-fold cross-validation by patient through the training pipeline: how good, on a small data set?

    python -m benchmarks.cross_validate --data manifest.csv --weights resnet50.safetensors [--epochs 6]

Every fold trains by `bcd.pipelines.train.fit` on Ray and takes its last epoch as it is: nothing is chosen by
the held-out patients, who are looked at after each epoch only to print its curve. The pooled figures are over
all images, each predicted by the one model that has not seen its patient.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
from safetensors.torch import load_file
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from bcd import bundle, image, index, model, provenance, schema, storage
from bcd.config import TrainConfig
from bcd.pipelines import cluster, read, train, worker
from bcd.taxonomy import classes

FOLDS = 5
MALIGNANT = "malignant"


def card(config: TrainConfig) -> bundle.Card:
    """All that a prediction needs to be told."""
    return bundle.Card(
        target=config.target,
        classes=classes(config.target),
        input_height_px=config.input_height_px,
        input_width_px=config.input_width_px,
        field_height_px=config.input_height_px,
        field_width_px=config.input_width_px,
        mpp=(),
        magnifications=(),
        protocol="patient",
        seed=config.seed,
        data_fingerprint="",
        split_fingerprint="",
        leaky=False,
        synthetic=False,
        training=config.model_dump(mode="json"),
        validation={},
        versions=provenance.versions(),
        git_commit=provenance.git_commit(),
    )


def fold(config: TrainConfig, rows: pa.Table, held_out: np.ndarray, weights: model.State) -> np.ndarray:
    """Train on the other patients; probabilities of malignancy of the held-out images."""
    parts = np.full(len(rows), read.TRAIN, object)
    parts[held_out] = read.VALIDATION
    table = rows.append_column(schema.PART, pa.array(parts, pa.string())).cast(schema.SPLIT)
    run_uri = storage.join(config.output, config.name)
    result = train.fit(config, run_uri, table, weights, cluster.scaling(config))
    for record in result.return_value:
        print(
            f"  epoch {record['epoch']}: loss {record['train_loss']:.3f}, "
            f"balanced accuracy {record[worker.SCORE]:.3f}"
        )
    with result.checkpoint.as_directory() as folder:
        loaded = bundle.from_state(load_file(Path(folder) / worker.WEIGHTS_FILE), card(config))
    uris = rows.take(pa.array(held_out))[schema.URI].to_pylist()
    pictures = (loaded.fit(image.decode(storage.read_bytes(uri))) for uri in uris)
    return np.concatenate([loaded.predict(picture[None]).probability_malignant for picture in pictures])


def main() -> None:
    """Train the folds and print the figures."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", required=True, help="as for jobs/train.py")
    parser.add_argument("--weights", required=True, help="as for jobs/train.py")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the folds and of the training")
    arguments = parser.parse_args()
    weights = model.pretrained(arguments.weights)
    rows, _ = index.read(arguments.data)
    truth = np.array([name == MALIGNANT for name in rows[schema.TUMOR_CLASS].to_pylist()])
    patients = np.array(rows[schema.PATIENT].to_pylist())
    cluster.connect()
    predicted = np.full(len(rows), np.nan)
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=arguments.seed)
    with tempfile.TemporaryDirectory() as output:
        for number, (_, held_out) in enumerate(splitter.split(truth, truth, patients), 1):
            config = TrainConfig(output=output, name=f"fold{number}", **vars(arguments))
            n_patients = len(set(patients[held_out]))
            print(f"fold {number}: {len(held_out)} images of {n_patients} patients", flush=True)
            predicted[held_out] = fold(config, rows, held_out, weights)
            wrong = ((predicted[held_out] >= 0.5) != truth[held_out]).sum()
            print(f"fold {number}: {wrong} of {len(held_out)} wrong", flush=True)
    accuracy, area = balanced_accuracy_score(truth, predicted >= 0.5), roc_auc_score(truth, predicted)
    print(
        f"pooled, n = {len(rows)} ({(~truth).sum()} benign) of {len(set(patients))} patients: "
        f"balanced accuracy {accuracy:.3f}, AUC {area:.3f}"
    )


if __name__ == "__main__":
    main()
