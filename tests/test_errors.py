import inspect

from bcd import errors


def test_the_tree_in_the_docstring_is_the_tree_in_the_code():
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__]
    assert all(issubclass(c, errors.BcdError) for c in classes)
    assert {c.__name__ for c in classes} == {w for w in errors.__doc__.split() if w.endswith("Error")}


def test_results_that_must_not_be_relied_on_exit_1():
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass)]
    failing = {"IncompleteError", "AuditError", "DiagnosisError"}
    assert {c.__name__ for c in classes if c.exit_code == 1} == failing
    assert {c.exit_code for c in classes} == {1, 2}
