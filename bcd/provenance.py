"""The code behind a result: versions, git commit, command."""

import platform
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("ray", "torch", "torchvision", "numpy", "pyarrow", "pillow", "kornia-rs", "simplejpeg")


def versions() -> dict[str, str]:
    """Versions of Python, `bcd`, and the packages that numbers depend on."""
    own = {"python": platform.python_version(), "bcd": own_version()}
    return own | {name: version(name) for name in PACKAGES}


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
    """The command line of this process."""
    return " ".join(["python", *sys.argv])
