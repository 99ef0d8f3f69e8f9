"""Comparing two runs."""

from __future__ import annotations

import pytest

from lsp_agent.testing.results import Outcome, TestResult, TestRun, newly_bad

TEST = "tests/test_a.py::test"


def run_of(complete: bool = True, **outcomes: Outcome) -> TestRun:
    results = {n: TestResult(n, o) for n, o in ((f"{TEST}_{name}", outcome) for name, outcome in outcomes.items())}
    return TestRun(results, 1.0, ("pytest",), complete)


@pytest.mark.parametrize("before", ["passed", "skipped", "xfailed", "xpassed"])
@pytest.mark.parametrize("after", ["failed", "error", "crashed", "timeout"])
def test_what_was_not_bad_and_is_counts(before: Outcome, after: Outcome) -> None:
    assert newly_bad(run_of(a=before), run_of(a=after)) == (f"{TEST}_a",)


def test_a_failing_test_that_was_not_there_counts() -> None:
    assert newly_bad(run_of(a="passed"), run_of(a="passed", b="failed")) == (f"{TEST}_b",)


@pytest.mark.parametrize("before", ["failed", "error", "crashed", "timeout"])
def test_what_was_bad_may_stay_bad_in_another_way(before: Outcome) -> None:
    assert newly_bad(run_of(a=before), run_of(a="failed")) == ()


def test_what_passed_must_be_there_in_a_complete_run() -> None:
    before = run_of(a="passed", b="xfailed", c="failed", d="skipped")
    assert newly_bad(before, run_of()) == (f"{TEST}_a", f"{TEST}_b")
    assert newly_bad(before, run_of(complete=False)) == ()


def test_tests_of_a_file_that_could_not_be_collected_are_not_new() -> None:
    path = "tests/test_a.py"
    broken = TestRun({path: TestResult(path, "error")}, 1.0, ("pytest",))
    assert newly_bad(broken, run_of(a="failed")) == ()
    assert newly_bad(run_of(a="failed"), broken) == (path,), "but a file that breaks is"
