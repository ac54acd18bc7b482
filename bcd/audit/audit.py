"""The audit job: list a data set, read every image once on CPU workers, and write the findings."""

import hashlib
import logging
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple
from typing import Any

import pyarrow as pa
import ray

from bcd import lease, provenance, schema, storage
from bcd.audit import identifiers, report, summary
from bcd.audit.identifiers import Identifier
from bcd.config.checks import AuditConfig
from bcd.data import archive, breakhis, index, manifest, read, synthetic
from bcd.errors import AuditError, DataError, StorageError
from bcd.imaging import appearance, image
from bcd.runtime import cluster, inspection, output
from bcd.split import duplicates

logger = logging.getLogger(__name__)

PAGE, RESULT, IMAGES, NEAR = "audit.html", "audit.json", "images.parquet", "near_duplicates.parquet"
IDENTIFIERS = "identifiers.parquet"
# Column of the rows that workers return: what may identify a patient in the metadata of a file.
_FOUND = pa.field("identifiers", pa.list_(pa.struct(list(schema.IDENTIFIERS))))


def run(config: AuditConfig) -> summary.Audit:
    """Audit a data set, write the result, and print it.

    Raises:
        AuditError: a given split leaks; the audit has been written.
        BcdError: the data or a split cannot be read.
    """
    table, warnings = _listed(config)
    splits = [summary.place_rows(table, roles, name) for name, roles in _given(config).items()]
    if schema.PART in table.column_names:
        splits.append(summary.Split("the data's own split", table[schema.PART].to_pylist(), 0))
    output.read_marker(config.output, output.AUDIT)
    with lease.held(config.output, config.wait):
        result = _audited(config, table, warnings, splits)
    for line in report.audit_lines(result):
        logger.info(line)
    for name in (PAGE, RESULT, IMAGES, NEAR, IDENTIFIERS):
        logger.info(storage.join(config.output, name))
    if result.leaking_splits:
        raise AuditError(f"{', '.join(result.leaking_splits)}: a patient, slide or image is in several parts")
    return result


def _listed(config: AuditConfig) -> tuple[pa.Table, list[str]]:
    """The rows of the data set, or of any archive, and warnings."""
    if config.identifiers_only:
        return schema.fill(archive.list_inputs(config.data).table, schema.INDEX), []
    return index.read_index(config.data, config.classes)


def _audited(
    config: AuditConfig, table: pa.Table, warnings: list[str], splits: list[summary.Split]
) -> summary.Audit:
    """Read the images, and write what was found."""
    found = list(_in_names(config, table))
    if config.pixels:
        cluster.connect()
        if len(others := _others(config, table)):
            found += _identifiers(inspection.checked(others, _described_others))
        if not config.identifiers_only:
            table = inspection.checked(table, _describe)
            found += _identifiers(table)
    table = schema.fill(table, schema.AUDIT)
    pairs = duplicates.near(table, config.near_bits, duplicates.BLANK)
    counts = breakhis.count_warnings(table)
    doubts = [text for text in warnings if text not in counts]
    missing = [text for text in warnings if text in counts]
    result = summary.summarise(table, missing, splits, pairs, config.outlier_z, doubts, found)
    if config.identifiers_only:
        result = summary.identifiers_only(result)
    _write(config, result, table, pairs, found)
    return result


def _in_names(config: AuditConfig, table: pa.Table) -> Iterator[Identifier]:
    """What may identify a patient in names of files and folders, and in ids."""
    names = table[schema.IMAGE_ID].to_pylist()
    paths = [storage.absolute(config.data).rpartition("/")[2], *names]
    if manifest.is_one(config.data):  # where an image has an id of its own
        paths += ["/".join(uri.split("/")[-2:]) for uri in table[schema.URI].to_pylist()]
    elif storage.is_folder(config.data):
        paths += [file.path for file in storage.list_folder(config.data).files]
    yield from identifiers.in_names(paths)
    for column in (schema.PATIENT, schema.CASE, schema.SLIDE):
        yield from identifiers.in_ids(column, table[column].to_pylist(), names)


def _others(config: AuditConfig, table: pa.Table) -> pa.Table:
    """The files with metadata that `_describe` does not read: slides beside the images, or all files."""
    known = set() if config.identifiers_only else set(table[schema.URI].to_pylist())
    places = dict(zip(table[schema.URI].to_pylist(), table[schema.IMAGE_ID].to_pylist(), strict=True))
    if not manifest.is_one(config.data) and storage.is_folder(config.data):
        listed = storage.list_folder(config.data).files
        places = {file.uri: file.path for file in listed if identifiers.has_metadata(file.path)}
    rows = [{schema.IMAGE_ID: name, schema.URI: uri} for uri, name in places.items() if uri not in known]
    return pa.Table.from_pylist(rows, schema=schema.INDEX)


