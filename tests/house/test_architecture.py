"""The rules of the house, held by reading the code's own syntax trees. Each test lists all offenders."""

import ast
import importlib.util
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from bcd import schema

ROOT = Path(__file__).parent.parent.parent
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


# A folder imports from itself and from those before it. "" holds the modules beside the folders, `DOORS`
# those of them that start everything.
RANKS = [
    *("data.stores", "", "config", "config.files", "metrics", "metrics.drift", "imaging", "slides.readers"),
    *("slides.parts", "slides", "data", "split", "model.recipes", "model.networks", "model.engines", "model"),
    *("model.published", "reports"),
    *("runtime", "runtime.tracking", "audit", "preflight", "evaluation", "training", "scoring"),
    *("training.pooling", "training.ablation", "training.tuning", "scoring.triage", "preflight.dry_run"),
    *("serving.openapi", "serving.telemetry", "serving", "serving.viewer", "doors"),
]
DOORS = {"bcd.cli", "bcd.demo"}
LIGHT = set(RANKS[: RANKS.index("split") + 1])
OPENSLIDE = "bcd.slides.readers.openslide_server"
WITH_RAY = {
    *("runtime", "evaluation", "training", "scoring"),
    *("bcd.audit.audit", "bcd.preflight.doctor", "bcd.serving.serve", "bcd.training.pooling.pool"),
    *("bcd.serving.telemetry.meter", "bcd.serving.viewer.service"),
    "bcd.training.tuning.tune",
}
WITH_TORCH = {
    *(f"bcd.model.{name}" for name in ("cam", "predictor", "resnet", "train_step", "weights")),
    *("bcd.model.engines.openvino_engine", "bcd.model.published.importer", "bcd.model.published.onnx_file"),
    *("model.networks", "model.recipes", "bcd.runtime.cluster"),
    *("bcd.training.checkpoint", "bcd.training.feed", "bcd.training.loop", "bcd.training.stream"),
    "bcd.training.pooling.attention",
    "bcd.preflight.doctor",
    "bcd.preflight.dry_run.measure",
    "bcd.preflight.environment",
    "bcd.serving.serve",
}
MOST_MODULES, MOST_FOLDERS, MOST_ROOT_MODULES, MOST_LINES = 8, 15, 10, 34_000


def folder_of(name: str) -> str:
    """The folder of a module below bcd: "" beside the folders."""
    return "doors" if name in DOORS else ".".join(name.split(".")[1:-1])


def packages(path: Path) -> set[str]:
    """Third-party packages that a module imports."""
    return {name.split(".")[0] for name in imports(path)}


def offenders(found: Iterable[object]) -> None:
    """Fail with all of them."""
    listed = sorted(map(str, found))
    assert not listed, "\n" + "\n".join(listed)


def test_folders_import_from_those_before_them():
    names = {name_of(path) for path in MODULES}
    offenders(
        f"{name} imports {wanted}"
        for path in MODULES
        for name in [name_of(path)]
        for full in imports(path)
        for wanted in {full, full.rpartition(".")[0]} & names
        if RANKS.index(folder_of(wanted)) > RANKS.index(folder_of(name))
    )


def test_modules_import_in_no_circle():
    names = {name_of(path) for path in MODULES}
    graph = {}
    for path in MODULES:
        wanted = {n for full in imports(path) for n in (full, full.rpartition(".")[0])}
        graph[name_of(path)] = wanted & names
    done: set[str] = set()
    while ready := {name for name in graph.keys() - done if graph[name] <= done}:
        done |= ready
    assert done == names, f"a cycle among {sorted(names - done)}"


def test_ray_and_torch_are_imported_where_they_belong():
    places = {"ray": WITH_RAY, "torch": WITH_TORCH}
    offenders(
        f"{name_of(path)} imports {package}"
        for path in MODULES
        for package, allowed in places.items()
        if package in packages(path) and not {name_of(path), folder_of(name_of(path))} & allowed
    )


def test_images_are_decoded_where_a_bad_one_affects_only_itself():
    offenders(
        f"{name_of(path)}:{node.lineno} calls image.decode: decoder.decode_safely bounds its time and memory"
        for path in MODULES
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "image.decode"
        if name_of(path) != "bcd.imaging.decoder"
    )


def test_openslide_runs_in_child_processes_only():
    """Written in C, it would end or hold up a worker or the service by one damaged slide."""
    offenders(
        f"{name_of(path)} imports {full}"
        for path in MODULES
        for full in imports(path)
        if name_of(path) != OPENSLIDE
        if full.split(".")[0] == "openslide" or OPENSLIDE in (full, full.rpartition(".")[0])
    )


def test_stages_beside_models_are_limited():
    """Else Ray Data keeps a share of the cluster for them, and a host that joins computes nothing."""
    offenders(
        f"{name_of(path)}:{node.lineno}: give the stage a limit, by cluster.beside_models or a pool"
        for path in MODULES
        if name_of(path).startswith(("bcd.scoring", "bcd.runtime.predict"))
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".map_batches")
        if not {keyword.arg for keyword in node.keywords} & {"compute", None}
    )


