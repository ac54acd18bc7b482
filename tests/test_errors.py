import inspect

from bcd import errors

# An image that cannot be used ends in a row, and not a job.
CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c is not errors.ImageError]


def test_the_tree_in_the_docstring_is_the_tree_in_the_code():
    assert {c.__name__ for c in CLASSES} == {w for w in errors.__doc__.split() if w.endswith("Error")}


def test_results_that_must_not_be_relied_on_exit_1():
    failing = {"IncompleteError", "LostError", "AuditError", "DiagnosisError"}
    assert {c.__name__ for c in CLASSES if c.exit_code == 1} == failing
    assert {c.exit_code for c in CLASSES} == {1, 2}
