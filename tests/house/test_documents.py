"""The documents are run, not trusted: commands, flags, files, code, words. Each test lists all offenders."""

import re
import runpy
import shlex
import string
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from bcd import errors, provenance
from bcd.config.options import Config
from bcd.errors import NOT_FINITE
from bcd.model import predictor, weights
from tests import commands, pictures
from tests.house.test_architecture import MODULES, RANKS, WITH_RAY, WITH_TORCH, folder_of, name_of, offenders
from tests.model.test_bundle import card

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
FRONT = [ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY", "deploy/README")]
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = {path: path.read_text(encoding="utf-8") for path in FRONT + PAGES}
README = TEXTS[ROOT / "README.md"]
MADE: dict[Path, str] = runpy.run_path(str(DOCS / "generate.py"))["pages"]()
MOST_LINES, MOST_WORDS = 160, 1_000
MAKE = (ROOT / "Makefile").read_text(encoding="utf-8")

# Flags that documents name of other programs than the jobs: Ray, docker, the benchmarks, pytest.
OTHER_FLAGS = {"--help", "--working-dir", "--build-arg", "--share", "--rounds", "--strict", "--durations"}
# Words of the glossary's last column, and others that the field does not use so.
BANNED = [
    *(
        r"stands?\b",
        r"stood\b",
        r"tells?\b",
        r"told\b",
        r"go(es)? on\b",
        r"going on\b",
        r"asks? again",
        r"anew\b",
    ),
    *(r"books?\b", r"lonely\b", r"strangers?\b", r"for people", r"made.up\b", r"set aside", r"of then\b"),
    *(r"is let in", r"come again", r"no matter how", r"what storage does not", r"both sides", r"two sides"),
    *(r"pictures?\b", r"patch(es)?\b", r"lies\b", r"wherever it is", r"whoever\b", r"dribble"),
]


def where(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """A document without its blocks of code, code in lines, targets of links, and front matter."""
    text = re.sub(r"^---\n.*?\n---\n", "", text, flags=re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return re.sub(r"`[^`]*`|\]\([^)]*\)|<!--.*?-->", "", text)


def inline(text: str) -> list[str]:
    """What a document has in backquotes, outside its blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def shown() -> Iterator[tuple[str, str]]:
    """Every command of every document, in blocks or in lines, beside the document."""
    for path, text in TEXTS.items():
        lines = [line for line in commands.in_markdown(text) if line.strip()]
        lines += [f"python {code}" for code in inline(text) if re.match(r"jobs/\w+\.py -", code)]
        lines += [
            code
            for code in inline(text)
            if re.match(r"(ray|serve) (up|down|start|deploy|run) .|python -m |.*\bpytest\b", code)
        ]
        yield from ((where(path), line) for line in lines)


def faults(check: Any, *arguments: Any) -> str:
    """What a check of a command raises; nothing where it is valid."""
    try:
        check(*arguments)
    except (ValueError, TypeError, click.ClickException, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def flags_of(config_type: type[Config]) -> set[str]:
    names = {(field.alias or key).replace("_", "-") for key, field in config_type.model_fields.items()}
    return {f"--{name}" for name in names} | {f"--no-{name}" for name in names}


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= MOST_LINES
    assert len(prose(README).split()) <= MOST_WORDS
    for part in (
        "Research use only",
        "docs/evidence.png",
        "make demo",
        "make test",
        "```python",
        "```sql",
        "curl ",
    ):
        assert part in README, part


def test_every_command_of_a_job_is_valid(capsys):
    found = [(page, line) for page, line in shown() if commands.job(line)]
    assert {commands.job(line)[0] for _, line in found} == set(commands.JOBS.values())
    offenders(
        f"{page}: {line}: {fault}"
        for page, line in found
        for config_type, arguments in [commands.job(line)]
        # WEIGHTS, S and their like are the reader's.
        if (fault := faults(commands.check_job, config_type, ["0" if a == "S" else a for a in arguments]))
    )


def test_a_slip_in_a_command_of_a_job_would_be_seen(capsys):
    for line in ("python jobs/train.py --data x --epoch 3", "python jobs/train.py --data x --epochs many"):
        assert faults(commands.check_job, *commands.job(line)), line


def test_every_command_of_ray_is_valid():
    found = [(page, line) for page, line in shown() if commands.is_rays(line)]
    assert len(found) > 10
    offenders(
        f"{page}: {line}: {fault}" for page, line in found if (fault := faults(commands.check_rays, line))
    )


def test_every_target_of_make_and_every_module_and_test_that_is_named_exists():
    found = []
    for path, text in TEXTS.items():
        named = [*commands.in_markdown(text), *inline(text)]
        makes = {match[1] for line in named if (match := re.match(r"make ([\w-]+)", line))}
        found += [f"{where(path)}: make {name}" for name in makes if not re.search(rf"^{name}:", MAKE, re.M)]
        files = {
            file
            for line in named
            for file in re.findall(r"\b((?:tests|benchmarks|docs|bcd|deploy)/[\w./-]+)", line)
        }
        files |= {
            f"benchmarks/{name}.py" for line in named for name in re.findall(r"-m benchmarks\.(\w+)", line)
        }
        found += [f"{where(path)}: {file}" for file in files if not (ROOT / file).exists()]
    offenders(found)


def test_commands_work_in_a_fresh_shell():
    """Where a document runs a job, it says first how `python` becomes that of the environment."""
    offenders(
        where(path)
        for path, text in TEXTS.items()
        if (job := re.search(r"^python jobs/", text, re.M))
        and not 0 <= text.find("source .venv/bin/activate") < job.start()
    )


def test_every_flag_that_is_named_exists():
    known = OTHER_FLAGS.union(*map(flags_of, commands.JOBS.values()))
    offenders(
        f"{where(path)}: {flag}"
        for path, text in TEXTS.items()
        if path not in MADE
        for code in inline(text)
        if code.startswith("--") and not code.startswith("--8<--")
        for flag in re.findall(r"--[a-z][\w-]*", code)
        if flag not in known
    )


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings."""
    titles = re.findall(r"^#+ (.+)$", TEXTS[path], re.M)
    keep = string.ascii_lowercase + string.digits + " -_"
    return {"".join(c for c in title.lower() if c in keep).strip().replace(" ", "-") for title in titles}


def test_every_file_that_is_linked_exists():
    found = []
    for path, text in TEXTS.items():
        for target in re.findall(r"\]\((?!http)([^)]+)\)", text):
            file, _, anchor = target.partition("#")
            other = (path.parent / file).resolve() if file else path
            # The page of Kubernetes is that of deploy/.
            other = ROOT / "deploy/README.md" if other == DOCS / "operations/kubernetes.md" else other
            if not other.exists() or (anchor and anchor not in anchors(other)):
                found.append(f"{where(path)}: {target}")
    for name in ("cluster.yaml", "serve.yaml", "LICENSE", "constraints.txt", "CITATION.cff"):
        assert (ROOT / name).exists()
    offenders(found)


def test_the_architecture_page_shows_the_folders_and_modules_that_there_are():
    text = TEXTS[DOCS / "architecture.md"]
    ranked = re.findall(r"^\| (\d+) \| `bcd/(.*?)/?`", text, re.M)
    assert [(int(rank), name.replace("/", ".")) for rank, name in ranked[:-1]] == list(
        enumerate(RANKS[:-1], 1)
    )
    drawn, folder = set(), ""
    for line in re.search(r"```\n(bcd/\n.*?)```", text, re.S)[1].splitlines():
        if line.startswith("bcd/"):
            folder = line.strip().strip("/").replace("/", ".")
        else:
            drawn.add(f"{folder}.{line.split()[0]}")
    there = set(map(name_of, MODULES))
    offenders(
        [f"not shown: {name}" for name in there - drawn] + [f"not there: {name}" for name in drawn - there]
    )


@pytest.mark.parametrize(("package", "places"), [("Ray", WITH_RAY), ("torch", WITH_TORCH)])
def test_the_architecture_page_says_where_ray_and_torch_are_imported(package, places):
    text = TEXTS[DOCS / "architecture.md"]
    sentence = re.search(rf"{package}(?: is imported)? only in ([^;.]*)[;.]", text)[1]
    assert set(re.findall(r"`([\w/]+)`", sentence)) == {
        p.removeprefix("bcd.").replace(".", "/") for p in places
    }


def test_the_reference_is_what_configs_and_schema_say():
    """After a change: `python docs/generate.py`."""
    offenders(where(path) for path, text in MADE.items() if path.read_text(encoding="utf-8") != text)


def test_the_reference_names_every_error():
    text = TEXTS[DOCS / "reference/errors.md"]
    named = {name for name, value in vars(errors).items() if isinstance(value, type)} - {"ImageError"}
    for path in MODULES:
        code = path.read_text(encoding="utf-8")
        named |= set(re.findall(r'ImageError\(\s*"(\w+)"', code))
        if folder_of(name_of(path)) == "serving":
            named |= set(re.findall(r'RefusedError\(\s*\w+,\s*"(\w+)"', code))
    named |= {NOT_FINITE, "bad_mpp", "whole_slide"}
    offenders(name for name in named if f"`{name}`" not in text)


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    predictor.save(weights.build(2, architecture="resnet18"), card(), str(tmp_path / "demo/run/model"))
    (tmp_path / "field.png").write_bytes(pictures.encode(pictures.gradient()))
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert 0 <= names["prediction"].probability_malignant[0] <= 1
    assert "bcd.load(" in TEXTS[DOCS / "reference/bundle.md"]


def test_the_status_page_says_what_was_not_tested():
    status = TEXTS[DOCS / "status.md"]
    for words in ("GPUs", "never started", "not tested", "never built", "not measured"):
        assert words in status
    assert not [
        where(path) for path, text in TEXTS.items() if re.search(r"MEASURED|RECORDED|TODO|FIXME", text)
    ]


def test_every_measurement_has_its_command_and_its_record():
    rows = [line for line in TEXTS[DOCS / "measurements.md"].splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| what")]
    assert len(rows) > 25
    offenders(
        row[:80]
        for row in rows
        for cells in [[cell.strip() for cell in row.strip("|").split(" | ")]]
        if len(cells) != 4
        or not re.search(r"`|the same|not recorded", cells[2])
        or not re.fullmatch(r"\d\d \w{3} \d{4}, [0-9a-f]{7}|not recorded", cells[3])
    )


def test_documents_use_the_words_of_the_glossary():
    offenders(
        f"{where(path)}: {match[0]!r} in {text[max(0, match.start() - 30) : match.end() + 20]!r}"
        for path, whole in TEXTS.items()
        if path not in MADE
        for text in [re.sub(r"\s+", " ", prose(whole))]
        for match in re.finditer(rf"\b(?:{'|'.join(BANNED)})", text, re.I)
    )


def prose_in_code(path: Path) -> Iterator[str]:
    """Comments, docstrings and messages of a module, without what names code in them."""
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING) and " " in token.string.strip():
                yield re.sub(r"`[^`]*`|\{[^}]*\}|\s+", " ", token.string)


def test_code_uses_the_words_of_the_glossary():
    modules = [path for folder in ("bcd", "jobs", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    offenders(
        f"{where(path)}: {match[0]!r} in {text[max(0, match.start() - 30) : match.end() + 20]!r}"
        for path in modules
        for text in prose_in_code(path)
        for match in re.finditer(rf"\b(?:{'|'.join(BANNED)})", text, re.I)
    )


def test_the_version_is_in_the_changelog():
    assert f"\n## {provenance.own_version()}" in TEXTS[ROOT / "CHANGELOG.md"]


def test_the_site_fetches_nothing():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["theme"]["font"] is False
    assert settings["strict"] is True
    assert "analytics" not in settings["extra"]
    assert not [
        url for key in ("extra_css", "extra_javascript") for url in settings.get(key, []) if "//" in url
    ]
    # Material fetches Mermaid where a page has a diagram of it.
    assert not [where(path) for path, text in TEXTS.items() if "```mermaid" in text]


def test_shell_blocks_can_be_read_by_a_shell():
    offenders(f"{page}: {line}" for page, line in shown() if faults(shlex.split, line, True))
