"""A whole scoring job with `--pseudonymise`, in this process: no file that it writes contains a name."""

import gzip
import json
import os
from contextlib import nullcontext

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from bcd import schema, storage
from bcd.audit.pseudonyms import Pseudonyms
from bcd.config.scoring import ScoreConfig
from bcd.errors import ConfigError
from bcd.model import predictor
from bcd.runtime import cluster, inspection, predict
from bcd.scoring import finish, ledger, score, slides, tiling
from tests import pictures
from tests.model.test_bundle import card, untrained
from tests.simulation.scoring import Inline
from tests.trained import scored

KEY = os.urandom(32)
# Of files, folders, ids and stores: in no file, and in the name of none.
NAMES = ["doe", "roe", "zephyr", "1950", "mrn", "7654321", "smith", "clinics", "gone", "ward"]


class KilledError(Exception):
    """The end of a job in the middle."""


def stained(width=100):
    pixels = np.full((150, 200, 3), 243, np.uint8)
    pixels[:, :width] = 230, 150, 180
    return pictures.tiled_tiff(pixels, 0.5)


@pytest.fixture(scope="module")
def model_uri(tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("model"))
    predictor.save(untrained(std=5e-3), card(mpp=(0.5,), field_width_px=40, field_height_px=30), uri)
    return uri


@pytest.fixture
def committed(monkeypatch):
    """Ids of the rows of each commit, in a job without Ray; it is killed after the number of `left`."""
    batches, left = [], [10**6]

    def score_rows(ours, books, progress, todo, settings, tiles, max_workers):
        done = ledger.tile_ids(books.done, set(todo[schema.IMAGE_ID].to_pylist()))
        rows = pa.concat_tables(tiling.expand(todo, tiles, ours.plans_uri, done))
        for start in range(0, len(rows), 4):
            if not left[0]:
                raise KilledError
            batch = scored(rows.slice(start, 4), settings)
            batches.append(batch[schema.IMAGE_ID].to_pylist())
            progress.add(ledger.commit(batch, ours.work_uri, tiles.hides_uris))
            left[0] -= 1
        return 1.0

    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "total_resources", lambda: {"CPU": 2, "GPU": 0})
    monkeypatch.setattr(inspection, "checked", lambda rows, check: check(rows))
    monkeypatch.setattr(predict, "one_model", lambda settings: nullcontext())
    monkeypatch.setattr(score, "_score", score_rows)
    for module in (score, finish, slides):
        monkeypatch.setattr(module, "ray", Inline)
    return batches, left


@pytest.fixture
def archive(tmp_path):
    """Fields, a slide, and files that cannot be read, under the names of patients."""
    contents = {
        "Doe_1950/a.png": pictures.encode(pictures.gradient()),
        "Doe_1950/MRN7654321.png": pictures.encode(pictures.gradient()[::-1]),
        "Doe_1950/cut.png": pictures.encode(pictures.gradient())[:90],
        "Zephyr_1950.tif": stained(),
        "Roe/text.svs": b"no slide at all",
        "Roe/text.smith": b"no input",
    }
    for name, content in contents.items():
        storage.write_bytes(str(tmp_path / "clinics" / name), content)
    (tmp_path / "clinics/Roe/link.png").symlink_to("/gone/smith_1950.png")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys/key").touch(0o600)
    (tmp_path / "keys/key").write_bytes(KEY)
    return tmp_path


def config_of(root, model_uri, **changes):
    given = {
        "model": model_uri,
        "input": str(root / "clinics"),
        "output": str(root / "out"),
        "compile": "off",
    }
    return ScoreConfig(**given | {"pseudonymise": str(root / "keys/key")} | changes)


def named_in(folder):
    """Where a name is, in names of files and in what they contain: compressed bytes, which may contain three
    letters by chance, are read."""
    found = []
    for path in (path for path in folder.rglob("*") if path.is_file()):
        stored = path.read_bytes()
        content = (gzip.decompress(stored) if path.suffix == ".gz" else stored).decode("latin-1")
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            keep = [name for name in table.column_names if name != schema.OVERLAY]
            content = (
                json.dumps(table.select(keep).to_pylist()) + str(table.schema) + str(table.schema.metadata)
            )
        text = content if path.suffix != ".html" else content.split("<body")[1].replace("base64,", "\n")
        lines = [line for line in text.split("\n") if not line.startswith(("/9j/", "iVBOR"))]
        text = "\n".join([str(path.relative_to(folder)), *lines]).casefold()
        found += [(path.name, name) for name in NAMES if name in text]
        found += [(path.name, "path")] if str(folder.parent).casefold() in text else []
    return found


