import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import uuid

import pytest

from bcd import disk, lease, storage
from bcd.errors import BusyError
from tests.archives import claimed

HOLDER = (
    "from bcd import lease; import sys\nwith lease.held(sys.argv[1]): print(flush=True); sys.stdin.read()"
)


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.process)])
def output(request, tmp_path):
    """An output folder, here and there."""
    if request.param == "disk":
        return str(tmp_path / "out")
    return f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}"


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Everything ten times as fast."""
    for name in ("BEAT_S", "LOOK_S", "EXPIRES_S"):
        monkeypatch.setattr(lease, name, getattr(lease, name) / 10)


def claims(output):
    return [file.path for file in storage.list_files_if_any(f"{output}/.lease")]


def elsewhere(output, **known):
    """The claim of a job on another host, which does nothing more."""
    uri = lease.Lease(output).claim_uri
    facts = {"host": "node-7", "pid": 4711, "since": "2026-11-29 18:00 UTC", "place": "other"} | known
    storage.write_bytes(uri, json.dumps(facts).encode())
    return uri


def test_a_claim_is_there_while_the_job_runs(output):
    with lease.held(output) as ours:
        assert claims(output) == [f"{ours.id}.json"]
        ours.require()
        assert claims(output) == [f"{ours.id}.json"]
    assert claims(output) == []


def test_a_job_that_writes_nothing_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), lease.held(str(tmp_path / "new" / "out")):
        1 / 0  # noqa: B018
    assert not (tmp_path / "new" / "out").exists()


def test_a_second_job_is_told_who_writes_and_since_when(output):
    with lease.held(output) as ours:
        who = rf"process {os.getpid()} on \S+, since {ours.since}"
        with pytest.raises(BusyError, match=rf"is being written by another job \({who}\): --wait waits"):
            lease._acquired(output, wait=False)
        ours.require()
    with lease.held(output):
        pass


def test_a_job_can_wait_for_another(output, capsys):
    first, ended = lease.held(output), []
    first.__enter__()
    threading.Timer(1.5, lambda: (ended.append(True), first.__exit__(None, None, None))).start()
    with lease.held(output, wait=True):
        assert ended
    assert capsys.readouterr().out.count("is claimed by another job (process") == 1


def test_many_jobs_follow_each_other(output):
    inside, most, done = [], [], []

    def job():
        with lease.held(output, wait=True) as ours:
            inside.append(1)
            most.append(len(inside))
            ours.require()
            inside.pop()
            done.append(1)

    jobs = [threading.Thread(target=job) for _ in range(6)]
    for one in jobs:
        one.start()
    for one in jobs:
        one.join(60)
    assert (len(done), max(most)) == (6, 1)
    assert claims(output) == []


@pytest.mark.process
def test_the_output_of_a_killed_process_is_taken_over_at_once(output, monkeypatch):
    command = [sys.executable, "-c", HOLDER, output]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        assert len(claims(output)) == 1
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    monkeypatch.setattr(lease, "EXPIRES_S", 3600.0)
    with lease.held(output) as ours:
        assert claims(output) == [f"{ours.id}.json"]


@pytest.mark.parametrize("content", [None, b"", b'{"host":', b"[1]", b'"x"'])
def test_a_claim_that_nobody_renews_expires(tmp_path, monkeypatch, content):
    """Also one that was cut off."""
    output, times = str(tmp_path), iter(range(1000))
    uri = elsewhere(output)
    if content is not None:
        storage.write_bytes(uri, content)
    monkeypatch.setattr(lease, "_watched_time", lambda: next(times))
    monkeypatch.setattr(lease, "_sleep", lambda seconds: None)
    with lease.held(output) as ours:
        assert claims(output) == [f"{ours.id}.json"]


def test_one_that_somebody_renews_does_not(tmp_path, monkeypatch):
    uri, looks = elsewhere(str(tmp_path)), []

    def renew(seconds):
        looks.append(seconds)
        storage.write_bytes(uri, json.dumps({"host": "node-7", "pid": 4711, "n": len(looks)}).encode())

    monkeypatch.setattr(lease, "_sleep", renew)
    with pytest.raises(BusyError, match=r"process 4711 on node-7, since \?"):
        lease._acquired(str(tmp_path), wait=False)
    assert len(looks) == 1
    assert storage.exists(uri)


def test_without_its_claim_a_job_has_no_lease(output):
    ours = claimed(output)
    ours.require()
    storage.delete_file(ours.claim_uri)
    for _ in range(2):
        with pytest.raises(BusyError, match="may belong to another job by now"):
            ours.require()
    assert claims(output) == []


def test_a_job_that_slept_has_no_lease(tmp_path, monkeypatch):
    """Another may have watched its claim, and just be about to delete it."""
    ours, now = claimed(str(tmp_path)), lease._now()
    for seconds, passes in ((2.0, True), (4.0, True), (7.5, False), (8.0, False)):
        monkeypatch.setattr(lease, "_now", lambda seconds=seconds: now + seconds)
        with contextlib.nullcontext() if passes else pytest.raises(BusyError):
            ours.require()


def test_a_claim_in_another_process_is_not_renewed(tmp_path):
    copy, arguments = claimed(str(tmp_path)).__reduce__()
    with pytest.raises(BusyError):
        copy(*arguments).require()


def test_what_was_half_written_is_gone_when_a_job_begins(tmp_path):
    left = tmp_path / f"summary.json.{'0' * 32}.part"
    left.touch()
    with lease.held(str(tmp_path)):
        assert not left.exists()


@pytest.mark.parametrize("name", ["summary.json", "checkpoints/a.safetensors", "case/fold-1/record.json"])
def test_what_is_found_lasts_when_a_job_begins(name, tmp_path, monkeypatch):
    """Of every kind of job, which deletes other files for it: of an archive, a training, a study."""
    found = tmp_path / name
    found.parent.mkdir(parents=True, exist_ok=True)
    found.touch()
    synced = []
    monkeypatch.setattr(disk, "sync_folder", synced.append)
    with lease.held(str(tmp_path)):
        assert str(found.parent) in synced


def test_process_ids_are_those_of_one_kernel_and_namespace():
    assert re.fullmatch(r"[0-9a-f-]{36} pid:\[\d+\]", lease._place())
    assert not lease._is_gone({"pid": os.getpid(), "place": lease._place()})
    assert not lease._is_gone({"pid": 2**22 + 1, "place": "another"})
    assert lease._is_gone({"pid": 2**22 + 1, "place": lease._place()})
