"""The first runs, that say what is wrong, and the last one, that proves it mended on exactly the user's tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lsp_agent.agent.judge import passes
from lsp_agent.agent.request import FixRequest
from lsp_agent.cancel import CancelToken
from lsp_agent.errors import ExitCode, UserError
from lsp_agent.testing.results import TestResult, TestRun
from lsp_agent.testing.runner import Runner
from lsp_agent.workspace.changes import FileChange
from lsp_agent.workspace.merge import ConflictError, merge
from lsp_agent.workspace.scratch import ScratchTree
from lsp_agent.workspace.workspace import Workspace

VERIFY_ATTEMPTS = 3
MOST_TESTS_WITH_COVERAGE = 300
HUNG_S = 20.0


def baseline(runner: Runner, scratch: ScratchTree, request: FixRequest, cancel: CancelToken) -> TestRun:
    """Run all tests of the unchanged tree; raise `UserError` when there is nothing to work with."""
    run = runner.run(scratch.path, timeout_s=request.test_timeout_s, cancel=cancel)
    if request.nodeids and not run.error:
        missing = [n for n in request.nodeids if not _matching(run, n)]
        if missing:
            # A name the full run did not have: pytest knows whether it exists at all.
            scratch.reset()
            asked = runner.run(scratch.path, missing, timeout_s=request.test_timeout_s, cancel=cancel)
            if asked.error or not asked.results:
                raise UserError(asked.error or f"This test does not exist: {missing[0]}.", ExitCode.USAGE)
            run = TestRun(
                {**run.results, **asked.results}, run.seconds, run.command, run.complete, run.error, {}, run.output
            )
    if not run.results:
        raise UserError(run.error or f"No tests were found in {scratch.workspace.root}.")
    if run.error and not run.failing:
        raise UserError(run.error)
    return run


def targets(run: TestRun, request: FixRequest) -> tuple[str, ...]:
    """The failing tests to mend: those asked for, or all; a file or class asked for stands for its tests."""
    if not request.nodeids:
        return run.failing
    wanted = {n for asked in request.nodeids for n in _matching(run, asked)}
    return tuple(n for n in run.failing if n in wanted)


def second_look(
    runner: Runner, scratch: ScratchTree, run: TestRun, failing: Sequence[str], timeout_s: float, cancel: CancelToken
) -> TestRun:
    """Run the failing tests again, with coverage, and the other tests of their files for comparison.

    Tests that hung run apart and briefly: they would hang again and take the others' time.
    """
    hung = [n for n in failing if run.results[n].outcome == "timeout"]
    rest = [n for n in failing if n not in hung]
    files = dict.fromkeys(n.partition("::")[0] for n in failing)
    beside = [n for n in run.passing if n.partition("::")[0] in files]
    results: dict[str, TestResult] = {}
    coverage: dict[str, Mapping[str, frozenset[int]]] = {}
    seconds = 0.0
    for nodeids, limit in (([*rest, *beside[:MOST_TESTS_WITH_COVERAGE]], timeout_s), (hung, min(timeout_s, HUNG_S))):
        if nodeids:
            scratch.reset()
            again = runner.run(scratch.path, nodeids, timeout_s=limit, cancel=cancel, coverage=True)
            results |= again.results
            coverage |= again.coverage
            seconds += again.seconds
    return TestRun(results, seconds, run.command, coverage=coverage)


@dataclass(frozen=True)
class Proof:
    """The last run; `problem` is one sentence when it proves nothing."""

    changes: tuple[FileChange, ...]
    run: TestRun | None = None
    problem: str = ""


def prove(
    runner: Runner,
    workspace: Workspace,
    changes: Sequence[FileChange],
    before: TestRun,
    fixed: Sequence[str],
    timeout_s: float,
    cancel: CancelToken,
) -> Proof:
    """Run all tests on a fresh copy of the user's tree as it is now, with `changes` in it.

    What the user edited meanwhile is kept: the changes are merged into it, and the run is done again when the tree
    changed while it ran.
    """
    current = tuple(changes)
    for _ in range(VERIFY_ATTEMPTS):
        digest = workspace.digest()
        try:
            current = _rebased(workspace, changes)
        except ConflictError:
            return Proof(current, None, "The same lines were edited while the fix was found; run again.")
        if not current:
            return Proof(current, None, "The files were edited while the fix was found and hold it already; run again.")
        with ScratchTree(workspace) as fresh:
            fresh.apply(current)
            run = runner.run(fresh.path, timeout_s=timeout_s, cancel=cancel)
        if workspace.digest() == digest:
            return Proof(current, run, _lacking(before, run, fixed))
    return Proof(current, None, "The files kept changing while the fix was proven; run again when they are still.")


def _rebased(workspace: Workspace, changes: Sequence[FileChange]) -> tuple[FileChange, ...]:
    rebased = []
    for change in changes:
        try:
            now: bytes | None = workspace.read(change.path)
        except OSError:
            now = None
        after = merge(now, change.before, change.after)
        if after != now:
            rebased.append(FileChange(change.path, now, after))
    return tuple(rebased)


def _lacking(before: TestRun, run: TestRun, fixed: Sequence[str]) -> str:
    if run.error:
        return f"The last test run failed: {run.error}"
    if not run.complete:
        return "The last test run was cut short."
    lost = [n for n in fixed if not passes(run, n)]
    if lost:
        return f"{lost[0]} did not pass in the last run, on the tree as it is now."
    passing = set(run.passing)
    broken = [n for n in before.passing if n not in passing]
    if broken:
        return f"{broken[0]} passed before and did not in the last run, on the tree as it is now."
    return ""


def _matching(run: TestRun, asked: str) -> list[str]:
    """Tests that an id, a class, a file or a parametrised test's name stands for."""
    exact = [n for n in run.results if n == asked]
    return exact or [
        n for n in run.results if n.startswith((f"{asked}::", f"{asked}[")) or n == asked.partition("::")[0]
    ]
