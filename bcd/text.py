"""Text: numbers with their nouns, lists, names normalised for comparison, and values within Markdown."""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

# In answers and files; pages and reports have the same words in their templates.
RESEARCH_ONLY = "Research use only. Not a medical device, and not for diagnosis."
# Characters that are markup somewhere in Markdown. Backslashes only where every renderer knows them, else
# entities: Python-Markdown would pass `\<script>` on as HTML.
_MARKUP = str.maketrans(
    {character: f"\\{character}" for character in "\\`*_[]"}
    | {character: f"&#{ord(character)};" for character in "&<>|~$"}
)
# Markup at the start of a block only: headings, lists, rules.
_AT_START = re.compile(r"^( ?)([#+=-]+(?=\s|$)|\d+(?=[.)](?:\s|$)))")


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


class Markdown(str):
    """Text that is Markdown already: `in_markdown` returns it as it is."""


def in_markdown(value: Any) -> Any:
    """A value as Markdown that shows it, in one line: names that users gave become no links, images, tables,
    blocks or HTML. Anything but text is returned as it is."""
    if not isinstance(value, str) or isinstance(value, Markdown):
        return value
    shown = _one_line(value).translate(_MARKUP)
    # Addresses become links without any markup.
    shown = re.sub(r":(?=//)", "&#58;", shown)
    shown = re.sub(r"(?<=www)\.", "&#46;", shown, flags=re.IGNORECASE)
    return _AT_START.sub(lambda match: match[1] + _entities(match[2]), shown)


def as_code(value: str) -> Markdown:
    """A value as Markdown code, in one line."""
    shown = _one_line(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    margin = "" if shown and "`" not in shown else " "
    return Markdown(f"{fence}{margin}{shown}{margin}{fence}")


def as_yaml(value: Any) -> str:
    """A value as YAML in one line, which is JSON; nothing in its texts is markup in Markdown, because front
    matter is shown as text where nobody knows it."""
    plain = json.dumps(value, ensure_ascii=False)
    return re.sub(r'"(?:[^"\\]|\\.)*"', lambda text: _MARKED.sub(_escaped, _one_line(text[0])), plain)


def _escaped(character: re.Match[str]) -> str:
    return f"\\u{ord(character[0]):04x}" if character[0] <= "\uffff" else f"\\U{ord(character[0]):08x}"


def _one_line(value: str) -> str:
    """With blanks for white space, and marks for characters that are not seen, such as those that reverse
    the direction of a text."""
    return "".join(c if c.isprintable() else "\ufffd" for c in re.sub(r"\s+", " ", value))


def _entities(shown: str) -> str:
    return "".join(f"&#{ord(character)};" for character in shown)


# In a JSON text: all but letters, digits and what is markup nowhere; JSON's own escapes stay.
_MARKED = re.compile(r'[^\w ,.()%\\"-]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.', re.IGNORECASE)
# The folders of an absolute path, which belong to one machine; a URI of a store has none.
_FOLDERS = re.compile(r"(?<![\w.:/~-])(?:file://)?~?/(?:[^\s/'\"]+/)*(?=[^\s/'\"])")


def without_folders(text: str) -> str:
    """A text for a page that others see: of each absolute path on this machine, only the last part."""
    if re.match(r"~?/|file:/", text) and "\n" not in text:
        return text.rstrip("/").rpartition("/")[2]
    return _FOLDERS.sub("", text)
