"""From the command line to one job: `bcd train ...`, the same as `python jobs/train.py ...`."""

import sys
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

import tyro

from bcd.config.checks import AuditConfig, DoctorConfig
from bcd.config.evaluation import EvaluateConfig
from bcd.config.options import Config
from bcd.config.scoring import ScoreConfig
from bcd.config.serving import ServeConfig
from bcd.config.training import CrossvalConfig, DemoConfig, TrainConfig
from bcd.errors import BcdError

# The settings of each job, and the module below `bcd` whose `run` takes them: named and not imported, so that
# Ray and torch, seconds of work, are imported only once the flags are known to be right.
JOBS: Mapping[str, tuple[type[Config], str]] = MappingProxyType(
    {
        "demo": (DemoConfig, "demo"),
        "doctor": (DoctorConfig, "preflight.doctor"),
        "audit": (AuditConfig, "audit.audit"),
        "train": (TrainConfig, "training.train"),
        "evaluate": (EvaluateConfig, "evaluation.evaluate"),
        "crossval": (CrossvalConfig, "training.crossval"),
        "score": (ScoreConfig, "scoring.score"),
        "serve": (ServeConfig, "serving.serve"),
    }
)


def console() -> None:
    """The command `bcd`: its first argument names a job, the others are that job's flags."""
    if sys.argv[1:2] and sys.argv[1] in JOBS:
        job = sys.argv.pop(1)
        sys.argv[0] = f"bcd {job}"
        main(job)
        return
    asked = sys.argv[1:] in (["--help"], ["-h"])
    print(_usage(), end="", file=sys.stdout if asked else sys.stderr)
    sys.exit(0 if asked else 2)


def _usage() -> str:
    summaries = {name: (config.__doc__ or "").splitlines()[0] for name, (config, _) in JOBS.items()}
    lines = [f"  {name:<10}{summary}" for name, summary in summaries.items()]
    return "\n".join(["usage: bcd JOB [FLAGS]", "", *lines, "", "bcd JOB --help lists its flags.", ""])


def main(job: str, doc: str | None = None) -> None:
    """Parse `sys.argv` into the settings of a job, run it, and exit.

    Exit code 0 on success; 2 with one sentence on anything that the user can put right; 1 where inputs lack a
    result, an audited split leaks or a check of the cluster found a fault. Other faults keep their stack
    trace.
    """
    config_type, pipeline = JOBS[job]
    config = tyro.cli(config_type, description=doc)
    try:
        import_module(f"bcd.{pipeline}").run(config)
    except BcdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
