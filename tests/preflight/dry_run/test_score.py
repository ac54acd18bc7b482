import numpy as np
import pytest

from bcd import schema, storage
from bcd.config.scoring import ScoreConfig
from bcd.errors import ConfigError
from bcd.model import bundle
from bcd.preflight.dry_run import score
from bcd.scoring import inputs, ledger
from bcd.scoring import score as job
from bcd.slides import slide_cache
from tests import pictures
from tests.archives import claimed, fields
from tests.scoring.test_ledger import commit, row


def slide() -> bytes:
    """Two by two of the model's fields, 700x460 px: tissue at the left, glass at the right."""
    pixels = np.full((920, 1400, 3), 243, np.uint8)
    pixels[:, :700] = 230, 150, 180
    return pictures.tiled_tiff(pixels, 0.5)


@pytest.fixture
def config(bundle_uri, tmp_path):
    """Eleven fields, and two slides with two tiles of tissue each."""
    for name, content in (fields(11) | {"one.tif": slide(), "two.tif": slide()}).items():
        storage.write_bytes(f"{tmp_path}/in/{name}", content)
    (tmp_path / "in/notes.doc").write_text("not read")
    places = {"model": bundle_uri, "input": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    yield ScoreConfig(**places, batch_size=4, tile_mpp=0.5)
    slide_cache.open_staged.cache_clear()


def test_it_states_what_is_there_and_about_how_long_it_takes(dry, config):
    lines = dry(score, config)
    text = "\n".join(lines)
    assert lines[0] == "13 inputs (1 other entry is not read: 1 .doc)"
    assert "estimate: about 4 tiles with tissue in 2 slides, by the first 2 of them" in lines
    assert "estimate: 15 rows with maps of 2x3 need about " in text
    assert "  predicting 15 rows: about " in text
    assert "  reading 11 fields: about " in text
    assert "  reading 4 tiles: about " in text


def test_what_is_done_is_not_done_again(dry, config):
    settings = job.deciding(config, bundle.identify(config.model), False, None)
    ours, _ = ledger.open_ledger(claimed(config.output), settings, defaults=job.DEFAULTS)
    found, _ = job.listed_inputs(config, None)
    names = [name for name in found.table[schema.IMAGE_ID].to_pylist() if name.endswith(".png")]
    commit(ours, [row(name) for name in names[:9]])
    now = schema.fill(found.table.append_column(schema.VERSION, found.versions), schema.SEEN_INPUTS)
    storage.write_table(storage.join(config.output, inputs.FILE), now)
    lines = dry(score, config)
    assert lines[0].endswith("; 9 are already scored, resuming with 4")
    storage.write_bytes(f"{config.input}/{names[0]}", pictures.encode(pictures.gradient(50, 60)))
    assert "1 file may have changed: the job compares their bytes with their rows" in dry(score, config)
    with pytest.raises(ConfigError, match=r"other settings: --min-tissue 0\.1 -> 0\.5"):
        dry(score, config.model_copy(update={"min_tissue": 0.5}))


def test_slides_without_tissue_are_named_and_count_for_no_others(dry, config):
    glass = pictures.tiled_tiff(np.full((920, 1400, 3), 243, np.uint8), 0.5)
    for name in ("one.tif", "two.tif"):
        storage.write_bytes(f"{config.input}/{name}", glass)
    lines = dry(score, config)
    assert any(line.startswith("one.tif: no_tissue: ") for line in lines)
    assert "2 slides: the number of tiles is not known, as none could be opened" in lines
    assert any(line.startswith("  predicting 11 rows: ") for line in lines)


def test_an_output_inside_the_input_is_refused(dry, config):
    with pytest.raises(ConfigError, match="is inside --input"):
        dry(score, config.model_copy(update={"output": f"{config.input}/out"}))
