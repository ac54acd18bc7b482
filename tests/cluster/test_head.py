"""Done when 3: what the loss of the head leaves, and that the same command resumes at a new one."""

import pytest

from bcd import storage
from tests.cluster import PATIENCE_S, read_json, wait_for
from tests.cluster.conftest import EPOCHS
from tests.end_to_end.test_score_jobs import assert_same, segments, table
from tests.trained import check_whole, wait_for_epoch

pytestmark = [pytest.mark.ray, pytest.mark.trial]


def new_head(hosts):
    """The head is lost, Ray on the worker gives up by itself, and all start anew at the same addresses."""
    hosts.head.lose()
    wait_for(lambda: not hosts.one.runs("raylet/raylet"), PATIENCE_S, "the end of Ray on the worker")
    hosts.one.lose()
    hosts.start_head()
    hosts.join(hosts.one)


def test_scoring_resumes_at_a_new_head(hosts, scoring, undisturbed):
    job = scoring()
    job.wait_for(lambda: segments(job.output), "the first segment")
    new_head(hosts)
    assert not storage.exists(f"{job.output}/summary.json")
    assert "are already scored, resuming with" in job.again().succeed()
    assert_same(table(job.output), undisturbed)


def test_training_resumes_at_a_new_head(hosts, training):
    job = training("--num-workers", "1")
    wait_for_epoch(hosts.client, job.id, job.output, 1)
    new_head(hosts)
    assert read_json(f"{job.output}/run.json")["status"] != "finished"
    log = job.again().succeed()
    assert "epoch 1/" not in log
    assert f"epoch {EPOCHS}/{EPOCHS}" in log
    check_whole(job.output, EPOCHS)