def test_nothing_that_a_job_writes_names_anyone(archive, model_uri, committed, capsys):
    batches, left = committed
    config = config_of(archive, model_uri)
    left[0] = 2
    with pytest.raises(KilledError):
        score.run(config)
    work = archive / "out/work/0001"
    assert {path.suffix for path in work.rglob("*") if path.is_file()} == {".parquet", ".json", ".png"}
    assert named_in(archive / "out") == []
    left[0] = 10**6
    score.run(config)
    assert named_in(archive / "out") == []
    every = [name for batch in batches for name in batch]
    assert len(every) == len(set(every))  # none scored twice
    table = storage.dataset(str(archive / "out/predictions")).to_table()
    assert sorted(every) == sorted(table[schema.IMAGE_ID].to_pylist())
    check_maps(archive, model_uri, table)
    check_pages(archive)


def check_maps(archive, model_uri, table):
    """The same rows as without, under other names, and the map says which."""
    score.run(config_of(archive, model_uri, pseudonymise=None, output=str(archive / "plain")))
    plain = storage.dataset(str(archive / "plain/predictions")).to_table()
    assert {name for _, name in named_in(archive / "plain")} >= {"doe", "zephyr", "mrn", "smith", "path"}
    (path,) = (archive / "keys").glob("key.*.parquet")
    assert path.stat().st_mode & 0o777 == 0o600
    originals = {row[schema.PSEUDONYM]: row for row in pq.read_table(path).to_pylist()}
    numbers = [schema.PROBABILITY_MALIGNANT, schema.ERROR, schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX]

    def by_name(rows, original):
        known = {}
        for row in rows.to_pylist():
            name, mark, place = row[schema.IMAGE_ID].partition("#")
            known[original(name) + mark + place] = [row[column] for column in numbers]
        return known

    assert by_name(table, lambda name: originals[name][schema.ORIGINAL]) == by_name(plain, str)
    places = {row[schema.URI] for row in originals.values()}
    assert str(archive / "clinics/Zephyr_1950.tif") in places
    assert table[schema.URI].to_pylist() == [
        name.partition("#")[0] for name in table[schema.IMAGE_ID].to_pylist()
    ]
    messages = dict(
        zip(table[schema.ERROR].to_pylist(), table[schema.ERROR_MESSAGE].to_pylist(), strict=True)
    )
    assert messages["unreadable"] == ledger.HIDDEN_MESSAGE
    assert messages["truncated"].startswith("the file ends or is damaged")


def check_pages(archive):
    names = Pseudonyms("", KEY)
    page = (archive / "out/gallery.html").read_text()
    assert names.fingerprint in page
    assert names.of("Zephyr_1950.tif") in page
    assert "can no longer be read" not in page  # the images are shown, by their URIs
    assert 'href="../' not in page
    (slide,) = (archive / "out/slides").iterdir()
    assert slide.name == names.of("Zephyr_1950.tif")
    summary = json.loads((archive / "out/summary.json").read_text())
    assert (summary["n_inputs"], summary["n_ignored_files"], summary["ignored"]) == (6, 1, {})
    settings = json.loads((archive / "out/config.json").read_text())
    assert settings["pseudonymise"] == summary["pseudonyms"] == names.fingerprint


def test_a_later_run_knows_the_files_by_their_ids(archive, model_uri, committed, capsys):
    batches, _ = committed
    config = config_of(archive, model_uri)
    score.run(config)
    batches.clear()
    score.run(config)
    assert batches == []
    os.utime(archive / "clinics/Doe_1950/a.png", (1, 1))
    (archive / "clinics/Doe_1950/cut.png").write_bytes(pictures.encode(pictures.gradient()))
    storage.write_bytes(str(archive / "clinics/Roe/new.png"), pictures.encode(pictures.gradient()))
    score.run(config)
    names = Pseudonyms("", KEY)
    again = {names.of("Doe_1950/cut.png"), names.of("Roe/new.png")}
    assert {name for batch in batches for name in batch} == again
    assert named_in(archive / "out") == []
    assert not [name for name in ("Doe", "Zephyr", "smith_1950") if name in capsys.readouterr().out]
    (archive / "keys/other").touch(0o600)
    (archive / "keys/other").write_bytes(KEY[::-1])
    other = {"pseudonymise": str(archive / "keys/other")}
    for changes in (other, {"pseudonymise": None}):
        with pytest.raises(ConfigError, match=rf"other settings: .*--pseudonymise {names.fingerprint} -> "):
            score.run(config_of(archive, model_uri, **changes))


