"""A diagnosis for people: a table for the terminal, a line for each check."""

import textwrap
from collections import Counter
from collections.abc import Sequence

from bcd.preflight.diagnosis import Check, Verdict
from bcd.text import counted, listed

# Words, so that the table reads the same without colours.
WORDS: dict[Verdict, str] = {"ok": "ok", "warning": "WARNING", "fault": "FAULT"}
COLOURS: dict[Verdict, str] = {"ok": "\033[32m", "warning": "\033[1;33m", "fault": "\033[1;31m"}
PLAIN = "\033[0m"
WIDEST, NARROWEST = 110, 60


def table_lines(checks: Sequence[Check], width: int, coloured: bool) -> list[str]:
    """The table, no line wider than `width` where words allow.

    Args:
        checks: in their order.
        width: of the terminal, in characters.
        coloured: whether verdicts are coloured, too.
    """
    first = max(len(word) for word in WORDS.values())
    second = max((len(check.name) for check in checks), default=0)
    indent = " " * (2 + first + 2 + second + 2)
    width = max(NARROWEST, min(width, WIDEST))
    table = []
    for check in checks:
        word = WORDS[check.verdict].ljust(first)
        mark = f"{COLOURS[check.verdict]}{word}{PLAIN}" if coloured else word
        told = _wrapped(check.seen, width, indent)
        table.append(f"  {mark}  {check.name.ljust(second)}  {told[0].lstrip()}")
        table += told[1:]
        if check.next_step:
            table += _wrapped(f"-> {check.next_step}", width, indent, indent + "   ")
    return table


def _wrapped(text: str, width: int, indent: str, next_indent: str | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent if next_indent is None else next_indent,
        break_long_words=False,  # URIs and commands are to be copied
        break_on_hyphens=False,
    ) or [""]


def verdict(checks: Sequence[Check], job: str) -> str:
    """One sentence over all checks: whether the job, such as `jobs/train.py`, can be started."""
    counts = Counter(check.verdict for check in checks)
    parts = [counted(counts[kind], kind) for kind in ("fault", "warning") if counts[kind]]
    if counts["fault"]:
        return f"{listed(parts)}: {job} should not be started here yet."
    return f"{listed(parts) or 'nothing found'}: {job} can start."
