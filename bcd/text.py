"""Text: numbers with their nouns, lists, and names normalised for comparison."""

import re
import unicodedata
from collections.abc import Iterable, Sequence


def counted(n: int, noun: str, many: str | None = None) -> str:
    """`1 entry`, `2 entries`."""
    return f"{n:,} {noun if n == 1 else many or noun + 's'}"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def some(items: Iterable[str], most: int = 3, separator: str = ", ") -> str:
    """The first of some names, and the number of the others: `a, b, c, and 2 more`."""
    names = list(items)
    more = [f"and {len(names) - most:,} more"] if len(names) > most else []
    return separator.join([*names[:most], *more])


def folded(name: str) -> str:
    """Normalise the name of a class, folder or column: ` Ductal Carcinoma` is `ductal_carcinoma`."""
    return re.sub(r"[\s_-]+", "_", visible(name).casefold())


def visible(name: str) -> str:
    """NFKC without invisible characters, and with single blanks."""
    # Byte-order marks, zero-width spaces and soft hyphens are in Unicode's category Cf.
    seen = (c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    return " ".join("".join(seen).split())


def size(n_bytes: float) -> str:
    """`3.5 GiB`, `64 MiB`, `0.3 MiB`."""
    mib = n_bytes / 2**20
    if mib >= 1_024:
        return f"{mib / 1_024:,.1f} GiB"
    return f"{mib:,.0f} MiB" if mib >= 1 else f"{mib:.1f} MiB"


def duration(seconds: float) -> str:
    """`45 s`, `3 min`, `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3_600:.1f} h"


# The folders of an absolute path, which belong to one machine; a URI of a store has none.
_FOLDERS = re.compile(r"(?<![\w.:/~-])(?:file://)?~?/(?:[^\s/'\"]+/)*(?=[^\s/'\"])")


def without_folders(text: str) -> str:
    """A text for a page that others see: of each absolute path on this machine, only the last part."""
    if re.match(r"~?/|file:/", text) and "\n" not in text:
        return text.rstrip("/").rpartition("/")[2]
    return _FOLDERS.sub("", text)
