import re

from bcd.preflight.diagnosis import Check
from bcd.preflight.diagnosis_report import COLOURS, PLAIN, table_lines, verdict

CHECKS = [
    Check("nodes", "ok", "3 answered"),
    Check("disk", "fault", "10.0.0.3: 1.0 GiB free at /tmp/ray, 99 % full", "Make room there."),
    Check("memory", "warning", "10.0.0.2: 3.0 GiB free", "End what else runs there."),
]


def test_a_line_for_each_check_and_a_next_step_below_where_there_is_one():
    assert table_lines(CHECKS, 100, coloured=False) == [
        "  ok       nodes   3 answered",
        "  FAULT    disk    10.0.0.3: 1.0 GiB free at /tmp/ray, 99 % full",
        "                   -> Make room there.",
        "  WARNING  memory  10.0.0.2: 3.0 GiB free",
        "                   -> End what else runs there.",
    ]


def test_colours_add_nothing_but_colour():
    coloured = "\n".join(table_lines(CHECKS, 100, coloured=True))
    assert f"{COLOURS['fault']}FAULT  {PLAIN}  disk" in coloured
    assert re.sub(r"\033\[[\d;]*m", "", coloured).splitlines() == table_lines(CHECKS, 100, coloured=False)


def test_long_sentences_are_wrapped_below_themselves_and_what_is_copied_stays_whole():
    uri = "s3://bucket/" + "deep-folder/" * 8
    table = table_lines([Check("data", "fault", f"{uri} cannot be read", "Check the path, " * 6)], 80, False)
    assert table[0] == f"  FAULT    data  {uri}"
    assert table[1] == " " * 17 + "cannot be read"
    assert table[2].startswith(" " * 17 + "-> Check the path,")
    assert all(line.startswith(" " * 20) and line[20] != " " for line in table[3:])
    assert max(map(len, table[1:])) <= 80


def test_the_last_sentence_counts_and_tells_whether_to_start():
    assert (
        verdict(CHECKS, "jobs/train.py")
        == "1 fault and 1 warning: jobs/train.py should not be started here yet."
    )
    assert verdict(CHECKS[:1], "jobs/score.py") == "nothing found: jobs/score.py can start."
    assert verdict(CHECKS[2:], "jobs/serve.py") == "1 warning: jobs/serve.py can start."
