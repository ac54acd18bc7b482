"""The house rules of DESIGN, held by reading the code's own syntax trees. No third-party tool needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bcd import schema

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "bcd").rglob("*.py"))
JOBS = sorted((ROOT / "jobs").glob("*.py"))
MODULES = [path for path in PACKAGE if path.name != "__init__.py"]
TREES = {path: ast.parse(path.read_text()) for path in PACKAGE + JOBS}
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)

COLUMNS = set(schema.INDEX.names) | set(schema.predictions(1, 1).names) | {schema.PART, schema.IMAGE}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Full names of what a module imports; `from bcd import x` counts as bcd.x."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (
        node for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def depth(node: ast.AST) -> int:
    """Deepest nesting of blocks below a node; an `elif` is no deeper than its `if`."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        elif_ = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not elif_))
    return deepest


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_functions_are_small(path):
    assert len(path.read_text().splitlines()) <= 500
    for function in functions(path):
        assert function.end_lineno - function.lineno < 50, function.name
        assert depth(function) <= 3, function.name


@pytest.mark.parametrize("path", JOBS, ids=name_of)
def test_jobs_are_doors(path):
    assert len(path.read_text().splitlines()) <= 25
    assert not list(functions(path))
    assert "ray job submit" in ast.get_docstring(TREES[path])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_ray_lives_upstairs(path):
    if "pipelines" not in path.parts:
        assert not [name for name in imports(path) if name.split(".")[0] == "ray"]
        assert not [name for name in imports(path) if name.startswith("bcd.pipelines")]


def test_imports_point_one_way():
    names = {name_of(path) for path in MODULES}
    graph = {}
    for path in MODULES:
        wanted = {n for full in imports(path) for n in (full, full.rpartition(".")[0])}
        graph[name_of(path)] = wanted & names
    done: set[str] = set()
    while ready := {name for name in graph.keys() - done if graph[name] <= done}:
        done |= ready
    assert done == names, f"a cycle among {sorted(names - done)}"


def test_init_files_import_nothing():
    for path in PACKAGE:
        if path.name == "__init__.py":
            assert not path.read_text().strip()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_has_its_test_file(path):
    below = path.relative_to(ROOT / "bcd")
    assert (ROOT / "tests" / below.parent / f"test_{below.name}").exists()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_and_public_name_has_a_docstring(path):
    assert ast.get_docstring(TREES[path])
    for node in TREES[path].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


def is_broad(handler: ast.ExceptHandler) -> bool:
    named = {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)} if handler.type else set()
    return not named or bool(named & {"Exception", "BaseException"})


def test_no_broad_except_but_around_foreign_decoders():
    """They may raise anything for a file from anywhere, and one image must not end a job or a service."""
    broad = [
        (name_of(path), function.name)
        for path in MODULES + JOBS
        for function in functions(path)
        for node in ast.walk(function)
        if isinstance(node, ast.ExceptHandler) and is_broad(node)
    ]
    assert broad == [("bcd.image", "boundary")]


# `breakhis` subscripts the groups of its file-name pattern, which are not columns.
@pytest.mark.parametrize("path", [p for p in MODULES if p.stem not in ("schema", "breakhis")], ids=name_of)
def test_column_names_are_spelled_in_schema_only(path):
    """`row[schema.PATIENT]`, never `row["patient"]`."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            assert node.slice.value not in COLUMNS, f"line {node.lineno}: {node.slice.value!r}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_words(path):
    names = {n.id for n in ast.walk(TREES[path]) if isinstance(n, ast.Name)}
    names |= {a.arg for f in functions(path) for a in f.args.args} | {f.name for f in functions(path)}
    assert not {name for name in names if "patch" in name.lower()}, "a tile is no patch"
    assert path.stem not in {"utils", "common", "helpers", "base"}


IMPORT_ALL = """
import importlib, pathlib, socket, subprocess, sys, threading
def refuse(*args, **kwargs): raise AssertionError("importing opened a connection or started a process")
# torch.compile's machinery counts cores by a subprocess at import: not ours, so it is let in first
import torch, torchvision, ray, ray.data, ray.train.torch, torch.utils.tensorboard
socket.socket.connect = refuse
subprocess.Popen.__init__ = refuse
before = threading.active_count(), set(pathlib.Path().iterdir())
for name in sys.argv[1:]:
    importlib.import_module(name)
assert (threading.active_count(), set(pathlib.Path().iterdir())) == before
assert not ray.is_initialized()
"""


def test_importing_starts_writes_and_downloads_nothing(tmp_path):
    names = [name_of(path) for path in MODULES]
    subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], cwd=tmp_path, check=True)
    assert not list(tmp_path.iterdir())


def test_light_modules_do_not_import_torch():
    light = "import sys, bcd.taxonomy, bcd.schema, bcd.config, bcd.breakhis, bcd.split"
    light += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", light], check=True)
