"""The end of an archive job: heat maps of the slides, the gallery, and a summary that adds up."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import ray

from bcd import schema, storage
from bcd.errors import IncompleteError
from bcd.model import bundle
from bcd.reports import gallery, thumbnails
from bcd.reports.thumbnails import Example
from bcd.runtime import predict
from bcd.scoring import slides, tiling
from bcd.scoring.ledger import SUMMARY, Ledger
from bcd.text import counted

GALLERY = "gallery.html"
# Stores whose URIs are used as links.
LINKED = ("s3://", "gs://")
SHOWN_PER_ERROR = 5
OVERVIEW = [
    *(schema.IMAGE_ID, schema.URI, schema.SLIDE, schema.PATIENT, schema.X_LEVEL0_PX),
    *(schema.PROBABILITY_MALIGNANT, schema.PREDICTED_CLASS, schema.NOVELTY, schema.NOVELTY_CUTOFF),
    *(schema.WARNINGS, schema.ERROR, schema.ERROR_MESSAGE),
]


def present(
    ours: Ledger,
    plans: Sequence[tiling.Plan],
    inputs: Sequence[str],
    settings: predict.Settings,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write `slides.parquet`, the heat maps and `gallery.html`; returns the summary, which contains `facts`.

    `inputs` are the ids of all inputs, `plans` those of the slides scored in this generation.

    Raises:
        IncompleteError: results and errors do not add up to the inputs.
    """
    table = storage.dataset(ours.predictions_uri).to_table(OVERVIEW)
    failed = table.filter(pc.is_valid(table[schema.ERROR]))
    whole_inputs = failed.filter(pc.is_null(failed[schema.X_LEVEL0_PX]))
    broken = whole_inputs.filter(pc.equal(whole_inputs[schema.SLIDE], whole_inputs[schema.IMAGE_ID]))
    card = bundle.read_same(settings.model_uri, settings.model_id)
    described = slides.write_slides(ours, plans, broken, card)
    summary = dict(facts) | _counts(table, whole_inputs, described, inputs)
    summary |= {"errors": _by_code(failed), "warnings": _by_warning(table)}
    drawing = ray.remote(num_cpus=1, max_retries=-1)(_write_gallery)
    ray.get(drawing.remote(ours, table, described, card, summary))
    return summary


def _counts(
    table: pa.Table, failed_inputs: pa.Table, described: pa.Table, inputs: Sequence[str]
) -> dict[str, int]:
    tiles = pc.is_valid(table[schema.X_LEVEL0_PX])
    fields = table.filter(pc.invert(tiles))
    scored_slides = set(table.filter(tiles)[schema.SLIDE].to_pylist())
    n_errors = len(failed_inputs)
    n_results = len(fields) - n_errors + len(scored_slides)
    # Files removed from the archive keep their rows.
    n_inputs = len({*scored_slides, *fields[schema.IMAGE_ID].to_pylist(), *inputs})
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


def _write_gallery(
    ours: Ledger, table: pa.Table, described: pa.Table, card: bundle.Card, facts: Mapping[str, Any]
) -> None:
    results = table.filter(pc.is_valid(table[schema.PROBABILITY_MALIGNANT]))
    probabilities = results[schema.PROBABILITY_MALIGNANT].to_numpy()
    owners = [results[name].to_pandas().to_numpy(object) for name in (schema.SLIDE, schema.PATIENT)]
    unlike = results[schema.NOVELTY].to_numpy(), slides.warned(results)
    chosen = gallery.choose_groups(probabilities, card.threshold, gallery.PER_GROUP, *unlike, owners)
    described_slides = described.to_pylist()
    places = [i for group in chosen.values() for i in group]
    examples = _examples(ours, results.take(pa.array(places, pa.int64())), card.classes, described_slides)
    by_place = dict(zip(places, examples, strict=True))
    page = gallery.render_gallery(
        facts,
        probabilities,
        {name: [by_place[i] for i in group] for name, group in chosen.items()},
        _failures(table),
        _slides(ours, described_slides),
        (card.input_height_px, card.input_width_px),
        _images(ours, table),
    )
    storage.write_bytes(storage.join(ours.uri, GALLERY), page.encode())


def _examples(
    ours: Ledger, results: pa.Table, classes: Sequence[str], described: Sequence[Mapping[str, Any]]
) -> list[Example]:
    """Examples for the gallery from the whole rows, with maps, of these results."""
    ids = results[schema.IMAGE_ID].to_pylist()
    whole = storage.dataset(ours.predictions_uri).to_table(filter=pc.field(schema.IMAGE_ID).isin(ids))
    rows = {row[schema.IMAGE_ID]: row for row in whole.to_pylist()}
    mpp = {row[schema.SLIDE]: (row[schema.MPP], row[schema.MPP_Y]) for row in described}
    return [
        replace(
            thumbnails.example_of_row(rows[name], classes, mpp.get(rows[name][schema.SLIDE])),
            link=link(rows[name][schema.URI], ours.uri),
        )
        for name in ids
    ]


