import json
import os

import pytest

from bcd import schema, storage
from bcd.errors import DataError
from bcd.serving.receive import RefusedError
from bcd.serving.viewer import scored
from tests import viewed


def test_rows_are_found_by_their_ids(tmp_path):
    made = viewed.make(str(tmp_path))
    output = scored.open_scored(made.uri)
    assert output.has_pixels
    assert output.slide(viewed.SLIDE)[schema.WIDTH_PX] == viewed.WIDTH_PX
    tiles = output.tiles(viewed.SLIDE).to_pylist()
    assert [row[schema.IMAGE_ID] for row in tiles] == [row[schema.IMAGE_ID] for row in made.tiles()]
    field = output.field("field 2.png")
    assert field == {name: made.rows["field 2.png"][name] for name in scored.FIELD}
    for name in ("../in/field 2.png", field[schema.URI], "nothing", ""):
        assert (output.slide(name), output.field(name), len(output.tiles(name))) == (None, None, 0)
    # A tile is no field, and neither is a slide.
    assert output.field(tiles[0][schema.IMAGE_ID]) is None
    with pytest.raises(RefusedError, match="no input of this name"):
        scored.require(output.slide("nothing"))


def test_an_output_is_read_again_after_another_job(tmp_path):
    made = viewed.make(str(tmp_path))
    output = scored.open_scored(made.uri)
    assert scored.renewed(output) is output
    summary = storage.join(made.uri, "summary.json")
    storage.write_bytes(summary, json.dumps(dict(output.summary) | {"n_images": 8}).encode())
    os.utime(summary, (1, 1))
    assert scored.renewed(output).summary["n_images"] == 8


@pytest.mark.parametrize(
    ("content", "said"), [(None, "no summary.json there"), (b'{"x": 1}', "states no threshold")]
)
def test_what_is_no_output_is_an_error(tmp_path, content, said):
    if content:
        (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(DataError, match=said):
        scored.open_scored(str(tmp_path))


def test_an_output_in_a_store(s3):
    made = viewed.make(f"{s3}/scored")
    output = scored.open_scored(made.uri)
    assert len(output.tiles(viewed.SLIDE)) == len(made.tiles())
    assert output.heat_map(viewed.SLIDE).startswith(b"\x89PNG")
