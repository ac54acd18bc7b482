"""The command line of the jobs: `bcd train ...`, the same as `python jobs/train.py ...`."""

import logging
import sys
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

import tyro

from bcd import errors
from bcd.config import log
from bcd.config.checks import AuditConfig, DoctorConfig
from bcd.config.evaluation import EvaluateConfig, TriageConfig
from bcd.config.options import Config
from bcd.config.scoring import ScoreConfig
from bcd.config.serving import ServeConfig, ViewConfig
from bcd.config.signing import ImportConfig, PushConfig, SignConfig, VerifyConfig
from bcd.config.training import (
    AblateConfig,
    CrossvalConfig,
    DemoConfig,
    PoolConfig,
    TrainConfig,
    with_recipe,
)
from bcd.errors import BcdError, StorageError

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
        "score": (ScoreConfig, "scoring.score"),
        "triage": (TriageConfig, "scoring.triage.triage"),
        "view": (ViewConfig, "serving.viewer.view"),
        "pool": (PoolConfig, "training.pooling.pool"),
        "serve": (ServeConfig, "serving.viewer.service"),
        "import": (ImportConfig, "model.published.importer"),
        "sign": (SignConfig, "preflight.signing"),
        "verify": (VerifyConfig, "preflight.signing"),
        "push": (PushConfig, "model.published.push"),
    }
)


def console() -> None:
    """The command `bcd`: its first argument names a job, the others are that job's flags."""
    if sys.argv[1:2] and sys.argv[1] in JOBS:
        job = sys.argv.pop(1)
        sys.argv[0] = f"bcd {job}"
        main(job)
        return
    is_help = sys.argv[1:] in (["--help"], ["-h"])
    lines = [f"  {job:<10}{(config.__doc__ or '').splitlines()[0]}" for job, (config, _) in JOBS.items()]
    usage = ["usage: bcd JOB [FLAGS]", "", *lines, "", "bcd JOB --help lists its flags."]
    print("\n".join(usage), file=sys.stdout if is_help else sys.stderr)
    sys.exit(0 if is_help else 2)


def main(job: str, doc: str | None = None) -> None:
    """Parse `sys.argv` into the settings of a job, run it, and exit.

    Exit code 0 on success; 2 with one sentence on errors that the user can correct; 1 where inputs lack a
    result, an audited split leaks or a check of the cluster found a fault. Bugs keep their stack trace.
    """
    config_type, pipeline = JOBS[job]
    config = tyro.cli(config_type, description=doc)
    log.start(job, config.log_format)
    try:
        import_module(f"bcd.{pipeline}").run(with_recipe(config, sys.argv[1:]))
    except BcdError as error:
        logging.getLogger(__name__).error(_sentence(error))
        sys.exit(error.exit_code)


def _sentence(error: BcdError) -> str:
    """What failed, and what to do."""
    # What a task of Ray raised says its whole stack trace; its cause is the sentence.
    cause = getattr(error, "cause", error)
    is_transient = isinstance(cause, StorageError) and not cause.lasting
    if not is_transient or "same command again" in str(cause):
        return str(cause)
    return f"{str(cause).removesuffix('.')}; {errors.ASK_AGAIN}"
