"""The notebooks run, and are kept without their outputs; their calls have the settings that there are."""

import ast
import json
import re
from pathlib import Path

import pytest

from bcd import cli

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = ROOT / "docs/notebooks"
# In this order: each uses what those before it wrote.
ORDER = ("train", "score", "table")
PAGE = ROOT / "docs/reference/python.md"


def cells(name: str) -> list[dict[str, object]]:
    return json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def code_of(name: str) -> str:
    return "\n".join("".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code")


def test_there_are_these_notebooks_and_the_page_links_them():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(ORDER)
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"(../notebooks/{name}.ipynb)" in page for name in ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_notebooks_are_kept_without_outputs(name):
    for cell in cells(name):
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.parametrize("place", [*ORDER, "page"])
def test_calls_have_the_settings_of_the_jobs(place):
    page = PAGE.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.S)) if place == "page" else code_of(place)
    calls = [
        (node.func.attr, {keyword.arg for keyword in node.keywords})
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("bcd.train", "bcd.evaluate", "bcd.score")
    ]
    assert calls or place == "table"
    for job, given in calls:
        fields = cli.CONFIGS[job].model_fields
        assert given <= fields.keys()
        assert {name for name, field in fields.items() if field.is_required()} <= given


@pytest.mark.ray
def test_notebooks_run_one_after_the_other(cluster, tmp_path, monkeypatch):
    """In one kernel, a process of its own, which joins the cluster of the tests: of two each would start
    processes of Ray."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # of which jupyter_core warns
    notebooks = {name: nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4) for name in ORDER}
    whole = nbformat.v4.new_notebook()
    for name, each in notebooks.items():
        for cell in each.cells:
            cell.id = f"{name}-{cell.id}"
            whole.cells.append(cell)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(whole, timeout=600, kernel_name="python3", resources=place).execute()
    texts = {name: json.dumps(each) for name, each in notebooks.items()}
    assert "JobResult(uri=" in texts["train"]
    assert "'n_errors': 1" in texts["score"]
    assert "no model bundle there" in texts["score"]
    assert "truncated" in texts["table"]
