"""What `--working-dir .` sends to a cluster, packed by Ray's own code."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from bcd import provenance

ROOT = Path(__file__).parent.parent.parent
MOST_BYTES = 5 * 10**6
# Things that lie in people's checkouts, under names that nobody foresees.
LITTER = (
    ".venv/lib/python3.12/site-packages/torch/libtorch.so",
    "env312/lib/libcuda.so",
    ".env",
    "runs/train/model/model.safetensors",
    "audit/images.parquet",
    "demo/BreaKHis_v1/benign/a.png",
    "data/BreaKHis_v1.tar.gz",
    "docs/report.png",
    "tests/leftover.npy",
    ".pytest_cache/v/x",
    "bcd.egg-info/PKG-INFO",
    "resnet50.pth",
    "x",
    "bcd/pipelines/__pycache__/read.cpython-312.pyc",
)
CODE = ("bcd/config.py", "bcd/serving/page/index.html", "jobs/train.py", "pyproject.toml")


def pack(folder: Path, target: Path, **settings: object) -> list[str]:
    """Names in the package that `ray job submit --working-dir FOLDER` would upload."""
    settings = {"include_gitignore": True, "excludes": get_runtime_env_default_excludes()} | settings
    create_package(str(folder), target, **settings)
    return sorted(zipfile.ZipFile(target).namelist())


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of this checkout."""
    target = tmp_path_factory.mktemp("package") / "package.zip"
    pack(ROOT, target)
    return target


def test_this_checkout_is_sent_as_less_than_5_mb_of_code(package: Path) -> None:
    assert package.stat().st_size < MOST_BYTES
    names = zipfile.ZipFile(package).namelist()
    assert {name.split("/")[0] for name in names} == {"bcd", "jobs", "pyproject.toml"}
    assert not [name for name in names if "__pycache__" in name]
    for folder in ("bcd", "jobs"):
        there = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert {name for name in there if "__pycache__" not in name} <= set(names)


# The .rayignore holds alone, too: without .gitignore, and without what Ray leaves out by itself.
@pytest.mark.parametrize("settings", [{}, {"include_gitignore": False, "excludes": []}])
def test_whatever_else_lies_in_a_checkout_stays_there(tmp_path: Path, settings: dict[str, object]) -> None:
    folder = tmp_path / "checkout"
    for name in CODE + LITTER:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"1")
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    assert pack(folder, tmp_path / "package.zip", **settings) == sorted(CODE)


@pytest.mark.process
def test_the_jobs_run_from_what_was_sent(package: Path, tmp_path: Path) -> None:
    """As Ray runs them: unpacked, as the working directory, and first in PYTHONPATH."""
    zipfile.ZipFile(package).extractall(tmp_path)
    code = "import bcd, bcd.provenance as p; print(bcd.__file__, p.own_version())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for command in (["jobs/score.py", "--help"], ["-c", code]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout.split() == [str(tmp_path / "bcd/__init__.py"), provenance.own_version()]
