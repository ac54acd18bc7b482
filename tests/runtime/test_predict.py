import hashlib
import io
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from PIL import Image
from ray.exceptions import RayError

from bcd import schema, storage
from bcd.data import index, read
from bcd.errors import BundleError, ConfigError
from bcd.imaging import appearance, image
from bcd.model import bundle, novelty, predictor, weights
from bcd.runtime import datasets, predict
from tests import pictures
from tests.model.test_bundle import card, untrained
from tests.trained import score_here


@pytest.fixture(scope="module")
def model_uri(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("bundle"))
    predictor.save(weights.build(2, seed=1, architecture="resnet18"), card(), uri)
    return uri


@pytest.fixture(scope="module")
def scorer(model_uri):
    return Scores(settings(model_uri, batch_size=4))


def settings(uri, **chosen):
    """Settings of a job that begins now."""
    return predict.Settings(uri, bundle.identify(uri), **chosen)


class Scores:
    """A worker and what reads for it, in one process: rows to predictions."""

    def __init__(self, job):
        self.worker = predict.Scorer(job, 2)

    def __call__(self, rows):
        options = predict.reading_options(self.worker._predictor.card, predict.CARRIED)
        return self.worker(read.pixels(rows, **options))


def reading(folder, contents):
    """Rows to read for files with these contents."""
    rows = []
    for name, content in contents.items():
        storage.write_bytes(f"{folder}/{name}", content)
        rows.append({schema.IMAGE_ID: name, schema.URI: f"{folder}/{name}"})
    return pa.Table.from_pylist(rows, schema=schema.READING)


@pytest.mark.ray
def test_every_row_gives_one_row_a_result_or_an_error(joined, model_uri, tmp_path):
    good = {f"benign/p/{i}.png": pictures.encode(pictures.gradient(50 + i, 70)) for i in range(5)}
    bad = {f"benign/p/{name}.png": content for name, (content, _) in pictures.broken().items()}
    for name, content in (good | bad).items():
        storage.write_bytes(storage.join(str(tmp_path / "in"), name), content)
    table, _ = index.read_index(str(tmp_path / "in"))
    uri = str(tmp_path / "out")
    job = settings(model_uri, batch_size=4)
    predict.write_predictions(
        predict.score_rows(datasets.row_dataset(schema.fill(table, schema.READING)), job), uri, "0"
    )
    result = predict.read_back(uri, schema.predictions(2, 3).names)
    assert result.schema.equals(schema.predictions(2, 3))
    assert result[schema.IMAGE_ID].to_pylist() == sorted(good | bad)
    rows = {row[schema.IMAGE_ID]: row for row in result.to_pylist()}
    expected = predictor.load(model_uri, device="cpu").predict_files(list(good.values()))
    np.testing.assert_allclose([rows[name][schema.LOGIT] for name in good], expected.logit, atol=1e-4)
    for name, (_, code) in pictures.broken().items():
        row = rows[f"benign/p/{name}.png"]
        assert (row[schema.ERROR], row[schema.LOGIT], row[schema.EVIDENCE]) == (code, None, None)
        assert row[schema.ERROR_MESSAGE]


# Ray believes in the GPU, torch has none: the plan is that of GPUs, the numbers are those of a CPU.
ON_A_GPU = """
import sys
import ray
ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False)
from bcd import storage
from bcd.config.scoring import ScoreConfig
from bcd.model import bundle, weights
from bcd.runtime import feature_statistics
from bcd.scoring import score
model_uri, archive, output = sys.argv[1:]
score.run(ScoreConfig(model=model_uri, input=archive, output=output))
rows, card = storage.read_table(archive + "/rows.parquet"), bundle.read_card(model_uri)
state = weights.build(2, seed=1, architecture="resnet18").state_dict()
parts = {"train": rows, "validation": rows.slice(0, 3)}
sums = feature_statistics._pooled(parts, card, ray.put((state, card)))
sums.to_pandas().to_json(output + "/sums.json")
"""


