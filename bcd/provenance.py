"""The code behind a result: versions, git commit, command; and the documents that state it for a model."""

import platform
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

_STATED: ContextVar[str | None] = ContextVar("command", default=None)
PACKAGES = ("ray", "torch", "torchvision", "numpy", "pyarrow", "pillow", "kornia-rs", "simplejpeg")


# That they depend on where they are installed.
EXTRAS = ("timm", "openvino")


def versions() -> dict[str, str]:
    """Versions of Python, `bcd`, and the packages that numbers depend on."""
    found = {"python": platform.python_version(), "bcd": own_version()}
    found |= {name: version(name) for name in PACKAGES}
    for name in EXTRAS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def own_version() -> str:
    """Version of this code; from `pyproject.toml` where it runs from a job's uploaded working directory."""
    project = Path(__file__).parent.parent / "pyproject.toml"
    if project.exists():
        return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"]
    return version("bcd")


def git_commit() -> str | None:
    """Commit of this code, with `+` for uncommitted changes; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def command() -> str:
    """The command line of this process, as a shell takes it, or that of `stating`."""
    program = [*sys.argv[0].split()] if sys.argv[0].startswith("bcd ") else ["python", sys.argv[0]]
    return _STATED.get() or shlex.join([*program, *sys.argv[1:]])


@contextmanager
def stating(known: str) -> Iterator[None]:
    """Context in which `command` is this one: that of a function, or of the job that started this process."""
    token = _STATED.set(known)
    try:
        yield
    finally:
        _STATED.reset(token)


def bill_of_materials(file: str, sha256: str, when: datetime) -> dict[str, Any]:
    """The software bill of materials (CycloneDX 1.6) of a file with a model: every package that is installed
    here. Equal but for the time in equal environments."""
    model: dict[str, Any] = {"type": "machine-learning-model", "bom-ref": file, "name": file}
    model["hashes"] = [{"alg": "SHA-256", "content": sha256}]
    packages = {f"pkg:pypi/{name}@{quote(number)}": (name, number) for name, number in _installed().items()}
    components = [
        {"type": "library", "bom-ref": purl, "name": name, "version": number, "purl": purl}
        for purl, (name, number) in packages.items()
    ]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"timestamp": _stamp(when), "component": model},
        "components": components,
        "dependencies": [{"ref": file, "dependsOn": list(packages)}, *({"ref": purl} for purl in packages)],
    }


def statement(
    file: str,
    sha256: str,
    settings: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    commit: str | None,
    when: datetime,
    job: Literal["train", "import"] = "train",
) -> dict[str, Any]:
    """How a file with a model was made: an in-toto statement with SLSA provenance. Equal but for the time for
    equal arguments of equal commands in equal environments.

    Args:
        file: its name.
        sha256: of its content.
        settings: of the training; `data` is the URI of the training data, or a publisher's words for them.
        fingerprints: of the data and of their split, or of an imported file.
        commit: of the code, where known.
        when: the job ended.
        job: what made the file; an import converts weights that others trained.
    """
    data = {"name": settings["data"], "annotations": dict(fingerprints)}
    code = {"name": "bcd", "annotations": {"git_commit": commit or "unknown", "version": own_version()}}
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": file, "digest": {"sha256": sha256}}],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": {"train": "urn:bcd:training:1", "import": "urn:bcd:import:1"}[job],
                "externalParameters": {"command": command(), "settings": dict(settings)},
                "resolvedDependencies": [data, code],
            },
            "runDetails": {
                "builder": {"id": f"urn:bcd:{job}", "version": versions()},
                "metadata": {"finishedOn": _stamp(when)},
            },
        },
    }


@lru_cache(maxsize=1)
def _installed() -> dict[str, str]:
    """Versions of the installed packages, sorted by normal name; of two, that of the one that is imported."""
    found: dict[str, str] = {}
    for each in distributions():
        facts = each.metadata  # parsed at each access
        if name := facts["Name"]:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), facts["Version"])
    return dict(sorted(found.items()))


def _stamp(when: datetime) -> str:
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
