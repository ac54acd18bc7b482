"""What the folder of slides says about each; `test_receive` has the routes, `test_slide_runner` the work."""

import json

import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.scoring import ledger
from bcd.serving.receive import RefusedError
from bcd.serving.slide_jobs import SlideJobs

ROW = {schema.SLIDE: "a.svs", schema.URI: "/secret/a.svs", schema.TILES: 3, schema.MALIGNANT_TILE_SHARE: 0.5}


@pytest.fixture
def jobs(tmp_path):
    return SlideJobs(str(tmp_path), None, 3)


def add(jobs):
    job_id = "0123456789abcdef" * 2
    return jobs.add_sent(job_id, "a.svs", 0.25).id


def finish(jobs, job_id, **row):
    output = jobs.folder(job_id, "output")
    storage.write_table(f"{output}/{ledger.SLIDES}", pa.Table.from_pylist([ROW | row], schema.SLIDES))
    storage.write_bytes(f"{output}/summary.json", json.dumps({schema.MODEL_ID: "9f2c"}).encode())


def test_states_follow_each_other(jobs):
    job_id = add(jobs)
    assert jobs.state(job_id) == "queued"
    jobs.note(job_id, "progress.json", {"message": "starting"})
    assert jobs.document(job_id)["progress"] == {"message": "starting"}
    jobs.note(job_id, "cancelled", {})
    assert jobs.state(job_id) == "cancelled"
    finish(jobs, job_id)  # before its job noticed
    assert jobs.state(job_id) == "cancelled"


def test_a_slide_that_ends_while_it_is_cancelled_is_deleted(jobs, monkeypatch):
    job_id = add(jobs)
    monkeypatch.setattr(SlideJobs, "state", lambda *_: "running")
    finish(jobs, job_id)
    jobs.forget_waiting(job_id)
    assert jobs.remove(job_id) == "running"
    assert storage.list_files_if_any(jobs.folder(job_id)) == []


def test_a_result_has_no_place_of_the_service(jobs):
    job_id = add(jobs)
    finish(jobs, job_id)
    found = jobs.document(job_id)
    assert "/secret" not in json.dumps(found)
    assert (found["slide"][schema.TILES], found["slide"][schema.MALIGNANT_TILE_SHARE]) == (3, 0.5)
    assert found[schema.MODEL_ID] == "9f2c"
    assert found["files"] == {
        name: f"/v1/slides/{job_id}/{name}" for name in ("heatmap.png", "tiles.geojson.gz")
    }


def test_a_slide_that_cannot_be_scored_has_the_error_of_its_row(jobs):
    job_id = add(jobs)
    finish(jobs, job_id, **{schema.ERROR: "missing_mpp", schema.ERROR_MESSAGE: "it states no \u00b5m/px"})
    found = jobs.document(job_id)
    assert found["error"] == {"code": "missing_mpp", "message": "it states no \u00b5m/px"}
    assert "slide" not in found


def test_a_field_is_named_as_one(jobs):
    job_id = add(jobs)
    finish(jobs, job_id)
    table = schema.SLIDES.empty_table()
    storage.write_table(f"{jobs.folder(job_id, 'output')}/{ledger.SLIDES}", table)
    assert jobs.document(job_id)["error"]["code"] == "not_a_slide"


def test_a_folder_that_was_lost_is_no_slide(jobs):
    with pytest.raises(RefusedError, match="knows no slide"):
        jobs.about("f" * 32)
