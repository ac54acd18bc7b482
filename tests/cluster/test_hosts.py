"""Training and scoring over several hosts: the same numbers as on one, and whatever becomes of a host."""

import itertools

import numpy as np
import pytest

from bcd import storage
from tests.cluster import read_json
from tests.cluster.conftest import EPOCHS
from tests.cluster.hosts import LOSSES, SCORER, TRAINER
from tests.cluster.test_soak import check_rows, repeated
from tests.end_to_end.test_score_jobs import assert_same, segments, table
from tests.trained import check_whole, wait_for_epoch

pytestmark = [pytest.mark.ray, pytest.mark.trial]


def test_two_hosts_train_the_same_model_as_one(hosts, training, bucket, real_data, request):
    """Done when 1: every epoch is one step of all rows, so that both see the same global batch.

    The first loss is of the same weights, the second of those after one step; then rounding grows. From
    trained weights: at random ones float32 alone, on one host, moves the gradient by two percent.
    """
    weights = f"{bucket}/weights.safetensors"
    storage.write_bytes(weights, (real_data / "weights/resnet50_imagenet.safetensors").read_bytes())
    same = (
        "--architecture",
        "resnet50",
        "--weights",
        weights,
        "--batch-size",
        "64",
        "--no-augment",
        "--precision",
        "float32",
    )
    same += ("--learning-rate", "0.0005")
    alone = training(*same, "--num-workers", "1")
    alone.succeed()
    request.getfixturevalue("both")
    pair = training(*same, "--num-workers", "2")
    pair.wait_for_work_on(hosts.one, hosts.two, of=TRAINER)
    pair.succeed()
    histories = [read_json(f"{job.output}/history.json") for job in (alone, pair)]
    assert [[record["workers"] for record in history] for history in histories] == [
        [1] * EPOCHS,
        [2] * EPOCHS,
    ]
    counts, losses, validation = (
        [[record[name] for record in history] for history in histories]
        for name in ("class_counts", "train_loss", "validation_loss")
    )
    assert counts[0] == counts[1]
    apart = np.abs(np.subtract(*losses))
    assert (apart < (1e-5, 1e-4, *(EPOCHS - 2) * [5e-3])).all(), losses
    assert validation[1] == pytest.approx(validation[0], abs=5e-3)
    losses = losses[0]
    assert max(losses) - min(losses) > 0.05  # it learnt: equal losses say something


def test_two_hosts_score_the_same_table_as_one(undisturbed, both, scoring):
    job = scoring()
    job.wait_for_work_on(both.one, both.two, of=SCORER)
    job.succeed()
    assert_same(table(job.output), undisturbed)


# Minutes of work for one host: a second one needs one until its model is up.
N_JOINED = 6_000


@pytest.fixture
def one_more(hosts):
    """Lets the second worker join; it is gone afterwards."""
    yield lambda: hosts.join(hosts.two)
    hosts.leave(hosts.two)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_host_changes_nothing_in_the_table(loss, undisturbed, both, scoring):
    """Done when 2."""
    job = scoring()
    job.wait_for_work_on(both.one, both.two, of=SCORER)
    job.wait_for(lambda: segments(job.output), "the first segment")
    both.lose(loss)
    job.succeed()
    assert_same(table(job.output), undisturbed)


def test_a_host_that_joins_takes_part_in_scoring(undisturbed, one_more, hosts, scoring, bucket):
    job = scoring(source=repeated(undisturbed, N_JOINED, f"{bucket}/joined.csv"))
    job.wait_for_work_on(hosts.one, of=SCORER)
    one_more()
    job.wait_for_work_on(hosts.two, of=SCORER)
    job.succeed()
    check_rows(table(job.output), undisturbed, N_JOINED)


@pytest.mark.parametrize("loss", LOSSES)
def test_training_continues_without_a_lost_host(loss, both, training):
    """Done when 2: with whole metrics, and at most the running epoch lost. An epoch takes a second, and Ray
    fifteen until it notices the loss."""
    epochs = 10 * EPOCHS
    job = training("--num-workers", "1-3", epochs=epochs)
    wait_for_epoch(both.client, job.id, job.output, 1)
    job.wait_for_work_on(both.one, both.two, of=TRAINER)
    both.lose(loss)
    job.succeed()
    check_whole(job.output, epochs)
    workers = [record["workers"] for record in read_json(f"{job.output}/history.json")]
    assert [n for n, _ in itertools.groupby(workers)] == [3, 2]
