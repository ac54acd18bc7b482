"""What a bug report needs: versions, hardware, the environment; no secret, no path, no name of a host."""

import json
import logging
import os
import platform
import re
import tomllib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import psutil

from bcd import provenance
from bcd.config.checks import EnvConfig
from bcd.text import size

logger = logging.getLogger(__name__)

# Variables that change what jobs do, or where they reach.
RELEVANT = re.compile(
    r"(BCD|RAY|AWS|GOOGLE|AZURE|HF|MLFLOW|CUDA|NVIDIA|NCCL|GLOO|OMP|MKL|KMP|OPENBLAS|MALLOC|TORCH|PYTORCH)_.+"
    r"|PYTHON.+|LD_(PRELOAD|LIBRARY_PATH)|TMPDIR|(?i:(https?|no|all)_proxy)|SSL_CERT_\w+|TQDM_DISABLE|LANG"
)
# Those whose values are shown, where these are short and name no place. All others are only said to be set.
HARMLESS = re.compile(
    r"(CUDA|NVIDIA|NCCL|GLOO|OMP|MKL|KMP|OPENBLAS|MALLOC|TORCH|PYTORCH)_.+|PYTHON(UTF8|HASHSEED|UNBUFFERED)"
    r"|RAY_(AUTH_MODE|USE_TLS|DATA_.+|TRAIN_.+|USAGE_STATS_ENABLED)|BCD_(LOG_FORMAT|CLUSTER_LIMIT)"
    r"|TQDM_DISABLE|LANG"
)
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL", re.IGNORECASE)
PLAIN_VALUE = re.compile(r"[\w.,:;=+%-]{0,64}")
MASK = "set, not shown"
NOT_THERE = "not installed"
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
Facts = dict[str, dict[str, Any]]


def run(config: EnvConfig) -> Facts:
    """Print the page, or the object, and return its facts by section."""
    found = environment_facts()
    logger.info(json.dumps(found, indent=2) if config.as_json else "\n".join(_page(found)))
    return found


def environment_facts() -> Facts:
    """The facts by section."""
    return {
        "bcd": {"version": provenance.own_version(), "commit": provenance.git_commit() or "no checkout"},
        "machine": _machine(),
        "packages": {name: _installed(name) for name in (*provenance.PACKAGES, "pydantic", "tyro", "pandas")},
        "torch": _torch(),
        "extras": _extras(),
        "variables": shown_variables(os.environ),
    }


def shown_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """The relevant variables of an environment, sorted; their values only where they are harmless."""
    return {name: _shown(name, environment[name]) for name in sorted(environment) if RELEVANT.fullmatch(name)}


def _shown(name: str, value: str) -> str:
    is_harmless = HARMLESS.fullmatch(name) and not SECRET.search(name) and PLAIN_VALUE.fullmatch(value)
    return value if is_harmless else MASK


def _machine() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "system": platform.platform(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "cpu": _cpu(),
        "cores": f"{cores} of {os.cpu_count()} may be used",
        "memory": f"{size(memory.total)}, {size(memory.available)} available",
    }
    if CGROUP_LIMIT.exists() and (limit := CGROUP_LIMIT.read_text().strip()).isdecimal():
        found["memory limit"] = f"{size(int(limit))} of this container"
    return found


def _cpu() -> str:
    facts = Path("/proc/cpuinfo")
    text = facts.read_text(encoding="utf-8") if facts.exists() else ""
    named = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return NOT_THERE


def _torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # such as a library of CUDA that is missing
        return {"import": f"{type(error).__name__}: {error}"}
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "built for CUDA": torch.version.cuda or "no",
        "cuDNN": str(torch.backends.cudnn.version() or "no"),
        "GPUs": ", ".join(f"{gpu.name}, {size(gpu.total_memory)}" for gpu in gpus)
        or "none that torch can use",
        "threads": str(torch.get_num_threads()),
    }


def _extras() -> dict[str, Any]:
    """The packages of each extra, with their versions."""
    return {
        extra: ", ".join(f"{name} {_installed(name)}" for name in names)
        for extra, names in sorted(_packages_of_extras().items())
    }


def _packages_of_extras() -> dict[str, list[str]]:
    project = Path(provenance.__file__).parent.parent / "pyproject.toml"
    if project.exists():  # also where a cluster runs what a job has sent
        extras = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    else:
        extras = {}
        for line in requires("bcd") or ():
            if named := re.search(r"extra == ['\"](\w+)", line):
                extras.setdefault(named[1], []).append(line)
    return {
        extra: [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines]
        for extra, lines in extras.items()
        if extra not in ("dev", "bench")
    }


def _page(found: Facts) -> list[str]:
    lines = []
    for section, facts in found.items():
        width = max(map(len, facts), default=0) + 2
        lines += ["", section, *(f"  {name:<{width}}{value}" for name, value in facts.items())]
    return [*lines[1:], ""]