@pytest.mark.trial
@pytest.mark.ray
def test_images_are_read_for_gpus(scorer, model_uri, tmp_path):
    archive, output = tmp_path / "in", tmp_path / "out"
    good = {f"{i}.png": pictures.encode(pictures.gradient(50 + i, 70)) for i in range(40)}
    rows = reading(archive, good)
    storage.write_table(str(archive / "rows.parquet"), rows)
    reading(archive, {f"{name}.png": content for name, (content, _) in pictures.broken().items()})
    reading(archive, {"slide.tif": pictures.tiled_tiff(pictures.stained(600, 1_000), 0.5)})
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", ON_A_GPU, model_uri, str(archive), str(output)]
    subprocess.run(command, env=environment, check=True)
    found = storage.dataset(str(output / "predictions")).to_table().combine_chunks()
    tiles = found.filter(pc.is_valid(found[schema.X_LEVEL0_PX]))
    assert len(tiles) == 4
    assert len(found) == len(good) + len(pictures.broken()) + len(tiles)
    expected = scorer(schema.fill(found, schema.READING))
    for name in (*predict.CARRIED, schema.WIDTH_PX, schema.ERROR, schema.ERROR_MESSAGE):
        assert found[name].equals(expected[name]), name
    for name in (schema.LOGIT, schema.EVIDENCE):
        pair = [np.stack(table[name].drop_null().to_pylist()) for table in (found, expected)]
        np.testing.assert_allclose(*pair, rtol=1e-4, atol=1e-4)
    sums = pd.read_json(output / "sums.json")
    seen = predictor.from_state(weights.build(2, seed=1, architecture="resnet18").state_dict(), card())
    features, _ = seen.pooled(np.stack([seen.fit(image.decode(content)) for content in good.values()]))
    # The second batch has images of both parts.
    assert sorted(zip(sums["n"], map(len, sums["image_id"]), strict=True)) == [(8, 3), (32, 0)]
    np.testing.assert_allclose(np.sum(sums["total"].tolist(), 0), features.sum(0), rtol=1e-3)


def test_a_row_does_not_depend_on_its_neighbours_or_its_place(scorer, tmp_path):
    """To the last bit: a batch of five in batches of four, one broken among them, against each alone."""
    contents = {f"{i}.png": pictures.encode(pictures.gradient(50 + 9 * i, 70)) for i in range(5)}
    rows = reading(tmp_path, {"broken.png": b""} | contents)
    together = scorer(rows)
    alone = pa.concat_tables([scorer(rows.slice(i, 1)) for i in range(len(rows))])
    backwards = scorer(rows.take(list(reversed(range(len(rows)))))).take(list(reversed(range(len(rows)))))
    assert together[schema.LOGIT].null_count == 1
    assert together.equals(alone)
    assert together.equals(backwards)


