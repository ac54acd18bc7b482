"""The lines of a dry run that all jobs share."""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from bcd import schema, storage
from bcd.imaging import prepared
from bcd.imaging.prepared import Store
from bcd.model.card import Card
from bcd.preflight.dry_run.measure import Read
from bcd.taxonomy import TUMOR_CLASSES
from bcd.text import counted, size

logger = logging.getLogger(__name__)

FIRST = "dry run: nothing is written, and no Ray is started"
UNREAD = "broken images and duplicates, which are left out, are found when every image is read: not here"


def show(lines: Sequence[str]) -> list[str]:
    """Log the lines, and return them."""
    for line in (FIRST, *lines):
        logger.info(line)
    return [*lines]


def described_rows(table: pa.Table) -> str:
    """`7,909 images, 3.9 GiB; benign 2,480 of 24 patients, malignant 5,429 of 58 patients`."""
    parts = []
    for name in TUMOR_CLASSES:
        rows = table.filter(pc.equal(table[schema.TUMOR_CLASS], name))
        patients = rows[schema.PATIENT]
        of = "unknown patients" if patients.null_count else counted(len(patients.unique()), "patient")
        parts.append(f"{name} {len(rows):,} of {of}")
    return f"{counted(len(table), 'image')}, {size(n_bytes(table))}; {', '.join(parts)}"


def n_bytes(table: pa.Table) -> int:
    """Bytes of the files of rows, as far as they are known."""
    return int(pc.sum(table[schema.SIZE_BYTES]).as_py() or 0)


def free_space(uri: str) -> str:
    """`free space for runs: 120 GiB`."""
    if storage.is_remote(uri):
        return f"free space for {uri}: that of its store"
    folder = Path(storage.absolute(uri))
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return f"free space for {uri}: {size(shutil.disk_usage(existing).free)}"


def prepared_images(store: Store | None, n_images: int) -> str:
    """Where decoded images would be kept, and how many are there."""
    if store is None:
        return "prepared images: none, every file is decoded in every epoch"
    there = len(prepared.list_images(store)[0])
    n_new = max(0, n_images - there)
    room = "" if store.has_room(n_new) else "; too little space is left, so that none would be prepared"
    needed = size(n_new * store.image_bytes)
    return f"prepared images: {counted(there, 'image')} in {store.folder}, {needed} more to write{room}"


def of_sample(sample: Read) -> str:
    """`from 8 images`, and which errors some of them have."""
    kinds = ", ".join(sample.errors)
    broken = f" ({counted(len(sample.errors), 'broken one', 'broken ones')}: {kinds})" if kinds else ""
    return f"from {counted(len(sample.images), 'image')}{broken}"


def model_line(card: Card, batch_size: int) -> str:
    """The network of a bundle, its input and its classes."""
    shape = f"{card.input_height_px}x{card.input_width_px} px"
    names = ", ".join(card.classes)
    return f"{card.architecture}: input {shape}, batches of {batch_size}; classes {names}"
