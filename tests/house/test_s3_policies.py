"""The policies for S3 in deploy/ permit what the jobs and the service request, and nothing else."""

import os
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise

import pyarrow as pa
import pytest
import yaml

from bcd import storage
from bcd.errors import StorageError
from tests import commands, faults, policies

JOBS, SERVICE = "s3-jobs.json", "s3-service.json"


@pytest.fixture
def store(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[faults.Store]:
    """The S3 server of the tests, with a record of what it was asked."""
    with faults.store(os.environ["AWS_ENDPOINT_URL"]) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.endpoint)
        yield found


def read(folder: str) -> None:
    """Every way in which bcd reads."""
    assert storage.is_folder(folder)
    assert [file.path for file in storage.list_files(folder)] == ["a.bin", "table/b.parquet"]
    assert next(storage.first_files(folder, (".parquet",)))
    assert storage.read_bytes(f"{folder}/a.bin") == storage.read_start(f"{folder}/a.bin", 3) == b"123"
    assert storage.read_range(f"{folder}/a.bin", 1, 1) == b"2"
    assert storage.dataset(f"{folder}/table").to_table() == storage.read_table(f"{folder}/table/b.parquet")
    assert not storage.exists(f"{folder}/none")


def write(folder: str) -> None:
    """What is read, and an object of several parts."""
    storage.write_bytes(f"{folder}/a.bin", b"123")
    storage.write_table(f"{folder}/table/b.parquet", pa.table({"x": [1]}))
    storage.write_bytes(f"{folder}/large.bin", bytes(11 * 2**20))
    storage.delete_file(f"{folder}/large.bin")


def refused(store: faults.Store, policy: str) -> list[policies.Request]:
    """Requests since the last call that a policy does not permit."""
    requests = list(store.asked)
    store.asked.clear()
    return [request for request in requests if not policies.permits(policy, request)]


def test_jobs_need_all_that_their_policy_permits(store, s3):
    folder = f"{s3}/runs/policy"
    write(folder)
    read(folder)
    # A file that cannot be read leads to the question whether the bucket still can.
    store.fault = lambda method, path: faults.DENIED if path.endswith("a.bin") else None
    with pytest.raises(StorageError):
        storage.read_bytes(f"{folder}/a.bin")
    # The second part of an upload fails: pyarrow does not end it, so the bucket needs a rule for that.
    store.fault = lambda method, path: faults.DENIED if "partNumber=2" in path else None
    with pytest.raises(StorageError):
        storage.write_bytes(f"{folder}/large.bin", bytes(11 * 2**20))
    store.fault = lambda method, path: None
    storage.delete_files(folder, r"a\.bin")
    storage.delete_folder(folder)
    asked = policies.used(store.asked)
    assert refused(store, JOBS) == []
    assert asked == policies.actions(JOBS)


def test_a_service_reads_and_no_more(store, s3):
    folder = f"{s3}/runs/service"
    write(folder)
    assert {method for method, _ in refused(store, SERVICE)} == {"PUT", "POST", "DELETE"}
    read(folder)
    asked = policies.used(store.asked)
    assert refused(store, SERVICE) == []
    assert asked == policies.actions(SERVICE)


def test_images_are_read_only(store, s3):
    write(f"{s3}/BreaKHis_v1")
    assert all(method != "HEAD" for method, _ in refused(store, JOBS))
    read(f"{s3}/BreaKHis_v1")
    assert refused(store, JOBS) == []
    store.fault = lambda *request: None if policies.permits(JOBS, request) else faults.DENIED
    with pytest.raises(StorageError):
        storage.write_bytes(f"{s3}/BreaKHis_v1/a.bin", b"changed")
    assert storage.read_bytes(f"{s3}/BreaKHis_v1/a.bin") == b"123"


def test_a_request_without_an_action_would_be_seen():
    for request in (("GET", "/bucket?location"), ("PUT", "/bucket/a?acl"), ("DELETE", "/bucket")):
        with pytest.raises(KeyError):
            policies.needed(request)
    assert policies.needed(("PUT", "/bucket")) == ("s3:CreateBucket", "arn:aws:s3:::bucket")
    assert not policies.permits(JOBS, ("PUT", "/bucket"))


def uris(name: str) -> Iterator[tuple[str, str]]:
    """Flags and values of a manifest's command, or arguments of its application, that name objects."""
    for document in yaml.safe_load_all((policies.DEPLOY / name).read_text(encoding="utf-8")):
        spec = document.get("spec", {})
        words = shlex.split(spec.get("entrypoint", ""))
        pairs = list(pairwise(words))
        for application in yaml.safe_load(spec.get("serveConfigV2", "{}")).get("applications", []):
            pairs += application["args"].items()
        yield from ((flag, value) for flag, value in pairs if str(value).startswith("s3://"))


@pytest.mark.parametrize(
    ("manifest", "policy", "expected"),
    [
        ("rayjob-train.yaml", JOBS, {"--data", "--output", "--weights"}),
        ("rayjob-score.yaml", JOBS, {"--model", "--input", "--output"}),
        ("rayservice.yaml", SERVICE, {"model"}),
    ],
)
def test_the_policies_are_for_what_the_manifests_name(manifest, policy, expected):
    named = dict(uris(manifest))
    assert named.keys() == expected
    for flag, uri in named.items():
        path = "/" + uri.removeprefix("s3://").rstrip("/")
        assert policies.permits(policy, ("GET", f"{path}/x"))
        assert policies.permits(policy, ("HEAD", "/" + path.split("/")[1]))
        if flag in ("--data", "--input", "--output"):
            assert policies.permits(policy, ("PUT", f"{path}/x")) == (flag == "--output")


def test_the_readme_attaches_them():
    readme = (policies.DEPLOY / "README.md").read_text(encoding="utf-8")
    shown = "\n".join(commands.in_markdown(readme))
    assert set(re.findall(r"file://deploy/(\S+)", shown)) == {JOBS, SERVICE}
