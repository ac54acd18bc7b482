"""A Ray cluster of several hosts, and an object store on one more."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from bcd import storage
from bcd.model import predictor
from tests import archives
from tests.cluster.hosts import BUCKET, Hosts, Job, why_not
from tests.end_to_end.test_jobs import train_arguments
from tests.end_to_end.test_score_jobs import table
from tests.model.test_bundle import card, untrained

N_FIELDS, EPOCHS = 600, 4


@pytest.fixture(scope="package")
def hosts() -> Iterator[Hosts]:
    """A head and one worker; `two` joins when a test lets it. S3 is reached through the AWS variables."""
    if reason := why_not():
        pytest.skip(f"several hosts cannot be had here: {reason}")
    with Hosts.up() as found:
        found.start_head()
        found.join(found.one)
        yield found


@pytest.fixture(scope="package")
def bucket(hosts: Hosts) -> str:
    """URI of a bucket on the store."""
    assert os.environ["AWS_ENDPOINT_URL"].startswith(f"http://{hosts.store.address}")
    return BUCKET


@pytest.fixture
def both(hosts: Hosts) -> Iterator[Hosts]:
    """The hosts with both workers; afterwards with one again, whatever became of the other."""
    hosts.join(hosts.two)
    yield hosts
    hosts.leave(hosts.two)


@pytest.fixture(scope="package")
def data(bucket, tree):
    storage.upload_folder(Path(tree), f"{bucket}/tree")
    return f"{bucket}/tree"


@pytest.fixture(scope="package")
def archive(bucket):
    for name, content in (archives.fields(N_FIELDS) | archives.odd()).items():
        storage.write_bytes(f"{bucket}/archive/{name}", content)
    return f"{bucket}/archive"


@pytest.fixture(scope="package")
def model_uri(bucket):
    network = untrained(architecture="resnet50")  # slow enough that a second host takes part
    predictor.save(
        network, card(architecture="resnet50", input_height_px=128, input_width_px=192), f"{bucket}/model"
    )
    return f"{bucket}/model"


@pytest.fixture
def scoring(hosts, archive, model_uri, bucket):
    """Starts the scoring of the archive, or of another input."""

    def start(*more, source=archive):
        output = f"{bucket}/{uuid.uuid4().hex}"
        arguments = ("jobs/score.py", "--model", model_uri, "--input", source, "--output", output, *more)
        return Job(hosts, output, arguments)

    return start


@pytest.fixture
def training(hosts, data, bucket):
    """Starts a training."""

    def start(*more, epochs=EPOCHS):
        name = uuid.uuid4().hex
        arguments = train_arguments(
            data, bucket, name, "--epochs", str(epochs), "--learning-rate", "0.001", *more
        )
        return Job(hosts, f"{bucket}/jobs/{name}", arguments)

    return start


@pytest.fixture(scope="package")
def undisturbed(hosts, archive, model_uri, bucket):
    """The table of one host."""
    output = f"{bucket}/undisturbed"
    Job(
        hosts, output, ("jobs/score.py", "--model", model_uri, "--input", archive, "--output", output)
    ).succeed()
    return table(output)