def test_folders_modules_and_functions_are_small():
    folders = Counter(folder_of(name_of(path)) for path in MODULES)
    found = [f"{folder}: {n} modules" for folder, n in folders.items() if folder and n > MOST_MODULES]
    there = [
        path
        for path in (ROOT / "bcd").iterdir()
        if not path.name.startswith("__") and path.name != "py.typed"
    ]
    found += [
        f"{kind.__name__}: {n}"
        for kind, n, most in (
            (Path.is_dir, sum(map(Path.is_dir, there)), MOST_FOLDERS),
            (Path.is_file, sum(map(Path.is_file, there)), MOST_ROOT_MODULES),
        )
        if n > most
    ]
    for path in MODULES:
        if (n := len(path.read_text().splitlines())) > 500:
            found.append(f"{name_of(path)}: {n} lines")
        found += [
            f"{name_of(path)}.{function.name}"
            for function in functions(path)
            if function.end_lineno - function.lineno >= 50 or depth(function) > 3
        ]
    offenders(found)


def test_the_whole_is_no_larger_than_agreed():
    assert sum(len(path.read_text().splitlines()) for path in PACKAGE) <= MOST_LINES


def test_no_public_name_is_in_two_modules():
    """But `run`, which every job calls."""
    where = defaultdict(set)
    for path in MODULES:
        for node in TREES[path].body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                where[node.name].add(name_of(path))
    del where["run"]
    offenders(f"{name}: {sorted(homes)}" for name, homes in where.items() if len(homes) > 1)


def test_jobs_are_doors():
    offenders(
        name_of(path)
        for path in JOBS
        if len(path.read_text().splitlines()) > 25
        or list(functions(path))
        or "ray job submit" not in ast.get_docstring(TREES[path])
    )


def test_init_files_import_nothing():
    """That of the package offers its few names when they are asked for."""
    offenders(
        name_of(path)
        for path in PACKAGE
        if path.name == "__init__.py" and path.parent.name != "bcd" and path.read_text().strip()
    )


def test_every_module_has_its_test_file():
    offenders(
        name_of(path)
        for path in MODULES
        for below in [path.relative_to(ROOT / "bcd")]
        if not (ROOT / "tests" / below.parent / f"test_{below.name}").exists()
    )


def test_every_module_and_public_name_has_a_docstring():
    found = [name_of(path) for path in MODULES if not ast.get_docstring(TREES[path])]
    found += [
        f"{name_of(path)}.{node.name}"
        for path in MODULES
        for node in TREES[path].body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    offenders(found)


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
    assert broad == [("bcd.imaging.image", "boundary")]


def test_column_names_are_spelled_in_schema_only():
    """`row[schema.PATIENT]`, never `row["patient"]`.

    `breakhis` subscripts the groups of its file-name pattern, which are not columns.
    """
    offenders(
        f"{name_of(path)}, line {node.lineno}: {node.slice.value!r}"
        for path in MODULES
        if path.stem not in ("schema", "breakhis")
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and node.slice.value in COLUMNS
    )


def test_names_keep_to_the_glossary():
    found = [name_of(path) for path in MODULES if path.stem in {"utils", "common", "helpers", "base"}]
    for path in MODULES:
        names = {n.id for n in ast.walk(TREES[path]) if isinstance(n, ast.Name)}
        names |= {a.arg for f in functions(path) for a in f.args.args} | {f.name for f in functions(path)}
        found += [f"{name_of(path)}: {name}" for name in names if "patch" in name.lower()]
    offenders(found)


IMPORT_ALL = """
import importlib, json, pathlib, socket, subprocess, sys, threading
def refuse(*args, **kwargs): raise AssertionError("importing opened a connection or started a process")
light, every = map(json.loads, sys.argv[1:])
for name in light:
    importlib.import_module(name)
print(json.dumps(sorted({'torch', 'ray'} & set(sys.modules))), flush=True)
jobs = "audit.audit evaluation.evaluate preflight.doctor scoring.score training.crossval training.train"
for name in [*jobs.split(), "training.pooling.pool", "training.ablation.ablate", "training.tuning.tune"]:
    importlib.import_module(f"bcd.{name}")
print(json.dumps(sorted({'torch'} & set(sys.modules))), flush=True)
# torch.compile's machinery counts cores by a subprocess at import: not ours, so it is let in first
import torch, torchvision, ray, ray.data, ray.train.torch, torch.utils.tensorboard
socket.socket.connect = refuse
subprocess.Popen.__init__ = refuse
before = threading.active_count(), set(pathlib.Path().iterdir())
for name in every:
    importlib.import_module(name)
assert (threading.active_count(), set(pathlib.Path().iterdir())) == before
assert not ray.is_initialized()
assert not {'model_signing', 'sigstore'} & set(sys.modules), "imported without being asked for"
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A process that imported everything, the light modules first, and the folder that it ran in."""
    every = [name_of(path) for path in MODULES]
    light = [name for name in every if folder_of(name) in LIGHT]
    folder = tmp_path_factory.mktemp("imported")
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps(light), json.dumps(every)]
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE), folder


@pytest.mark.process
def test_importing_starts_writes_and_downloads_nothing(imported):
    done, folder = imported
    assert done.returncode == 0
    assert not list(folder.iterdir())


def test_no_package_of_development_slows_every_process_of_ray():
    """Ray imports jsonschema, and that this grammar where it is installed: 1.6 s of CPU."""
    assert importlib.util.find_spec("rfc3987_syntax") is None


@pytest.mark.process
def test_light_modules_do_not_import_torch(imported):
    done, _ = imported
    assert json.loads(done.stdout.splitlines()[0]) == []


@pytest.mark.process
def test_jobs_start_without_torch(imported):
    """Workers that hold a model import it, and a training while Ray starts."""
    done, _ = imported
    assert json.loads(done.stdout.splitlines()[1]) == []
