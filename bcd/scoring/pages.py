"""The gallery of an archive: examples, slides, images and failures, collected from the merged table."""

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema, storage
from bcd.model.card import Card
from bcd.reports import gallery, thumbnails
from bcd.reports.thumbnails import Example
from bcd.scoring import ledger, slides
from bcd.scoring.ledger import GALLERY, Ledger

# Stores whose URIs are used as links.
LINKED = ("s3://", "gs://")
SHOWN_PER_ERROR = 5


def write_gallery(
    ours: Ledger,
    table: pa.Table,
    described: pa.Table,
    card: Card,
    facts: Mapping[str, Any],
    places: pa.Table | None = None,
) -> None:
    """Collect from the merged table what the gallery shows, and write it.

    `places` are the URIs of inputs by id where the table does not contain them; then the page has no links.
    """
    results = table.filter(pc.is_valid(table[schema.PROBABILITY_MALIGNANT]))
    probabilities = results[schema.PROBABILITY_MALIGNANT].to_numpy()
    owners = [results[name].to_pandas().to_numpy(object) for name in (schema.SLIDE, schema.PATIENT)]
    unlike = results[schema.NOVELTY].to_numpy(), slides.warned(results)
    chosen = gallery.choose_groups(probabilities, card.threshold, gallery.PER_GROUP, *unlike, owners)
    described_slides = described.to_pylist()
    positions = [i for group in chosen.values() for i in group]
    shown = results.take(pa.array(positions, pa.int64()))
    examples = _examples(ours, shown, card.classes, described_slides, places)
    by_position = dict(zip(positions, examples, strict=True))
    page = gallery.render_gallery(
        facts,
        probabilities,
        {name: [by_position[i] for i in group] for name, group in chosen.items()},
        _failures(table),
        _slides(ours, described_slides, places is None),
        card.input_size_px,
        _images(ours, table, places is None),
    )
    storage.write_bytes(storage.join(ours.uri, GALLERY), page.encode())


def _examples(
    ours: Ledger,
    results: pa.Table,
    classes: Sequence[str],
    described: Sequence[Mapping[str, Any]],
    places: pa.Table | None,
) -> list[Example]:
    """Examples for the gallery from the whole rows, with maps, of these results."""
    ids = results[schema.IMAGE_ID].to_pylist()
    # Of a list without values, as in an archive of errors only, Arrow would not know the type.
    wanted = pc.field(schema.IMAGE_ID).isin(pa.array(ids, pa.string()))
    whole = storage.dataset(ours.predictions_uri).to_table(filter=wanted)
    rows = {row[schema.IMAGE_ID]: row for row in _placed(whole.to_pylist(), places)}
    mpp = {row[schema.SLIDE]: (row[schema.MPP], row[schema.MPP_Y]) for row in described}
    return [
        replace(
            thumbnails.example_of_row(rows[name], classes, mpp.get(rows[name][schema.SLIDE])),
            link=link(rows[name][schema.URI], ours.uri) if places is None else None,
        )
        for name in ids
    ]


def _placed(rows: list[dict[str, Any]], places: pa.Table | None) -> list[dict[str, Any]]:
    """The rows with the URIs of their inputs, as far as they are still there."""
    if places is None:
        return rows
    wanted = pa.array([row[schema.URI] for row in rows], pa.string())  # the id of the input
    known = places.filter(pc.is_in(places[schema.IMAGE_ID], wanted))
    uris = dict(zip(known[schema.IMAGE_ID].to_pylist(), known[schema.URI].to_pylist(), strict=True))
    return [row | {schema.URI: uris.get(row[schema.URI], row[schema.URI])} for row in rows]


def _images(ours: Ledger, table: pa.Table, linked: bool = True) -> gallery.Images:
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
            link=link(row[schema.URI], ours.uri) if linked else None,
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
    """Link from a page in a folder to a file: a relative path or a URI; None if it might be a script, or a
    path on one machine in a page that is elsewhere."""
    if storage.is_remote(uri):
        return quote(uri, safe=":/") if uri.lower().startswith(LINKED) else None
    if storage.is_remote(folder):
        return None
    return quote(os.path.relpath(storage.absolute(uri), storage.absolute(folder)))


def _failures(table: pa.Table) -> dict[str, gallery.Failures]:
    failed = table.filter(pc.is_valid(table[schema.ERROR]))
    failures = {}
    for code, count in Counter(failed[schema.ERROR].to_pylist()).items():
        first = failed.filter(pc.equal(failed[schema.ERROR], code)).slice(0, SHOWN_PER_ERROR).to_pylist()
        named = [(row[schema.IMAGE_ID], row[schema.ERROR_MESSAGE]) for row in first]
        failures[code] = gallery.Failures(count, named)
    return failures


def _slides(ours: Ledger, rows: list[dict[str, Any]], linked: bool = True) -> list[gallery.GallerySlide]:
    scored = [row[schema.SLIDE] for row in rows if row[schema.ERROR] is None]
    shown = set(scored[: gallery.MAX_SLIDES])
    written = storage.list_files_if_any(storage.join(ours.uri, ledger.FOLDER))
    old = {f"{ledger.FOLDER}/{file.path}" for file in written if file.path.endswith(slides.OLD_GEOJSON)}
    return [_slide(ours, row, row[schema.SLIDE] in shown, linked, old) for row in rows]


def _slide(
    ours: Ledger, row: dict[str, Any], shown: bool, linked: bool, old: Collection[str]
) -> gallery.GallerySlide:
    here = ledger.slide_folder(row[schema.SLIDE])
    heat_map, outlined = (storage.join(ours.uri, here, name) for name in (ledger.HEATMAP, slides.OUTLINES))
    # Slides that an older version scored have no outlines.
    is_outlined = row[schema.OUTSIDE_TILES] is not None
    geojson = f"{here}/{slides.OLD_GEOJSON if f'{here}/{slides.OLD_GEOJSON}' in old else ledger.GEOJSON}"
    ends = [row[name] for name in (schema.TOP_PROBABILITY_LOW, schema.TOP_PROBABILITY_HIGH)]
    return gallery.GallerySlide(
        name=row[schema.SLIDE],
        n_tiles=row[schema.TILES] or 0,
        tissue_mm2=row[schema.TISSUE_AREA_MM2],
        share_malignant=row[schema.MALIGNANT_TILE_SHARE],
        heat_map=storage.read_bytes(heat_map) if shown else None,
        geojson=geojson if row[schema.ERROR] is None else None,
        n_warned=row[schema.WARNED_TILES],
        patient=row[schema.PATIENT],
        link=link(row[schema.URI], ours.uri) if linked else None,
        error=row[schema.ERROR],
        outlined=storage.read_bytes(outlined) if shown and is_outlined else None,
        tissue_geojson=f"{here}/{slides.TISSUE}" if is_outlined else None,
        n_outside=row[schema.OUTSIDE_TILES] or 0,
        n_top=row[schema.TOP_TILES] or 0,
        top=row[schema.TOP_PROBABILITY],
        top_interval=None if None in ends else ends,
        n_errors=row[schema.ERROR_TILES] or 0,
    )
