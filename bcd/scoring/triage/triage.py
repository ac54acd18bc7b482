"""Out to a person and back: wrong and least certain predictions as a sheet, its labels as a manifest."""

import json
import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from bcd import lease, schema, storage
from bcd.config.evaluation import TriageConfig
from bcd.errors import ConfigError, DataError
from bcd.lease import Lease
from bcd.metrics import aggregate
from bcd.runtime import output, run_directory
from bcd.scoring.ledger import PREDICTIONS, SUMMARY
from bcd.scoring.triage import sheet
from bcd.text import counted

logger = logging.getLogger(__name__)

SHEET, MANIFEST, FIFTYONE = "triage.csv", "manifest.parquet", "fiftyone"
# Values of the column `reason`.
WRONG, LEAST_CERTAIN = "wrong", "least_certain"
PREDICTED = [
    *(schema.IMAGE_ID, schema.URI, schema.PATIENT, schema.SLIDE, schema.X_LEVEL0_PX, schema.Y_LEVEL0_PX),
    *(schema.MPP, schema.PROBABILITY_MALIGNANT, schema.PREDICTED_CLASS, schema.NOVELTY),
]
TRUTH = [
    *(schema.IMAGE_ID, schema.CASE, schema.SITE, schema.TUMOR_CLASS, schema.SUBTYPE, schema.MAGNIFICATION)
]
JUDGED = [aggregate.MARGIN, aggregate.CORRECT]


def run(config: TriageConfig) -> str:
    """Write the sheet, or the manifest of a sheet that was filled in, and return the URI of the output.

    Raises:
        ConfigError: there are no finished predictions, or the sheet in the output has been filled in.
        DataError: the filled-in sheet names an image that was not scored, or a label that is none.
    """
    output.read_marker(config.output, output.TRIAGE)
    images = _scored(config.scores)
    with lease.held(config.output, config.wait) as own:
        output.claim_folder(config.output, output.TRIAGE, own.require)
        if config.labels:
            _write_manifest(config, images, own)
        else:
            _write_sheet(config, chosen(images, config.most), own)
    return config.output


def _scored(uri: str) -> pd.DataFrame:
    """A row for each image or tile with a result: `PREDICTED`, `TRUTH` as far as it is known, `JUDGED`."""
    job = output.owner(uri)
    if job not in (output.SCORE, output.EVALUATE, output.TRAIN):
        raise ConfigError(f"--scores {uri}: expected the output of jobs/score.py, jobs/evaluate.py or a run")
    end = SUMMARY if job == output.SCORE else run_directory.IMAGES
    if not storage.exists(storage.join(uri, end)):
        raise ConfigError(f"--scores {uri}: no {end} there, so the job is not finished; run it again")
    good = pc.is_null(pc.field(schema.ERROR))
    table = storage.dataset(storage.join(uri, PREDICTIONS)).to_table(PREDICTED, filter=good)
    # Integers stay integers, beside missing ones.
    images = table.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    if job != output.SCORE:
        # Runs of earlier versions have no sites.
        known = storage.read_table(storage.join(uri, end)).to_pandas().reindex(columns=[*TRUTH, *JUDGED])
        return images.merge(known, on=schema.IMAGE_ID, validate="one_to_one")
    summary = json.loads(storage.read_bytes(storage.join(uri, SUMMARY)))
    if "pseudonyms" in summary:
        raise ConfigError(f"--scores {uri}: ids replace the names there, so nobody could find the images")
    odds = [
        aggregate.clipped_log_odds(np.asarray(values, np.float64))
        for values in (images[schema.PROBABILITY_MALIGNANT], summary["threshold"])
    ]
    unknown = dict.fromkeys(TRUTH[1:])
    return images.assign(**unknown, **{aggregate.MARGIN: odds[0] - odds[1], aggregate.CORRECT: True})


def chosen(images: pd.DataFrame, most: int) -> pd.DataFrame:
    """The rows to look at, with a `reason`: at most so many wrong ones, the most certain first, and of the
    others the least certain, these first."""
    order = images[aggregate.MARGIN].abs().sort_values(kind="stable").index
    rising, correct = images.loc[order], images.loc[order, aggregate.CORRECT].astype(bool)
    wrong = rising[~correct][::-1].head(most).assign(**{schema.REASON: WRONG})
    unsure = rising[correct].head(most).assign(**{schema.REASON: LEAST_CERTAIN})
    return pd.concat([wrong, unsure], ignore_index=True)


def _write_sheet(config: TriageConfig, rows: pd.DataFrame, own: Lease) -> None:
    uri, content = storage.join(config.output, SHEET), sheet.as_csv(rows)
    if storage.exists(uri) and storage.read_bytes(uri) != content:
        raise ConfigError(
            f"{uri} is there, and not as it would be written now: it is kept, because it may be filled in. "
            "Read it with --labels, or choose another --output"
        )
    own.require()
    storage.write_bytes(uri, content)
    shown = rows[[Path(place).is_absolute() for place in rows[schema.URI]]]
    shown = shown[shown[schema.X_LEVEL0_PX].isna()]
    for name, content in sheet.as_fiftyone(shown).items():
        storage.write_bytes(storage.join(config.output, FIFTYONE, name), content)
    counts = rows[schema.REASON].value_counts()
    logger.info(
        f"{uri}: {counted(int(counts.get(WRONG, 0)), 'wrong prediction')} and "
        f"{counted(int(counts.get(LEAST_CERTAIN, 0)), 'uncertain one')}. Fill in the column "
        f"{schema.REVIEWED_CLASS}, and read it back with --labels"
    )
    if others := len(rows) - len(shown):
        logger.info(f"{FIFTYONE}/ has local fields only: {counted(others, 'tile or remote file')} left out")


def _write_manifest(config: TriageConfig, images: pd.DataFrame, own: Lease) -> None:
    """All images whose class is known, from the data or from the person, who is believed."""
    given = sheet.read_sheet(str(config.labels), images[schema.IMAGE_ID])
    images, n_changed = images.set_index(schema.IMAGE_ID, drop=False), 0
    for name, (tumor_class, subtype) in given.items():
        before = images.at[name, schema.TUMOR_CLASS]
        # A class that is confirmed keeps its subtype.
        kept = images.at[name, schema.SUBTYPE] if before == tumor_class else None
        images.loc[name, [schema.TUMOR_CLASS, schema.SUBTYPE]] = [tumor_class, subtype or kept]
        n_changed += before is not None and before != tumor_class
    known = images[images[schema.TUMOR_CLASS].notna()]
    fields = known[known[schema.X_LEVEL0_PX].isna()]
    if fields.empty:
        raise DataError(
            f"{config.labels}: no field of view has a class; tiles of slides are no training data"
        )
    table = pa.Table.from_pandas(
        fields.assign(**{schema.URI: [storage.absolute(place) for place in fields[schema.URI]]}),
        schema.MANIFEST,
        preserve_index=False,
    )
    own.require()
    uri = storage.join(config.output, MANIFEST)
    storage.write_table(uri, table)
    logger.info(
        f"{uri}: {counted(len(table), 'image')}, {counted(len(given), 'label')} by the person, of which "
        f"{n_changed:,} differ from the data. Train on it with --data {uri}"
    )
    if tiles := len(known) - len(fields):
        logger.warning(
            f"{counted(tiles, 'label')} of tiles of slides left out: training reads fields of view"
        )
