"""The tiles of a slide as one binary answer: what the map draws and the page shows of each, as typed arrays.

    length of the header (uint32), the header in JSON, and columns, each from a multiple of 8 bytes on

All numbers are little endian. The header names type, offset (from the end of the header, which is padded) and
length of each column. float32 columns are those of the table, so that the shortest text for a number is that
of the table's; log-odds are float64 of its logits.
"""

import json
import os.path
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema
from bcd.metrics import calibration
from bcd.serving.receive import RefusedError

# Of one slide: 36 bytes each in the answer, and about 200 while it is made.
MOST_TILES = 2_000_000
ALIGNMENT = 8
NOTHING = 255


def pack(tiles: pa.Table, slide_mpp: tuple[float, float], classes: Sequence[str]) -> bytes:
    """Pack tiles (columns `scored.TILE`) of a slide with this µm/px at level 0; raises RefusedError for more
    than `MOST_TILES`.

    A probability or novelty that a tile has not is NaN. `predicted` and `error` are positions in lists of the
    header, or `NOTHING`.
    """
    if len(tiles) > MOST_TILES:
        why = f"the slide has {len(tiles):,} tiles; the viewer shows at most {MOST_TILES:,}"
        raise RefusedError(413, "too_large", why)
    width, height = tile_size(tiles, slide_mpp)
    predicted, names = _coded(tiles[schema.PREDICTED_CLASS])
    error, codes = _coded(tiles[schema.ERROR])
    prefix, ends, letters = _ids(tiles[schema.IMAGE_ID].to_pylist())
    columns = {
        "x": _ints(tiles[schema.X_LEVEL0_PX]),
        "y": _ints(tiles[schema.Y_LEVEL0_PX]),
        "probability": _floats(tiles[schema.PROBABILITY_MALIGNANT]),
        "log_odds": log_odds_of(tiles[schema.LOGIT], classes),
        "novelty": _floats(tiles[schema.NOVELTY]),
        "warned": is_warned(tiles).astype(np.uint8),
        "predicted": predicted,
        "error": error,
        "id_ends": ends,
        "ids": letters,
    }
    cutoff = pc.max(tiles[schema.NOVELTY_CUTOFF]).as_py() if len(tiles) else None
    facts = {"tiles": len(tiles), "width": width, "height": height, "novelty_cutoff": cutoff}
    return _joined(facts | {"id_prefix": prefix, "classes": names, "errors": codes}, columns)


def tile_size(tiles: pa.Table, slide_mpp: tuple[float, float]) -> tuple[int, int]:
    """Width and height of a slide's tiles, all of one size, in pixels of level 0."""
    sides = [pc.max(tiles[name]).as_py() or 0 for name in (schema.WIDTH_PX, schema.HEIGHT_PX)]
    tile_mpp = pc.max(tiles[schema.MPP]).as_py() or 0
    width, height = (round(side * tile_mpp / mpp) for side, mpp in zip(sides, slide_mpp, strict=True))
    return width, height


def log_odds_of(logits: pa.ChunkedArray, classes: Sequence[str]) -> np.ndarray:
    """Log-odds of malignancy, float64 (n,), NaN without logits."""
    unknown = [np.nan] * len(classes)
    rows = np.array([values or unknown for values in logits.to_pylist()], np.float64)
    return calibration.log_odds(rows.reshape(len(logits), len(classes)), classes)


def is_warned(tiles: pa.Table) -> np.ndarray:
    """bool (n,): which rows have a warning."""
    return pc.greater(pc.list_value_length(tiles[schema.WARNINGS]), 0).fill_null(False).to_numpy()


def _ints(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(np.int32)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(np.float32)


def _coded(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Positions in a list of the distinct texts, which are few."""
    coded = column.combine_chunks().dictionary_encode()
    return coded.indices.fill_null(NOTHING).to_numpy().astype(np.uint8), coded.dictionary.to_pylist()


def _ids(names: Sequence[str]) -> tuple[str, np.ndarray, np.ndarray]:
    """The beginning that all ids share, where the rest of each ends, and all rests as UTF-8."""
    prefix = os.path.commonprefix([min(names, default=""), max(names, default="")])  # noqa: RUF071
    rests = [name[len(prefix) :].encode() for name in names]
    ends = np.cumsum([len(rest) for rest in rests], dtype=np.uint32)
    return prefix, ends, np.frombuffer(b"".join(rests), np.uint8)


def _joined(facts: Mapping[str, Any], columns: Mapping[str, np.ndarray]) -> bytes:
    body, places = bytearray(), {}
    for name, values in columns.items():
        places[name] = {"type": values.dtype.name, "offset": len(body), "length": len(values)}
        body += np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
        body += bytes(-len(body) % ALIGNMENT)
    header = json.dumps({**facts, "columns": places}).encode()
    header += b" " * (-(4 + len(header)) % ALIGNMENT)
    return len(header).to_bytes(4, "little") + header + bytes(body)
