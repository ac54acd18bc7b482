"""From the command line to one pipeline call, for every job alike."""

import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from bcd.config import Config
from bcd.errors import BcdError

ConfigT = TypeVar("ConfigT", bound=Config)


def main(config_type: type[ConfigT], pipeline: Callable[[ConfigT], object], doc: str | None) -> None:
    """Parse `sys.argv` into a config, run the pipeline, and exit.

    Exit code 0 on success; 2 with one sentence on anything the user can put right. Other faults keep
    their stack trace.
    """
    config = tyro.cli(config_type, description=doc)
    try:
        pipeline(config)
    except BcdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
