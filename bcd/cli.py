"""The jobs, from the command line, `bcd train ...`, the same as `python jobs/train.py ...`; and as functions,
`bcd.train(...)`."""

import json
import logging
import operator
import os
import re
import shlex
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import reduce
from importlib import import_module
from io import StringIO
from types import MappingProxyType
from typing import Annotated, Any

import tyro

from bcd import errors, provenance, storage
from bcd.config import log
from bcd.config.checks import AuditConfig, DoctorConfig, EnvConfig
from bcd.config.evaluation import EvaluateConfig, TriageConfig
from bcd.config.files import settings as files
from bcd.config.options import Config
from bcd.config.scoring import PoolConfig, ScoreConfig
from bcd.config.serving import ServeConfig, ViewConfig
from bcd.config.signing import ExportConfig, ImportConfig, PushConfig, SignConfig, VerifyConfig
from bcd.config.training import AblateConfig, CrossvalConfig, DemoConfig, TrainConfig, TuneConfig, with_recipe
from bcd.errors import BcdError, ConfigError, StorageError

# The settings of each job, and the module below `bcd` with its `run`: not imported yet, because Ray and torch
# take seconds, and flags may be wrong.
JOBS: Mapping[str, tuple[type[Config], str]] = MappingProxyType(
    {
        "demo": (DemoConfig, "demo"),
        "doctor": (DoctorConfig, "preflight.doctor"),
        "audit": (AuditConfig, "audit.audit"),
        "train": (TrainConfig, "training.train"),
        "evaluate": (EvaluateConfig, "evaluation.evaluate"),
        "crossval": (CrossvalConfig, "training.crossval"),
        "ablate": (AblateConfig, "training.ablation.ablate"),
        "tune": (TuneConfig, "training.tuning.tune"),
        "score": (ScoreConfig, "scoring.score"),
        "triage": (TriageConfig, "scoring.triage.triage"),
        "view": (ViewConfig, "serving.viewer.view"),
        "pool": (PoolConfig, "training.pooling.pool"),
        "serve": (ServeConfig, "serving.viewer.service"),
        "import": (ImportConfig, "model.published.importer"),
        "export": (ExportConfig, "model.published.onnx_file"),
        "sign": (SignConfig, "preflight.signing"),
        "verify": (VerifyConfig, "preflight.signing"),
        "push": (PushConfig, "model.published.push"),
        "env": (EnvConfig, "preflight.environment"),
    }
)
CONFIGS: Mapping[str, type[Config]] = {job: config for job, (config, _) in JOBS.items()}
COMPLETION, SHELLS = "--print-completion", ("bash", "zsh", "fish")


@dataclass(frozen=True)
class JobResult:
    """What a job wrote: `uri` of its folder, `table`, the URI of the predictions (Parquet), `model`, that of
    the bundle, and `metrics`, the content of `metrics.json`, of a scoring job that of `summary.json`."""

    uri: str
    table: str
    model: str
    metrics: dict[str, Any]


def console() -> None:
    """The command `bcd`: its first argument names a job, the others are that job's flags."""
    if sys.argv[1:2] and sys.argv[1] in JOBS:
        job = sys.argv.pop(1)
        sys.argv[0] = f"bcd {job}"
        main(job)
        return
    if sys.argv[1:2] == [COMPLETION] and sys.argv[2:] in [[shell] for shell in SHELLS]:
        _print_completion(sys.argv[2])
        return
    is_help = sys.argv[1:] in (["--help"], ["-h"])
    lines = [f"  {job:<10}{_first_line(config)}" for job, config in CONFIGS.items()]
    last = f"bcd JOB --help lists its flags; bcd {COMPLETION} {'|'.join(SHELLS)} prints their completion."
    usage = ["usage: bcd JOB [FLAGS]", "", *lines, "", last]
    print("\n".join(usage), file=sys.stdout if is_help else sys.stderr)
    sys.exit(0 if is_help else 2)


def _first_line(config: type[Config]) -> str:
    return (config.__doc__ or "").splitlines()[0]


