"""The end of an archive job: heat maps of the slides, the gallery, and a summary that adds up."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from bcd import schema, storage
from bcd.errors import IncompleteError
from bcd.metrics.drift import stain
from bcd.model.card import Card
from bcd.runtime import predict
from bcd.scoring import slides, tiling
from bcd.scoring.ledger import GALLERY, SUMMARY, Ledger
from bcd.text import counted, duration

OVERVIEW = [
    *(schema.IMAGE_ID, schema.URI, schema.SLIDE, schema.PATIENT, schema.X_LEVEL0_PX),
    *(schema.PROBABILITY_MALIGNANT, schema.PREDICTED_CLASS, schema.NOVELTY, schema.NOVELTY_CUTOFF),
    *(schema.WARNINGS, *schema.STAIN, schema.ERROR, schema.ERROR_MESSAGE),
]
# Of the summary.
STAIN_DRIFT = "stain_drift"


def present(
    ours: Ledger,
    plans: Sequence[tiling.Plan],
    inputs: pa.ChunkedArray,
    settings: predict.Settings,
    facts: Mapping[str, Any],
    places: pa.Table | None = None,
) -> dict[str, Any]:
    """Write `slides.parquet`, the heat maps and `gallery.html`; returns the summary, which contains `facts`.

    `inputs` are the ids of all inputs, `plans` those of the slides scored in this generation; `places` their
    URIs where the table does not contain them.

    Raises:
        IncompleteError: results and errors do not add up to the inputs.
    """
    merged = storage.dataset(ours.predictions_uri)
    # The stain is not in tables that an older version began.
    table = merged.to_table([name for name in OVERVIEW if name in merged.schema.names])
    failed = table.filter(pc.is_valid(table[schema.ERROR]))
    whole_inputs = failed.filter(pc.is_null(failed[schema.X_LEVEL0_PX]))
    broken = whole_inputs.filter(pc.equal(whole_inputs[schema.SLIDE], whole_inputs[schema.IMAGE_ID]))
    card = predict.read_card_of(settings)
    described = slides.write_slides(ours, plans, broken, card)
    summary = dict(facts) | _counts(table, whole_inputs, described, inputs)
    summary |= {"errors": _by_code(failed), "warnings": _by_warning(table)}
    summary[STAIN_DRIFT] = _stain_drift(table, card)
    drawing = ray.remote(num_cpus=1, max_retries=-1)(_write_gallery)
    ray.get(drawing.remote(ours, table, described, card, summary, places))
    return summary


def _counts(
    table: pa.Table, failed_inputs: pa.Table, described: pa.Table, inputs: pa.ChunkedArray
) -> dict[str, int]:
    tiles = pc.is_valid(table[schema.X_LEVEL0_PX])
    fields = table.filter(pc.invert(tiles))
    scored_slides = table.filter(tiles)[schema.SLIDE].unique()
    n_errors = len(failed_inputs)
    n_results = len(fields) - n_errors + len(scored_slides)
    # Files removed from the archive keep their rows.
    names = [scored_slides, fields[schema.IMAGE_ID].combine_chunks(), inputs.combine_chunks()]
    n_inputs = len(pa.chunked_array(names, pa.string()).unique())
    if n_inputs != n_results + n_errors:
        raise IncompleteError(f"{n_inputs:,} inputs, but {n_results:,} results and {n_errors:,} errors")
    return {
        "n_inputs": n_inputs,
        "n_results": n_results,
        "n_errors": n_errors,
        "n_rows": len(table),
        "n_slides": len(described),
        "n_images": n_inputs - len(described),
        "n_tiles": pc.sum(tiles).as_py() or 0,
    }


def _by_code(failed: pa.Table) -> dict[str, int]:
    rows = failed.group_by(schema.ERROR).aggregate([([], "count_all")]).to_pylist()
    return {row[schema.ERROR]: row["count_all"] for row in rows}


def _by_warning(table: pa.Table) -> dict[str, int] | None:
    """Results by the code of their warning; None if the model has no statistics to warn by."""
    if not pc.any(pc.is_valid(table[schema.NOVELTY_CUTOFF])).as_py():
        return None
    rows = pc.value_counts(pc.list_flatten(table[schema.WARNINGS])).to_pylist()
    return {row["values"]: row["counts"] for row in rows}


def _stain_drift(table: pa.Table, card: Card) -> dict[str, Any]:
    """`stain.measure_drift` of the rows that have a stain."""
    training = card.feature_statistics.stain if card.feature_statistics else None
    if schema.STAIN[0] not in table.column_names:
        return stain.measure_drift([], np.zeros((0, len(schema.STAIN))), training)
    measured = table.filter(pc.is_valid(table[schema.STAIN[0]]))
    names = (measured[name].to_pylist() for name in (schema.PATIENT, schema.SLIDE, schema.IMAGE_ID))
    owners = [stain.observation_of(*name) for name in zip(*names, strict=True)]
    numbers = np.stack([measured[name].to_numpy() for name in schema.STAIN], axis=1)
    return stain.measure_drift(owners, numbers, training)


def _write_gallery(
    ours: Ledger,
    table: pa.Table,
    described: pa.Table,
    card: Card,
    facts: Mapping[str, Any],
    places: pa.Table | None,
) -> None:
    # Not at the top: the job itself does without the libraries that draw.
    from bcd.scoring import pages

    pages.write_gallery(ours, table, described, card, facts, places)


def closing_lines(uri: str, summary: Mapping[str, Any]) -> list[str]:
    """The lines that the job prints at its end."""
    lines = [
        f"{counted(summary['n_inputs'], 'input')} = {counted(summary['n_results'], 'result')} + "
        f"{counted(summary['n_errors'], 'error')}; {counted(summary['n_rows'], 'row')}, "
        f"{summary['n_tiles']:,} of them tiles"
    ]
    if summary.get("first_row_s") is not None:
        lines.append(
            f"first rows after {duration(summary['first_row_s'])}, all after {duration(summary['seconds'])}"
        )
    if summary.get("rows_per_s"):
        headspace = "not measured" if summary["headspace"] is None else f"{summary['headspace']:.2f}"
        images = f", images from {summary['images_from']}" if summary["images_from"] else ""
        lines.append(f"{summary['rows_per_s']:.1f} rows/s (headspace {headspace}{images})")
    lines += [f"  {code}: {count:,}" for code, count in sorted(summary["errors"].items())]
    warnings = summary[schema.WARNINGS]
    if warnings is None and summary["n_results"]:
        lines.append("  the model has no statistics to identify images unlike its training data")
    lines += [f"  warned of {code}: {counted(n, 'row')}" for code, n in sorted((warnings or {}).items())]
    if drift := summary.get(STAIN_DRIFT):
        lines.append(f"  {'warning: ' if drift['is_found'] else ''}{drift['sentence']}")
    files = {"table:  ": "predictions", "gallery:": GALLERY, "summary:": SUMMARY}
    return lines + [f"{name} {storage.join(uri, file)}" for name, file in files.items()]
