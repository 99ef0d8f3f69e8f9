"""Which code actions are offered where, and to which client."""

from __future__ import annotations

from dataclasses import replace

import pytest
from lsprotocol import types

from lsp_agent.lsp.capabilities import ClientFeatures
from lsp_agent.lsp.code_actions import Situation, enclosing_test, list_actions
from lsp_agent.lsp.results import Results
from lsp_agent.testing.results import TestResult

FULL = ClientFeatures(code_action_literals=True, disabled_actions=True, action_data=True)
FAILING = Results({"t.py::test_a": TestResult("t.py::test_a", "failed", path="t.py")}, ran=True)
READY = Situation(FULL, "file:///w", FAILING)
HERE = types.Range(types.Position(0, 0), types.Position(0, 0))
DIAGNOSTIC = types.Diagnostic(HERE, "test_a fails", source="lsp-agent", data={"nodeids": ["t.py::test_a"]})


def listed(situation: Situation, *diagnostics: types.Diagnostic, only: list[str] | None = None, **more: object) -> list:
    params = types.CodeActionParams(
        types.TextDocumentIdentifier("file:///w/t.py"), HERE, types.CodeActionContext(list(diagnostics), only)
    )
    return list_actions(params, situation, more.get("known", ()), more.get("test"))  # type: ignore[arg-type]


def by_kind(actions: list) -> dict[str, types.CodeAction]:
    return {action.kind: action for action in actions}


def test_a_diagnostic_offers_its_fix() -> None:
    fix = by_kind(listed(READY, DIAGNOSTIC))["quickfix.lspAgent.fixTest"]
    assert fix.title == "Fix failing test test_a"
    assert fix.diagnostics == [DIAGNOSTIC]
    assert fix.disabled is None
    assert not fix.is_preferred
    assert fix.command is not None
    assert fix.command.arguments == [{"folder": "file:///w", "nodeids": ["t.py::test_a"]}]


def test_the_servers_own_diagnostics_count_where_the_client_sends_no_data() -> None:
    without_data = types.Diagnostic(HERE, "test_a fails", source="lsp-agent")
    assert "quickfix.lspAgent.fixTest" in by_kind(listed(READY, without_data, known=[DIAGNOSTIC]))
    assert "quickfix.lspAgent.fixTest" not in by_kind(listed(READY))


def test_the_cursor_in_a_failing_test_offers_its_fix() -> None:
    assert "quickfix.lspAgent.fixTest" in by_kind(listed(READY, test=("t.py", ("test_a",))))
    assert "quickfix.lspAgent.fixTest" not in by_kind(listed(READY, test=("t.py", ("test_b",))))


def test_before_any_run_the_test_around_the_cursor_can_be_run_and_fixed() -> None:
    fresh = replace(READY, results=Results())
    fix = by_kind(listed(fresh, test=("t.py", ("TestX", "test_b"))))["quickfix.lspAgent.fixTest"]
    assert fix.command is not None
    assert fix.command.arguments == [{"folder": "file:///w", "nodeids": ["t.py::TestX::test_b"]}]


def test_a_test_that_passes_by_now_is_not_offered() -> None:
    green = Results({"t.py::test_a": TestResult("t.py::test_a", "passed")}, ran=True)
    actions = by_kind(listed(replace(READY, results=green), DIAGNOSTIC))
    assert "quickfix.lspAgent.fixTest" not in actions
    assert actions["source.lspAgent.makeGreen"].disabled is not None


@pytest.mark.parametrize(
    ("only", "kinds"),
    [
        (["quickfix"], {"quickfix.lspAgent.fixTest"}),
        (["source"], {"source.lspAgent.makeGreen", "source.lspAgent.runTests", "source.lspAgent.undo"}),
        (["source.lspAgent.runTests"], {"source.lspAgent.runTests"}),
        (["source.lspAgentOther", "refactor"], set()),
        (["source.organizeImports"], set()),
    ],
)
def test_only_the_kinds_asked_for_are_listed(only: list[str], kinds: set[str]) -> None:
    assert set(by_kind(listed(READY, DIAGNOSTIC, only=only))) == kinds


def test_while_a_job_runs_stop_is_offered_and_the_rest_is_disabled_with_a_reason() -> None:
    actions = by_kind(listed(replace(READY, running="Run the tests", stoppable="Run the tests"), DIAGNOSTIC))
    assert actions.pop("source.lspAgent.stop").disabled is None
    for action in actions.values():
        assert action.disabled is not None
        assert "Run the tests is running" in action.disabled.reason
        assert action.command is None


def test_a_missing_model_disables_only_what_needs_one() -> None:
    actions = by_kind(listed(replace(READY, model_problem="Install a model."), DIAGNOSTIC))
    assert actions["quickfix.lspAgent.fixTest"].disabled == types.CodeActionDisabled("Install a model.")
    assert actions["source.lspAgent.makeGreen"].disabled is not None
    assert actions["source.lspAgent.runTests"].disabled is None


def test_a_file_without_a_folder_says_so() -> None:
    for action in by_kind(listed(Situation(FULL))).values():
        assert action.disabled is not None
        assert "Open the project's folder" in action.disabled.reason


def test_a_client_without_disabled_support_gets_only_what_works() -> None:
    kinds = by_kind(
        listed(replace(READY, features=replace(FULL, disabled_actions=False), running="Fix", stoppable="Fix"))
    )
    assert set(kinds) == {"source.lspAgent.stop"}


def test_a_client_without_literals_gets_commands() -> None:
    actions = listed(replace(READY, features=ClientFeatures()), DIAGNOSTIC)
    assert all(isinstance(action, types.Command) for action in actions)
    assert [action.command for action in actions][:2] == ["lspAgent.fixTest", "lspAgent.makeGreen"]


TEXT = '''import x

@pytest.mark.parametrize("a", [1])
def test_one(a):
    text = """
unindented text
"""
    assert a

class TestTwo:
    def helper(self):
        pass

    async def test_three(self):
        def inner():
            return 1
        assert inner()

VALUE = 1
'''


@pytest.mark.parametrize(
    ("marker", "names"),
    [
        ("@pytest", ("test_one",)),
        ("def test_one", ("test_one",)),
        ("assert a", ("test_one",)),
        ("class TestTwo", None),
        ("pass", None),
        ("async def", ("TestTwo", "test_three")),
        ("assert inner", ("TestTwo", "test_three")),
        ("import x", None),
        ("VALUE", None),
    ],
)
def test_the_test_around_a_line(marker: str, names: tuple[str, ...] | None) -> None:
    line = TEXT[: TEXT.index(marker)].count("\n")
    assert enclosing_test(TEXT, line) == names
