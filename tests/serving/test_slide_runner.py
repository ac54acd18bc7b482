"""Slides that wait are scored one after the other, whatever happens to the process that does it.

The job is a small program here; `test_serve` has the real one.
"""

import json
import sys
import threading
import uuid

import pytest

from bcd import lease, storage
from bcd.errors import BusyError
from bcd.serving import slide_jobs
from bcd.serving.slide_jobs import SlideJobs, SlideRunner
from tests.cluster import wait_for

pytestmark = pytest.mark.process
# Appends its flags to `log` and then does what the folder of the slide says.
JOB = """
import json, pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
output = pathlib.Path(flags["--output"])
with open(LOG, "a") as log: log.write(json.dumps(flags) + "\\n")
print("not JSON", json.dumps({"message": "of a worker", "share": 1, "process": "x"}), sep="\\n")
print(json.dumps({"message": "0 of 1 input", "rows": 3, "share": 0.25}), flush=True)
how = pathlib.Path(flags["--input"]).read_text()
if how == "wait":
    time.sleep(3600)
if how.startswith("exit"):
    sys.exit(int(how[4:]))
output.mkdir()
(output / "summary.json").write_text("{}")
"""


@pytest.fixture
def jobs(tmp_path):
    return SlideJobs(str(tmp_path / "slides"), None, 16)


@pytest.fixture
def log(tmp_path):
    """What the jobs were given, in order."""
    path = tmp_path / "log"
    path.touch()
    return lambda: [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def runner(jobs, log, tmp_path):
    program = JOB.replace("LOG", repr(str(tmp_path / "log")))
    return SlideRunner(jobs, ["--model", "M"], {}, [sys.executable, "-c", program])


def add(jobs, how, mpp=None):
    job_id = uuid.uuid4().hex
    storage.write_bytes(jobs.folder(job_id, "slide", "a.svs"), how.encode())
    return jobs.add_sent(job_id, "a.svs", mpp).id


def test_they_are_scored_in_the_order_in_which_they_came(runner, jobs, log):
    ids = [add(jobs, "", mpp=0.5), add(jobs, "")]
    runner.run_all()
    assert [jobs.state(job_id) for job_id in ids] == ["done", "done"]
    assert jobs.waiting() == []
    first, second = log()
    assert first == {
        "--model": "M",
        "--input": jobs.about(ids[0]).uri,
        "--output": jobs.folder(ids[0], "output"),
        "--mpp": "0.5",
        "--wait": "--log-format",
    }
    assert "--mpp" not in second
    assert second["--output"] == jobs.folder(ids[1], "output")


@pytest.mark.parametrize(("code", "runs"), [(2, 1), (1, slide_jobs.MOST_RUNS)])
def test_one_that_fails_holds_up_no_other(runner, jobs, log, code, runs):
    ids = [add(jobs, f"exit{code}"), add(jobs, "")]
    runner.run_all()
    assert [jobs.state(job_id) for job_id in ids] == ["failed", "done"]
    assert len(log()) == runs + 1
    assert jobs.document(ids[0])["error"]["code"] == "job_failed"


def test_progress_is_what_the_job_says_and_cancelling_ends_it(runner, jobs):
    job_id = add(jobs, "wait")
    worker = threading.Thread(target=runner.run_all)
    worker.start()
    expected = {"message": "0 of 1 input", "rows": 3, "share": 0.25}
    wait_for(lambda: jobs.document(job_id).get("progress") == expected, 60, "progress")
    assert jobs.state(job_id) == "running"
    with pytest.raises(BusyError):  # another replica looks on
        runner.run_all()
    jobs.remove(job_id)
    worker.join(60)
    assert not worker.is_alive()
    assert (jobs.state(job_id), jobs.waiting()) == ("cancelled", [])
    assert not storage.exists(jobs.folder(job_id, "slide"))


@pytest.mark.parametrize("how", ["", "exit1", "exit2"])
def test_a_slide_deleted_while_its_job_ends_holds_up_no_other(runner, jobs, log, monkeypatch, how):
    """Its result is there before its process has ended."""
    ids, end = [add(jobs, how), add(jobs, "")], slide_jobs._end

    def delete_first(process):
        if jobs.known(ids[0]):
            storage.delete_folder(jobs.folder(ids[0]))
            jobs.note(ids[0], "progress.json", {"message": "too late"})
        end(process)

    monkeypatch.setattr(slide_jobs, "_end", delete_first)
    runner.run_all()
    assert len(log()) == 2
    assert jobs.waiting() == []
    assert storage.list_files_if_any(jobs.folder(ids[0])) == []
    assert jobs.state(ids[1]) == "done"


def test_a_folder_that_is_lost_or_damaged_holds_up_no_other(runner, jobs, log):
    lost, damaged, whole = add(jobs, ""), add(jobs, ""), add(jobs, "")
    storage.delete_folder(jobs.folder(lost))
    storage.write_bytes(jobs.folder(damaged, slide_jobs.ABOUT), b"{")
    runner.run_all()
    assert [flags["--output"] for flags in log()] == [jobs.folder(whole, "output")]
    assert (jobs.waiting(), jobs.state(whole)) == ([], "done")


def test_a_process_that_cannot_be_started_is_tried_again(runner, jobs, monkeypatch):
    job_id, start = add(jobs, ""), slide_jobs.subprocess.Popen

    def refuse_once(*arguments, **options):
        monkeypatch.setattr(slide_jobs.subprocess, "Popen", start)
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(slide_jobs.subprocess, "Popen", refuse_once)
    monkeypatch.setattr(slide_jobs, "LOOK_S", 0.01)
    worker = runner.start()
    wait_for(lambda: jobs.waiting() == [], 60, "the slide")
    assert (jobs.state(job_id), worker.is_alive()) == ("done", True)


def test_a_runner_that_is_lost_is_replaced(runner, jobs, log):
    """What it had begun is begun again, by the same command; what had ended is not."""
    done, begun = add(jobs, ""), add(jobs, "")
    jobs.note(done, "output/summary.json", {})
    jobs.note(begun, "progress.json", {"message": "of the first"})
    runner.run_all()
    assert [flags["--output"] for flags in log()] == [jobs.folder(begun, "output")]
    assert (jobs.state(done), jobs.state(begun), jobs.waiting()) == ("done", "done", [])


def test_a_runner_without_the_lease_ends_its_job(runner, jobs, monkeypatch):
    add(jobs, "wait")

    def lost(self):
        raise BusyError("lost")

    monkeypatch.setattr(lease.Lease, "require", lost)
    monkeypatch.setattr(lease, "_beat", lambda *_: None)
    with pytest.raises(BusyError):
        runner.run_all()
