"""What a dry run writes, seen by Python's own audit events, and by the folders before and after."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from bcd.model import predictor, weights
from tests.model.test_bundle import card

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
_seen: list[str] = []
_state = {"watches": False}


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _state["watches"] or (event != "open" and event not in CHANGING):
        return
    path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
    is_other = path.startswith(("/dev/", "/proc/")) or path.endswith(".pyc") or "__pycache__" in path
    writes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & WRITING)
    if path and writes and not is_other:
        _seen.append(f"{event} {path}")


sys.addaudithook(_watch)  # which cannot be removed


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (found.st_size, found.st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        for found in [path.stat()]
    }


Dry = Callable[[Any, Any], list[str]]


@pytest.fixture
def dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dry]:
    """Call `run` of a dry run with settings, and fail if anything was written anywhere, or Ray started."""
    ray.shutdown()  # of a test before this one; it writes its log
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    monkeypatch.chdir(tmp_path)

    def called(module: Any, config: Any) -> list[str]:
        before = state_of(tmp_path)
        _seen.clear()
        _state["watches"] = True
        try:
            lines = module.run(config)
        finally:
            _state["watches"] = False
        assert _seen == []
        assert state_of(tmp_path) == before
        assert not ray.is_initialized()
        return lines

    yield called
    _state["watches"] = False


@pytest.fixture(scope="session")
def bundle_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle of an untrained ResNet18, alone in its folder."""
    uri = str(tmp_path_factory.mktemp("bundle") / "run" / "model")
    predictor.save(weights.build(2, architecture="resnet18"), card(), uri)
    return uri
