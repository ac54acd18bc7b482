import json

import numpy as np
import pyarrow as pa
import pytest

from bcd import schema, storage
from bcd.errors import DataError
from bcd.training.pooling import bags
from tests.training.pooling.planted import MODEL, failed, tiles_of, write_scores

RNG = np.random.default_rng(0)
EMBEDDINGS = {name: RNG.normal(size=(n, 8)) for name, n in (("a", 3), ("b", 5), ("c", 2))}
MALIGNANT = {"a": [0.2, 0.9, 0.6], "b": [0.1] * 5, "c": [0.3, 0.7]}


def table(name):
    return tiles_of(name, EMBEDDINGS[name], np.array(MALIGNANT[name]))


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Three slides in two files, b with a tile in error; d of which no tile has a result, e unreadable; and a
    field of no slide."""
    first = pa.concat_tables([table("c"), failed("b", "b#1", "truncated")])
    field = failed("x").set_column(2, schema.SLIDE, pa.array([None], pa.string()))
    second = pa.concat_tables([table("b"), table("a"), failed("d", "d#1"), failed("e"), field])
    return write_scores(tmp_path_factory.mktemp("scores"), first, second)


def test_a_slide_is_its_tiles_and_their_errors_are_counted(scores, monkeypatch):
    monkeypatch.setattr(bags, "TOP", 2)
    found = bags.read_slides(scores)
    assert (found.model_id, found.embedding) == (MODEL, 8)
    rows = {row[schema.SLIDE]: row for row in found.table.to_pylist()}
    assert list(rows) == ["a", "b", "c", "d", "e"]
    counts = [(row[schema.TILES], row[schema.ERROR_TILES], row[schema.ERROR]) for row in rows.values()]
    assert counts == [(3, 0, None), (5, 1, None), (2, 0, None), (0, 1, bags.NO_TILES), (0, 0, "unreadable")]
    shares = [rows[name][schema.MALIGNANT_TILE_SHARE] for name in "abcd"]
    assert shares == [2 / 3, 0, 0.5, None]
    tops = [rows[name][schema.TOP_PROBABILITY] for name in "abc"]
    assert tops == pytest.approx([0.75, 0.1, 0.5])
    assert rows["e"][schema.ERROR_MESSAGE] == "unreadable it is"
    assert len({rows[name][schema.SHA256] for name in "abc"}) == 3
    assert rows["d"][schema.SHA256] is None


def test_a_copy_under_another_name_has_the_same_hash(tmp_path):
    uri = write_scores(tmp_path, tiles_of("copy", EMBEDDINGS["a"], np.array(MALIGNANT["a"])), table("a"))
    first, second = bags.read_slides(uri).table[schema.SHA256].to_pylist()
    assert first == second


def test_bags_have_the_embeddings_of_their_tiles(scores, tmp_path):
    """From several files and batches, without rows in error, in the order of their names."""
    loaded = bags.load_bags(scores, ["c", "b"], tmp_path)
    assert list(loaded) == ["b", "c"]
    for name in loaded:
        np.testing.assert_array_equal(loaded[name], EMBEDDINGS[name].astype(np.float16))
    names = loaded.tiles.filter(pa.array([slide == "b" for slide in loaded.tiles["slide"].to_pylist()]))
    assert names[schema.IMAGE_ID].to_pylist() == [f"b#level0 {100 * i},0,0.5" for i in range(5)]


def test_a_table_in_many_batches_is_read_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(bags, "ROWS_AT_A_TIME", 7)
    embeddings = {name: RNG.normal(size=(150, 8)) for name in "zyx"}
    uri = write_scores(
        tmp_path, pa.concat_tables([tiles_of(n, e, np.full(150, 0.5)) for n, e in embeddings.items()])
    )
    loaded = bags.load_bags(uri, list("xyz"), tmp_path)
    for name, expected in embeddings.items():
        order = np.argsort([f"{100 * i}," for i in range(150)])  # by name
        np.testing.assert_array_equal(loaded[name], expected.astype(np.float16)[order])


def test_an_archive_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"not the output of a finished jobs/score\.py"):
        bags.read_slides(str(tmp_path))
    uri = write_scores(tmp_path, table("a"))
    storage.write_bytes(f"{uri}/summary.json", json.dumps({"incomplete": "changed"}).encode())
    with pytest.raises(DataError, match=r"not the output of a finished jobs/score\.py"):
        bags.read_slides(uri)


def test_scores_without_embeddings_say_how_to_get_them(tmp_path):
    uri = write_scores(tmp_path, table("a").drop_columns(schema.EMBEDDING))
    with pytest.raises(DataError, match="has no embeddings: score the archive with --embeddings"):
        bags.read_slides(uri)


def test_a_row_without_an_embedding_is_no_tile_of_zeros(tmp_path):
    """One file was written with them, the other without."""
    uri = write_scores(tmp_path, table("a"), table("b").drop_columns(schema.EMBEDDING))
    with pytest.raises(DataError, match="rows without an embedding"):
        bags.load_bags(uri, ["a", "b"], tmp_path)


def test_embeddings_of_two_models_are_not_mixed(tmp_path):
    other = tiles_of("b", EMBEDDINGS["b"], np.array(MALIGNANT["b"]), model_id=["f" * 16] * 5)
    with pytest.raises(DataError, match=f"rows of several models \\({MODEL}, {'f' * 16}\\)"):
        bags.read_slides(write_scores(tmp_path, table("a"), other))


def test_an_archive_of_fields_alone_has_no_slide(tmp_path):
    none = table("a").set_column(2, schema.SLIDE, pa.nulls(3, pa.string()))
    with pytest.raises(DataError, match="has no slide: expected whole slides, or a manifest with"):
        bags.read_slides(write_scores(tmp_path, none))


def test_a_slide_of_two_patients_is_refused(tmp_path):
    mixed = tiles_of("a", EMBEDDINGS["a"], np.array(MALIGNANT["a"]), patient=["p", "q", None])
    with pytest.raises(DataError, match=r"slide a is of several patients \(p, q\)"):
        bags.read_slides(write_scores(tmp_path, mixed))
