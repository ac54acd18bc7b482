"""Archives as people score them: odd and broken files, SIGKILL at any moment, on disk and on S3.

However a job was disturbed, the table is that of an undisturbed run, each row once.
"""

import hashlib
import itertools
import json
import os
import random
import re
import socket
import time
import uuid
from pathlib import Path

import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pytest
import ray
from ray.job_submission import JobStatus, JobSubmissionClient

import bcd
from bcd import lease, schema, storage
from bcd.config.scoring import ScoreConfig
from bcd.data.archive import list_inputs
from bcd.errors import ConfigError
from bcd.imaging import image
from bcd.model import bundle, predictor, weights
from bcd.runtime import predict
from bcd.scoring import score, tiling
from tests import archives, faults, pictures, policies, slide_files
from tests.cluster import (
    PATIENCE_S,
    ROOT,
    finish,
    finished,
    kill,
    other_lines,
    processes,
    read_json,
    start_job,
    start_ray,
    submit,
    wait_for,
)
from tests.model.test_bundle import card, untrained
from tests.scoring.test_pseudonymised import named_in
from tests.trained import scored

pytestmark = pytest.mark.ray
N_FIELDS = 250
SCORER = r"ray::MapWorker\(MapBatches\(Scorer\)"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """250 good fields, 11 odd ones, 30 broken ones, slides where they are at hand, and what is no input."""
    root = str(tmp_path_factory.mktemp("archive"))
    files = archives.fields(N_FIELDS) | archives.odd()
    files |= {name: content for name, (content, _) in archives.broken().items()}
    files["notes.txt"] = b"no input"
    if folder := os.environ.get("BCD_REAL_DATA"):
        slides = Path(folder) / "slides"
        files |= {f"slides/{path.name}": path.read_bytes() for path in slides.iterdir()}
        files["slides/half.svs"] = archives.half_a_slide(Path(folder))
    for name, content in files.items():
        storage.write_bytes(storage.join(root, name), content)
    (Path(root) / "folder.png").mkdir()
    return root


@pytest.fixture(scope="module")
def archive_on_s3(archive, s3):
    storage.upload_folder(Path(archive), f"{s3}/archive")
    return f"{s3}/archive"


@pytest.fixture(scope="module")
def model_uri(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("model"))
    predictor.save(untrained(std=5e-3), card(), uri)
    return uri


def start(model_uri, data, output, **variables):
    """The job as a process of its own, on the cluster of the tests."""
    arguments = ("jobs/score.py", "--model", model_uri, "--input", data, "--output", str(output))
    return start_job(*arguments, **variables)


def table(output):
    """The whole predictions table, sorted."""
    filesystem, path = storage.resolve(storage.join(str(output), "predictions"))
    found = pads.dataset(path, filesystem=filesystem, format="parquet").to_table()
    return found.sort_by(schema.IMAGE_ID)


def segments(output):
    """Names of the files committed so far."""
    files = storage.list_files_if_any(storage.join(str(output), "work", "0001"))
    # Below it lie plans of slides.
    return [file.path for file in files if file.path.endswith(".parquet") and "/" not in file.path]


