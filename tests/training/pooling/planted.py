"""The output of a scoring job with planted embeddings: no image, no model, no Ray."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from bcd import schema, storage
from bcd.taxonomy import TUMOR_CLASSES

MODEL = "0123456789abcdef"
# Share of a malignant slide's tiles that carry the class, and by how many standard deviations of the others.
SHARE, SHIFT = 0.02, 6.0
TILE_PX, MPP = 100, 0.5


def tiles_of(slide: str, embeddings: np.ndarray, malignant: np.ndarray, **columns: Any) -> pa.Table:
    """Rows of a predictions table: the tiles of a slide in one row, with these embeddings (n, length) and
    probabilities of malignancy (n,)."""
    n = len(embeddings)
    odds = np.log(malignant / (1 - malignant))
    known: dict[str, Any] = {
        schema.IMAGE_ID: [f"{slide}#level0 {TILE_PX * i},0,{MPP}" for i in range(n)],
        schema.URI: [f"in/{slide}"] * n,
        schema.SLIDE: [slide] * n,
        schema.X_LEVEL0_PX: [TILE_PX * i for i in range(n)],
        schema.Y_LEVEL0_PX: [0] * n,
        schema.MPP: [MPP] * n,
        schema.WIDTH_PX: [TILE_PX] * n,
        schema.HEIGHT_PX: [TILE_PX] * n,
        schema.LOGIT: [[0.0, one] for one in odds],
        schema.PROBABILITY_MALIGNANT: malignant,
        schema.PREDICTED_CLASS: [TUMOR_CLASSES[int(one >= 0.5)] for one in malignant],
        schema.MODEL_ID: [MODEL] * n,
        schema.BCD_VERSION: ["1"] * n,
        schema.EMBEDDING: list(embeddings.astype(np.float16)),
    }
    return schema.fill(pa.table(known | columns), schema.predictions(1, 1, embedding=embeddings.shape[1]))


def failed(slide: str, image_id: str | None = None, code: str = "unreadable", length: int = 8) -> pa.Table:
    """The row of a tile with an error; without an id of its own that of a slide that could not be read."""
    row = {schema.IMAGE_ID: image_id or slide, schema.URI: f"in/{slide}", schema.SLIDE: slide}
    row |= {schema.ERROR: code, schema.ERROR_MESSAGE: f"{code} it is", schema.MODEL_ID: MODEL}
    row |= {schema.BCD_VERSION: "1"} | ({schema.X_LEVEL0_PX: 0, schema.Y_LEVEL0_PX: 9} if image_id else {})
    return schema.fill(pa.Table.from_pylist([row]), schema.predictions(1, 1, embedding=length))


def write_scores(folder: Path, *files: pa.Table) -> str:
    """The output of a finished scoring job, with these files of its table."""
    uri = str(folder)
    for i, table in enumerate(files):
        storage.write_table(f"{uri}/predictions/part-0-0001-{i:05}.parquet", table, row_group_size=64)
    storage.write_bytes(f"{uri}/summary.json", json.dumps({"generation": 1}).encode())
    names = sorted({name for table in files for name in table[schema.SLIDE].to_pylist() if name})
    rows = [
        {schema.SLIDE: name, schema.URI: f"in/{name}", schema.MPP: MPP, schema.MPP_Y: MPP}
        | {schema.WIDTH_PX: 2_000, schema.HEIGHT_PX: TILE_PX}
        for name in names
    ]
    storage.write_table(f"{uri}/slides.parquet", pa.Table.from_pylist(rows, schema=schema.SLIDES))
    return uri


def write_labels(path: Path, rows: list[dict[str, str]]) -> str:
    """A CSV of labels."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_study(
    folder: Path, patients: int, tiles: int, length: int = 32, seed: int = 0, slides: int = 1
) -> tuple[str, str, set[str]]:
    """Scores and labels of a study, and the ids of its planted tiles.

    Half of the patients are malignant: `SHARE` of their slides' tiles are moved in one direction. The
    classifier of the tiles knows another direction only, of which the labels are independent. Each slide has
    an offset of its own, like a stain.
    """
    rng = np.random.default_rng(seed)
    planted, known = np.linalg.qr(rng.normal(size=(length, 2)))[0].T
    tables, labels, ids = [], [], set()
    for i in range(patients * slides):
        patient, name = i // slides, f"s{i:03}.svs"
        embeddings = rng.normal(size=(tiles, length)) + rng.normal(0, 0.5, length)
        malignant = 1 / (1 + np.exp(-(embeddings @ known)))
        if patient % 2:
            carriers = rng.choice(tiles, round(SHARE * tiles), replace=False)
            embeddings[carriers] += SHIFT * planted
            ids |= {f"{name}#level0 {TILE_PX * j},0,{MPP}" for j in carriers}
        tables.append(tiles_of(name, embeddings, malignant))
        labels.append({"slide": name, "tumor_class": TUMOR_CLASSES[patient % 2], "patient": f"p{patient:03}"})
    half = len(tables) // 2
    scores = write_scores(folder / "scores", *(pa.concat_tables(t) for t in (tables[:half], tables[half:])))
    return scores, write_labels(folder / "labels.csv", labels), ids