def _print_completion(shell: str) -> None:
    """Print the script by which a shell completes jobs, flags and their values."""
    jobs: Any = [
        Annotated[config, tyro.conf.subcommand(job, description=_first_line(config))]
        for job, config in CONFIGS.items()
    ]
    with redirect_stdout(StringIO()) as printed, suppress(SystemExit):
        tyro.cli(reduce(operator.or_, jobs), prog="bcd", args=["--tyro-print-completion", shell])
    # A line of help would be a candidate of its own: tyro hands them on a line each.
    print(
        re.sub(
            r"^COMPLETION_SPEC = .*", lambda line: line[0].replace(r"\n", " "), printed.getvalue(), flags=re.M
        )
    )


def main(job: str, doc: str | None = None) -> None:
    """Parse `sys.argv` into the settings of a job, run it, and exit.

    Settings of a file (`--config`) are put in its place into `sys.argv`, so that the command which a job
    records is whole. Exit code 0 on success; 2 with one sentence on errors that the user can correct; 1 where
    inputs lack a result, an audited split leaks or a check of the cluster found a fault. Bugs keep their
    stack trace.
    """
    try:
        sys.argv[1:] = files.expanded(sys.argv[1:], job, CONFIGS)
    except BcdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    try:
        config: Config = tyro.cli(CONFIGS[job], description=doc and _in_paragraphs(doc))
    except BrokenPipeError:  # of `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    log.start(job, config.log_format)
    try:
        _run(job, with_recipe(config, sys.argv[1:]))
    except BcdError as error:
        logging.getLogger(__name__).error(_sentence(error))
        sys.exit(error.exit_code)


def _in_paragraphs(doc: str) -> str:
    """With an empty line after each example; else tyro would append the line that comes next."""
    return re.sub(r"\n( .+)\n(?=\w)", r"\n\1\n\n", doc)


def _module(job: str, config: Config) -> str:
    """The module with the `run` of a job, or with that of its dry run."""
    return f"bcd.preflight.dry_run.{job}" if getattr(config, "dry_run", False) else f"bcd.{JOBS[job][1]}"


def _run(job: str, config: Config) -> str:
    """Run a job; for most, returns the URI of its output. Raises BcdError, also for the loss of a process."""
    try:
        return import_module(_module(job, config)).run(config)
    except BcdError:  # first: what a task of Ray raised may be an error of both kinds
        raise
    except _of_ray() as error:
        # Not at the top: it imports Ray, as the job has.
        from bcd.runtime import cluster

        if (loss := cluster.loss_of(error)) is None:
            raise
        cluster.leave()
        raise loss from error


def _of_ray() -> tuple[type[Exception], ...]:
    """The exceptions of Ray, where the job has imported it."""
    exceptions = sys.modules.get("ray.exceptions")
    return (exceptions.RayError,) if exceptions else ()


def run_job(job: str, settings: Mapping[str, Any]) -> JobResult:
    """Run `train`, `evaluate` or `score` with settings as of `--help`, those of a file (`config`) included.

    Raises:
        BcdError: the sentence with which the job would exit.
    """
    given = dict(settings)
    if (uri := given.pop("config", None)) is not None:
        given = files.read_settings_file(uri, job, CONFIGS) | given
    config = CONFIGS[job](**given)
    if getattr(config, "dry_run", False):
        raise ConfigError(f"dry_run is of the command line: bcd {job} --dry-run")
    try:
        with provenance.stating(shlex.join(["bcd", job, *files.as_flags(given)])):
            uri = _run(job, config)
    except BcdError as error:
        # What a task of Ray raised is of our class, too, and its text is a stack trace.
        raise getattr(error, "cause", error) from None
    # Not at the top: they import Ray, as the job has.
    from bcd.runtime.run_directory import METRICS, MODEL
    from bcd.scoring.ledger import PREDICTIONS, SUMMARY

    metrics = storage.read_bytes(storage.join(uri, SUMMARY if job == "score" else METRICS))
    model = storage.join(uri, MODEL) if job == "train" else given["model"]
    return JobResult(uri, storage.join(uri, PREDICTIONS), model, json.loads(metrics))


def _sentence(error: BcdError) -> str:
    """What failed, and what to do."""
    # What a task of Ray raised says its whole stack trace; its cause is the sentence.
    cause = getattr(error, "cause", error)
    is_transient = isinstance(cause, StorageError) and not cause.lasting
    if not is_transient or "same command again" in str(cause):
        return str(cause)
    return f"{str(cause).removesuffix('.')}; {errors.ASK_AGAIN}"
