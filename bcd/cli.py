"""From the command line to one pipeline call, for every job alike."""

import sys
from importlib import import_module

import tyro

from bcd.config.options import Config
from bcd.errors import BcdError


def main(config_type: type[Config], pipeline: str, doc: str | None) -> None:
    """Parse `sys.argv` into a config, run the pipeline's `run(config)`, and exit.

    The pipeline is named and not given, so that Ray and torch, seconds of work, are imported only once the
    flags are known to be right.

    Exit code 0 on success; 2 with one sentence on anything the user can put right; 1 where books do not
    balance, an audited split leaks or a diagnosis found a fault. Other faults keep their stack trace.
    """
    config = tyro.cli(config_type, description=doc)
    try:
        import_module(f"bcd.{pipeline}").run(config)
    except BcdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
