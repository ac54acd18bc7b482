"""How good a model is on the patients that it has never seen: predictions, metrics, report, card."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from bcd import bundle, metrics, provenance, report, schema, storage
from bcd.config import EvaluateConfig, TrainConfig
from bcd.errors import DataError
from bcd.pipelines import cluster, predict, read
from bcd.pipelines.prepare import Facts, class_counts, part_of, prepare

PREDICTIONS, METRICS, REPORT, HISTORY = "predictions", "metrics.json", "report.html", "history.json"
TRUTH = (schema.IMAGE_ID, schema.CASE, schema.TUMOR_CLASS, schema.SUBTYPE, schema.MAGNIFICATION)
TEST = "test"


def run(config: EvaluateConfig) -> str:
    """Evaluate a bundle on the test part of its data set, and return the URI of the output.

    The split is made again from the settings in the card; the fingerprint proves that it is the same.

    Raises:
        DataError: the data is not what the model was trained on, so its test part is not known.
    """
    card = bundle.read_card(config.model)
    output = config.output or storage.parent(config.model)
    storage.check_writable(output)
    cluster.connect()
    training = TrainConfig(**card.training | {"data": config.data})
    table, facts = prepare(training)
    if facts.split_fingerprint != card.split_fingerprint:
        raise DataError(
            f"{config.data} is not the data that {config.model} was trained on (split fingerprint "
            f"{facts.split_fingerprint[:12]}, expected {card.split_fingerprint[:12]}): which of its images "
            "the model has never seen is not known"
        )
    evaluate(config.model, table, facts, output, config.batch_size, config.precision)
    return output


def evaluate(
    model_uri: str,
    table: pa.Table,
    facts: Facts,
    output: str,
    batch_size: int = 32,
    precision: str = "float32",
) -> dict[str, Any]:
    """Score the test part through the same pipeline as archives, and write all that is told about it.

    Predictions first, then metrics, card and report; each of them whole or not at all.
    """
    card = bundle.read_card(model_uri)
    test = part_of(table, TEST)
    print(f"scoring the test part: {len(test):,} images", flush=True)
    predictions_uri = storage.join(output, PREDICTIONS)
    settings = predict.Settings(model_uri, precision, batch_size)
    rows = predict.predictions(read.rows(schema.fill(test, schema.READING)), settings)
    predict.write(rows, predictions_uri)
    frame = _with_truth(predictions_uri, test)
    about = _about(card, frame, facts)
    measured = about | metrics.evaluate(frame, card.threshold, card.classes)
    measured["summary"] = report.summary(measured)
    storage.write_bytes(
        storage.join(output, METRICS), json.dumps(measured, indent=2, allow_nan=False).encode()
    )
    card = card.model_copy(update={"metrics": measured})
    bundle.write_card(card, model_uri, about[schema.MODEL_ID])
    counts = class_counts(TrainConfig(**card.training), table)
    _write_report(output, measured, _history(model_uri), frame, about | facts.model_dump() | counts)
    return measured


def _with_truth(predictions_uri: str, test: pa.Table) -> pd.DataFrame:
    """Predictions without their maps, beside what the index says of each image."""
    columns = [schema.IMAGE_ID, schema.PATIENT, schema.SLIDE, schema.LOGIT, schema.PROBABILITY]
    columns += [schema.PROBABILITY_MALIGNANT, schema.PREDICTED_CLASS, schema.ERROR, schema.MODEL_ID]
    scored = predict.read_back(predictions_uri, columns).to_pandas()
    return scored.merge(test.select(list(TRUTH)).to_pandas(), on=schema.IMAGE_ID, validate="one_to_one")


def _about(card: bundle.Card, frame: pd.DataFrame, facts: Facts) -> dict[str, Any]:
    return {
        schema.MODEL_ID: str(frame[schema.MODEL_ID].iloc[0]),
        "title": f"Breast cancer detection: {card.training['name']}",
        "data": card.training["data"],
        "weights": card.training["weights"],
        "best_epoch": card.validation[schema.EPOCH],
        "protocol": card.protocol,
        "fold": card.fold,
        "seed": card.seed,
        "leaky": card.leaky,
        "synthetic": card.synthetic,
        "data_fingerprint": facts.data_fingerprint,
        "split_fingerprint": facts.split_fingerprint,
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
    }


def _history(model_uri: str) -> list[dict[str, Any]]:
    """The training history beside the bundle, where the bundle lies in its run."""
    uri = storage.join(storage.parent(model_uri), HISTORY)
    return json.loads(storage.read_bytes(uri)) if storage.exists(uri) else []


def _write_report(
    output: str,
    measured: dict[str, Any],
    history: list[dict[str, Any]],
    frame: pd.DataFrame,
    facts: dict[str, Any],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report.write(Path(folder), measured, history, frame, facts)
        storage.upload_folder(Path(folder), output, last=REPORT)
    for line in report.summary_lines(measured):
        print(line)
    print(f"report: {storage.join(output, REPORT)}", flush=True)
