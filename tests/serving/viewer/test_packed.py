import json

import numpy as np
import pytest

from bcd import schema
from bcd.metrics import calibration
from bcd.serving.receive import RefusedError
from bcd.serving.viewer import packed, scored
from bcd.taxonomy import TUMOR_CLASSES
from tests import viewed


def unpack(content):
    """As the page does."""
    length = int.from_bytes(content[:4], "little")
    header = json.loads(content[4 : 4 + length])
    columns = {
        name: np.frombuffer(content, place["type"], place["length"], 4 + length + place["offset"])
        for name, place in header.pop("columns").items()
    }
    assert (4 + length) % 8 == 0
    return header, columns


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return viewed.make(str(tmp_path_factory.mktemp("packed")))


@pytest.fixture(scope="module")
def tiles(made):
    return scored.open_scored(made.uri).tiles(viewed.SLIDE)


def test_tiles_are_those_of_the_table_to_the_digit(made, tiles):
    header, columns = unpack(packed.pack(tiles, (viewed.MPP, viewed.MPP), TUMOR_CLASSES))
    rows = made.tiles()
    assert header["tiles"] == len(rows)
    assert (header["width"], header["height"]) == (2 * viewed.TILE_WIDTH_PX, 2 * viewed.TILE_HEIGHT_PX)
    assert header["novelty_cutoff"] == viewed.CUTOFF
    starts = [0, *columns["id_ends"][:-1].tolist()]
    texts = columns["ids"].tobytes()
    for n, row in enumerate(rows):
        name = header["id_prefix"] + texts[starts[n] : columns["id_ends"][n]].decode()
        assert name == row[schema.IMAGE_ID]
        assert (columns["x"][n], columns["y"][n]) == (row[schema.X_LEVEL0_PX], row[schema.Y_LEVEL0_PX])
        if row[schema.ERROR]:
            assert header["errors"][columns["error"][n]] == "truncated"
            assert columns["predicted"][n] == packed.NOTHING
            assert np.isnan([columns[key][n] for key in ("probability", "novelty", "log_odds")]).all()
            continue
        assert columns["error"][n] == packed.NOTHING
        assert columns["probability"][n] == np.float32(row[schema.PROBABILITY_MALIGNANT])
        assert columns["novelty"][n] == np.float32(row[schema.NOVELTY])
        assert columns["log_odds"][n] == calibration.log_odds([row[schema.LOGIT]], TUMOR_CLASSES)[0]
        assert header["classes"][columns["predicted"][n]] == row[schema.PREDICTED_CLASS]
        assert bool(columns["warned"][n]) == bool(row[schema.WARNINGS])


def test_no_tiles_and_too_many(tiles, monkeypatch):
    header, columns = unpack(packed.pack(tiles.slice(0, 0), (1, 1), TUMOR_CLASSES))
    assert (header["tiles"], header["novelty_cutoff"], len(columns["x"])) == (0, None, 0)
    monkeypatch.setattr(packed, "MOST_TILES", len(tiles) - 1)
    with pytest.raises(RefusedError, match="the viewer shows at most"):
        packed.pack(tiles, (1, 1), TUMOR_CLASSES)