@pytest.fixture(scope="module")
def undisturbed(cluster, archive, model_uri, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    finished(start(model_uri, archive, output))
    return output


@pytest.fixture(scope="module")
def resumed(cluster, archive_on_s3, model_uri, s3):
    """From and to S3: killed after its first segment, then submitted to the cluster. The output, the model
    and the log."""
    client = JobSubmissionClient(cluster.dashboard)
    bundle_uri, output = f"{s3}/score-model", f"{s3}/scores"
    storage.upload_folder(Path(model_uri), bundle_uri)
    arguments = ("jobs/score.py", "--model", bundle_uri, "--input", archive_on_s3, "--output", output)
    first = start(bundle_uri, archive_on_s3, output)
    wait_for(lambda: segments(output), PATIENCE_S, "the first segment")
    first.kill()
    first.wait()
    assert not storage.exists(f"{output}/summary.json")
    status, log = finish(client, submit(cluster, *arguments))
    assert status == JobStatus.SUCCEEDED, log
    return output, bundle_uri, log


# All that a scoring prints where nothing is wrong; broken files are results.
LINES = (
    r"[\d,]+ inputs?( \(.* other (entry is|entries are) not read: .*\))?"
    r"(; [\d,]+ are already scored, resuming with [\d,]+)?",
    r"[\d,]+ of [\d,]+ inputs, [\d,]+ rows?, [\d,]+ errors?; [\d.]+ rows/s(; about .* left)?",
    r"[\d,]+ inputs = [\d,]+ results \+ [\d,]+ errors; [\d,]+ rows, [\d,]+ of them tiles",
    r"first rows after .*, all after .*",
    r"[\d.]+ rows/s \(headspace (not measured|[\d.]+), images from .*\)",
    r"  [a-z_]+: [\d,]+",
    r"  the model has no statistics to identify images unlike its training data",
    r"  drift of the stain: not known, because the card has no stain statistics",
    r"(table|gallery|summary): +s3://.*",
)


def test_a_scoring_prints_what_is_known_and_no_warning(resumed):
    """Though broken and odd images of many formats are among its inputs."""
    assert not other_lines(resumed[2], LINES)
    assert other_lines("warning: 12 inputs", LINES)


def assert_same(found, expected):
    """Equal but for rounding; no id twice."""
    names = found[schema.IMAGE_ID].to_pylist()
    assert len(set(names)) == len(names)
    assert names == expected[schema.IMAGE_ID].to_pylist()
    for name in (schema.ERROR, schema.PREDICTED_CLASS, schema.X_LEVEL0_PX, schema.WIDTH_PX):
        assert found[name].equals(expected[name])
    good = pc.is_null(expected[schema.ERROR])
    pair = [t.filter(good) for t in (found, expected)]
    probabilities = [t[schema.PROBABILITY_MALIGNANT].to_numpy() for t in pair]
    assert 0.01 < probabilities[0].mean() < 0.99
    assert probabilities[0].std() > 1e-3
    np.testing.assert_allclose(*probabilities, atol=1e-5)
    maps = [np.stack(t[schema.EVIDENCE].to_pylist()) for t in pair]
    np.testing.assert_allclose(*maps, atol=1e-4)


def test_every_input_gives_a_result_or_a_typed_error(resumed, archive):
    """Done when 1 and 2."""
    output, _, log = resumed
    rows = table(output).to_pylist()
    by_input = {}
    for row in rows:
        name = row[schema.SLIDE] if row[schema.X_LEVEL0_PX] is not None else row[schema.IMAGE_ID]
        by_input.setdefault(name, []).append(row)
    files = [f.path for f in storage.list_files(archive) if not f.path.endswith(".txt")]
    assert sorted(by_input) == sorted(files)
    for name in [*archives.fields(N_FIELDS), *archives.odd()]:
        assert [row[schema.ERROR] for row in by_input[name]] == [None], name
    for name, (_, code) in archives.broken().items():
        assert [row[schema.ERROR] for row in by_input[name]] == [code], name
    summary = read_json(storage.join(str(output), "summary.json"))
    assert summary["n_inputs"] == len(files) == summary["n_results"] + summary["n_errors"]
    assert summary["n_ignored_files"] == 1
    assert f"{len(files)} inputs = {summary['n_results']} results + {summary['n_errors']} errors" in log
    if "slides/half.svs" in by_input:
        assert [row[schema.ERROR] for row in by_input["slides/half.svs"]] == ["unreadable"]
        assert [row[schema.ERROR] for row in by_input["slides/boxes.tiff"]] == ["missing_mpp"]
        assert len(by_input["slides/CMU-1-Small-Region.svs"]) > 10
    for row in rows:
        if row[schema.ERROR] is None:
            total = np.mean(row[schema.EVIDENCE]) + row[schema.EVIDENCE_BIAS]
            assert total == pytest.approx(row[schema.LOGIT][1] - row[schema.LOGIT][0], abs=1e-3)


def test_the_table_is_read_without_us(resumed, tmp_path):
    """DuckDB, Polars and pandas see the same rows, numbers and maps."""
    for file in storage.list_files(f"{resumed[0]}/predictions"):
        storage.write_bytes(f"{tmp_path}/predictions/{file.path}", storage.read_bytes(file.uri))
    files = f"{tmp_path}/predictions/*.parquet"
    expected = table(resumed[0])
    n_good = expected[schema.ERROR].null_count
    mean = pc.mean(expected[schema.PROBABILITY_MALIGNANT]).as_py()
    query = (
        f"select count(*), avg(probability_malignant), max(len(evidence)) from '{files}' where error is null"
    )
    assert duckdb.sql(query).fetchall()[0] == (n_good, pytest.approx(mean), 2 * 3)
    frame = polars.read_parquet(files).filter(polars.col("error").is_null())
    assert (len(frame), frame["probability_malignant"].mean()) == (n_good, pytest.approx(mean))
    assert frame["evidence"][0].len() == 2 * 3
    frame = pandas.read_parquet(f"{tmp_path}/predictions").query("error.isnull()")
    assert (len(frame), frame["probability_malignant"].mean()) == (n_good, pytest.approx(mean))
    assert len(frame["evidence"].iloc[0]) == 2 * 3


def test_a_finished_run_does_nothing_and_another_model_is_refused(
    resumed, archive_on_s3, tmp_path, joined, capsys
):
    output, model_uri, _ = resumed
    before = {f.path: f.size_bytes for f in storage.list_files(str(output))}
    config = ScoreConfig(model=model_uri, input=archive_on_s3, output=output)
    score.run(config)
    assert "is finished: " in capsys.readouterr().out
    assert {f.path: f.size_bytes for f in storage.list_files(str(output))} == before
    predictor.save(
        weights.build(2, seed=2, architecture="resnet18"),
        card(),
        str(tmp_path),
    )
    with pytest.raises(ConfigError, match="contains rows scored with other settings: --model "):
        score.run(config.model_copy(update={"model": str(tmp_path)}))


def test_a_killed_job_resumes_and_adds_new_files(resumed, archive, archive_on_s3, tmp_path, joined, capsys):
    """Done when 3: the rows and numbers of the local files without a job, each once; then a file is added."""
    output, model_uri, log = resumed
    assert "are already scored, resuming with" in log
    settings = predict.Settings(model_uri, bundle.identify(model_uri))
    tiles = score.tiling_of(
        ScoreConfig(model=model_uri, input=archive, output=str(tmp_path)), bundle.read_card(model_uri)
    )
    rows = tiling.expand(list_inputs(archive).table, tiles, str(tmp_path), frozenset())
    expected = scored(pa.concat_tables(rows), settings).sort_by(schema.IMAGE_ID)
    before = table(output)
    assert_same(before, expected)
    storage.write_bytes(f"{archive_on_s3}/late.png", archives.odd()["odd/grey.png"])
    score.run(ScoreConfig(model=model_uri, input=archive_on_s3, output=output))
    assert "resuming with 1\n" in capsys.readouterr().out
    storage.delete_file(f"{archive_on_s3}/late.png")
    names = table(output)[schema.IMAGE_ID].to_pylist()
    assert sorted(names) == sorted([*before[schema.IMAGE_ID].to_pylist(), "late.png"])


@pytest.mark.trial
@pytest.mark.parametrize(
    ("fault", "most"),
    [pytest.param(faults.EXPIRED, N_FIELDS, id="token"), pytest.param(faults.SLOW_DOWN, 1, id="some")],
)
def test_a_store_that_denies_in_the_middle_changes_nothing(
    fault, most, archive_on_s3, model_uri, tmp_path, undisturbed
):
    """From the 100th picture on, storage gives no or not every picture: no row calls that its fault."""
    with faults.store(os.environ["AWS_ENDPOINT_URL"]) as store:
        environment = store.variables
        pictures, denied = set(), set()

        def answer(method, path):
            pictures.add(path)
            if len(pictures) > 100 and "field-" in path and len(denied) < most:
                denied.add(path)
            return fault if path in denied else None

        store.fault = answer
        job = start(model_uri, archive_on_s3, tmp_path, **environment)
        log, _ = job.communicate(timeout=PATIENCE_S)
        assert job.returncode == 1, log
        assert "Run the same command again to resume. Storage failed to deliver some" in log
        assert not (tmp_path / "summary.json").exists()
        store.fault = lambda method, path: None
        log = finished(start(model_uri, archive_on_s3, tmp_path, **environment))
        assert "are already scored, resuming with" in log
    assert_same(table(tmp_path), table(undisturbed))
    assert image.UNAVAILABLE not in table(tmp_path)[schema.ERROR].to_pylist()


@pytest.mark.trial
def test_a_store_on_a_bad_day_costs_time_only(archive_on_s3, model_uri, s3, undisturbed):
    """All of it is on S3."""
    output = f"{s3}/{uuid.uuid4().hex}"
    with faults.store(os.environ["AWS_ENDPOINT_URL"]) as store:
        store.fault, store.delay_s = faults.bad_day(), 0.02
        finished(start(model_uri, archive_on_s3, output, **store.variables))
        assert len(store.asked) > N_FIELDS
        assert {"GET", "HEAD", "PUT"} <= {method for method, _ in store.asked}
        assert policies.used(store.asked) <= policies.actions("s3-jobs.json")
    assert_same(table(output), table(undisturbed))


VICTIMS, STORES = ("driver", "actor", "node"), ("disk", "s3")
# The moments of a job, by what it has written: its settings, the first rows, a file of the table.
MOMENTS = {"begun": "config.json", "scoring": "work/0001/", "merging": "predictions/part-"}
# By the time of merging the actor has gone.
TRIALS = [
    trial
    for trial in itertools.product(VICTIMS, STORES, MOMENTS)
    if (trial[0], trial[2]) != ("actor", "merging")
]


def wait_for_moment(job, output, moment):
    """Until the job has written what marks the moment, and is not finished."""

    def come():
        assert job.poll() is None, job.communicate()[0]
        return any(file.path.startswith(MOMENTS[moment]) for file in storage.list_files_if_any(str(output)))

    wait_for(come, PATIENCE_S, moment)
    assert not storage.exists(storage.join(str(output), "summary.json"))


def wait_for_actor(job, found):
    """Until one of the processes is a model actor."""

    def come():
        assert job.poll() is None, job.communicate()[0]
        return any(re.search(SCORER, command) for _, command in found())

    wait_for(come, PATIENCE_S, "a model actor")


@pytest.fixture
def second_node(cluster, joined):
    """Finds the processes of a second node, which is gone in the end."""
    marker = f"BCD_TEST_NODE={uuid.uuid4().hex}"
    node = start_ray([f"--address={cluster.gcs}", "--num-cpus=4"], marker)
    wait_for(lambda: sum(n["Alive"] for n in ray.nodes()) == 2, PATIENCE_S, "the second node")
    yield lambda: processes(node.pid, marker)
    node.kill()
    wait_for(lambda: not kill(processes(node.pid, marker)), 60, "the end of the second node")
    node.wait()
    wait_for(lambda: sum(n["Alive"] for n in ray.nodes()) == 1, PATIENCE_S, "the cluster to see it")


@pytest.mark.trial
@pytest.mark.parametrize(("victim", "store", "moment"), TRIALS)
def test_a_kill_changes_nothing(
    victim, store, moment, cluster, archive, archive_on_s3, model_uri, s3, tmp_path, undisturbed, request
):
    """Done when 3: SIGKILL; the same command again where the job itself was killed."""
    data, output = (archive, tmp_path) if store == "disk" else (archive_on_s3, f"{s3}/{uuid.uuid4().hex}")
    found = request.getfixturevalue("second_node") if victim == "node" else cluster.processes
    job = start(model_uri, data, output)
    if victim != "driver" and moment != "merging":
        wait_for_actor(job, found)
    wait_for_moment(job, output, moment)
    if victim == "driver":
        job.kill()
        job.communicate()
        job = start(model_uri, data, output)
    else:
        assert kill(found(), SCORER if victim == "actor" else "")
    finished(job)
    assert_same(table(output), table(undisturbed))


def test_a_second_job_ends_and_says_who_writes_there(model_uri, archive, tmp_path):
    """Without Ray: before anything else."""
    with lease.held(str(tmp_path)) as ours:
        log, _ = (job := start(model_uri, archive, tmp_path)).communicate(timeout=PATIENCE_S)
        who = f"process {os.getpid()} on {socket.gethostname()}, since {ours.since}"
        assert f"error: {tmp_path} is being written by another job ({who}): --wait waits for its end" in log
        assert job.returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == [lease.FOLDER]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """An archive of a few small files, one of them damaged."""
    root = tmp_path_factory.mktemp("few")
    for name, content in (archives.fields(12, 30, 40) | {"half.png": b"half"}).items():
        storage.write_bytes(f"{root}/{name}", content)
    return str(root)


@pytest.mark.trial
@pytest.mark.parametrize("seed", range(20))
def test_jobs_on_one_output_at_random_moments_give_one_table(seed, joined, model_uri, few, tmp_path, s3):
    draw = random.Random(seed)
    output = f"{s3}/{uuid.uuid4().hex}" if seed % 2 else str(tmp_path)
    jobs = []
    for _ in range(2 + seed % 2):
        jobs.append(start(model_uri, few, output))
        time.sleep(draw.uniform(0, 8))
    logs = [job.communicate(timeout=PATIENCE_S)[0] for job in jobs]
    codes = [job.returncode for job in jobs]
    assert {0} <= set(codes) <= {0, 2}, logs
    for code, log in zip(codes, logs, strict=True):
        assert ("is being written by another job (process" if code else output) in log
    names = table(output)[schema.IMAGE_ID].to_pylist()
    assert sorted(names) == sorted(list_inputs(few).table[schema.IMAGE_ID].to_pylist())
    assert read_json(f"{output}/summary.json")["n_rows"] == len(names) == 13


def test_a_pseudonymised_job_names_nobody(joined, model_uri, tmp_path):
    """On Ray: `tests/scoring/test_pseudonymised.py` has the details."""
    files = list(archives.fields(3).values())
    contents = {f"Doe_1950/{i}.png": content for i, content in enumerate(files)}
    contents |= {"Doe_1950/cut.png": files[0][:90], "Roe/Zephyr.svs": b"no slide at all"}
    for name, content in contents.items():
        storage.write_bytes(str(tmp_path / "patients" / name), content)
    key = tmp_path / "key"
    key.touch(0o600)
    key.write_bytes(os.urandom(32))
    output = tmp_path / "out"
    places = {"input": str(tmp_path / "patients"), "output": str(output)}
    score.run(ScoreConfig(model=model_uri, pseudonymise=str(key), **places))
    assert named_in(output) == []
    assert sorted(filter(None, table(output)[schema.ERROR].to_pylist())) == ["truncated", "unreadable"]
    assert "can no longer be read" not in (output / "gallery.html").read_text()


@pytest.mark.trial
def test_a_slide_of_each_format_is_scored_on_disk_and_on_s3(joined, model_uri, tmp_path, s3):
    """`tests/scoring/test_formats.py` has the details."""
    pixels, remote = pictures.stained(384, 512), f"{s3}/{uuid.uuid4().hex}"
    for number, made in enumerate(slide_files.FORMATS.values()):
        made.write(tmp_path / "in" / f"{number:02}", pixels)
    storage.upload_folder(tmp_path / "in", f"{remote}/in")
    for folder in (str(tmp_path), remote):
        score.run(ScoreConfig(model=model_uri, input=f"{folder}/in", output=f"{folder}/out"))
        described = storage.read_table(f"{folder}/out/slides.parquet")
        assert described[schema.READER].to_pylist() == [one.reader for one in slide_files.FORMATS.values()]
        assert described[schema.ERROR_TILES].to_pylist() == [0] * len(slide_files.FORMATS)
    here, there = (table(f"{folder}/out").to_pandas() for folder in (tmp_path, remote))
    assert (here[schema.IMAGE_ID] == there[schema.IMAGE_ID]).all()
    both = (one[schema.PROBABILITY_MALIGNANT] for one in (here, there))
    np.testing.assert_allclose(*both, rtol=1e-5)


def test_regions_and_overlap_on_a_cluster(joined, model_uri, tmp_path):
    """On Ray: `tests/scoring/test_tiling.py` has the details."""
    slide = pictures.tiled_tiff(pictures.stained(920, 1400), 0.49)
    ring = [[0, 0], [690, 0], [690, 920], [0, 920], [0, 0]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    region = [{"type": "Feature", "geometry": geometry, "properties": {"name": "left"}}]
    contents = {"in/s.tif": slide, "in/f.png": pictures.encode(pictures.gradient())}
    for name, content in (contents | {"regions/s.geojson": json.dumps(region).encode()}).items():
        storage.write_bytes(str(tmp_path / name), content)
    places = {name: str(tmp_path / folder) for name, folder in (("input", "in"), ("regions", "regions"))}
    config = ScoreConfig(model=model_uri, output=str(tmp_path / "out"), tile_overlap=0.5, **places)
    score.run(config)
    columns = (schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX, schema.TISSUE_SHARE, schema.REGION, schema.ERROR)
    rows = table(tmp_path / "out").select(columns).to_pylist()
    expected = [(None, None, None, None, None), *((0, y, 1.0, "left", None) for y in (0, 230, 460))]
    assert [tuple(row.values()) for row in rows] == expected
    assert (tmp_path / "out/slides/s.tif/tissue.geojson").exists()


def test_a_model_and_fields_of_the_hub_are_scored_as_files_are(cluster, model_uri, hub, tmp_path):
    """Every process of the job reads the commit that the job found at its start."""
    pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")
    fields = {f"{name}.png": pictures.encode(pictures.gradient(46, 70 + i)) for i, name in enumerate("ab")}
    commit = hub.put("owner/model", {path.name: path.read_bytes() for path in Path(model_uri).iterdir()})
    hub.put("owner/fields", fields, kind="datasets")
    finished(start("hf://owner/model", "hf://datasets/owner/fields", tmp_path / "hub", **hub.variables))
    assert read_json(str(tmp_path / "hub" / "summary.json"))["model"] == f"hf://owner/model@{commit}"
    rows = table(tmp_path / "hub")
    assert rows[schema.IMAGE_ID].to_pylist() == [*fields]
    assert rows[schema.SHA256].to_pylist() == [hashlib.sha256(each).hexdigest() for each in fields.values()]
    expected = bcd.load(model_uri).predict_files([*fields.values()])
    np.testing.assert_allclose(rows[schema.LOGIT].to_pylist(), expected.logit, atol=1e-6)


@pytest.mark.parametrize("job", ["score", pytest.param("evaluate", marks=pytest.mark.trial)])
def test_openvino_gives_a_row_what_it_gives_in_python(openvino, cluster, tree, model_uri, tmp_path, job):
    """Wherever a batch ends, and in whichever process: a service asks the same class."""
    data = ("--input" if job == "score" else "--data", tree, "--output", str(tmp_path / job))
    paths = os.pathsep.join([str(Path(openvino.__file__).parents[1]), str(ROOT)])
    # As where every node has the package.
    nodes = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": {"PYTHONPATH": paths}}})}
    arguments = (
        "--model",
        model_uri,
        *data,
        "--engine",
        "openvino",
        *(["--force"] if job == "evaluate" else ()),
    )
    finished(start_job(f"jobs/{job}.py", *arguments, **nodes))
    rows = table(tmp_path / job)
    assert set(rows[schema.ENGINE].to_pylist()) == {"openvino"}
    contents = [storage.read_bytes(uri) for uri in rows[schema.URI].to_pylist()]
    expected = bcd.load(model_uri, engine="openvino").predict_files(contents)
    np.testing.assert_allclose(rows[schema.LOGIT].to_pylist(), expected.logit, atol=1e-6)
    np.testing.assert_allclose(
        rows[schema.EVIDENCE].to_pylist(), expected.evidence.reshape(len(rows), -1), atol=1e-6
    )
