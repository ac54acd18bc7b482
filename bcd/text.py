"""Words for people: numbers with their nouns, lists."""

from collections.abc import Sequence


def counted(n: int, noun: str, many: str | None = None) -> str:
    """`1 entry`, `2 entries`."""
    return f"{n:,} {noun if n == 1 else many or noun + 's'}"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
