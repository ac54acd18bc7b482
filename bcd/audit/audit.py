"""The audit job: list a data set, read every image once on CPU workers, and write the findings."""

import hashlib
import logging
import re
from contextlib import suppress
from typing import Any

import pyarrow as pa
import ray

from bcd import lease, provenance, schema, storage
from bcd.audit import report, summary
from bcd.config.checks import AuditConfig
from bcd.data import breakhis, index, manifest, read, synthetic
from bcd.errors import AuditError, DataError
from bcd.imaging import appearance, image
from bcd.runtime import cluster, inspection, output
from bcd.split import duplicates

logger = logging.getLogger(__name__)

PAGE, RESULT, IMAGES, NEAR = "audit.html", "audit.json", "images.parquet", "near_duplicates.parquet"


def run(config: AuditConfig) -> summary.Audit:
    """Audit a data set, write the result, and print it.

    Raises:
        AuditError: a given split leaks; the audit has been written.
        BcdError: the data or a split cannot be read.
    """
    table, warnings = index.read_index(config.data, config.classes)
    splits = [summary.place_rows(table, roles, name) for name, roles in _given(config).items()]
    if schema.PART in table.column_names:
        splits.append(summary.Split("the data's own split", table[schema.PART].to_pylist(), 0))
    output.read_marker(config.output, output.AUDIT)
    with lease.held(config.output, config.wait):
        result = _audited(config, table, warnings, splits)
    for line in report.audit_lines(result):
        logger.info(line)
    for name in (PAGE, RESULT, IMAGES, NEAR):
        logger.info(storage.join(config.output, name))
    if result.leaking_splits:
        raise AuditError(f"{', '.join(result.leaking_splits)}: a patient, slide or image is in several parts")
    return result


def _audited(
    config: AuditConfig, table: pa.Table, warnings: list[str], splits: list[summary.Split]
) -> summary.Audit:
    """Read the images, and write what was found."""
    if config.pixels:
        cluster.connect()
        table = inspection.checked(table, _describe)
    table = schema.fill(table, schema.AUDIT)
    pairs = duplicates.near(table, config.near_bits, duplicates.BLANK)
    counts = breakhis.count_warnings(table)
    doubts = [text for text in warnings if text not in counts]
    missing = [text for text in warnings if text in counts]
    result = summary.summarise(table, missing, splits, pairs, config.outlier_z, doubts)
    _write(config, result, table, pairs)
    return result


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
    return pa.Table.from_pylist(described, schema=schema.AUDIT)


def _described(row: dict[str, Any], content: bytes | image.ImageError) -> dict[str, Any]:
    known = {schema.SHA256: hashlib.sha256(content).hexdigest()} if isinstance(content, bytes) else {}
    try:
        return known | appearance.measure_appearance(read.picture(row, content=content))
    except image.ImageError as error:
        return known | {schema.ERROR: error.code, schema.ERROR_MESSAGE: error.message}


def _write(config: AuditConfig, result: summary.Audit, table: pa.Table, pairs: Any) -> None:
    output.claim_folder(config.output, output.AUDIT)
    for name, rows in {IMAGES: table, NEAR: duplicates.named(table, pairs)}.items():
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
