"""The code actions, listed from what is known already: no test and no model ever runs in here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lsprotocol import types

from lsp_agent.lsp.capabilities import ClientFeatures
from lsp_agent.lsp.convert import split_lines
from lsp_agent.lsp.diagnostics import SOURCE, short_name
from lsp_agent.lsp.results import Results

FIX_TEST = "lspAgent.fixTest"
MAKE_GREEN = "lspAgent.makeGreen"
RUN_TESTS = "lspAgent.runTests"
UNDO = "lspAgent.undo"
STOP = "lspAgent.stop"
COMMANDS = (FIX_TEST, MAKE_GREEN, RUN_TESTS, UNDO, STOP)
KINDS = {
    FIX_TEST: "quickfix.lspAgent.fixTest",
    MAKE_GREEN: "source.lspAgent.makeGreen",
    RUN_TESTS: "source.lspAgent.runTests",
    UNDO: "source.lspAgent.undo",
    STOP: "source.lspAgent.stop",
}
FIXES_SHOWN = 5
"""Most "Fix failing test" actions in one list; the others are reached from their tests."""

_DEFINITION = re.compile(r"(\s*)(?:async\s+def|def|class)\s+(\w+)")


@dataclass(frozen=True)
class Situation:
    """All that the list depends on."""

    features: ClientFeatures
    folder: str | None = None
    """URI of the workspace folder; None for a file outside of every folder."""
    results: Results = field(default_factory=Results)
    running: str | None = None
    """Title of the job that runs, if it is one the user asked for."""
    stoppable: str | None = None
    """Title of the job that runs."""
    model_problem: str | None = None
    """Why no model can be opened."""
    undo_problem: str | None = None
    """Why there is nothing to undo."""


def list_actions(
    params: types.CodeActionParams,
    situation: Situation,
    known: Sequence[types.Diagnostic],
    test: tuple[str, tuple[str, ...]] | None,
) -> list[types.CodeAction | types.Command]:
    """The actions for a range.

    `known` are our diagnostics that touch the range as the server sees it, for clients that send none or without their
    data; `test` is the test around the cursor: path and names.
    """
    actions: list[types.CodeAction | types.Command] = []
    for title, command, nodeids, diagnostics, reason in _candidates(params, situation, known, test):
        if not _wanted(KINDS[command], params.context.only):
            continue
        arguments = {"folder": situation.folder, **({"nodeids": nodeids} if nodeids else {})}
        action = types.Command(title, command, arguments=[arguments])
        if not situation.features.code_action_literals:
            if reason is None:
                actions.append(action)
            continue
        if reason is not None and not situation.features.disabled_actions:
            continue
        actions.append(
            types.CodeAction(
                title,
                kind=KINDS[command],
                diagnostics=diagnostics or None,
                disabled=types.CodeActionDisabled(reason) if reason is not None else None,
                command=action if reason is None else None,
                data=arguments if situation.features.action_data else None,
            )
        )
    return actions


Candidate = tuple[str, str, list[str], list[types.Diagnostic], str | None]
"""Title, command, test ids, the diagnostics it fixes, and why it is disabled."""


def _candidates(
    params: types.CodeActionParams,
    situation: Situation,
    known: Sequence[types.Diagnostic],
    test: tuple[str, tuple[str, ...]] | None,
) -> Iterable[Candidate]:
    no_folder = None if situation.folder is not None else "Open the project's folder: tests run in a workspace folder."
    busy = no_folder or (f"{situation.running} is running: stop it first." if situation.running else None)
    cannot_fix = busy or situation.model_problem
    for title, nodeids, diagnostics in _fixes(params, situation.results, known, test):
        yield title, FIX_TEST, nodeids, diagnostics, cannot_fix
    nothing = (
        "All tests passed when they last ran." if situation.results.ran and not situation.results.failing else None
    )
    yield "Make all tests green", MAKE_GREEN, [], [], cannot_fix or nothing
    yield "Run the tests", RUN_TESTS, [], [], busy
    yield "Undo the last run", UNDO, [], [], busy or situation.undo_problem
    if situation.stoppable is not None:
        yield f"Stop ({situation.stoppable})", STOP, [], [], None


def _fixes(
    params: types.CodeActionParams,
    results: Results,
    known: Sequence[types.Diagnostic],
    test: tuple[str, tuple[str, ...]] | None,
) -> Iterable[tuple[str, list[str], list[types.Diagnostic]]]:
    """Tests to offer a fix for: first those of the diagnostics, then the one around the cursor."""
    offered: dict[str, list[types.Diagnostic]] = {}
    sent = [d for d in params.context.diagnostics if d.source == SOURCE and _nodeids(d)]
    for diagnostic in sent or known:
        for nodeid in _nodeids(diagnostic):
            if nodeid in results.failing:
                offered.setdefault(nodeid, []).append(diagnostic)
    around = results.of_test(*test) if test is not None else []
    for result in around:
        if result.bad:
            offered.setdefault(result.nodeid, [])
    for nodeid, diagnostics in list(offered.items())[:FIXES_SHOWN]:
        shown = [d for d in diagnostics if d in params.context.diagnostics]
        yield f"Fix failing test {short_name(nodeid)}", [nodeid], shown
    if test is not None and not around and not results.ran:
        yield f"Run {test[1][-1]} and fix it if it fails", ["::".join((test[0], *test[1]))], []


def _nodeids(diagnostic: types.Diagnostic) -> list[str]:
    data = diagnostic.data
    nodeids = data.get("nodeids") if isinstance(data, dict) else getattr(data, "nodeids", None)
    return [n for n in nodeids if isinstance(n, str)] if isinstance(nodeids, (list, tuple)) else []


def _wanted(kind: str, only: Sequence[types.CodeActionKind | str] | None) -> bool:
    """Kinds are hierarchical: `quickfix` asks for `quickfix.lspAgent.fixTest` too, and the empty kind for all."""
    if not only:
        return True
    names = [o.value if isinstance(o, types.CodeActionKind) else o for o in only]
    return any(not name or kind == name or kind.startswith(name + ".") for name in names)


def enclosing_test(text: str, line: int) -> tuple[str, ...] | None:
    """Names (classes, then function) of the test around the 0-based `line`.

    Found by indentation: cheap, and it works in a buffer that does not parse.
    """
    lines = split_lines(text)
    if line >= len(lines):
        return None
    while line < len(lines) - 1 and lines[line].lstrip().startswith("@"):
        line += 1
    definition = _DEFINITION.match(lines[line])
    names = [definition[2]] if definition else []
    # A blank line belongs to whatever stands above it.
    indent = len(lines[line]) - len(lines[line].lstrip()) if lines[line].strip() else len(text)
    for row in range(line - 1, -1, -1):
        match = _DEFINITION.match(lines[row]) if indent else None
        if match is not None and len(match[1]) < indent:
            names.insert(0, match[2])
            indent = len(match[1])
    for depth, name in enumerate(names, 1):
        if name.startswith("test"):
            return tuple(names[:depth])
    return None