def _described_others(batch: pa.Table) -> pa.Table:
    """The batch with what may identify a patient."""
    rows = zip(batch[schema.IMAGE_ID].to_pylist(), batch[schema.URI].to_pylist(), strict=True)
    with ThreadPoolExecutor(storage.READ_THREADS) as pool:
        found = list(pool.map(lambda row: _stated(*row), rows))
    errors = pa.array([None if isinstance(one, list) else one for one in found], pa.string())
    packed = pa.array([one if isinstance(one, list) else [] for one in found], _FOUND.type)
    return batch.append_column(schema.ERROR, errors).append_column(_FOUND, packed)


def _stated(name: str, uri: str) -> list[dict[str, str]] | str:
    """What may identify a patient in a file, or the code of a transient error."""
    try:
        return _packed(identifiers.in_stored(name, uri))
    except StorageError:
        return image.UNAVAILABLE


def _packed(found: Sequence[Identifier]) -> list[dict[str, str]]:
    return [dict(zip(schema.IDENTIFIERS.names, astuple(one)[:-1], strict=True)) for one in found]


def _identifiers(described: pa.Table) -> Iterator[Identifier]:
    for row in described[_FOUND.name].to_pylist():
        yield from (Identifier(*one.values()) for one in row)


def _given(config: AuditConfig) -> dict[str, dict[str, str]]:
    """Part by image, of every given split."""
    given = {}
    if config.folds is not None:
        listed = storage.list_files(config.folds)
        files = [file for file in listed if re.fullmatch(r"dsfold[1-5]\.txt", file.path)]
        if not files:
            raise DataError(f"{config.folds}: expected dsfold1.txt to dsfold5.txt, or some of them")
        for file in files:
            text = storage.read_bytes(file.uri).decode(errors="replace")
            given[f"fold {file.path[6]}"] = breakhis.read_fold(text, file.path)
    if config.split is not None:
        name = config.split.rpartition("/")[2]
        given[name] = summary.read_roles(manifest.read_manifest(config.split))
    return given


def _describe(batch: pa.Table) -> pa.Table:
    """The batch with schema `schema.AUDIT`."""
    rows = batch.to_pylist()
    contents = read.contents(batch[schema.URI].to_pylist())
    described = [row | _described(row, content) for row, content in zip(rows, contents, strict=True)]
    return pa.Table.from_pylist(described, schema=schema.AUDIT.append(_FOUND))


def _described(row: dict[str, Any], content: bytes | image.ImageError) -> dict[str, Any]:
    known: dict[str, Any] = {_FOUND.name: []}
    if isinstance(content, bytes):
        found = identifiers.in_content(row[schema.IMAGE_ID], content)
        known = {schema.SHA256: hashlib.sha256(content).hexdigest(), _FOUND.name: _packed(found)}
    elif content.code == "too_large" and isinstance(
        stated := _stated(row[schema.IMAGE_ID], row[schema.URI]), list
    ):
        known = {_FOUND.name: stated}
    try:
        return known | appearance.measure_appearance(read.picture(row, content=content))
    except image.ImageError as error:
        return known | {schema.ERROR: error.code, schema.ERROR_MESSAGE: error.message}


def _write(
    config: AuditConfig, result: summary.Audit, table: pa.Table, pairs: Any, found: Sequence[Identifier]
) -> None:
    output.claim_folder(config.output, output.AUDIT)
    named = pa.Table.from_pylist(_packed(found), schema=schema.IDENTIFIERS)
    for name, rows in {IMAGES: table, NEAR: duplicates.named(table, pairs), IDENTIFIERS: named}.items():
        storage.write_table(storage.join(config.output, name), rows)
    storage.write_bytes(storage.join(config.output, RESULT), result.model_dump_json(indent=1).encode())
    uris = dict(zip(table[schema.IMAGE_ID].to_pylist(), table[schema.URI].to_pylist(), strict=True))
    shown = {name: uris[name] for name in report.shown(result)}
    facts = config.model_dump() | {
        "bcd_version": provenance.own_version(),
        "git_commit": provenance.git_commit(),
        "synthetic": storage.exists(storage.join(config.data, synthetic.MARKER)),
    }
    page = storage.join(config.output, PAGE), result, shown, facts
    if shown:  # the few images of the page are read by a worker, never by the driver
        ray.get(ray.remote(num_cpus=1, max_retries=-1)(_write_page).remote(*page))
    else:
        _write_page(*page)


def _write_page(uri: str, result: summary.Audit, shown: dict[str, str], facts: dict[str, Any]) -> None:
    """Write the page; of `shown`, URIs by image id, those that can no longer be read are skipped."""
    thumbnails = {}
    for name, content in zip(shown, read.contents(list(shown.values())), strict=True):
        with suppress(image.ImageError):
            thumbnails[name] = report.thumbnail(read.picture({}, content=content))
    storage.write_bytes(uri, report.render_audit(result, thumbnails, facts).encode())
