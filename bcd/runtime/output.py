"""An output folder belongs to one job, which never replaces or deletes a file that something else wrote.

The first job that writes into a folder requires it to be empty, and writes a marker with its own name and an
id. From then on only jobs of that name may use the folder, and only while every file in it is one that such a
job writes. Files that a job may delete carry the id in their names, so that copies from elsewhere are kept.
Hidden files and those of file managers are ignored, and never touched.
"""

import json
import re
import uuid
from collections.abc import Callable

from bcd import disk, provenance, storage
from bcd.errors import ConfigError
from bcd.model import bundle

TRAIN, CROSSVAL, EVALUATE, SCORE, AUDIT, DEMO = "train", "crossval", "evaluate", "score", "audit", "demo"
POOL, ABLATE, TUNE, TRIAGE = "pool", "ablate", "tune", "triage"
# No job, but what trainings and evaluations share.
PREPARED = "prepared"
MARKER = ".bcd-output.json"
# Written by file managers, besides hidden files.
NOTES = ("Thumbs.db", "desktop.ini")
# Suffix of a temporary file, which a killed job may leave behind.
_ASIDE = rf"(\.[0-9a-f]+{re.escape(disk.ASIDE)})?"
_REPORT = r"metrics\.json|test_images\.parquet|report\.html|figures/[\w-]+\.(svg|png)|predictions/part-ID-.+"
_MODEL = f"model/({'|'.join(map(re.escape, bundle.FILES))})"
_RUN = (
    r"(config|run|data|history|mlflow|stain)\.json|split\.parquet|exposure/epoch-\d+\.parquet"
    rf"|(tensorboard|checkpoints)/.+|{_MODEL}"
)
_FOLD = r"(case|patient|official|image)"
_SHARDS = r"\d+x\d+-v\d+/[0-9a-f]+-[0-9a-f]+\.(rgb|parquet)"
# What each job writes, as a pattern of the path below its output; ID is replaced by the id in the marker.
FILES = {
    TRAIN: f"{_RUN}|{_REPORT}",
    CROSSVAL: rf"(config|run|mlflow)\.json|({_FOLD}/)?({_REPORT})|{_FOLD}/repeat-\d+-fold-\d+/.+"
    rf"|ensemble/(split\.parquet|{_MODEL})|refit/.+",
    ABLATE: r"ablation\.(json|md)|[\w.-]+/.+",
    TUNE: r"(config|run|space|data|trials)\.json|split\.parquet|tuning\.html|(search|trials|best)/.+",
    EVALUATE: _REPORT,
    SCORE: r"(config|summary)\.json|(slides|inputs)\.parquet|gallery\.html"
    r"|slides/.+/(heatmap\.png|tissue\.(jpg|geojson)|tiles\.geojson(\.gz)?)|predictions/part-ID-.+"
    r"|work/\d{4}/(plans/)?[0-9a-f]{24}\.(parquet|json|(mask\.)?png)",
    POOL: r"(config|run|history|metrics)\.json|(split|slides|attention)\.parquet|slides/.+/attention\.png"
    r"|checkpoints/.+|model/(model\.safetensors|card\.json)",
    # With sheets that a person saves beside that of the job, which replaces none.
    TRIAGE: r"[^/]+\.(csv|tsv|xlsx|ods)|manifest\.parquet|fiftyone/(labels|data)\.json",
    AUDIT: r"audit\.(html|json)|(images|near_duplicates|identifiers)\.parquet",
    DEMO: r"(archive/)?BreaKHis_v1/(SYNTHETIC\.txt|histology_slides/.+\.png)|archive/cut short\.png"
    rf"|(run|scores)/.+|prepared/{_SHARDS}",
    PREPARED: _SHARDS,
}


def claim_folder(uri: str, job: str, before: Callable[[], None] = lambda: None) -> str:
    """Claim an empty folder for a job, or check an earlier claim (see `read_marker`); returns the id.
    `before` is called before the marker is written, and may raise."""
    if (found := read_marker(uri, job)) is not None:
        return found
    marker = {"job": job, "id": uuid.uuid4().hex[:12], "bcd_version": provenance.own_version()}
    before()
    storage.write_bytes(storage.join(uri, MARKER), json.dumps(marker, indent=2).encode())
    return marker["id"]


def read_marker(uri: str, job: str) -> str | None:
    """The id in the marker of a folder of `job`, a key of `FILES`; None if the folder is empty or missing.

    Raises:
        ConfigError: another job wrote there, or the folder contains a file that no such job wrote.
        StorageError: the folder cannot be read, or nothing is ever written there.
    """
    storage.require_writable(uri)
    job_there, found = _marker(uri)
    again = "choose another --prepared" if job == PREPARED else "choose another --output"
    again += " or --name" if job in (TRAIN, CROSSVAL, POOL, ABLATE, TUNE) else ""
    if job_there not in (None, job):
        raise ConfigError(f"{uri} belongs to {_writer(job_there)}; {_writer(job)} needs its own: {again}")
    pattern = re.compile(f"({FILES[job].replace('ID', found or '')}){_ASIDE}") if found else None
    paths = [file.path for file in storage.list_files_if_any(uri)]
    paths = [path for path in paths if path.rpartition("/")[2] not in NOTES]
    if foreign := [path for path in paths if not (pattern and pattern.fullmatch(path))]:
        more = f" (and {len(foreign) - 1:,} other files)" if len(foreign) > 1 else ""
        why = "which it did not write" if found else f"and no record ({MARKER}) that a job of bcd wrote it"
        raise ConfigError(
            f"{uri} contains {foreign[0]}{more}, {why}: {_writer(job)} writes into an empty folder or its "
            f"own earlier output, and changes nothing here. Move it away, or {again}"
        )
    return found


def _writer(job: str) -> str:
    return "a store of prepared images" if job == PREPARED else f"jobs/{job}.py"


def owner(uri: str) -> str | None:
    """The job that a folder is the output of; None without a marker."""
    return _marker(uri)[0]


def _marker(uri: str) -> tuple[str | None, str | None]:
    """The job and the id in the marker of a folder; None for both without a marker."""
    marker_uri = storage.join(uri, MARKER)
    if not storage.exists(marker_uri):
        return None, None
    try:
        marker = json.loads(storage.read_bytes(marker_uri))
        return str(marker["job"]), str(marker["id"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{marker_uri} is damaged ({error}); choose another --output") from error
