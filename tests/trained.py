"""One training for all tests that need one: submitted as a job, two workers, on S3."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data import Dataset
from ray.job_submission import JobStatus, JobSubmissionClient

from bcd import schema, storage
from bcd.config.training import TrainConfig
from bcd.data import read
from bcd.imaging import image
from bcd.model import bundle, novelty, predictor
from bcd.model.card import Card
from bcd.model.novelty import FeatureStatistics
from bcd.model.resnet import ResNet
from bcd.runtime import predict
from tests.cluster import PATIENCE_S, Cluster, finish, kill, read_json, submit, wait_for
from tests.runtime.test_datasets import small


def score_here(dataset: Dataset, settings: predict.Settings, max_workers: int | None = None) -> Dataset:
    """In place of `predict.score_rows`: by the same worker, in this process, which has torch already."""
    rows = pa.concat_tables(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    return ray.data.from_arrow(scored(rows, settings))


def scored(rows: pa.Table, settings: predict.Settings) -> pa.Table:
    """Predictions of rows of `schema.READING`, read and scored in this process."""
    card = bundle.read_card(settings.model_uri)
    return predict.Scorer(settings, 2)(read.pixels(rows, **predict.reading_options(card, predict.CARRIED)))


def statistics_here(
    network: ResNet, card: Card, train: pa.Table, validation: pa.Table
) -> tuple[FeatureStatistics, np.ndarray]:
    """In place of `feature_statistics.compute_statistics`, likewise."""
    model = predictor.from_state(network.state_dict(), card)
    (pooled, _), (held_out, logit) = (
        model.pooled(np.stack([model.fit(image.decode(storage.read_bytes(uri))) for uri in uris]))
        for uris in (rows[schema.URI].to_pylist() for rows in (train, validation))
    )
    mean, spread = novelty.spread(len(pooled), pooled.sum(0, np.float64), (pooled.astype(float) ** 2).sum(0))
    cutoff = novelty.cutoff(novelty.distance(held_out, mean, spread))
    facts = {"mean": mean.tolist(), "spread": spread.tolist(), "cutoff": cutoff}
    return FeatureStatistics(**facts, n_training=len(pooled), n_validation=len(held_out)), logit


@dataclass(frozen=True)
class Trained:
    """The settings, the run's URI, and the log of its job."""

    config: TrainConfig
    uri: str
    log: str


def flags_of(settings: dict[str, object]) -> list[str]:
    """Command-line flags of the settings."""
    return [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]


def wait_for_epoch(client: JobSubmissionClient, job: str, run_uri: str, epoch: int) -> None:
    """Until the checkpoint of an epoch is kept, so that the next epoch is running."""

    def kept() -> bool:
        assert not client.get_job_status(job).is_terminal(), client.get_job_logs(job)
        return storage.exists(f"{run_uri}/exposure/epoch-{epoch:04d}.parquet") and storage.exists(
            f"{run_uri}/checkpoints/checkpoint_manager_snapshot.json"
        )

    wait_for(kept, PATIENCE_S, f"epoch {epoch}")


def check_whole(run_uri: str, epochs: int) -> None:
    """The run is finished, its history whole, and the bundle predicts without Ray what the table says."""
    history = read_json(f"{run_uri}/history.json")
    assert [record["epoch"] for record in history] == list(range(1, epochs + 1))
    assert read_json(f"{run_uri}/run.json")["status"] == "finished"
    measured = read_json(f"{run_uri}/metrics.json")
    loaded = predictor.load(f"{run_uri}/model", device="cpu")
    filesystem, path = storage.resolve(f"{run_uri}/predictions")
    rows = pq.read_table(path, filesystem=filesystem).to_pylist()
    assert len(rows) == measured["n_images"] > 0
    direct = loaded.predict_files([storage.read_bytes(row[schema.URI]) for row in rows])
    np.testing.assert_allclose([row[schema.LOGIT] for row in rows], direct.logit, atol=1e-4)


def trained_by_a_job(cluster: Cluster, data: str, output: str, killed: bool = False) -> Trained:
    """Submit the training; if asked to, SIGKILL its driver in epoch 2, and submit the same command again."""
    config = small(
        data,
        output=output,
        prepared="auto",
        name="killed" if killed else "two",
        num_workers="2",
        epochs=2,
        batch_size=16,
        precision="float32",
    )
    client = JobSubmissionClient(cluster.dashboard)
    uri = storage.join(config.output, config.name)
    command = ("jobs/train.py", *flags_of(config.model_dump(mode="json", exclude_unset=True)))
    if killed:
        first = submit(cluster, *command)
        wait_for_epoch(client, first, uri, 1)
        assert kill(cluster.processes(), rf"python jobs/train.py .*--name {config.name}")
        assert finish(client, first)[0] == JobStatus.FAILED
        assert not storage.exists(f"{uri}/metrics.json")
    status, log = finish(client, submit(cluster, *command))
    assert status == JobStatus.SUCCEEDED, log
    return Trained(config, uri, log)