@pytest.mark.parametrize("n_good", [8, 5])
def test_images_are_staged_to_the_bit(scorer, model_uri, n_good):
    """Views of Ray's object store are read-only; batches are whole, or filled with black."""
    images = np.stack([pictures.gradient(64, 96) // (i + 1) for i in range(8)])
    images.flags.writeable = False
    batch = read_images(images, np.arange(8) < n_good)
    found = scorer.worker(batch)
    model, size = predictor.load(model_uri, device="cpu"), 4
    padded = np.zeros((8, 64, 96, 3), np.uint8)
    padded[:n_good] = images[:n_good]
    expected = [model.predict(padded[at : at + size]) for at in (0, 4)]
    for name, field in (
        (schema.LOGIT, "logit"),
        (schema.PROBABILITY, "probability"),
        (schema.EVIDENCE, "evidence"),
        (schema.EVIDENCE_BIAS, "evidence_bias"),
    ):
        values = np.concatenate([getattr(one, field) for one in expected])[:n_good].reshape(n_good, -1)
        rows = np.array(found[name].to_pylist()[:n_good], np.float32).reshape(n_good, -1)
        np.testing.assert_array_equal(rows, values)
    assert found[schema.ERROR].null_count == n_good


def test_a_worker_measures_how_much_of_its_time_it_computes(monkeypatch):
    """From the end of the first batch on: 2 of 5 seconds, then 0 of 1."""
    now = iter([0.0, 4.0, 10.0, 12.0, 14.0, 15.0, 16.0])
    monkeypatch.setattr(predict, "time", SimpleNamespace(monotonic=lambda: next(now)))
    watch = predict.Stopwatch()
    with watch.computing():
        pass
    assert watch.lap() == (0, 0)
    with watch.computing():
        pass
    assert watch.lap() == (2, 5)
    assert watch.lap() == (0, 1)


def test_timed_rows_share_the_seconds_of_their_batch(model_uri):
    batch = read_images(np.zeros((3, 64, 96, 3), np.uint8), np.array([True, False, True]))
    plain = predict.Scorer(settings(model_uri, batch_size=2), 1)
    timed = predict.Scorer(settings(model_uri, batch_size=2, timed=True), 1)
    first, second = timed(batch), timed(batch)
    assert first.select(plain(batch).column_names).equals(plain(batch))
    assert first.column_names == [*plain(batch).column_names, *schema.TIMES.names]
    assert set(first[schema.ELAPSED_S].to_pylist()) == {0}
    computed, elapsed = (second[name].to_pylist() for name in schema.TIMES.names)
    assert len({*computed}) == len({*elapsed}) == 1
    assert 0 < computed[0] < elapsed[0]


def test_the_numbers_are_the_bundles_own(scorer, model_uri, tmp_path):
    contents = {f"{i}.png": pictures.encode(pictures.gradient(50 + 9 * i, 70)) for i in range(3)}
    found = scorer(reading(tmp_path, contents)).to_pylist()
    expected = predictor.load(model_uri, device="cpu").predict_files(list(contents.values()))
    np.testing.assert_allclose([row[schema.LOGIT] for row in found], expected.logit, rtol=1e-5)
    np.testing.assert_allclose(
        [row[schema.EVIDENCE] for row in found], expected.evidence.reshape(3, 6), rtol=1e-3, atol=1e-4
    )
    assert [row[schema.PREDICTED_CLASS] for row in found] == expected.predicted_class
    for i, row in enumerate(found):
        log_odds = row[schema.LOGIT][1] - row[schema.LOGIT][0]
        assert np.mean(row[schema.EVIDENCE]) + row[schema.EVIDENCE_BIAS] == pytest.approx(log_odds, abs=1e-3)
        assert (row[schema.EVIDENCE_HEIGHT], row[schema.EVIDENCE_WIDTH]) == (2, 3)
        assert (row[schema.HEIGHT_PX], row[schema.WIDTH_PX], row[schema.ERROR]) == (50 + 9 * i, 70, None)


def test_tiles_are_scored_from_their_slide(scorer, tmp_path):
    """A tile, and the same pixels as a field."""
    pixels = pictures.gradient(150, 200)
    field = pixels[30:76, 40:110]
    rows = reading(tmp_path, {"s.tif": pictures.tiled_tiff(pixels, 0.5), "f.png": pictures.encode(field)})
    first, second = rows.to_pylist()
    first |= {schema.X_LEVEL0_PX: 40, schema.Y_LEVEL0_PX: 30, schema.MPP: 0.5, schema.SLIDE: "s.tif"}
    first |= {schema.WIDTH_PX: 70, schema.HEIGHT_PX: 46}
    known = {schema.IMAGE_ID: "b.svs", schema.ERROR: "unreadable", schema.ERROR_MESSAGE: "no slide"}
    rows = pa.Table.from_pylist([first, second, second | known], schema=schema.READING)
    tile, field, broken = scorer(rows).to_pylist()
    assert tile[schema.EVIDENCE] == field[schema.EVIDENCE]
    assert tile[schema.LOGIT] == field[schema.LOGIT]
    place = (schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX, schema.MPP, schema.SLIDE, schema.WIDTH_PX)
    assert [tile[name] for name in place] == [40, 30, 0.5, "s.tif", 70]
    assert [field[name] for name in place] == [None, None, None, None, 70]
    assert (broken[schema.ERROR], broken[schema.ERROR_MESSAGE]) == ("unreadable", "no slide")


def test_a_row_says_which_bytes_it_is_of_and_what_computed_it(scorer, model_uri, tmp_path):
    """A file that was read, whole or broken; one that is not there; a tile; and another precision."""
    contents = {"a.png": pictures.encode(pictures.gradient()), "b.png": b"broken"}
    contents["s.tif"] = pictures.tiled_tiff(pictures.gradient(150, 200), 0.5)
    rows = reading(tmp_path, contents).to_pylist()
    rows[2] |= {schema.X_LEVEL0_PX: 0, schema.Y_LEVEL0_PX: 0, schema.MPP: 0.5}
    rows[2] |= {schema.WIDTH_PX: 70, schema.HEIGHT_PX: 46}
    rows.append({schema.IMAGE_ID: "gone.png", schema.URI: str(tmp_path / "gone.png")})
    table = pa.Table.from_pylist(rows, schema=schema.READING)
    found = scorer(table)
    read_whole = [hashlib.sha256(contents[name]).hexdigest() for name in ("a.png", "b.png")]
    assert found[schema.SHA256].to_pylist() == [*read_whole, None, None]
    assert found[schema.ENGINE].to_pylist() == ["torch"] * 4
    assert found[schema.PRECISION].to_pylist() == ["float32"] * 4
    half = Scores(settings(model_uri, precision="bfloat16", batch_size=4))(table.slice(1, 1))
    assert half[schema.PRECISION].to_pylist() == ["bfloat16"]


def test_rows_of_openvino_name_it_and_have_the_numbers_of_torch(openvino, scorer, model_uri, tmp_path):
    table = reading(tmp_path, {"a.png": pictures.encode(pictures.gradient()), "b.png": b"broken"})
    found = Scores(settings(model_uri, engine="openvino", batch_size=4))(table)
    assert found[schema.ENGINE].to_pylist() == ["openvino"] * 2
    expected = scorer(table)
    for name in (schema.LOGIT, schema.EVIDENCE):
        ours, theirs = (np.array(rows[name][0].as_py()) for rows in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert found[schema.ERROR].to_pylist() == expected[schema.ERROR].to_pylist()


def test_a_worker_without_the_engine_says_so_with_its_first_batch(model_uri, monkeypatch):
    """Ray would replace an actor that fails when it starts, again and again."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    worker = predict.Scorer(settings(model_uri, engine="openvino"), 2)
    with pytest.raises(ConfigError, match="openvino is missing"):
        worker({})


def test_warnings_are_in_the_row(tmp_path):
    """With a cut-off that the image exceeds, with one that it does not, and without statistics."""
    facts = {"mean": (0.0,) * 512, "spread": (1.0,) * 512, "n_training": 1, "n_validation": 1}
    rows = reading(tmp_path, {"a.png": pictures.encode(pictures.gradient()), "b.png": b""})
    told = []
    for cutoff in (1e-6, 1e6, None):
        known = novelty.FeatureStatistics(**facts, cutoff=cutoff) if cutoff else None
        uri = str(tmp_path / f"model-{cutoff}")
        predictor.save(weights.build(2, seed=1, architecture="resnet18"), card(feature_statistics=known), uri)
        good, bad = Scores(settings(uri, batch_size=2))(rows).to_pylist()
        assert (bad[schema.NOVELTY], bad[schema.NOVELTY_CUTOFF], bad[schema.WARNINGS]) == (None, None, None)
        told.append((good[schema.NOVELTY_CUTOFF], good[schema.WARNINGS]))
    first = np.float32(1e-6).item()
    assert told == [(first, ["unlike_training_data"]), (1e6, []), (None, [])]


def test_the_stain_is_in_the_row(scorer, tmp_path):
    rows = reading(tmp_path, {"a.png": pictures.encode(pictures.gradient()), "b.png": b""})
    good, bad = scorer(rows).select(schema.STAIN).to_pylist()
    fitted = scorer.worker._predictor.fit(pictures.gradient())
    expected = [np.float32(value).item() for value in appearance.measure_stain(fitted)]
    assert list(good.values()) == expected
    assert set(bad.values()) == {None}


def test_overlays_and_other_methods_on_request(model_uri, tmp_path):
    rows = reading(tmp_path, {"a.png": pictures.encode(pictures.gradient()), "b.png": b""})
    job = settings(model_uri, batch_size=2, cam="layercam", cam_layer="layer3", overlays=True)
    found = Scores(job)(rows)
    assert found.schema.equals(schema.predictions(4, 6, overlays=True))
    good, bad = found.to_pylist()
    assert np.asarray(Image.open(io.BytesIO(good[schema.OVERLAY]))).shape == (64, 96, 3)
    assert (good[schema.EVIDENCE_HEIGHT], good[schema.EVIDENCE_WIDTH]) == (4, 6)
    assert (good[schema.EVIDENCE_BIAS], bad[schema.OVERLAY], bad[schema.EVIDENCE]) == (None, None, None)
    plain = Scores(replace(job, cam="evidence", cam_layer="layer4"))(rows).to_pylist()
    assert plain[0][schema.LOGIT] == good[schema.LOGIT]


def test_rows_of_a_network_without_a_closed_form(tmp_path):
    """Maps of its own size by Grad-CAM, no bias, an embedding of its own length."""
    pytest.importorskip("timm", reason="needs the extra `timm`")
    network = weights.build(2, seed=1, architecture="timm:test_vit", size_px=(64, 96))
    known = card(architecture="timm:test_vit", mean=(0.5,) * 3, std=(0.5,) * 3, weights_license="apache-2.0")
    predictor.save(network, known, str(tmp_path / "model"))
    rows = reading(tmp_path, {"a.png": pictures.encode(pictures.gradient()), "b.png": b""})
    found = Scores(settings(str(tmp_path / "model"), batch_size=2, overlays=True, embeddings=True))(rows)
    assert found.schema.equals(schema.predictions(4, 6, overlays=True, embedding=64))
    good, bad = found.to_pylist()
    assert good[schema.EVIDENCE_BIAS] is None
    assert np.ptp(good[schema.EVIDENCE]) > 0
    assert (bad[schema.EVIDENCE], bad[schema.ERROR]) == (None, "empty")
    pixels = image.fit(pictures.gradient(), 64, 96).astype(np.float32) / 255
    inputs = torch.from_numpy((pixels - 0.5) / 0.5).permute(2, 0, 1)[None]
    expected = network.eval()(inputs)[0].tolist()
    assert good[schema.LOGIT] == pytest.approx(expected, abs=1e-4)


def test_the_last_layer_turns_the_embedding_into_the_logits(tmp_path):
    """To the precision of float16; a temperature divides them, and a row with an error has none."""
    network = untrained()
    predictor.save(network, card(temperature=2.0), str(tmp_path / "model"))
    contents = {f"{i}.png": pictures.encode(pictures.gradient(50 + 9 * i, 70)) for i in range(3)}
    rows = reading(tmp_path, contents | {"x.png": b""})
    job = settings(str(tmp_path / "model"), batch_size=2, embeddings=True)
    found = Scores(job)(rows)
    assert found.schema.equals(schema.predictions(2, 3, embedding=512))
    assert found.drop_columns(schema.EMBEDDING).equals(Scores(replace(job, embeddings=False))(rows))
    good = found.slice(0, 3)
    pooled = np.stack(good[schema.EMBEDDING].to_pylist()).astype(np.float32)
    weight, bias = (tensor.detach().numpy() for tensor in (network.fc.weight, network.fc.bias))
    logit = np.array(good[schema.LOGIT].to_pylist())
    # A number of float16 has 11 bits: each summand is off by 2 ** -11 of itself at most.
    most = 2.0**-11 * (np.abs(pooled) @ np.abs(weight).T) / 2 + 1e-4
    assert (np.abs((pooled @ weight.T + bias) / 2 - logit) <= most).all()
    assert np.ptp(logit, 0).min() > 10 * most.max()
    assert found[schema.EMBEDDING][3].as_py() is None


class Overflowing:
    """A network that gives no numbers for a white image."""

    def __init__(self, features):
        self._features = features

    def __call__(self, batch):
        maps = self._features(batch)
        maps[batch.mean((1, 2, 3)) > 2] = torch.inf
        return maps


def test_no_numbers_no_class(model_uri, tmp_path):
    """Of four images the white one and the broken one have an error."""
    white = np.full((64, 96, 3), 255, np.uint8)
    files = {"a.png": pictures.encode(pictures.gradient()), "w.png": pictures.encode(white), "x.png": b""}
    rows = reading(tmp_path, files | {"z.png": pictures.encode(pictures.gradient(50, 70))})
    scorer = Scores(settings(model_uri, batch_size=2, overlays=True, embeddings=True))
    expected = scorer(rows).to_pylist()
    worker = scorer.worker
    worker._predictor = replace(worker._predictor, features=Overflowing(worker._predictor.features))
    found = scorer(rows).to_pylist()
    assert [row[schema.ERROR] for row in found] == [None, "not_finite", "empty", None]
    assert [found[i] for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]
    assert "logits are not finite numbers" in found[1][schema.ERROR_MESSAGE]
    told = (schema.IMAGE_ID, schema.URI, schema.WIDTH_PX, schema.SHA256, schema.MODEL_ID, schema.ENGINE)
    assert {name: found[1][name] for name in told} == {name: expected[1][name] for name in told}
    numbers = (schema.LOGIT, schema.PROBABILITY, schema.PREDICTED_CLASS, schema.EVIDENCE, schema.OVERLAY)
    numbers += (schema.EMBEDDING,)
    assert {found[1][name] for name in (*numbers, schema.PROBABILITY_MALIGNANT, schema.NOVELTY)} == {None}


def test_a_worker_with_another_model_scores_nothing(model_uri, tmp_path):
    """As one that starts after the bundle was replaced."""
    rows = reading(tmp_path, {"a.png": pictures.encode(pictures.gradient())})
    late = predict.Scorer(predict.Settings(model_uri, "0123456789abcdef", batch_size=2), 1)
    with pytest.raises(BundleError, match=f"was 0123456789abcdef, now it is {late._predictor.model_id}"):
        late(rows)
    with pytest.raises(BundleError, match="has changed since the start"):
        predict.score_rows(None, late._settings)


def test_a_job_whose_model_changed_says_so(tmp_path):
    """Whether something failed because of that or not; what failed for another reason stays what it is."""
    uri = str(tmp_path)
    predictor.save(weights.build(2, seed=1, architecture="resnet18"), card(), uri)
    job = settings(uri)
    with predict.one_model(job):
        pass
    with pytest.raises(RayError, match="ours"), predict.one_model(job):
        raise RayError("ours")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with (
        pytest.raises(BundleError, match=r"not the file that card.json was written for"),
        predict.one_model(job),
    ):
        raise RayError
    predictor.save(weights.build(2, seed=2, architecture="resnet18"), card(), uri)
    with pytest.raises(BundleError, match="has changed since the start"), predict.one_model(job):
        raise RayError
    with pytest.raises(BundleError, match="has changed since the start"), predict.one_model(job):
        pass


def read_images(images, good):
    """What `read.pixels` gives for fields of 46x70 px, some of them broken."""
    n = len(images)
    return {
        schema.IMAGE: images,
        schema.HEIGHT_PX: np.full(n, 46, np.int32),
        schema.WIDTH_PX: np.full(n, 70, np.int32),
        schema.SHA256: np.array([""] * n, object),
        schema.ERROR: np.where(good, "", "empty").astype(object),
        schema.ERROR_MESSAGE: np.where(good, "", "no bytes").astype(object),
        **{name: np.array([f"{i}" for i in range(n)], object) for name in predict.CARRIED},
        **{name: np.full(n, np.nan) for name in (schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX, schema.MPP)},
        schema.TISSUE_SHARE: np.full(n, np.nan, np.float32),
    }


def test_a_batch_without_a_good_image_is_all_errors(model_uri):
    batch = {
        schema.IMAGE: np.zeros((2, 64, 96, 3), np.uint8),
        schema.HEIGHT_PX: np.zeros(2, np.int32),
        schema.WIDTH_PX: np.zeros(2, np.int32),
        schema.SHA256: np.array(["", "ab"], object),
        schema.ERROR: np.array(["empty", "truncated"]),
        schema.ERROR_MESSAGE: np.array(["a", "b"]),
        **{name: np.array(["x", "y"], object) for name in predict.CARRIED},
        schema.X_LEVEL0_PX: np.array([np.nan, 9.0]),
        schema.Y_LEVEL0_PX: np.array([np.nan, 0.0]),
        schema.TISSUE_SHARE: np.array([np.nan, 0.25], np.float32),
        schema.REGION: np.array([None, "r"], object),
        schema.MPP: np.array([np.nan, 0.5], np.float32),
    }
    result = predict.Scorer(settings(model_uri), 2)(batch)
    assert result.schema.equals(schema.predictions(2, 3))
    assert result[schema.ERROR].to_pylist() == ["empty", "truncated"]
    assert result[schema.LOGIT].null_count == result[schema.HEIGHT_PX].null_count == 2
    assert result[schema.MPP].to_pylist() == [None, 0.5]
    assert result[schema.SHA256].to_pylist() == [None, "ab"]
    assert result[schema.X_LEVEL0_PX].to_pylist() == [None, 9]
    assert result[schema.TISSUE_SHARE].to_pylist() == [None, 0.25]
    assert result[schema.REGION].to_pylist() == [None, "r"]


@pytest.mark.ray
def test_writing_replaces_the_same_table_and_nothing_else(joined, model_uri, tmp_path):
    other = tmp_path / "out/part-0001-00000.parquet"
    storage.write_bytes(str(other), b"of another archive")
    storage.write_bytes(str(tmp_path / "in/benign/p/a.png"), pictures.encode(pictures.gradient()))
    table, _ = index.read_index(str(tmp_path / "in"))
    rows, job = schema.fill(table, schema.READING), settings(model_uri, batch_size=4)
    for _ in range(2):
        predict.write_predictions(score_here(datasets.row_dataset(rows), job), str(tmp_path / "out"), "0")
    assert other.read_bytes() == b"of another archive"
    other.unlink()
    assert len(predict.read_back(str(tmp_path / "out"), [schema.IMAGE_ID])) == 1
