"""A candidate may make nothing worse, change no test by any name, and run no longer than the run's own limit."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import BUGGY, FakeModel, Project
from test_fix_safety import RIGHT, verdicts
from test_fix_stages import FIXED, TARGET, only

from lsp_agent.agent import events
from lsp_agent.agent.fix import fix
from lsp_agent.agent.judge import LAST_TIMEOUT_S, worse
from lsp_agent.agent.proof import LEAST_PROOF_S, proof_timeout, prove
from lsp_agent.agent.request import FixRequest, Limits
from lsp_agent.cancel import CancelToken
from lsp_agent.errors import UserError
from lsp_agent.testing.results import Outcome, TestResult, TestRun
from lsp_agent.workspace.changes import FileChange
from lsp_agent.workspace.workspace import Workspace

BELOW = "from calc import below\n\n\ndef test_below():\n    assert below([1, 2], 2) is True\n"
SKIPS = """from unittest import SkipTest

from calc import below


def test_more():
    if not below([1, 2], 2):
        raise SkipTest
    assert below([5], 1) is False
"""
MORE = "test_more.py::test_more"


def run_of(**outcomes: Outcome) -> TestRun:
    return TestRun({f"t.py::{n}": TestResult(f"t.py::{n}", o) for n, o in outcomes.items()}, 1.0, ())


def test_a_skipped_test_that_now_fails_is_worse(calc: Project) -> None:
    calc.write(test_calc_py=BELOW, test_more_py=SKIPS)
    calc.model.infills = only("total == limit", "True")
    result = calc.fix(max_turns=60)
    assert result.status == "not_green" and result.changes == ()
    assert "breaks others" in verdicts(calc) and "passes" not in verdicts(calc)
    assert (result.fixed, result.broken, result.still_failing) == ((TARGET,), (MORE,), ())
    assert "if True:" in result.diff and MORE not in result.other_failing


def test_all_that_the_best_attempt_breaks_is_named(calc: Project) -> None:
    """The search stopped at the first file that broke; the report runs the rest as well."""
    calc.write(test_more_py=SKIPS)
    calc.runner.test_seconds = 3.0  # a suite too slow to run whole each time
    calc.model.infills = only("total == limit", "True")
    result = calc.fix(max_turns=60)
    assert set(result.broken) == {"test_calc.py::test_above", MORE} and result.fixed == (TARGET,)
    assert calc.runner.runs[-1][0] == (), "the last run was of all tests"


def test_progress_is_shown_rather_than_an_attempt_that_breaks(project: Project) -> None:
    project.write(
        a_py="def one():\n    return 2\n",
        b_py="def two():\n    return 3\n",
        test_a_py="from a import one\n\n\ndef test_one():\n    assert one() == 1\n",
        test_b_py="from b import two\n\n\ndef test_two():\n    assert two() == 2\n\n\n"
        "def test_not():\n    assert two() != 2\n",
    )
    project.model.infills = lambda p: "1" if "test_one" in p else "2" if "test_two" in p else ""
    result = project.fix(max_turns=60)
    assert result.status == "not_green" and result.fixed == ("test_a.py::test_one",) and result.broken == ()


@pytest.mark.parametrize(
    ("before", "after", "is_worse"),
    [
        ("passed", "failed", True),
        ("passed", "skipped", True),
        ("skipped", "failed", True),
        ("xpassed", "error", True),
        ("failed", "error", False),
        ("failed", "skipped", False),
        ("xfailed", "xpassed", False),
        ("skipped", "passed", False),
    ],
)
def test_worse(before: Outcome, after: Outcome, is_worse: bool) -> None:
    assert worse(run_of(a=before, b="passed"), run_of(a=after, b="passed")) == (("t.py::a",) if is_worse else ())


def test_new_failing_and_missing_tests_are_worse() -> None:
    before = run_of(a="passed", b="passed")
    assert worse(before, run_of(a="passed", b="passed", c="failed")) == ("t.py::c",)
    assert worse(before, run_of(a="passed")) == ("t.py::b",)
    assert worse(before, replace(run_of(a="passed"), complete=False)) == ("t.py::b",), "a cut run proves nothing"


def proof_of(calc: Project, path: str, after: str):
    before = calc.runner.run(calc.root, timeout_s=9, cancel=CancelToken())
    change = FileChange(path, (calc.root / path).read_bytes(), after.encode())
    return prove(calc.runner, Workspace(calc.root), [change], before, [TARGET], lambda: 9.0, CancelToken())


def test_proof_refuses_what_is_worse(calc: Project) -> None:
    calc.write(test_calc_py=BELOW, test_more_py=SKIPS)
    proof = proof_of(calc, "calc.py", BUGGY.replace("total == limit", "True"))
    assert proof.broken == (MORE,) and MORE in proof.problem
    assert proof_of(calc, "calc.py", FIXED).problem == ""


def test_proof_refuses_a_change_of_a_test_through_a_link(calc: Project) -> None:
    (calc.root / "tests").mkdir()
    (calc.root / "calc.py").rename(calc.root / "tests" / "calc.py")
    (calc.root / "calc.py").symlink_to("tests/calc.py")
    ran: list[Path] = []
    calc.runner.before_run = ran.append
    proof = proof_of(calc, "calc.py", FIXED)
    assert "calc.py belongs to the tests" in proof.problem and len(ran) == 1, "it did not even run"


def test_a_file_that_became_a_test_meanwhile_is_not_changed(calc: Project) -> None:
    """Whatever let a change come so far: right before it is handed out it is looked at again."""
    calc.model.infills = RIGHT
    known = calc.runner.is_protected

    def is_protected(path: str) -> bool:
        return known(path) or (path == "calc.py" and any(isinstance(e, events.Verifying) for e in calc.events))

    calc.runner.is_protected = is_protected
    result = calc.fix()
    assert result.status == "not_green" and result.changes == () and "belongs to the tests" in result.reason


def test_test_runs_get_no_more_time_than_the_run_has(calc: Project) -> None:
    calc.runner.test_seconds = 50.0  # slow tests may otherwise take minutes each
    calc.model.infills = RIGHT
    assert calc.fix(max_seconds=20).status == "green"
    *search, proof = calc.runner.timeouts
    assert len(search) >= 3 and all(LAST_TIMEOUT_S <= t <= 20 for t in search)
    assert proof <= 20


def test_the_proof_has_time_even_at_the_limit() -> None:
    before = run_of(a="passed")
    assert proof_timeout(120, 0.0, before) == LEAST_PROOF_S
    assert proof_timeout(120, 50.0, before) == 50
    assert proof_timeout(120, 5.0, replace(before, seconds=20.0)) == 60
    assert proof_timeout(4, 0.0, before) == 4


def test_a_baseline_without_any_result_says_what_to_do(calc: Project) -> None:
    calc.runner.run = lambda tree, *a, **k: TestRun({}, 60.0, (), complete=False)
    with pytest.raises(UserError, match="No test ended within 60 seconds"):
        calc.fix(max_seconds=60)


def test_a_missing_model_is_told_before_more_tests_run(calc: Project) -> None:
    def no_model(name: str | None, cancel: CancelToken) -> FakeModel:
        raise UserError("No model is installed.")

    def wait_for_loading(tree: Path) -> None:
        for thread in threading.enumerate():
            if thread.name == "load model":
                thread.join(10)

    calc.runner.before_run = wait_for_loading
    request = FixRequest(limits=Limits(max_seconds=30))
    with pytest.raises(UserError, match="No model"):
        fix(request, Workspace(calc.root), calc.runner, no_model, calc.events.append, CancelToken())
    assert len(calc.runner.runs) == 1
