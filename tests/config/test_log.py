"""The log of a job, as text and as JSON, which also contains the lines that Ray prints."""

import io
import json
import logging
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

from bcd.config import log
from tests.cluster import ROOT

logger = logging.getLogger("bcd.anything")
# As Ray 2.60 printed it.
ADVICE = (
    b"[2026-11-29 22:01:47,340 E 5352 5352] core_worker.cc:2465: Actor with class name: 'MapWorker("
    b"MapBatches(_Pooler))' and ID: '24ffab5dd5019889706ee0be01000000' has constructor arguments in the "
    b"object store and max_restarts > 0. If the arguments in the object store go out of scope or are lost, "
    b"the actor restart will fail. See https://github.com/ray-project/ray/issues/53727 for more details.\n"
)
OTHER = b"[2026-11-29 22:01:47,340 E 5352 5352] core_worker.cc:99: the node is lost\n"


def test_text_states_the_level_of_what_is_wrong(capsys):
    logger.info("all is well")
    logger.warning("images are missing")
    logger.info("answered", extra={"request_id": "7"})
    logger.error("no such folder")
    said = capsys.readouterr()
    assert said.out == "all is well\nwarning: images are missing\nanswered; request 7\n"
    assert said.err == "error: no such folder\n"


def test_json_is_an_object_per_line(capsys):
    log.start("score", "json")
    logger.info("\nseveral\nlines", extra={"image_id": "a.png", "unknown": 1})
    logger.error("no such folder")
    said = capsys.readouterr()
    first, second = json.loads(said.out), json.loads(said.err)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(first.pop("time"))) < timedelta(minutes=1)
    message = {"job": "score", "message": "several\nlines", "image_id": "a.png"}
    assert first == {"level": "info"} | message
    assert (second["level"], second["message"]) == ("error", "no such folder")


def test_processes_of_ray_write_in_the_format_of_the_job(capsys):
    log.start("train", "json")
    log.hand_on("unknown")
    logger.info("epoch 1")
    said = capsys.readouterr()
    assert said.out == ""
    line = json.loads(said.err)
    assert (line["job"], line["message"]) == ("train", "epoch 1")
    # As Ray hands it on to the job.
    handed_on = json.loads(
        log.foreign(f"\x1b[36m(RayTrainWorker pid=7, ip=10.0.0.2)\x1b[0m {said.err.strip()}")
    )
    assert handed_on == line | {"process": "RayTrainWorker pid=7, ip=10.0.0.2"}


def test_on_a_cluster_that_others_started_a_process_knows_its_own_job(capsys, monkeypatch):
    monkeypatch.delenv(log.JOB_VARIABLE)
    monkeypatch.delenv(log.FORMAT_VARIABLE)
    log.hand_on("serve", "json")
    logger.info("answered")
    assert json.loads(capsys.readouterr().err)["job"] == "serve"


@pytest.mark.parametrize(
    ("line", "level", "message"),
    [
        ("plain", "info", "plain"),
        ("warning: images are missing", "warning", "images are missing"),
        ("\x1b[36m(Worker pid=7)\x1b[0m error: no", "error", "no"),
        ("(raylet) 1 worker died", "info", "(raylet) 1 worker died"),
        (OTHER.decode().strip(), "error", OTHER.decode().strip()),
        (
            "2026-11-29 22:01:47,340\tWARNING a.py:1 -- b",
            "warning",
            "2026-11-29 22:01:47,340\tWARNING a.py:1 -- b",
        ),
        ('{"time": cut', "info", '{"time": cut'),
    ],
)
def test_lines_of_others_become_objects_with_their_level(line, level, message):
    found = json.loads(log.foreign(line))
    assert (found["level"], found["message"]) == (level, message)


def test_rays_advice_about_its_own_actors_is_left_out_and_nothing_else():
    given = [b"one\n", ADVICE, OTHER, b"\n", b"\xff last"]
    text, objects = io.BytesIO(), io.BytesIO()
    log.filtered(given, "text", text)
    assert text.getvalue() == b"one\n" + OTHER + b"\n\xff last"
    log.filtered(given, "json", objects)
    found = [json.loads(line)["message"] for line in objects.getvalue().splitlines()]
    assert found == ["one", OTHER.decode().strip(), "\ufffd last"]


JOB = """
import logging, os, sys
from bcd.config import log
log.start("train", sys.argv[1])
logger = logging.getLogger("bcd.job")
logger.info("first")
os.write(2, b"by C++\\n")
os.write(2, sys.argv[2].encode())
print("by a library")
logger.error("third")
raise ZeroDivisionError
"""


@pytest.mark.process
def test_whatever_a_job_writes_by_any_way_is_an_object():
    done = subprocess.run(
        [sys.executable, "-c", JOB, "json", ADVICE.decode()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    out, err = ([json.loads(line) for line in text.splitlines()] for text in (done.stdout, done.stderr))
    assert [line["message"] for line in out] == ["first", "by a library"]
    assert [line["message"].splitlines()[0] for line in err] == [
        "by C++",
        "third",
        "a fault of bcd ended the job",
    ]
    assert {line["job"] for line in out + err} == {"train"}
    assert err[-1]["level"] == "critical"
    assert err[-1]["message"].endswith("ZeroDivisionError")


@pytest.mark.process
def test_text_passes_as_it_is_but_for_the_advice():
    done = subprocess.run(
        [sys.executable, "-c", JOB, "text", ADVICE.decode()], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "first\nby a library\n")
    assert done.stderr.startswith("by C++\nerror: third\nTraceback ")
    assert done.stderr.endswith("\nZeroDivisionError\n")