def test_ids_of_a_manifest_are_hidden_too(archive, model_uri, committed):
    lines = ["uri,image_id,patient,case,slide", "Doe_1950/a.png,Doe-a,Doe,MRN7654321,ward"]
    lines += ["Doe_1950/MRN7654321.png,Doe-b,Doe,,", "Zephyr_1950.tif,Zephyr,Zephyr^A,,"]
    (archive / "clinics/list.csv").write_text("\n".join(lines))
    score.run(config_of(archive, model_uri, input=str(archive / "clinics/list.csv")))
    assert named_in(archive / "out") == []
    table = storage.dataset(str(archive / "out/predictions")).to_table()
    of = Pseudonyms("", KEY).of
    assert set(table[schema.PATIENT].to_pylist()) == {of("Doe"), of("Zephyr^A")}
    assert of("ward") in table[schema.SLIDE].to_pylist()


@pytest.mark.parametrize("place", ["clinics/key", "out/key"])
def test_a_key_that_would_be_read_or_published_is_rejected(archive, model_uri, place):
    with pytest.raises(ConfigError, match=r"is inside --(input|output): keep the key elsewhere"):
        score.run(config_of(archive, model_uri, pseudonymise=str(archive / place)))


# ---- regions of interest, in a whole job


def draw(root, left, top, right, bottom, name="Smith"):
    """The regions of the slide: one rectangle."""
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    region = {"type": "Feature", "geometry": geometry, "properties": {"name": name}}
    storage.write_bytes(str(root / "regions/Zephyr_1950.geojson"), json.dumps([region]).encode())


def tiles_of(root):
    """Places, regions and errors of the slide's rows."""
    table = storage.dataset(str(root / "out/predictions")).to_table(filter=pc.field(schema.SLIDE).is_valid())
    rows = [row for row in table.to_pylist() if row[schema.ERROR] != "unreadable"]
    keys = (schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX, schema.REGION, schema.ERROR)
    return sorted(tuple(row[key] for key in keys) for row in rows)


def test_regions_name_nobody(archive, model_uri, committed):
    draw(archive, 0, 0, 40, 60)
    config = config_of(archive, model_uri, regions=str(archive / "regions"))
    score.run(config)
    assert named_in(archive / "out") == []
    assert tiles_of(archive) == [(0, 0, None, None), (0, 30, None, None)]
    draw(archive, 0, 0, 400, 60)
    score.run(config)
    assert named_in(archive / "out") == []
    assert tiles_of(archive) == [(None, None, None, "bad_regions")]


def test_a_slide_is_scored_again_with_other_regions(archive, model_uri, committed):
    """After the job, and after one that was killed with a plan and no row; with another overlap never."""
    _, left = committed
    draw(archive, 0, 0, 40, 60)
    config = config_of(archive, model_uri, pseudonymise=None, regions=str(archive / "regions"))
    left[0] = 0
    with pytest.raises(KilledError):
        score.run(config)
    draw(archive, 40, 30, 80, 90, "other")
    left[0] = 10**6
    score.run(config)
    assert tiles_of(archive) == [(40, 30, "other", None), (40, 60, "other", None)]
    draw(archive, 0, 120, 80, 150, "third")
    score.run(config)
    assert tiles_of(archive) == [(0, 120, "third", None), (40, 120, "third", None)]
    slides_table = pq.read_table(archive / "out/slides.parquet").filter(pc.field(schema.TILES).is_valid())
    assert [slides_table[name].to_pylist() for name in (schema.TILES, schema.OUTSIDE_TILES)] == [[2], [23]]
    (archive / "regions/Zephyr_1950.geojson").unlink()
    score.run(config)
    assert tiles_of(archive) == [(None, None, None, "no_regions")]
    with pytest.raises(ConfigError, match=r"--tile-overlap 0.0 -> 0.5"):
        score.run(config.model_copy(update={"tile_overlap": 0.5}))