def _images(ours: Ledger, table: pa.Table) -> gallery.Images:
    """The images that are not slides, the most malignant first, and errors last."""
    slide = pc.equal(table[schema.SLIDE], table[schema.IMAGE_ID]).fill_null(False)
    fields = table.filter(pc.and_not(pc.is_null(table[schema.X_LEVEL0_PX]), slide))
    order = pc.sort_indices(
        fields, [(schema.PROBABILITY_MALIGNANT, "descending"), (schema.IMAGE_ID, "ascending")]
    )
    first = fields.take(order[: gallery.MAX_ROWS])
    rows = [
        gallery.GalleryRow(
            name=row[schema.IMAGE_ID],
            link=link(row[schema.URI], ours.uri),
            patient=row[schema.PATIENT],
            predicted_class=row[schema.PREDICTED_CLASS],
            probability_malignant=row[schema.PROBABILITY_MALIGNANT],
            novelty=row[schema.NOVELTY],
            warned=bool(row[schema.WARNINGS]),
            error=row[schema.ERROR],
        )
        for row in first.to_pylist()
    ]
    return gallery.Images(rows, len(fields))


def link(uri: str, folder: str) -> str | None:
    """Link from a page in a folder to a file: a relative path or a URI; None if it might be a script."""
    if storage.is_remote(uri):
        return quote(uri, safe=":/") if uri.lower().startswith(LINKED) else None
    path = storage.absolute(uri)
    if storage.is_remote(folder):
        return f"file://{quote(path)}"
    return quote(os.path.relpath(path, storage.absolute(folder)))


def _failures(table: pa.Table) -> dict[str, gallery.Failures]:
    failed = table.filter(pc.is_valid(table[schema.ERROR]))
    failures = {}
    for code, count in _by_code(failed).items():
        first = failed.filter(pc.equal(failed[schema.ERROR], code)).slice(0, SHOWN_PER_ERROR).to_pylist()
        named = [(row[schema.IMAGE_ID], row[schema.ERROR_MESSAGE]) for row in first]
        failures[code] = gallery.Failures(count, named)
    return failures


def _slides(ours: Ledger, rows: list[dict[str, Any]]) -> list[gallery.GallerySlide]:
    scored = [row[schema.SLIDE] for row in rows if row[schema.ERROR] is None]
    shown = set(scored[: gallery.MAX_SLIDES])
    return [_slide(ours, row, row[schema.SLIDE] in shown) for row in rows]


def _slide(ours: Ledger, row: dict[str, Any], shown: bool) -> gallery.GallerySlide:
    heat_map = storage.join(slides.folder(ours.uri, row[schema.SLIDE]), slides.HEATMAP)
    geojson = f"{slides.slide_folder(row[schema.SLIDE])}/{slides.GEOJSON}"
    return gallery.GallerySlide(
        name=row[schema.SLIDE],
        n_tiles=row[schema.TILES] or 0,
        tissue_mm2=row[schema.TISSUE_AREA_MM2],
        share_malignant=row[schema.MALIGNANT_TILE_SHARE],
        heat_map=storage.read_bytes(heat_map) if shown else None,
        geojson=geojson if row[schema.ERROR] is None else None,
        n_warned=row[schema.WARNED_TILES] or 0,
        patient=row[schema.PATIENT],
        link=link(row[schema.URI], ours.uri),
        error=row[schema.ERROR],
    )


def closing_lines(uri: str, summary: Mapping[str, Any]) -> list[str]:
    """The lines that the job prints at its end."""
    lines = [
        f"{counted(summary['n_inputs'], 'input')} = {counted(summary['n_results'], 'result')} + "
        f"{counted(summary['n_errors'], 'error')}; {counted(summary['n_rows'], 'row')}, "
        f"{summary['n_tiles']:,} of them tiles"
    ]
    lines += [f"  {code}: {count:,}" for code, count in sorted(summary["errors"].items())]
    warnings = summary[schema.WARNINGS]
    if warnings is None and summary["n_results"]:
        lines.append("  the model has no statistics to identify images unlike its training data")
    lines += [f"  warned of {code}: {counted(n, 'row')}" for code, n in sorted((warnings or {}).items())]
    files = {"table:  ": "predictions", "gallery:": GALLERY, "summary:": SUMMARY}
    return lines + [f"{name} {storage.join(uri, file)}" for name, file in files.items()]
