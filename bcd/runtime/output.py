"""An output folder belongs to one job: nothing in it is replaced or deleted that something else wrote.

The first job that writes into a folder requires it to be empty, and leaves a marker with its own name and an
id. From then on the folder is for jobs of that name, and only while every file in it is one that such a job
writes. Files that a job may delete carry the id in their names, so that a copy from elsewhere is not taken
for one of them. Hidden files and the notes of file managers are passed over, and never touched.
"""

import json
import re
import uuid

from bcd import provenance, storage
from bcd.errors import ConfigError

TRAIN, CROSSVAL, EVALUATE, SCORE, AUDIT, DEMO = "train", "crossval", "evaluate", "score", "audit", "demo"
MARKER = ".bcd-output.json"
# What file managers leave in folders that people look into, besides hidden files.
NOTES = ("Thumbs.db", "desktop.ini")
# A file that is being written, or that a kill left behind.
_ASIDE = rf"(\.[0-9a-f]+{re.escape(storage.ASIDE)})?"
_REPORT = r"metrics\.json|test_images\.parquet|report\.html|figures/[\w-]+\.(svg|png)|predictions/part-ID-.+"
_RUN = (
    r"(config|run|data|history)\.json|split\.parquet|exposure/epoch-\d+\.parquet"
    r"|(tensorboard|checkpoints)/.+|model/(model\.safetensors|card\.json|README\.md)"
)
_FOLD = r"(case|patient|official|image)"
# What each job writes, as a pattern of the path below its output; ID stands for the id in the marker.
FILES = {
    TRAIN: f"{_RUN}|{_REPORT}",
    CROSSVAL: rf"(config|run)\.json|({_FOLD}/)?({_REPORT})|{_FOLD}/repeat-\d+-fold-\d+/.+",
    EVALUATE: _REPORT,
    SCORE: r"(config|summary)\.json|(slides|inputs)\.parquet|gallery\.html"
    r"|slides/.+/(heatmap\.png|tiles\.geojson)|predictions/part-ID-.+"
    r"|work/\d{4}/(plans/)?[0-9a-f]{24}\.(parquet|json|png)",
    AUDIT: r"audit\.(html|json)|(images|near_duplicates)\.parquet",
    DEMO: r"(archive/)?BreaKHis_v1/(SYNTHETIC\.txt|histology_slides/.+\.png)|archive/cut short\.png"
    r"|(run|scores)/.+",
}


def claim_folder(uri: str, job: str) -> str:
    """Make an empty folder that of a job, or find that it is already; returns the id in its marker.

    Raises:
        ConfigError: see `read_marker`.
        StorageError: nothing can be written there.
    """
    if (found := read_marker(uri, job)) is not None:
        return found
    marker = {"job": job, "id": uuid.uuid4().hex[:12], "bcd_version": provenance.own_version()}
    storage.write_bytes(storage.join(uri, MARKER), json.dumps(marker, indent=2).encode())
    return marker["id"]


def read_marker(uri: str, job: str) -> str | None:
    """The id in the marker of a job's folder; None for one that is empty or not there.

    Args:
        uri: of the folder.
        job: its name, a key of `FILES`.

    Raises:
        ConfigError: another job wrote there, or it contains a file that no job like this wrote; names it.
        StorageError: the folder cannot be read.
    """
    job_there, found = _marker(uri)
    again = "choose another --output" + (" or --name" if job in (TRAIN, CROSSVAL) else "")
    if job_there not in (None, job):
        raise ConfigError(f"{uri} is the output of jobs/{job_there}.py; jobs/{job}.py needs its own: {again}")
    pattern = re.compile(f"({FILES[job].replace('ID', found or '')}){_ASIDE}") if found else None
    if strange := [path for path in _paths(uri) if not (pattern and pattern.fullmatch(path))]:
        more = f" (and {len(strange) - 1:,} other files)" if len(strange) > 1 else ""
        why = "which it did not write" if found else f"and no record ({MARKER}) that a job of bcd wrote it"
        raise ConfigError(
            f"{uri} contains {strange[0]}{more}, {why}: jobs/{job}.py writes into an empty folder or its own "
            f"earlier output, and changes nothing here. Move it away, or {again}"
        )
    return found


def owner(uri: str) -> str | None:
    """Which job a folder is the output of; None where the marker of none is there."""
    return _marker(uri)[0]


def _paths(uri: str) -> list[str]:
    paths = [file.path for file in storage.list_files_if_any(uri)]
    return [path for path in paths if path.rpartition("/")[2] not in NOTES]


def _marker(uri: str) -> tuple[str | None, str | None]:
    """Which job a folder belongs to, and its id; nothing where no job has written."""
    marker_uri = storage.join(uri, MARKER)
    if not storage.exists(marker_uri):
        return None, None
    try:
        marker = json.loads(storage.read_bytes(marker_uri))
        return str(marker["job"]), str(marker["id"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{marker_uri} is damaged ({error}); choose another --output") from error
