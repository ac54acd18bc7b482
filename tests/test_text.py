import re

import pytest
import yaml

from bcd import text


def test_numbers_have_the_noun_that_fits() -> None:
    assert text.counted(1, "patient") == "1 patient"
    assert text.counted(0, "patient") == "0 patients"
    assert text.counted(1, "entry", "entries") == "1 entry"
    assert text.counted(1_200, "entry", "entries") == "1,200 entries"


def test_lists_end_in_and() -> None:
    assert text.listed([]) == ""
    assert [text.listed(list("abc")[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]


def test_some_of_many():
    assert text.some("abcde", separator="; ") == "a; b; c; and 2 more"
    assert text.some("ab") == "a, b"


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [(0, "0.0 MiB"), (300_000, "0.3 MiB"), (2**26, "64 MiB"), (3.5 * 2**30, "3.5 GiB")],
)
def test_sizes(n_bytes, expected):
    assert text.size(n_bytes) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0 s"), (89, "89 s"), (100, "2 min"), (5_399, "90 min"), (9_000, "2.5 h")]
)
def test_durations(seconds, expected):
    assert text.duration(seconds) == expected


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("<script>alert(1)</script>", "&#60;script&#62;alert(1)&#60;/script&#62;"),
        ("[see](https://e.example)", r"\[see\](https&#58;//e.example)"),
        ("![](www.e.example)", r"!\[\](www&#46;e.example)"),
        ("a | b\r\n|---|", "a &#124; b &#124;---&#124;"),
        ("# a", "&#35; a"),
        ("1. a", "&#49;. a"),
        ("*a* `b` _c_", r"\*a\* \`b\` \_c\_"),
        ("a\u202eb\x00", "a\ufffdb\ufffd"),
        ("0.93 of 12, at 0.49 µm/px: 100 %", "0.93 of 12, at 0.49 µm/px: 100 %"),
        (text.Markdown("*a*"), "*a*"),
        (0.5, 0.5),
    ],
)
def test_values_in_markdown_are_shown_as_they_are(value, shown):
    assert text.in_markdown(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [("a b", "`a b`"), ("a`b", "`` a`b ``"), ("`` <b>", "``` `` <b> ```"), ("a\n\nb", "`a b`"), ("", "`  `")],
)
def test_values_as_code_stay_in_it(value, shown):
    assert text.as_code(value) == shown
    assert text.in_markdown(text.as_code(value)) == shown


def test_a_text_for_others_has_no_folders_of_this_machine():
    for given, shown in {
        "/home/alice/My data/BreaKHis_v1/": "BreaKHis_v1",
        "~/data": "data",
        "file:///data/x.png": "x.png",
        "s3://bucket/a/b": "s3://bucket/a/b",
        "relative/a": "relative/a",
        "python jobs/train.py --data /srv/a/b --output=/runs --mpp 0.5": (
            "python jobs/train.py --data b --output=runs --mpp 0.5"
        ),
        "/a/x.png: cannot read it": "x.png: cannot read it",
        "0.5 µm/px; see s3://bucket/a and '/b/c'": "0.5 µm/px; see s3://bucket/a and 'c'",
    }.items():
        assert text.without_folders(given) == shown


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ("cc-by-4.0", '"cc-by-4.0"'),
        ("balanced_accuracy, 95 % 0.81 to 0.93", '"balanced_accuracy, 95 % 0.81 to 0.93"'),
        ("<b> [x](https://e.example) *y* _z_", None),
        ('a"\\\n---\n# b: {c}', None),
        ("ü µ 😀 | www.e.example", None),
        ({"a": [1, 0.25, None, True, "`x`"]}, None),
    ],
)
def test_front_matter_is_yaml_without_markup(value, plain):
    written = text.as_yaml(value)
    assert yaml.safe_load(f"key: {written}") == {"key": value}
    assert plain in (None, written)
    texts = re.sub(r"\\u\w{4}|\\U\w{8}", "", " ".join(re.findall(r'"(?:[^"\\]|\\.)*"', written)))
    assert not re.search(r"[<>\[\]*`|#{}~&$]|(?<!\w)_|://|www\.", texts)


def test_front_matter_marks_what_is_not_seen():
    assert yaml.safe_load(text.as_yaml("a\u202eb")) == "a\ufffdb"
